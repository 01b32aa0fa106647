"""Check that this bundle is unchanged, and that its predictions are those of its first test: python verify.py"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

from helpers.export.carried import predict


def problems(folder: Path = predict.FOLDER) -> list[str]:
    """Return the problems of a bundle; a network whose file has changed does not run."""
    for name, digest in _read(folder / "files.json").items():
        if not (folder / name).is_file():
            return [f"{name} is missing"]
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
            return [f"{name} has changed since the bundle was made: its sha256 differs"]
    golden, lines = _read(folder / "golden.json"), []
    if (classes := _read(folder / "classes.json")) != golden["classes"]:
        return [f"classes.json says {classes}; the golden images were answered with {golden['classes']}"]
    for kind, limit in golden["tolerance"].items():
        model = predict.Model(folder, kind)
        for file, expected in golden["images"].items():
            outputs = model.raw(model.pixels((folder / file).read_bytes()))
            if not (distance := np.abs(outputs - expected[kind]).max()) <= limit:  # also if it is not a number
                lines.append(f"{kind}: {file} differs by {distance:.2g}; at most {limit:g} is expected")
    return lines


def _read(file: Path):
    return json.loads(file.read_text(encoding="utf-8"))


if __name__ == "__main__":
    lines = problems()
    print("\n".join(lines) or "The bundle is unchanged, and its predictions are correct.")
    sys.exit(1 if lines else 0)
