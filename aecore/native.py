"""The innermost loops of shards: hash many samples, read many files, pack a tar. In C where that was built, else in Python.

`native_c` is compiled when the package is installed, if there is a C compiler, and runs on x86-64 Linux with SHA instructions. It gives the
same bytes as Python does and is called without holding the interpreter, so threads do work at once. `available()` says whether it is
used; AECORE_NATIVE=0 leaves it out.
"""

import ctypes
import hashlib
import os
import platform
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

VERSION = 8  # of native.h, which has it too: a library that was built from another one is not used
FACTS = np.dtype([("kind", "u1"), ("detail", "V3"), ("width", "u4"), ("height", "u4")])
_BLOCK = 64  # bytes of a block of sha256
_MOST_ROWS = 1 << 16  # bytes of a small image's filtered rows
_START = np.array([0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19], np.uint32)

Bytes = NDArray[np.uint8]
Int64s = NDArray[np.int64]


class Processor(NamedTuple):
    """What /proc/cpuinfo calls this machine's processor: its maker (`GenuineIntel`, `AuthenticAMD`) and name; "" where it does not say."""

    vendor: str
    name: str


@cache
def processor() -> Processor:
    """Return the maker and the name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0].splitlines()
    except OSError:  # not Linux
        return Processor("", platform.processor() or platform.machine())
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return Processor(found.get("vendor_id", ""), found.get("model name", "") or platform.machine())


def available() -> bool:
    """Return whether the compiled loops are used."""
    return _library() is not None


def built() -> bool:
    """Return whether they were compiled when the package was installed."""
    return _path() is not None


def _path() -> Path | None:
    paths = [Path(__file__).with_name(f"_native{suffix}") for suffix in EXTENSION_SUFFIXES]
    return next((path for path in paths if path.is_file()), None)


@cache
def _library() -> Any | None:  # any: a shared library's functions have no types
    path = _path()
    if path is None or os.environ.get("AECORE_NATIVE") == "0":
        return None
    try:
        library = ctypes.CDLL(str(path))
        for function in ("aecore_native", "aecore_read_pieces", "aecore_list", "aecore_run_read", "aecore_run_hashed"):
            getattr(library, function).restype = ctypes.c_int64
        if library.aecore_native() != VERSION:
            return None
        _describe(library)
    except (OSError, AttributeError):  # a damaged file, or one for another system
        return None
    return library


def _describe(library: Any) -> None:  # any: as above
    data, numbers, labels, words, facts = (np.ctypeslib.ndpointer(kind, flags="C") for kind in ("u1", "i8", "i4", "u4", FACTS))
    number, text = ctypes.c_int64, ctypes.c_char_p
    library.aecore_sha256.argtypes = [words, data, number, data, numbers, numbers, number, data]
    library.aecore_list.argtypes = [ctypes.c_int, data, data, number, numbers, numbers, number]
    library.aecore_examine.argtypes = [data, numbers, numbers, number, facts]
    library.aecore_read_pieces.argtypes = [ctypes.c_int, numbers, number, data, numbers, numbers]
    library.aecore_decode_pngs.argtypes = [ctypes.c_void_p, data, numbers, numbers, number, data, number, number, number, data]
    library.aecore_run_start.argtypes, library.aecore_run_start.restype = [ctypes.c_void_p, ctypes.c_void_p], None
    for function in ("read", "accept", "hashed", "give_back", "stop"):
        getattr(library, f"aecore_run_{function}").argtypes = [ctypes.c_void_p]
    library.aecore_pack.argtypes = [data, data, text, data, numbers, numbers, labels, number]


class StreamHash:
    """The sha256 of a stream of whole blocks of 64 bytes, and of messages beside it.

    Both at once take little longer than one of them where the compiled loops are used.
    """

    def __init__(self) -> None:
        self.size = 0
        self._library = _library()
        self._plain = hashlib.sha256()
        self.state = _START.copy()  # of the compiled loops

    def update(self, stream: bytes | memoryview, data: Bytes, begins: Int64s, ends: Int64s) -> Bytes:
        """Append whole blocks to the stream; return the sha256 of each message `data[begin:end]` as `[n, 32]`."""
        assert len(stream) % _BLOCK == 0, "only whole blocks are hashed"
        _require_inside(data, begins, ends)
        self.size += len(stream)
        digests = np.empty((len(begins), 32), np.uint8)
        if self._library is None:
            self._plain.update(stream)
            for digest, begin, end in zip(digests, begins.tolist(), ends.tolist(), strict=True):
                digest.data[:] = hashlib.sha256(data.data[begin:end]).digest()
            return digests
        blocks = np.frombuffer(stream, np.uint8)
        self._library.aecore_sha256(self.state, blocks, len(blocks) // _BLOCK, data, begins, ends, len(begins), digests)
        return digests

    def append(self, stream: bytes) -> None:
        """Append whole blocks to the stream."""
        self.update(stream, *_NOTHING)

    def hexdigest(self) -> str:
        """Return the hash of the stream up to now."""
        if self._library is None:
            return self._plain.hexdigest()
        state, padding = self.state.copy(), b"\x80" + bytes(_BLOCK - 9) + (8 * self.size).to_bytes(8, "big")
        self._library.aecore_sha256(state, np.frombuffer(padding, np.uint8), 1, *_NOTHING, 0, np.zeros(0, np.uint8))
        return state.astype(">u4").tobytes().hex()


_NOTHING = np.zeros(0, np.uint8), np.zeros(0, np.int64), np.zeros(0, np.int64)


def sha256s(data: bytes | memoryview | Bytes, begins: Int64s, ends: Int64s) -> Bytes:
    """Return the sha256 of each `data[begin:end]` as `[n, 32]`."""
    return StreamHash().update(b"", np.frombuffer(data, np.uint8), begins, ends)


def read_pieces(file: int, offsets: Int64s, sizes: Int64s) -> tuple[Bytes, Int64s, Int64s]:
    """Return a buffer with the `sizes` bytes at each of `offsets` of a file, and where each piece begins and ends there.

    A piece ends early where the file does. OSError if it cannot be read.
    """
    ends = np.cumsum(sizes)
    begins, library = ends - sizes, _library()
    buffer = np.empty(int(ends[-1]) if len(ends) else 0, np.uint8)
    if library is not None:
        error = library.aecore_read_pieces(file, np.ascontiguousarray(offsets), len(offsets), buffer, begins, ends)
        if error:
            raise OSError(error, os.strerror(error))
        return buffer, begins, ends
    for row, (offset, begin, end) in enumerate(zip(offsets.tolist(), begins.tolist(), ends.tolist(), strict=True)):
        while begin < end and (got := os.preadv(file, [buffer.data[begin:end]], offset)):
            begin, offset = begin + got, offset + got
        ends[row] = begin
    return buffer, begins, ends


def list_folder(folder: int) -> dict[str, int] | None:
    """Return the bytes of each regular file of the folder with this descriptor by its name, -1 for everything else in it, sorted by bytes.

    None if it cannot be read. Only where `available()`.
    """
    library, most = _library(), 1 << 14
    assert library is not None, "no compiled loops here"
    while True:
        (joined, room), (order, sizes) = np.empty((2, 64 * most), np.uint8), np.empty((2, most), np.int64)
        length = library.aecore_list(folder, joined, room, len(joined), order, sizes, most)
        if length == -2:
            return None
        if length >= 0:
            names = os.fsdecode(joined[:length].tobytes()).split("\0")[:-1]
            return dict(zip(names, sizes[: len(names)].tolist(), strict=True))
        most *= 8


def examine(data: Bytes, begins: Int64s, ends: Int64s) -> NDArray[Any]:  # any: structured
    """Return `FACTS` of each file `data[begin:end]`: kind 0 is for `data.image` to look at, files of other equal facts have equal headers.

    What `native_run.Run` finds of files on the way, for bytes at hand: tests compare it with `data.image`. Only where `available()`.
    """
    facts, library = np.empty(len(begins), FACTS), _library()
    assert library is not None, "no compiled loops here"
    _require_inside(data, begins, np.maximum(begins, ends))  # one that was not read ends before it begins
    library.aecore_examine(data, begins, ends, len(begins), facts)
    return facts


def decode_pngs(data: Bytes, begins: Int64s, ends: Int64s, pixels: Bytes) -> NDArray[np.bool_]:
    """Decode small PNGs `data[begin:end]` of 8 bits into `pixels` `[n, H, W, C]`; return which were.

    The others, none where there are no compiled loops or no zlib, are for a decoder that knows more; their pixels are undefined.
    """
    count, height, width, channels = pixels.shape
    library, uncompress, done = _library(), _uncompress(), np.zeros(len(begins), np.uint8)
    assert count == len(begins), "every image has a place"
    _require_inside(data, begins, ends)
    if library is not None and uncompress and 1 <= channels <= 4 and 0 < height * (width * channels + 1) <= _MOST_ROWS:
        library.aecore_decode_pngs(uncompress, data, begins, ends, count, pixels, height, width, channels, done)
    return done.astype(np.bool_)


@cache
def _uncompress() -> int | None:
    """Return the address of zlib's `uncompress`: every Linux that Pillow or imagecodecs run on has this library."""
    try:
        return ctypes.cast(ctypes.CDLL("libz.so.1").uncompress, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


def _require_inside(data: Bytes, begins: Int64s, ends: Int64s) -> None:
    """Nothing reaches the compiled loops that leads them out of the buffer."""
    if len(begins) != len(ends) or (len(begins) and not (begins.min() >= 0 and (begins <= ends).all() and ends.max() <= len(data))):
        raise AssertionError("messages lie inside the buffer and end after they begin")  # no `assert`: it must hold under -O too


def pack_samples(target: Bytes, blank: Bytes, names: bytes, data: Bytes, begins: Int64s, ends: Int64s, labels: NDArray[np.int32]) -> None:
    """Write the tar members of samples into `target`, which has their size; `data.tar` says which. Only where `available()`."""
    library = _library()
    assert library is not None, "no compiled loops here"
    _require_inside(data, begins, ends)
    library.aecore_pack(target, blank, names, data, begins, ends, labels, len(begins))
