"""USTAR members, byte for byte what `webdataset.TarWriter(mtime=0)` writes, from templates instead of `tarfile`.

A member is five byte strings whose join is header + data + padding; the writer joins many of them at once, the strict reader
builds them again from the index and compares. Names over 100 bytes use USTAR's prefix field (webdataset writes PAX there).
"""

import zlib

from aecore.errors import DataError

BLOCK, RECORD = 512, 10240
OWNER = b"bigdata"  # what webdataset writes as user and group
_NAME, _PREFIX = 100, 155
_MODE = b"0000444\0" + b"0000000\0" * 2  # mode, uid, gid
_MTIME = b"00000000000\0"
_MAGIC = b"0" + bytes(100) + b"ustar\x0000" + OWNER.ljust(32, b"\0") * 2
_PADS = tuple(bytes(-rest % BLOCK) for rest in range(BLOCK))
_CACHE = 1 << 14

Member = tuple[bytes, bytes, bytes, bytes, bytes]
_sizes: dict[int, tuple[bytes, int]] = {}
_tails: dict[int, bytes] = {}


def _size_field(size: int) -> tuple[bytes, int]:
    """Return the bytes from mode to mtime, and the sum of all header bytes but name, prefix and checksum's own digits."""
    if size > 0o77777777777:
        raise DataError(f"a member of {size} bytes does not fit a USTAR header (8 GiB at most)")
    field = _MODE + b"%011o\0" % size + _MTIME
    if len(_sizes) >= _CACHE:
        _sizes.clear()
    # 8 spaces stand for the checksum in its own sum; adler32's low half is 1 + the sum of the name, hence the -1
    _sizes[size] = found = (field, sum(field) + sum(_MAGIC) + 8 * 32 - 1)
    return found


def _tail(total: int) -> bytes:
    tail = _tails[total] = (b"%06o\0 " % total + _MAGIC).ljust(BLOCK - 148, b"\0")
    return tail


def member(name: bytes, data: bytes) -> Member:
    """Return header (in three pieces), data and padding of the file `name`; DataError if no USTAR header can hold the name."""
    size = len(data)
    if len(name) > _NAME:
        return _long_member(name, data)
    field, base = _sizes.get(size) or _size_field(size)
    total = base + (zlib.adler32(name) & 0xFFFF)
    return name.ljust(_NAME, b"\0"), field, _tails.get(total) or _tail(total), data, _PADS[size % BLOCK]


def _long_member(name: bytes, data: bytes) -> Member:
    prefix, short = split_name(name)
    field, base = _size_field(len(data))
    total = base + 1 + sum(short) + sum(prefix)
    tail = b"%06o\0 " % total + _MAGIC
    tail = tail.ljust(345 - 148, b"\0") + prefix.ljust(BLOCK - 345, b"\0")
    return short.ljust(_NAME, b"\0"), field, tail, data, _PADS[len(data) % BLOCK]


def split_name(name: bytes) -> tuple[bytes, bytes]:
    """Return prefix and name as USTAR stores a name over 100 bytes (the shortest prefix that fits)."""
    at = name.find(b"/")
    while at >= 0:
        if at <= _PREFIX and len(name) - at - 1 <= _NAME:
            return name[:at], name[at + 1 :]
        at = name.find(b"/", at + 1)
    raise DataError(f"the name {name!r} does not fit a USTAR header: components of at most {_NAME} bytes, {_PREFIX + _NAME + 1} in all")


def stored_size(size: int) -> int:
    """Return the bytes that a member of `size` data bytes takes, header and padding included."""
    return BLOCK + size + (-size % BLOCK)


def end_of_archive(size: int) -> bytes:
    """Return the zero bytes that end a tar whose members take `size` bytes: two blocks, filled up to a record of 10,240 bytes."""
    return bytes(2 * BLOCK + (-(size + 2 * BLOCK) % RECORD))
