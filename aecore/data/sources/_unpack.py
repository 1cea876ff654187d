"""Inflate external files to unnamed temporary ones, bounded by `InflateLimit`: gzip, bzip2, xz and zstd, recognised by their first bytes.

The content decides, not the name: tars that a download tool has compressed often keep the name `.tar`.
"""

import bz2
import contextlib
import gzip
import io
import lzma
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from aecore.data.format.file_kinds import BZIP2, GZIP, XZ, ZSTD
from aecore.data.sources._inflate import InflateLimit
from aecore.errors import disk_error

CHUNK_BYTES = 1 << 20
START_BYTES = 6  # that tell how a file is compressed
MAX_XZ_BYTES = 512 << 20  # of memory: what `xz -9` takes is 65 MiB, and a header may ask for 4 GiB
_STARTS = {GZIP: "gzip", BZIP2: "bzip2", XZ: "xz", ZSTD: "zstd"}
_SKIPPABLE = b"\x2a\x4d\x18"  # a zstd stream may begin with a skippable frame: 0x50 to 0x5f before these bytes
_DAMAGED = (zlib.error, lzma.LZMAError, EOFError, ValueError)


class Damaged(Exception):
    """Compressed data that cannot be inflated to its end; the message says why."""


def compression(start: bytes) -> str | None:
    """Return gzip, bzip2, xz or zstd if a file that begins with `start` (`START_BYTES` or more) is compressed, else None."""
    if start[1:4] == _SKIPPABLE and start[0] & 0xF0 == 0x50:
        return "zstd"
    return next((kind for magic, kind in _STARTS.items() if start.startswith(magic)), None)


def inflate(packed: io.FileIO, kind: str, where: str, limit: InflateLimit) -> tuple[int, str]:
    """Return the descriptor of an unnamed file with the inflated bytes, and why they are not complete ("": they are).

    Raises
    ------
    DataError
        If they are more than `limit`.
    OSError
        If `packed` cannot be read.
    StoreError
        If the temporary file cannot be written.
    """
    with tempfile.TemporaryFile(buffering=0) as file:  # unbuffered: its end writes nothing, so that only `_append` can fail
        size, why = 0, ""
        pieces = _pieces(packed, kind)
        while True:
            try:
                piece = next(pieces, b"")
            except Damaged as error:
                why = f"its {kind} data cannot be inflated: {error}"
                break
            if not piece:
                break
            size += len(piece)
            limit.require(size, f"{where} inflates to")
            _append(file, piece, where)
        return os.dup(file.fileno()), why


def _pieces(packed: io.FileIO, kind: str) -> Iterator[bytes]:
    """Yield the inflated bytes; Damaged if there is an error in the data, OSError if they cannot be read."""
    source = _Source(packed)
    with contextlib.closing(_OPENERS[kind](source)) as stream:
        while True:
            try:
                piece = stream.read(CHUNK_BYTES)
            except _DAMAGED as error:
                raise Damaged(str(error) or type(error).__name__) from error
            except OSError as error:  # of the file, or what gzip, bz2 and Arrow raise for damaged data
                if source.error is not None:
                    raise source.error from None
                raise Damaged(str(error)) from error
            if not piece:
                return
            yield piece


class _Source(io.RawIOBase):
    """The compressed file; remembers the error of a read, which decompressors do not tell apart from damaged data."""

    def __init__(self, file: io.FileIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "bytearray | memoryview") -> int:  # type: ignore[override]  # of the buffers that readers pass
        try:
            return self._file.readinto(buffer) or 0
        except OSError as error:
            self.error = error
            raise


class _Xz(io.RawIOBase):
    """A reader of xz streams, one after another, in bounded memory: `lzma.LZMAFile` takes no limit."""

    def __init__(self, source: io.RawIOBase) -> None:
        self._source, self._pending = source, b""
        self._decompressor = self._fresh()

    @staticmethod
    def _fresh() -> lzma.LZMADecompressor:
        return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MAX_XZ_BYTES)

    def read(self, size: int = -1, /) -> bytes:
        while True:
            if self._decompressor.eof:
                rest = self._decompressor.unused_data.lstrip(b"\0")  # streams may be padded
                if not rest and not (rest := (self._source.read(CHUNK_BYTES) or b"").lstrip(b"\0")):
                    return b""
                self._decompressor, self._pending = self._fresh(), rest
            elif self._decompressor.needs_input and not self._pending:
                self._pending = self._source.read(CHUNK_BYTES) or b""
                if not self._pending:
                    raise EOFError("it ends inside a stream")
            piece = self._decompressor.decompress(self._pending, size)
            self._pending = b""
            if piece:
                return piece


def _zstd(source: io.RawIOBase) -> Any:  # any: pyarrow's own kind of file, which has `read` and `close`
    import pyarrow as pa

    return pa.CompressedInputStream(pa.PythonFile(source, mode="r"), "zstd")


_OPENERS: dict[str, Callable[[io.RawIOBase], Any]] = {  # any: as above
    "gzip": lambda source: gzip.GzipFile(fileobj=source),
    "bzip2": lambda source: bz2.BZ2File(source),
    "xz": _Xz,
    "zstd": _zstd,
}


def _append(file: io.FileIO, piece: bytes, where: str) -> None:
    """Write all of `piece`; StoreError, not an OSError: to read the source again would not help."""
    try:
        while piece:
            piece = piece[file.write(piece) :]
    except OSError as error:
        raise disk_error(f"cannot inflate {where} in {tempfile.gettempdir()} (TMPDIR): {error.strerror or error}", error) from error
