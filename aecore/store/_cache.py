"""Cache of whole objects on the local disk: verified on arrival, shared by all processes, bounded in size.

    $AECORE_CACHE (default ~/.cache/aecore)/<sha256>         a complete object; its mtime is the time of its last use
                                            <sha256>.part    a download in progress, locked by its process

It holds at most `AECORE_CACHE_BYTES` (default 16 GiB): before a download the least recently used objects are evicted. An object that is
open in any process stays (readers hold a shared lock), so only concurrent reads can exceed the bound. Everything in the folder can be
removed at any time; a killed process leaves at most `.part` files, which the next one removes. It belongs to one user, in a folder that
many share (`_private.own_folder`) too: objects that others could put there would be taken as verified.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue

from aecore.errors import ConfigError, DataError, StoreError
from aecore.store._base import FileRef, sha256_file
from aecore.store._cleanup import close_read, discard, logged
from aecore.store._private import own_folder

logger = logging.getLogger(__name__)
Fetch = Callable[[FileRef, Path], None]  # writes the verified bytes of a file to a path, or raises
DEFAULT_BYTES = 16 << 30
_OBJECT_NAME = re.compile(r"[0-9a-f]{64}(?:\.part)?")
OTHER = "set AECORE_CACHE to a folder of your own"
KEPT_S = 60.0  # an object whose path was returned may be opened this much later
FETCHERS = 8
POLL_S = 0.01


class ObjectCache:
    """The cache of this machine; cheap to construct."""

    def __init__(self, root: Path | None = None, limit: int | None = None) -> None:
        self._named = root or cache_root()
        self.limit = _default_limit() if limit is None else limit

    @property
    def root(self) -> Path:
        """The folder of the objects, made if it is missing: anybody may remove it at any time. StoreError if it cannot be trusted."""
        return own_folder(self._named, OTHER)

    def path(self, ref: FileRef, fetch: Fetch) -> Path:
        """Return the path of an object, downloaded if it is not cached; it is not evicted for `KEPT_S`."""
        close_read(self.open(ref, fetch, keep_s=KEPT_S))
        return self.root / ref.sha256

    def open(self, ref: FileRef, fetch: Fetch, keep_s: float = 0.0) -> int:
        """Return a descriptor of an object, downloaded if it is not cached; while it is open the object is not evicted."""
        while True:
            path = self.root / ref.sha256
            with _errors(path.parent), contextlib.suppress(FileNotFoundError):
                descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe would be waited for
                fcntl.flock(descriptor, fcntl.LOCK_SH)
                state = os.fstat(descriptor)
                if state.st_nlink and stat.S_ISREG(state.st_mode) and (state.st_size, state.st_uid) == (ref.bytes, os.getuid()):
                    now = time.time()
                    os.utime(descriptor, (now, now + keep_s))
                    return descriptor
                close_read(descriptor)
                if state.st_nlink:  # cut off by a full disk or a power failure, or put there by somebody else
                    path.unlink(missing_ok=True)
            self._fetch(ref, path, fetch)

    def forget(self, ref: FileRef) -> None:
        """Remove an object, so that it is downloaded again; open descriptors keep the removed bytes."""
        with _errors(root := self.root):
            (root / ref.sha256).unlink(missing_ok=True)

    def refetch_if_corrupt(self, ref: FileRef) -> bool:
        """Remove an object if its bytes are corrupt or cannot be read; return whether it is absent now."""
        path = self.root / ref.sha256
        try:
            if sha256_file(path) == ref.sha256:
                return False
            logger.warning("%s is a damaged copy of %s: it is fetched again", path, ref.name)
        except FileNotFoundError:
            return True
        except OSError as error:
            logger.warning("%s, a copy of %s, cannot be read (%s): it is fetched again", path, ref.name, error)
        self.forget(ref)
        return True

    def prefetch(self, refs: Sequence[FileRef], fetch: Fetch) -> None:
        """Download these objects in the background, in this order, as far as half the cache holds them."""
        total = 0
        with contextlib.suppress(StoreError):  # the read that needs an object raises it
            root = self.root
            for ref in refs:
                total += ref.bytes
                if total > self.limit // 2:
                    return
                if not os.path.exists(root / ref.sha256):  # unlike that of a Path it never raises
                    _fetchers.submit(self, ref, fetch)

    def unverified(self, identity: str, size: int, download: Callable[[Path], object], keep_s: float = KEPT_S) -> Path:
        """Return the path of an object without a known sha256; it is cached under the hash of `identity` (address and version)."""
        close_read(self.open_unverified(identity, size, download, keep_s))
        return self.root / _named(identity, size).sha256

    def open_unverified(self, identity: str, size: int, download: Callable[[Path], object], keep_s: float = 0.0) -> int:
        """Return a descriptor of such an object: as `open`, it is not evicted while that is open."""

        def whole(_: FileRef, target: Path) -> None:
            download(target)
            _to_disk(target)  # nothing compares it with a hash later: after a power failure there must not be zeros in the right size
            if (found := target.stat().st_size) != size:
                raise DataError(f"{identity.split()[0]} was replaced while it was read ({found} bytes, there were {size}): run it again")

        return self.open(_named(identity, size), whole, keep_s)

    def _fetch(self, ref: FileRef, path: Path, fetch: Fetch) -> None:
        """Download one object; waits while another process or thread does."""
        part, root = path.with_suffix(".part"), path.parent
        with _errors(root):
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            with _errors(root):
                # never wait in `flock`: once this file is `path`, its readers hold it as long as they like
                while not _try_lock(descriptor):
                    if path.exists() or not _is_at(descriptor, part):
                        return
                    time.sleep(POLL_S)
                if path.exists() or not _is_at(descriptor, part):  # another process was first, or evicted the part before it was locked
                    return
            try:
                with _errors(root):
                    self._make_room(root, descriptor, ref.bytes)
                    fetch(ref, part)
                    part.rename(path)
            except BaseException:  # only the holder of the lock removes the part: it may be another process's download
                discard(part)
                raise
        finally:
            _release(descriptor)

    def _make_room(self, root: Path, descriptor: int, needed: int) -> None:
        """Evict the least recently used objects until `needed` more bytes fit, and reserve them in the file of `descriptor`."""
        with _locked(root / "lock"):
            found = _objects(root)
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
                "%s holds %d bytes that are in use and gets %d more, more than AECORE_CACHE_BYTES=%d", root, total, needed, self.limit
            )


def _named(identity: str, size: int) -> FileRef:
    return FileRef(identity, size, hashlib.sha256(identity.encode()).hexdigest())


def _objects(root: Path) -> list[tuple[os.stat_result, Path]]:
    """Return state and path of the cache's own files; one that is renamed meanwhile, as its download ends, is left out."""
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
        close_read(descriptor)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        close_read(descriptor)


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
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        _release(descriptor)


def _release(descriptor: int) -> None:
    """Unlock and close: a child that was forked meanwhile shares the descriptor, and would hold the lock as long as it lives."""
    with logged("unlock a file of the cache"):
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    close_read(descriptor)


@contextlib.contextmanager
def _errors(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"cannot keep an object in the cache {root}: {error.strerror or error}; set AECORE_CACHE to a folder with room"
        ) from error


class _Fetchers:
    """Daemon threads that download in the background; they end with the process, even in the middle of a download."""

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
                close_read(cache.open(ref, fetch))
            except Exception as error:  # the read that needs the object raises it
                logger.debug("prefetch of %s: %s", ref.name, error)
            with self._lock:
                self._asked.discard(ref.sha256)


_fetchers = _Fetchers()


def cache_root() -> Path:
    """Return the folder that the environment names for the cache (nothing is made or checked)."""
    home = os.environ.get("AECORE_CACHE")
    return Path(home) if home else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "aecore")


def _default_limit() -> int:
    text = os.environ.get("AECORE_CACHE_BYTES", "")
    if text and not text.isdigit():
        raise ConfigError(f"AECORE_CACHE_BYTES is {text!r}: expected a number of bytes, for example {DEFAULT_BYTES}")
    return int(text) if text else DEFAULT_BYTES
