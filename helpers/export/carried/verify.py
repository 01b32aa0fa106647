"""Check that this bundle is as it was made, and that it predicts here what it predicted there: python verify.py"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

from helpers.export.carried import predict


def problems(folder: Path = predict.FOLDER) -> list[str]:
    """Return what is wrong with a bundle; a network whose file has changed is not run."""
    for name, digest in _read(folder / "files.json").items():
        if not (folder / name).is_file():
            return [f"{name} is missing"]
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
            return [f"{name} is not what it was when the bundle was made: its sha256 differs"]
    golden, found = _read(folder / "golden.json"), []
    if (classes := _read(folder / "classes.json")) != golden["classes"]:
        return [f"classes.json says {classes}; the golden images were answered with {golden['classes']}"]
    for kind, limit in golden["tolerance"].items():
        model = predict.Model(folder, kind)
        for file, expected in golden["images"].items():
            given = model.raw(model.pixels((folder / file).read_bytes()))
            if not (distance := np.abs(given - expected[kind]).max()) <= limit:  # also where it is no number
                found.append(f"{kind}: {file} differs by {distance:.2g}; at most {limit:g} is expected")
    return found


def _read(file: Path):
    return json.loads(file.read_text(encoding="utf-8"))


if __name__ == "__main__":
    wrong = problems()
    print("\n".join(wrong) or "The bundle is as it was made, and predicts what it should.")
    sys.exit(1 if wrong else 0)
