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
        FileNotFoundError: the folder is not a bundle.
    """
    folder = Path(bundle).resolve()
    if not (folder / "predict.py").is_file() or not (folder / "model.json").is_file():
        raise FileNotFoundError(
            f"{bundle} is not a bundle: it holds no predict.py and model.json. `thaw export` makes one."
        )
    return _loaded(folder)


@cache
def _loaded(folder: Path) -> ModuleType:
    """Import the bundle's modules under their own names, and remove these names again for the next bundle."""
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in NAMES}
    sys.path.insert(0, str(folder))
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # a stored bundle must not change
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
