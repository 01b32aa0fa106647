"""Pixels of more than 8 bits a channel: their values, and which of them are black and white.

A file of 16 bits may hold the values of a camera with 10 or 12, which would be nearly black if 65,535 were white. White
comes from the file (`declared`), from all images of a set (`levels_of`), or from the user (`from_bits`).
"""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

from helpers.data.formats import png

FULL = 65_535  # of 16 bits
FILE = "levels.json"  # black and white of a set, in a stage's folder
LEAST_BITS = 8
ONE_CHANNEL = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
# Tags of TIFF
BITS, PHOTOMETRIC, ORIENTATION = 258, 262, 274
LOWEST, HIGHEST = (340, 280), (341, 281)  # SMin and MinSampleValue, SMax and MaxSampleValue
EXTRA_SAMPLES, SAMPLE_FORMAT = 338, 339
WHITE_IS_ZERO, ASSOCIATED, UNSIGNED = 0, 1, 1

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Levels:
    """Which values of deep images are black and white: the same for every image of a set.

    Attributes:
        black: this value and those below become 0.
        white: this value and those above become 255.
    """

    black: float
    white: float

    def __post_init__(self) -> None:
        if not self.black < self.white:
            raise ValueError(f"black is {self.black:g} and white {self.white:g}; white must be larger.")

    def in_8_bits(self, values: np.ndarray) -> np.ndarray:
        """Return values of any number type as uint8 of the same shape, rounded."""
        scaled = (values.astype(np.float64) - self.black) * (255 / (self.white - self.black))
        return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)

    def beyond(self, values: np.ndarray) -> int:
        """Return how many of the values are below black or above white."""
        return int(np.count_nonzero((values < self.black) | (values > self.white)))


def from_bits(bits: int | Sequence[float] | None) -> Levels | None:
    """Return the levels that a user sets: bits such as 12, or black and white; None for 0, None or an empty list.

    Raises:
        ValueError: `bits` is neither.
    """
    if not bits:
        return None
    if isinstance(bits, int) and not isinstance(bits, bool):
        if not LEAST_BITS <= bits <= 32:
            raise ValueError(f"bits is {bits}; expected 8 to 32, or black and white, such as [0, 4095].")
        return Levels(0, 2**bits - 1)
    if isinstance(bits, (list, tuple)) and len(bits) == 2:
        return Levels(*bits)
    raise ValueError(f"bits is {bits!r}; expected a number such as 12, or black and white, such as [0, 4095].")


def is_deep(image: Image.Image, data: bytes) -> bool:
    """Return whether an opened image has more than 8 bits a channel that Pillow would not scale by itself."""
    if image.mode in ONE_CHANNEL:
        return True
    if image.mode == "CMYK":  # inks: only their whole range makes sense, and Pillow uses it
        return False
    if image.format == "PNG":
        return png.depth(data) == 16
    if image.format == "TIFF":
        return max(image.tag_v2.get(BITS, (8,))) > 8
    if image.format == "PPM":
        return _largest_of_ppm(data) > 255
    return image.format == "JPEG2000" and _bits_of_jpeg2000(data) == 16


def read(image: Image.Image, data: bytes) -> np.ndarray:
    """Return the values of a deep image that Pillow has read, as stored: (height, width) or (height, width, channels).

    Channels are grey, grey and alpha, RGB, or RGBA; a transparent colour becomes alpha. `turned` makes them upright.

    Raises:
        ValueError: the file cannot be read at its full depth.
    """
    if image.mode in ONE_CHANNEL and image.format != "PPM":
        values = np.asarray(image)
        if image.format == "TIFF" and image.mode == "I" and _sample_format(image) == UNSIGNED:
            values = values.view(np.uint32) if max(image.tag_v2.get(BITS, (1,))) == 32 else values
        return _with_alpha(values[..., None], data) if image.format == "PNG" else values
    data += b"\n" if image.format == "PPM" else b""  # without it, OpenCV drops the last number of a text
    values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION)
    if values is None or values.dtype != np.uint16:
        raise ValueError("its channels of more than 8 bits cannot be read: save it with 8 bits a channel")
    if values.ndim == 2:
        return values
    values = values[..., [2, 1, 0, 3][: values.shape[2]]]
    return _with_alpha(values, data) if image.format == "PNG" else values


def why_not_read(image: Image.Image) -> str:
    """Return why the values of an opened image would be read incorrectly, "" when they are read correctly."""
    if image.format == "TIFF" and max(image.tag_v2.get(BITS, (1,))) <= 8 and _sample_format(image) not in (UNSIGNED, 4):
        return "a TIFF of 8 bits with a sign is not read: save it without a sign, or with 16 bits"
    return ""


def is_premultiplied(image: Image.Image) -> bool:
    """Return whether the colours of this deep image are already multiplied with its alpha."""
    return image.format == "TIFF" and image.tag_v2.get(EXTRA_SAMPLES, (0,))[0] == ASSOCIATED


def is_inverted(image: Image.Image) -> bool:
    """Return whether 0 is white in this deep image."""
    return image.format == "TIFF" and image.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO


def declared(image: Image.Image, data: bytes) -> Levels | None:
    """Return black and white as the file declares them, None when it does not."""
    if image.format == "TIFF":
        tags = image.tag_v2
        low, high = (_first(tags, names) for names in (LOWEST, HIGHEST))
        if high is not None and high > (low or 0):
            return Levels(low or 0, high)
        bits = max(tags.get(BITS, (16,)))
        return Levels(0, 2**bits - 1) if 8 < bits < 16 else None
    if image.format == "PNG" and (significant := png.content(data, b"sBIT")):
        colours = significant[:-1] if len(significant) in (2, 4) else significant
        return Levels(0, 2 ** max(colours) - 1) if LEAST_BITS <= max(colours) < 16 else None
    if image.format == "PPM":
        return Levels(0, _largest_of_ppm(data)) if _largest_of_ppm(data) < FULL else None
    return None


def own(image: Image.Image, data: bytes, values: np.ndarray) -> Levels | None:
    """Return black and white for a single image: as it declares them if its values fit, else the depth that holds them.

    Return None where black and white are unknown: 32 bits, fractions or negative numbers.
    """
    declared_levels = declared(image, data)
    if declared_levels and declared_levels.black <= values.min() and values.max() <= declared_levels.white:
        return declared_levels
    wide = image.mode == "F" or (image.format == "TIFF" and max(image.tag_v2.get(BITS, (16,))) > 16)
    return None if wide or values.min() < 0 or values.max() > FULL else full(values.max())


def levels_of(
    lowest: Sequence[float], highest: Sequence[float], declared_levels: Sequence[Levels | None]
) -> tuple[Levels, str]:
    """Return black and white for a set of deep images, and where they come from, in words.

    Args:
        lowest, highest: the smallest and the largest value of each image.
        declared_levels: what each file declares.
    """
    fits = [one for one, low, high in zip(declared_levels, lowest, highest, strict=True)
            if one and one.black <= low and high <= one.white]  # fmt: skip
    if len(fits) == len(declared_levels):
        levels = Levels(min(one.black for one in fits), max(one.white for one in fits))
        several = "; they differ, so the widest range is used" if len(set(fits)) > 1 else ""
        return levels, f"the files say so{several}"
    largest = max([*highest, *(one.white for one in fits)])
    return full(largest), f"the largest value is {largest:g}"


def full(largest: float) -> Levels:
    """Return the levels of the smallest depth, at least 8 bits, that holds a value."""
    return Levels(0, 2 ** max(LEAST_BITS, math.ceil(largest).bit_length()) - 1)


def turned(plain: Image.Image, image: Image.Image, data: bytes) -> Image.Image:
    """Return `plain`, made from what `read` returned, upright by the EXIF orientation of `image`."""
    turn = TURNS.get(_orientation(image, data))
    return plain.transpose(turn) if turn is not None else plain


def _orientation(image: Image.Image, data: bytes) -> int:
    """Return the EXIF orientation of an image whose pixels are still as stored; Pillow itself turns those of a TIFF."""
    try:
        if image.format == "TIFF":
            one_channel = image.mode in ONE_CHANNEL
            return 1 if one_channel else Image.open(io.BytesIO(data)).tag_v2.get(ORIENTATION, 1)
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged metadata do not give the orientation
        return 1


def _with_alpha(values: np.ndarray, data: bytes) -> np.ndarray:
    """Return the values with an alpha channel where the PNG names a transparent colour."""
    colour = png.content(data, b"tRNS")
    if colour is None or len(colour) != 2 * values.shape[2]:
        return values[..., 0] if values.shape[2] == 1 else values
    transparent = (values == np.frombuffer(colour, ">u2")).all(axis=2)
    return np.dstack([values, np.where(transparent, 0, FULL).astype(values.dtype)])


def _sample_format(image: Image.Image) -> int:
    return image.tag_v2.get(SAMPLE_FORMAT, (UNSIGNED,))[0]


def _first(tags, names: Sequence[int]) -> float | None:
    for name in names:
        value = tags.get(name)
        if value is not None:
            value = max(value) if isinstance(value, tuple) and name in HIGHEST else value
            return float(min(value) if isinstance(value, tuple) else value)
    return None


def _largest_of_ppm(data: bytes) -> int:
    """Return the value that the header of a PGM or PPM declares as white; 255 without one."""
    header = re.sub(rb"#[^\n\r]*", b"", data[:4096])
    match = re.match(rb"P[2356]\s+\d+\s+\d+\s+(\d+)\s", header)
    return int(match[1]) if match else 255


def _bits_of_jpeg2000(data: bytes) -> int:
    """Return the bits of the first component; 0 where the codestream has no SIZ."""
    at = data.find(b"\xff\x4f\xff\x51")
    return (data[at + 42] & 0x7F) + 1 if at >= 0 and len(data) > at + 42 else 0
