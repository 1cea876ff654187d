"""A store in the memory of this process: the contract of `aecore.store.Store` without a disk, and the scheme that opens it."""

import atexit
import contextlib
import functools
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from aecore.errors import DataError
from aecore.store import AlreadyExists, FileRef, Scheme, Seen

MEMORY: dict[str, dict[str, tuple[float, bytes]]] = {}  # URL -> name -> when it was written, bytes


@functools.cache
def copies() -> Path:
    """Return the folder of this process's local copies; it is removed when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="aecore-memory-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


class MemoryStore:
    """Files by name, with the time at which they were written."""

    is_local = False

    def __init__(self, url: str) -> None:
        self.url = url
        self.files = MEMORY.setdefault(url, {})

    def put(self, name: str, data: bytes, *, role: str) -> FileRef:
        self._require_inside(name)
        ref = FileRef(name, len(data), hashlib.sha256(data).hexdigest())
        there = self.files.setdefault(name, (time.time(), data))[1]
        if there != data:
            raise AlreadyExists(f"{self.url}/{name} exists with other content: nothing was overwritten")
        return ref

    def put_staged(self, name: str, staged: Path, *, role: str, sha256: str | None = None) -> FileRef:
        return self.put(name, staged.read_bytes(), role=role)

    @contextlib.contextmanager
    def stage(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder, "staged")

    def read(self, name: str, *, ref: FileRef | None = None, fresh: bool = False, limit: int | None = None) -> bytes:
        self._require_inside(name)
        if name not in self.files:
            raise DataError(f"{self.url}/{name} is missing")
        data = self.files[name][1]
        if limit is not None and len(data) > limit:
            raise DataError(f"{self.url}/{name} has {len(data)} bytes, expected at most {limit}")
        if ref is not None and (len(data), hashlib.sha256(data).hexdigest()) != (ref.bytes, ref.sha256):
            raise DataError(f"{self.url}/{name} is damaged")
        return data

    def check(self, ref: FileRef, *, verify: bool = False) -> None:
        if self.size(ref.name) != ref.bytes:
            raise DataError(f"{self.url}/{ref.name} has {self.size(ref.name)} bytes, expected {ref.bytes}")
        if verify:
            self.read(ref.name, ref=ref)

    def check_all(self, refs: Sequence[FileRef], *, verify: bool = False) -> None:
        for ref in refs:
            self.check(ref, verify=verify)

    def fetch(self, ref: FileRef, target: Path) -> None:
        target.write_bytes(self.read(ref.name, ref=ref))

    def local(self, ref: FileRef) -> Path:
        path = copies() / ref.sha256
        self.fetch(ref, path)
        return path

    def open(self, ref: FileRef) -> int:
        return os.open(self.local(ref), os.O_RDONLY)

    def refetch_if_corrupt(self, ref: FileRef) -> bool:
        return False

    def prefetch(self, refs: Sequence[FileRef]) -> None:
        """No-op: nothing is far away."""

    def size(self, name: str) -> int | None:
        self._require_inside(name)
        return len(self.files[name][1]) if name in self.files else None

    def modified(self, name: str) -> float | None:
        return self.files[name][0] if name in self.files else None

    def test_creation(self) -> str | None:
        return None

    def now(self) -> float:
        return time.time()

    def list(self, folder: str = "") -> list[str]:
        prefix = f"{folder}/" if folder else ""
        return sorted({name.removeprefix(prefix).split("/")[0] for name in self.files if name.startswith(prefix)})

    def remove(self, name: str) -> None:
        self.files.pop(name, None)

    def _require_inside(self, name: str) -> None:
        if name.startswith("/") or ".." in name.split("/"):
            raise DataError(f"{self.url}: the name {name!r} leads out of the artefact")


class MemoryFiles:
    """The same files as the input of a source."""

    def __init__(self, url: str) -> None:
        self.url, self._store = url, MemoryStore(url)

    def names(self) -> Iterator[str]:
        yield from self._store.files

    def sizes(self, *, hidden: bool = False) -> dict[str, int]:
        if not self._store.files:
            raise DataError(f"{self.url} holds no file: check the address")
        return {name: len(data) for name, (_, data) in sorted(self._store.files.items())}

    def seen(self, name: str) -> Seen:
        written, data = self._store.files[name]
        return Seen(f"{hashlib.sha256(data).hexdigest()}:{written}", time.time() - written < 2)

    def state(self, name: str, found: os.stat_result | None = None) -> str | None:
        return self.seen(name).state

    def read(self, name: str) -> bytes:
        return self._store.read(name)

    def prefetch(self, names: Sequence[str]) -> Callable[[str], bytes]:
        return self.read

    def local(self, name: str) -> Path:
        path = copies() / hashlib.sha256(f"{self.url}/{name}".encode()).hexdigest()
        path.write_bytes(self.read(name))
        return path


MEMORY_SCHEME = Scheme(lambda url, what: url.rstrip("/"), MemoryStore, MemoryFiles)
