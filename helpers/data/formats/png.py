"""The chunks of a PNG file: what its header declares, and text that is too long for a reader to unpack."""

import struct
import zlib
from collections.abc import Iterator

SIGNATURE = b"\x89PNG\r\n\x1a\n"
TEXT = (b"iCCP", b"iTXt", b"zTXt", b"tEXt")  # colour profiles and text; no pixel depends on them here
MOST_TEXT = 500_000  # bytes of one chunk, unpacked; Pillow treats 1,048,576 as an attack


def chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield kind, start of the content and length of each chunk of a PNG; stop where the file is cut off."""
    at = len(SIGNATURE)
    while at + 8 <= len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        yield kind, at + 8, length
        at += length + 12


def content(data: bytes, chunk_kind: bytes) -> bytes | None:
    """Return the content of the first chunk of a kind; None without one."""
    return next((data[start : start + length] for kind, start, length in chunks(data) if kind == chunk_kind), None)


def depth(data: bytes) -> int:
    """Return the bits per channel that the header declares; 0 without a header."""
    header = content(data, b"IHDR")
    return header[8] if header and len(header) > 8 else 0


def without_long_text(data: bytes) -> bytes:
    """Return a PNG without the profiles and texts that are longer than `MOST_TEXT`; the pixels stay."""
    long = [
        (start - 8, start + length + 4) for kind, start, length in chunks(data) if _is_long(data, kind, start, length)
    ]
    for begin, end in reversed(long):
        data = data[:begin] + data[end:]
    return data


def damage(data: bytes) -> str:
    """Return what is wrong with the header of a PNG that cannot be opened, "" when the file ends within it."""
    first = next(chunks(data), None)
    if first is None:
        return ""
    kind, start, length = first
    if kind != b"IHDR":
        return f"its first chunk is {kind!r}, where the header IHDR is expected"
    if len(data) < start + length + 4:
        return ""
    (checksum,) = struct.unpack(">I", data[start + length : start + length + 4])
    if checksum != zlib.crc32(data[start - 4 : start + length]):
        return "the checksum of its header is wrong, so width, height and depth cannot be trusted"
    return ""


def _is_long(data: bytes, kind: bytes, start: int, length: int) -> bool:
    if kind not in TEXT:
        return False
    packed = data[start : start + length]
    if kind == b"tEXt":
        return length > MOST_TEXT
    stream = _stream(kind, packed)
    if stream is None:
        return length > MOST_TEXT
    unpacker = zlib.decompressobj()
    try:
        return len(unpacker.decompress(stream, MOST_TEXT + 1)) > MOST_TEXT
    except zlib.error:  # damaged text does not affect the pixels
        return True


def _stream(kind: bytes, packed: bytes) -> bytes | None:
    """Return the compressed part of a text chunk, None when it is not compressed."""
    _, _, rest = packed.partition(b"\0")  # the keyword
    if kind in (b"iCCP", b"zTXt"):
        return rest[1:]  # after the method
    if rest[:1] != b"\1":  # iTXt, not compressed
        return None
    *_, text = rest[2:].split(b"\0", 2)  # after language and translated keyword
    return text
