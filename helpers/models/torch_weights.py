"""PyTorch's weights files, read without PyTorch and without running code in a pickle."""

import collections
import io
import math
import os
import pickle
import pickletools
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ENDINGS = (".pth", ".safetensors")


@dataclass
class _Storage:
    dtype: str
    size: int
    values: np.ndarray | None = None


@dataclass
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def array(self) -> np.ndarray:
        values = self.storage.values
        offset, strides = self.offset * values.itemsize, [step * values.itemsize for step in self.strides]
        array = np.ndarray(self.shape, values.dtype, values, offset, strides)  # refuses to reach beyond `values`
        return array.astype("float32" if array.dtype.kind == "f" else array.dtype)


def _tensor(storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_) -> _Tensor:
    return _Tensor(storage, offset, shape, strides)


_DTYPES = {"FloatStorage": "<f4", "HalfStorage": "<f2", "DoubleStorage": "<f8", "LongStorage": "<i8"}
_ADMITTED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor"): _tensor,  # torchvision's files from before 2018
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    **{("torch", name): dtype for name, dtype in _DTYPES.items()},
}

# What PyTorch writes; a pickle with anything else is refused before it is read.
_OPCODES = set(
    "PROTO STOP GLOBAL REDUCE BUILD BINPERSID MARK TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_TUPLE EMPTY_LIST APPEND APPENDS"
    " EMPTY_DICT SETITEM SETITEMS NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINUNICODE BINPUT LONG_BINPUT"
    " BINGET LONG_BINGET".split()
)


class _TensorUnpickler(pickle.Unpickler):
    """Unpickler of tensors only: every other name in the file is refused before it is looked up."""

    def __init__(self, file):
        super().__init__(file)
        self.file = file
        self.storages: dict[str, _Storage] = {}

    def load(self):
        start = self.file.tell()
        for number, (opcode, argument, _) in enumerate(pickletools.genops(self.file)):
            is_new = "PUT" in opcode.name  # it sets the length of a list
            if opcode.name not in _OPCODES or (is_new and argument > number):
                raise pickle.UnpicklingError(f"it has {opcode.name} {argument}, which no weights file needs")
        self.file.seek(start)
        return super().load()

    def find_class(self, module, name):
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, and only tensors are admitted")
        return _ADMITTED[module, name]

    def persistent_load(self, pid):
        _, dtype, key, _, size, *_ = pid
        if dtype not in _DTYPES.values() or type(size) is not int or size < 0:
            raise pickle.UnpicklingError("it holds numbers of another kind")
        return self.storages.setdefault(key, _Storage(dtype, size))


def read(path: str | Path) -> dict[str, np.ndarray]:
    """Read a state dict without PyTorch and without running code that the file may hold.

    Args:
        path: a ``.safetensors`` file, or a ``.pth`` file in either of PyTorch's formats: a zip archive (since 1.6), or
            the legacy one.

    Returns:
        name -> array, float32 or int64; numbers of half or double precision become float32.

    Raises:
        ValueError: the file is in another format or asks for something other than tensors.
    """
    if Path(path).suffix == ".safetensors":
        return _read_safetensors(path)
    with Path(path).open("rb") as file:
        try:
            state, storages = (_read_archive if zipfile.is_zipfile(file) else _read_legacy)(file)
            _check(state, storages)
            return {name: tensor.array() for name, tensor in state.items()}
        except Exception as error:  # a damaged pickle can raise nearly anything
            raise ValueError(f"{path} is not a PyTorch weights file (.pth): {error}.") from error


def arrays_of(tensors: Mapping[str, np.ndarray], name: str, *, depthwise: bool = False) -> list[np.ndarray]:
    """Return the weights of a PyTorch module in the order and the layout of the Keras layer of the same kind.

    Args:
        tensors: from `read`.
        name: of the module: a convolution, BatchNorm2d or a linear layer.
        depthwise: the module is a convolution with one filter a channel.

    Raises:
        KeyError: the file has no such module.
    """
    if f"{name}.running_mean" in tensors:
        return [tensors[f"{name}.{part}"] for part in ("weight", "bias", "running_mean", "running_var")]
    kernel = tensors[f"{name}.weight"]  # (out, in), (out, in, height, width); depthwise (channels, 1, height, width)
    axes = (1, 0) if kernel.ndim == 2 else (2, 3, 0, 1) if depthwise else (2, 3, 1, 0)
    return [kernel.transpose(axes), *(tensors[key] for key in [f"{name}.bias"] if key in tensors)]


def _read_legacy(file) -> tuple[dict, dict[str, _Storage]]:
    """Read the format before 1.6.

    It holds a magic number, a version, facts about the machine, the pickled dictionary, the list of storages, and each
    storage's length (int64) and values, little-endian.
    """
    file.seek(0)
    magic, version, _ = (_TensorUnpickler(file).load() for _ in range(3))
    if (magic, version) != (0x1950A86A20F9469CFC6C, 1001):
        raise ValueError("its first bytes are not those of such a file")
    unpickler = _TensorUnpickler(file)
    state = unpickler.load()
    for key in _TensorUnpickler(file).load():
        _read_storage(file, unpickler.storages[key])
    return state, unpickler.storages


def _read_archive(file) -> tuple[dict, dict[str, _Storage]]:
    """Read the format since 1.6: a zip archive of the pickled dictionary and of each storage's values."""
    archive = zipfile.ZipFile(file)
    folder = next(name for name in archive.namelist() if name.endswith("data.pkl")).removesuffix("data.pkl")
    if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
        raise ValueError("it is compressed, which PyTorch's files are not")
    if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
        raise ValueError("its numbers begin with the highest byte")
    unpickler = _TensorUnpickler(io.BytesIO(archive.read(f"{folder}data.pkl")))
    state = unpickler.load()
    for key, storage in unpickler.storages.items():
        storage.values = np.frombuffer(archive.read(f"{folder}data/{key}"), storage.dtype)
        if storage.values.size != storage.size:
            raise ValueError("a storage has another size than the file says")
    return state, unpickler.storages


def _read_safetensors(path: str | Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    try:
        tensors = load_file(path)
    except Exception as error:  # the package has its own error, and a KeyError for types that NumPy lacks
        raise ValueError(f"{path} is not a safetensors file that can be read: {error!r}.") from error
    return {name: array.astype("float32") if array.dtype.kind != "i" else array for name, array in tensors.items()}


def _check(state: dict, storages: dict[str, _Storage]) -> None:
    """Check that all are tensors and together no larger than the file, before memory is allocated."""
    for tensor in state.values():
        numbers = (tensor.offset, *tensor.shape, *tensor.strides)
        if not isinstance(tensor, _Tensor) or not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError("it holds something other than tensors")
    if sum(math.prod(tensor.shape) for tensor in state.values()) > sum(storage.size for storage in storages.values()):
        raise ValueError("its tensors hold more numbers than the file")


def _read_storage(file, storage: _Storage) -> None:
    size = int.from_bytes(file.read(8), "little")
    if size * np.dtype(storage.dtype).itemsize > os.fstat(file.fileno()).st_size:
        raise ValueError("the file is cut short")
    storage.values = np.frombuffer(file.read(size * np.dtype(storage.dtype).itemsize), storage.dtype)
    if storage.values.size != size or size != storage.size:
        raise ValueError("the file is cut short")
