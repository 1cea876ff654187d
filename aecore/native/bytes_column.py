"""Many byte strings in one buffer, without a Python object for each: the type that readers, decoders and compiled loops exchange."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self, overload

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Int64s = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class BytesColumn(Sequence[bytes]):
    """n values: `data[begins[i]:ends[i]]`, anywhere in the buffer; a sequence of bytes objects, copied on access."""

    data: Bytes
    begins: Int64s
    ends: Int64s

    @classmethod
    def from_bytes(cls, values: Sequence[bytes]) -> "BytesColumn":
        """Return these values, copied into one buffer."""
        sizes = np.fromiter(map(len, values), np.int64, len(values))
        ends = np.cumsum(sizes)
        return cls(np.frombuffer(b"".join(values), np.uint8), ends - sizes, ends)

    @classmethod
    def from_texts(cls, joined: bytes) -> "BytesColumn":
        """Return the zero-terminated values in `joined`; the zeros are not part of them."""
        data = np.frombuffer(joined, np.uint8)
        ends: Int64s = np.flatnonzero(data == 0)
        return cls(data, np.concatenate([np.zeros(1, np.int64), ends[:-1] + 1]) if len(ends) else ends, ends)

    @classmethod
    def concat(cls, parts: Sequence["BytesColumn"]) -> "BytesColumn":
        """Return the values of all parts, in order."""
        if len(parts) == 1:
            return parts[0]
        starts = np.cumsum([0, *(len(part.data) for part in parts)])
        moved = [(part.begins + start, part.ends + start) for part, start in zip(parts, starts[:-1], strict=True)]
        begins, ends = (np.concatenate(places) for places in zip(*moved, strict=True))
        return cls(np.concatenate([part.data for part in parts]), begins, ends)

    def __len__(self) -> int:
        return len(self.begins)

    @overload
    def __getitem__(self, row: int) -> bytes: ...

    @overload
    def __getitem__(self, row: slice) -> Self: ...

    def __getitem__(self, row: int | slice) -> "bytes | BytesColumn":
        if isinstance(row, slice):
            return BytesColumn(self.data, self.begins[row], self.ends[row])
        return self.data[self.begins[row] : self.ends[row]].tobytes()

    def __iter__(self) -> Iterator[bytes]:
        view = self.data.data
        for begin, end in zip(self.begins.tolist(), self.ends.tolist(), strict=True):
            yield bytes(view[begin:end])

    def take(self, rows: Int64s) -> "BytesColumn":
        """Return the values with these indices, in this order."""
        return BytesColumn(self.data, self.begins[rows], self.ends[rows])

    @property
    def sizes(self) -> Int64s:
        """Return the bytes of each value."""
        return self.ends - self.begins

    def require_inside(self) -> None:
        """Raise AssertionError unless every value is inside the buffer: compiled loops do not check it."""
        begins, ends, size = self.begins, self.ends, len(self.data)
        if len(begins) != len(ends) or (len(begins) and not (begins.min() >= 0 and (begins <= ends).all() and ends.max() <= size)):
            raise AssertionError("messages are inside the buffer and end after they begin")  # no `assert`: it must hold under -O too
