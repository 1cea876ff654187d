"""What is tried again: a transient error is no property of the bytes that could not be read.

A read of a file system that fails is repeated by `read_again`, a request to a service by `_s3_client.retried`, with the same `pauses`. The
latter is no wrapper around a store, since it repeats one request: not the parts of an upload or the pages of a listing before it, and
not in a thread of its own for each of the many that one event loop has in flight. Bytes that arrive with another hash are read once more,
past all caches (`read_verified`).
"""

import errno
import hashlib
import random
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from aecore.errors import StoreError
from aecore.store._base import FileRef, damaged

T = TypeVar("T")
READS, FIRST_PAUSE_S = 3, 0.1
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)
_REMEDIES = {
    **dict.fromkeys(_GONE, "it was there when the source was listed: run the same command again, which lists the source again"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "make it readable or move it away, then run the same command again"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit of open files (ulimit -n), then run the same command again"),
}
_USUAL = "nothing is recorded about it: run the same command again when the storage is well, or move the file away"


def pauses(tries: int, first_s: float, factor: float) -> Iterator[float]:
    """Yield the seconds to wait before each try after the first; a quarter more or less, so that many clients do not return at once."""
    return (first_s * factor**number * random.uniform(0.75, 1.25) for number in range(tries - 1))


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
    for wait in (*([0.0] if error is None else []), *pauses(READS, FIRST_PAUSE_S, 4)):
        if wait:
            time.sleep(wait)
        try:
            return read()
        except OSError as failed:
            error = failed
    assert error is not None
    raise cannot_read(error.filename or where, error, f" (tried {READS} times)") from error


def cannot_read(where: object, error: OSError, tried: str = "") -> StoreError:
    """Return the error for a file or folder of a source that could not be read now."""
    return StoreError(f"cannot read {where}: {error.strerror or error}{tried}; {_REMEDIES.get(error.errno or 0, _USUAL)}")


def read_verified(read: Callable[[bool], bytes], ref: FileRef, where: object, fresh: bool = False) -> bytes:
    """Return the bytes of `ref`: those of `read(fresh)`, or, if they have another sha256, of `read(True)`, which reads past all caches.

    DataError if these have another sha256 too.
    """
    for past_caches in (fresh, True):
        data = read(past_caches)
        if (found := hashlib.sha256(data).hexdigest()) == ref.sha256:
            return data
    raise damaged(where, ref, found)
