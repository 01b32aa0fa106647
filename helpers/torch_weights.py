"""PyTorch's legacy weights files, read without PyTorch and without running what a pickle may hold."""

import collections
import pickle
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


class _TensorUnpickler(pickle.Unpickler):
    """Unpickles tensors and nothing else: every other name in the file is refused before it is looked up."""

    def __init__(self, file):
        super().__init__(file)
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module, name):
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, and only tensors are admitted")
        return _ADMITTED[module, name]

    def persistent_load(self, pid):
        _, dtype, key, _, size, *_ = pid
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
                raise ValueError(f"magic number {magic!r}, version {version!r}")
            unpickler = _TensorUnpickler(file)
            state = unpickler.load()
            for key in _TensorUnpickler(file).load():
                _read_storage(file, unpickler.storages[key])
            return {name: tensor.array() for name, tensor in state.items()}
        except Exception as error:  # a damaged pickle can raise nearly anything
            raise ValueError(f"{path} is not a legacy PyTorch weights file (.pth): {error}.") from error


def _read_storage(file, storage: _Storage) -> None:
    size = int.from_bytes(file.read(8), "little")
    storage.values = np.frombuffer(file.read(size * np.dtype(storage.dtype).itemsize), storage.dtype)
    if storage.values.size != size or size != storage.size:
        raise ValueError("the file is cut short")
