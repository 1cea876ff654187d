"""Where the artefacts of the rounds are: a folder, or a bucket behind a proxy. Both can copy, count progress, and change a stored bit."""

import contextlib
import hashlib
import os
import random
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.s3 import S3, s3_environment, start_server
from tests.s3.proxy import FaultProxy


class Local:
    """Artefacts below a folder."""

    store = "local"

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment: dict[str, str] = {}

    def url(self, name: str) -> str:
        return str(self.root / name)

    def images(self, name: str, folder: Path) -> None:
        shutil.copytree(folder, self.root / name)

    def write(self, name: str, data: bytes, *, same_mtime: bool = False, new_inode: bool = False) -> None:
        """Write a file of a source; in place unless it gets a `new_inode`, with the modification time that it had if `same_mtime`."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        before = path.stat() if path.exists() else None
        if new_inode:
            spare = path.with_name(f".{path.name}.new")
            spare.write_bytes(data)
            spare.replace(path)
        else:
            path.write_bytes(data)
        if same_mtime and before is not None:
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def remove(self, name: str) -> None:
        """Remove a file, and its folder if that is empty then."""
        path = self.root / name
        path.unlink()
        with contextlib.suppress(OSError):
            path.parent.rmdir()

    def rename(self, name: str, to: str) -> None:
        """Rename a file, or a folder."""
        (self.root / to).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).replace(self.root / to)

    def touch(self, name: str) -> None:
        os.utime(self.root / name)

    def stamps(self, name: str) -> dict[str, tuple[object, ...]]:
        """Return what tells whether a file below `name` was written again: inode, time and hash of each."""
        found = dict[str, tuple[object, ...]]()
        for file in self.names(name):
            with contextlib.suppress(FileNotFoundError):  # staged by a process that goes on
                state = (self.root / file).stat()
                found[file.removeprefix(f"{name}/")] = (state.st_ino, state.st_mtime_ns, hashlib.sha256(self.read(file)).hexdigest())
        return found

    def copy(self, name: str, to: str) -> None:
        shutil.copytree(self.root / name, self.root / to, dirs_exist_ok=True)

    def names(self, name: str) -> list[str]:
        """Return the files below `name`, sorted."""
        return sorted(path.relative_to(self.root).as_posix() for path in (self.root / name).rglob("*") if path.is_file())

    def bytes(self, name: str) -> int:
        return sum((self.root / found).stat().st_size for found in self.names(name))

    def progress(self, name: str) -> int:
        """Return the number of files below `name`, while others are writing there."""
        with contextlib.suppress(OSError):
            return sum(len(files) for _, _, files in os.walk(self.root / name))
        return 0

    def flip(self, name: str, rng: random.Random) -> Callable[[], None]:
        """Change one bit of a file in place; return the call that changes it back, if it is there still."""
        path = self.root / name
        before = path.read_bytes()
        after = _flipped(before, rng)
        path.write_bytes(after)

        def restore() -> None:
            if path.is_file() and path.read_bytes() == after:
                path.write_bytes(before)

        return restore

    def keep(self, name: str, folder: Path) -> None:
        """Keep what is below `name` for who looks into a failure: it stays where it is, or is copied from a disk that goes away."""
        if os.path.ismount(self.root / name):
            shutil.copytree(self.root / name, folder / name)

    def forget(self, name: str) -> None:
        shutil.rmtree(self.root / name, ignore_errors=True)

    def quiet(self) -> None:
        """End all faults: there are none but those of commands."""


class Bucket:
    """Artefacts in a bucket, which aecore reaches through the proxy, in commands and in this process; `s3.raw` goes past it."""

    store = "s3"

    def __init__(self, s3: S3, proxy: FaultProxy, cache: Path) -> None:
        self.s3, self.proxy = s3, proxy
        self.environment = s3_environment(proxy.port, cache)

    def url(self, name: str) -> str:
        return f"{self.s3.url}/{name}"

    def images(self, name: str, folder: Path) -> None:
        self.s3.upload(folder, name)

    def _put(self, name: str, data: bytes, metadata: dict[str, str]) -> None:
        self.s3.raw.put_object(Bucket=self.s3.bucket, Key=name, Body=data, Metadata=metadata)

    def write(self, name: str, data: bytes, *, same_mtime: bool = False, new_inode: bool = False) -> None:
        """Write an object of a source."""
        self.s3.raw.put_object(Bucket=self.s3.bucket, Key=name, Body=data)

    def read(self, name: str) -> bytes:
        data: bytes = self.s3.raw.get_object(Bucket=self.s3.bucket, Key=name)["Body"].read()
        return data

    def remove(self, name: str) -> None:
        self.s3.raw.delete_object(Bucket=self.s3.bucket, Key=name)

    def rename(self, name: str, to: str) -> None:
        """Copy an object, or all below a prefix, and remove what was copied."""
        names = [found for found in self.names(name) if found] or [name]
        for found in names:
            self.write(to + found.removeprefix(name), self.read(found))
            self.remove(found)

    def touch(self, name: str) -> None:
        self.write(name, self.read(name))

    def stamps(self, name: str) -> dict[str, tuple[object, ...]]:
        """Return what tells whether an object below `name` was written again: ETag, time and size of each."""
        pages = self.s3.raw.get_paginator("list_objects_v2").paginate(Bucket=self.s3.bucket, Prefix=f"{name}/")
        return {
            entry["Key"].removeprefix(f"{name}/"): (entry["ETag"], entry["LastModified"], entry["Size"])
            for page in pages
            for entry in page.get("Contents", ())
        }

    def copy(self, name: str, to: str) -> None:
        def copy(found: str) -> None:
            stored = self.s3.raw.get_object(Bucket=self.s3.bucket, Key=found)
            self._put(to + found.removeprefix(name), stored["Body"].read(), stored["Metadata"])

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(copy, self.names(name)))

    def _sizes(self, name: str) -> dict[str, int]:
        pages = self.s3.raw.get_paginator("list_objects_v2").paginate(Bucket=self.s3.bucket, Prefix=f"{name}/")
        return {entry["Key"]: entry["Size"] for page in pages for entry in page.get("Contents", ())}

    def names(self, name: str) -> list[str]:
        return sorted(self._sizes(name))

    def bytes(self, name: str) -> int:
        return sum(self._sizes(name).values())

    def progress(self, name: str) -> int:
        """Return the number of requests so far."""
        return len(self.proxy.log)

    def flip(self, name: str, rng: random.Random) -> Callable[[], None]:
        stored = self.s3.raw.get_object(Bucket=self.s3.bucket, Key=name)
        before = stored["Body"].read()
        after = _flipped(before, rng)
        self._put(name, after, stored["Metadata"])

        def restore() -> None:
            if self.s3.objects(name).get("") == after:
                self._put(name, before, stored["Metadata"])

        return restore

    def keep(self, name: str, folder: Path) -> None:
        for found, data in self.s3.objects(f"{name}/").items():
            path = folder / name / found
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    def forget(self, name: str) -> None:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda found: self.s3.raw.delete_object(Bucket=self.s3.bucket, Key=found), self.names(name)))

    def quiet(self) -> None:
        self.proxy.clear()


Place = Local | Bucket


@contextlib.contextmanager
def place(store: str, base: Path) -> Iterator[Place]:
    """Yield the place of a store, with its files below `base`; this process reads what is there meanwhile."""
    root = base / "data"
    root.mkdir()
    if store == "local":
        yield Local(root)
        return
    from aecore.store import _cached as cached_module
    from aecore.store._s3_client import close_clients

    cached_module.RECENT_S = 0.0  # objects are changed behind the store's back
    with start_server(base) as port, FaultProxy(port) as proxy:
        os.environ.update(s3_environment(proxy.port, base / "cache-of-comparisons"))
        try:
            yield Bucket(S3(port, proxy.port).with_bucket(), proxy, root / "cache")
        finally:
            close_clients()


def _flipped(data: bytes, rng: random.Random) -> bytes:
    if not data:
        return data
    bit = rng.randrange(8 * len(data))
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)
