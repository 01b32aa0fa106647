"""Cropping: which box is taken, detectors that really run, and a run that resizes what it cropped."""

import struct
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from helpers.cli import terminal
from helpers.core import disk, progress, project
from helpers.data import crop, detectors, images, inventory
from helpers.evaluation import prediction
from helpers.pipeline import planning, recipes
from helpers.reports import report

SIDE = 64  # pixels of the tiny detector's input
RED, BLUE = (220, 10, 10), (10, 10, 220)


# A tiny detector as an ONNX file, written byte by byte: the score of a cell is how red (class 0) or blue (1) it is


def field(number: int, value: int | bytes | str) -> bytes:
    """One field of a protobuf message: a whole number, or text, bytes or a message as bytes."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def node(kind: str, inputs: list[str], output: str, **attributes) -> bytes:
    data = b"".join(field(1, name) for name in inputs) + field(2, output) + field(3, output) + field(4, kind)
    for name, value in attributes.items():
        number, code = (8, 7) if isinstance(value, list) else (3, 2)  # whole numbers, or one of them
        values = b"".join(field(number, one) for one in (value if isinstance(value, list) else [value]))
        data += field(5, field(1, name) + values + field(20, code))
    return field(1, data)


def constant(name: str, values) -> bytes:
    whole = np.asarray(values).dtype.kind == "i"
    array = np.asarray(values, np.int64 if whole else np.float32)
    dims = b"".join(field(1, side) for side in array.shape)
    return field(5, dims + field(2, 7 if whole else 1) + field(9, array.tobytes()) + field(8, name))


def tensor(number: int, name: str, shape: tuple[int, ...]) -> bytes:
    dims = b"".join(field(1, field(1, side)) for side in shape)
    return field(number, field(1, name) + field(2, field(1, field(1, 1) + field(2, dims))))


def write_detector(path: Path, layout: str) -> Path:
    """Write a detector of SIDE pixels with 4 x 4 small cells and 2 x 2 large ones; path is returned."""
    cells = [(x, y, x + s, y + s) for s in (16, 32) for y in range(0, SIDE, s) for x in range(0, SIDE, s)]
    corners = np.float32(cells).T[None]
    centres = np.concatenate([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], axis=1)
    ones, classes = np.ones((1, 1, 20)), 1 if layout in ("yolov10", "ssd") else 2
    columns = {
        "yolov8": [centres, "score"],
        "yolov5": [centres, 0.9 * ones, "score"],
        "yolov10": [corners, "score", 0 * ones],
        "ssd": [0 * ones, 0 * ones, "score", corners / SIDE],
    }[layout]
    colours = np.float32([[1, -0.5, -0.5], [-0.5, -0.5, 1]])[:classes, :, None, None]
    graph = constant("colours", colours) + constant("small", [1, classes, 16]) + constant("large", [1, classes, 4])
    graph += node("Conv", ["image", "colours"], "colour")
    for name, size in (("small", 16), ("large", 32)):
        graph += node("AveragePool", ["colour"], name + "_cells", kernel_shape=[size, size], strides=[size, size])
        graph += node("Reshape", [name + "_cells", name], name + "_score")
    graph += node("Concat", ["small_score", "large_score"], "score", axis=2)
    names = []
    for number, column in enumerate(columns):
        names.append(column if isinstance(column, str) else f"column{number}")
        graph += b"" if isinstance(column, str) else constant(names[-1], np.float32(column))
    rows = sum(classes if isinstance(column, str) else column.shape[1] for column in columns)
    graph += node("Concat", names, "rows" if layout != "yolov8" else "found", axis=1)
    shape = (1, rows, 20)
    if layout != "yolov8":
        graph += node("Transpose", ["rows"], "turned" if layout == "ssd" else "found", perm=[0, 2, 1])
        shape = (1, 20, rows)
    if layout == "ssd":
        graph += constant("shape", [1, 1, 20, 7]) + node("Reshape", ["turned", "shape"], "found")
        shape = (1, 1, 20, 7)
    graph += field(2, "tiny") + tensor(11, "image", (1, 3, SIDE, SIDE)) + tensor(12, "found", shape)
    path.write_bytes(field(1, 8) + field(7, graph) + field(8, field(1, "") + field(2, 13)))
    return path


def picture(width: int, height: int, *boxes: tuple, seed: int = 0) -> np.ndarray:
    """Grey noise with coloured rectangles: (left, top, right, bottom, colour)."""
    grey = np.random.default_rng(seed).integers(60, 190, (height // 8, width // 8), dtype=np.uint8)
    pixels = np.repeat(cv2.resize(grey, (width, height))[:, :, None], 3, axis=2)
    for left, top, right, bottom, colour in boxes:
        pixels[top:bottom, left:right] = colour
    return pixels


@pytest.mark.parametrize("layout", ["yolov8", "yolov5", "yolov10"])
def test_a_detector_finds_what_is_there_where_it_is(tmp_path, layout):
    detect = detectors.load(str(write_detector(tmp_path / "d.onnx", layout)), layout=layout, input_size=SIDE)
    # 128 x 96 pixels become 64 x 48 with 8 rows of border above and below
    found = detect(picture(128, 96, (32, 48, 64, 80, RED)))
    assert [(box[:4], box.kind) for box in found] == [((32.0, 48.0, 64.0, 80.0), "0")]
    assert found[0].score == pytest.approx((0.9 if layout == "yolov5" else 1) * 210 / 255, abs=0.01)
    assert detect(picture(128, 96)) == []


def test_an_ssd_sees_the_image_stretched(tmp_path):
    options = {"layout": "ssd", "input_size": SIDE, "mean": 0.0, "scale": 255.0}
    detect = detectors.load(str(write_detector(tmp_path / "d.onnx", "ssd")), **options)
    found = detect(picture(256, 64, (64, 16, 128, 32, RED)))
    np.testing.assert_allclose([box[:4] for box in found], [(64, 16, 128, 32)], atol=1e-3)


def test_of_boxes_that_overlap_the_better_one_stays(tmp_path):
    detect = detectors.load(str(write_detector(tmp_path / "d.onnx", "yolov8")), input_size=SIDE, score=0.3)
    found = detect(picture(SIDE, SIDE, (0, 0, 32, 32, RED), (32, 32, 48, 48, BLUE)))
    assert {box[:5] for box in found if box.kind == "0" and box.right - box.left == 32} == {(0, 0, 32, 32, "0")}
    assert {box[:5] for box in found if box.kind == "1"} == {(32, 32, 48, 48, "1")}


def test_a_wrong_layout_or_file_is_told(tmp_path):
    file = write_detector(tmp_path / "d.onnx", "yolov8")
    detect = detectors.load(str(file), layout="yolov5", input_size=SIDE)
    with pytest.raises(ValueError, match=r"yolov5 is \(1, boxes, 5 \+ classes\), the output is \(1, 6, 20\)"):
        detect(picture(64, 64))
    (tmp_path / "bad.onnx").write_bytes(b"no network")
    with pytest.raises(ValueError, match=r"cannot read bad\.onnx"):
        detectors.load(str(tmp_path / "bad.onnx"))


# Boxes from a table


def table_of(*paths: str, width: int = 100, height: int = 80, orientation: int = 1) -> pd.DataFrame:
    return pd.DataFrame({"path": paths, "width": width, "height": height, "orientation": orientation})


@pytest.mark.parametrize(
    "text",
    [
        "path,left,top,right,bottom\na/1.jpg,10,20,40,60\n",
        "path,x,y,width,height\na/1.jpg,10,20,30,40\n",
        "path,left,top,right,bottom,width,height\n1.jpg,10,20,40,60,100,80\n",
    ],
)
def test_both_forms_of_a_box_are_read(tmp_path, text):
    (tmp_path / "boxes.csv").write_text(text)
    found = crop.read_boxes(tmp_path / "boxes.csv", ["a/1.jpg", "b/2.jpg"])
    assert found.to_numpy().tolist() == [["a/1.jpg", 10.0, 20.0, 40.0, 60.0, "", 1.0]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,left\n1.jpg,3\n", "has no column path, x, y, width, height. It has: file, left"),
        (
            "path,x,y,width,height\na/1.jpg,10,ten,30,40\n",
            "1 rows of boxes.csv are no boxes, such as a/1.jpg: x '10', y 'ten'",
        ),
        ("path,left,top,right,bottom\na/1.jpg,40,20,10,60\n", "are no boxes"),
        ("path,left,top,right,bottom\nelsewhere.jpg,1,2,3,4\n", "no path in boxes.csv, such as 'elsewhere.jpg'"),
        ("path,left,top,right,bottom\n1.jpg,1,2,3,4\n", "file names where each is used once"),
    ],
)
def test_a_table_that_cannot_be_boxes_is_refused(tmp_path, text, message):
    (tmp_path / "boxes.csv").write_text(text)
    with pytest.raises(ValueError) as caught:
        crop.read_boxes(tmp_path / "boxes.csv", ["a/1.jpg", "b/1.jpg"])
    assert message in str(caught.value)


def test_the_largest_box_of_the_classes_that_scores_enough_is_taken():
    rows = [
        ("1", 10, 10, 30, 30, "car", 0.9),
        ("1", 10, 10, 50, 60, "truck", 0.6),
        ("1", 0, 0, 90, 70, "car", 0.4),
        ("1", 0, 0, 95, 75, "dog", 0.9),
        ("2", 0, 0, 95, 75, "dog", 0.9),
        ("3", 0, 0, 95, 75, "car", 0.49),
        ("4", 10, 10, 20, 70, "car", 0.9),
        ("5", 60, 40, 130, 90, "car", 0.5),
        ("6", 200, 10, 300, 60, "car", 0.5),
    ]
    found = pd.DataFrame(rows, columns=crop.COLUMNS)
    chosen = crop.largest(found, table_of(*"1234567"), classes=["car", "truck"], score=0.5, margin=0.1)
    assert chosen["box"].to_list() == ["6 5 54 65", "", "", "", "53 35 100 80", "", ""]
    assert chosen["why"].to_list() == [
        "cut",
        "no box of these classes",
        "too little score",
        "too small or outside",
        "cut",
        "too small or outside",
        "no box",
    ]
    assert chosen["share"][0] == pytest.approx(48 * 60 / 8000) and chosen["class"][0] == "truck"
    assert crop.headline(chosen).startswith("2 of 7 images cut to a box, the others whole: 2 too small or outside, 1 ")
    with pytest.raises(ValueError, match="no box has a class"):
        crop.largest(found.assign(**{"class": ""}), table_of("1"), classes=["car"])


def test_a_turned_photo_is_cut_where_a_viewer_shows_the_object(tmp_path):
    stored = Image.fromarray(
        np.rot90(picture(160, 240, (40, 100, 120, 200, RED)))
    )  # as a camera held upright stores it
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it clockwise to see it
    stored.save(tmp_path / "photo.png", exif=exif)
    facts = inventory.examine(tmp_path / "photo.png", min_size=1, max_aspect=20, max_pixels=10**9)
    found = pd.DataFrame([("photo.png", 40, 100, 120, 200, "", 1.0)], columns=crop.COLUMNS)
    chosen = crop.largest(found, pd.DataFrame([{"path": "photo.png"} | facts]))
    assert chosen["box"][0] == "40 100 120 200"
    pixels = images.load(tmp_path / "photo.png", 64, "squash", box=images.read_box(chosen["box"][0]))
    assert (pixels == RED).all()


def test_a_large_jpeg_is_cut_at_a_reduced_scale_as_at_full_size(tmp_path):
    photo = cv2.GaussianBlur(picture(1600, 1200, (700, 300, 1100, 900, RED), seed=3), (0, 0), 3)
    Image.fromarray(photo).save(tmp_path / "photo.jpg", quality=95)
    box = (650, 250, 1150, 950)
    whole = np.asarray(Image.open(tmp_path / "photo.jpg").convert("RGB"))
    expected = images.resize(whole[250:950, 650:1150], 96, "pad").astype(int)
    assert np.abs(images.load(tmp_path / "photo.jpg", 96, "pad", box=box) - expected).mean() < 3
    with pytest.raises(images.ImageError, match="box outside"):
        images.load(tmp_path / "photo.jpg", 96, box=(1700, 10, 1900, 90))


def test_an_interrupted_detection_goes_on(tmp_path, monkeypatch):
    paths, looked = ["a.png", "b.png", "c.png"], []
    for path in paths:
        Image.fromarray(picture(64, 64)).save(tmp_path / path)
    boxes = [detectors.Detection(1, 2, 30, 40, "3", 0.75), detectors.Detection(1, 2, 20, 30, "4", 0.5)]
    monkeypatch.setattr(detectors, "load", lambda *_, **__: lambda pixels: looked.append(1) or boxes)
    (tmp_path / "tiny.onnx").touch()
    parameters = {"boxes": "", "detector": str(tmp_path / "tiny.onnx"), "input_size": 64}
    parameters |= {"layout": "yolov8", "mean": 0.0, "scale": 255.0, "score": 0.5}
    found = crop.find(paths, tmp_path, parameters, tmp_path / "found.csv", workers=1)
    assert len(looked) == 3 and found["path"].to_list() == ["a.png", "a.png", "b.png", "b.png", "c.png", "c.png"]
    text = (tmp_path / "found.csv").read_text()
    (tmp_path / "found.csv").write_text(text[: text.index("c.png") + 3])  # cut off within the name of the third
    again = crop.find(paths, tmp_path, parameters, tmp_path / "found.csv", workers=1)
    assert len(looked) == 5, "b, which may be incomplete, and c"
    pd.testing.assert_frame_equal(again, found)


# A run


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """12 images of two classes: a red square before one of two greys; in the last of each class there is none."""
    folder = tmp_path_factory.mktemp("photos")
    for number, name in enumerate(["cars", "vans"]):
        (folder / name).mkdir()
        for index in range(6):
            at = (32 * (index % 3), 32 * number, 32 * (index % 3) + 32, 32 * number + 32, RED)
            shown = picture(128, 128, *[at] * (index < 5), seed=10 * number + index)
            Image.fromarray(shown).save(folder / name / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def cropped(tmp_path_factory, photos, by_hand):
    """A recipe with a detector, whose stages as far as the resized images were made, each from the one planned."""
    place = tmp_path_factory.mktemp("cropped")
    file = write_detector(place / "tiny.onnx", "yolov8")
    path = place / "cars.yaml"
    path.write_text(
        f"explore: {{source: {photos}}}\ncrop: {{detector: {file}, input_size: {SIDE}, classes: [0], score: 0.6}}\n"
        "split: {ratio: [0.5, 0.25, 0.25], on_leak: drop}\nresize: {image_size: 32, fit: squash}\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("THAW_RUNS", str(place / "runs"))
        patch.setenv(progress.PROGRESS_VARIABLE, str(place / "progress"))
        before = {image: image.read_bytes() for image in photos.rglob("*.png")}
        for number, name in enumerate(["explore", "crop", "split", "resize"]):
            step = planning.plan(recipes.load(path))[number]
            by_hand(name, **step.parameters, **{p: str(f) for p, f in step.input_folders.items()}, out=str(step.link))
        assert before == {image: image.read_bytes() for image in photos.rglob("*.png")}, "raw data is never changed"
        yield path


def test_a_recipe_with_the_section_crops_between_explore_and_split(cropped):
    run = project.runs_folder() / "cars"
    steps = planning.plan(recipes.load(cropped))
    assert [step.stage.name for step in steps][:4] == ["explore", "crop", "split", "resize"]
    headline = "10 of 12 images cut to a box, the others whole: 2 no box"
    assert disk.read_json(run / "crop/stage.json")["headline"] == headline
    assert headline in report.build_report(run).read_text()
    table = pd.read_csv(run / "resize/images.csv", keep_default_na=False)
    boxes = {f"{x} {y} {x + 32} {y + 32}" for x in (0, 32, 64) for y in (0, 32)}
    assert set(table["box"]) == boxes | {""}
    for path, file, box in table[["path", "file", "box"]].to_numpy():
        pixels = images.load(run / "resize" / file, 32)
        assert (pixels == RED).all() == (box != ""), path
    raw = pd.read_csv(run / "explore/inventory.csv").set_index("path")["sha256"]
    assert (table["sha256"] == table["path"].map(raw)).all()


def test_images_that_are_alike_once_they_are_cut_stay_together(cropped):
    run = project.runs_folder() / "cars"
    before, after = (pd.read_csv(run / name / "inventory.csv") for name in ("explore", "crop"))
    assert before["group"].nunique() == 12
    assert after["group"].nunique() == 3, "ten red squares, and two images that are whole"
    assert disk.read_json(run / "crop/groups.json")["groups"] == 3


def test_without_the_section_a_run_is_as_it_was(cropped, tmp_path, monkeypatch):
    plain = recipes.load(cropped)
    del plain.stages["crop"]
    monkeypatch.setenv("THAW_RUNS", str(tmp_path))
    with_crop, without = ({s.stage.name: s for s in planning.plan(r)} for r in (recipes.load(cropped), plain))
    assert list(without) == ["explore", "split", "resize", "head", "fine_tune", "evaluate"]
    assert without["explore"].fingerprint == with_crop["explore"].fingerprint
    assert without["split"].ingredients["inputs"] == {"explore": without["explore"].fingerprint}
    assert with_crop["split"].ingredients["inputs"] == {"crop": with_crop["crop"].fingerprint}
    assert with_crop["split"].input_folders == {"explore": with_crop["crop"].folder}
    assert not {name for step in without.values() for name in step.ingredients["code"]} & {"00b_crop"}
    assert "crop" not in plain.as_yaml() and "crop:" in recipes.load(cropped).as_yaml()
    link = tmp_path / "cars" / "crop"
    link.parent.mkdir()
    link.symlink_to(tmp_path)
    planning.unlink_left_out(plain)
    assert not link.is_symlink(), "a run that no longer crops keeps no link to a cropped inventory"


def test_a_recipe_that_names_no_boxes_or_two_is_refused_before_it_runs(cropped, tmp_path, monkeypatch):
    monkeypatch.setenv("THAW_RUNS", str(tmp_path))
    recipe = recipes.load(cropped)
    for change, message in (
        ({"boxes": "b.csv"}, "set either boxes"),
        ({"detector": ""}, "set either boxes"),
        ({"detector": "no.onnx"}, "detector: there is no file no.onnx"),
    ):
        recipe.stages["crop"] = recipes.load(cropped).stages["crop"] | change
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            terminal.run(recipe, terminal.Console(quiet=True), last="crop")
    recipe = recipes.load(cropped)
    recipe.stages["export"] = {}
    with pytest.raises(ValueError, match=r"export: no bundle carries a detector, and crop\.detector is"):
        terminal.run(recipe, terminal.Console(quiet=True))
    del recipe.stages["crop"]
    with pytest.raises(ValueError, match="no section crop"):
        terminal.run(recipe, terminal.Console(quiet=True), last="crop")


def test_prediction_crops_as_training_did(cropped, photos, tmp_path):
    import keras

    keras.utils.set_random_seed(1)
    pool, dense = keras.layers.AveragePooling2D(8), keras.layers.Dense(2, activation="softmax")
    model = keras.Sequential(
        [keras.Input((32, 32, 3)), keras.layers.Rescaling(1 / 255), pool, keras.layers.Flatten(), dense]
    )
    about = {name: disk.read_json(project.runs_folder() / "cars/resize/resize.json")[name] for name in ("fit", "crop")}
    for name, kept in (("with", about), ("without", {"fit": "squash"})):
        (tmp_path / name).mkdir()
        model.save(tmp_path / name / "model.keras")
        disk.write_json(tmp_path / name / "model.json", kept | {"image_size": 32})
        disk.write_json(tmp_path / name / "class_names.json", ["cars", "vans"])
    part = Image.open(photos / "cars" / "1.png").crop((32, 0, 64, 32))
    part.save(tmp_path / "part.png")
    whole, _ = prediction.predict(tmp_path / "with", [photos / "cars" / "1.png", photos / "cars" / "5.png"])
    expected, _ = prediction.predict(tmp_path / "without", [tmp_path / "part.png", photos / "cars" / "5.png"])
    np.testing.assert_allclose(whole[["cars", "vans"]], expected[["cars", "vans"]], atol=1e-6)
    assert "caution" not in whole.attrs
    by_table = about | {"image_size": 32, "crop": about["crop"] | {"boxes": "b.csv", "detector": ""}}
    disk.write_json(tmp_path / "with" / "model.json", by_table)
    table, _ = prediction.predict(tmp_path / "with", [photos / "cars" / "1.png"])
    assert "cut to the boxes of b.csv; these are taken whole" in table.attrs["caution"]


def test_a_kerashub_detector_is_read(tmp_path):
    keras_hub = pytest.importorskip("keras_hub")
    encoder = keras_hub.models.ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[7],
        stackwise_num_filters=[64, 64, 64, 64],
        stackwise_num_blocks=[1, 1, 1, 1],
        stackwise_num_strides=[1, 2, 2, 2],
        block_type="basic_block",
    )
    backbone = keras_hub.models.RetinaNetBackbone(encoder, 3, 5, use_p5=False, image_shape=(128, 128, 3))
    converter = keras_hub.layers.RetinaNetImageConverter(image_size=(128, 128), scale=1 / 255)
    preprocessor = keras_hub.models.RetinaNetObjectDetectorPreprocessor(image_converter=converter)
    model = keras_hub.models.RetinaNetObjectDetector(backbone, num_classes=3, preprocessor=preprocessor)
    model.save_to_preset(tmp_path / "preset")
    pixels = picture(256, 128, (32, 48, 64, 80, RED))
    found = detectors.load(f"hub:{tmp_path / 'preset'}", score=0.001)(pixels)
    assert found and all(box.kind in "012" and 0.001 <= box.score <= 1 for box in found)
    model.prediction_decoder.confidence_threshold = 0.001
    square = np.full((1, 128, 128, 3), detectors.GREY, np.float32)
    square[0, 32:96] = cv2.resize(pixels, (128, 64), interpolation=cv2.INTER_AREA)
    top, left, bottom, right = np.asarray(model.predict(square, verbose=0)["boxes"])[0, 0]
    np.testing.assert_allclose(found[0][:4], np.multiply(2, [left, top - 32, right, bottom - 32]), rtol=1e-4, atol=1e-3)


def test_bytes_of_the_tiny_detector_are_what_they_say():
    assert field(1, 300) == b"\x08\xac\x02" and field(2, "ab") == b"\x12\x02ab"
    assert struct.unpack("<f", constant("x", np.float32([2.5]))[-7:-3])[0] == 2.5
