"""The bytes of many members in one buffer: what a shard gives and a decoder takes, without an object for each of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self, overload

import numpy as np
from numpy.typing import NDArray

from aecore.data.cuts import before

Int64s = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Members(Sequence[bytes]):
    """n members: `data[begins[i]:ends[i]]`, anywhere in the buffer; a sequence of their bytes, which are copied when asked for."""

    data: NDArray[np.uint8]
    begins: Int64s
    ends: Int64s

    @classmethod
    def of(cls, contents: Sequence[bytes]) -> "Members":
        """Return these contents, copied into one buffer."""
        starts = before(np.fromiter(map(len, contents), np.int64, len(contents)))
        return cls(np.frombuffer(b"".join(contents), np.uint8), starts[:-1], starts[1:])

    @classmethod
    def joined(cls, parts: Sequence["Members"]) -> "Members":
        """Return the members of all parts, one part after the other."""
        if len(parts) == 1:
            return parts[0]
        starts = before(np.array([len(part.data) for part in parts], np.int64))
        moved = [(part.begins + start, part.ends + start) for part, start in zip(parts, starts[:-1], strict=True)]
        begins, ends = (np.concatenate(places) for places in zip(*moved, strict=True))
        return cls(np.concatenate([part.data for part in parts]), begins, ends)

    def __len__(self) -> int:
        return len(self.begins)

    @overload
    def __getitem__(self, row: int) -> bytes: ...

    @overload
    def __getitem__(self, row: slice) -> Self: ...

    def __getitem__(self, row: int | slice) -> "bytes | Members":
        if isinstance(row, slice):
            return Members(self.data, self.begins[row], self.ends[row])
        return self.data[self.begins[row] : self.ends[row]].tobytes()

    def __iter__(self) -> Iterator[bytes]:
        view = self.data.data
        for begin, end in zip(self.begins.tolist(), self.ends.tolist(), strict=True):
            yield bytes(view[begin:end])

    def take(self, rows: Int64s) -> "Members":
        """Return the members with these numbers, in this order."""
        return Members(self.data, self.begins[rows], self.ends[rows])
