"""Does a store create conditionally and atomically? Of several overlapping writes of one name exactly one may succeed.

Amazon S3 does, and so do file systems with hard links. A service that checks whether a name is taken only before it reads the body
passes every sequential test, and acknowledges up to all of the overlapping writers (measured: OpenStack Swift, 16 of 16): two concurrent
runs would then mix their files. So each bucket is tested by a race before the first write.

Only passes are remembered: in `_passed` by this process, and for `KEPT_S` by a note in the cache folder of the machine. A writer
(`require_atomic`) asks `_passed` first, then the note, and races if neither knows the bucket; a failure refuses the write and leaves no
memory, so that each writer tests again. `retest` (doctor, `Store.test_creation`) asks neither and its result wins: a pass renews the
note, a failure removes the note and this process's pass. Other processes that run already keep theirs.
"""

import contextlib
import hashlib
import logging
import os
import stat
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from aecore.errors import StoreError
from aecore.store._base import AlreadyExists, FileRef, Store
from aecore.store._private import own_folder

logger = logging.getLogger(__name__)
ROLE = "race"  # of the files that a race writes
RACERS, RACE_BYTES, ROUNDS = 8, 1 << 20, 3  # now and then one writer of a store that is not atomic is alone
START_S = 60.0  # for all racers to start
KEPT_S = 30 * 86400.0
_passed: set[str] = set()
_racing = threading.Lock()


def race(store: Store) -> str | None:
    """Write one new name from `RACERS` threads at once; return what was wrong, None if exactly one write succeeded. The file is removed.

    Raises StoreError if the store cannot be written, or the racers do not start within `START_S`.
    """
    name, together = f".tmp/{uuid.uuid4().hex}", threading.Barrier(RACERS)

    def write(number: int) -> FileRef | None:
        data = bytes([number]) * RACE_BYTES
        try:
            together.wait(START_S)
        except threading.BrokenBarrierError as error:
            raise StoreError(f"cannot test {store.url}: {RACERS} threads did not start within {START_S:g} s; run it again") from error
        with contextlib.suppress(AlreadyExists):
            return store.put(name, data, role=ROLE)
        return None

    try:
        with ThreadPoolExecutor(RACERS) as racers:
            winners = [ref for ref in racers.map(write, range(RACERS)) if ref is not None]
        if len(winners) != 1:
            return f"{len(winners)} of {RACERS} overlapping writes of one name were acknowledged"
        if hashlib.sha256(store.read(name)).hexdigest() != winners[0].sha256:
            return "the stored bytes are not those of the write that was acknowledged"
        return None
    finally:
        with contextlib.suppress(StoreError):  # credentials that may write but not remove are fine
            store.remove(name)


def require_atomic(store: Store, location: str, memory: Path) -> None:
    """StoreError unless `store` has passed a race on this machine, now or within the last `KEPT_S`.

    Parameters
    ----------
    location : str
        Endpoint and bucket, which one race tests.
    memory : Path
        Local folder in which a pass is remembered.
    """
    if location in _passed:
        return
    with _racing:
        if location in _passed:
            return
        if not _remembered(location, memory):
            wrong = retest(store, location, memory)
            if wrong is not None:
                raise StoreError(
                    f"{location} does not create files atomically: {wrong}; two runs at once could mix their files: write to another "
                    "location, or have the service repaired"
                )
        _passed.add(location)


def retest(store: Store, location: str, memory: Path) -> str | None:
    """Run `ROUNDS` races, whatever is remembered; return what was wrong. The result is remembered in place of an earlier one."""
    wrong = races(store)
    if wrong is None:
        remember(location, memory)
        return None
    _passed.discard(location)
    with contextlib.suppress(OSError, StoreError):
        _note(location, memory).unlink(missing_ok=True)
    return wrong


def races(store: Store) -> str | None:
    """Run `ROUNDS` races; return what was wrong in the first one that failed, None if all had one winner."""
    return next(filter(None, (race(store) for _ in range(ROUNDS))), None)


def remember(location: str, memory: Path) -> None:
    """Record that `location` passed; where that cannot be written, each process tests again."""
    try:
        note = _note(location, memory)
        os.close(os.open(note, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600))  # a pipe would be waited for
        os.utime(note, follow_symlinks=False)
    except (OSError, StoreError) as error:
        logger.debug("%s: the passed test of atomic creation cannot be recorded: %s", location, error)


def _remembered(location: str, memory: Path) -> bool:
    with contextlib.suppress(OSError, StoreError):
        state = _note(location, memory).lstat()
        return stat.S_ISREG(state.st_mode) and state.st_uid == os.getuid() and abs(time.time() - state.st_mtime) < KEPT_S
    return False


def _note(location: str, memory: Path) -> Path:
    """Return the path of the note on `location`; StoreError if others could have put it there."""
    return own_folder(memory, "each process tests the bucket again") / f"atomic-{hashlib.sha256(location.encode()).hexdigest()[:16]}"
