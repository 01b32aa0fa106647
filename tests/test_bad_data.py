"""Messy data: every odd input ends as the right pixels, as a row of the quarantine, or as a clear error.

Each case puts one oddity into an otherwise sound folder of two classes and sends the whole through explore, split and
resize. Whatever happens to the oddity, the sound images must come out at the other end, and the raw files unchanged.
"""

import hashlib
import io
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from helpers.core import notebooks, words
from helpers.data import grouping, images, inventory, leaks, links, resizing, sources, splits

SOUND = 6  # images in each of the two sound classes
COLOUR = (200, 60, 20)


@dataclass
class Outcome:
    """What came out of explore, split and resize."""

    root: Path
    data: sources.Source
    table: pd.DataFrame
    quarantine: pd.DataFrame
    split: pd.DataFrame
    images: pd.DataFrame
    folder: Path

    def reason(self, path: str) -> str:
        rows = self.quarantine[self.quarantine["path"] == path]
        return "" if rows.empty else rows["reason"].iloc[0]

    def pixels(self, path: str) -> np.ndarray:
        row = self.images[self.images["path"] == path].iloc[0]
        return images.load(self.folder / row["file"], 32)


def picture(seed: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """An image that looks like no other: soft coloured clouds."""
    noise = np.random.default_rng(seed).integers(0, 255, (5, 6, 3), np.uint8)
    return Image.fromarray(cv2.resize(noise, size, interpolation=cv2.INTER_CUBIC))


def encoded(image: Image.Image | None = None, format: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image or Image.new("RGB", (48, 48), COLOUR)).save(buffer, format, **options)
    return buffer.getvalue()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "raw"
    for number in range(SOUND):
        for offset, name in enumerate(("cat", "dog")):
            (root / name).mkdir(parents=True, exist_ok=True)
            picture(2 * number + offset).save(root / name / f"sound{number}.png")
    return root


def process(root: Path, method: str = "ratio", on_leak: str = "fail", **parameters: Any) -> Outcome:
    """Send a source through explore, split and resize, as the notebooks do."""
    defaults = {name: p.default for name, p in notebooks.find_stage("explore").settings.items()}
    data = sources.read(defaults | {"source": str(root)} | parameters)
    table, quarantine = inventory.take(data, max_pixels=1_000_000)
    table = grouping.group(table)
    table["part"] = splits.assign(table, method, ratio=(0.5, 0.25, 0.25), seed=3)
    table = leaks.settle(table) if on_leak == "drop" else table
    out = root.parent / "out"
    (out / "split").mkdir(parents=True)
    (out / "resize").mkdir()
    split = links.write_split(out / "split", table, data.root)
    leaks.check_split(out / "split", links.read_split(out / "split"), table, distance=8)
    written, late = resizing.write_images(out / "resize", out / "split", image_size=32, fit="squash")
    assert late.empty, "what 00 let through, 02 must be able to read"
    return Outcome(root, data, table, quarantine, split, written, out / "resize")


def fingerprints(root: Path) -> dict[str, str]:
    files = [path for path in root.rglob("*") if path.is_file() and os.access(path, os.R_OK)]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def check_the_rest(outcome: Outcome) -> None:
    """The sound images are all there, and nothing is both used and quarantined."""
    sound = {f"{name}/sound{number}.png" for name in ("cat", "dog") for number in range(SOUND)}
    assert sound <= set(outcome.images["path"])
    assert not set(outcome.images["path"]) & set(outcome.quarantine["path"])
    assert not outcome.images["path"].duplicated().any()


# -- One odd file in a class folder ------------------------------------------------------------------------------------


def truncated_png() -> bytes:
    data = encoded(picture(99), "PNG")
    return data[: len(data) // 2]


def huge_png_header() -> bytes:
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", len(header)) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IEND\xaeB`\x82"


def rotated_exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def palette_with_transparency() -> bytes:
    image = Image.new("P", (48, 48), 0)
    image.putpalette([*COLOUR, 0, 255, 0])
    image.paste(1, (0, 0, 48, 24))
    return encoded(image, "PNG", transparency=1)


def heic(image: Image.Image, **options: Any) -> bytes:
    pytest.importorskip("pillow_heif", reason="the extra heic is not installed: pip install -e '.[heic]'")
    return encoded(image, "HEIF", quality=95, **options)


def turned_heic() -> bytes:
    upright = Image.new("RGB", (48, 48), (0, 0, 255))
    upright.paste(COLOUR, (0, 24, 42, 48))
    return heic(upright.transpose(Image.Transpose.ROTATE_90), exif=rotated_exif().tobytes())


def animation(format: str) -> bytes:
    frames = [Image.new("RGB", (48, 48), colour) for colour in (COLOUR, (0, 0, 255))]
    return encoded(frames[0], format, save_all=True, append_images=frames[1:], duration=50, lossless=True)


def sixteen_bits(suffix: str) -> bytes:
    return cv2.imencode(suffix, np.full((48, 48, 3), [v * 257 for v in reversed(COLOUR)], np.uint16))[1].tobytes()


def thirty_two_bits(kind: type, most: float) -> bytes:
    return encoded(Image.fromarray(np.linspace(0, most, 48 * 48).reshape(48, 48).astype(kind)), "TIFF")


def damaged_middle() -> bytes:
    data = bytearray(encoded(picture(98, (400, 300)), "PNG"))
    data[len(data) // 2 : len(data) // 2 + 40] = bytes(40)
    return bytes(data)


SAME = "the right pixels"
FILES: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "truncated jpg": ("a.jpg", lambda: encoded(picture(99, (300, 300)))[:2000], "truncated"),
    "jpg cut within its header": ("a.jpg", lambda: encoded()[:60], "truncated"),
    "truncated png": ("a.png", truncated_png, "truncated"),
    "png with a damaged middle": ("a.png", damaged_middle, "unreadable"),
    "truncated gif": ("a.gif", lambda: encoded(picture(99), "GIF")[:900], "truncated"),
    "truncated webp": ("a.webp", lambda: encoded(picture(99, (300, 300)), "WEBP")[:700], "unreadable"),
    "truncated tiff": ("a.tif", lambda: encoded(picture(99), "TIFF")[:3000], "truncated"),
    "zero bytes": ("a.jpg", lambda: b"", "empty"),
    "text named .jpg": ("a.jpg", lambda: b"these are no pixels\n" * 50, "not an image"),
    "html of an error page named .jpg": ("a.jpg", lambda: b"<!DOCTYPE html><html>404</html>", "not an image"),
    "random bytes named .png": ("a.png", lambda: np.random.default_rng(0).bytes(5000), "not an image"),
    "png signature and nothing more": ("a.png", lambda: b"\x89PNG\r\n\x1a\n", "truncated"),
    "1 x 1": ("a.png", lambda: encoded(Image.new("RGB", (1, 1)), "PNG"), "too small"),
    "1 x 5000": ("a.png", lambda: encoded(Image.new("RGB", (1, 5000)), "PNG"), "too small"),
    "20 x 2000": ("a.png", lambda: encoded(Image.new("RGB", (20, 2000)), "PNG"), "odd shape"),
    "30,000 x 30,000 header": ("a.png", huge_png_header, "too many pixels"),
    "bomb that is sound": ("a.png", lambda: encoded(Image.new("1", (4000, 4000)), "PNG"), "too many pixels"),
    "gif named .jpg": ("a.jpg", lambda: encoded(format="GIF"), SAME),
    "webp named .jpg": ("a.jpg", lambda: encoded(format="WEBP", lossless=True), SAME),
    "tiff named .jpg": ("a.jpg", lambda: encoded(format="TIFF"), SAME),
    "avif named .jpg": ("a.jpg", lambda: encoded(format="AVIF", quality=95), SAME),
    "png named .JPG": ("a.JPG", lambda: encoded(format="PNG"), SAME),
    "heic of a phone held upright": ("a.heic", turned_heic, SAME),
    "heic named .jpg": ("a.jpg", lambda: heic(Image.new("RGB", (48, 48), COLOUR)), SAME),
    "heic with alpha": ("a.heic", lambda: heic(Image.new("RGBA", (48, 48), (*COLOUR, 255))), SAME),
    "truncated heic": ("a.heic", lambda: heic(picture(99, (300, 300)))[:-50], "truncated"),
    "heic cut within its header": ("a.heic", lambda: heic(picture(99))[:60], "truncated"),
    "bmp": ("a.bmp", lambda: encoded(format="BMP"), SAME),
    "jpeg 2000": ("a.jp2", lambda: encoded(format="JPEG2000"), SAME),
    "portable pixmap": ("a.ppm", lambda: encoded(format="PPM"), SAME),
    "cmyk jpg": ("a.jpg", lambda: encoded(Image.new("RGB", (48, 48), COLOUR).convert("CMYK"), quality=95), SAME),
    "progressive jpg": ("a.jpg", lambda: encoded(progressive=True, quality=95), SAME),
    "16-bit png": ("a.png", lambda: sixteen_bits(".png"), SAME),
    "16-bit tiff": ("a.tif", lambda: sixteen_bits(".tif"), SAME),
    "tiff of floats": ("a.tif", lambda: thirty_two_bits(np.float32, 1.0), "format"),
    "tiff of 32-bit numbers": ("a.tif", lambda: thirty_two_bits(np.int32, 1e9), "format"),
    "lzw tiff": ("a.tif", lambda: encoded(format="TIFF", compression="tiff_lzw"), SAME),
    "alpha": ("a.png", lambda: encoded(Image.new("RGBA", (48, 48), (*COLOUR, 255)), "PNG"), SAME),
    "palette": ("a.png", lambda: encoded(Image.new("RGB", (48, 48), COLOUR).quantize(8), "PNG"), SAME),
    "palette with transparency": ("a.png", palette_with_transparency, SAME),
    "animated gif": ("a.gif", lambda: animation("GIF"), SAME),
    "animated webp": ("a.webp", lambda: animation("WEBP"), SAME),
    "animated png": ("a.png", lambda: animation("PNG"), SAME),
    "rotated by exif": ("a.jpg", lambda: encoded(exif=rotated_exif(), quality=95), SAME),
    "damaged exif": ("a.jpg", lambda: encoded(exif=b"Exif\0\0II*\0\xff\xff\xff\xff", quality=95), SAME),
    "bytes after the end": ("a.jpg", lambda: encoded(quality=95) + b"\0" * 999, SAME),
    "name with a space": ("a b.jpg", lambda: encoded(quality=95), SAME),
    "name with quotes and a comma": ("""a "b', c.jpg""", lambda: encoded(quality=95), SAME),
    "name with a line break": ("a\nb.jpg", lambda: encoded(quality=95), SAME),
    "name with a percent sign and a hash": ("100%25 #1?.jpg", lambda: encoded(quality=95), SAME),
    "name in another script": ("写真_фото_صورة.jpg", lambda: encoded(quality=95), SAME),
    "name of 255 bytes": ("x" * 251 + ".jpg", lambda: encoded(quality=95), SAME),
    "name with dots": ("a.b.c..jpg", lambda: encoded(quality=95), SAME),
    "name that begins with a dash": ("-rf.jpg", lambda: encoded(quality=95), SAME),
}


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("case", FILES)
def test_one_odd_file(root, case):
    name, make, expected = FILES[case]
    (root / "cat" / name).write_bytes(make())
    before = fingerprints(root)
    outcome = process(root)
    check_the_rest(outcome)
    assert fingerprints(root) == before
    assert outcome.reason(f"cat/{name}") == ("" if expected is SAME else expected)
    if expected is SAME:
        middle = outcome.pixels(f"cat/{name}")[24:30, 8:24].reshape(-1, 3)
        assert np.abs(middle.astype(int) - COLOUR).max() < 16
    else:
        assert outcome.quarantine["detail"].str.len().min() > 5


# -- Odd folders and links ---------------------------------------------------------------------------------------------


def test_a_link_to_a_folder_above_is_not_followed_for_ever(root):
    (root / "cat" / "again").symlink_to(root, target_is_directory=True)
    outcome = process(root)
    check_the_rest(outcome)
    assert outcome.data.ignored["links to a folder above"] == 1


def test_a_broken_link_is_quarantined(root):
    (root / "cat" / "gone.jpg").symlink_to(root / "nowhere.jpg")
    (root / "cat" / "itself.jpg").symlink_to(root / "cat" / "itself.jpg")
    outcome = process(root)
    check_the_rest(outcome)
    assert outcome.reason("cat/gone.jpg") == "broken link" and outcome.reason("cat/itself.jpg")


def test_a_linked_image_is_an_image(root):
    picture(77).save(root.parent / "elsewhere.png")
    (root / "cat" / "linked.png").symlink_to(root.parent / "elsewhere.png")
    assert "cat/linked.png" in set(process(root).images["path"])


def test_an_unreadable_file_is_quarantined(root, monkeypatch):
    picture(77).save(root / "cat" / "secret.png")
    (root / "cat" / "secret.png").chmod(0)
    if os.access(root / "cat" / "secret.png", os.R_OK):  # root may read everything, so play the refusal
        read = Path.read_bytes
        refuse = lambda path: read(path) if path.name != "secret.png" else open("/proc/self/mem/x")  # noqa: E731, SIM115
        monkeypatch.setattr(Path, "read_bytes", refuse)
    outcome = process(root)
    check_the_rest(outcome)
    assert outcome.reason("cat/secret.png") == "unreadable"


def test_a_folder_named_like_an_image_is_a_folder(root):
    (root / "cat" / "album.jpg").mkdir()
    picture(77).save(root / "cat" / "album.jpg" / "inside.png")
    outcome = process(root)
    check_the_rest(outcome)
    assert outcome.table.set_index("path")["label"]["cat/album.jpg/inside.png"] == "cat"


def test_nested_folders_belong_to_their_top_class(root):
    (root / "cat" / "indoor" / "night").mkdir(parents=True)
    picture(77).save(root / "cat" / "indoor" / "night" / "sound0.png")
    outcome = process(root)
    check_the_rest(outcome)
    assert (outcome.images["label"] == "cat").sum() == SOUND + 1


def test_clutter_is_ignored_and_counted(root):
    for name in (".hidden.jpg", "Thumbs.db", "._cat.jpg", "desktop.ini", ".DS_Store"):
        (root / "cat" / name).write_bytes(b"x")
    for folder in (".ipynb_checkpoints", "__MACOSX"):
        (root / folder).mkdir()
        picture(77).save(root / folder / "a.png")
    (root / "cat" / "notes.txt").write_text("x")
    picture(78).save(root / "loose.png")
    outcome = process(root)
    check_the_rest(outcome)
    assert len(outcome.quarantine) == 0 and len(outcome.table) == 2 * SOUND
    assert outcome.data.ignored == {
        "hidden and system files": 7,
        "files named *.txt": 1,
        "images outside any class folder": 1,
    }


@pytest.mark.parametrize(
    "names", [("a.png", "A.png"), ("é.png", "e\u0301.png"), ("a.png", "a.jpg"), ("x/a.png", "y/a.png")]
)
def test_names_that_would_meet_stay_apart(root, names):
    for seed, name in enumerate(names):
        (root / "cat" / name).parent.mkdir(exist_ok=True)
        picture(70 + seed).save(root / "cat" / name)
    if len({str(path) for path in (root / "cat").rglob("*")} & {str(root / "cat" / name) for name in names}) < 2:
        pytest.skip("this file system holds the two names to be one")
    outcome = process(root)
    check_the_rest(outcome)
    written = outcome.images[outcome.images["path"].isin([f"cat/{name}" for name in names])]["file"]
    stems = {Path(file).stem.casefold() for file in written}
    assert len(stems) == 2
    assert not np.array_equal(outcome.pixels(f"cat/{names[0]}"), outcome.pixels(f"cat/{names[1]}"))


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
def test_a_name_that_is_not_utf8_is_quarantined(root):
    try:
        (Path(os.fsdecode(os.fsencode(root) + b"/cat/\xff\xfe.png"))).write_bytes(encoded(picture(77), "PNG"))
    except OSError:
        pytest.skip("this file system takes no such name")
    Path(os.fsdecode(os.fsencode(root) + b"/cat/notes.\xff")).write_text("of another kind")
    outcome = process(root)
    check_the_rest(outcome)
    assert outcome.quarantine.drop(columns="detail").to_dict("records") == [
        {"path": r"cat/\xff\xfe.png", "label": "cat", "reason": "unusable name"}
    ]
    assert outcome.data.ignored == {r"files named *.\xff": 1}


# -- Classes -----------------------------------------------------------------------------------------------------------


def test_the_same_picture_in_two_classes_is_quarantined_in_both(root):
    for name in ("cat", "dog"):
        picture(77).save(root / name / "same.png")
    outcome = process(root)
    check_the_rest(outcome)
    assert outcome.reason("cat/same.png") == outcome.reason("dog/same.png") == "two labels"
    details = outcome.quarantine.set_index("path")["detail"]
    assert "dog/same.png" in details["cat/same.png"] and "cat/same.png" in details["dog/same.png"]


def test_the_same_picture_twice_in_a_class_is_one_group(root):
    for name in ("one.png", "two.png"):
        picture(77).save(root / "cat" / name)
    outcome = process(root)
    check_the_rest(outcome)
    assert outcome.split[outcome.split["path"].isin(["cat/one.png", "cat/two.png"])]["part"].nunique() == 1


def test_a_class_left_empty_is_an_error_that_names_it(root):
    (root / "bird").mkdir()
    (root / "bird" / "a.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"No usable image is left of bird \(1 not an image\)"):
        process(root)


def test_a_folder_without_any_image_is_told_and_is_no_class(root):
    for name in ("bird", "fish"):
        (root / name).mkdir()
    (root / "fish" / "notes.txt").write_text("none yet")
    outcome = process(root)
    check_the_rest(outcome)
    assert outcome.data.ignored["folders without an image: bird"] == 1
    assert outcome.data.ignored["folders without an image: fish"] == 1


def test_a_single_class_is_an_error(root):
    for path in (root / "dog").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="Only one class"):
        process(root)


def test_a_class_with_one_image_is_an_error_that_names_it(root):
    (root / "bird").mkdir()
    picture(77).save(root / "bird" / "a.png")
    with pytest.raises(ValueError, match="bird"):
        process(root)


@pytest.mark.parametrize("content", ["missing", "empty", "no images"])
def test_a_source_without_images_is_an_error(tmp_path, content):
    if content != "missing":
        (tmp_path / "raw" / "cat").mkdir(parents=True)
    if content == "no images":
        (tmp_path / "raw" / "cat" / "a.txt").write_text("x")
    with pytest.raises((FileNotFoundError, ValueError), match="raw"):
        process(tmp_path / "raw")


def test_classes_that_differ_only_in_case_are_an_error(root):
    (root / "Cat").mkdir()
    picture(77).save(root / "Cat" / "a.png")
    if len(list(root.iterdir())) == 2:
        pytest.skip("this file system holds the two names to be one")
    with pytest.raises(ValueError, match="differ only in case: Cat, cat"):
        process(root)


def test_a_source_within_the_output_is_an_error(root):
    for out in (root, root.parent, root / "runs"):
        with pytest.raises(ValueError, match="lie inside each other"):
            sources.check_separate(root, out)
    sources.check_separate(root, root.parent / "out")


# -- Ready-made splits -------------------------------------------------------------------------------------------------


@pytest.fixture
def ready(tmp_path: Path) -> Path:
    """A folder with training and test folders, and no val."""
    for number in range(24):
        folder = tmp_path / "raw" / ("Training", "test")[number % 3 == 0] / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        picture(number).save(folder / f"{number}.png")
    return tmp_path / "raw"


def test_a_ready_made_split_is_kept_and_a_missing_part_is_cut_from_train(ready):
    outcome = process(ready, "predefined")
    parts = outcome.split.set_index("path")["part"]
    assert (parts[parts.index.str.startswith("test/")] == "test").all()
    assert set(parts[parts.index.str.startswith("Training/")]) == {"train", "val"}


def test_the_same_image_in_train_and_test_of_a_ready_made_split_stops_the_run(ready):
    (ready / "Training" / "cat" / "leak.png").write_bytes((ready / "test" / "cat" / "0.png").read_bytes())
    with pytest.raises(ValueError, match=r"leaks.*on_leak"):
        process(ready, "predefined")


def test_on_request_such_an_image_is_left_out_of_train(ready):
    (ready / "Training" / "cat" / "leak.png").write_bytes((ready / "test" / "cat" / "0.png").read_bytes())
    outcome = process(ready, "predefined", on_leak="drop")
    parts = outcome.split.set_index("path")["part"]
    assert parts["Training/cat/leak.png"] == "unused" and parts["test/cat/0.png"] == "test"
    assert len(outcome.images) == 24


def test_a_source_without_parts_cannot_be_predefined(root):
    with pytest.raises(ValueError, match="its own parts"):
        process(root, "predefined")


# -- Labels files ------------------------------------------------------------------------------------------------------


@pytest.fixture
def labelled(tmp_path: Path) -> Callable[..., Outcome]:
    """Twelve images in one folder, and a function that processes them with a given labels file."""
    (tmp_path / "raw").mkdir()
    for number in range(12):
        picture(number).save(tmp_path / "raw" / f"{number}.png")

    def run(text: str | bytes, name: str = "labels.csv", **parameters: Any) -> Outcome:
        (tmp_path / name).write_bytes(text.encode() if isinstance(text, str) else text)
        return process(tmp_path / "raw", labels=str(tmp_path / name), **parameters)

    return run


def rows(*extra: str, head: str = "path,label", classes: tuple[str, ...] = ("a", "b"), end: str = "\n") -> str:
    lines = [head] + [f"{number}.png,{classes[number % len(classes)]}" for number in range(12)]
    return end.join([*lines, *extra]) + end


@pytest.mark.parametrize(
    ("row", "path", "reason"),
    [
        ("nowhere.png,a", "nowhere.png", "missing"),
        ("../../etc/passwd,a", "../../etc/passwd", "outside the source"),
        ("/etc/passwd,a", "/etc/passwd", "outside the source"),
        ("../raw/../secret.png,a", "../raw/../secret.png", "outside the source"),
        (".,a", ".", "outside the source"),
        (",a", "", "no path"),
        ("extra.png,", "extra.png", "no label"),
        ('"extra.png","  "', "extra.png", "no label"),
    ],
)
def test_one_bad_row_of_a_labels_file(labelled, tmp_path, row, path, reason):
    picture(50).save(tmp_path / "raw" / "extra.png")
    picture(51).save(tmp_path / "secret.png")
    outcome = labelled(rows(row))
    assert outcome.reason(path) == reason
    assert len(outcome.images) == 12 and len(outcome.quarantine) == 1


def test_repeated_rows_count_once(labelled):
    outcome = labelled(rows("0.png,a", "0.png,a"))
    assert len(outcome.images) == 12 and outcome.data.ignored["repeated rows of the labels file"] == 2


def test_conflicting_labels_quarantine_the_image(labelled):
    outcome = labelled(rows("0.png,b"))
    assert outcome.reason("0.png") == "two labels" and len(outcome.images) == 11


def test_two_spellings_of_one_path_are_one_image(labelled):
    outcome = labelled(rows("./0.png,a", "x/../1.png,b"))
    assert len(outcome.images) == 12


@pytest.mark.parametrize("head", ["file,label", "path,class", ""])
def test_a_missing_column_is_an_error_that_lists_those_there(labelled, head):
    with pytest.raises(ValueError, match="no column"):
        labelled(rows(head=head))


@pytest.mark.parametrize(
    "text",
    [
        rows().encode("utf-16"),
        "\ufeff" + rows(),
        rows(end="\r\n"),
        rows().replace(",", ";"),
        rows().replace(",", "\t"),
        rows(head=" path , label "),
        rows("", ""),
    ],
    ids=["utf-16", "byte order mark", "crlf", "semicolons", "tabs", "spaces in the header", "empty lines at the end"],
)
def test_dialects_of_csv(labelled, text):
    outcome = labelled(text)
    assert len(outcome.images) == 12 and set(outcome.images["label"]) == {"a", "b"}


def test_quotes_and_commas_in_names(labelled, tmp_path):
    picture(50).save(tmp_path / "raw" / 'a "b", c.png')
    outcome = labelled(rows('"a ""b"", c.png","a"'))
    assert 'a "b", c.png' in set(outcome.images["path"])


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00\x00rubbish", b"path\n\xff.png,a", rows(head="path").encode()])
def test_a_labels_file_that_is_no_table_is_an_error(labelled, content):
    with pytest.raises(ValueError, match="labels"):
        labelled(content)


def test_a_missing_labels_file_is_an_error(root):
    with pytest.raises(FileNotFoundError, match="labels: there is no file"):
        process(root, labels=str(root / "nowhere.csv"))


def test_numeric_class_names_stay_text_in_natural_order(labelled):
    outcome = labelled(rows(classes=("9", "10", "007", "NA")))
    assert words.natural_order(outcome.images["label"]) == ["007", "9", "10", "NA"]


def test_a_label_with_a_slash_or_dots_gets_a_folder_of_its_own(labelled):
    outcome = labelled(rows(classes=("car/truck", "..", "car%2Ftruck", ".hidden")))
    assert set(outcome.images["label"]) == {"car/truck", "..", "car%2Ftruck", ".hidden"}
    assert {Path(file).parts[1] for file in outcome.images["file"]} == {
        "car%2Ftruck",
        "%2E.",
        "car%252Ftruck",
        "%2Ehidden",
    }


def test_labels_in_two_unicode_forms_are_one_class(labelled):
    outcome = labelled(rows(classes=("é", "e\u0301", "b")))
    assert set(outcome.images["label"]) == {"é", "b"}


def test_names_in_another_unicode_form_are_found(labelled, tmp_path):
    picture(50).save(tmp_path / "raw" / "e\u0301.png")
    outcome = labelled(rows("é.png,a"))
    assert len(outcome.images) == 13


def test_a_suffix_is_added_and_a_subfolder_kept(labelled, tmp_path):
    (tmp_path / "raw" / "sub").mkdir()
    picture(50).save(tmp_path / "raw" / "sub" / "x.png")
    text = rows("sub/x,a").replace(".png", "")
    outcome = labelled(text, suffix=".png")
    assert len(outcome.images) == 13 and "sub/x.png" in set(outcome.images["path"])


def test_thresholds_make_classes_of_numbers(labelled):
    outcome = labelled(rows("", classes=("0", "0.5", "0.51", "1")), thresholds=[0.5], class_names=["sound", "broken"])
    found = outcome.table.groupby("label")["value"].unique().map(set).to_dict()
    assert found == {"sound": {"0", "0.5"}, "broken": {"0.51", "1"}}


def test_a_label_that_is_no_number_is_quarantined(labelled):
    outcome = labelled(rows("", classes=("0", "1", "?")), thresholds=[0.5])
    assert set(outcome.quarantine["reason"]) == {"no label"} and len(outcome.images) == 8
    assert set(outcome.images["label"]) == {"up to 0.5", "above 0.5"}


@pytest.mark.parametrize("wrong", [{"thresholds": [0.5, 0.2]}, {"thresholds": [0.5], "class_names": ["one"]}])
def test_thresholds_that_make_no_sense_are_an_error(labelled, wrong):
    with pytest.raises(ValueError, match="thresholds"):
        labelled(rows(classes=("0", "1")), **wrong)


def test_an_unknown_word_in_the_split_column_is_an_error(labelled):
    text = rows(head="path,label,split").replace(".png,a", ".png,a,train").replace(".png,b", ".png,b,holdout")
    with pytest.raises(ValueError, match="holdout"):
        labelled(text, method="predefined")


def test_columns_that_clash_with_the_inventory_are_kept_under_another_name(labelled):
    text = rows(head="path,label,width").replace(".png,a", ".png,a,7").replace(".png,b", ".png,b,7")
    outcome = labelled(text)
    assert set(outcome.table["given_width"]) == {"7"} and set(outcome.table["width"]) == {48}


def test_a_labels_file_may_be_parquet(labelled):
    pytest.importorskip("pyarrow", reason="the extra parquet is not installed: pip install -e '.[parquet]'")
    paths = [f"{number}.png" for number in range(12)]
    table = pd.DataFrame({"path": paths, "label": [10 * (n % 2) for n in range(12)], "group": ["p", None, None] * 4})
    table["weight"] = np.arange(12, dtype=np.float32)
    more = pd.DataFrame({"path": ["gone.png"], "label": [0], "group": ["p"], "weight": [np.nan]})
    buffer = io.BytesIO()
    pd.concat([table, more]).to_parquet(buffer)
    outcome = labelled(buffer.getvalue(), "labels.parquet")
    assert set(outcome.images["label"]) == {"0", "10"} and len(outcome.images) == 12
    assert outcome.reason("gone.png") == "missing"
    assert outcome.table["group"].value_counts()["p"] == 4 and outcome.table["weight"].iloc[1] == "1.0"


def test_a_file_that_is_no_parquet_is_an_error(labelled):
    pytest.importorskip("pyarrow", reason="the extra parquet is not installed: pip install -e '.[parquet]'")
    with pytest.raises(ValueError, match=r"labels: labels\.parquet cannot be read as a table"):
        labelled(b"PAR1 and no more", "labels.parquet")


def test_parquet_without_its_reader_says_what_to_install(labelled, monkeypatch):
    monkeypatch.setattr(pd, "read_parquet", lambda file: (_ for _ in ()).throw(ImportError("pyarrow")))
    with pytest.raises(ValueError, match=r"\.\[parquet\]"):
        labelled(b"PAR1", "labels.parquet")


def test_a_built_in_set_whose_package_is_missing_says_what_to_install(root, monkeypatch):
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install -e '\.\[data\]'"):
        process(Path("elpv"))
