"""Sequences of different lengths: `.npy` samples `[T, ...]` of one dtype that differ only in T, as one padded array and their lengths.

A batch is as long as its longest sample; shorter ones are padded with zeros, and models that take `Batch.lengths` ignore the padding.
Rows are decoded into lazily allocated zero pages as wide as the longest sample of the dataset, and cropped to the longest of the
batch: one very long sample costs address space, not RAM (unless the split is cached in RAM).
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from aecore.data.format.bad_sample import BadSample
from aecore.data.format.decode import DecodeError, Pixels
from aecore.data.format.record import ArrayHeader, array_header
from aecore.data.format.sample_format import SampleFormat

Int64s = NDArray[np.int64]
_MOST_HEADERS = 4096  # in the cache


class SequenceDecoder:
    """Decodes the sequences of one dataset; caches parsed headers, since a dataset has few different lengths."""

    def __init__(self, sample_format: SampleFormat) -> None:
        self.sample_format = sample_format
        self._headers: dict[tuple[bytes, int], ArrayHeader] = {}

    def batch(self, members: Sequence[bytes], on_bad: Callable[[DecodeError], None] | None = None) -> tuple[Pixels, Int64s]:
        """Return `[n, T, ...]` with T the dataset's longest, and lengths `[n]`; a bad one raises DecodeError or goes to `on_bad`."""
        out, lengths = np.zeros((len(members), *self.sample_format.shape), self.sample_format.dtype), np.ones(len(members), np.int64)
        for row, data in enumerate(members):
            try:
                header = self._header(data)
            except BadSample as why:
                bad = DecodeError(why.reason, why.message, row)
                if on_bad is None:
                    raise bad from why
                on_bad(bad)
                continue
            lengths[row] = header.shape[0]
            values = np.frombuffer(data, self.sample_format.dtype, offset=header.start)
            out[row, : header.shape[0]] = values.reshape(header.shape)
        return out, lengths

    def _header(self, data: bytes) -> ArrayHeader:
        key = data[: 10 + int.from_bytes(data[8:10], "little")], len(data)
        if key not in self._headers:
            if len(self._headers) >= _MOST_HEADERS:
                self._headers.clear()
            self._headers[key] = self._checked(data)
        return self._headers[key]

    def _checked(self, data: bytes) -> ArrayHeader:
        header = array_header(data)
        steps, *rest = header.shape or (0,)
        (longest, *inside), dtype = self.sample_format.shape, self.sample_format.dtype
        if not header.shape or rest != inside or header.dtype != dtype or steps > longest:
            promised = f"sequences of at most {longest} steps of shape {tuple(inside)} and dtype {dtype}"
            raise BadSample("shape", f"an array of shape {header.shape} and dtype {header.dtype}, the index promises {promised}")
        if not steps:
            raise BadSample("empty", f"a sequence of shape {header.shape} has no step")
        return header


def crop(pixels: Pixels, lengths: Int64s) -> Pixels:
    """Return the rows as long as the longest of them, as a view."""
    return pixels[:, : int(lengths.max(initial=1))]
