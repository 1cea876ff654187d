"""Orientation: how the stored pixels are turned or mirrored before anyone sees them (EXIF, CIPA DC-008, tag 274).

Where EXIF has no such tag, that of XMP counts (`tiff:Orientation`), as in Pillow.
"""

import re
from typing import Any

from numpy.typing import NDArray

UPRIGHT = 1
_IN_XMP = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')


def xmp_orientation(xmp: bytes) -> int:
    """Return the orientation, 1 to 8, that an XMP packet says first; 1 where it says none that exists."""
    found = _IN_XMP.search(xmp)
    return int(found[1]) if found is not None and found[1] in b"12345678" else UPRIGHT


def turned_size(width: int, height: int, orientation: int) -> tuple[int, int]:
    """Return width and height of an image as it is seen: 5 to 8 swap them."""
    return (height, width) if orientation >= 5 else (width, height)


def upright(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:  # any: every image has its own dtype
    """Return stored pixels `[H, W, ...]` as they are meant to be seen, as a view."""
    if orientation >= 5:  # stored by columns
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels
