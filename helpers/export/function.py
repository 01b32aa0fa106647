"""The function: a folder that answers over HTTP, ready to deploy, made from a bundle."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.core import disk
from helpers.evaluation.trust import distances
from helpers.export import bundle

if TYPE_CHECKING:  # it loads the model when it is imported; named here so that a change makes the stage again
    from helpers.export.carried import main  # noqa: F401

LITERT = ".tflite"
TAKEN = ("classes.json", "preprocessing.json", "decision.json", distances.FILE, "predict.py", "networks.py")
TAKEN += ("distances.py",)


def write(folder: Path, source: Path) -> list[str]:
    """Write the function's folder, and return the commands that start it here.

    Args:
        folder: its content is replaced.
        source: a bundle with a LiteRT format; the first one is served.

    Raises:
        ValueError: the bundle has none.
    """
    about = disk.read_json(source / "model.json")
    served = {kind: one for kind, one in about["formats"].items() if one["file"].endswith(LITERT)}
    if not served:
        raise ValueError(
            f"The function runs LiteRT, and the bundle has only {', '.join(about['formats'])}. Add litert to formats."
        )
    kind, network = next(iter(served.items()))
    disk.discard(folder)
    shutil.copytree(bundle.FILES / "function", folder)
    shutil.copytree(source / "reading", folder / "reading", ignore=shutil.ignore_patterns("__pycache__"))
    for name in (*TAKEN, network["file"]):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    disk.write_json(folder / "model.json", about | {"formats": {kind: network}})
    disk.write_text(folder / "main.py", bundle.carried(Path(bundle.__file__).parent / "carried" / "main.py"))
    disk.write_text(folder / "requirements.txt", bundle.requirements(["serve"]))
    return [f"cd {folder}", "pip install --require-hashes --requirement requirements.txt",
            "functions-framework --target classify"]  # fmt: skip
