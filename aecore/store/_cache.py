"""Whole objects on this machine's disk: verified when they arrive, shared by its processes, bounded.

    $AECORE_CACHE (default ~/.cache/aecore)/<sha256>         an object, complete; its time says when it was last asked for
                                            <sha256>.part    one that is arriving, locked by who fetches it

At most `AECORE_CACHE_BYTES` (default 16 GiB) lie there: before an object is fetched, those that were not asked for the longest time go.
One that somebody has open stays (readers hold a shared lock), so only what is being read at the same moment can exceed the bound.
Everything in the folder can be removed at any time; a process that is killed leaves at most `.part` files, which the next one removes.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue

from aecore.errors import ConfigError, DataError, StoreError
from aecore.store._base import FileRef, sha256_file

logger = logging.getLogger(__name__)
Fetch = Callable[[FileRef, Path], None]  # writes the verified bytes of a file to a path, or raises
DEFAULT_BYTES = 16 << 30
_OBJECT_NAME = re.compile(r"[0-9a-f]{64}(?:\.part)?")
KEPT_S = 60.0  # an object whose path was given out may be opened this much later
FETCHERS = 8
POLL_S = 0.01


class ObjectCache:
    """The cache of this machine; cheap to make."""

    def __init__(self, root: Path | None = None, limit: int | None = None) -> None:
        self.root = root or _default_root()
        self.limit = _default_limit() if limit is None else limit

    def path(self, ref: FileRef, fetch: Fetch) -> Path:
        """Return the path of an object, fetched if it is not there; it stays for `KEPT_S`."""
        os.close(self.open(ref, fetch, keep_s=KEPT_S))
        return self.root / ref.sha256

    def open(self, ref: FileRef, fetch: Fetch, keep_s: float = 0.0) -> int:
        """Return a descriptor of an object, fetched if it is not there; while it is open the object is not evicted."""
        path = self.root / ref.sha256
        while True:
            with _errors(self.root), contextlib.suppress(FileNotFoundError):
                descriptor = os.open(path, os.O_RDONLY)
                fcntl.flock(descriptor, fcntl.LOCK_SH)
                state = os.fstat(descriptor)
                if state.st_nlink and state.st_size == ref.bytes:
                    now = time.time()
                    os.utime(descriptor, (now, now + keep_s))
                    return descriptor
                os.close(descriptor)
                if state.st_nlink:  # cut off by a full disk or a power failure
                    path.unlink(missing_ok=True)
            self._fetch(ref, path, fetch)

    def forget(self, ref: FileRef) -> None:
        """Remove an object, so that it is fetched again; who has it open keeps what is there."""
        (self.root / ref.sha256).unlink(missing_ok=True)

    def refetch_if_corrupt(self, ref: FileRef) -> bool:
        """Forget an object if its bytes are damaged; return whether it is not here any more."""
        path = self.root / ref.sha256
        with contextlib.suppress(FileNotFoundError):
            if sha256_file(path) == ref.sha256:
                return False
            logger.warning("%s is a damaged copy of %s: it is fetched again", path, ref.name)
            self.forget(ref)
        return True

    def prefetch(self, refs: Sequence[FileRef], fetch: Fetch) -> None:
        """Fetch these objects in the background, in this order, as far as half the cache holds them."""
        total = 0
        for ref in refs:
            total += ref.bytes
            if total > self.limit // 2:
                return
            if not (self.root / ref.sha256).exists():
                _fetchers.submit(self, ref, fetch)

    def unverified(self, identity: str, size: int, download: Callable[[Path], object]) -> Path:
        """Return the path of an object that has no known sha256; `identity` (address and version) stands for it."""
        ref = FileRef(identity, size, hashlib.sha256(identity.encode()).hexdigest())

        def whole(_: FileRef, target: Path) -> None:
            download(target)
            _to_disk(target)  # nothing compares it with a hash later: after a power failure there must not be zeros in the right size
            if (found := target.stat().st_size) != size:
                raise DataError(f"{identity.split()[0]} was replaced while it was read ({found} bytes, there were {size}): run it again")

        return self.path(ref, whole)

    def _fetch(self, ref: FileRef, path: Path, fetch: Fetch) -> None:
        """Bring one object here; waits if another process or thread is doing so."""
        part = path.with_suffix(".part")
        with _errors(self.root):
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            while not _try_lock(descriptor):  # never wait in `flock`: once this file is `path`, its readers hold it as long as they like
                if path.exists() or not _is_at(descriptor, part):
                    return
                time.sleep(POLL_S)
            if path.exists() or not _is_at(descriptor, part):  # somebody else was first, or removed what nobody held
                return
            try:
                with _errors(self.root):
                    self._make_room(descriptor, ref.bytes)
                    fetch(ref, part)
                    part.rename(path)
            except BaseException:  # of who holds the lock: to stop waiting for it must not cost somebody else the file
                part.unlink(missing_ok=True)
                raise
        finally:
            _release(descriptor)

    def _make_room(self, descriptor: int, needed: int) -> None:
        """Evict what was not asked for the longest time until `needed` more bytes fit, and take them for the file of `descriptor`."""
        with _locked(self.root / "lock"):
            found = _objects(self.root)
            total = sum(state.st_size for state, _ in found)
            for state, path in sorted(found, key=lambda item: item[0].st_mtime):
                abandoned = path.suffix == ".part"
                if not abandoned and (total + needed <= self.limit or 0 < state.st_mtime - time.time() <= KEPT_S):
                    continue
                if _remove_unused(path):
                    total -= state.st_size
            os.ftruncate(descriptor, needed)  # counted from now on
        if total + needed > self.limit:
            logger.warning(
                "%s holds %d bytes that are in use and gets %d more, more than AECORE_CACHE_BYTES=%d", self.root, total, needed, self.limit
            )


def _objects(root: Path) -> list[tuple[os.stat_result, Path]]:
    """Return what we put into the cache, whatever else lies there; an object that arrives meanwhile changes its name."""
    found = []
    for name in os.listdir(root):
        with contextlib.suppress(FileNotFoundError):
            if _OBJECT_NAME.fullmatch(name):
                found.append(((root / name).stat(), root / name))
    return found


def _remove_unused(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        free = _try_lock(descriptor)
        if free:
            path.unlink(missing_ok=True)
        return free
    finally:
        os.close(descriptor)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.fstat(descriptor).st_ino == path.stat().st_ino
    return False


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        _release(descriptor)


def _release(descriptor: int) -> None:
    """Unlock and close: a child that was forked meanwhile has the descriptor too, and would hold the lock as long as it lives."""
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


@contextlib.contextmanager
def _errors(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"cannot keep an object in the cache {root}: {error.strerror or error}; set AECORE_CACHE to a folder with room"
        ) from error


class _Fetchers:
    """A few threads that fetch in the background and end with the process, whatever they are doing."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[tuple[ObjectCache, FileRef, Fetch]] = SimpleQueue()
        self._asked: set[str] = set()
        self._started = 0
        self._lock = threading.Lock()

    def submit(self, cache: ObjectCache, ref: FileRef, fetch: Fetch) -> None:
        with self._lock:
            if self._started != os.getpid():  # threads do not survive a fork
                self._started, self._asked, self._queue = os.getpid(), set(), SimpleQueue()
                for _ in range(FETCHERS):
                    threading.Thread(target=self._work, args=(self._queue,), name="aecore-fetch", daemon=True).start()
            if ref.sha256 in self._asked:
                return
            self._asked.add(ref.sha256)
        self._queue.put((cache, ref, fetch))

    def _work(self, queue: "SimpleQueue[tuple[ObjectCache, FileRef, Fetch]]") -> None:
        while True:
            cache, ref, fetch = queue.get()
            try:
                os.close(cache.open(ref, fetch))
            except Exception as error:  # who needs the object asks again and is told
                logger.debug("prefetch of %s: %s", ref.name, error)
            with self._lock:
                self._asked.discard(ref.sha256)


_fetchers = _Fetchers()


def _default_root() -> Path:
    home = os.environ.get("AECORE_CACHE")
    return Path(home) if home else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "aecore")


def _default_limit() -> int:
    text = os.environ.get("AECORE_CACHE_BYTES", "")
    if text and not text.isdigit():
        raise ConfigError(f"AECORE_CACHE_BYTES is {text!r}: expected a number of bytes, for example {DEFAULT_BYTES}")
    return int(text) if text else DEFAULT_BYTES
