"""USTAR members, byte for byte what `webdataset.TarWriter(mtime=0)` writes, many at once and without `tarfile`.

The writer packs the members of a chunk, the strict reader builds their headers again from the index and compares. Names over
100 bytes use USTAR's prefix field (webdataset writes PAX there).
"""

import mmap

import numpy as np
from numpy.typing import NDArray

from aecore.errors import DataError

BLOCK, RECORD = 512, 10240
PAGE = mmap.PAGESIZE
OWNER = b"bigdata"  # what webdataset writes as user and group
_NAME, _PREFIX, _MAX_SIZE = 100, 155, 0o77777777777
_MODE = b"0000444\0" + b"0000000\0" * 2  # mode, uid, gid
_MTIME = b"00000000000\0"
_MAGIC = b"0" + bytes(100) + b"ustar\x0000" + OWNER.ljust(32, b"\0") * 2
_SIZE_AT, _SUM_AT, _PREFIX_AT = 124, 148, 345
# a header without name and prefix, of size 0, with 8 spaces for the checksum: what they count as in its sum
_BLANK = (bytes(_NAME) + _MODE + b"0" * 11 + b"\0" + _MTIME + b" " * 8 + _MAGIC).ljust(BLOCK, b"\0")
_BLANK_SUM = sum(_BLANK)
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
    blocks[at] = np.frombuffer(_BLANK, np.uint8)
    blocks[at, :_NAME] = field
    blocks[at, _SIZE_AT : _SIZE_AT + 11] = digits
    sums = field.sum(axis=1, dtype=np.int64) + digits.sum(axis=1, dtype=np.int64) + (_BLANK_SUM - 11 * ord("0"))
    if len(max(names, key=len, default=b"")) > _NAME or sizes.max(initial=0) > _MAX_SIZE:
        _store_long(blocks, at, names, sizes)
        sums = blocks[at].sum(axis=1, dtype=np.int64)
    blocks[at, _SUM_AT : _SUM_AT + 6] = _octal(sums, _SHIFTS[5:])
    blocks[at, _SUM_AT + 6] = 0


def _octal(values: NDArray[np.int64], shifts: NDArray[np.int64]) -> NDArray[np.uint8]:
    return ((values[:, None] >> shifts & 7) + ord("0")).astype(np.uint8)


def _store_long(blocks: NDArray[np.uint8], at: NDArray[np.int64], names: list[bytes], sizes: NDArray[np.int64]) -> None:
    if sizes.max() > _MAX_SIZE:
        raise DataError(f"a member of {sizes.max()} bytes does not fit a USTAR header (8 GiB at most)")
    for row, name in zip(at.tolist(), names, strict=True):
        if len(name) > _NAME:
            prefix, short = split_name(name)
            blocks[row, :_NAME] = np.frombuffer(short.ljust(_NAME, b"\0"), np.uint8)
            blocks[row, _PREFIX_AT : _PREFIX_AT + len(prefix)] = np.frombuffer(prefix, np.uint8)


class Packer:
    """Packs files as they stand in a tar: header, bytes, zeros up to a full block.

    It gives whole pages that begin at a page, as a disk takes them without the system's cache, and keeps what is left for the next
    call. Two buffers are used in turn: fresh memory for every chunk costs as much as filling it (1 us of 2 per MNIST sample).
    """

    def __init__(self) -> None:
        self._buffer, self._other = mmap.mmap(-1, PAGE), mmap.mmap(-1, PAGE)  # maps begin at a page
        self._rest = memoryview(b"")  # of the tar after the last full page
        self._size = 0  # of the members up to now

    def __call__(self, names: list[bytes], contents: list[bytes]) -> memoryview:
        """Return the full pages that these files complete; the view is good until the call after the next."""
        sizes = np.fromiter(map(len, contents), np.int64, len(contents))
        stored = stored_size(sizes)
        begin = len(self._rest)
        starts = begin + np.cumsum(stored) - stored
        total = begin + int(stored.sum())
        self._buffer, self._other = self._other, self._buffer
        if len(self._buffer) < total:
            self._buffer = mmap.mmap(-1, total + total // 4)
        view = memoryview(self._buffer)[:total]
        view[:begin] = self._rest
        blocks = np.frombuffer(view, np.uint8).reshape(-1, BLOCK)
        blocks[(starts + stored) // BLOCK - 1] = 0  # for the padding
        _write_headers(blocks, starts // BLOCK, names, sizes)
        begins = starts + BLOCK
        for first, last, content in zip(begins.tolist(), (begins + sizes).tolist(), contents, strict=True):
            view[first:last] = content
        pages = total - total % PAGE
        self._rest = view[pages:]
        self._size += total - begin
        return view[:pages]

    def end(self) -> bytes:
        """Return the rest of the tar: what stands after the last full page, and the end of the archive."""
        return bytes(self._rest) + end_of_archive(self._size)


def different_headers(
    window: NDArray[np.uint8], names: list[bytes], begins: NDArray[np.int64], ends: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the numbers of the files whose header or padding in `window` (whole blocks) differs from what `Packer` writes.

    The contents of the files stand at `begins` to `ends` of the window; they are not looked at.
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
