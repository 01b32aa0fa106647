"""What several test modules share: small images, toy notebooks, and a place for runs that is not the project's."""

import gc
import os
import signal

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Two workers share two cores, and small images leave nothing to share out.
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
os.environ.setdefault("TF_NUM_INTEROP_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from collections.abc import Callable, Mapping
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest

from helpers.core import disk, notebooks, project
from helpers.core.mended import jsonschema
from helpers.pipeline.sweeps import files

gc.set_threshold(100_000, 50, 100)  # networks are many objects, and few of them are garbage
jsonschema.correct()  # before a test module imports nbformat
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and tests send it


@pytest.fixture(scope="module", autouse=True)
def lighter_garbage():
    """Leave what earlier modules keep out of each collection: networks are millions of objects."""
    gc.collect()
    gc.freeze()


def dear(names, slow) -> list:
    """Return names as parameters of a test; those in `slow` are not part of `make test`."""
    return [pytest.param(name, marks=[pytest.mark.slow] if name in slow else []) for name in names]


# The dearest modules, which begin first, so that both workers of `make test` end at about the same time. xdist keeps
# this order only with --no-loadscope-reorder.
FIRST = [
    "pipeline",
    "backbones",
    "levels",
    "training",
    "trust",
    "joining",
    "frontier",
    "systems",
    "bank",
    "models",
    "store",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {f"test_{name}": number for number, name in enumerate(FIRST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture
def runs_folder(tmp_path, monkeypatch) -> Path:
    """A runs folder of the test's own, in force for this process and those that it starts."""
    folder = tmp_path / "runs"
    monkeypatch.setenv("THAW_RUNS", str(folder))
    return folder


@pytest.fixture(scope="session")
def image_folder() -> Callable[..., Path]:
    """A function (folder, {class: count}) that fills `folder` with a sub-folder of small images per class.

    The classes differ in colour and shape, so that a network can learn them; no two images look alike to a perceptual
    hash.
    """
    return _image_folder


@pytest.fixture(scope="session")
def notebook() -> Callable[..., Path]:
    """A function (path, parameters, *code) that writes a notebook whose parameters cell is tagged."""
    return _notebook


@pytest.fixture(scope="session")
def by_hand() -> Callable[..., dict]:
    """A function (stage, **parameters) that runs a notebook's cells in this process and returns what they leave.

    No kernel is started, which would take seconds. `before` maps a cell's id to a function that is given what there is
    by then.
    """
    return _by_hand


@pytest.fixture
def refuse(write) -> Callable[[str], str]:
    """A function that loads the sweep that the module's `write` makes of a text, and returns why it is refused."""

    def refuse(text: str) -> str:
        with pytest.raises(notebooks.RecipeError) as error:
            files.load(write(text))
        return str(error.value)

    return refuse


SHAPES = ["disc", "square", "cross"]


@pytest.fixture(scope="module")
def resized(tmp_path_factory, image_folder):
    """A folder as 02_resize writes it: 24 training and 6 validation images, 32 px."""
    folder = tmp_path_factory.mktemp("resized") / "resize"
    rows = []
    for part, count in (("train", 8), ("val", 2)):
        image_folder(folder / part, dict.fromkeys(SHAPES, count), size=32, seed=count)
        for path in sorted((folder / part).rglob("*.png")):
            label = path.parent.name
            rows.append(
                {"path": path.name, "label": label, "part": part, "file": project.relative(path, folder)}
                | {"sha256": path.stem + part}
            )
    pd.DataFrame(rows).to_csv(folder / "images.csv", index=False)
    disk.write_json(folder / "class_names.json", SHAPES)
    disk.write_json(folder / "resize.json", {"image_size": 32, "fit": "pad", "format": "png"})
    return folder


@pytest.fixture(scope="module")
def small_backbone():
    """For one module, three convolutions take the place of every backbone: block1, block2, block3."""
    from helpers.models import backbones

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbones, "build", _small_backbone)
        yield


@pytest.fixture
def toy_notebooks(tmp_path, monkeypatch) -> Path:
    """An empty folder that takes the place of `notebooks/`."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    monkeypatch.setattr(notebooks, "NOTEBOOKS", folder)
    _forget_notebooks()
    yield folder
    _forget_notebooks()


def _forget_notebooks() -> None:
    notebooks.stages.cache_clear()
    notebooks.studies.cache_clear()


def _by_hand(stage: str, *, before: Mapping[str, Callable[[dict], None]] | None = None, **parameters) -> dict:
    import matplotlib.pyplot as plt
    import nbformat

    found = notebooks.find_notebook(stage)
    cells = [cell for cell in nbformat.read(found.notebook, as_version=4).cells if cell.cell_type == "code"]
    before = before or {}
    assert set(before) <= {cell.id for cell in cells}, f"{found.notebook.name} has no cell {', '.join(before)}"
    wrong = set(parameters) - set(found.parameters)
    assert not wrong, f"{found.notebook.name} has no parameters {wrong}"
    left = {name: p.default for name, p in found.parameters.items()} | parameters
    for cell in cells[1:]:
        if cell.id in before:
            before[cell.id](left)
        exec(compile(cell.source, f"{found.notebook.name}, cell {cell.id}", "exec"), left)
        plt.close("all")
    return left


def _small_backbone(name: str, image_size: int, weights: str):
    import keras

    inputs = value = keras.Input((image_size, image_size, 3))
    for block in range(1, 4):
        value = keras.layers.Conv2D(8, 3, 2, activation="relu", padding="same", name=f"block{block}_conv")(value)
    return keras.Model(inputs, value, name="backbone")


def _image_folder(folder: Path, counts: Mapping[str, int], *, size: int = 64, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    for number, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            cv2.imwrite(str(folder / name / f"{Path(name).name}-{index:02}.png"), _picture(rng, number, size))
    return folder


def _picture(rng: np.random.Generator, kind: int, size: int) -> np.ndarray:
    """A smooth random background with a disc, a square or a cross in blue, green or red; uint8 (size, size, 3)."""
    pixels = cv2.resize(rng.integers(0, 200, (6, 6, 3), dtype=np.uint8), (size, size), interpolation=cv2.INTER_CUBIC)
    colour = [0, 0, 0]
    colour[kind % 3] = 255
    x, y = (int(value) for value in rng.integers(size // 3, 2 * size // 3, 2))
    radius = size // 5
    if kind % 3 == 0:
        cv2.circle(pixels, (x, y), radius, colour, -1)
    elif kind % 3 == 1:
        cv2.rectangle(pixels, (x - radius, y - radius), (x + radius, y + radius), colour, -1)
    else:
        cv2.drawMarker(pixels, (x, y), colour, cv2.MARKER_CROSS, 2 * radius, radius // 2)
    return pixels


def _notebook(path: Path, parameters: str, *code: str) -> Path:
    import nbformat

    cells = [nbformat.v4.new_markdown_cell(f"# {path.stem}")]
    cells += [nbformat.v4.new_code_cell(parameters.strip(), metadata={"tags": ["parameters"]})]
    cells += [nbformat.v4.new_code_cell(source.strip()) for source in code]
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    spec = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=spec), path)
    return path
