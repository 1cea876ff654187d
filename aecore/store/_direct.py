"""Sequential writer of a new file that bypasses the page cache where the file system allows it (O_DIRECT).

Through the cache every page is copied, and fsync then writes all of them at once: 0.6 GB/s on a disk that takes 2 GB/s (2-core machine,
ext4). With O_DIRECT the bytes are on the disk before the commit's fsync. File systems that refuse it (tmpfs, some network mounts) are
written through the cache, with an fsync every 16 MiB so that the disk is never idle.
"""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from aecore.errors import disk_error
from aecore.store._cleanup import logged

SYNC_BYTES = 1 << 24
_DIRECT = getattr(os, "O_DIRECT", 0)  # not on macOS


class DiskWriter:
    """Writes the new file `path`; a context manager. StoreError if it exists or cannot be written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._unsynced = 0
        with self._errors():
            self._descriptor, self._direct = _open(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._errors() if kind is None else logged(f"close {self._path}"):
            os.close(self._descriptor)

    def pages(self, data: memoryview) -> None:
        """Append whole pages from page-aligned memory."""
        with self._errors():
            self._write(data)

    def end(self, data: bytes) -> None:
        """Append the last bytes, any number of them."""
        with self._errors():
            self._use_the_cache()
            self._write(memoryview(data))

    def _write(self, data: memoryview) -> None:
        while data:
            try:
                written = os.write(self._descriptor, data)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._use_the_cache()  # the file system refuses O_DIRECT, or wrote no whole page just before
                continue
            data = data[written:]
            self._unsynced += 0 if self._direct else written
        if self._unsynced > SYNC_BYTES:
            os.fsync(self._descriptor)
            self._unsynced = 0

    def _use_the_cache(self) -> None:
        if self._direct:
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, fcntl.fcntl(self._descriptor, fcntl.F_GETFL) & ~_DIRECT)
            self._direct = False

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise disk_error(f"cannot write {self._path}: {error.strerror}", error) from error


def _open(path: Path) -> tuple[int, bool]:
    """Create the file; return its descriptor and whether it bypasses the cache."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    if _DIRECT:
        try:
            return os.open(path, flags | _DIRECT, 0o666), True
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            path.unlink(missing_ok=True)  # some systems create it before they refuse
    return os.open(path, flags, 0o666), False
