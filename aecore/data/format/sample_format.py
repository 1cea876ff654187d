"""Shape and dtype of one decoded sample. A manifest counts samples by its text (`28x28x1/L`, `64x3/float32`)."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from aecore.errors import DataError

MODE_DTYPES = {
    **dict.fromkeys(("1", "L", "LA", "P", "RGB", "RGBA"), "u1"),
    **dict.fromkeys(("I;16", "RGB;16", "LA;16", "RGBA;16"), "u2"),
    "I": "i4",
    "F": "f4",
}


@dataclass(frozen=True, slots=True)
class SampleFormat:
    """Format of one decoded sample: `(H, W, C)` for images, any shape for arrays; of sequences that vary in length, the longest."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    image: bool
    varying: bool = False

    @classmethod
    def parse(cls, text: str) -> "SampleFormat":
        """Return the format of `28x28x1/L` (an image: height, width, channels, mode) or `64x3/float32` (an array: sides, dtype).

        Raises
        ------
        DataError
            Pixels of this mode are not decoded.
        """
        dims, _, mode = text.partition("/")
        shape = tuple(int(size) for size in dims.split("x")) if dims else ()
        if mode == "CMYK":
            raise DataError(f"samples of format {text} cannot be decoded faithfully: shard again with shards.mode=RGB")
        if mode in MODE_DTYPES:
            return cls(shape, np.dtype(MODE_DTYPES[mode]), image=True)
        try:
            return cls(shape, np.dtype(mode), image=False)
        except TypeError:
            raise DataError(
                f"samples of format {text}: the pixel mode {mode!r} is not supported (known: {', '.join(MODE_DTYPES)})"
            ) from None

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, int], *, sequences: bool = False) -> "SampleFormat":
        """Return the one format of a manifest's `sample.shapes`; DataError if there are several.

        With `sequences` arrays that differ only in their first axis are one format, of varying length.
        """
        found = {cls.parse(text) for text in shapes}
        if len(found) == 1:
            return found.pop()
        if sequences and sequence_shape(found) is not None:
            longest = max(found, key=lambda known: known.shape[0])
            return cls(longest.shape, longest.dtype, image=False, varying=True)
        shown = ", ".join(f"{shape} ({count})" for shape, count in sorted(shapes.items(), key=lambda item: -item[1])[:4])
        raise DataError(f"the samples have {len(found)} different formats ({shown or 'no samples'}), one is needed: {_remedy(found)}")

    @property
    def nbytes(self) -> int:
        """Bytes of one decoded sample."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape that a sample has in a batch: images are `(C, H, W)`, arrays as they are."""
        return (self.shape[2], *self.shape[:2]) if self.image else self.shape


def _remedy(found: Collection[SampleFormat]) -> str:
    """Return what makes one format of several."""
    if {known.image for known in found} == {True, False}:
        return "shard images and arrays apart, into datasets of their own (source.extensions)"
    if any(not known.image for known in found):
        one = "dtype (array.astype)" if len({known.shape for known in found}) == 1 else "shape (numpy.pad, or cut them)"
        return f"save the arrays with one {one} and shard them again"
    sizes, modes = ({known.shape[:2] for known in found}, {(known.shape[2:], known.dtype) for known in found})
    options = ["shards.resize=<side>"] * (len(sizes) != 1) + ["shards.mode=L or RGB"] * (len(modes) != 1)
    return f"shard again with {' and '.join(options) or 'shards.resize=<side> and shards.mode=L or RGB'}"


def sequence_shape(formats: Collection[SampleFormat]) -> tuple[int, ...] | None:
    """Return `(0, *rest)` for arrays `[T, *rest]` of one dtype that differ only in T; None for anything else."""
    if len({(known.image, known.dtype, known.shape[1:]) for known in formats}) != 1 or any(
        known.image or not known.shape for known in formats
    ):
        return None
    return (0, *next(iter(formats)).shape[1:])
