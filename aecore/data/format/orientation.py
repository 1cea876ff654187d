"""EXIF orientation: how the stored pixels are turned or mirrored before anyone sees them (CIPA DC-008, tag 274)."""

from typing import Any

from numpy.typing import NDArray

UPRIGHT = 1


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
