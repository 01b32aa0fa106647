"""Pixels from files: orientation, colour, size and shape come out right, whatever the format."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from helpers.core import parallel
from helpers.data import images

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


@pytest.fixture
def corners():
    """An upright 64 x 96 image whose four quarters differ: red, green / blue, white."""
    pixels = np.zeros((64, 96, 3), np.uint8)
    pixels[:32, :48], pixels[:32, 48:], pixels[32:, :48], pixels[32:, 48:] = RED, GREEN, BLUE, WHITE
    return Image.fromarray(pixels)


def as_stored(upright, orientation):
    """Return the image as a camera stores it that writes this orientation beside it."""
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's transpositions
    return upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright


def quarters(pixels):
    """Return the colours in the middle of the four quarters, in the order of `corners`."""
    high, low, left, right = (int(share * len(pixels)) for share in (0.3, 0.7, 0.3, 0.7))
    return [tuple(int(v) for v in pixels[y, x]) for y, x in ((high, left), (high, right), (low, left), (low, right))]


def close(found, wanted, tolerance=12):
    return np.abs(np.array(found, int) - np.array(wanted, int)).max() <= tolerance


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_ends_upright(tmp_path, corners, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    as_stored(corners, orientation).save(tmp_path / "a.jpg", exif=exif, quality=95, subsampling=0)
    assert close(quarters(images.load(tmp_path / "a.jpg", 64, "squash")), [RED, GREEN, BLUE, WHITE])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_of_heic_ends_upright(tmp_path, corners, orientation):
    pytest.importorskip("pillow_heif", reason="the extra heic is not installed: pip install -e '.[heic]'")
    exif = Image.Exif()
    exif[0x0112] = orientation
    as_stored(corners, orientation).save(tmp_path / "a.heic", exif=exif.tobytes(), quality=95)
    assert close(quarters(images.load(tmp_path / "a.heic", 64, "squash")), [RED, GREEN, BLUE, WHITE])


@pytest.mark.parametrize("fit", images.FITS)
@pytest.mark.parametrize("size", [(40, 300), (300, 40), (33, 35), (1000, 1003), (32, 32)])
def test_the_result_is_square_uint8_rgb(tmp_path, fit, size):
    Image.new("RGB", size, (10, 200, 30)).save(tmp_path / "a.png")
    pixels = images.load(tmp_path / "a.png", 48, fit)
    assert pixels.shape == (48, 48, 3) and pixels.dtype == np.uint8 and pixels.flags["C_CONTIGUOUS"]
    assert tuple(pixels[24, 24]) == (10, 200, 30)


def test_crop_keeps_the_middle_and_the_proportions():
    pixels = np.zeros((60, 180, 3), np.uint8)
    pixels[:, 60:120] = 255
    assert images.resize(pixels, 60, "crop").min() == 255


def test_pad_keeps_everything_between_black_borders():
    padded = images.resize(np.full((50, 200, 3), 255, np.uint8), 100, "pad")
    rows = padded.min(axis=(1, 2)) == 255
    assert rows.sum() == 25 and rows[38:62].all() and not rows[0] and not rows[-1]


def test_squash_keeps_everything_without_borders():
    assert images.resize(np.full((50, 200, 3), 255, np.uint8), 100, "squash").min() == 255


def test_shrinking_averages_and_does_not_alias():
    board = np.indices((400, 400)).sum(axis=0) % 2 * 255
    grey = images.resize(np.repeat(board[..., None], 3, axis=2).astype(np.uint8), 100)
    assert np.abs(grey.astype(int) - 127.5).max() < 2


def test_one_side_shrinks_while_the_other_grows():
    pixels = np.tile(np.arange(200, dtype=np.uint8)[None, :, None], (40, 1, 3))
    resized = images.resize(pixels, 100, "squash")
    assert resized.shape == (100, 100, 3) and close(resized[50, :, 0], np.arange(100) * 2 + 0.5, 2)


@pytest.mark.parametrize("fit", images.FITS)
@pytest.mark.parametrize("size", [(1801, 1203), (600, 2400), (333, 777)])
def test_reduced_decoding_gives_the_same_picture(tmp_path, fit, size):
    waves = np.sin(np.linspace(0, 12, size[0]))[None, :, None] * np.cos(np.linspace(0, 9, size[1]))[:, None, None]
    Image.fromarray((127 + 100 * np.repeat(waves, 3, axis=2)).astype(np.uint8)).save(tmp_path / "a.jpg", quality=95)
    full = images.resize(np.asarray(Image.open(tmp_path / "a.jpg")), 96, fit)
    quick = images.load(tmp_path / "a.jpg", 96, fit)
    assert np.abs(full.astype(int) - quick).mean() < 1.5


def test_large_jpegs_are_decoded_small(tmp_path):
    Image.new("RGB", (4000, 3000)).save(tmp_path / "a.jpg")
    image = images.open_image((tmp_path / "a.jpg").read_bytes())
    assert images.decode(image, at_least=(299, 224)).shape == (375, 500, 3)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_transparency_is_laid_over_white(tmp_path, mode):
    image = Image.new("RGBA", (64, 64), (200, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 64, 32))
    path = tmp_path / "a.png"
    if mode == "P":
        image = image.convert("P", palette=Image.Palette.ADAPTIVE)
        image.info["transparency"] = int(np.asarray(image)[0, 0])
        image.save(path, transparency=image.info["transparency"])
    else:
        image.convert(mode).save(
            path if mode != "PA" else path.with_suffix(".tif"), format="PNG" if mode != "PA" else "TIFF"
        )
        path = path if mode != "PA" else path.with_suffix(".tif")
    pixels = images.load(path, 64)
    assert tuple(pixels[5, 32]) == WHITE and tuple(pixels[60, 32]) != WHITE


def test_cmyk_becomes_rgb(tmp_path):
    Image.new("CMYK", (64, 64), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    assert close(images.load(tmp_path / "a.jpg", 64)[32, 32], RED)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits_become_eight(tmp_path, suffix):
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1))
    cv2.imwrite(str(tmp_path / f"a{suffix}"), ramp)
    assert close(images.load(tmp_path / f"a{suffix}", 64)[10, :, 1], np.linspace(0, 255, 64), 1)


def test_sixteen_bit_colour_becomes_eight(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), np.full((64, 64, 3), (1000, 30000, 65535), np.uint16))
    assert close(images.load(tmp_path / "a.png", 64)[3, 3], (255, 117, 4), 1)


def test_the_first_frame_of_an_animation_counts(tmp_path):
    first, second = Image.new("RGB", (64, 64), RED), Image.new("RGB", (64, 64), BLUE)
    for name in ("a.gif", "a.webp", "a.png"):
        first.save(tmp_path / name, save_all=True, append_images=[second], duration=100)
        assert close(images.load(tmp_path / name, 64)[32, 32], RED)


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_what_is_written_is_read_back(tmp_path, name):
    smooth = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8), (0, 0), 4)
    images.write(tmp_path / name, smooth, quality=98)
    found = images.load(tmp_path / name, 64)
    assert np.array_equal(found, smooth) if name == "a.png" else close(found, smooth, 8)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(("size", "fit", "said"), [(31, "crop", "at least 32"), (224, "stretch", "crop, pad, squash")])
def test_impossible_sizes_and_fits_are_refused(size, fit, said):
    with pytest.raises(ValueError, match=said):
        images.check_size(size, fit)


def test_many_items_come_in_order_whatever_the_workers():
    for workers in (0, 1, 3):
        assert list(parallel.for_each(lambda n: n * n, range(50), workers=workers)) == [n * n for n in range(50)]


def test_an_image_error_survives_another_process():
    import pickle

    error = pickle.loads(pickle.dumps(images.ImageError("truncated", "3 bytes")))
    assert (error.reason, error.detail, str(error)) == ("truncated", "3 bytes", "truncated: 3 bytes")


def test_a_header_that_promises_too_much_is_refused_before_decoding():
    buffer = io.BytesIO()
    Image.new("1", (3000, 3000)).save(buffer, "PNG")
    with pytest.raises(images.ImageError, match="too many pixels"):
        images.open_image(buffer.getvalue(), max_pixels=1_000_000)
