"""URL in, bytes out; put-if-absent. The only module that touches storage.

Every file of an artefact appears under its final name at once and complete, or not at all: written to a temporary file under
`<artefact>/.tmp/`, fsynced, hard-linked to the final name (which fails if the name is taken), folder fsynced. Nothing is ever
overwritten: a name that is taken by the same bytes is success (our own earlier attempt), by other bytes it is `AlreadyExists`.
No locks and no mutable pointers. A process killed at any instant leaves at most a file under `.tmp/`, which no reader looks at.

`Store` is what the rest of the code sees; `LocalStore` is the one implementation so far (an S3 store fits the same calls).
Tests kill the process at named fault points: `AECORE_FAULT=record.linked:3` ends it by SIGKILL at the third record linked.
"""

import contextlib
import hashlib
import json
import os
import signal
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from aecore.errors import ConfigError, DataError, StoreError

CHUNK_BYTES = 1 << 20
FAULT_STAGES = ("staged", "synced", "linked")  # written but not durable, durable but not visible, visible
_faults_seen: dict[str, int] = {}


class AlreadyExists(StoreError):
    """The final name is taken by other bytes than ours."""


@dataclass(frozen=True, slots=True)
class FileRef:
    """One committed file of an artefact: name below the artefact's URL, size in bytes, sha256 in hex."""

    name: str
    bytes: int
    sha256: str


def fault_point(name: str) -> None:
    """End this process by SIGKILL if the environment variable AECORE_FAULT asks for it (`name` or `name:nth`)."""
    wanted = os.environ.get("AECORE_FAULT")
    if not wanted:
        return
    target, _, nth = wanted.partition(":")
    if target == name:
        _faults_seen[name] = _faults_seen.get(name, 0) + 1
        if _faults_seen[name] == int(nth or 1):
            os.kill(os.getpid(), signal.SIGKILL)


def canonical_json(data: Any) -> bytes:  # any: plain JSON data
    """Return `data` as JSON with sorted keys and no spaces: equal data, equal bytes. NaN is refused (ValueError)."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256_json(data: Any) -> str:  # any: plain JSON data
    """Return the sha256 (hex) of the canonical JSON of `data`."""
    return hashlib.sha256(canonical_json(data)).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the sha256 (hex) of a local file, read in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Store(Protocol):
    """Files of one artefact under one URL. Names are relative, with `/`; roles name the fault points."""

    url: str

    def put(self, name: str, data: bytes, *, role: str) -> FileRef:
        """Commit `data` as `name`; AlreadyExists if the name holds other bytes."""

    def put_staged(self, name: str, staged: Path, *, role: str, sha256: str | None = None) -> FileRef:
        """Commit a file made with `stage` as `name` (the hash is computed if it is not given)."""

    def stage(self) -> contextlib.AbstractContextManager[Path]:
        """Give the path of a new temporary file on local disk; removed at the end of the `with` if it is still there."""

    def read(self, name: str, *, ref: FileRef | None = None) -> bytes:
        """Return the bytes of `name`; with `ref`, DataError unless size and sha256 agree. DataError if missing."""

    def local(self, ref: FileRef, *, verify: bool = False) -> Path:
        """Return a local path that holds `ref`: size checked always, sha256 if `verify` (DataError)."""

    def size(self, name: str) -> int | None:
        """Return the size in bytes, None if there is no such file."""

    def list(self, folder: str = "") -> list[str]:
        """Return the names directly below `folder` ("" is the artefact itself), sorted; empty if there is none."""

    def remove(self, name: str) -> None:
        """Remove a file that this program created (retention of checkpoints); missing is fine."""


def absolute_url(url: str | os.PathLike[str], what: str = "URL") -> str:
    """Return a local path (or `file://` URL) as an absolute path; ConfigError for any scheme but file.

    Workers have another working directory, so addresses are made absolute before they travel.
    """
    text = os.fspath(url)
    if not text:
        raise ConfigError(f"{what} is empty: give a folder, for example ./out")
    if text.startswith("pipe:"):
        raise ConfigError(f"{what} {text!r} would run a command: only paths and file:// URLs are read")
    parts = urlsplit(text)
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise ConfigError(f"{what} {text!r} names the host {parts.netloc!r}: write file:///path")
        text = unquote(parts.path)
    elif "://" in text:
        raise ConfigError(f"{what} {text!r} has the scheme {parts.scheme!r}: this version reads and writes paths and file:// URLs")
    return str(Path(text).expanduser().absolute())


def open_store(url: str | os.PathLike[str]) -> Store:
    """Return the store of the artefact at `url` (nothing is created before the first put)."""
    return LocalStore(Path(absolute_url(url)))


class LocalStore:
    """An artefact in a folder of a local (or mounted) file system that knows hard links."""

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
            path.unlink(missing_ok=True)

    def put(self, name: str, data: bytes, *, role: str) -> FileRef:
        with self.stage() as staged:
            with _storage_errors(f"cannot write {name} under {self.url}"):
                staged.write_bytes(data)
            return self.put_staged(name, staged, role=role, sha256=hashlib.sha256(data).hexdigest())

    def put_staged(self, name: str, staged: Path, *, role: str, sha256: str | None = None) -> FileRef:
        target = self._path(name)
        ref = FileRef(name, staged.stat().st_size, sha256 or sha256_file(staged))
        fault_point(f"{role}.staged")
        with _storage_errors(f"cannot write {target}"):
            _fsync(staged)
            fault_point(f"{role}.synced")
            _make_folder(target.parent)
            try:
                os.link(staged, target)
            except FileExistsError:
                there = sha256_file(target)
                if there != ref.sha256:
                    ours = f"(sha256 {there[:12]}, ours {ref.sha256[:12]})"
                    raise AlreadyExists(
                        f"{target} exists with other content {ours}: nothing was overwritten. An earlier attempt made it from other "
                        "inputs: restore what has changed since, or write to another URL"
                    ) from None
            fault_point(f"{role}.linked")
            _fsync(target.parent)
        return ref

    def read(self, name: str, *, ref: FileRef | None = None) -> bytes:
        path = self._path(name)
        if ref is not None:
            self.local(ref)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise DataError(f"{path} is missing") from None
        except OSError as error:
            raise StoreError(f"cannot read {path}: {error.strerror}") from error
        if ref is not None and hashlib.sha256(data).hexdigest() != ref.sha256:
            raise _damaged(path, ref, hashlib.sha256(data).hexdigest())
        return data

    def local(self, ref: FileRef, *, verify: bool = False) -> Path:
        path = self._path(ref.name)
        size = self.size(ref.name)
        if size is None:
            raise DataError(f"{path} is missing: the manifest names it ({ref.bytes} bytes); restore it or write the artefact again")
        if size != ref.bytes:
            raise DataError(f"{path} has {size} bytes, the manifest says {ref.bytes}: it was truncated or changed; restore it")
        if verify and (found := sha256_file(path)) != ref.sha256:
            raise _damaged(path, ref, found)
        return path

    def size(self, name: str) -> int | None:
        try:
            return self._path(name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise StoreError(f"cannot read {self._path(name)}: {error.strerror}") from error

    def list(self, folder: str = "") -> list[str]:
        try:
            return sorted(os.listdir(self._path(folder)))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise StoreError(f"cannot list {self._path(folder)}: {error.strerror}") from error

    def remove(self, name: str) -> None:
        path = self._path(name)
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the folder is ours and goes with its last file
            path.parent.rmdir()


def _damaged(path: Path, ref: FileRef, found: str) -> DataError:
    return DataError(f"{path} is damaged: sha256 {found[:12]}, the manifest says {ref.sha256[:12]}; restore it or write the artefact again")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
        raise StoreError(f"{doing}: {error.strerror or error}") from error
