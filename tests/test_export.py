"""Bundles: they predict what Keras predicts, prove it without Thaw, and refuse what does not."""

import csv
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import cv2
import keras
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner

from helpers.cli import classify, main
from helpers.core import disk, stages
from helpers.data import images
from helpers.evaluation import prediction
from helpers.evaluation.trust import distances, novelty
from helpers.export import bundle, card, certificate, formats, function, loading, trying

CLASSES = ["cross", "disc", "square"]
SIZE = 32


def network(seed: int = 0) -> keras.Model:
    """A small network whose answers differ from image to image: a head as it is drawn would give the same to all."""
    keras.utils.set_random_seed(seed)
    image = keras.Input((SIZE, SIZE, 3), name="image")
    value = keras.layers.Rescaling(1 / 127.5, -1)(image)
    for filters in (8, 16):
        value = keras.layers.Conv2D(filters, 3, 2, activation="relu", padding="same")(value)
    value = keras.Model(image, value, name="backbone")(image)
    value = keras.layers.GlobalAveragePooling2D()(value)
    value = keras.layers.BatchNormalization(center=False, scale=False)(value)
    answer = keras.layers.Dense(3, activation="softmax", name="probabilities")(value)
    model = keras.Model(image, answer)
    return model


@pytest.fixture(scope="module")
def run(tmp_path_factory, image_folder):
    """Three finished stages, as 07 reads them: explore, resize and evaluate. The raw files are of several kinds."""
    place = tmp_path_factory.mktemp("run")
    raw = image_folder(place / "raw", dict.fromkeys(CLASSES, 8), size=100)
    rows = []
    for number, path in enumerate(sorted(raw.rglob("*.png"))):
        path = (_as_jpeg, _as_deep, lambda path: path)[number % 3](path)
        part, name = "train" if number % 8 < 4 else "val", path.parent.name
        small = place / "resize" / part / name / f"{path.stem}.png"
        small.parent.mkdir(parents=True, exist_ok=True)
        images.write(small, images.load(path, SIZE))
        rows.append({"path": f"{name}/{path.name}", "label": name, "part": part,
                     "file": f"{part}/{name}/{path.stem}.png", "sha256": str(number)})  # fmt: skip
    pd.DataFrame(rows).to_csv(place / "resize" / "images.csv", index=False)
    about = {"image_size": SIZE, "fit": "crop", "format": "png", "levels": [0, 4095]}
    disk.write_json(place / "resize" / "resize.json", about)
    model = network()
    features = keras.Model(model.input, model.layers[-3].output).predict(
        np.stack([images.load(raw / row["path"], SIZE) for row in rows]), verbose=0
    )
    norm = model.layers[-2]
    norm.moving_mean.assign(features.mean(axis=0))
    norm.moving_variance.assign(features.var(axis=0) + 1e-6)
    (place / "evaluate").mkdir()
    model.save(place / "evaluate" / "model.keras")
    known = distances.unit(novelty.features_of(model)(np.stack([images.load(raw / row["path"], SIZE) for row in rows])))
    draft = distances.Novelty(known.astype(np.float16), 0.0, 0.1)
    far = np.sort(draft.distance(known))
    replace(draft, threshold=float(far[-5:-3].mean())).write(place / "evaluate")
    disk.write_json(place / "evaluate" / "model.json", about | {"backbone": "toy"})
    row = dict.fromkeys(("precision", "recall", "f1"), 0.5) | {"support": 4}
    metrics = {"n": 12, "accuracy": {"value": 0.5, "low": 0.4, "high": 0.6}, "class_names": CLASSES, "part": "test"}
    disk.write_json(place / "evaluate" / "metrics.json", metrics | {"per_class": [row | {"label": n} for n in CLASSES]})
    (place / "explore").mkdir()
    (place / "explore" / "source").symlink_to(raw)
    disk.write_text(place / "explore" / "inventory.csv", "path\n")
    for stage in ("explore", "resize", "evaluate"):
        disk.write_json(place / stage / "class_names.json", CLASSES)
        by_hand = {"images": str(place / "resize"), "out": str(place / stage)}
        done = {"status": "done", "stage": stage, "headline": "", "parameters": by_hand, "fingerprint": stage}
        disk.write_json(place / stage / stages.STAGE_FILE, done)
    return place


def _as_jpeg(path: Path) -> Path:
    """A JPEG held upright by its EXIF orientation."""
    exif = Image.Exif()
    exif[274] = 6
    with Image.open(path) as image:
        image.rotate(90, expand=True).save(path.with_suffix(".jpg"), quality=90, exif=exif)
    path.unlink()
    return path.with_suffix(".jpg")


def _as_deep(path: Path) -> Path:
    """A grey PNG with 12 of 16 bits."""
    grey = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE).astype(np.uint16)
    cv2.imwrite(str(path), grey * 16)
    return path


@pytest.fixture(scope="module")
def parts(run):
    """The Keras model, the images of the proof and what it says of them."""
    model = prediction.load(run / "evaluate")
    ask = prediction.asking(model, run / "evaluate")
    proof = bundle.proof_images(run / "resize", run / "explore", "val")
    about = disk.read_json(run / "evaluate" / "model.json")
    return model, proof, bundle.expected(ask, proof.files, about), about, ask


def export(folder: Path, run: Path, parts, kinds, tolerance=0.4):
    model, proof, given, about, ask = parts
    bundle.begin(folder, run / "evaluate")
    few = bundle.samples(run / "resize")
    how = {"name": "toy", "representative": few, "tolerance": tolerance}
    parities = bundle.add(folder, kinds, model, proof, given, **how)
    bundle.write_golden(folder, proof, ask, about, 4)
    card.write(folder, run / "evaluate", parities, name="toy", licence="mit")
    return {one.format: one for one in parities}, bundle.seal(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory, run, parts):
    folder = tmp_path_factory.mktemp("made") / "bundle"
    return folder, *export(folder, run, parts, ["litert", "litert_fp16", "litert_int8", "onnx"])


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made[0], tmp_path / "bundle")


def verify(folder: Path) -> tuple[int, str]:
    ran = subprocess.run([sys.executable, "-B", "verify.py"], cwd=folder, capture_output=True, text=True, check=False)
    return ran.returncode, ran.stdout


# Parity


def test_answers_differ_from_image_to_image_so_that_parity_can_fail(parts):
    assert np.ptp(parts[2], axis=0).max() > 0.2


@pytest.mark.parametrize(("kind", "most"), [("litert", 1e-5), ("litert_fp16", 1e-2), ("onnx", 1e-5)])
def test_a_float_format_predicts_what_keras_predicts_on_raw_files(made, kind, most):
    assert made[1][kind].images == 12
    assert 0 < made[1][kind].largest < most
    assert made[1][kind].same_answers == 1 and made[1][kind].difference["value"] == 0


def test_int8_is_smaller_and_judged_by_its_answers(made):
    assert made[1]["litert_int8"].largest > 1e-4
    assert made[1]["litert_int8"].same_answers >= 0.6


def test_a_certificate_holds_sizes_times_and_memory(made):
    kept = disk.read_json(made[0] / "certificate.json")
    assert kept["part"] == "val" and [one["format"] for one in kept["formats"]] == list(made[1])
    for one in kept["formats"]:
        assert one["milliseconds"] > 0 and one["milliseconds_2_threads"] > 0 and 20 < one["peak_mb"] < 2000


def test_a_format_that_predicts_something_else_is_not_written_and_the_error_names_images(
    tmp_path, run, parts, monkeypatch
):
    other = novelty.with_features(network(seed=1))
    wrong = replace(formats.FORMATS["litert_fp16"], tolerance=1e-4,
                    write=lambda model, file, samples: formats._litert(other, file, samples))  # fmt: skip
    monkeypatch.setitem(formats.FORMATS, "litert_fp16", wrong)
    with pytest.raises(certificate.ParityError, match=r"litert_fp16 is not written: .*up to 0\.\d+.*\.(png|jpg) \(0"):
        export(tmp_path / "bundle", run, parts, ["litert", "litert_fp16"])
    assert (tmp_path / "bundle/model.tflite").is_file() and not (tmp_path / "bundle/model_fp16.tflite").exists()


def test_a_quantised_format_that_changes_answers_is_refused(parts):
    _, proof, given, *_ = parts
    other = given.copy()
    other[:, :3] = np.roll(given[:, :3], 1, axis=1)
    parity = certificate.Parity("litert_int8", 12, 1.0, 0.5, 0.0, 0.0, 0.3, 0.5, {}, 1, 1, 1, 1, 1)
    said = certificate.judge(parity, other, given, proof.files, 0.02, 3)
    assert "100.0 % of the answers differ" in said and "12 of 12 images" in said


def test_images_that_all_get_the_same_answer_prove_nothing(made, parts):
    _, proof, given, *_ = parts
    flat = np.repeat(given[:1], len(given), axis=0)
    with pytest.raises(certificate.ParityError, match="prove nothing"):
        certificate.compare(made[0], "litert", proof.files, flat, proof.labels, CLASSES)


def test_images_of_another_range_are_no_samples_for_int8(tmp_path, parts):
    with pytest.raises(formats.FormatError, match="hold 0 to 1; expected RGB of 0 to 255"):
        formats.write(parts[0], "litert_int8", tmp_path, np.eye(32, dtype=np.float32)[None, :, :, None].repeat(3, 3))


def test_an_unknown_format_and_a_missing_package_are_told(monkeypatch):
    with pytest.raises(formats.FormatError, match="Did you mean litert"):
        formats.check(["litret"])
    monkeypatch.setattr(formats, "_installed", lambda package: False)
    with pytest.raises(formats.FormatError, match="openvino needs openvino: pip install"):
        formats.check(["openvino"])


def test_a_model_that_needs_a_detector_is_refused(tmp_path, run):
    shutil.copytree(run / "evaluate", tmp_path / "evaluate")
    about = disk.read_json(run / "evaluate" / "model.json") | {"crop": {"detector": "cars.onnx", "boxes": ""}}
    disk.write_json(tmp_path / "evaluate" / "model.json", about)
    with pytest.raises(ValueError, match="detector cars"):
        bundle.begin(tmp_path / "bundle", tmp_path / "evaluate")


def test_boxes_of_a_table_are_cautioned_about_wherever_a_bundle_answers(tmp_path, run, made, photos):
    shutil.copytree(run / "evaluate", tmp_path / "evaluate")
    about = disk.read_json(run / "evaluate" / "model.json") | {"crop": {"detector": "", "boxes": "data/cars.csv"}}
    disk.write_json(tmp_path / "evaluate" / "model.json", about)
    bundle.begin(tmp_path / "bundle", tmp_path / "evaluate")
    how = disk.read_json(tmp_path / "bundle" / "preprocessing.json")
    assert how["boxes"] == "cars.csv"
    shutil.copytree(made[0], tmp_path / "made")
    disk.write_json(tmp_path / "made" / "preprocessing.json", how)
    ran = CliRunner().invoke(main.app, ["predict", "--bundle", str(tmp_path / "made"), str(photos)])
    assert "learned on images cut to the boxes of cars.csv; these are taken whole" in ran.output
    measured = disk.read_json(run / "evaluate" / "metrics.json")
    facts = card._facts(tmp_path / "made", tmp_path / "evaluate", measured, about, "")
    assert any("It learned on images cut to the boxes of data/cars.csv" in fact for fact in facts)


# Novelty


@pytest.fixture(scope="module")
def rare(tmp_path_factory, run, parts):
    folder = tmp_path_factory.mktemp("rare") / "bundle"
    return folder, *export(folder, run, parts, ["openvino", "keras"])


@pytest.mark.parametrize("kind", ["litert", "litert_fp16", "onnx", *(
    pytest.param(kind, marks=pytest.mark.families) for kind in ("openvino", "keras")
)])  # fmt: skip
def test_a_bundle_calls_novel_what_thaw_predict_calls_novel(request, made, run, kind):
    """Every format gives the features too; the distance is compared like a probability, on raw files."""
    folder, parities, _ = request.getfixturevalue("rare") if kind in ("openvino", "keras") else made
    assert 0 < parities[kind].distance < formats.FORMATS[kind].tolerance and parities[kind].same_answers == 1
    files = sorted((run / "raw").rglob("*.*"))
    table, _ = prediction.predict(run, files)
    model = loading.load(folder).Model(folder, kind)
    said = [model.answer(model.pixels(file.read_bytes())) for file in files]
    assert [one["novel"] for one in said] == list(table["novel"] == "yes")
    assert 2 <= (table["novel"] == "yes").sum() <= 8


def test_a_format_that_calls_other_images_novel_is_refused(parts):
    _, proof, given, *_ = parts
    other = given.copy()
    other[:, 3] = -other[:, 3]
    assert not certificate._is_same(given, other, 3).any()
    parity = certificate.Parity("litert", 12, 0.0, 0.0, 0.3, 0.0, 0.5, 0.5, {}, 1, 1, 1, 1, 1)
    assert "distances by up to 0.3, where 0.0001 is allowed" in certificate.judge(
        parity, other, given, proof.files, 0, 3
    )


def test_the_card_says_how_many_images_are_called_novel(made):
    assert "but also 10.0 % of the validation images" in (made[0] / "README.md").read_text(encoding="utf-8")


# The bundle alone


def test_a_bundle_verifies_itself_and_names_nothing_of_thaw(made):
    assert made[2] == "The bundle is unchanged, and its predictions are correct."
    for path in made[0].rglob("*.py"):
        assert "helpers" not in path.read_text(encoding="utf-8"), path
    assert not list(made[0].rglob("__pycache__"))


def test_one_changed_byte_of_the_model_fails_and_is_named(copy):
    data = bytearray((copy / "model.tflite").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "model.tflite").write_bytes(data)
    code, said = verify(copy)
    assert code == 1 and "model.tflite has changed" in said


def test_classes_in_another_order_fail_even_where_the_hashes_are_made_anew(copy):
    disk.write_json(copy / "classes.json", CLASSES[::-1])
    assert "classes.json has changed" in verify(copy)[1]
    rehash(copy, "classes.json")
    code, said = verify(copy)
    assert code == 1 and "classes.json says ['square', 'disc', 'cross']" in said


def test_another_way_to_resize_fails_on_the_golden_images(copy):
    how = disk.read_json(copy / "preprocessing.json") | {"fit": "pad", "image_size": SIZE}
    disk.write_json(copy / "preprocessing.json", how)
    (copy / "golden").mkdir(exist_ok=True)
    golden = disk.read_json(copy / "golden.json")
    file = next(iter(golden["images"]))
    with Image.open(copy / file) as image:
        image.crop((0, 0, image.width, image.height // 2)).save(copy / file)
    rehash(copy, "preprocessing.json", file)
    code, said = verify(copy)
    assert code == 1 and f"litert: {file} differs by" in said


def rehash(folder: Path, *names: str) -> None:
    kept = disk.read_json(folder / "files.json")
    disk.write_json(folder / "files.json", kept | {name: disk.sha256_of(folder / name) for name in names})


def test_golden_images_hold_no_metadata_and_are_larger_than_the_network_takes(made):
    for path in made[0].glob("golden/*.png"):
        with Image.open(path) as image:
            assert not image.getexif() and not image.info and min(image.size) > SIZE


def test_a_bundle_reads_files_as_thaw_does(made, run):
    model = loading.load(made[0]).Model(made[0])
    levels = images.Levels(0, 4095)
    for path in sorted((run / "raw").rglob("*.*"))[:6]:
        assert np.array_equal(model.pixels(path.read_bytes()), images.load(path, SIZE, levels=levels))


def test_the_card_has_a_header_of_the_hub_and_says_what_was_measured(made):
    from helpers.core import notebooks

    _, header, text = (made[0] / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    content = notebooks.yaml().load(header)
    assert content["license"] == "mit" and content["pipeline_tag"] == "image-classification"
    assert content["model-index"][0]["results"][0]["metrics"][0] == {"type": "accuracy", "value": 0.5}
    assert "| accuracy | 50.0 % (40.0 % to 60.0 %) |" in text and "## Limits" in text and "| litert |" in text


def test_requirements_are_hashed_and_are_those_of_the_lock(made):
    root = Path(__file__).parents[1]
    lock = (root / "requirements.lock").read_text(encoding="utf-8")
    for path in (bundle.FILES / "requirements").glob("*.txt"):
        pins = [line.split(" \\")[0] for line in path.read_text().splitlines() if line[:1].isalnum()]
        assert len(pins) > 5
        for pin in pins:
            assert pin.replace("opencv-python-headless", "opencv-python") in lock, f"{path.name}: {pin}"
    text = (made[0] / "requirements.txt").read_text()
    assert "onnxruntime==" in text and text.count("pillow==") == 1 and text.count("--hash=sha256:") > 50


# Decisions


@pytest.mark.parametrize(
    ("decision", "expected"),
    [
        ({}, {"predicted": "a", "confidence": 0.7}),
        ({"promise": {"kind": "precision", "wanted": 0.95, "thresholds": [0.8, 0, 0]}}, {"predicted": "unsure"}),
        ({"promise": {"kind": "risk", "wanted": 0.1, "thresholds": [0.6, 0, 0]}}, {"predicted": "a"}),
        ({"promise": {"kind": "precision", "wanted": 0.95, "thresholds": [None, 0, 0]}}, {"predicted": "unsure"}),
        ({"promise": {"kind": "coverage", "level": 0.15}}, {"predicted": "unsure", "candidates": ["a", "b"]}),
        ({"promise": {"kind": "coverage", "level": 0.3}}, {"predicted": "a", "candidates": ["a"]}),
        ({"promise": {"kind": "coverage", "level": 0.9}}, {"predicted": "a", "candidates": ["a"]}),
    ],
)
def test_a_decision_says_unsure_or_names_candidates(made, decision, expected):
    model = loading.load(made[0]).Model(made[0])
    model.decision, model.classes = decision, ["a", "b", "c"]
    model.network, model.novelty = lambda batch: [np.array([[0.7, 0.2, 0.1]])], None
    said = model.answer(np.zeros((SIZE, SIZE, 3), np.uint8))
    assert sum(said["probabilities"].values()) == pytest.approx(1)
    for key, value in expected.items():
        assert said[key] == (pytest.approx(value, abs=1e-4) if isinstance(value, float) else value)


def test_the_decision_of_a_run_goes_into_its_bundle(tmp_path, run):
    shutil.copytree(run / "evaluate", tmp_path / "evaluate")
    decided = {"promise": {"kind": "coverage", "wanted": 0.9, "level": 0.2}}
    disk.write_json(tmp_path / "evaluate" / "decision.json", decided)
    bundle.begin(tmp_path / "bundle", tmp_path / "evaluate")
    assert disk.read_json(tmp_path / "bundle" / "decision.json") == decided


# thaw predict --bundle


@pytest.fixture
def photos(run, tmp_path):
    folder = shutil.copytree(run / "raw", tmp_path / "photos")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    return folder


def rows_of(file: Path) -> list[list[str]]:
    with open(file, newline="", encoding="utf-8") as stream:
        return list(csv.reader(stream))


def test_predict_by_a_bundle_gives_keras_probabilities_lists_broken_files_and_loads_no_tensorflow(
    made, photos, parts, tmp_path
):
    script = (
        "import sys; from helpers.cli import main\n"
        f"sys.argv = ['thaw', 'predict', '--bundle', r'{made[0]}', r'{photos}', '--csv', r'{tmp_path}/out.csv']\n"
        "try: main.entry()\n"
        "except SystemExit as end: print('code', end.code, 'tensorflow' in sys.modules, 'pandas' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "code 1 False False", ran.stdout
    header, *rows = rows_of(tmp_path / "out.csv")
    assert header == ["path", "predicted", "confidence", "not_read", "novel", *CLASSES] and len(rows) == 25
    assert next(row for row in rows if row[0].endswith("broken.jpg"))[3].startswith("truncated")
    by_name = {Path(row[0]).name: row for row in rows}
    for file, expected in zip(parts[1].files, parts[2], strict=True):
        assert np.abs(np.array(by_name[file.name][5:], float) - expected[:3]).max() < 1e-5
    assert len(list(made[0].rglob("__pycache__"))) == 0


def test_an_interrupted_prediction_goes_on_behind_its_last_whole_line(made, photos, tmp_path):
    arguments = ["predict", "--bundle", str(made[0]), str(photos), "--csv"]
    CliRunner().invoke(main.app, [*arguments, str(tmp_path / "whole.csv")])
    lines = (tmp_path / "whole.csv").read_bytes().splitlines(keepends=True)
    used = loading.load(made[0])
    version = disk.version_of(made[0] / name for name in (*used.DECISIVE, "model.tflite"))
    unfinished = tmp_path / f"again.csv.{version}{classify.UNFINISHED}"
    unfinished.write_bytes(b"".join(lines[:6]) + lines[6][:20])
    ran = CliRunner().invoke(main.app, [*arguments, str(tmp_path / "again.csv")])
    assert f"5 images are in {unfinished.name} already" in ran.output
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes() and not unfinished.exists()
    unfinished.write_bytes(b"".join([lines[0], *lines[2:6]]))
    ran = CliRunner().invoke(main.app, [*arguments, str(tmp_path / "again.csv")])
    assert "was begun with other images" in str(ran.exception)


def test_a_folder_that_is_no_bundle_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a bundle"):
        loading.load(tmp_path)


# The notebook


def test_07_writes_a_bundle_and_its_function(run, by_hand, tmp_path):
    places = {"explore": run / "explore", "images": run / "resize", "evaluate": run / "evaluate"}
    left = by_hand(
        "export", **{k: str(v) for k, v in places.items()}, out=str(tmp_path / "export"), serve=True, golden=3
    )
    assert stages.status(tmp_path / "export") == "done"
    assert left["parities"][0].format == "litert" and len(left["proof"]) == 12
    assert verify(tmp_path / "export" / "bundle") == (0, "The bundle is unchanged, and its predictions are correct.\n")
    assert (tmp_path / "export" / "function" / "main.py").is_file()


def test_an_image_chosen_by_hand_is_classified_beside_a_map(made, parts, monkeypatch):
    from helpers.core import progress

    drawn = []

    def over(pixels, heat):
        drawn.append(heat)
        return 255 - pixels

    button, answers = trying.show(made[0], parts[0], over).children
    assert len(answers.children) == 3 and "%" in answers.children[0].value
    assert answers.children[0].value.count("<img") == 2 and np.ptp(drawn[0]) > 0
    file = next(made[0].glob("golden/*"))
    upload = {
        "name": "<i>.png",
        "type": "image/png",
        "size": 1,
        "last_modified": datetime.now(),
        "content": file.read_bytes(),
    }
    button.value = (upload, upload | {"content": b"no image", "name": "b"})
    assert "&lt;i&gt;.png" in answers.children[0].value and "not an image" in answers.children[1].value
    monkeypatch.setenv(progress.PROGRESS_VARIABLE, "/dev/null")
    assert trying.show(made[0], parts[0], over).data.count("<img") == 6


def test_a_bundle_without_litert_has_no_function(copy, tmp_path):
    about = disk.read_json(copy / "model.json")
    disk.write_json(copy / "model.json", about | {"formats": {"onnx": about["formats"]["onnx"]}})
    with pytest.raises(ValueError, match="Add litert to formats"):
        function.write(tmp_path / "function", copy)


def test_thaw_export_reads_a_run_as_it_is(run, tmp_path):
    shutil.copytree(run, tmp_path / "mine", symlinks=True)
    shutil.rmtree(tmp_path / "mine" / "evaluate")
    ran = CliRunner().invoke(main.app, ["export", str(tmp_path / "mine")])
    assert "has no finished evaluate" in str(ran.exception)
    ran = CliRunner().invoke(main.app, ["export", str(run), "--set", "goldn=3"])
    assert "Did you mean golden?" in str(ran.exception)
    assert json.loads((run / "evaluate" / stages.STAGE_FILE).read_text())["status"] == "done"
