"""Hash many samples, read many pieces, list a folder, examine many images, decode small PNGs, pack samples: each in C or in Python.

Both give the same results. Functions that may leave items undone return which; the caller handles these with slower, complete code.
"""

import ctypes
import hashlib
import os
import struct
import threading
import zlib
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from aecore import native
from aecore.native import FACTS
from aecore.native.bytes_column import Bytes, BytesColumn, Int64s
from aecore.store import STATE_BYTES, local_state

_BLOCK = 64  # bytes of a block of sha256
_buffers = threading.local()
_TAR_BLOCK = 512
_MOST_ROWS = 1 << 16  # bytes of a small image's filtered rows
_START = np.array([0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19], np.uint32)
_NOTHING = BytesColumn(np.zeros(0, np.uint8), np.zeros(0, np.int64), np.zeros(0, np.int64))
_UNKNOWN = (0, bytes(3), 0, 0)
_ORIENTATION = 0x0112  # tag of EXIF
_EXIF_VALUES = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i"}  # type of a field -> its format
_PNG_START = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"


class StreamHash:
    """The sha256 of a stream of whole blocks of 64 bytes, and of messages that are hashed together with it.

    With the compiled loops both together take little longer than one of them.
    """

    def __init__(self) -> None:
        self.size = 0
        self._library = native._library()
        self._plain = hashlib.sha256()
        self.state = _START.copy()  # of the compiled loops

    def update(self, stream: bytes | memoryview, messages: BytesColumn) -> Bytes:
        """Append whole blocks to the stream; return the sha256 of each message as `[n, 32]`."""
        assert len(stream) % _BLOCK == 0, "only whole blocks are hashed"
        messages.require_inside()
        self.size += len(stream)
        digests = np.empty((len(messages), 32), np.uint8)
        if self._library is None:
            self._plain.update(stream)
            view = messages.data.data
            for digest, begin, end in zip(digests, messages.begins.tolist(), messages.ends.tolist(), strict=True):
                digest.data[:] = hashlib.sha256(view[begin:end]).digest()
            return digests
        blocks = np.frombuffer(stream, np.uint8)
        places = messages.data, messages.begins, messages.ends
        self._library.aecore_sha256(self.state, blocks, len(blocks) // _BLOCK, *places, len(messages), digests)
        return digests

    def append(self, stream: bytes | memoryview) -> None:
        """Append whole blocks to the stream."""
        self.update(stream, _NOTHING)

    def hexdigest(self) -> str:
        """Return the hash of the stream so far."""
        if self._library is None:
            return self._plain.hexdigest()
        state, padding = self.state.copy(), b"\x80" + bytes(_BLOCK - 9) + (8 * self.size).to_bytes(8, "big")
        nothing = _NOTHING.data, _NOTHING.begins, _NOTHING.ends
        self._library.aecore_sha256(state, np.frombuffer(padding, np.uint8), 1, *nothing, 0, np.zeros(0, np.uint8))
        return state.astype(">u4").tobytes().hex()


def sha256s(messages: BytesColumn) -> Bytes:
    """Return the sha256 of each message as `[n, 32]`."""
    return StreamHash().update(b"", messages)


def read_pieces(file: int, offsets: Int64s, sizes: Int64s) -> BytesColumn:
    """Return the `sizes` bytes at each of `offsets` of a file. A piece ends early where the file does. OSError if it cannot be read."""
    ends = np.cumsum(sizes)
    begins, library = ends - sizes, native._library()
    buffer = np.empty(int(ends[-1]) if len(ends) else 0, np.uint8)
    if library is not None:
        error = library.aecore_read_pieces(file, np.ascontiguousarray(offsets), len(offsets), buffer, begins, ends)
        if error:
            raise OSError(error, os.strerror(error))
        return BytesColumn(buffer, begins, ends)
    for row, (offset, begin, end) in enumerate(zip(offsets.tolist(), begins.tolist(), ends.tolist(), strict=True)):
        while begin < end and (got := os.preadv(file, [buffer.data[begin:end]], offset)):
            begin, offset = begin + got, offset + got
        ends[row] = begin
    return BytesColumn(buffer, begins, ends)


class Entries(NamedTuple):
    """What is in a folder, n names sorted by their bytes: of a regular file its size, state and when it was changed last (ns).

    Of everything else the size is -1 and the state dashes. `joined` are the names, each ended by a zero byte, `characters` the states,
    `[n, STATE_BYTES + 1]` with a zero at the end.
    """

    joined: bytes
    sizes: Int64s
    characters: NDArray[np.uint8]
    changed: Int64s

    @property
    def names(self) -> list[str]:
        """The n names."""
        return os.fsdecode(self.joined).split("\0")[:-1]

    @property
    def states(self) -> list[str]:
        """The n states."""
        return self.characters.tobytes().decode("ascii").split("\0")[:-1]


def list_folder(folder: int) -> Entries:
    """Return what is in the folder with this descriptor; OSError if it cannot be read."""
    library = native._library()
    while library is not None:
        joined, _, order, sizes, changed, states = buffers = _listing_buffers(1 << 14)
        length = library.aecore_list(folder, *buffers[:2], len(joined), order, sizes, changed, states, len(order))
        if length >= 0:
            count = int(np.count_nonzero(joined[:length] == 0))
            return Entries(joined[:length].tobytes(), sizes[:count].copy(), states[:count].copy(), changed[:count].copy())
        if length == -2:
            break  # Python raises the error
        _listing_buffers(8 * len(order))
    with os.scandir(folder) as entries:
        rows = sorted((os.fsencode(entry.name), _regular(entry)) for entry in entries)
    states_of = "".join(("-" * STATE_BYTES if state is None else local_state(state)) + "\0" for _, state in rows)
    return Entries(
        b"".join(name + b"\0" for name, _ in rows),
        np.array([-1 if state is None else state.st_size for _, state in rows], np.int64),
        np.frombuffer(states_of.encode(), np.uint8).reshape(-1, STATE_BYTES + 1),
        np.array([0 if state is None else max(state.st_mtime_ns, state.st_ctime_ns) for _, state in rows], np.int64),
    )


def _listing_buffers(most: int) -> tuple[Any, ...]:  # any: arrays of several dtypes
    """Return the arrays for a folder of `most` names or more, the same in a thread: clearing new ones costs half the time."""
    found: tuple[Any, ...] | None = getattr(_buffers, "of_listing", None)
    if found is None or len(found[2]) < most:
        texts, numbers = np.empty((2, 128 * most), np.uint8), np.empty((3, most), np.int64)
        found = _buffers.of_listing = (*texts, *numbers, np.empty((most, STATE_BYTES + 1), np.uint8))
    return found


def _regular(entry: os.DirEntry[str]) -> os.stat_result | None:
    try:
        return entry.stat(follow_symlinks=False) if entry.is_file(follow_symlinks=False) else None
    except FileNotFoundError:  # deleted since the folder was read
        return None


def examine(files: BytesColumn) -> NDArray[Any]:  # any: structured
    """Return `FACTS` of each file; kind 0 needs `data.format.image`, files with other equal facts have equal headers."""
    facts, library = np.empty(len(files), FACTS), native._library()
    places = files.begins, np.maximum(files.begins, files.ends)  # the end of one that was not read is before its begin
    BytesColumn(files.data, *places).require_inside()
    if library is not None:
        library.aecore_examine(files.data, *places, len(files), facts)
        return facts
    view = files.data.data
    for row, (begin, end) in enumerate(zip(*(place.tolist() for place in places), strict=True)):
        facts[row] = facts_of(view[begin:end])
    return facts


def facts_of(file: memoryview) -> tuple[int, bytes, int, int]:
    """Return the facts of one file, like image.c."""
    if len(file) >= 8 and file[0] == 0x89:
        return _png_facts(file)
    return _jpeg_facts(file) if len(file) >= 8 and file[:2].tobytes() == b"\xff\xd8" else _UNKNOWN


def _png_facts(file: memoryview) -> tuple[int, bytes, int, int]:
    """Return the facts of a PNG whose chunks match their checksums up to IEND and include an IDAT."""
    at, has_pixels, transparent, colours = 8, False, 0, 0
    if len(file) < 33 or file[:16] != _PNG_START:
        return _UNKNOWN
    while at + 12 <= len(file):
        end = at + 8 + int.from_bytes(file[at : at + 4], "big")
        if end + 4 > len(file) or zlib.crc32(file[at + 4 : end]) != int.from_bytes(file[end : end + 4], "big"):
            return _UNKNOWN
        name = file[at + 4 : at + 8].tobytes()
        if name == b"PLTE" and not (colours or has_pixels or (end - at - 8) % 3):
            colours = (end - at - 8) // 3
        if name == b"tRNS":
            transparent, length = 1, end - at - 8
            if has_pixels or not {0: length == 2, 2: length == 6, 3: 0 < length <= colours}.get(file[25], False):
                return _UNKNOWN
        has_pixels = has_pixels or name == b"IDAT"
        if name in (b"eXIf", b"acTL"):
            return _UNKNOWN
        text = file[at + 8 : end].tobytes() if name in (b"iTXt", b"tEXt", b"zTXt") else b""
        if text.startswith(b"Raw profile type exif\0"):
            return _UNKNOWN
        if text.startswith(b"XML:com.adobe.xmp\0") and (text[18:19] != b"\0" or _turns(text)):  # packed, or says it
            return _UNKNOWN
        if name == b"IEND":
            width, height = (int.from_bytes(file[place : place + 4], "big") for place in (16, 20))
            return (1, bytes([file[24], file[25], transparent]), width, height) if has_pixels else _UNKNOWN
        at = end + 4
    return _UNKNOWN


def _jpeg_facts(file: memoryview) -> tuple[int, bytes, int, int]:
    """Return the facts of a JPEG with one frame header before a scan that has an end marker after it; it holds one picture."""
    at, found, orientation = 2, _UNKNOWN, 0
    while at + 4 <= len(file):
        start, marker, length = file[at], file[at + 1], int.from_bytes(file[at + 2 : at + 4], "big")
        if start == marker == 0xFF:  # a fill byte
            at += 1
            continue
        if start != 0xFF or marker < 0xC0 or 0xD0 <= marker <= 0xD9 or length < 2:
            return _UNKNOWN
        segment = file[at + 4 : at + 2 + length].tobytes()
        if marker == 0xDA:
            if not found[0] or length < 3 or at + 2 + length > len(file) or file[at:].tobytes().rfind(b"\xff\xd9") < 0:
                return _UNKNOWN
            if found[1][0] != 0xC2 and segment[0] != found[1][2]:  # a scan of each component: there may be many
                return _UNKNOWN
            return found[0], found[1][:2] + bytes([found[1][2] | (orientation & 15) << 4]), *found[2:]
        if marker == 0xE1 and not orientation and segment.startswith(b"Exif\0\0"):
            orientation = exif_orientation(segment[6:])
        if marker == 0xE1 and segment.startswith(b"http://ns.adobe.com/xap/1.0/\0") and _turns(segment):
            return _UNKNOWN
        if marker == 0xE2 and segment.startswith(b"MPF\0"):
            return _UNKNOWN
        if marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if found[0] or at + 10 > len(file) or file[at + 9] > 15:
                return _UNKNOWN
            height, width = (int.from_bytes(file[place : place + 2], "big") for place in (at + 5, at + 7))
            found = (2, bytes([marker, file[at + 4], file[at + 9]]), width, height)
        at += 2 + length
    return _UNKNOWN


def exif_orientation(block: bytes, missing: int = 1) -> int:
    """Return the orientation, 1 to 8, of an EXIF block (a TIFF header and its first directory); 1 where it says one that does not exist.

    `missing` is that of a block that has none, or is damaged before it.
    """
    while block.startswith(b"Exif\0\0"):  # some write it twice
        block = block[6:]
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(block[:4])
    try:
        if order is None:
            return missing
        at = struct.unpack_from(f"{order}I", block, 4)[0]
        for entry in range(at + 2, at + 2 + 12 * struct.unpack_from(f"{order}H", block, at)[0], 12):
            tag, kind = struct.unpack_from(f"{order}HH", block, entry)
            if tag == _ORIENTATION:
                value = struct.unpack_from(f"{order}{_EXIF_VALUES[kind]}", block, entry + 8)[0]
                return int(value) if 1 <= value <= 8 else 1
    except (struct.error, KeyError):  # cut or damaged
        pass
    return missing


def _turns(xmp: bytes) -> bool:
    """Return whether an XMP packet says an orientation that is not 1, like image.c: which one counts is left to `data.format`."""
    at = xmp.find(b"tiff:Orientation")
    while at >= 0:
        after = xmp[at + 16 : at + 19]
        if after[:2] == b'="' and after[2:].isdigit():
            return after[2:] != b"1"
        if after[:1] == b">" and after[1:2].isdigit():
            return after[1:2] != b"1"
        at = xmp.find(b"tiff:Orientation", at + 1)
    return False


def decode_pngs(files: BytesColumn, pixels: Bytes, *, as_stored: bool = False) -> NDArray[np.bool_]:
    """Decode small PNGs of 8 bits into `pixels` `[n, H, W, C]`; return which were decoded, as bools `[n]`.

    Those with transparency or an orientation in chunks of their own are left out, unless `as_stored` says that these do not count.
    The pixels of the others (all, without compiled loops or zlib) are undefined: use a complete decoder for them.
    """
    count, height, width, channels = pixels.shape
    library, uncompress, done = native._library(), _uncompress(), np.zeros(len(files), np.uint8)
    assert count == len(files), "one row of pixels for each file"
    files.require_inside()
    if library is not None and uncompress and 1 <= channels <= 4 and 0 < height * (width * channels + 1) <= _MOST_ROWS:
        places = files.data, files.begins, files.ends
        library.aecore_decode_pngs(uncompress, *places, count, pixels, height, width, channels, as_stored, done)
    return done.astype(np.bool_)


def plain_jpegs(files: BytesColumn, height: int, width: int, channels: int) -> NDArray[np.uint8]:
    """Return the frame marker (0xC0 baseline, 0xC2 progressive, ...) of each JPEG of 8 bits and this size that EXIF does not turn.

    The others, which need another look, have 0: all of them, without compiled loops.
    """
    found = np.zeros(len(files), np.uint8)
    if native._library() is None:
        return found
    rows = np.flatnonzero(files.ends - files.begins >= 2)
    begins = files.begins[rows]
    rows = rows[(files.data[begins] == 0xFF) & (files.data[begins + 1] == 0xD8)]
    if len(rows):
        facts = examine(files.take(rows))
        marker, bits, packed = facts.view(np.uint8).reshape(-1, FACTS.itemsize)[:, 1:4].T  # `detail`: the last byte has two numbers
        plain = (facts["kind"] == 2) & (marker <= 0xC2) & (bits == 8) & (packed & 15 == channels) & (packed >> 4 <= 1)
        found[rows] = np.where(plain & (facts["height"] == height) & (facts["width"] == width), marker, 0)
    return found


@cache
def _uncompress() -> int | None:
    """Return the address of zlib's `uncompress`: every Linux that runs Pillow or imagecodecs has this library."""
    try:
        return ctypes.cast(ctypes.CDLL("libz.so.1").uncompress, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


def pack_samples(target: Bytes, blank: Bytes, names: bytes, files: BytesColumn, labels: NDArray[np.int32]) -> None:
    """Write the tar members of samples into `target`, which has their size, in the format of `data.format.tar`.

    `names` are the zero-terminated names of the data members, with an extension and at most 96 bytes; `blank` is a header without name
    and size. A sample with a non-negative label also has a member `cls`.
    """
    library = native._library()
    files.require_inside()
    if library is not None:
        library.aecore_pack(target, blank, names, files.data, files.begins, files.ends, labels, len(files))
        return
    at, view, source, header = 0, target.data, files.data.data, bytes(blank)
    places = zip(names.split(b"\0")[:-1], files.begins.tolist(), files.ends.tolist(), labels.tolist(), strict=True)
    for name, begin, end, label in places:
        data_at, stop = frame_sample(view, at, header, name, label, end - begin)
        view[data_at : data_at + end - begin] = source[begin:end]
        at = stop


def frame_sample(target: memoryview, at: int, blank: bytes, name: bytes, label: int, size: int) -> tuple[int, int]:
    """Write a sample whose first header is at `at`, except its `size` bytes of data; return their offset and the end of the sample.

    As in tar.c: members are sorted by extension, and a non-negative label adds the member `cls`.
    """
    stem, _, ext = name.rpartition(b".")
    stored = _TAR_BLOCK + size + -size % _TAR_BLOCK
    if label < 0:
        _frame_member(target, at, blank, name, size)
        return at + _TAR_BLOCK, at + stored
    cls, digits = stem + b".cls", b"%d" % label
    cls_at, data_at = (at, at + 2 * _TAR_BLOCK) if ext > b"cls" else (at + stored, at)
    _frame_member(target, cls_at, blank, cls, len(digits))
    target[cls_at + _TAR_BLOCK : cls_at + _TAR_BLOCK + len(digits)] = digits
    _frame_member(target, data_at, blank, name, size)
    return data_at + _TAR_BLOCK, at + stored + 2 * _TAR_BLOCK


def _frame_member(target: memoryview, at: int, blank: bytes, name: bytes, size: int) -> None:
    octal = b"%011o" % size
    checksum = sum(name) + sum(octal) + _fixed_sum(blank)
    target[at : at + _TAR_BLOCK] = name + blank[len(name) : 124] + octal + blank[135:148] + b"%06o\0" % checksum + blank[155:]
    padding = -size % _TAR_BLOCK
    end = at + _TAR_BLOCK + size
    target[end : end + padding] = bytes(padding)


@cache
def _fixed_sum(blank: bytes) -> int:
    """Return the part of a header's checksum that is independent of name and size; cached: summing is half the work."""
    return sum(blank) - sum(blank[124:135])
