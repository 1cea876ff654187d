"""Build a tar from files: threads read, frame and hash them block by block, each file directly at its offset in the tar.

Files that are not as expected go through `data.write.pack` instead, sample by sample.
"""

import ctypes
import mmap
import os
from abc import ABC, abstractmethod
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from aecore import native
from aecore.native import FACTS
from aecore.native.bytes_column import Bytes, BytesColumn, Int64s
from aecore.native.loops import StreamHash, facts_of, frame_sample
from aecore.store import STATE_BYTES, local_state

PAGE = mmap.PAGESIZE
SLOTS = 6  # blocks in memory: two are read, one is hashed, one is written, two wait for that
_ROOM = 512  # a file that has grown is read a little further


@dataclass(frozen=True, slots=True, eq=False)
class TarFiles:
    """N files below an open folder that become the samples of a tar, in this order and in B blocks.

    Attributes
    ----------
    folder : int
        Its descriptor.
    paths, names : BytesColumn
        Path of each file in the folder, and name in the tar (with a dot, at most 96 bytes); zero-terminated.
    labels : `[N]` int32
        Class ids, negative: none.
    starts : `[N+1]` int64
        Offset in the tar of each sample's first header, and the end of the last sample.
    begins, ends : `[N]` int64
        Byte range of the data in the tar: `ends - begins` is the expected size of the file.
    blocks : `[B+1]` int64
        The first sample of each block, and N.
    blank : `[512]` uint8
        The header of a member without name and size.
    states : `[N, STATE_BYTES]` uint8, optional
        The listed state of each file (see `aecore.store`).
    """

    folder: int
    paths: BytesColumn
    names: BytesColumn
    labels: NDArray[np.int32]
    starts: Int64s
    begins: Int64s
    ends: Int64s
    blocks: Int64s
    blank: Bytes
    states: Bytes | None = None

    def require_consistent(self) -> None:
        """Raise AssertionError unless every file has a path, a name and a block: compiled threads do not check it."""
        texts = self.paths, self.names
        columns = (self.paths.begins, self.names.begins, self.labels, self.starts[1:], self.begins, self.ends)
        if {*(len(column) for column in columns), int(self.blocks[-1])} != {len(self.labels)} or self.blocks[0] != 0:
            raise AssertionError("every file has a path, a name and a block")  # no `assert`: it must hold under -O too
        for text in texts:
            text.require_inside()
            if len(text) and (text.ends.max() >= len(text.data) or text.data[text.ends].any()):
                raise AssertionError("paths and names are ended by a zero byte")
        if self.states is not None and not (self.states.shape == (len(self.labels), STATE_BYTES) and self.states.flags.c_contiguous):
            raise AssertionError("every file has a state")
        arrays: tuple[NDArray[Any], ...] = (*columns, self.blocks)  # any: int64 and int32 arrays
        if not all(array.dtype == (np.int32 if array is self.labels else np.int64) and array.flags.c_contiguous for array in arrays):
            raise AssertionError("arrays are as in tar_builder.c")


class TarBuilder(ABC):
    """Builds a tar from files: a context manager, whose threads end with it. `open_tar_builder` makes one.

    `next_block` returns the next samples if all of their files are images of the expected sizes, and sets their `facts`. `submit` starts
    hashing them, into `digests` and `stream`, the hash of the tar. `finished_pages` returns the hashed pages, to be written, and `release`
    frees their memory for another block. `changed` says whether the state of a file, after it was read, was another one than the listed one
    (1; 0 where there are none). `tail` holds the bytes of the tar after its last full page, before and after.
    """

    def __init__(self, files: TarFiles, stream: StreamHash, tail: bytes) -> None:
        files.require_consistent()
        self.files, self.stream = files, stream
        self.facts = np.empty(len(files.labels), FACTS)
        self.digests = np.empty((len(files.labels), 32), np.uint8)
        self.changed = np.zeros(len(files.labels), np.uint8)
        self.tail = np.frombuffer(tail.ljust(PAGE, b"\0"), np.uint8).copy()
        self.submitted = self.released = 0  # blocks
        self._origins = files.starts[files.blocks] // PAGE * PAGE  # offset in the tar of the first byte of each block's memory
        most = int((files.starts[files.blocks[1:]] - self._origins[:-1]).max())
        self._slot_bytes = most // PAGE * PAGE + 2 * PAGE
        self._num_slots = min(SLOTS, len(files.blocks) - 1)
        memory = np.empty(self._num_slots * self._slot_bytes + PAGE, np.uint8)
        self._slots = memory[-memory.ctypes.data % PAGE :][: self._num_slots * self._slot_bytes]

    @abstractmethod
    def __enter__(self) -> Self: ...

    @abstractmethod
    def __exit__(self, *_: object) -> None:
        """End the threads; submitted blocks are still hashed."""

    @abstractmethod
    def next_block(self) -> slice | None:
        """Wait for the next block and return its samples; None at the end, or if any of its files is not as expected."""

    @abstractmethod
    def submit(self) -> None:
        """Start hashing the block that `next_block` returned."""

    @abstractmethod
    def finished_pages(self) -> memoryview:
        """Wait until the oldest block that was submitted and not released is hashed; return the full pages of the tar that end in it."""

    @abstractmethod
    def release(self) -> None:
        """Free the memory of that block."""

    def content(self, row: int) -> bytes:
        """Return the data of a sample of the current block."""
        slot, origin = self._slot(self.submitted), int(self._origins[self.submitted])
        return slot[int(self.files.begins[row]) - origin : int(self.files.ends[row]) - origin].tobytes()

    def _slot(self, block: int) -> Bytes:
        begin = block % self._num_slots * self._slot_bytes
        return self._slots[begin : begin + self._slot_bytes]

    def _rows(self, block: int) -> slice:
        return slice(*self.files.blocks[block : block + 2].tolist())


def open_tar_builder(files: TarFiles, stream: StreamHash, tail: bytes) -> TarBuilder:
    """Return a builder whose first sample follows `tail`, the bytes after the last full page; AssertionError for inconsistent arrays."""
    return CompiledTarBuilder(files, stream, tail) if native.available() else PythonTarBuilder(files, stream, tail)


class PythonTarBuilder(TarBuilder):
    """Reads and frames in the caller's thread and hashes in another."""

    def __init__(self, files: TarFiles, stream: StreamHash, tail: bytes) -> None:
        super().__init__(files, stream, tail)
        self._thread = ThreadPoolExecutor(1)  # starts its thread at the first call
        self._hashed = deque[Future[None]]()  # blocks that were submitted and not released

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def next_block(self) -> slice | None:
        """Implement `TarBuilder.next_block`."""
        if self.submitted == len(self.files.blocks) - 1 or not self._read(self.submitted):
            return None
        return self._rows(self.submitted)

    def submit(self) -> None:
        """Implement `TarBuilder.submit`."""
        self._hashed.append(self._thread.submit(self._hash, self.submitted))
        self.submitted += 1

    def finished_pages(self) -> memoryview:
        """Implement `TarBuilder.finished_pages`."""
        assert self.released < self.submitted, "no block was submitted"
        self._hashed[0].result()
        return self._slot(self.released)[: int(self._origins[self.released + 1] - self._origins[self.released])].data

    def release(self) -> None:
        """Implement `TarBuilder.release`."""
        self._hashed.popleft()
        self.released += 1

    def _read(self, block: int) -> bool:
        assert block - self.released < self._num_slots, "a block's memory is released before it is used again"
        files, slot, blank, origin = self.files, self._slot(block).data, self.files.blank.tobytes(), int(self._origins[block])
        for row in range(*files.blocks[block : block + 2].tolist()):
            begin, end = int(files.begins[row]) - origin, int(files.ends[row]) - origin
            size, state = _read_file(files.folder, files.paths[row], slot[begin : end + _ROOM])
            if size != end - begin:
                return False
            self.changed[row] = files.states is not None and state.encode() != files.states[row].tobytes()
            self.facts[row] = facts = facts_of(slot[begin:end])
            if not facts[0]:
                return False
            frame_sample(slot, int(files.starts[row]) - origin, blank, files.names[row], int(files.labels[row]), end - begin)
        return True

    def _hash(self, block: int) -> None:
        files, slot, origin, end = self.files, self._slot(block), int(self._origins[block]), int(self._origins[block + 1])
        rows = self._rows(block)
        first, last = int(files.starts[rows.start]) - origin, int(files.starts[rows.stop]) - origin
        slot[:first] = self.tail[:first]
        samples = BytesColumn(slot, files.begins[rows] - origin, files.ends[rows] - origin)
        self.digests[rows] = self.stream.update(slot[: end - origin].data, samples)
        self.tail[: last - (end - origin)] = slot[end - origin : last]


def _read_file(folder: int, path: bytes, room: memoryview) -> tuple[int, str]:
    """Read a file from its start; return its size, -1 if it cannot be read or is larger than the room, and its state after that."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK, dir_fd=folder)  # a FIFO does not block
    except OSError:
        return -1, ""
    try:
        size = 0
        while size < len(room) and (got := os.preadv(file, [room[size:]], size)):
            size += got
        return (size if size < len(room) else -1), local_state(os.fstat(file))
    except OSError:
        return -1, ""
    finally:
        os.close(file)


class CompiledTarBuilder(TarBuilder):
    """Reads, frames and hashes in compiled threads without the interpreter lock (`src/tar_builder.c`)."""

    def __init__(self, files: TarFiles, stream: StreamHash, tail: bytes) -> None:
        self._library, self._builder = native._library(), ctypes.c_void_p()  # C sets and clears it
        super().__init__(files, stream, tail)
        self._arguments = _arguments(self)

    def __enter__(self) -> Self:
        assert self._library is not None, "no compiled loops here"
        self._library.aecore_builder_start(ctypes.byref(self._arguments), ctypes.byref(self._builder))
        if self._builder.value is None:
            raise MemoryError("no memory or no threads to read samples with")
        return self

    def __exit__(self, *_: object) -> None:
        if self._library is not None:
            self._library.aecore_builder_stop(ctypes.byref(self._builder))

    __del__ = __exit__  # a signal that raises may come before `__enter__` or `__exit__` has ended

    def next_block(self) -> slice | None:
        """Implement `TarBuilder.next_block`."""
        return self._rows(self.submitted) if self._call("next_block") else None

    def submit(self) -> None:
        """Implement `TarBuilder.submit`."""
        self.stream.size += int(self._origins[self.submitted + 1] - self._origins[self.submitted])
        self.submitted += 1
        self._call("submit")

    def finished_pages(self) -> memoryview:
        """Implement `TarBuilder.finished_pages`."""
        assert self.released < self.submitted, "no block was submitted"
        return self._slot(self.released)[: self._call("finished_pages")].data

    def release(self) -> None:
        """Implement `TarBuilder.release`."""
        self.released += 1
        self._call("release")

    def _call(self, what: str) -> int:
        assert self._library is not None and self._builder.value is not None, "the builder has begun and has not ended"
        return int(getattr(self._library, f"aecore_builder_{what}")(self._builder))


class _Arguments(ctypes.Structure):
    """The struct `Given` of src/tar_builder.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("folder", "num_blocks", "num_slots", "slot_bytes")),
        *((name, ctypes.c_void_p) for name in ("paths", "names", "path_at", "name_at", "labels", "starts", "begins", "ends", "blocks")),
        *((name, ctypes.c_void_p) for name in ("blank", "slots", "state", "digests", "tail", "facts", "states", "changed")),
    )


def _arguments(builder: CompiledTarBuilder) -> _Arguments:
    files = builder.files
    texts = (files.paths.data, files.names.data, files.paths.begins, files.names.begins)
    columns = (files.labels, files.starts, files.begins, files.ends, files.blocks, files.blank)
    made = (builder._slots, builder.stream.state, builder.digests, builder.tail, builder.facts)
    arrays: tuple[NDArray[Any], ...] = (*texts, *columns, *made)  # any: of several dtypes
    sizes = (files.folder, len(files.blocks) - 1, builder._num_slots, builder._slot_bytes)
    states = None if files.states is None else files.states.ctypes.data
    return _Arguments(*sizes, *(array.ctypes.data for array in arrays), states, builder.changed.ctypes.data)
