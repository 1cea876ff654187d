"""An open external tar: every header is parsed and checked once, nothing is extracted.

Stricter than `tarfile`, which takes a damaged header for the end: a wrong checksum or a member beyond the end of the file is a
`BrokenTar`. PAX and GNU long names and sizes are understood, and tars joined by `cat` are read to the last one. A tar without its end
blocks (its writer was not closed) is read, and counted: it cannot be known whether it is whole. Headers are only ever names and
numbers: no path is made of them, and no link is followed here.
"""

import contextlib
import errno
import io
import os
import re
import struct
import tarfile
from collections.abc import Callable, Iterator
from typing import IO, NamedTuple, TypeVar, cast
from zlib import adler32

import numpy as np

from aecore.data.format.foreign import what_it_is
from aecore.data.sources._inflate import InflateLimit
from aecore.data.sources._skipped import Skipped
from aecore.data.sources._unpack import CHUNK_BYTES, START_BYTES, compression, inflate
from aecore.errors import DataError
from aecore.store import Files, close_read, read_again

BLOCK = 512
MAX_EXTENDED_BYTES = 1 << 20  # of a PAX header or a long name
MAX_DIGITS = 20  # of a PAX size
WINDOW_BYTES, NEAR_BYTES = 1 << 16, 1 << 13  # of small members many are read at once, a tenth of the time
LARGEST_READ = 1 << 30  # Linux reads at most 2 GiB at once
MAX_HEADERS = 32  # before a sparse member: the standard library recurses for each, and writers need up to 4
MAX_MAP_BYTES = 1 << 22  # of a sparse member's headers and its map of holes: some 300,000 of them
_EMPTY, _HOLE = bytes(BLOCK), bytes(1 << 20)
FILES, _WITHOUT_DATA, _EXTENDING = (
    frozenset(kinds) for kinds in ((b"0", b"\0", b"7"), (b"1", b"2", b"3", b"4", b"5", b"6"), (b"x", b"X", b"L", b"K", b"g"))
)
_LINKS = frozenset((b"1", b"2"))
_FIELDS = frozenset(("path", "linkpath", "size", "GNU.sparse.name"))  # of PAX headers
_OF_MEMBER, _SPARSE, _DIGITS = "member", "GNU.sparse", "digits"  # what else is known of headers: they are of the next member, sparse,
_MANY_DIGITS = re.compile(rb"(?<![0-9])[0-9]{65}")  # and have such a number, for which the standard library needs time as its square
_DAMAGED = (tarfile.TarError, ValueError, OverflowError, TypeError, RecursionError)  # what `tarfile` raises for headers that are
T = TypeVar("T")
SPARSE, UNREADABLE = b"S", b"S!"  # the second is no type of tar
_CHECKSUM_AT = slice(148, 156)
_MAGIC_AT = 257
_fields = struct.Struct("100s 8s 8s 8s 12s 12s 8s 1s 100s 6s 2s 32s 32s 8s 8s 155s 12x").unpack


class BrokenTar(DataError):
    """A tar that is damaged or truncated, so that what is in it is not known."""


class Member(NamedTuple):
    """One regular file of a tar: its name, offset and size; of a sparse one the offset of its headers and the size with its holes."""

    name: str
    offset: int
    size: int
    sparse: bool = False


class Entry(NamedTuple):
    """One header: name, place of its data, type, target if it is a link, number of the joined tar it is in.

    Of a sparse file place and size are those of its `Member`; of one that cannot be read (`UNREADABLE`) the target says why.
    """

    name: str
    offset: int
    size: int
    kind: bytes
    target: str
    part: int

    @property
    def is_file(self) -> bool:
        """Whether it is a regular file, sparse or not."""
        return self.kind in FILES or self.kind == SPARSE


class TarFile:
    """An open external tar, compressed or not: `descriptor` to `pread` from, `size` in bytes. `close` it.

    A compressed one (by its first bytes) is inflated to an unnamed file first, to at most `limit` bytes, the value of `option` (0: see
    `InflateLimit`; DataError). `broken` says why it could not be inflated to its end, "" if it could. `stamp` is equal while the file
    was not written again.
    """

    def __init__(self, files: Files, name: str, limit: int = 0, option: str = "") -> None:
        self.where = f"{files.url}/{name}"
        self.compression: str | None = None
        self.broken = ""
        self.stamp = 0, 0, 0
        self._files, self._name, self._limit, self._option = files, name, limit, option
        self._window, self._end = (b"", 0), 0  # the last bytes read by `_near` and where they begin, where the last piece ended
        self.descriptor = read_again(self._opened, self.where)
        self.size = os.fstat(self.descriptor).st_size

    def _opened(self) -> int:
        try:
            descriptor = self._files.open(self._name)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DataError(f"{self.where} cannot be read: {error.strerror or error}; check the address") from error
        try:
            self.compression = compression(os.pread(descriptor, START_BYTES, 0))
            self._found = os.fstat(descriptor)
            self.stamp = self._found.st_size, self._found.st_mtime_ns, self._found.st_ino
        except BaseException:
            close_read(descriptor)
            raise
        if self.compression is None:
            return descriptor
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            inflated, self.broken = inflate(file, self.compression, self.where, self.limit())
            self._found = os.fstat(descriptor)
        return inflated

    def state(self) -> str | None:
        """Return the state of the tar, as it is after what was read of it (of a compressed one, after it was inflated)."""
        return self._files.state(self._name, self._found if self.compression else os.fstat(self.descriptor))

    def limit(self) -> InflateLimit:
        """Return how many bytes its members may become where holes are filled and links resolved: as many as a compressed tar may."""
        return InflateLimit.of(self._found.st_size, self._limit, self._option)

    def close(self) -> None:
        """Close the descriptor."""
        close_read(self.descriptor)

    def read(self, member: Member) -> bytes:
        """Return the bytes of a member; DataError if the file ends early, StoreError if it cannot be read. Threads may share it."""
        if member.sparse:
            return self._again(lambda: self._whole(member))
        data = (self._near if member.size < NEAR_BYTES else self._read)(member.size, member.offset)
        if len(data) != member.size:
            raise DataError(f"{self.where} ends inside {member.name!r}: it changed while it was read")
        return data

    def _near(self, size: int, offset: int) -> bytes:
        """Return the bytes as `_read` does; small pieces that follow one another come from one larger read."""
        window, begin = self._window
        at = offset - begin
        if not 0 <= at <= len(window) - size:
            follows = 0 <= offset - self._end < NEAR_BYTES
            window, at = self._read(WINDOW_BYTES if follows else size, offset), 0
            self._window = window, offset
        self._end = offset + size
        return window[at : at + size]

    def _read(self, size: int, offset: int) -> bytes:
        """Return the bytes at `offset`, fewer only where the file ends; StoreError if it cannot be read."""
        return self._again(lambda: _pread(self.descriptor, size, offset))

    def _again(self, read: Callable[[], T]) -> T:
        """Return `read()`; after an OSError the file is opened anew first, since its descriptor may be stale."""
        try:
            return read()
        except OSError as error:
            return read_again(lambda: self._reopened(read), self.where, error)

    def _reopened(self, read: Callable[[], T]) -> T:
        descriptor = self._opened()
        os.dup2(descriptor, self.descriptor, inheritable=False)
        close_read(descriptor)
        return read()

    def entries(self, skipped: Skipped, *, joined: bool = True) -> Iterator[Entry]:
        """Yield all headers in order, but those of folders; BrokenTar if the tar is damaged or truncated.

        Without `joined` (the rules of version 1), the first archive of several that were joined is read, and the others are counted.
        """
        position: int | None = 0
        part, first, headers = 0, None, 0
        extended = dict[str, str]()  # fields that PAX and GNU headers set for the next member
        while position is not None:
            block = self._near(BLOCK, position)
            if block == _EMPTY or (len(block) < BLOCK and not block.strip(b"\0")):  # the end, or the missing end
                self._require_complete(position, block, extended, skipped)
                position, part, extended = self._next_part(position, skipped, joined=joined), part + 1, {}
                first, headers = None, 0
                continue
            name, size, kind, target = self._header(block, position)
            start = position + BLOCK
            first = position if first is None else first
            if kind in _EXTENDING:
                extended |= self._extended(kind, start, size)
                headers += 1
                position = start + size + -size % BLOCK
                continue
            if kind == b"S":
                start = self._after_map(start, sparse=block)
            if extended:
                size = self._extended_size(extended, size, position)
                name, target = extended.get("path") or name, extended.get("linkpath") or target  # an empty field sets nothing (POSIX)
                if _SPARSE in extended:
                    name, kind = extended.get("GNU.sparse.name", name), b"S"
            if kind in _WITHOUT_DATA:
                size = 0
            if start + size > self.size:
                raise self._broken(f"is truncated: {name!r} needs bytes up to {start + size}, the file has {self.size}")
            position = start + size + -size % BLOCK
            if kind == SPARSE:
                why = f"{headers} headers set its name and size, at most {MAX_HEADERS} are read" if headers > MAX_HEADERS else ""
                why = why or ("its headers have a number of more than 64 digits" if _DIGITS in extended else "")
                start, (size, target) = first, (0, why) if why else self._sparse(first, size)
                kind = UNREADABLE if target else SPARSE
            first, headers, extended = None, 0, {}
            if kind != b"5" and not name.endswith("/"):
                yield Entry(name.removeprefix("./"), start, size, kind, target, part)
        if self.broken:
            raise self._broken(self.broken)

    @contextlib.contextmanager
    def _unpacked(self, first: int) -> Iterator[tarfile.TarInfo]:
        """Give the member whose headers begin at `first` to the standard library, which knows all three formats of sparse files.

        It reads the headers and the map, as long as that says it is, but at most `MAX_MAP_BYTES`.
        """
        file = io.BufferedReader(_At(self.descriptor, first, first + MAX_MAP_BYTES))
        with tarfile.TarFile(fileobj=cast(IO[bytes], file)) as tar:  # the stubs know fewer files than `tarfile` takes
            info = tar.next()
            if info is None:
                raise tarfile.ReadError("no member")
            yield info

    def _map(self, first: int) -> tuple[int, list[tuple[int, int]]]:
        """Return the size of a sparse file with its holes, and the place and size of each piece of data in it."""
        with self._unpacked(first) as info:
            return info.size, [(int(at), int(length)) for at, length in cast(list[tuple[int, int]], info.sparse)]

    def _sparse(self, first: int, stored: int) -> tuple[int, str]:
        """Return the size of a sparse file with its holes (`stored` bytes without), and why it cannot be read ("": it can)."""
        try:
            size, pieces = self._again(lambda: self._map(first))
        except _DAMAGED as error:
            return 0, f"its map of holes is damaged or has more than {MAX_MAP_BYTES} bytes: {error}"
        ends = [0, *(end for at, length in pieces if length for end in (at, at + length)), size]
        if ends != sorted(ends) or sum(length for _, length in pieces) > stored:
            return 0, "its map of holes is damaged"
        limit = self.limit()
        return (size, "") if size <= limit.most else (0, f"with its holes it has {size} bytes, more than {limit.why}")

    def _whole(self, member: Member) -> bytes:
        """Return the bytes of a sparse file with zeros in its holes."""
        pieces, end = list[bytes](), 0  # joined: `extractfile` would hold all bytes three times
        try:
            with self._unpacked(member.offset) as info:
                place = info.offset_data
                known = [piece for piece in cast(list[tuple[int, int]], info.sparse) if piece[1]]
                for at, length in [*known, (member.size, 0)]:
                    whole, rest = divmod(min(at, member.size) - end, len(_HOLE))
                    pieces += [*[_HOLE] * whole, _HOLE[:rest], _pread(self.descriptor, min(length, member.size), place)]
                    place, end = place + length, at + length
        except _DAMAGED as error:
            raise DataError(f"{self.where} is damaged at {member.name!r}: {error}; restore it") from error
        data = b"".join(pieces)
        if len(data) != member.size or end != member.size:
            raise DataError(f"{self.where} has other bytes at {member.name!r}: it changed while it was read")
        return data

    def _broken(self, what: str) -> BrokenTar:
        """Return the error; that compressed data could not be inflated is the first reason for anything that is wrong."""
        return BrokenTar(f"{self.where} {f'is damaged or truncated: {self.broken}' if self.broken else what}: restore it")

    def _require_complete(self, position: int, block: bytes, extended: dict[str, str], skipped: Skipped) -> None:
        """BrokenTar if the tar is cut where it cannot end; a tar without its end blocks is counted."""
        if not self.size:
            raise self._broken("is truncated: it is empty")
        if _OF_MEMBER in extended:
            raise self._broken(f"is truncated: it ends at byte {self.size} inside a member's headers")
        if len(block) < BLOCK and not self.broken:  # zeros after a member are its padding or one of the end blocks
            what = "tar(s) without end blocks, whose writer was not closed or was stopped: it is not known whether they are whole"
            skipped.add(what, self.where, kept=True)

    def _next_part(self, position: int, skipped: Skipped, *, joined: bool) -> int | None:
        """Return where the next of several joined tars begins, after the zeros from `position` on; None if there is none."""
        at = self._first_byte(position)
        if at is None:
            return None
        if joined and self._is_header(self._read(BLOCK, at)):
            return at
        if joined and (later := self._later_header(at)) is not None:
            raise self._broken(f"is damaged at byte {at}: no header with a valid checksum, and another member at byte {later}")
        skipped.add("tar(s) with bytes after their end", f"{self.where}: {self.size - at}")
        return None

    def _first_byte(self, position: int) -> int | None:
        """Return the first block from `position` on that is not all zeros."""
        try:
            position = os.lseek(self.descriptor, position, os.SEEK_DATA) & -BLOCK
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole up to the end, which would be read for minutes
                return None
        size = BLOCK  # first: of thousands of joined tars each has few zeros
        while piece := self._read(size, position):
            if piece.count(0) != len(piece):
                return position + len(piece) - len(piece.lstrip(b"\0")) & -BLOCK
            position, size = position + len(piece), min(2 * size, CHUNK_BYTES)
        return None

    def _later_header(self, position: int) -> int | None:
        """Return the first block from `position` on that is a header of a tar."""
        while len(piece := self._read(CHUNK_BYTES, position)) >= BLOCK:
            blocks = np.frombuffer(piece[: len(piece) & -BLOCK], np.uint8).reshape(-1, BLOCK)
            magic = blocks[:, _MAGIC_AT : _MAGIC_AT + 5] == np.frombuffer(b"ustar", np.uint8)
            for row in np.flatnonzero(magic.all(axis=1)).tolist():
                if self._is_header(blocks[row].tobytes()):
                    return position + BLOCK * row
            position += len(piece)
        return None

    def _is_header(self, block: bytes) -> bool:
        try:
            self._header(block, 0)
        except BrokenTar:
            return False
        return True

    def _header(self, block: bytes, position: int) -> tuple[str, int, bytes, str]:
        """Return name, size, type and target of a header block; BrokenTar if its checksum is wrong."""
        if len(block) < BLOCK:
            known = what_it_is(block) if position == 0 else ""
            raise self._broken(f"is truncated: it ends at byte {self.size} inside a header{known}")
        name, _, _, _, size, _, checksum, kind, target, magic, _, _, _, _, _, prefix = _fields(block)
        try:
            right = _is_sum_of(block, int(checksum.strip(b" \0") or b"-1", 8))
            num_bytes = int.from_bytes(size[1:], "big") if size[0] == 0x80 else int(size.strip(b" \0") or b"0", 8)
            right = right and num_bytes >= 0  # a negative size would move the position back: an endless loop
        except ValueError:
            right, num_bytes = False, 0
        if not right:
            what, known = ("is not a tar", what_it_is(block)) if position == 0 else (f"is damaged at byte {position}", "")
            raise self._broken(f"{what} (no header with a valid checksum{known})")
        text = _text(name)
        folder = _text(prefix) if prefix[0] and magic == b"ustar\0" else ""
        return (f"{folder}/{text}" if folder else text), num_bytes, kind, _text(target) if kind in _LINKS else ""

    def _after_map(self, start: int, sparse: bytes) -> int:
        """Return where the data of a sparse file in GNU's old format begin: after the blocks that continue its map."""
        goes_on = sparse[482]
        while goes_on and start < self.size:
            goes_on = (self._read(BLOCK, start) or _EMPTY).ljust(BLOCK, b"\0")[504]
            start += BLOCK
        return start

    def _extended(self, kind: bytes, start: int, size: int) -> dict[str, str]:
        """Return the fields that a PAX or GNU header sets for the next member; a global header may not set a name or size."""
        if size > MAX_EXTENDED_BYTES or start + size > self.size:
            raise self._broken(f"has a header of {size} bytes at byte {start}: it is damaged or truncated")
        data = self._read(size, start)
        if kind in (b"L", b"K"):
            return {_OF_MEMBER: "", "path" if kind == b"L" else "linkpath": _text(data)}
        found = self._pax(data, start)
        if kind == b"g" and {"path", "linkpath", "size"} & found.keys():
            raise BrokenTar(f"{self.where} gives all its members one name or size at byte {start}: it is damaged or hostile")
        digits = {_DIGITS: ""} if _MANY_DIGITS.search(data) else {}
        if kind == b"g":
            return digits
        sparse = {_SPARSE: ""} if any(key.startswith(_SPARSE) for key in found) else {}
        return {_OF_MEMBER: "", **{key: found[key] for key in _FIELDS & found.keys()}, **sparse, **digits}  # others may be of any size

    def _extended_size(self, extended: dict[str, str], size: int, position: int) -> int:
        text = extended.get("size", "")
        if len(text) > MAX_DIGITS:
            raise self._broken(f"has a damaged PAX header at byte {position}: it states a size of {len(text)} digits")
        if text and not (text.isascii() and text.isdigit()):
            raise self._broken(f"has a damaged PAX header at byte {position}: it states a size of {text!r}")
        return int(text) if text else size

    def _pax(self, data: bytes, start: int) -> dict[str, str]:
        found: dict[str, str] = {}
        at = 0
        while at < len(data):
            length, _, rest = data[at : at + 9].partition(b" ")
            size = int(length) if length.isdigit() and len(length) < 8 else 0
            record = data[at + len(length) + 1 : at + size - 1]
            if not rest or not len(length) + 2 < size <= len(data) - at or b"=" not in record or data[at + size - 1] != ord("\n"):
                raise self._broken(f"has a damaged PAX header at byte {start}")
            key, _, value = record.partition(b"=")
            found[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
            at += size
        return found


def _is_sum_of(block: bytes, checksum: int) -> bool:
    """Return whether this is the sum of a header's bytes with its checksum as spaces, or that of the signed bytes of old programs."""
    halves = (adler32(block[:256]) & 0xFFFF) + (adler32(block[256:]) & 0xFFFF) - 2  # exact below 65521, in a sixth of the time of `sum`
    excess = halves - sum(block[_CHECKSUM_AT]) + 8 * ord(" ") - checksum
    return excess == 0 or (
        excess > 0 and excess == 256 * sum(byte > 127 for byte in block[: _CHECKSUM_AT.start] + block[_CHECKSUM_AT.stop :])
    )


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _pread(descriptor: int, size: int, offset: int) -> bytes:
    """Return `size` bytes, fewer only at the end of the file: a single `pread` may return fewer."""
    data = os.pread(descriptor, size if size < LARGEST_READ else LARGEST_READ, offset)
    if len(data) == size or not data:
        return data
    del data  # read again into one object of the whole size: to add up pieces takes twice the memory
    return io.BufferedReader(_At(descriptor, offset)).read(size)


class _At(io.RawIOBase):
    """A file at a position of its own, which is not shared with other readers of the descriptor; closing it does not close that."""

    def __init__(self, descriptor: int, position: int, end: int | None = None) -> None:
        self._descriptor, self._position, self._end = descriptor, position, end

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: os.fstat(self._descriptor).st_size}[whence]
        if position < 0:
            raise ValueError(f"a position of {position}")
        self._position = position
        return position

    def readinto(self, buffer: "bytearray | memoryview") -> int:  # type: ignore[override]  # of the buffers that `BufferedReader` passes
        most = LARGEST_READ if self._end is None else min(LARGEST_READ, max(0, self._end - self._position))
        got = os.preadv(self._descriptor, [memoryview(buffer)[:most]], self._position)
        self._position += got
        return got
