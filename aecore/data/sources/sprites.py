"""Generated sprites with known factors: shape x scale x orientation x position, on a complete grid.

For demos, tests and disentanglement scores: needs no download, and the index holds the true factors of every image
(`factor_*`). Bytes are the same on every machine: coverage is counted on a 4x4 sub-pixel grid and the PNG is stored, not
deflated, since deflate output differs between zlib builds (a 32x32 image takes 1.1 kB instead of about 0.2).
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from aecore.data.format.png import StoredPng
from aecore.data.sources import Listing
from aecore.errors import DataError
from aecore.native.texts import Texts
from aecore.registry import SOURCES, knob, spec

SUBPIXELS = 4
RADIUS = (0.10, 0.22)  # of the smallest and the largest scale, in image sides; every sprite is inside the image
FACTORS = ("shape", "scale", "orientation", "x", "y")
STATE = "1"  # another one would say that the images of a name are drawn in another way
Mask = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.bool_]]


def _heart(u: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.bool_]:
    u2, v = (1.25 * u) ** 2, 1.25 * v
    rest = u2 + v * v - 1.0
    return rest * rest * rest <= u2 * v * v * v


SHAPES: dict[str, Mask] = {  # inside, in coordinates where the radius is 1 and v points up
    "square": lambda u, v: np.maximum(abs(u), abs(v)) <= 0.7,
    "ellipse": lambda u, v: u * u + (v / 0.6) ** 2 <= 1.0,
    "heart": _heart,
}


@spec
class SpritesSpec:
    """Grid of grey images: 3 shapes x `scales` x `orientations` x `positions` squared (3 x 4 x 1 x 16 x 16 = 3072)."""

    kind: Literal["sprites"] = "sprites"
    size: int = knob(32, "side of the images in pixels", ge=8, le=1024)
    scales: int = knob(4, "number of sizes of a shape", ge=1, le=99)
    orientations: int = knob(1, "number of rotations, evenly spaced over a full turn", ge=1, le=999)
    positions: int = knob(16, "number of positions on each axis", ge=1, le=999)
    num_samples: int = knob(0, "this many samples of the grid, evenly spread; 0 takes all", ge=0)


@SOURCES.register(SpritesSpec)
class SpritesSource:
    """The grid of a `SpritesSpec`; `read` draws one image from its name (`square/s02-o000-x003-y011`)."""

    def __init__(self, sprites: SpritesSpec) -> None:
        self._spec = sprites
        self._levels = (len(SHAPES), sprites.scales, sprites.orientations, sprites.positions, sprites.positions)
        self._png = StoredPng((sprites.size, sprites.size))
        self._side = (np.arange(sprites.size * SUBPIXELS) + 0.5) / (sprites.size * SUBPIXELS)

    def listing(self) -> Listing:
        """List the grid: keys name the factors, `factor_*` columns hold them as integers, the label is the shape."""
        total = int(np.prod(self._levels))
        wanted = min(self._spec.num_samples, total) or total
        factors = np.stack(np.unravel_index(np.arange(wanted) * total // wanted, self._levels))
        names = list(SHAPES)
        keys = [f"{names[k]}/s{s:02d}-o{o:03d}-x{x:03d}-y{y:03d}" for k, s, o, x, y in factors.T.tolist()]
        columns = {f"factor_{name}": row.astype(np.int32) for name, row in zip(FACTORS, factors, strict=True)}
        if self._spec.orientations == 1:
            del columns["factor_orientation"]
        labels = Texts.coded(names, factors[0])
        sizes = np.full(wanted, len(self.read(keys[0])[1]), dtype=np.int64)
        return Listing(keys, keys, sizes, label_names=labels, columns=columns, states=Texts.coded([STATE], np.zeros(wanted, np.int32)))

    def read(self, source: str) -> tuple[str, bytes]:
        """Draw one image; DataError if the name is not one of this grid."""
        return "png", self._png(self.draw(*self._factors(source)))

    def read_states(self, sources: Sequence[str]) -> list[str]:
        """Return the states of these images: they are never drawn in another way."""
        return [STATE] * len(sources)

    def draw(self, shape: str, scale: int, orientation: int, x: int, y: int) -> NDArray[np.uint8]:
        """Return `[size, size]` grey values: 255 inside the shape, 0 outside, in between on its edge."""
        size = self._spec.size
        radius = RADIUS[0] + (RADIUS[1] - RADIUS[0]) * (scale / max(self._spec.scales - 1, 1))
        steps = max(self._spec.positions - 1, 1)
        centre_u, centre_v = (RADIUS[1] + (1 - 2 * RADIUS[1]) * place / steps for place in (x, y))
        columns, rows = (self._window(at, radius) for at in (centre_u, centre_v))
        u = (self._subpixels(columns)[None, :] - centre_u) / radius
        v = (centre_v - self._subpixels(rows)[:, None]) / radius
        if orientation:
            angle = 2 * np.pi * orientation / self._spec.orientations
            u, v = u * np.cos(angle) + v * np.sin(angle), v * np.cos(angle) - u * np.sin(angle)
        inside = SHAPES[shape](u, v).reshape(rows.stop - rows.start, SUBPIXELS, columns.stop - columns.start, SUBPIXELS)
        image = np.zeros((size, size), dtype=np.uint8)
        image[rows, columns] = inside.sum(axis=(1, 3)) * 255 // SUBPIXELS**2
        return image

    def _window(self, centre: float, radius: float) -> slice:
        size = self._spec.size
        return slice(max(math.floor((centre - radius) * size), 0), min(math.ceil((centre + radius) * size), size))

    def _subpixels(self, pixels: slice) -> NDArray[np.float64]:
        return self._side[pixels.start * SUBPIXELS : pixels.stop * SUBPIXELS]

    def _factors(self, source: str) -> tuple[str, int, int, int, int]:
        shape, _, rest = source.partition("/")
        try:
            numbers = [int(part[1:]) for part in rest.split("-")]
            inside = all(0 <= number < levels for number, levels in zip(numbers, self._levels[1:], strict=True))
        except ValueError:
            inside = False
        if shape not in SHAPES or not inside:
            raise DataError(f"{source!r} is no sprite of this grid (like 'square/s00-o000-x003-y011'): {self._spec}")
        return shape, numbers[0], numbers[1], numbers[2], numbers[3]
