"""USTAR members, byte for byte what `webdataset.TarWriter(mtime=0)` writes, many at once and without `tarfile`.

The writer packs the members of a chunk; the strict reader rebuilds their headers from the index and compares. Names over
100 bytes use USTAR's prefix field (webdataset writes PAX there).
"""

import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aecore.errors import DataError
from aecore.native.bytes_column import BytesColumn
from aecore.native.loops import pack_samples

BLOCK, RECORD = 512, 10240
PAGE = mmap.PAGESIZE
OWNER = b"bigdata"  # what webdataset writes as user and group
_NAME, _PREFIX = 100, 155
MAX_MEMBER_BYTES = 0o77777777777  # 8 GiB - 1: what a USTAR header can hold
_MODE = b"0000444\0" + b"0000000\0" * 2  # mode, uid, gid
_MTIME = b"00000000000\0"
_MAGIC = b"0" + bytes(100) + b"ustar\x0000" + OWNER.ljust(32, b"\0") * 2
_SIZE_AT, _SUM_AT, _PREFIX_AT = 124, 148, 345
# a header without name and prefix, of size 0, with 8 spaces for the checksum: what they count as in its sum
BLANK = np.frombuffer((bytes(_NAME) + _MODE + b"0" * 11 + b"\0" + _MTIME + b" " * 8 + _MAGIC).ljust(BLOCK, b"\0"), np.uint8)
_BLANK_SUM = int(BLANK.sum(dtype=np.int64))
_PADDING = np.where(np.arange(BLOCK) >= np.arange(BLOCK)[:, None], 255, 0).astype(np.uint8).view(np.uint64)  # [n]: the bytes from n on
_SHIFTS = np.arange(30, -3, -3)  # of the 11 octal digits of a size, the last 6 are those of a checksum


def headers(names: list[bytes], sizes: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Return the header blocks `[N, 512]` of N files; DataError if no USTAR header can hold a name or size."""
    blocks = np.empty((len(names), BLOCK), np.uint8)
    _write_headers(blocks, np.arange(len(names)), names, sizes)
    return blocks


def _write_headers(blocks: NDArray[np.uint8], at: NDArray[np.int64], names: list[bytes], sizes: NDArray[np.int64]) -> None:
    field = np.array(names, f"S{_NAME}").view(np.uint8).reshape(-1, _NAME)  # cuts long names
    digits = _octal(sizes, _SHIFTS)
    blocks[at] = BLANK
    blocks[at, :_NAME] = field
    blocks[at, _SIZE_AT : _SIZE_AT + 11] = digits
    sums = field.sum(axis=1, dtype=np.int64) + digits.sum(axis=1, dtype=np.int64) + (_BLANK_SUM - 11 * ord("0"))
    if len(max(names, key=len, default=b"")) > _NAME or sizes.max(initial=0) > MAX_MEMBER_BYTES:
        _store_long(blocks, at, names, sizes)
        sums = blocks[at].sum(axis=1, dtype=np.int64)
    blocks[at, _SUM_AT : _SUM_AT + 6] = _octal(sums, _SHIFTS[5:])
    blocks[at, _SUM_AT + 6] = 0


def _octal(values: NDArray[np.int64], shifts: NDArray[np.int64]) -> NDArray[np.uint8]:
    return ((values[:, None] >> shifts & 7) + ord("0")).astype(np.uint8)


def _store_long(blocks: NDArray[np.uint8], at: NDArray[np.int64], names: list[bytes], sizes: NDArray[np.int64]) -> None:
    if sizes.max() > MAX_MEMBER_BYTES:
        raise DataError(f"a member of {sizes.max()} bytes does not fit a USTAR header (8 GiB at most)")
    for row, name in zip(at.tolist(), names, strict=True):
        if len(name) > _NAME:
            prefix, short = split_name(name)
            blocks[row, :_NAME] = np.frombuffer(short.ljust(_NAME, b"\0"), np.uint8)
            blocks[row, _PREFIX_AT : _PREFIX_AT + len(prefix)] = np.frombuffer(prefix, np.uint8)


@dataclass(frozen=True, slots=True)
class Samples:
    """n samples to pack: keys, extensions (of each, or one of all), contents, class ids (-1: none)."""

    keys: list[str]
    exts: list[str]
    contents: BytesColumn
    labels: NDArray[np.int32] | None = None

    def size(self) -> int:
        """Return the bytes that the members take in the tar."""
        return int(stored_size(self.contents.sizes).sum()) + 2 * BLOCK * int((self.ids() >= 0).sum())

    def ids(self) -> NDArray[np.int32]:
        """Return the class ids, -1 for all samples where there are none."""
        return np.full(len(self.keys), -1, np.int32) if self.labels is None else self.labels

    def members(self) -> tuple[list[bytes], list[bytes]]:
        """Return names and contents of the members: data, and where there is a label its digits as `.cls`; by extension."""
        names, contents = list[bytes](), list[bytes]()
        exts = self.exts * len(self.keys) if len(self.exts) == 1 else self.exts
        for key, ext, data, label in zip(self.keys, exts, self.contents, self.ids().tolist(), strict=True):
            members = [(ext, data)] + ([("cls", b"%d" % label)] if label >= 0 else [])
            for member, content in sorted(members):
                names.append(f"{key}.{member}".encode())
                contents.append(content)
        return names, contents

    def plain(self, names: str) -> bool:
        """Return whether no name, of those joined in `names`, and no size needs more than the plain fields of a header."""
        return plain_names(self.keys, self.exts, names) and bool(self.contents.sizes.max(initial=0) <= MAX_MEMBER_BYTES)


def joined_names(keys: list[str], exts: list[str]) -> str:
    """Return the names of the data members of samples, each ended by a zero byte; a single extension applies to all."""
    if len(exts) == 1:
        end = f".{exts[0]}\0"
        return end.join(keys) + end if keys else ""
    return "".join([f"{key}.{ext}\0" for key, ext in zip(keys, exts, strict=True)])


def plain_names(keys: list[str], exts: list[str], names: str) -> bool:
    """Return whether all names of the members of samples, joined in `names`, fit the plain field of a header."""
    longest = max(map(len, keys), default=0) + max(map(len, {*exts, "cls"})) + 1
    return longest <= _NAME and names.isascii() and names.count("\0") == len(keys)


def plain_sizes(sizes: NDArray[np.int64], exts: Sequence[str]) -> bool:
    """Return whether names of data members of these sizes, which end in one of the extensions, and those of `cls` fit the plain field."""
    longer = max(len("cls") - min(map(len, exts)), 0)
    return int(sizes.max(initial=0)) + longer <= _NAME


class TarPacker:
    """Packs samples into the bytes of a tar: header, data, zeros up to a full block.

    A call returns whole, page-aligned pages, as direct I/O needs them, and keeps the remainder for the next call. Two buffers alternate:
    fresh memory for every chunk costs as much as filling it.

    Attributes
    ----------
    size : int
        Bytes of all members so far. A caller that writes members itself updates `size` and `rest`.
    rest : bytes
        Bytes of the tar after its last full page.
    """

    def __init__(self) -> None:
        self._buffer, self._other = mmap.mmap(-1, PAGE), mmap.mmap(-1, PAGE)  # maps begin at a page
        self.rest: bytes | memoryview = b""
        self.size = 0

    def __call__(self, samples: Samples) -> memoryview:
        """Return the full pages that these samples complete; the view is valid until the call after the next."""
        begin, size = len(self.rest), samples.size()
        total = begin + size
        self._buffer, self._other = self._other, self._buffer
        if len(self._buffer) < total:
            self._buffer = mmap.mmap(-1, total + total // 4)
        view = memoryview(self._buffer)[:total]
        view[:begin] = self.rest
        _fill(np.frombuffer(view, np.uint8)[begin:], samples)
        pages = total - total % PAGE
        self.rest = view[pages:]
        self.size += size
        return view[:pages]

    def end(self) -> bytes:
        """Return the rest of the tar: the bytes after the last full page, and the end of the archive."""
        return bytes(self.rest) + end_of_archive(self.size)


def _fill(target: NDArray[np.uint8], samples: Samples) -> None:
    """Fill `target` with the members of the samples."""
    if samples.plain(names := joined_names(samples.keys, samples.exts)):
        pack_samples(target, BLANK, names.encode(), samples.contents, samples.ids())
        return
    names_of, contents = samples.members()
    sizes = np.fromiter(map(len, contents), np.int64, len(contents))
    stored = stored_size(sizes)
    starts = np.cumsum(stored) - stored
    blocks, begins = target.reshape(-1, BLOCK), starts + BLOCK
    blocks[(starts + stored) // BLOCK - 1] = 0  # for the padding
    _write_headers(blocks, starts // BLOCK, names_of, sizes)
    for first, last, content in zip(begins.tolist(), (begins + sizes).tolist(), contents, strict=True):
        target.data[first:last] = content


def different_headers(
    window: NDArray[np.uint8], names: list[bytes], begins: NDArray[np.int64], ends: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the indices of the files whose header or padding in `window` (whole blocks) differs from what `TarPacker` writes.

    The contents of the files, `begins` to `ends` of the window, are not compared.
    """
    blocks = window.view(np.uint64).reshape(-1, BLOCK // 8)  # eight bytes are compared at once
    wrong = np.bitwise_or.reduce(blocks[begins // BLOCK - 1] ^ headers(names, ends - begins).view(np.uint64), axis=1)
    padded = np.flatnonzero(ends % BLOCK)
    last = ends[padded]
    wrong[padded] |= np.bitwise_or.reduce(blocks[last // BLOCK] & _PADDING[last % BLOCK], axis=1)
    return np.flatnonzero(wrong)


def split_name(name: bytes) -> tuple[bytes, bytes]:
    """Return prefix and name as USTAR stores a name over 100 bytes (the shortest prefix that fits)."""
    at = name.find(b"/")
    while at >= 0:
        if at <= _PREFIX and len(name) - at - 1 <= _NAME:
            return name[:at], name[at + 1 :]
        at = name.find(b"/", at + 1)
    raise DataError(f"the name {name!r} does not fit a USTAR header: components of at most {_NAME} bytes, {_PREFIX + _NAME + 1} in all")


def stored_size(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the bytes that members of `sizes` data bytes take, header and padding included."""
    return BLOCK + sizes + -sizes % BLOCK


def end_of_archive(size: int) -> bytes:
    """Return the zero bytes that end a tar whose members take `size` bytes: two blocks, filled up to a record of 10,240 bytes."""
    return bytes(2 * BLOCK + (-(size + 2 * BLOCK) % RECORD))
