"""Shape and dtype of one decoded sample. A manifest counts samples by its text (`28x28x1/L`, `64x3/float32`)."""

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from aecore.errors import DataError

MODE_DTYPES = {
    **dict.fromkeys(("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "LAB", "YCbCr"), "u1"),
    **dict.fromkeys(("I;16", "RGB;16", "LA;16", "RGBA;16", "CMYK;16", "LAB;16"), "u2"),
    "I": "i4",
    "F": "f4",
}
WITH_ALPHA = ("LA", "PA", "RGBA", "LA;16", "RGBA;16")
BANDS, CHANNEL_LAST = "image", "hwc"  # modes of images that have no name: bands of a TIFF, `.npy` arrays [H, W, C]; their dtype follows


SHOWN = 4


@dataclass(frozen=True, slots=True)
class SampleFormat:
    """Format of one decoded sample: `(H, W, C)` for images, any shape for arrays; of sequences that vary in length, the longest.

    Attributes
    ----------
    has_alpha : bool
        Whether the last channel is alpha.
    from_array : bool
        Whether it is an image that is stored as an array `[H, W, C]`.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    image: bool
    varying: bool = False
    has_alpha: bool = field(default=False, compare=False)
    from_array: bool = field(default=False, compare=False)

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
        if mode == "CMYK" and shape[2:] == (4,):  # of `pixels=1`
            raise DataError(f"samples of format {text} cannot be decoded faithfully: shard again with shards.mode=RGB")
        if mode in MODE_DTYPES:
            return cls(shape, np.dtype(MODE_DTYPES[mode]), image=True, has_alpha=mode in WITH_ALPHA)
        kind, _, name = mode.rpartition(";")
        try:
            return cls(shape, np.dtype(name), image=kind in (BANDS, CHANNEL_LAST), from_array=kind == CHANNEL_LAST)
        except TypeError:
            raise DataError(
                f"samples of format {text}: the pixel mode {mode!r} is not supported (known: {', '.join(MODE_DTYPES)})"
            ) from None

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, int], *, sequences: bool = False) -> "SampleFormat":
        """Return the one format of a manifest's `sample.shapes`; DataError if there are several.

        With `sequences` arrays that differ only in their first axis are one format, of varying length.
        """
        found = common_formats(map(cls.parse, shapes))
        if len(found) == 1:
            return found.pop()
        if sequences and sequence_shape(found) is not None:
            found = {known.as_array for known in found}
            longest = max(found, key=lambda known: known.shape[0])
            return cls(longest.shape, longest.dtype, image=False, varying=True)
        raise DataError(f"the samples have {len(shapes)} different formats ({shown_formats(shapes)}), one is needed: {remedy_of(found)}")

    @property
    def without_alpha(self) -> "SampleFormat":
        """The format of the same images over a background; itself if there is no alpha."""
        shape = (*self.shape[:2], self.shape[2] - 1) if self.has_alpha else self.shape
        return dataclasses.replace(self, shape=shape, has_alpha=False)

    @property
    def as_array(self) -> "SampleFormat":
        """The format of an array for one that was taken for an image `[H, W, C]`: its axes may be something else."""
        return dataclasses.replace(self, image=self.image and not self.from_array)

    @property
    def nbytes(self) -> int:
        """Bytes of one decoded sample."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape that a sample has in a batch: images are `(C, H, W)`, arrays as they are."""
        return (self.shape[2], *self.shape[:2]) if self.image else self.shape


def common_formats(formats: Iterable[SampleFormat]) -> set[SampleFormat]:
    """Return the different formats of samples; images that differ only in whether they have alpha count as those without it."""
    found = set(formats)
    plain = {known.without_alpha for known in found}
    return plain if len(plain) == 1 < len(found) else found


def shown_formats(shapes: Mapping[str, int]) -> str:
    """Return the most frequent formats with their counts, as messages show them."""
    shown = [f"{shape} ({count})" for shape, count in sorted(shapes.items(), key=lambda item: -item[1])[:SHOWN]]
    return ", ".join([*shown, *["..."] * (len(shapes) > SHOWN)]) or "no samples"


def remedy_of(found: Collection[SampleFormat]) -> str:
    """Return what makes one format of several."""
    from_images = {known.image and not known.from_array for known in found}
    if from_images == {True, False}:
        return "shard images and arrays apart, into datasets of their own (source.extensions)"
    if from_images == {False}:
        one = "dtype (array.astype)" if len({known.shape for known in found}) == 1 else "shape (numpy.pad, or cut them)"
        return f"save the arrays with one {one} and shard them again"
    sizes, modes = ({known.shape[:2] for known in found}, {(known.shape[2:], known.dtype) for known in found})
    options = ["shards.resize=<side>"] * (len(sizes) != 1) + ["shards.mode=L or RGB"] * (len(modes) != 1)
    return f"shard again with {' and '.join(options) or 'shards.resize=<side> and shards.mode=L or RGB'}"


def sequence_shape(formats: Collection[SampleFormat]) -> tuple[int, ...] | None:
    """Return `(0, *rest)` for arrays `[T, *rest]` of one dtype that differ only in T; None for anything else."""
    arrays = {known.as_array for known in formats}
    if len({(known.image, known.dtype, known.shape[1:]) for known in arrays}) != 1 or any(
        known.image or not known.shape for known in arrays
    ):
        return None
    return (0, *next(iter(arrays)).shape[1:])
