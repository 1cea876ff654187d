"""Colours of images as RGB, and images with alpha as they look on a background. Legend: C channels, H W sides."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aecore.errors import ConfigError

Pixels = NDArray[Any]  # any: every image has its own dtype
BLOCK_VALUES = 1 << 20  # that are converted at once: on the way they may take 8 bytes each, several times


def white_of(dtype: np.dtype[Any]) -> float:  # any: as above
    """Return the value of white: the largest of an unsigned integer, 1 of a float, the largest of a signed one."""
    return 1.0 if dtype.kind == "f" else float(np.iinfo(dtype).max)


def by_blocks(convert: Callable[[Pixels], Pixels], pixels: Pixels) -> Pixels:
    """Return what a function of single pixels gives for `[H, W, ...]`, by blocks, so that what it takes on the way does not grow."""
    height, width = pixels.shape[:2]
    if pixels.size <= BLOCK_VALUES:
        return convert(pixels)
    most = max(1, BLOCK_VALUES * height * width // pixels.size)
    rows, columns, out = max(1, most // width), min(most, width), None
    for top in range(0, height, rows):
        for left in range(0, width, columns):
            found = convert(pixels[top : top + rows, left : left + columns])
            if out is None:
                out = np.empty((height, width, *found.shape[2:]), found.dtype)
            out[top : top + rows, left : left + columns] = found
    assert out is not None, "an image has pixels"
    return out


def cmyk_to_rgb(inks: Pixels) -> Pixels:
    """Return RGB `[H, W, 3]` of inks `[H, W, 4]` (the largest value: full ink): the light that passes both a colour and black."""
    product = np.dtype(f"u{2 * inks.dtype.itemsize}").type  # holds the square of white and a half of it
    white = product(white_of(inks.dtype))

    def convert(block: Pixels) -> Pixels:
        light = white - block.astype(product)
        found: Pixels = ((light[..., :3] * light[..., 3:] + white // product(2)) // white).astype(inks.dtype)
        return found

    return by_blocks(convert, inks)


def lab_to_rgb(lab: NDArray[np.float64], dtype: np.dtype[Any]) -> Pixels:  # any: as above
    """Return sRGB of CIE L*a*b* `[H, W, 3]` (D50; L from 0 to 100), by LittleCMS."""
    import imagecodecs

    profiles = imagecodecs.cms_profile("lab4"), imagecodecs.cms_profile("srgb")
    found: Pixels = imagecodecs.cms_transform(lab, *profiles, colorspace="lab", outcolorspace="rgb", outdtype=dtype)
    return found


def straight_alpha(pixels: Pixels, white: float) -> Pixels:
    """Return pixels whose colours were multiplied by their alpha, the last channel, with the colours divided by it again."""

    def convert(block: Pixels) -> Pixels:
        alpha = block[..., -1:].astype(np.float64)
        colours = block[..., :-1] * white / np.where(alpha == 0, white, alpha)
        if block.dtype.kind != "f":
            colours = np.rint(colours).clip(0, white)
        return np.concatenate([colours.astype(block.dtype), block[..., -1:]], axis=-1)

    return by_blocks(convert, pixels)


def composed(pixels: Pixels, background: str, white: float) -> Pixels:
    """Return the colours `[H, W, C-1]` of an image with straight alpha, its last channel, over a background of one colour.

    `white` is the value of white, and of what is opaque.
    """
    colour = background_of(background, pixels.shape[-1] - 1)

    def convert(block: Pixels) -> Pixels:
        share = block[..., -1:].astype(np.float64) / white
        found = block[..., :-1] * share + colour * white * (1 - share)
        return (found if block.dtype.kind == "f" else np.floor(found + 0.5)).astype(block.dtype)

    return by_blocks(convert, pixels)


@functools.cache
def background_of(name: str, channels: int) -> NDArray[np.float64]:
    """Return a colour as `channels` numbers from 0 to 1: red, green and blue, or their luma (ITU-R 601).

    Raises
    ------
    ConfigError
        No such colour: it is none of CSS's names and not of the form #rrggbb.
    """
    if name == "white":  # the default, which needs no import
        return np.ones(channels)
    from PIL import ImageColor

    try:
        colour = np.array(ImageColor.getrgb(name)[:3]) / 255
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"background is {name!r}, expected the name of a colour (white, black) or #rrggbb") from error
    return colour if channels == 3 else np.full(channels, colour @ (0.299, 0.587, 0.114))
