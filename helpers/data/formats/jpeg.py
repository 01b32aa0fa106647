"""Kinds of JPEG that no reader here decodes."""


def why_not_read(data: bytes) -> str:
    """Return why a JPEG with a sound header is not read: 12 bits, lossless or hierarchical; "" for any other."""
    at = 2
    while at + 9 < len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if data[at + 4] != 8:
                return f"a JPEG of {data[at + 4]} bits a channel is not read: save it with 8 bits, or as TIFF or PNG"
            if marker not in (0xC0, 0xC1, 0xC2, 0xC9, 0xCA):
                return "a lossless or hierarchical JPEG is not read: save it as an ordinary one"
            return ""
        at += 2 + length
    return ""
