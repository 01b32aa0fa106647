"""Deep pixels, transparency, odd colours and odd headers: the right pixels or a true reason, the same everywhere."""

import io
import random
import struct
import subprocess
import sys
import zlib

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageCms, ImageOps

from helpers.core import disk, notebooks, project
from helpers.data import images, inventory
from helpers.data.formats import deep
from helpers.evaluation import prediction

RAMP = np.tile(np.arange(224, dtype=np.uint16), (224, 1))  # 224 grey levels


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(values: np.ndarray, colour: int, depth: int, *extra: tuple[bytes, bytes]) -> bytes:
    """A PNG of any kind, as no library writes all of them; `extra` chunks stand before the pixels."""
    height, width = values.shape[:2]
    rows = values.astype(">u2" if depth == 16 else np.uint8)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunk(*one) for one in extra) + pixels + chunk(b"IEND", b"")


def tiff(image: np.ndarray | Image.Image, **tags) -> bytes:
    buffer = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(buffer, "TIFF", tiffinfo={int(name.removeprefix("t")): value for name, value in tags.items()})
    return buffer.getvalue()


def raw_tiff(values: np.ndarray, photometric: int = 1, **tags: int) -> bytes:
    """A TIFF of any number type and number of channels, as no library writes all of them."""
    values = values[..., None] if values.ndim == 2 else values
    height, width, channels = values.shape
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    fields = {256: [width], 257: [height], 258: [values.dtype.itemsize * 8] * channels, 259: [1], 262: [photometric]}
    fields |= {273: [0], 277: [channels], 278: [height], 279: [values.nbytes], 339: [kind] * channels}
    fields |= {int(name.removeprefix("t")): [value] for name, value in tags.items()}
    behind = 8 + 2 + 12 * len(fields) + 4
    lists = b"".join(struct.pack(f"<{len(v)}H", *v) for v in fields.values() if len(v) > 2)
    fields[273] = [behind + len(lists)]
    entries, at = b"", behind
    for tag, value in sorted(fields.items()):
        short = max(value) < 65536 and tag not in (273, 279)
        if len(value) > 2:
            content, at = struct.pack("<I", at), at + 2 * len(value)
        else:
            content = struct.pack(f"<{len(value)}{'H' if short else 'I'}", *value).ljust(4, b"\0")
        entries += struct.pack("<HHI", tag, 3 if short else 4, len(value)) + content
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(fields)) + entries + b"\0\0\0\0" + lists + values.tobytes()


def netpbm(values: np.ndarray, white: int) -> bytes:
    kind = b"P5" if values.ndim == 2 else b"P6"
    return kind + b" %d %d %d\n" % (values.shape[1], values.shape[0], white) + values.astype(">u2").tobytes()


def decode(data: bytes, mode: str = "RGB", levels: deep.Levels | None = None) -> np.ndarray:
    image = images.open_image(data)
    return images.decode(image, mode=mode, levels=levels)


def reason(data: bytes) -> str:
    with pytest.raises(images.ImageError) as caught:
        decode(data)
    return str(caught.value)


# Deep images

WRITERS = {
    "png": lambda values: png(values, 0, 16),
    "png of colours": lambda values: png(np.dstack([values] * 3), 2, 16),
    "png with alpha": lambda values: png(np.dstack([values] * 3 + [np.full_like(values, 65535)]), 6, 16),
    "tif": tiff,
    "tif of colours": lambda values: cv2.imencode(".tif", np.dstack([values] * 3))[1].tobytes(),
    "pgm": lambda values: netpbm(values, 65535),
    "ppm": lambda values: netpbm(np.dstack([values] * 3), 65535),
    "jp2": lambda values: cv2.imencode(".jp2", values, [cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000])[1].tobytes(),
}


@pytest.fixture
def take(tmp_path):
    """A function that writes files, given by name, into two classes, and takes them in as 00_explore does."""
    from helpers.data import sources

    def take(files: dict[str, bytes], bits=0):
        folder = tmp_path / "photos"
        for number, (name, data) in enumerate(files.items()):
            (folder / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
            (folder / "ab"[number % 2] / name).write_bytes(data)
        defaults = {name: p.default for name, p in notebooks.find_stage("explore").settings.items()}
        data = sources.read(defaults | {"source": str(folder)})
        table, quarantine = inventory.take(data, bits=bits, workers=1)
        return table, quarantine, *inventory.levels(table, bits)

    return take


@pytest.mark.parametrize("bits", [10, 12])
@pytest.mark.parametrize("kind", WRITERS)
def test_the_grey_levels_of_a_camera_are_kept(kind, bits, take):
    step = 2**bits // 256
    files = {"full.x.png": WRITERS[kind](RAMP * step), "dark.x.png": WRITERS[kind](RAMP // 4 * step)}
    _, quarantine, levels, sentence = take(files)
    assert quarantine.empty and levels == deep.Levels(0, 2**bits - 1), sentence
    full, dark = (decode(data, levels=levels) for data in files.values())
    assert len(np.unique(full)) >= 223 and len(np.unique(dark)) == 56  # rounding may join two
    expected = np.rint(RAMP * step * (255 / levels.white)).astype(np.uint8)
    assert np.abs(full[..., 0].astype(int) - expected).max() <= 1
    assert np.abs(dark.max() * 4.0 - full.max()) <= 8, "a dark image stays darker than a bright one"
    assert f"{2**bits - 1:g} white" in sentence and "2 images of more than 8 bits" in sentence


def test_what_the_files_declare_comes_before_the_largest_value(take):
    dark = RAMP // 2
    said = {"a.png": png(dark, 0, 16, (b"sBIT", b"\x0c")), "b.png": png(dark + 1, 0, 16, (b"sBIT", b"\x0c"))}
    assert take(said)[2] == deep.Levels(0, 4095)


@pytest.mark.parametrize(
    ("data", "levels"),
    [
        (tiff(RAMP, t281=1000), (0, 1000)),
        (tiff(RAMP + 100, t280=100, t281=2000), (100, 2000)),
        (tiff(RAMP.astype(np.float32) / 224, t340=0.0, t341=1.0), (0, 1)),
        (netpbm(RAMP, 1000), (0, 1000)),
        (png(RAMP * 200, 0, 16, (b"sBIT", b"\x0c")), (0, 65535)),  # scaled to 16 bits, as the standard has it
    ],
    ids=["highest", "lowest and highest", "fractions", "pgm", "scaled"],
)
def test_ranges_that_single_files_declare(data, levels, take):
    assert take({"a.tif": data, "b.tif": data[:-1] + b"\0" if data.startswith(b"P5") else data + b"\0"})[
        2
    ] == deep.Levels(*levels)
    pixels = decode(data)
    assert pixels.min() < 30 and len(np.unique(pixels)) > 25


def test_a_range_is_given_by_hand_and_what_is_beyond_is_told(take):
    files = {"a.png": png(RAMP * 16, 0, 16), "b.png": png(RAMP * 17, 0, 16)}
    _, _, levels, sentence = take(files, bits=[0, 3000])
    assert levels == deep.Levels(0, 3000) and "set by bits" in sentence
    assert "2 of them have values outside, which are cut off" in sentence
    with pytest.raises(ValueError, match="white must be larger"):
        take(files, bits=[5, 5])
    with pytest.raises(ValueError, match="expected 8 to 32"):
        deep.from_bits(3)


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_thirty_two_bits_need_black_and_white(kind, take):
    files = {"a.tif": tiff((RAMP * 16).astype(kind)), "b.png": png(RAMP, 0, 8), "c.png": png(RAMP + 1, 0, 8)}
    _, quarantine, levels, _ = take(files | {"d.png": png(RAMP + 2, 0, 8)})
    assert list(quarantine["reason"]) == ["format"] and "set explore.bits" in quarantine["detail"][0]
    assert levels is None
    _, quarantine, levels, _ = take(files, bits=12)
    assert quarantine.empty and levels == deep.Levels(0, 4095)
    assert len(np.unique(decode(files["a.tif"], levels=levels))) >= 223


def test_one_range_goes_from_00_to_the_model_and_beyond_it_is_told(tmp_path, by_hand, runs_folder):
    rng = np.random.default_rng(0)
    for name in "ab":
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(8):
            noise = cv2.resize(rng.integers(0, 4096, (8, 8)).astype(np.float32), (64, 64))
            cv2.imwrite(str(tmp_path / "photos" / name / f"{number}.png"), noise.astype(np.uint16))
    at = {name: str(runs_folder / "x" / name) for name in ("explore", "split", "resize")}
    by_hand("explore", source=str(tmp_path / "photos"), out=at["explore"], near_duplicates=-1)
    by_hand("split", explore=at["explore"], out=at["split"])
    by_hand("resize", split=at["split"], image_size=64, out=at["resize"])
    assert disk.read_json(f"{at['resize']}/resize.json")["levels"] == [0, 4095]
    for row in disk.read_table(f"{at['resize']}/images.csv").head(4).itertuples():
        raw = cv2.imread(str(tmp_path / "photos" / row.path), cv2.IMREAD_UNCHANGED)
        small = cv2.imread(f"{at['resize']}/{row.file}")[..., 0]
        assert np.abs(raw * (255 / 4095) - small).max() <= 1
    import keras

    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((64, 64, 3)), keras.layers.GlobalMaxPooling2D(), keras.layers.Dense(2)])
    run = runs_folder / "x" / "evaluate"
    run.mkdir()
    model.save(run / "model.keras")
    disk.write_json(run / "class_names.json", ["a", "b"])
    disk.write_json(run / "model.json", disk.read_json(f"{at['resize']}/resize.json"))
    inside, beyond = tmp_path / "photos/a/0.png", tmp_path / "beyond.png"
    assert "caution" not in prediction.predict("x", [inside])[0].attrs
    cv2.imwrite(str(beyond), np.full((64, 64), 5000, np.uint16))
    table, _ = prediction.predict("x", [inside, beyond])
    assert table.attrs["caution"].startswith("1 of 2 images have values beyond 0 to 4095")


KINDS = ["u1", "i1", "u2", "i2", "u4", "i4", "f2", "f4", "f8"]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_every_type_are_read_at_their_worth_or_refused(kind, channels):
    """With black and white given, 0 to 223 of whatever type is 0 to 223 of 255; nothing wraps, nothing turns black."""
    values = RAMP.astype(kind) if kind not in ("i1",) else (RAMP // 2).astype(kind)
    data = raw_tiff(np.dstack([values] * channels), photometric=1 if channels == 1 else 2)
    levels = deep.Levels(0, 255)
    readable = {("u1", 1), ("u1", 3), ("u2", 1), ("u2", 3), ("i2", 1), ("u4", 1), ("i4", 1), ("f4", 1)}
    if (kind, channels) in readable:
        assert (decode(data, levels=levels)[..., 0] == RAMP).all()
    else:
        with pytest.raises(images.ImageError, match=r"format|cannot be read"):
            decode(data, levels=levels)


def test_large_and_negative_numbers_keep_their_place():
    large = raw_tiff(RAMP.astype("u4") * 2**24)
    assert (decode(large, levels=deep.Levels(0, 255 * 2**24))[..., 0] == RAMP).all()
    signed = raw_tiff(RAMP.astype("i2") - 100)
    assert (decode(signed, levels=deep.Levels(-100, 155))[..., 0] == RAMP).all()
    assert reason(signed).startswith("format: 32 bits, fractions or negative values")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_is_no_black(value, take):
    values = RAMP.astype("f4")
    values[3, 3] = value
    _, quarantine, levels, _ = take({"a.tif": raw_tiff(values), "b.tif": tiff(RAMP), "c.tif": tiff(RAMP + 1)}, bits=8)
    assert list(quarantine["reason"]) == ["format"] and "not numbers" in quarantine["detail"][0]
    assert levels == deep.Levels(0, 255)


def test_premultiplied_colours_are_not_multiplied_again():
    share = np.tile(np.array([0.0, 0.5, 1.0])[:, None], (20, 60))
    colours = np.dstack([np.full_like(share, 200 * 257) * share] * 3 + [share * 65535])
    pixels = decode(raw_tiff(colours.astype("u2"), 2, t338=1))
    expected = np.rint(200 * share + 255 * (1 - share))
    assert np.abs(pixels[..., 0] - expected).max() <= 1
    plain = np.dstack([np.full_like(share, 200 * 257)] * 3 + [share * 65535])
    assert np.abs(decode(raw_tiff(plain.astype("u2"), 2, t338=2))[..., 0] - expected).max() <= 1


def test_inks_of_16_bits_are_read_by_their_whole_range():
    inks = np.dstack([RAMP * 257, RAMP * 0, RAMP * 0, RAMP * 0]).astype("u2")
    pixels = decode(raw_tiff(inks, 5))
    assert np.abs(pixels[..., 0].astype(int) - (255 - RAMP)).max() <= 1 and (pixels[..., 1] == 255).all()


def test_a_text_file_of_numbers_needs_no_last_line_end():
    text = b"P2 40 20 4095\n" + b" ".join(b"%d" % (16 * (i % 40)) for i in range(800))
    assert (decode(text) == decode(text + b"\n")).all() and decode(text)[0, 30, 0] == round(480 * 255 / 4095)


def test_a_tiff_that_cannot_be_opened_is_called_one():
    assert reason(raw_tiff(RAMP.astype("f8"))).startswith("format: a TIFF of this kind is not read")
    assert reason(b"II+\0" + bytes(60)).startswith("format: a TIFF of this kind is not read")


def test_libraries_say_nothing_of_damaged_files(capfd):
    for data in (raw_tiff(RAMP)[:-5000], netpbm(RAMP, 4095)[:-300], raw_tiff(np.dstack([RAMP] * 3), 2)[:400]):
        with pytest.raises(images.ImageError):
            decode(data)
    assert capfd.readouterr().err == ""


# Transparency, inverted values, odd colours


@pytest.mark.parametrize("colour", [0, 2])
def test_a_transparent_colour_of_16_bits_becomes_white(colour):
    values = RAMP * 256
    name = struct.pack(">H", 512) * (1 if colour == 0 else 3)
    pixels = decode(png(values if colour == 0 else np.dstack([values] * 3), colour, 16, (b"tRNS", name)))
    assert (pixels[:, 2] == 255).all() and (pixels[:, 1] == 1).all() and (pixels[:, 100] == 100).all()


@pytest.mark.parametrize("colour", [4, 6])
def test_alpha_of_16_bits_is_mixed_with_white(colour):
    alpha = np.where(RAMP < 100, 0, 65535)
    grey = [RAMP * 256] * (1 if colour == 4 else 3)
    pixels = decode(png(np.dstack([*grey, alpha]), colour, 16))
    assert (pixels[:, :100] == 255).all() and (pixels[:, 100] == 100).all()


def test_white_is_zero_at_16_bits():
    values = (RAMP * 16).astype(np.uint16)
    pixels = decode(tiff(values, t262=0), levels=deep.Levels(0, 4095))
    assert (pixels == 255 - decode(tiff(values), levels=deep.Levels(0, 4095))).all() and pixels[0, 0, 0] == 255


def test_lab_is_read_the_same_way_in_00_and_02(take):
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    made = [
        ImageCms.profileToProfile(Image.new("RGB", (64, 48), c), *profiles, outputMode="LAB") for c in ("red", "lime")
    ]
    table, quarantine, *_ = take({"a.tif": tiff(made[0]), "b.tif": tiff(made[1])})
    assert quarantine.empty and list(table["mode"]) == ["LAB", "LAB"]
    assert np.abs(decode(tiff(made[0]))[0, 0].astype(int) - (255, 0, 0)).max() < 8


def fully_transparent(kind: str, **settings) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGBA", (64, 48), (200, 50, 30, 0)).save(buffer, kind, **settings)
    return buffer.getvalue()


def test_alpha_that_a_file_declares_unused_hides_nothing():
    tga, tif = bytearray(fully_transparent("TGA")), fully_transparent("TIFF")
    assert (decode(bytes(tga)) == 255).all() and (decode(tif) == 255).all()
    tga[17] &= 0xF0
    assert (decode(bytes(tga)) == (200, 50, 30)).all()
    unspecified = tif.replace(struct.pack("<HHIHH", 338, 3, 1, 2, 0), struct.pack("<HHIHH", 338, 3, 1, 0, 0))
    assert unspecified != tif and (decode(unspecified) == (200, 50, 30)).all()
    assert (decode(fully_transparent("BMP")) == (200, 50, 30)).all()


def test_an_image_of_one_flat_colour_is_noted(take):
    files = {"a.png": fully_transparent("PNG"), "b.png": png(RAMP, 0, 8), "c.png": png(RAMP // 2, 0, 8)}
    table, *_ = take(files)
    notes = table.set_index("path")["note"]
    assert notes["a/a.png"] == "one flat colour, 255 of 255" and (notes.drop("a/a.png") == "").all()


# Sound files, and true reasons

LONG = b"x" * 2_000_000
TEXTS = {
    "xmp": (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(LONG)),
    "xmp, not packed": (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + LONG),
    "icc": (b"iCCP", b"icc\0\0" + zlib.compress(LONG)),
    "comment": (b"zTXt", b"Comment\0\0" + zlib.compress(LONG)),
    "damaged": (b"zTXt", b"Comment\0\0" + zlib.compress(LONG)[:-9] + b"damaged!!"),
}


@pytest.mark.parametrize("text", TEXTS)
def test_long_text_does_not_hide_sound_pixels(text):
    values = np.dstack([RAMP] * 3)
    before = png(values, 2, 8, TEXTS[text])
    after = png(values, 2, 8)[:-12] + chunk(*TEXTS[text]) + chunk(b"IEND", b"")
    assert (decode(before) == values).all() and (decode(after) == values).all()


def test_a_jpeg_or_png_that_is_not_read_has_a_true_reason():
    jpeg = bytearray(cv2.imencode(".jpg", RAMP.astype(np.uint8))[1].tobytes())
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 4] = 12
    assert reason(bytes(jpeg)).startswith("format: a JPEG of 12 bits a channel is not read")
    jpeg[at + 4], jpeg[at + 1] = 8, 0xC3
    assert reason(bytes(jpeg)).startswith("format: a lossless")
    damaged = bytearray(png(RAMP, 0, 8))
    damaged[29] ^= 1
    assert reason(bytes(damaged)).startswith("unreadable: the checksum of its header is wrong")
    assert reason(png(RAMP, 0, 8)[:20]).startswith("truncated")
    assert reason(bytes(jpeg[:30])).startswith("truncated")


def test_importing_changes_nothing_of_pillow():
    code = (
        "import warnings; from PIL import Image; before = Image.MAX_IMAGE_PIXELS, list(warnings.filters)\n"
        "from helpers.data import images; after = Image.MAX_IMAGE_PIXELS, list(warnings.filters)\n"
        "assert before[0] == after[0] and not [f for f in after[1] if f not in before[1] and 'PIL' in str(f)]"
    )
    subprocess.run([sys.executable, "-c", code], cwd=project.ROOT, check=True, capture_output=True)


# Any file: decoded as another reader decodes it, or set aside with a reason

CASES = 300
DAMAGE = ("none", "none", "none", "cut", "flipped")


def any_file(seed: int) -> tuple[bytes, np.ndarray | None, str]:
    """A small file, the RGB that it should become (None where that is not known), and what it is."""
    rng, pick = np.random.default_rng(seed), random.Random(seed)
    size = (pick.randint(33, 60), pick.randint(33, 60))
    base = cv2.resize(rng.integers(0, 256, (5, 5, 3)).astype(np.uint8), size[::-1], interpolation=cv2.INTER_LINEAR)
    kind = pick.choice(["PNG", "TIFF", "BMP", "JPEG", "WEBP", "GIF", "TGA", "PPM", "JPEG2000", "AVIF"])
    modes = {"PNG": ["L", "LA", "P", "RGB", "RGBA", "1", "I;16"], "TIFF": ["L", "RGB", "RGBA", "CMYK", "1", "I;16"]}
    modes |= {"BMP": ["L", "RGB", "P"], "JPEG": ["L", "RGB", "CMYK"], "GIF": ["P"], "TGA": ["L", "RGB", "RGBA"]}
    mode = pick.choice(modes.get(kind, ["RGB"]))
    if mode == "I;16":
        grey = np.array(Image.fromarray(base).convert("L"))
        grey.flat[0] = 255  # so that its largest value needs all 16 bits
        image = Image.fromarray(grey.astype(np.uint16) * 257)
        expected = np.dstack([grey] * 3)
    else:
        image = Image.fromarray(base).convert(mode)
        if mode in ("LA", "RGBA"):
            image.putalpha(Image.fromarray(np.where(rng.random(size) < 0.5, 0, 255).astype(np.uint8)))
        expected = None
    orientation = pick.choice([1, 1, 3, 6, 8]) if kind in ("JPEG", "PNG", "WEBP") else 1
    exif = Image.Exif()
    exif[274] = orientation
    buffer = io.BytesIO()
    settings = {"exif": exif} if orientation > 1 else {}
    settings |= {"lossless": True} if kind == "WEBP" else {}
    image.save(buffer, kind, **settings)
    data, damage = buffer.getvalue(), pick.choice(DAMAGE)
    if damage == "none":
        stored = Image.open(io.BytesIO(data))
        if expected is None:
            shown = ImageOps.exif_transpose(stored)
            alpha = shown.mode in ("LA", "RGBA") or "transparency" in shown.info
            shown = shown.convert("RGBA") if alpha else shown
            white = Image.new("RGBA", shown.size, "white")
            expected = np.asarray((Image.alpha_composite(white, shown) if alpha else shown).convert("RGB"))
        elif orientation > 1:
            expected = np.rot90(expected, {3: 2, 6: 3, 8: 1}[orientation])
    elif damage == "cut":
        data, expected = data[: len(data) * pick.randint(2, 9) // 10], None
    else:
        at = pick.randrange(len(data))
        data, expected = data[:at] + bytes([data[at] ^ (1 << pick.randrange(8))]) + data[at + 1 :], None
    return data, expected, f"{kind} {mode} orientation {orientation} {damage} seed {seed}"


def test_any_file_is_read_as_another_reader_reads_it_or_is_set_aside_with_a_reason(tmp_path):
    limits = {"min_size": 16, "max_aspect": 20.0, "max_pixels": images.MAX_PIXELS}
    read = 0
    for seed in range(CASES):
        data, expected, what = any_file(seed)
        path = tmp_path / f"{seed}.img"
        path.write_bytes(data)
        facts = inventory.examine(path, **limits)
        try:
            pixels = images.decode(images.open_image(data))
            images.load(path, 32)
        except images.ImageError as error:
            assert error.reason in ("truncated", "unreadable", "not an image", "format", "too many pixels"), what
            assert expected is None and facts.get("reason") == error.reason and error.detail, (what, error)
            continue
        assert "reason" not in facts, (what, facts)
        if expected is not None:
            read += 1
            assert pixels.shape == expected.shape and np.abs(pixels.astype(int) - expected).max() <= 2, what
    assert read > CASES / 3


def test_levels_are_none_for_ordinary_images():
    table = pd.DataFrame({"path": ["a"], "label": ["x"]})
    assert inventory.levels(table) == (None, "no image has more than 8 bits a channel")
