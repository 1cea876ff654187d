"""Files on their way into a tar, read, framed and hashed by compiled threads that do not wait for the interpreter (`native_c/run.c`).

Only where `native.available()`; what the caller does here block by block, `data.pack` does sample by sample everywhere.
"""

import copy
import ctypes
import mmap
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from aecore import native
from aecore.native import FACTS, Bytes, Int64s, StreamHash

PAGE = mmap.PAGESIZE
SLOTS = 6  # blocks in memory: two are read, one is hashed, one is written, two wait for that


class Texts:
    """N strings in one: each ended by a zero byte."""

    def __init__(self, joined: bytes) -> None:
        ends: Int64s = np.flatnonzero(np.frombuffer(joined, np.uint8) == 0)
        self.joined, self.begins = joined, np.concatenate([np.zeros(1, np.int64), ends[:-1] + 1])

    def of(self, rows: slice) -> "Texts":
        """Return some of them."""
        some = copy.copy(self)
        some.begins = self.begins[rows]
        return some


@dataclass(frozen=True, slots=True, eq=False)
class Files:
    """N files below an open folder that become the samples of a tar, in this order and in B blocks.

    Attributes:
        folder: its descriptor.
        paths, names: where each lies in the folder, and its name in the tar (with a dot, at most 96 bytes).
        labels: `[N]` int32, negative where there is none.
        starts: `[N+1]` int64, where each sample begins in the tar, with its first header, and where the last one ends.
        begins, ends: `[N]` int64, where its data do: `ends - begins` is the size that its file is expected to have.
        cuts: `[B+1]` int64, the first sample of each block, and N.
        blank: `[512]` uint8, the header of a member without name and size.
    """

    folder: int
    paths: Texts
    names: Texts
    labels: NDArray[np.int32]
    starts: Int64s
    begins: Int64s
    ends: Int64s
    cuts: Int64s
    blank: Bytes


class Run:
    """Takes files into a tar: a context manager, whose threads end with it.

    `read` says which samples are read next, if all of their files are images of the expected sizes, whose `facts` are known then. `accept`
    lets them be hashed, into `digests` and the `stream` that is the hash of the tar. `pages` gives what they fill of the tar, to be
    written, and `give_back` the memory to the next block. `tail` is what the tar has after its last full page, before and after the run.
    """

    def __init__(self, files: Files, stream: StreamHash, tail: bytes) -> None:
        self._library, self._run = native._library(), ctypes.c_void_p()  # C sets and clears it
        self.files, self.stream = files, stream
        self.facts = np.empty(len(files.labels), FACTS)
        self.digests = np.empty((len(files.labels), 32), np.uint8)
        self.tail = np.frombuffer(tail.ljust(PAGE, b"\0"), np.uint8).copy()
        self.accepted = self.given_back = 0  # blocks
        self._origins = files.starts[files.cuts] // PAGE * PAGE  # place in the tar of the first byte in memory of each block
        most = int((files.starts[files.cuts[1:]] - self._origins[:-1]).max())
        self._slot_bytes = most // PAGE * PAGE + 2 * PAGE  # a file that has grown is read a little further
        self._num_slots = min(SLOTS, len(files.cuts) - 1)
        memory = np.empty(self._num_slots * self._slot_bytes + PAGE, np.uint8)
        self._slots = memory[-memory.ctypes.data % PAGE :][: self._num_slots * self._slot_bytes]
        self._given = _given(self)

    def __enter__(self) -> Self:
        assert self._library is not None, "no compiled loops here"
        self._library.aecore_run_start(ctypes.byref(self._given), ctypes.byref(self._run))
        if self._run.value is None:
            raise MemoryError("no memory or no threads to read samples with")
        return self

    def __exit__(self, *_: object) -> None:
        if self._library is not None:
            self._library.aecore_run_stop(ctypes.byref(self._run))

    __del__ = __exit__  # a signal that raises may come before `__enter__` or `__exit__` has ended

    def read(self) -> slice | None:
        """Wait for the next block and return its samples; None at the end, or if any of its files is not as expected."""
        if not self._call("read"):
            return None
        return slice(*self.files.cuts[self.accepted : self.accepted + 2].tolist())

    def content(self, row: int) -> bytes:
        """Return the data of a sample of the block that was read."""
        origin, slot = int(self._origins[self.accepted]), self.accepted % self._num_slots * self._slot_bytes
        begin, end = int(self.files.begins[row]) - origin, int(self.files.ends[row]) - origin
        return self._slots[slot + begin : slot + end].tobytes()

    def accept(self) -> None:
        """Let the block that was read be hashed."""
        self.stream.size += int(self._origins[self.accepted + 1] - self._origins[self.accepted])
        self.accepted += 1
        self._call("accept")

    def pages(self) -> memoryview:
        """Wait until the oldest block that was accepted and not given back is hashed; return the full pages of the tar that end in it."""
        assert self.given_back < self.accepted, "no block was accepted"
        begin = self.given_back % self._num_slots * self._slot_bytes
        return self._slots[begin : begin + self._call("hashed")].data

    def give_back(self) -> None:
        """End with that block: its memory is used again."""
        self.given_back += 1
        self._call("give_back")

    def _call(self, what: str) -> int:
        assert self._library is not None and self._run.value is not None, "the run has begun and has not ended"
        return int(getattr(self._library, f"aecore_run_{what}")(self._run))


class _Given(ctypes.Structure):
    """As in native_c/run.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("folder", "num_blocks", "num_slots", "slot_bytes")),
        *((name, ctypes.c_char_p) for name in ("paths", "names")),
        *((name, ctypes.c_void_p) for name in ("path_at", "name_at", "labels", "starts", "begins", "ends", "cuts", "blank", "slots")),
        *((name, ctypes.c_void_p) for name in ("state", "digests", "tail", "facts")),
    )


def _given(run: Run) -> _Given:
    files, count = run.files, len(run.files.labels)
    lengths = [len(column) for column in (files.paths.begins, files.names.begins, files.starts[1:], files.begins, files.ends)]
    if {*lengths, int(files.cuts[-1])} != {count} or files.cuts[0] != 0:  # no `assert`: it must hold under -O too
        raise AssertionError("every file has a path, a name and a place in a block")
    texts: tuple[NDArray[Any], ...] = (files.paths.begins, files.names.begins)  # any: int64 and int32 arrays
    numbers = (*texts, files.labels, files.starts, files.begins, files.ends, files.cuts)
    kinds = [np.int32 if array is files.labels else np.int64 for array in numbers]
    if not all(array.dtype == kind and array.flags.c_contiguous for array, kind in zip(numbers, kinds, strict=True)):
        raise AssertionError("arrays are as in run.c")
    arrays = (*numbers, files.blank, run._slots, run.stream.state, run.digests, run.tail, run.facts)
    sizes = (files.folder, len(files.cuts) - 1, run._num_slots, run._slot_bytes)
    return _Given(*sizes, files.paths.joined, files.names.joined, *(array.ctypes.data for array in arrays))
