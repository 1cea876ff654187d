"""Cache of whole objects on the local disk: verified on arrival, shared by all processes, bounded in size.

    $AECORE_CACHE (default ~/.cache/aecore)/<sha256>         a complete object; its mtime is the time of its last use
                                            <sha256>.part    a download in progress, locked by its process
                                            turn-<number>    empty; locked by who holds objects open in turns (`ObjectCache.turn`)

It holds at most `AECORE_CACHE_BYTES` (default 16 GiB): before a download the least recently used objects are evicted. An object that is
open in any process stays (readers hold a shared lock), so only concurrent reads can exceed the bound. Everything in the folder can be
removed at any time; a killed process leaves at most `.part` files, which the next one removes. It belongs to one user, in a folder that
many share (`_private.own_folder`) too: objects that others could put there would be taken as verified. What has the name of an object and
is no file that the cache wrote (a link, a pipe, a file with a second name or of another user) is never read: it is removed, and the
object is fetched again (`_opened`).
"""

import atexit
import contextlib
import errno
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

from aecore.errors import DataError, StoreError
from aecore.store._base import FileRef
from aecore.store._cleanup import close_read, discard, logged
from aecore.store._environment import environment_value
from aecore.store._private import own_folder

logger = logging.getLogger(__name__)
Fetch = Callable[[FileRef, Path], None]  # writes the verified bytes of a file to a path, or raises
DEFAULT_BYTES = 16 << 30
_OBJECT_NAME = re.compile(r"[0-9a-f]{64}(?:\.part)?")
OTHER = "set AECORE_CACHE to a folder of your own"
KEPT_S = 60.0  # an object whose path was returned may be opened this much later
FETCHERS = 8
MOST_TURNS = 64
POLL_S = 0.01
_exceeded = set[Path]()  # caches that this process trims when it ends
_NOT_OPENED = (errno.ELOOP, errno.ENXIO, errno.ENODEV, errno.EISDIR, errno.EACCES)  # a link, a socket, a device, a folder, a closed file


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
                descriptor = _opened(path)
                if descriptor is not None:
                    fcntl.flock(descriptor, fcntl.LOCK_SH)
                    state = os.fstat(descriptor)
                    if state.st_nlink and state.st_size == ref.bytes:
                        now = time.time()
                        os.utime(descriptor, (now, now + keep_s))
                        return descriptor
                    close_read(descriptor)
                    if state.st_nlink:  # cut off by a full disk or a power failure
                        path.unlink(missing_ok=True)
            self._fetch(ref, path, fetch)

    def forget(self, ref: FileRef) -> None:
        """Remove an object, so that it is downloaded again; open descriptors keep the removed bytes."""
        with _errors(root := self.root):
            _remove(root / ref.sha256)

    def refetch_if_corrupt(self, ref: FileRef) -> bool:
        """Remove an object if its bytes are corrupt or cannot be read; return whether it is absent now."""
        path = self.root / ref.sha256
        try:
            descriptor = _opened(path)
            if descriptor is None:
                return True
            with os.fdopen(descriptor, "rb") as file:
                if os.fstat(descriptor).st_size == ref.bytes and hashlib.file_digest(file, "sha256").hexdigest() == ref.sha256:
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
                if not os.path.lexists(root / ref.sha256):
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
        """Download one object; waits while another process or thread does.

        Whoever downloads holds the part's exclusive lock from before its first byte until after its rename, which keeps the lock: an object
        that has just got its name cannot be evicted. Between the release of that lock and the shared lock of a reader no lock guards it.
        An eviction in that moment leaves the reader with a file without a name, which `open` sees once it has the lock, and fetches again.
        """
        part, root = path.with_suffix(".part"), path.parent
        with _errors(root):
            descriptor = _opened(part, os.O_RDWR | os.O_CREAT)
        if descriptor is None:
            return
        try:
            with _errors(root):
                # never wait in `flock`: once this file is `path`, its readers hold it as long as they like
                while not _try_lock(descriptor):
                    if os.path.lexists(path) or not _is_at(descriptor, part):
                        return
                    time.sleep(POLL_S)
                if os.path.lexists(path) or not _is_at(descriptor, part):  # another process was first, or evicted it before it was locked
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

    @contextlib.contextmanager
    def turn(self, num_bytes: int) -> Iterator[None]:
        """Wait for the turn to hold open an object: as many turns at a time as objects of `num_bytes` fit, of all processes together."""
        places = min(max(1, self.limit // max(1, num_bytes)), MOST_TURNS)
        with _errors(root := self.root):
            descriptor = None
            while descriptor is None:
                for place in range(places):
                    opened = _opened(root / f"turn-{place}", os.O_RDWR | os.O_CREAT)
                    if opened is not None and _try_lock(opened):
                        descriptor = opened
                        break
                    if opened is not None:
                        close_read(opened)
                else:
                    time.sleep(POLL_S)
        try:
            yield
        finally:
            _release(descriptor)

    def trim(self) -> None:
        """Evict what is above the bound and no longer open: concurrent readers may have exceeded it."""
        with contextlib.suppress(StoreError, OSError), _locked((root := self.root) / "lock"):
            self._evict(root, 0)

    def _make_room(self, root: Path, descriptor: int, needed: int) -> None:
        """Evict the least recently used objects until `needed` more bytes fit, and reserve them in the file of `descriptor`."""
        with _locked(root / "lock"):
            os.ftruncate(descriptor, 0)  # what a killed process left
            total = self._evict(root, needed)
            os.ftruncate(descriptor, needed)  # counted from now on
        if total + needed > self.limit:
            if self._named not in _exceeded:
                _exceeded.add(self._named)
                atexit.register(self.trim)
            logger.warning(
                "%s holds %d bytes that are in use and gets %d more, more than AECORE_CACHE_BYTES=%d", root, total, needed, self.limit
            )

    def _evict(self, root: Path, needed: int) -> int:
        """Remove the least recently used objects until `needed` more bytes fit; return the bytes that are left."""
        found = _objects(root)
        total = sum(state.st_size for state, _ in found)
        for state, path in sorted(found, key=lambda item: (item[1].suffix != ".part", item[0].st_mtime)):
            abandoned = path.suffix == ".part"
            if not abandoned and (total + needed <= self.limit or 0 < state.st_mtime - time.time() <= KEPT_S):
                continue
            if _remove_unused(path):
                total -= state.st_size
        return total


def _named(identity: str, size: int) -> FileRef:
    return FileRef(identity, size, hashlib.sha256(identity.encode()).hexdigest())


def _opened(path: Path, flags: int = os.O_RDONLY) -> int | None:
    """Return a descriptor of a file of the cache; None if its name was taken by anything that the cache did not write, which is removed.

    No link is followed, and no pipe or device is waited for. FileNotFoundError if nothing has the name; any OSError if what has it cannot
    be removed, such as a folder with files in it.
    """
    found = "not a regular file"
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except OSError as error:
        if error.errno not in _NOT_OPENED:
            raise
    else:
        state = os.fstat(descriptor)
        if stat.S_ISREG(state.st_mode):
            if state.st_uid == os.getuid() and state.st_nlink < 2:  # 0: it was evicted just now
                return descriptor
            found = f"a file of user {state.st_uid} with {state.st_nlink} names"
        close_read(descriptor)
    logger.warning("%s is %s, so the cache did not write it: it is removed, the object is fetched again", path, found)
    _remove(path)
    return None


def _remove(path: Path) -> None:
    """Remove what has the name of a file of the cache; an OSError if that is a folder with files in it."""
    try:
        path.unlink(missing_ok=True)
    except (IsADirectoryError, PermissionError):  # the second for a folder on macOS
        if not stat.S_ISDIR(path.lstat().st_mode):
            raise
        path.rmdir()


def _objects(root: Path) -> list[tuple[os.stat_result, Path]]:
    """Return state and path of the cache's own files; one that is renamed meanwhile, as its download ends, is left out."""
    found = []
    for name in os.listdir(root):
        with contextlib.suppress(FileNotFoundError):
            if _OBJECT_NAME.fullmatch(name) and not stat.S_ISDIR((state := (root / name).lstat()).st_mode):
                found.append((state, root / name))
    return found


def _remove_unused(path: Path) -> bool:
    try:
        descriptor = _opened(path)
    except FileNotFoundError:
        return True
    if descriptor is None:
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
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    return False


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    while (descriptor := _opened(path, os.O_RDWR | os.O_CREAT)) is None:
        pass
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
        where = root if error.filename is None else error.filename
        raise StoreError(
            f"cannot keep an object in the cache {where}: {error.strerror or error}; set AECORE_CACHE to a folder with room"
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


def trim_cache() -> None:
    """Evict what the cache of this machine holds above its bound and nobody has open any more; never raises."""
    ObjectCache().trim()


@contextlib.contextmanager
def cache_turn(num_bytes: int) -> Iterator[None]:
    """Wait for the turn to hold open objects of this machine's cache; see `ObjectCache.turn`."""
    with ObjectCache().turn(num_bytes):
        yield


def cache_root() -> Path:
    """Return the folder that the environment names for the cache (nothing is made or checked)."""
    home = environment_value("AECORE_CACHE")
    return Path(home) if home else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "aecore")


def _default_limit() -> int:
    return environment_value("AECORE_CACHE_BYTES") or DEFAULT_BYTES
