"""A bundle: a folder that holds a network in some formats and everything needed to use it, without Thaw.

It carries the modules that read images unchanged, except the names by which they import each other (`carried`).
"""

import io
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pandas as pd
from PIL import Image

from helpers.core import disk, progress, project
from helpers.data import images
from helpers.data.formats import deep, jpeg, listing, png
from helpers.evaluation.trust import distances
from helpers.export import certificate, formats
from helpers.export.carried import networks, predict, verify

BATCH = 32
LARGER = 1.5  # side of a golden image, in sides of the network's input, so that the proof covers resizing
FILES = Path(__file__).parent / "files"
CARRIED = {"predict.py": predict, "networks.py": networks, "distances.py": distances, "verify.py": verify}
CARRIED |= {f"reading/{module.__name__.rpartition('.')[2]}.py": module for module in (images, deep, jpeg, listing, png)}
IMPORTS = {
    r"from helpers\.data\.formats\b": "from reading",
    r"from helpers\.data import": "from reading import",
    r"from helpers\.evaluation\.trust import": "import",
    r"from helpers\.export\.carried import": "import",
}
SAMPLES = 50  # training images from which int8 chooses its ranges


Predict = Callable[[np.ndarray], np.ndarray]  # as `prediction.asking` returns it


@dataclass(frozen=True)
class Proof:
    """Images that prove a bundle.

    Attributes:
        files: as users have them: the raw files, or the cut ones if a recipe crops.
        labels: their true classes.
        part: "val" or "test".
    """

    files: list[Path]
    labels: list[str]
    part: str

    def __len__(self) -> int:
        return len(self.files)


def proof_images(resized: Path, explored: Path, part: str, *, limit: int = 0, seed: int = 0) -> Proof:
    """Return images of one part, in an order in which the classes take turns.

    Args:
        resized: the folder of 02_resize.
        explored: the folder of 00_explore, which leads to the raw files.
        part: "val" or "test".
        limit: how many at most; 0 for all.
        seed: of the choice.

    Raises:
        ValueError: the part has no images.
    """
    table = _in_turn(resized, part, seed)
    if table.empty:
        raise ValueError(f"The run has no images of part {part}. Choose the other part: val or test.")
    table, raw = table.head(limit or len(table)), explored / "source"
    files = [raw / path for path in table["path"]] if "box" not in table else [resized / file for file in table["file"]]
    return Proof([file.absolute() for file in files], list(table["label"]), part)


def expected(run: Predict, files: Sequence[Path], about: Mapping[str, Any]) -> np.ndarray:
    """Return the outputs of the Keras model for files, read as by `thaw predict`: a row for each, from `run`.

    Args:
        run: the model as `prediction.asking` returns it, the one of `thaw predict`.
        files: images.
        about: model.json beside it.
    """
    levels = deep.Levels(*about["levels"]) if "levels" in about else None
    outputs = []
    for start in progress.track(range(0, len(files), BATCH), total=len(files), step=BATCH, label="Keras predicts"):
        batch = [images.load(file, about["image_size"], about["fit"], levels=levels) for file in files[start:][:BATCH]]
        outputs.append(run(np.stack(batch)))
    return np.concatenate(outputs)


def samples(resized: Path, seed: int = 0) -> np.ndarray:
    """Return training images from which int8 chooses its ranges, the classes in turn: float32 (n, H, W, 3)."""
    files = [resized / file for file in _in_turn(resized, "train", seed)["file"].head(SAMPLES)]
    size = disk.read_json(resized / "resize.json")["image_size"]
    return np.stack([images.load(file, size) for file in files]).astype(np.float32)


def _in_turn(resized: Path, part: str, seed: int) -> pd.DataFrame:
    table = disk.read_table(resized / "images.csv")
    table = table[table["part"] == part].sample(frac=1, random_state=seed)
    turn = table.groupby("label").cumcount()
    return table.assign(turn=turn).sort_values(["turn", "label"], kind="stable")


def begin(folder: Path, evaluated: Path) -> dict[str, Any]:
    """Write what every format needs: code, classes, preprocessing and, if the run has them, decision and novelty.

    Args:
        folder: of the bundle; its content is replaced.
        evaluated: the folder of 05_evaluate.

    Returns:
        model.json of the run.

    Raises:
        ValueError: the model needs a detector, which no bundle carries.
    """
    about = disk.read_json(evaluated / "model.json")
    if about.get("crop", {}).get("detector"):
        raise ValueError(
            f"The model takes images cut by the detector {about['crop']['detector']}, which a bundle does not carry."
            " Cut the images before they are classified, and train on boxes from a file (crop.boxes)."
        )
    disk.discard(folder)
    (folder / "reading").mkdir(parents=True)
    for name, module in CARRIED.items():
        disk.write_text(folder / name, carried(Path(module.__file__)))
    disk.write_text(folder / "reading" / "__init__.py", '"""From image files to pixels, as in training."""\n')
    disk.write_json(folder / "classes.json", disk.read_json(evaluated / "class_names.json"))
    how = {"image_size": about["image_size"], "fit": about["fit"], "levels": about.get("levels")}
    how |= {"colour": "RGB", "range": [0, 255], "dtype": "float32", "exif": "obeyed", "transparent": "white"}
    how |= {"max_pixels": images.MAX_PIXELS, "boxes": Path(about.get("crop", {}).get("boxes", "")).name}
    disk.write_json(folder / "preprocessing.json", how)
    for name in ("decision.json", distances.FILE):
        if (evaluated / name).is_file():
            shutil.copyfile(evaluated / name, folder / name)
    return about


def carried(file: Path) -> str:
    """Return the source of a module with the import names of a bundle."""
    text = file.read_text(encoding="utf-8")
    for pattern, name in IMPORTS.items():
        text = re.sub(rf"^{pattern}", name, text, flags=re.MULTILINE)
    return text


def add(
    folder: Path,
    kinds: Sequence[str],
    model: keras.Model,
    proof: Proof,
    expected_outputs: np.ndarray,
    *,
    name: str,
    representative: np.ndarray,
    tolerance: float,
) -> list[certificate.Parity]:
    """Write the network in each format, and prove each; a format that predicts something else is removed again.

    Args:
        folder: as `begin` left it.
        kinds: names of `formats.FORMATS`, the default one first.
        model: the Keras model, as `prediction.load` returns it.
        proof: the images.
        expected_outputs: of the Keras model for them, as `expected` returns them.
        name: of the model.
        representative: as `samples` returns them, for int8.
        tolerance: see `certificate.judge`.

    Raises:
        certificate.ParityError: a format misses; the message says by how much and on which images.
        formats.FormatError: a format cannot carry the model.
    """
    formats.check(list(kinds))
    classes, proved, missed = disk.read_json(folder / "classes.json"), [], []
    for kind in kinds:
        formats.write(model, kind, folder, representative)
        _describe(folder, name, [*(one.format for one in proved), kind])
        parity, answers = certificate.compare(folder, kind, proof.files, expected_outputs, proof.labels, classes)
        if why := certificate.judge(parity, answers, expected_outputs, proof.files, tolerance, len(classes)):
            missed.append(why)
            for part in formats.FORMATS[kind].parts(folder):
                part.unlink()
        else:
            proved.append(parity)
    if missed:
        raise certificate.ParityError("\n".join(missed))
    _describe(folder, name, kinds)
    disk.write_json(folder / "certificate.json", {"part": proof.part, "formats": certificate.as_json(proved)})
    disk.write_text(folder / "requirements.txt", requirements([formats.FORMATS[kind].requirements for kind in kinds]))
    return proved


def _describe(folder: Path, name: str, kinds: Sequence[str]) -> None:
    formats_of = {kind: formats.FORMATS[kind] for kind in kinds}
    about = {
        kind: {"file": one.file, "version": disk.sha256_of(folder / one.weights)[:12]}
        for kind, one in formats_of.items()
    }
    disk.write_json(folder / "model.json", {"name": name, "formats": about})


def requirements(lists: Sequence[str]) -> str:
    """Return the pinned and hashed packages of several lists of `files/requirements` as one."""
    blocks: dict[str, str] = {}
    for name in lists:
        text = (FILES / "requirements" / f"{name}.txt").read_text(encoding="utf-8")
        blocks |= {block.split(" \\")[0]: block for block in re.split(r"\n(?=\S)", text.strip())}
    return "\n".join(blocks[name] for name in sorted(blocks)) + "\n"


def write_golden(folder: Path, proof: Proof, run: Predict, about: Mapping[str, Any], count: int) -> list[Path]:
    """Write golden images and the outputs of each format for them, and return their files.

    `run` and `about` are those of `expected`. They are PNG files without metadata, up to 1.5 times as large as the
    network's input.

    Raises:
        certificate.ParityError: a format fails on them.
    """
    (folder / "golden").mkdir()
    levels = deep.Levels(*about["levels"]) if "levels" in about else None
    files = []
    for number, (file, label) in enumerate(zip(proof.files[:count], proof.labels, strict=False)):
        image = Image.fromarray(images.decode(images.open_image(images.read_bytes(file)), levels=levels))
        scale = LARGER * about["image_size"] / min(image.size)
        if scale < 1:
            image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BOX)
        plain = re.sub(r"[^\w-]+", "_", label)[:40]
        files.append(folder / "golden" / f"{number:02}_{plain}.png")
        stream = io.BytesIO()
        image.save(stream, "PNG")
        files[-1].write_bytes(stream.getvalue())
    kinds = list(disk.read_json(folder / "model.json")["formats"])
    outputs = {"keras_model": expected(run, files, about)}
    outputs |= {kind: certificate.ask(folder, kind, files)[0] for kind in kinds}
    answers = {
        project.relative(file, folder): {who: [float(p) for p in rows[number]] for who, rows in outputs.items()}
        for number, file in enumerate(files)
    }
    golden = {"classes": disk.read_json(folder / "classes.json"), "images": answers}
    disk.write_json(folder / "golden.json", golden | {"tolerance": {k: formats.FORMATS[k].again for k in kinds}})
    return files


def seal(folder: Path) -> str:
    """Write the sha256 of every file, let the bundle verify itself in a new process, and return what it prints.

    Raises:
        certificate.ParityError: it does not verify.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "files.json")
    disk.write_json(folder / "files.json", {project.relative(path, folder): disk.sha256_of(path) for path in files})
    ran = subprocess.run([sys.executable, "-B", "verify.py"], cwd=folder, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise certificate.ParityError(f"The bundle does not verify: {(ran.stdout + ran.stderr).strip()[-500:]}")
    return ran.stdout.strip()


def size_of(folder: Path) -> float:
    """Return the megabytes of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def version_of(folder: Path) -> str:
    """Return the version of a bundle's first format."""
    return next(iter(disk.read_json(folder / "model.json")["formats"].values()))["version"]


def headline(folder: Path, parities: Sequence[certificate.Parity]) -> str:
    """Return one line about the bundle and how exact it is."""
    named = ", ".join(f"{one.format} {one.largest:.1g}" for one in parities)
    return (
        f"bundle {version_of(folder)}, {size_of(folder):,.1f} MB; largest difference from Keras on"
        f" {parities[0].images:,} images: {named}"
    )


def answers(folder: Path) -> pd.DataFrame:
    """Return the golden images with their file, and for each format its most probable class and its probability."""
    golden, rows = disk.read_json(folder / "golden.json"), []
    for file, outputs in golden["images"].items():
        row = {"path": file}
        for who, values in outputs.items():
            chances = values[: len(golden["classes"])]
            row[who] = f"{golden['classes'][int(np.argmax(chances))]} {max(chances):.4f}"
        rows.append(row)
    return pd.DataFrame(rows)
