"""The code of a bundle, used from within Thaw: it brings its own reader of images."""

import sys
from functools import cache
from importlib import util
from pathlib import Path
from types import ModuleType

NAMES = ("predict", "networks", "distances", "verify", "reading")  # of a bundle's modules


def load(bundle: Path) -> ModuleType:
    """Return the module `predict` of a bundle, which brings its own reader of images; this runs the bundle's code.

    Raises:
        FileNotFoundError: the folder is no bundle.
    """
    folder = Path(bundle).resolve()
    if not (folder / "predict.py").is_file() or not (folder / "model.json").is_file():
        raise FileNotFoundError(
            f"{bundle} is no bundle: it holds no predict.py and model.json. `thaw export` makes one."
        )
    return _loaded(folder)


@cache
def _loaded(folder: Path) -> ModuleType:
    """Import the bundle's modules under their own names, and leave none of these behind for another bundle."""
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in NAMES}
    sys.path.insert(0, str(folder))
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # a stored bundle stays as it was made
    try:
        spec = util.spec_from_file_location("predict", folder / "predict.py")
        module = util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = writes
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.split(".")[0] in NAMES]:
            del sys.modules[name]
        sys.modules.update(before)
    return module
