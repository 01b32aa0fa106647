"""From an image file to pixels: the only implementation, used by 02_resize, by prediction and by export.

A file becomes RGB in the same steps everywhere. The header is checked before decoding. JPEGs are decoded at the
smallest scale that covers the requested size. The EXIF orientation is applied, transparent pixels become white, and
deep values (`formats.deep`) and CMYK become 8-bit RGB. The image is fitted to a square: area averaging down, cubic up.

A file that cannot become the right pixels raises `ImageError`; no missing pixel is ever replaced.
"""

import contextlib
import io
import math
import os
import re
import threading
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from helpers.data.formats import deep, jpeg, png
from helpers.data.formats.deep import Levels

Fit = Literal["crop", "pad", "squash"]
Box = tuple[int, int, int, int]  # left, top, right, bottom: pixels of the upright image, right and bottom outside
FITS = ("crop", "pad", "squash")
SMALLEST = 32  # pixels: below this no backbone of the suite takes an image
MAX_PIXELS = 200_000_000  # the largest phone photos have 200 megapixels; a decompression bomb has billions
BEYOND = "values beyond the levels"  # the key of a count that `_from_deep` writes to an image's info
FORMATS = ["JPEG", "PNG", "BMP", "DIB", "GIF", "WEBP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO", "TGA", "PCX"]
SUFFIXES = set(".jpg .jpeg .jpe .jfif .png .apng .bmp .dib .gif .webp .tif .tiff .avif .heic .heif".split())
SUFFIXES |= set(".jp2 .j2k .ppm .pgm .pbm .pnm .ico .tga .pcx".split())
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1", b"heif")


class ImageError(ValueError):
    """A file that cannot become pixels.

    Attributes:
        reason: one of the short words that quarantine.csv uses, e.g. "truncated".
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail

    def __reduce__(self):
        return type(self), (self.reason, self.detail)


def load(
    path: str | os.PathLike,
    image_size: int,
    fit: Fit = "crop",
    *,
    box: Box | None = None,
    levels: Levels | None = None,
    max_pixels: int | None = MAX_PIXELS,
) -> np.ndarray:
    """Read an image file as the model sees it.

    Args:
        path: a file in any of `FORMATS`; an animation gives its first frame.
        image_size: side of the returned square, in pixels.
        fit: "crop" keeps the middle square, "pad" adds black borders, "squash" ignores the proportions.
        box: the part of the image to read; None: all of it.
        levels: black and white of deep images; None: as the file declares, or the depth that holds its largest value.
        max_pixels: refuse a file whose header declares more; None for files that were checked before.

    Returns:
        uint8 RGB array of shape (image_size, image_size, 3), 0-255.

    Raises:
        ImageError: the file cannot be read, is cut off, is not an image, or is too large.
        ValueError: `image_size` or `fit` is not possible.
    """
    return load_noted(path, image_size, fit, box=box, levels=levels, max_pixels=max_pixels)[0]


def load_noted(
    path: str | os.PathLike,
    image_size: int,
    fit: Fit = "crop",
    *,
    box: Box | None = None,
    levels: Levels | None = None,
    max_pixels: int | None = MAX_PIXELS,
) -> tuple[np.ndarray, int]:
    """Return what `load` returns, and how many values were outside `levels` and are cut off."""
    check_size(image_size, fit)
    image = open_image(read_bytes(path), max_pixels=max_pixels)
    if box is None:
        pixels = decode(image, at_least=_inner_size(image.size, image_size, fit), levels=levels)
    else:
        pixels = decode_part(image, box, _inner_size((box[2] - box[0], box[3] - box[1]), image_size, fit), levels)
    return resize(pixels, image_size, fit), image.info.get(BEYOND, 0)


def check_size(image_size: int, fit: str) -> None:
    """Raise ValueError, with the fix, unless images can have this size and fit."""
    if image_size < SMALLEST:
        raise ValueError(f"image_size is {image_size}; give at least {SMALLEST} pixels, such as 224.")
    if fit not in FITS:
        raise ValueError(f"fit is {fit!r}; choose one of {', '.join(FITS)}.")


def read_bytes(path: str | os.PathLike) -> bytes:
    """Return the content of a file; ImageError gives the reason when it cannot be read."""
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        broken = Path(path).is_symlink()
        raise ImageError("broken link" if broken else "missing", "there is no such file") from None
    except OSError as error:
        raise ImageError("unreadable", error.strerror or str(error)) from None
    if not data:
        raise ImageError("empty", "the file has 0 bytes")
    return data


def open_image(data: bytes, *, max_pixels: int | None = MAX_PIXELS) -> Image.Image:
    """Read the header of an image file's content; no pixel is decoded yet.

    Raises:
        ImageError: it is not an image, or its header declares more than `max_pixels`.
    """
    _prepare_readers()
    if data.startswith(png.SIGNATURE):
        data = png.without_long_text(data)
    if data.startswith(b"\xff\xd8") and (kind := jpeg.why_not_read(data)):
        raise ImageError("format", kind)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise ImageError(*_unidentified(data)) from None
    except Exception as error:  # a damaged header can raise any error
        raise ImageError(_reason(error), str(error).strip() or type(error).__name__) from None
    if why := deep.why_not_read(image):
        raise ImageError("format", why)
    if max_pixels and image.width * image.height > max_pixels:
        detail = f"{image.width} x {image.height} pixels are more than max_pixels = {max_pixels:,}"
        raise ImageError("too many pixels", detail)
    image.encoded = data  # Pillow keeps no more than 8 bits of an RGB image
    return image


def decode(
    image: Image.Image, at_least: tuple[int, int] | None = None, mode: str = "RGB", levels: Levels | None = None
) -> np.ndarray:
    """Decode an opened image, upright.

    Args:
        image: as `open_image` returns it.
        at_least: (width, height), as stored, that is enough: JPEGs are decoded at 1/2, 1/4 or 1/8 of their size when
            that covers it.
        mode: "RGB", or "L" for grey, which is faster.
        levels: as for `load`.

    Returns:
        uint8 array of shape (height, width, 3), or (height, width) for "L".

    Raises:
        ImageError: the file is cut off or damaged.
    """
    read_pixels(image, at_least, mode)
    return upright(image, mode, levels)


def decode_part(image: Image.Image, box: Box, at_least: tuple[int, int], levels: Levels | None = None) -> np.ndarray:
    """Decode the part of an opened image within `box`, upright.

    Args:
        image: as `open_image` returns it.
        box: the part.
        at_least: (width, height) of the part that is enough, as for `decode`.
        levels: as for `load`.

    Returns:
        uint8 RGB array of shape (height, width, 3), at full size or at 1/2, 1/4 or 1/8 of it.

    Raises:
        ImageError: the file is cut off or damaged, or the box is outside.
    """
    left, top, right, bottom = box
    scale = max(at_least[0] / (right - left), at_least[1] / (bottom - top))
    stored = max(image.size)
    pixels = decode(image, at_least=tuple(math.ceil(side * scale) for side in image.size), levels=levels)
    reduced = round(stored / max(pixels.shape[:2]))
    part = pixels[top // reduced : -(-bottom // reduced), left // reduced : -(-right // reduced)]
    if not part.size:
        raise ImageError("box outside", f"{box} is not within {pixels.shape[1]} x {pixels.shape[0]} pixels")
    return part


def read_box(text: str) -> Box | None:
    """Return the box that a CSV file holds as "left top right bottom"; None when the text is empty."""
    return tuple(int(side) for side in text.split()) if text else None


def read_pixels(image: Image.Image, at_least: tuple[int, int] | None = None, mode: str = "RGB") -> None:
    """Read the pixels of an opened image, the first half of `decode`; its metadata stay complete."""
    with _damage_as_image_error(image):
        if at_least:
            image.draft(mode if image.mode in ("L", "RGB", "YCbCr") else None, at_least)
        image.load()


def upright(image: Image.Image, mode: str = "RGB", levels: Levels | None = None) -> np.ndarray:
    """Return the pixels of a read image, upright, without transparency, in 8 bits: the second half of `decode`."""
    with _damage_as_image_error(image):
        if deep.is_deep(image, image.encoded):
            plain = _from_deep(image, levels)
        else:
            _turn(image)
            plain = _plain(image)
        if plain.mode in ("LAB", "HSV"):  # Pillow makes no grey of these
            plain = plain.convert("RGB")
        return np.asarray(plain if plain.mode == mode else plain.convert(mode))


def extremes(image: Image.Image) -> tuple[float, float, Levels | None] | None:
    """Return the smallest and largest value of a read deep image and the levels of its file; None for other images.

    Raises:
        ImageError: its values cannot be read.
    """
    if not deep.is_deep(image, image.encoded):
        return None
    with _damage_as_image_error(image):
        values = _colours(_numbers(image))[0]
        return float(values.min()), float(values.max()), deep.declared(image, image.encoded)


def resize(pixels: np.ndarray, image_size: int, fit: Fit = "crop") -> np.ndarray:
    """Fit an image to a square: area averaging where it shrinks, cubic interpolation where it grows.

    Args:
        pixels: uint8 array of shape (height, width, 3).
        image_size: side of the result in pixels.
        fit: as in `load`.

    Returns:
        uint8 array of shape (image_size, image_size, 3).
    """
    height, width = pixels.shape[:2]
    inner = _inner_size((width, height), image_size, fit)
    if fit == "crop":
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        pixels = pixels[top : top + side, left : left + side]
        inner = (image_size, image_size)
    scaled = _scale(pixels, *inner)
    if fit != "pad":
        return scaled
    square = np.zeros((image_size, image_size, 3), np.uint8)
    left, top = (image_size - inner[0]) // 2, (image_size - inner[1]) // 2
    square[top : top + inner[1], left : left + inner[0]] = scaled
    return square


def write(path: Path, pixels: np.ndarray, quality: int = 95) -> None:
    """Write uint8 RGB pixels as PNG or JPEG by the suffix of `path`; the file appears whole or not at all."""
    options = [cv2.IMWRITE_JPEG_QUALITY, quality] if path.suffix == ".jpg" else [cv2.IMWRITE_PNG_COMPRESSION, 1]
    _, data = cv2.imencode(path.suffix, cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), options)
    temporary = path.with_name(f".{os.getpid()}-{threading.get_ident()}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


@contextlib.contextmanager
def _damage_as_image_error(image: Image.Image) -> Iterator[None]:
    """Raise ImageError for any error of a damaged file in Pillow's decoders: they fail with any exception."""
    try:
        yield
    except ImageError:
        raise
    except MemoryError:
        raise ImageError("unreadable", f"{image.width} x {image.height} pixels do not fit into memory") from None
    except Exception as error:
        raise ImageError(_reason(error), str(error).strip() or type(error).__name__) from None


def _turn(image: Image.Image) -> None:
    # Damaged metadata do not give the orientation, and can raise any error; the pixels are valid.
    with contextlib.suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)


def _from_deep(image: Image.Image, levels: Levels | None) -> Image.Image:
    """Return a deep image in 8 bits, upright, without transparency; `info` counts the values outside `levels`."""
    values, alpha = _colours(_numbers(image))
    levels = levels or deep.own(image, image.encoded, values)
    if levels is None:
        detail = "32 bits, fractions or negative values have no known black and white: set explore.bits"
        raise ImageError("format", f"{detail}, such as [0, {values.max():g}], or save it with 8 or 16 bits")
    image.info[BEYOND] = levels.beyond(values)
    pixels = levels.in_8_bits(values)
    if deep.is_inverted(image):
        pixels = 255 - pixels
    if alpha is not None and not _alpha_is_none(image):
        opaque = deep.FULL if alpha.max() > levels.white else levels.white
        share = np.clip(alpha / opaque, 0, 1)[..., None]
        pixels = pixels.reshape(*alpha.shape, -1) * (1 if deep.is_premultiplied(image) else share)
        pixels = np.rint(np.minimum(pixels + 255 * (1 - share), 255)).astype(np.uint8)
    return deep.turned(Image.fromarray(pixels.squeeze(2) if pixels.shape[2:] == (1,) else pixels), image, image.encoded)


def _numbers(image: Image.Image) -> np.ndarray:
    values = deep.read(image, image.encoded)
    if not np.isfinite(values).all():
        raise ImageError(
            "format", "it holds values that are not numbers (NaN or infinite): replace them, for example by 0"
        )
    return values


def _colours(values: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the colour channels and the alpha channel of deep values."""
    if values.ndim == 2 or values.shape[2] == 3:
        return values, None
    return values[..., :-1], values[..., -1]


def _alpha_is_none(image: Image.Image) -> bool:
    """Return whether the file declares that its fourth channel is not alpha, although Pillow reads it as alpha."""
    if image.format == "TGA":
        return not image.encoded[17] & 15
    return image.format == "TIFF" and image.tag_v2.get(deep.EXTRA_SAMPLES, (0,))[0] == 0


def _plain(image: Image.Image) -> Image.Image:
    """Return the image without transparency."""
    if image.mode == "RGBA" and _alpha_is_none(image):
        return image.convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image


def _inner_size(size: tuple[int, int], image_size: int, fit: str) -> tuple[int, int]:
    """Return the (width, height) of the image within the square; for "crop", of the whole image before the cut."""
    if fit == "squash":
        return image_size, image_size
    scale = image_size / (min(size) if fit == "crop" else max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _scale(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    smaller = min(width, pixels.shape[1]), min(height, pixels.shape[0])
    if smaller != (pixels.shape[1], pixels.shape[0]):
        pixels = cv2.resize(pixels, smaller, interpolation=cv2.INTER_AREA)
    if smaller != (width, height):
        pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.ascontiguousarray(pixels)


@cache
def _prepare_readers() -> None:
    """Prepare Pillow and OpenCV to read without messages: `max_pixels` is the limit, and HEIC is added if installed."""
    Image.MAX_IMAGE_PIXELS = None
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # unusual metadata; damage raises
    with contextlib.suppress(ImportError):  # then HEIC files are quarantined, and the reason names the extra
        from pillow_heif import register_heif_opener

        register_heif_opener()
        FORMATS.append("HEIF")
    # An ImageError reports what OpenCV cannot read.
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


def _reason(error: Exception) -> str:
    ended = isinstance(error, EOFError) or re.search("truncated|unexpected end of file", str(error), re.IGNORECASE)
    return "truncated" if ended else "unreadable"


def _unidentified(data: bytes) -> tuple[str, str]:
    is_heic = data[4:8] == b"ftyp" and data[8:12] in HEIC_BRANDS
    if is_heic and "HEIF" not in FORMATS:
        return "format", "HEIC needs an extra: pip install -e '.[heic]'"
    if data.startswith(png.SIGNATURE) and (damage := png.damage(data)):
        return "unreadable", damage
    if data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "format", "a TIFF of this kind is not read: save it with 8 or 16 bits a channel, grey or RGB"
    if is_heic or data.startswith((b"\xff\xd8", b"\x89PNG")):
        return "truncated", "the file ends within its header"
    return "not an image", f"the content begins with {data[:12]!r}"
