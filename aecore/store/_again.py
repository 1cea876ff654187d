"""Retried reads of a file system: a transient I/O error is no property of the bytes that could not be read."""

import errno
import time
from collections.abc import Callable
from typing import TypeVar

from aecore.errors import StoreError

T = TypeVar("T")
READS, FIRST_PAUSE_S = 3, 0.1
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)
_REMEDIES = {
    **dict.fromkeys(_GONE, "it was there when the source was listed: run the same command again, which lists the source again"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "make it readable or move it away, then run the same command again"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit of open files (ulimit -n), then run the same command again"),
}
_USUAL = "nothing is recorded about it: run the same command again when the storage is well, or move the file away"


def read_again(read: Callable[[], T], where: str, error: OSError | None = None) -> T:
    """Return the result of `read()`, called up to `READS` times with a growing pause after each OSError.

    Parameters
    ----------
    read : callable
        Reads from the beginning and opens the file itself: a handle that is open already may be stale.
    where : str
        Name of the file for the error.
    error : OSError, optional
        Error of a first read by the caller; it counts as one of the `READS`.

    Raises
    ------
    StoreError
        If the last read fails too.
    """
    for attempt in range(0 if error is None else 1, READS):
        if attempt:
            time.sleep(FIRST_PAUSE_S * 4 ** (attempt - 1))
        try:
            return read()
        except OSError as failed:
            error = failed
    assert error is not None
    remedy = _REMEDIES.get(error.errno or 0, _USUAL)
    raise StoreError(f"cannot read {error.filename or where}: {error.strerror or error} (tried {READS} times); {remedy}") from error
