"""The interface of all stores, references to files, fault points. The package docstring has the rules."""

import contextlib
import hashlib
import json
import os
import signal
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from aecore.errors import DataError, StoreError
from aecore.store._environment import environment_value
from aecore.store._states import Seen

SKEW_S = 5.0  # between the clocks of the storage and of this machine: more is worth a warning
LEFT_BEHIND = (  # what to do about a file that blocks the same command
    "An attempt that did not finish left it, and nothing names it yet. If its bytes were changed since, remove this file while no command "
    "writes there: the same command makes it again. If the inputs were changed since, restore them, or write to another URL"
)
_faults_seen: dict[str, int] = {}


class AlreadyExists(StoreError):
    """The final name is taken by other bytes than those to be written."""


@dataclass(frozen=True, slots=True)
class FileRef:
    """One committed file of an artefact: name below the artefact's URL, size in bytes, sha256 in hex."""

    name: str
    bytes: int
    sha256: str


def ahead_s(store: "Store") -> float:
    """Return how far the clock of this machine is ahead of the storage's (negative: behind), in seconds; StoreError as `Store.now`."""
    there = store.now()
    return time.time() - there


def fault_point(name: str) -> None:
    """End this process by SIGKILL if the environment variable AECORE_FAULT asks for it (`name` or `name:nth`)."""
    wanted = environment_value("AECORE_FAULT")
    if wanted is not None and wanted[0] == name:
        _faults_seen[name] = _faults_seen.get(name, 0) + 1
        if _faults_seen[name] == wanted[1]:
            os.kill(os.getpid(), signal.SIGKILL)


def canonical_json(data: Any) -> bytes:  # any: plain JSON data
    """Return `data` as JSON with sorted keys and no spaces: equal data, equal bytes. NaN is refused (ValueError)."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256_json(data: Any) -> str:  # any: plain JSON data
    """Return the sha256 (hex) of the canonical JSON of `data`."""
    return hashlib.sha256(canonical_json(data)).hexdigest()


def open_regular(path: Path, flags: int = 0) -> int:
    """Return a descriptor for reading a file; DataError for a pipe, a device or a folder, which would be waited for or have no end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DataError(f"{path} is a pipe, a device or a folder, expected a file: remove it, or restore the file from a copy")
    return descriptor


def sha256_file(path: Path) -> str:
    """Return the sha256 (hex) of a local file, read in chunks."""
    with os.fdopen(open_regular(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Store(Protocol):
    """Files of one artefact under one URL. Names are relative to it and separated by `/`; roles name the fault points."""

    url: str
    is_local: bool  # whether its files are paths of this machine, so that a part of one can be read without the rest

    def put(self, name: str, data: bytes, *, role: str) -> FileRef:
        """Commit `data` as `name`; AlreadyExists if the name holds other bytes."""

    def put_staged(self, name: str, staged: Path, *, role: str, sha256: str | None = None) -> FileRef:
        """Commit a file made with `stage` as `name` (the hash is computed if it is not given)."""

    def stage(self) -> contextlib.AbstractContextManager[Path]:
        """Yield the path of a new temporary file on local disk; the end of the `with` block removes it unless it was committed."""

    def read(self, name: str, *, ref: FileRef | None = None, fresh: bool = False, limit: int | None = None) -> bytes:
        """Return the bytes of `name`; with `ref`, DataError unless size and sha256 agree. DataError if missing.

        `fresh` reads past every cache, as a read whose hash does not agree is repeated. DataError, before anything is read, if it has more
        than `limit` bytes.
        """

    def check(self, ref: FileRef, *, verify: bool = False) -> None:
        """DataError unless `ref` exists with its size, and with its sha256 if `verify` (which reads every byte)."""

    def check_all(self, refs: Sequence[FileRef], *, verify: bool = False) -> None:
        """Check several files, concurrently where the store is remote; the error is that of the first wrong one in order."""

    def local(self, ref: FileRef) -> Path:
        """Return the path of a local copy of `ref`, for immediate use; DataError if it is missing or has another size."""

    def open(self, ref: FileRef) -> int:
        """Return a file descriptor of the local copy of `ref` (see `local`), for `pread`; the caller closes it. StoreError if it fails."""

    def refetch_if_corrupt(self, ref: FileRef) -> bool:
        """Drop the cached copy of `ref` if that is corrupt; return whether another read fetches it again (False: nothing to gain)."""

    def prefetch(self, refs: Sequence[FileRef]) -> None:
        """Start the background download of these files, in this order (no-op for local stores); never raises."""

    def size(self, name: str) -> int | None:
        """Return the size in bytes, None if there is no such file."""

    def modified(self, name: str) -> float | None:
        """Return the modification time of `name`, in seconds since the epoch by the storage's clock; None if there is no such file."""

    def test_creation(self) -> str | None:
        """Write some names from several threads at once; return what was wrong, None if each had exactly one winner.

        Writers trust the result for a bucket until it is tested again.
        """

    def now(self) -> float:
        """Return the time by the storage's clock, the one of `modified`, in seconds since the epoch; StoreError if it cannot be asked."""

    def list(self, folder: str = "") -> list[str]:
        """Return the sorted names directly below `folder` ("" is the artefact itself); empty if there is none."""

    def remove(self, name: str) -> None:
        """Remove a file that this program created (retention of checkpoints, garbage collection); no error if it is missing."""


class Files(Protocol):
    """External files below one URL, read-only: the input of a source. `room`: bytes of copies to hold open at once; None: no copies."""

    url: str

    @property
    def room(self) -> int | None: ...

    def names(self) -> Iterator[str]:
        """Yield the names of the files below the URL as they are listed, hidden ones left out; a bucket's page by page. None: no error."""

    def sizes(self, *, hidden: bool = False) -> dict[str, int]:
        """Return name -> size in bytes of every file below the URL, also `hidden` ones if asked, sorted; DataError if there is none."""

    def seen(self, name: str) -> Seen:
        """Return the state of a file before it is read, a listed object's as `sizes` listed it; OSError if it is not there."""

    def state(self, name: str, found: os.stat_result | None = None) -> str | None:
        """Return the state of a file whose bytes were read; None if it is not known.

        `found` is what is known of the open file, or of its local copy; without it the bytes came from `read`, `prefetch` or `pieces`, and
        the state is returned once.
        """

    def read(self, name: str) -> bytes:
        """Return the bytes of one file; OSError if it cannot be read."""

    def prefetch(self, names: Sequence[str]) -> Callable[[str], bytes]:
        """Return a `read` for exactly these names in this order; a remote store downloads the next ones in the background."""

    def local(self, name: str) -> Path:
        """Return the path of a local copy of the file (an object is downloaded once); OSError if it cannot be read."""

    def open(self, name: str) -> int:
        """Return a descriptor of the file or of its local copy, which stays in the cache as long as it is open; OSError as `local`."""

    def start(self, name: str) -> IO[bytes]:
        """Return a file opened to read little of it, such as headers: of an object without a copy; OSError as `local`."""

    def ahead(self, names: Sequence[str]) -> Iterator[str]:
        """Yield these names in order; a remote store downloads copies of the next ones meanwhile, as far as half the cache holds them."""

    def pieces(self, places: Sequence[tuple[str, int, int]], room: int | None = None) -> Callable[[int], bytes] | None:
        """Return a function that reads the pieces (name, offset, size) by their rows, in order and without copies of the files.

        None where copies are better: the files are local, or all of them fit into `room` bytes (None: into the cache).
        """


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


def require_at_most(where: object, size: int, limit: int | None) -> None:
    """DataError if `size` bytes are more than `limit` (None: there is none)."""
    if limit is not None and size > limit:
        raise DataError(
            f"{where} has {size} bytes, expected at most {limit} in a file of this kind: it is damaged, or was not written by aecore; "
            "restore it, or write to another URL"
        )


def other_content(where: object, ref: FileRef, found: str) -> AlreadyExists:
    """Return the error about a name that is taken by bytes with the sha256 `found`."""
    return AlreadyExists(
        f"{where} exists with other content (sha256 {found[:12]}, expected {ref.sha256[:12]}): nothing was overwritten. {LEFT_BEHIND}"
    )
