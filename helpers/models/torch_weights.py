"""PyTorch's legacy weights files, read without PyTorch and without running what a pickle may hold."""

import collections
import math
import os
import pickle
import pickletools
from dataclasses import dataclass
from pathlib import Path

import numpy as np


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
        return np.ndarray(self.shape, values.dtype, values, offset, strides).copy()  # refuses to reach beyond `values`


_ADMITTED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): lambda storage, offset, shape, strides, *_: _Tensor(
        storage, offset, shape, strides
    ),
    ("torch", "FloatStorage"): "<f4",
    ("torch", "LongStorage"): "<i8",
}

# What PyTorch writes; whatever else a pickle may consist of is refused before any of it is read.
_OPCODES = set(
    "PROTO STOP GLOBAL REDUCE BUILD BINPERSID MARK TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_TUPLE EMPTY_LIST APPEND APPENDS"
    " EMPTY_DICT SETITEM SETITEMS NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINUNICODE BINPUT LONG_BINPUT"
    " BINGET LONG_BINGET".split()
)


class _TensorUnpickler(pickle.Unpickler):
    """Unpickles tensors and nothing else: every other name in the file is refused before it is looked up."""

    def __init__(self, file):
        super().__init__(file)
        self.file = file
        self.storages: dict[str, _Storage] = {}

    def load(self):
        start = self.file.tell()
        for number, (opcode, argument, _) in enumerate(pickletools.genops(self.file)):
            is_new = "PUT" in opcode.name  # it names a place in a list, which is made as long as that
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
        if dtype not in ("<f4", "<i8") or type(size) is not int:
            raise pickle.UnpicklingError("it holds numbers of another kind")
        return self.storages.setdefault(key, _Storage(dtype, size))


def read(path: str | Path) -> dict[str, np.ndarray]:
    """Reads a state dict in PyTorch's legacy format (before 1.6) without PyTorch and without running its code.

    The file holds a magic number, a version, facts on the machine, the pickled dictionary, the list of storages, and
    each storage's length (int64) and values, little-endian.

    Args:
        path: a ``.pth`` file.

    Returns:
        name -> array, float32 or int64.

    Raises:
        ValueError: the file is in another format or asks for anything but tensors.
    """
    with Path(path).open("rb") as file:
        try:
            magic, version, _ = (_TensorUnpickler(file).load() for _ in range(3))
            if (magic, version) != (0x1950A86A20F9469CFC6C, 1001):
                raise ValueError("it does not begin as such a file does")
            unpickler = _TensorUnpickler(file)
            state = unpickler.load()
            for key in _TensorUnpickler(file).load():
                _read_storage(file, unpickler.storages[key])
            _check(state, unpickler.storages)
            return {name: tensor.array() for name, tensor in state.items()}
        except Exception as error:  # a damaged pickle can raise nearly anything
            raise ValueError(f"{path} is not a legacy PyTorch weights file (.pth): {error}.") from error


def _check(state: dict, storages: dict[str, _Storage]) -> None:
    """Make sure that all are tensors and together no larger than what is in the file, before memory is taken."""
    for tensor in state.values():
        numbers = (tensor.offset, *tensor.shape, *tensor.strides)
        if not isinstance(tensor, _Tensor) or not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError("it holds something else than tensors")
    if sum(math.prod(tensor.shape) for tensor in state.values()) > sum(storage.size for storage in storages.values()):
        raise ValueError("its tensors hold more numbers than the file")


def _read_storage(file, storage: _Storage) -> None:
    size = int.from_bytes(file.read(8), "little")
    if size * np.dtype(storage.dtype).itemsize > os.fstat(file.fileno()).st_size:
        raise ValueError("the file is cut short")
    storage.values = np.frombuffer(file.read(size * np.dtype(storage.dtype).itemsize), storage.dtype)
    if storage.values.size != size or size != storage.size:
        raise ValueError("the file is cut short")
