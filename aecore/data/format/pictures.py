"""Samples as pixels: uint8 images, grids of them, PNG files that are the same bytes everywhere. Legend: C channels, H W sides."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aecore.data.format.png import StoredPng
from aecore.data.format.transform import Transform
from aecore.errors import ConfigError

Image = NDArray[np.uint8]  # [H, W] or [H, W, 3]
GAP, GAP_LEVEL = 2, 255  # pixels between the images of a grid, and their level


def is_image(shape: Sequence[int]) -> bool:
    """Return whether samples of this shape are images: `(1, H, W)` or `(3, H, W)`."""
    return len(shape) == 3 and shape[0] in (1, 3) and min(shape[1:]) > 1


def pixels(values: Tensor, transform: Transform) -> Image:
    """Return samples `[n, C, H, W]` of the network's scale as `[n, H, W]` or `[n, H, W, 3]` levels.

    `transform.scale=none` defines no range: values outside [0, 1] are taken as levels from 0 to 255.
    """
    unit = transform.spec.scale == "none" and float(values.min()) >= 0 and float(values.max()) <= 1
    levels = (values * 255).round().to(torch.uint8) if unit else transform.inverse(values)
    return levels.squeeze(1).cpu().numpy() if values.shape[1] == 1 else levels.permute(0, 2, 3, 1).cpu().numpy()


def grid(images: Image, columns: int) -> Image:
    """Return images `[n, H, W(, 3)]` side by side in rows of `columns`, with a gap between them; missing ones are left blank."""
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    height, width = images.shape[1] + GAP, images.shape[2] + GAP
    out = np.full((rows * height - GAP, columns * width - GAP, *images.shape[3:]), GAP_LEVEL, np.uint8)
    for number, image in enumerate(images):
        top, left = number // columns * height, number % columns * width
        out[top : top + images.shape[1], left : left + images.shape[2]] = image
    return out


def png(image: Image) -> bytes:
    """Return an image `[H, W]` or `[H, W, 3]` as a PNG file."""
    return StoredPng(image.shape)(image)


def require_matplotlib() -> None:
    """Raise ConfigError, which says how to install matplotlib, if it is missing."""
    try:
        import matplotlib  # noqa: F401  # only whether it can be imported
    except ImportError as missing:
        raise ConfigError(
            f"figures need matplotlib ({missing}): install it with `pip install 'aecore[report]'`, or leave them out"
        ) from missing
