"""An artefact, or files to read, in a folder of a local (or mounted) file system that knows hard links."""

import contextlib
import errno
import hashlib
import os
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import IO

from aecore.errors import DataError, disk_error, read_error
from aecore.store._again import cannot_read, read_again, read_verified
from aecore.store._base import FileRef, Store, damaged, fault_point, open_regular, other_content, require_at_most, require_size, sha256_file
from aecore.store._cleanup import close_read, discard
from aecore.store._links import LinkedFolders
from aecore.store._race import races
from aecore.store._states import Seen, local_seen, local_state, settled_ns

LINK_TRIES = 20
_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


class LocalStore:
    """An artefact in a folder of a local (or mounted) file system that knows hard links."""

    is_local = True

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = str(root)

    def __repr__(self) -> str:
        return f"LocalStore({self.url!r})"

    def _path(self, name: str) -> Path:
        if name.startswith("/") or ".." in name.split("/"):
            raise DataError(f"{self.url}: the name {name!r} leads out of the artefact")
        return self.root / name

    @contextlib.contextmanager
    def stage(self) -> Iterator[Path]:
        folder = self.root / ".tmp"
        with _storage_errors(f"cannot write under {self.url}"):
            folder.mkdir(parents=True, exist_ok=True)
        path = folder / uuid.uuid4().hex
        try:
            yield path
        finally:
            discard(path)

    def put(self, name: str, data: bytes, *, role: str) -> FileRef:
        with self.stage() as staged:
            with _storage_errors(f"cannot write {name} under {self.url}"):
                try:
                    staged.write_bytes(data)
                except FileNotFoundError:  # another process has removed the empty folder since
                    staged.parent.mkdir(exist_ok=True)
                    staged.write_bytes(data)
            return self.put_staged(name, staged, role=role, sha256=hashlib.sha256(data).hexdigest())

    def put_staged(self, name: str, staged: Path, *, role: str, sha256: str | None = None) -> FileRef:
        target = self._path(name)
        with _storage_errors(f"cannot write {target}"):
            ref = FileRef(name, staged.stat().st_size, sha256 or sha256_file(staged))
        fault_point(f"{role}.staged")
        with _storage_errors(f"cannot write {target}"):
            _fsync(staged)
            fault_point(f"{role}.synced")
            try:
                _link(staged, target)
            except FileExistsError:
                there = sha256_file(target)
                if there != ref.sha256:
                    raise other_content(target, ref, there) from None
            fault_point(f"{role}.linked")
            _fsync(target.parent)
        return ref

    def read(self, name: str, *, ref: FileRef | None = None, fresh: bool = False, limit: int | None = None) -> bytes:
        path = self._path(name)
        if ref is None:
            return self._bytes(path, fresh, limit)
        self.check(ref)
        return read_verified(lambda fresh: self._bytes(path, fresh, limit), ref, path, fresh)

    def _bytes(self, path: Path, fresh: bool, limit: int | None) -> bytes:
        def read() -> bytes:
            with os.fdopen(open_regular(path), "rb") as file:
                size = os.fstat(file.fileno()).st_size
                require_at_most(path, size, limit)
                if fresh and hasattr(os, "posix_fadvise"):  # not on macOS
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                return file.read(size)  # not to its end, which a device does not have

        try:
            return read()
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(f"{path} is missing") from None
        except OSError as error:
            return read_again(read, str(path), error)

    def check(self, ref: FileRef, *, verify: bool = False) -> None:
        path = self._path(ref.name)
        require_size(path, ref, self.size(ref.name))
        if verify and (found := read_again(lambda: sha256_file(path), str(path))) != ref.sha256:
            raise damaged(path, ref, found)

    def check_all(self, refs: Sequence[FileRef], *, verify: bool = False) -> None:
        for ref in refs:
            self.check(ref, verify=verify)

    def local(self, ref: FileRef) -> Path:
        self.check(ref)
        return self._path(ref.name)

    def open(self, ref: FileRef) -> int:
        return read_again(lambda: open_regular(self.local(ref)), str(self._path(ref.name)))

    def refetch_if_corrupt(self, ref: FileRef) -> bool:
        return False

    def prefetch(self, refs: Sequence[FileRef]) -> None:
        """No-op: the files are local."""

    def size(self, name: str) -> int | None:
        state = self._state(name)
        return None if state is None else state.st_size

    def modified(self, name: str) -> float | None:
        state = self._state(name)
        return None if state is None else state.st_mtime

    def _state(self, name: str) -> os.stat_result | None:
        try:
            return self._path(name).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise read_error(f"cannot read {self._path(name)}", error) from error

    def test_creation(self) -> str | None:
        return races(self)

    def now(self) -> float:
        # the time that a file gets is the file server's, which may differ from this machine's; this one has no name, or only for a moment
        folder = next(folder for folder in (self.root / ".tmp", self.root, *self.root.parents) if folder.is_dir())
        with (
            _storage_errors(f"cannot ask {self.url} for the time: nothing can be written there"),
            tempfile.TemporaryFile(dir=folder) as probe,
        ):
            return os.fstat(probe.fileno()).st_mtime

    def list(self, folder: str = "") -> list[str]:
        try:
            return sorted(os.listdir(self._path(folder)))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise read_error(f"cannot list {self._path(folder)}", error) from error

    def remove(self, name: str) -> None:
        path = self._path(name)
        with _storage_errors(f"cannot remove {path}"), contextlib.suppress(NotADirectoryError):
            path.unlink(missing_ok=True)
        if path.parent in (
            self.root,
            self.root / ".tmp",
        ):  # the user's folder; one that another process may need at once
            return
        with contextlib.suppress(OSError):  # this program made the folder: it is removed with its last file
            path.parent.rmdir()


def remove_staging(store: Store) -> None:
    """Remove the folder of staged files of a local artefact, unless another process has files in it."""
    if store.is_local:
        with contextlib.suppress(OSError):
            os.rmdir(Path(store.url) / ".tmp")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        close_read(descriptor)


def _link(staged: Path, target: Path) -> None:
    """Link `staged` to `target`, creating its folder; tried again if `remove` deletes the empty folder in between."""
    for left in range(LINK_TRIES, 0, -1):
        try:
            os.link(staged, target)
            return
        except FileNotFoundError:
            if left == 1 or not staged.exists():
                raise
        _make_folder(target.parent.parent)
        with contextlib.suppress(FileExistsError, FileNotFoundError):
            target.parent.mkdir()  # linked at once: fsynced first, it would be an empty folder for a while
            with contextlib.suppress(FileNotFoundError):
                os.link(staged, target)
                _fsync(target.parent.parent)
                return


def _make_folder(folder: Path) -> None:
    """Create `folder` durably: each new level is fsynced into its parent."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    with contextlib.suppress(FileExistsError):
        folder.mkdir()
    _fsync(folder.parent)


@contextlib.contextmanager
def _storage_errors(doing: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise disk_error(f"{doing}: {error.strerror or error}", error) from error


def _cannot_list(error: OSError) -> None:
    raise cannot_read(error.filename, error) from error


def _walk_links(root: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield what `os.walk` does, also below links to folders; DataError if they go round in a circle, or lead to one folder too often."""
    links = LinkedFolders(str(root), "remove the link, or give the folder that it leads to")
    chains = {str(root): links.enter("", ())}
    for folder, folders, names in os.walk(root, onerror=_cannot_list, followlinks=True):
        yield folder, folders, names  # which takes folders away
        above = chains.pop(folder)
        for path in (os.path.join(folder, name) for name in folders):
            try:
                chains[path] = links.enter(f"{os.path.relpath(path, root)}/", above)
            except OSError as error:
                _cannot_list(error)


class LocalFiles:
    """The files below a folder; hidden ones are left out, and links to folders unless they are asked for."""

    room: int | None = None

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = str(root)

    def names(self) -> Iterator[str]:
        """Yield the names of all files, folder by folder; what cannot be listed is left out."""
        for folder, folders, names in os.walk(self.root):
            folders[:] = [name for name in folders if not name.startswith(".")]
            prefix = folder[len(self.url) :].lstrip("/")
            yield from (f"{prefix}/{name}".lstrip("/") for name in names if not name.startswith("."))

    def sizes(self, *, hidden: bool = False, follow_links: bool = False) -> dict[str, int]:
        """Return name -> size of every file. With `follow_links` also below links to folders; DataError if they go round in a circle."""
        if not self.root.is_dir():
            raise DataError(f"{self.url} {'is a file' if self.root.exists() else 'does not exist'}: give a folder")
        found: dict[str, int] = {}
        for folder, folders, names in _walk_links(self.root) if follow_links else os.walk(self.root, onerror=_cannot_list):
            folders[:] = sorted(name for name in folders if hidden or not name.startswith("."))  # the first wrong link is always the same
            for path in (Path(folder, name) for name in names if hidden or not name.startswith(".")):
                try:
                    state = path.stat()
                except OSError as error:
                    if error.errno in _NO_FILE:  # a link that leads nowhere
                        continue
                    _cannot_list(error)
                    raise
                if stat.S_ISREG(state.st_mode):
                    found[path.relative_to(self.root).as_posix()] = state.st_size
        if not found:
            raise DataError(f"{self.url} holds no file: check the address")
        return dict(sorted(found.items()))

    @cached_property
    def _settled_ns(self) -> int:
        return settled_ns(self.root)

    def seen(self, name: str) -> Seen:
        settled = self._settled_ns  # before the file is looked at
        return local_seen(self.local(name).stat(), settled)

    def state(self, name: str, found: os.stat_result | None = None) -> str | None:
        return None if found is None else local_state(found)

    def read(self, name: str) -> bytes:
        return self.local(name).read_bytes()

    def prefetch(self, names: Sequence[str]) -> Callable[[str], bytes]:
        return self.read

    def local(self, name: str) -> Path:
        return self.root / name

    def open(self, name: str) -> int:
        return open_regular(self.local(name))

    def start(self, name: str) -> IO[bytes]:
        return os.fdopen(self.open(name), "rb")

    def ahead(self, names: Sequence[str]) -> Iterator[str]:
        return iter(names)

    def pieces(self, places: Sequence[tuple[str, int, int]], room: int | None = None) -> None:
        """Return None: the files are local."""
