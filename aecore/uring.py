"""Open and read many small files with one system call: Linux's io_uring, without a compiled extension.

Reading a file costs three calls (open, read, close), and between any two of them the interpreter is held, so a second thread gains nothing.
Here a whole batch is read while other threads compute. It is only an accelerator: `open_ring` returns None where the system is not Linux,
its kernel is older than 5.19, or it forbids this (containers often do), and what a ring does not give is read in the plain way.

Numbers, flags and layouts are those of `linux/io_uring.h`; see io_uring(7).
"""

import contextlib
import ctypes
import mmap
import os
import sys
import weakref
from typing import Any

import numpy as np

_SETUP, _ENTER, _REGISTER = 425, 426, 427  # system calls, with the same numbers on all architectures
_FEATURES = 1 << 0 | 1 << 11 | 1 << 12  # one map for both queues, silent requests, files that a linked request opens
_FEATURES_AT, _SENT_AT, _SLOTS_AT, _SEEN_AT, _TOLD_AT, _ANSWERS_AT = 5, 11, 16, 20, 21, 25  # words of the set-up's parameters
_REQUESTS_AT = 0x10000000  # offset of their map
_REGISTER_FILES, _SPARSE, _WAIT = 13, 1 << 32, 1
_OPEN, _READ = 18, 22
_REGISTERED, _LINKED, _SILENT = 1, 1 << 2, 1 << 6  # of a registered file; the next request follows it; no answer where it succeeds
_REQUEST = np.dtype(
    {
        "names": ["opcode", "flags", "fd", "address", "length", "open_flags", "number", "slot"],
        "formats": ["u1", "u1", "i4", "u8", "u4", "u4", "u8", "u4"],
        "offsets": [0, 1, 4, 16, 24, 28, 32, 44],
        "itemsize": 64,
    }
)
_ANSWER = np.dtype([("number", "u8"), ("result", "i4"), ("flags", "u4")])
_HERE = -100  # AT_FDCWD: paths are absolute, or relative to the working directory
_abandoned: list[tuple["Ring", bytes]] = []  # rings that failed while requests were under way


def open_ring(files: int, room: int, flags: int) -> "Ring | None":
    """Return a ring that reads up to `room` bytes of up to `files` files at once, opened with `flags`; None where there is no io_uring."""
    if sys.platform != "linux":
        return None
    with contextlib.suppress(OSError):
        return Ring(files, room, flags)
    return None


class Ring:
    """Reads batches of files, one batch at a time, from one thread at a time."""

    def __init__(self, files: int, room: int, flags: int) -> None:
        """OSError where the kernel does not offer what is used here."""
        self.files, self.room = files, room
        self._kernel = ctypes.CDLL(None, use_errno=True).syscall
        words: Any = (ctypes.c_uint32 * 30)()  # any: ctypes' arrays have no type of their own
        self._descriptor = self._call(_SETUP, 2 * files, words)
        weakref.finalize(self, os.close, self._descriptor)
        if words[_FEATURES_AT] & _FEATURES != _FEATURES:
            raise OSError("this kernel's io_uring cannot link the reading of a file to its opening")
        slots, answers = words[0], words[1]
        shared = mmap.mmap(self._descriptor, max(words[_SLOTS_AT] + 4 * slots, words[_ANSWERS_AT] + _ANSWER.itemsize * answers))
        requests = mmap.mmap(self._descriptor, _REQUEST.itemsize * slots, offset=_REQUESTS_AT)
        self._requests = np.frombuffer(requests, _REQUEST, 2 * files).reshape(files, 2)
        self._answers = np.frombuffer(shared, _ANSWER, answers, words[_ANSWERS_AT])
        self._slots = np.frombuffer(shared, np.uint32, slots, words[_SLOTS_AT])
        self._sent, self._seen, self._told = (np.frombuffer(shared, np.uint32, 1, words[at]) for at in (_SENT_AT, _SEEN_AT, _TOLD_AT))
        self._call(_REGISTER, self._descriptor, _REGISTER_FILES, (ctypes.c_uint64 * 4)(files | _SPARSE), 32)
        self._buffer = np.empty(files * room, np.uint8)
        self._prepare(flags)

    def _prepare(self, flags: int) -> None:
        """Write what all batches have in common: file n is opened into slot n and read into its part of the buffer."""
        numbers = np.arange(self.files)
        opening, reading = self._requests[:, 0], self._requests[:, 1]
        opening["opcode"], opening["flags"], opening["fd"], opening["open_flags"] = _OPEN, _LINKED | _SILENT, _HERE, flags
        opening["slot"] = numbers + 1  # a file that is there from the last batch is closed
        opening["number"] = numbers  # it answers only if it fails, and then the reading does not
        reading["opcode"], reading["flags"], reading["fd"], reading["length"] = _READ, _REGISTERED, numbers, self.room
        reading["address"], reading["number"] = self._buffer.ctypes.data + numbers * self.room, numbers

    def read(self, paths: bytes) -> list[bytes | None]:
        """Return up to `room` bytes of each file; None for one that cannot be opened or read. Each path ends with a zero byte.

        OSError if the kernel takes no more requests; then this ring must not be used any more.
        """
        text = np.frombuffer(paths, np.uint8)
        ends = np.flatnonzero(text == 0)
        self._requests["address"][0, 0] = text.ctypes.data
        self._requests["address"][1 : len(ends), 0] = text.ctypes.data + 1 + ends[:-1]
        view, room = self._buffer.data, self.room
        starts = range(0, len(ends) * room, room)
        return [
            view[at : at + size].tobytes() if size >= 0 else None for at, size in zip(starts, self._submit(len(ends), paths), strict=True)
        ]

    def _submit(self, count: int, paths: bytes) -> list[int]:
        """Open and read the first `count` files; return the bytes of each, or a negative error number."""
        sent, left, missing, sizes = int(self._sent[0]), 2 * count, count, np.empty(count, np.int64)
        self._slots[(sent + np.arange(left)) % len(self._slots)] = np.arange(left)
        self._sent[0] = (sent + left) % (1 << 32)
        while missing:
            try:
                left -= self._call(_ENTER, self._descriptor, left, missing, _WAIT, None, 0)
            except InterruptedError:
                pass
            except OSError:
                _abandoned.append((self, paths))  # the kernel may still write there
                raise
            seen = int(self._seen[0])
            answers = self._answers[(seen + np.arange((int(self._told[0]) - seen) % (1 << 32))) % len(self._answers)]
            self._seen[0] = (seen + len(answers)) % (1 << 32)
            sizes[answers["number"].astype(np.int64)] = answers["result"]
            missing -= len(answers)
        return sizes.tolist()

    def _call(self, *arguments: Any) -> int:  # any: what a system call takes
        answer = self._kernel(*arguments)
        if answer < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return int(answer)
