"""Arrays in external files: `.npy`, `.npz` and idx (plain or gzip'ed), mapped into memory. Nothing is ever unpickled.

Only the rows that are read come from the disk, and all workers of a machine share them. Compressed data is inflated once per
process to an unnamed temporary file (never more bytes than its header promises and `InflateLimit` allows), and mapped from there.
Samples are read row by row instead (`ArrayFile.rows`): an error of the disk is then an OSError, where a map ends the process (SIGBUS).
"""

import contextlib
import errno
import gzip
import math
import os
import tempfile
import weakref
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from aecore.data.format.foreign import what_it_is
from aecore.data.format.record import NpyError, read_npy_header
from aecore.data.sources._inflate import InflateLimit
from aecore.data.sources._names import array_format
from aecore.data.sources._npz import DAMAGED_ZIP
from aecore.data.sources._skipped import first_of
from aecore.errors import DataError
from aecore.store import open_regular

Array = NDArray[Any]  # any: every array has its own dtype
CHUNK_BYTES, HEAD_BYTES = 1 << 20, 1 << 10
_IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_DAMAGED = (ValueError, SyntaxError, KeyError, TypeError, RecursionError, MemoryError)


class Rows(Protocol):
    """Rows by number: an array, or `StoredRows`."""

    @property
    def dtype(self) -> np.dtype[Any]: ...  # any: every array has its own dtype
    @property
    def shape(self) -> tuple[int, ...]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, row: int, /) -> Any: ...  # any: as above


class _Stored(NamedTuple):
    """An array in an open file whose descriptor it owns; its values begin at byte `start`.

    `found` is what was known of a compressed file when it had been inflated to the open one; None: that is the file itself.
    """

    descriptor: int
    dtype: np.dtype[Any]  # any: as above
    shape: tuple[int, ...]
    fortran: bool
    start: int
    found: os.stat_result | None = None


class StoredRows:
    """The rows of an array in C order in an open file, which is closed with this object."""

    def __init__(self, stored: _Stored) -> None:
        self._stored = stored
        self._row_bytes = math.prod(stored.shape[1:]) * stored.dtype.itemsize
        weakref.finalize(self, os.close, stored.descriptor)

    def found(self) -> os.stat_result:
        """Return what is known of the file after rows were read."""
        return os.fstat(self._stored.descriptor) if self._stored.found is None else self._stored.found

    @property
    def dtype(self) -> np.dtype[Any]:  # any: as above
        return self._stored.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self._stored.shape

    def __len__(self) -> int:
        return self._stored.shape[0]

    def __getitem__(self, row: int, /) -> Array:
        """Return a row; OSError if it cannot be read or the file has become shorter."""
        if not 0 <= row < len(self):
            raise IndexError(row)
        buffer, position = bytearray(self._row_bytes), self._stored.start + row * self._row_bytes
        left = memoryview(buffer)
        while left:
            got = os.preadv(self._stored.descriptor, [left], position)
            if not got:
                raise OSError(errno.EIO, f"the file ends inside row {row}: it has become shorter")
            position, left = position + got, left[got:]
        return np.frombuffer(buffer, self.dtype).reshape(self.shape[1:])


class ArrayFile:
    """The arrays of one file by name ("" where the format has no names).

    Parameters
    ----------
    path : Path
        Its local path.
    name : str
        Its name in errors, which also decides the format.
    limit : int
        Bytes that compressed data may inflate to, the value of `option`; 0: see `InflateLimit`.
    option : str
        The name of the option in errors, if there is one.
    """

    def __init__(self, path: Path, name: str, limit: int = 0, option: str = "") -> None:
        self._path, self._name, self._limit, self._option = path, name, limit, option
        self._format = array_format(name)

    def names(self) -> list[str]:
        """Return the names of all arrays; DataError if the file is damaged."""
        if self._format != "npz":
            return [""]
        with self._zip() as archive:
            found = [info.filename[:-4] for info in archive.infolist() if info.filename.endswith(".npy")]
        twice = [name for name, count in Counter(found).items() if count > 1]
        if twice:
            raise self._error(f"holds arrays of one name ({first_of(twice)}): save it again with np.savez, each array by its own name")
        return found

    def array(self, name: str, *, verify: bool = False) -> Array:
        """Return one array, read only; with `verify` every byte is read first, and a member of an `.npz` is compared with its CRC.

        Raises
        ------
        DataError
            If the file is damaged, shorter than its header promises, inflates beyond the limit or holds Python objects.
        OSError
            If it cannot be read.
        """
        return self._mapped(self._stored(name, verify=verify), name)

    def rows(self, name: str) -> tuple[Rows, Callable[[], os.stat_result]]:
        """Return the rows of one array, to be read one by one, and what is then known of the file; DataError and OSError as `array`.

        An array in Fortran order is mapped, since its rows are not contiguous.
        """
        stored = self._stored(name, verify=False)
        if not stored.fortran and 0 not in stored.shape:
            rows = StoredRows(stored)
            return rows, rows.found
        opened = StoredRows(stored._replace(descriptor=os.dup(stored.descriptor)))  # to look at it: a map gives no descriptor
        return self._mapped(stored, name), opened.found

    def _stored(self, name: str, *, verify: bool) -> _Stored:
        with self._reported():
            if self._format == "npz":
                return self._member(name, verify=verify)
            with self._file() as file:
                if self._name.endswith(".gz"):
                    return self._gzipped_idx(file)
                size = os.fstat(file.fileno()).st_size
                if verify:
                    _drain(self._file())
                return (self._npy if self._format == "npy" else self._idx)(file, size)

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except (*DAMAGED_ZIP, OSError) as error:
            if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # of the disk: none of bz2; a seek before the file
                raise
            with self._file() as file:
                head = file.read(HEAD_BYTES)
            known = "" if head.startswith((b"PK", b"\x1f\x8b")) else what_it_is(head)
            raise self._error(f"is damaged or cannot be read ({type(error).__name__}: {error}{known}): restore it") from error

    def _error(self, what: str, array: str = "") -> DataError:
        return DataError(f"{self._label(array)} {what}")

    def _label(self, array: str) -> str:
        return f"{self._name}{f' (array {array!r})' if array else ''}"

    def _file(self) -> IO[bytes]:
        return os.fdopen(open_regular(self._path), "rb")

    @contextlib.contextmanager
    def _zip(self) -> Iterator[zipfile.ZipFile]:
        with self._reported(), self._file() as file, zipfile.ZipFile(file) as archive:
            yield archive

    def _member(self, name: str, *, verify: bool) -> _Stored:
        with self._zip() as archive, self._file() as file:
            info = archive.getinfo(f"{name}.npy")
            if info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1:
                if verify:
                    _drain(archive.open(info))
                file.seek(info.header_offset + 26)
                lengths = file.read(4)  # of the name and the extra field in the local header
                start = info.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
                file.seek(start)
                return self._npy(file, info.file_size, start, name)
            with archive.open(info) as packed, self._inflated(packed, info.file_size, name) as unpacked:
                return self._npy(unpacked, info.file_size, 0, name)._replace(found=os.fstat(file.fileno()))

    @contextlib.contextmanager
    def _inflated(self, packed: IO[bytes] | gzip.GzipFile, size: int, array: str = "", before: bytes = b"") -> Iterator[IO[bytes]]:
        """Yield an unnamed file of `before` and the rest of `packed`, exactly `size` bytes; a map of it outlives it."""
        limit = InflateLimit.of(self._path.stat().st_size, self._limit, self._option)
        limit.require(size, f"{self._label(array)} inflates to {size} bytes,")
        with tempfile.TemporaryFile() as file:
            file.write(before)
            found = len(before)
            while found <= size and (piece := packed.read(CHUNK_BYTES)):
                file.write(piece)
                found += len(piece)
            if found != size:
                held = "more" if found > size else f"only {found}"
                raise self._error(f"is damaged: its header promises {size} bytes, it holds {held}: restore it", array)
            file.flush()
            file.seek(0)
            yield file

    def _npy(self, file: IO[bytes], size: int, start: int = 0, array: str = "") -> _Stored:
        """Find the array of the `.npy` of `size` bytes that begins at byte `start`, the position of `file`."""
        try:
            dtype, shape, fortran, before = read_npy_header(file)
        except NpyError as error:
            file.seek(start)
            what = f"is not a .npy file (by its first bytes{what_it_is(file.read(HEAD_BYTES))}): save it with np.save"
            if error.cause is not None:
                what = f"has a damaged .npy header ({error.cause}): restore it, or save it again with np.save"
            raise self._error(what, array) from error
        if dtype.hasobject:
            raise self._error(
                "holds Python objects, which only a pickle brings back: save numbers (numpy.stack; of several lengths a file for each)",
                array,
            )
        if dtype.kind not in "biufcUS":
            raise self._error(f"has the dtype {dtype}: only booleans, numbers and strings are read", array)
        return self._place(file, (dtype, shape, fortran), start + before, start + size, array)

    def _idx(self, file: IO[bytes], size: int) -> _Stored:
        dtype, shape, start = self._idx_header(file)
        return self._place(file, (dtype, shape, False), start, size, "")

    def _gzipped_idx(self, file: IO[bytes]) -> _Stored:
        with gzip.GzipFile(fileobj=file) as packed:
            dtype, shape, start = self._idx_header(packed)
            size = start + math.prod(shape) * dtype.itemsize
            with self._inflated(packed, size, before=bytes(start)) as unpacked:
                return self._place(unpacked, (dtype, shape, False), start, size, "")._replace(found=os.fstat(file.fileno()))

    def _idx_header(self, file: IO[bytes] | gzip.GzipFile) -> tuple[np.dtype[Any], tuple[int, ...], int]:
        head = file.read(4)
        if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in _IDX_TYPES or not head[3]:
            known = what_it_is(head + file.read(HEAD_BYTES))
            raise self._error(f"is not an idx file (it begins with {head.hex()}{known}): restore it, or rename it if it is something else")
        sides = file.read(4 * head[3])
        if len(sides) < 4 * head[3]:
            raise self._error("ends inside its idx header: restore it")
        return np.dtype(_IDX_TYPES[head[2]]), tuple(np.frombuffer(sides, ">u4").tolist()), 4 + len(sides)

    def _place(self, file: IO[bytes], header: tuple[np.dtype[Any], tuple[int, ...], bool], start: int, end: int, array: str) -> _Stored:
        """Return the array of a header whose values take all bytes [start, end) of `file`."""
        dtype, shape, fortran = header
        expected = math.prod(shape) * dtype.itemsize
        if any(side < 0 for side in shape):
            raise self._error(f"is damaged: its header promises the shape {shape}: restore it, or save it again with np.save", array)
        if expected != end - start:
            what = "is truncated" if expected > end - start else "is damaged"
            raise self._error(f"{what}: an array of shape {shape} and dtype {dtype} takes {expected} bytes, there are {end - start}", array)
        return _Stored(os.dup(file.fileno()), dtype, shape, fortran, start)

    def _mapped(self, stored: _Stored, array: str) -> Array:
        """Return an array as a map of its file, whose descriptor is closed."""
        dtype, shape = stored.dtype, stored.shape
        with os.fdopen(stored.descriptor, "rb") as file:
            try:
                if not math.prod(shape) * dtype.itemsize:
                    return np.empty(shape, dtype)
                return np.asarray(np.memmap(file, dtype, "r", stored.start, shape, "F" if stored.fortran else "C"))
            except (*_DAMAGED, OverflowError) as error:  # sides that numpy refuses, or values beyond the end of the file
                raise self._error(
                    f"is damaged: its header promises shape {shape} and dtype {dtype} ({error}): restore it", array
                ) from error


def _drain(stream: IO[bytes]) -> None:
    with stream:
        while stream.read(CHUNK_BYTES):
            pass
