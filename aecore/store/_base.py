"""What every store is: its calls, its file references, its fault points. See the package for the rules."""

import contextlib
import hashlib
import json
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from aecore.errors import DataError, StoreError

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

    def check(self, ref: FileRef, *, verify: bool = False) -> None:
        """DataError unless `ref` is there with its size, and with its sha256 if `verify` (then every byte is read)."""

    def check_all(self, refs: Sequence[FileRef], *, verify: bool = False) -> None:
        """Check several files, at once where they are far away; the first in order that is wrong is raised."""

    def local(self, ref: FileRef) -> Path:
        """Return a path on this machine that holds `ref`, for use at once; DataError if it is missing or has another size."""

    def open(self, ref: FileRef) -> int:
        """Return a descriptor to read `ref` with `pread`, as `local`; the caller closes it."""

    def refetch_if_corrupt(self, ref: FileRef) -> bool:
        """Say whether it is worth to read `ref` once more after it was found damaged: a near copy was, and is fetched again."""

    def prefetch(self, refs: Sequence[FileRef]) -> None:
        """Begin to bring these files near, in this order, in the background; a hint that never fails."""

    def size(self, name: str) -> int | None:
        """Return the size in bytes, None if there is no such file."""

    def modified(self, name: str) -> float | None:
        """Return when `name` was written, in seconds since the epoch by the storage's clock; None if there is no such file."""

    def list(self, folder: str = "") -> list[str]:
        """Return the names directly below `folder` ("" is the artefact itself), sorted; empty if there is none."""

    def remove(self, name: str) -> None:
        """Remove a file that this program created (retention of checkpoints, `gc`); missing is fine."""


class Files(Protocol):
    """Files of somebody else below one URL, read only: what a source shards."""

    url: str

    def sizes(self) -> dict[str, int]:
        """Return the bytes of every file by its name below the URL, with `/`, sorted by name; DataError if there is nothing."""

    def read(self, name: str) -> bytes:
        """Return the bytes of one file; OSError if it cannot be read."""

    def prefetch(self, names: Sequence[str]) -> Callable[[str], bytes]:
        """Return `read` for who reads exactly these names in this order: where reading takes long it works ahead."""

    def local(self, name: str) -> Path:
        """Return a path on this machine that holds the file (an object is fetched once); OSError if it cannot be read."""


def damaged(where: object, ref: FileRef, found: str) -> DataError:
    """Return the error about a file whose bytes have another sha256 than `ref`."""
    return DataError(
        f"{where} is damaged: sha256 {found[:12]}, the manifest says {ref.sha256[:12]}; restore it or write the artefact again"
    )


def require_size(where: object, ref: FileRef, size: int | None) -> None:
    """DataError unless `size` (None: there is no such file) is the size of `ref`."""
    if size is None:
        raise DataError(f"{where} is missing: the manifest names it ({ref.bytes} bytes); restore it or write the artefact again")
    if size != ref.bytes:
        raise DataError(f"{where} has {size} bytes, the manifest says {ref.bytes}: it was truncated or changed; restore it")


def other_content(where: object, ref: FileRef, there: str) -> AlreadyExists:
    """Return the error about a name that is taken by bytes with the sha256 `there`."""
    return AlreadyExists(
        f"{where} exists with other content (sha256 {there[:12]}, ours {ref.sha256[:12]}): nothing was overwritten. An earlier attempt "
        "made it from other inputs: restore what has changed since, or write to another URL"
    )
