"""Read external tars: every header is parsed and checked once, members become samples by webdataset's rule, nothing is extracted.

Stricter than `tarfile`, which takes a damaged header for the end: a wrong checksum, a member beyond the end of the file or an archive
without its end are a DataError. PAX and GNU long names and sizes are understood; links, devices, sparse files and names that
leave the archive are skipped and counted. A member's name is only ever a name: no path is made of it.
"""

import errno
import gzip
import io
import os
import re
import struct
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from aecore.data.format.record import DATA_EXTENSIONS
from aecore.data.sources._inflate import InflateLimit
from aecore.data.sources._names import expand_braces
from aecore.errors import DataError, disk_error
from aecore.store import Files, absolute_url, close_read, open_files, open_regular, read_again

BLOCK, CHUNK_BYTES = 512, 1 << 20
MAX_EXTENDED_BYTES = 1 << 20  # of a PAX header or a long name
MAX_DIGITS = 20  # of a PAX size
TAR_ENDINGS = (".tar", ".tar.gz", ".tgz")
MEMBER_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)  # webdataset's: the key ends at the first dot of the last component
_KINDS = {b"1": "hard links", b"2": "symbolic links", b"3": "devices", b"4": "devices", b"6": "pipes", b"S": "sparse files"}
_EMPTY = bytes(BLOCK)
_CHECKSUM_AT = slice(148, 156)
_fields = struct.Struct("100s 8s 8s 8s 12s 12s 8s 1s 100s 6s 2s 32s 32s 8s 8s 155s 12x").unpack


class Member(NamedTuple):
    """One regular file of a tar: its name, offset and size."""

    name: str
    offset: int
    size: int


class ExternalSample(NamedTuple):
    """Members of one key by extension (lower case), at any positions in the tar."""

    key: str
    members: dict[str, Member]


class TarFile:
    """An open external tar, gzip'ed or not: `descriptor` to `pread` from, `size` in bytes. `close` it.

    A gzip'ed one is inflated to an unnamed file first, to at most `limit` bytes, the value of `option` (0: see `InflateLimit`; DataError).
    """

    def __init__(self, files: Files, name: str, limit: int = 0, option: str = "") -> None:
        self.where = f"{files.url}/{name}"
        self._files, self._name, self._limit, self._option = files, name, limit, option
        self.descriptor = read_again(self._opened, self.where)
        self.size = os.fstat(self.descriptor).st_size

    def _opened(self) -> int:
        try:
            descriptor = open_regular(self._files.local(self._name))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DataError(f"{self.where} cannot be read: {error.strerror or error}; check the address") from error
        if self._name.endswith(".tar"):
            return descriptor
        return _inflated(descriptor, self.where, InflateLimit.of(os.fstat(descriptor).st_size, self._limit, self._option))

    def close(self) -> None:
        """Close the descriptor."""
        close_read(self.descriptor)

    def read(self, member: Member) -> bytes:
        """Return the bytes of a member; DataError if the file ends early, StoreError if it cannot be read."""
        data = self._read(member.size, member.offset)
        if len(data) != member.size:
            raise DataError(f"{self.where} ends inside {member.name!r}: it changed while it was read")
        return data

    def _read(self, size: int, offset: int) -> bytes:
        """Return the bytes at `offset`, fewer only where the file ends; StoreError if it cannot be read."""
        try:
            return _pread(self.descriptor, size, offset)
        except OSError as error:
            return read_again(lambda: self._reread(size, offset), self.where, error)

    def _reread(self, size: int, offset: int) -> bytes:
        """Reopen the file, since the descriptor may be stale, and read."""
        descriptor = self._opened()
        os.dup2(descriptor, self.descriptor, inheritable=False)
        close_read(descriptor)
        return _pread(self.descriptor, size, offset)

    def samples(self, skipped: Counter[str]) -> list[ExternalSample]:
        """Return the samples in the order of their first members; skipped members are counted in `skipped`.

        Raises
        ------
        DataError
            If the tar is damaged or truncated, or two members have one name.
        """
        found: dict[str, dict[str, Member]] = {}
        for member in self.members(skipped):
            match = MEMBER_NAME.fullmatch(member.name)
            if match is None or (member.name.startswith("__") and member.name.endswith("__")):
                skipped["files without a key and an extension"] += 1
                continue
            extensions = found.setdefault(match[1], {})
            if match[2].lower() in extensions:
                raise DataError(f"{self.where} has {member.name!r} twice, and it is not known which one is meant: write the tar again")
            extensions[match[2].lower()] = member
        return [ExternalSample(key, members) for key, members in found.items()]

    def members(self, skipped: Counter[str]) -> Iterator[Member]:
        """Yield the regular files in order, with safe names; DataError if the tar is damaged or truncated."""
        position, extended = 0, dict[str, str]()  # fields that PAX and GNU headers set for the next member
        while (block := self._block(position)) != _EMPTY:
            name, size, kind = self._header(block, position)
            start = position + BLOCK
            if kind in (b"x", b"L", b"K", b"g"):
                extended |= self._extended(kind, start, size)
                position = start + size + -size % BLOCK
                continue
            size = self._extended_size(extended, size, position)
            name, is_sparse = extended.get("path", name), any(key.startswith("GNU.sparse") for key in extended)
            extended = {}
            has_data = kind not in (b"1", b"2", b"3", b"4", b"5", b"6")
            position = start + (size + -size % BLOCK if has_data else 0)
            if position > self.size or (has_data and start + size > self.size):
                raise DataError(
                    f"{self.where} is truncated: {name!r} needs bytes up to {start + size}, the file has {self.size}: restore it"
                )
            if kind in (b"0", b"\0", b"7") and not is_sparse and not name.endswith("/"):
                yield from self._safe(Member(name.removeprefix("./"), start, size), skipped)
            elif kind != b"5" and not name.endswith("/"):
                skipped["sparse files" if is_sparse else _KINDS.get(kind, f"members of type {kind!r}")] += 1
        self._after_end(position, skipped)

    def _safe(self, member: Member, skipped: Counter[str]) -> Iterator[Member]:
        if member.name.startswith("/") or ".." in member.name.split("/") or "\0" in member.name:
            skipped["members whose name leaves the archive (.. or /)"] += 1
        else:
            yield member

    def _block(self, position: int) -> bytes:
        block = self._read(BLOCK, position)
        if len(block) < BLOCK:
            raise DataError(
                f"{self.where} is truncated: it ends at byte {self.size} without the two empty blocks of a whole tar: restore it"
            )
        return block

    def _header(self, block: bytes, position: int) -> tuple[str, int, bytes]:
        """Return name, size and type of a header block; DataError if its checksum is wrong."""
        name, _, _, _, size, _, checksum, kind, _, magic, _, _, _, _, _, prefix = _fields(block)
        try:
            right = int(checksum.strip(b" \0") or b"-1", 8) == sum(block) - sum(block[_CHECKSUM_AT]) + 8 * ord(" ")
            num_bytes = int.from_bytes(size[1:], "big") if size[0] == 0x80 else int(size.strip(b" \0") or b"0", 8)
            right = right and num_bytes >= 0  # a negative size would move the position back: an endless loop
        except ValueError:
            right, num_bytes = False, 0
        if not right:
            what = "is not a tar" if position == 0 else f"is damaged at byte {position}"
            raise DataError(f"{self.where} {what} (no header with a valid checksum): restore it")
        text = _text(name)
        folder = _text(prefix) if magic == b"ustar\0" else ""
        return (f"{folder}/{text}" if folder else text), num_bytes, kind

    def _extended(self, kind: bytes, start: int, size: int) -> dict[str, str]:
        """Return the fields that a PAX or GNU header sets for the next member; a global header may not set a name or size."""
        if size > MAX_EXTENDED_BYTES or start + size > self.size:
            raise DataError(f"{self.where} has a header of {size} bytes at byte {start}: it is damaged or truncated: restore it")
        data = self._read(size, start)
        if kind == b"L":
            return {"path": _text(data)}
        found = {} if kind == b"K" else self._pax(data, start)
        if kind == b"g" and {"path", "size"} & found.keys():
            raise DataError(f"{self.where} gives all its members one name or size at byte {start}: it is damaged or hostile")
        return {} if kind == b"g" else found

    def _extended_size(self, extended: dict[str, str], size: int, position: int) -> int:
        text = extended.get("size", "")
        if len(text) > MAX_DIGITS:
            raise DataError(f"{self.where} has a damaged PAX header at byte {position}: it states a size of {len(text)} digits: restore it")
        return int(text) if text.isdecimal() else size

    def _pax(self, data: bytes, start: int) -> dict[str, str]:
        found: dict[str, str] = {}
        while data:
            length, _, rest = data.partition(b" ")
            size = int(length) if length.isdigit() and len(length) < 8 else 0
            record = data[len(length) + 1 : size - 1]
            if not rest or not len(length) + 2 < size <= len(data) or b"=" not in record or data[size - 1 : size] != b"\n":
                raise DataError(f"{self.where} has a damaged PAX header at byte {start}: restore it")
            key, _, value = record.partition(b"=")
            found[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
            data = data[size:]
        return found

    def _after_end(self, position: int, skipped: Counter[str]) -> None:
        try:
            position = os.lseek(self.descriptor, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole up to the end, which would be read for minutes
                return
        while piece := self._read(CHUNK_BYTES, position):
            if piece.count(0) != len(piece):
                skipped[f"bytes after the end of the archive {self.where}"] += self.size - position
                return
            position += len(piece)


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _pread(descriptor: int, size: int, offset: int) -> bytes:
    """Return `size` bytes, fewer only at the end of the file: a single `pread` may return fewer."""
    data = os.pread(descriptor, size, offset)
    while data and len(data) < size and (more := os.pread(descriptor, size - len(data), offset + len(data))):
        data += more
    return data


def _inflated(descriptor: int, where: str, limit: InflateLimit) -> int:
    """Return the descriptor of an unnamed file with the inflated bytes; `descriptor` is closed."""
    with (
        os.fdopen(descriptor, "rb") as packed,
        gzip.GzipFile(fileobj=packed) as stream,
        tempfile.TemporaryFile(buffering=0) as file,  # unbuffered: its end writes nothing, so that only `_append` can fail
    ):
        size = 0
        try:
            while piece := stream.read(CHUNK_BYTES):
                size += len(piece)
                limit.require(size, f"{where} inflates to")
                _append(file, piece, where)
        except (zlib.error, gzip.BadGzipFile, EOFError) as error:
            raise DataError(f"{where} is damaged or truncated: its gzip data cannot be inflated ({error}): restore it") from error
        return os.dup(file.fileno())


def _append(file: io.FileIO, piece: bytes, where: str) -> None:
    """Write all of `piece`; StoreError, not an OSError: to read the source again would not help."""
    try:
        while piece:
            piece = piece[file.write(piece) :]
    except OSError as error:
        raise disk_error(f"cannot inflate {where} in {tempfile.gettempdir()} (TMPDIR): {error.strerror or error}", error) from error


@dataclass(frozen=True)
class ExternalTars:
    """External tars, by their names below `files`; `others` counts the other files there."""

    files: Files
    names: tuple[str, ...]
    others: int = 0

    @classmethod
    def at(cls, url: str, what: str = "source.url") -> "ExternalTars":
        """Return the tars of a folder (with all below it), of one file, or of a pattern such as `shards/{00000..00009}.tar`.

        DataError if there is none; the files of a pattern are checked when they are opened.
        """
        where = absolute_url(url, what)
        if where.endswith(TAR_ENDINGS):
            folder = where.partition("{")[0].rpartition("/")[0]
            return cls(open_files(folder or "/"), tuple(expand_braces(where[len(folder) + 1 :])))
        files = open_files(where)
        sizes = files.sizes()
        names = sorted(name for name in sizes if name.endswith(TAR_ENDINGS))
        if not names:
            raise DataError(f"{files.url} holds no .tar, .tar.gz or .tgz file: check the address")
        return cls(files, tuple(names), len(sizes) - len(names))

    @classmethod
    def named(cls, url: str, names: tuple[str, ...]) -> "ExternalTars":
        """Return the tars with these names."""
        return cls(open_files(url), names)

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each tar; DataError if one is missing."""
        known = self.files.sizes()
        for name in self.names:
            if name not in known:
                raise DataError(f"{self.files.url}/{name} does not exist: check the address")
        return {name: known[name] for name in self.names}


def data_member(sample: ExternalSample, wanted: str, where: str, option: str = "source.member") -> tuple[str, Member] | None:
    """Return codec and member of a sample's image or array, None if it has none; DataError if it is ambiguous.

    `wanted` is the extension to take (`seg.png`; its last part is the codec), "" the only one of the allow-list.
    """
    if wanted:
        member = sample.members.get(wanted)
        return None if member is None else (wanted.rpartition(".")[2], member)
    found = [ext for ext in sample.members if ext in DATA_EXTENSIONS]
    if len(found) > 1:
        raise DataError(f"{where}: sample {sample.key!r} has the images {', '.join(found)}: choose one with {option}=<extension>")
    return (found[0], sample.members[found[0]]) if found else None
