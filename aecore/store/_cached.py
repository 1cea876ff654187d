"""A remote store with copies on this machine: whole objects in the cache folder (`_cache.py`), small files for seconds in memory.

What writes, lists or looks asks the store each time; only what reads bytes is kept. A copy never decides: its hash is compared, and bytes
that do not match are fetched once more.
"""

import os
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

from aecore.store._again import read_again, read_verified
from aecore.store._base import FileRef, Store, require_at_most
from aecore.store._cache import ObjectCache

RECENT_S, SMALL_BYTES, MAX_RECENT = 5.0, 1 << 18, 256  # a small file is read once in so many seconds: no file of an artefact ever changes
_recent: dict[str, tuple[float, bytes]] = {}  # address -> when it was read, bytes


class Fetching(Store, Protocol):
    """A store whose files can be downloaded to a path that the caller chooses."""

    def fetch(self, ref: FileRef, target: Path) -> None:
        """Write the bytes of `ref` to `target`; DataError unless they exist and have its size and sha256."""


class CachedStore:
    """The artefact of `store`, read through the cache of this machine."""

    is_local = False

    def __init__(self, store: Fetching) -> None:
        self.url, self._store = store.url, store
        self.put, self.put_staged, self.stage, self.test_creation = store.put, store.put_staged, store.stage, store.test_creation
        self.check, self.check_all, self.size, self.modified = store.check, store.check_all, store.size, store.modified
        self.list, self.now = store.list, store.now

    def __reduce__(self) -> tuple[type["CachedStore"], tuple[Fetching]]:
        return CachedStore, (self._store,)

    def __repr__(self) -> str:
        return f"CachedStore({self._store!r})"

    def read(self, name: str, *, ref: FileRef | None = None, fresh: bool = False, limit: int | None = None) -> bytes:
        where = f"{self.url}/{name}"
        if ref is not None:
            require_at_most(where, ref.bytes, limit)
            return self._read_copy(ref, fresh)
        known = None if fresh else _recent.get(where)
        if known is not None and time.monotonic() - known[0] < RECENT_S:
            require_at_most(where, len(known[1]), limit)
            return known[1]
        data = self._store.read(name, fresh=fresh, limit=limit)
        if len(data) <= SMALL_BYTES:
            if len(_recent) > MAX_RECENT:
                _recent.clear()
            _recent[where] = time.monotonic(), data
        return data

    def _read_copy(self, ref: FileRef, fresh: bool) -> bytes:
        """Return the bytes of `ref`; a cached copy that a power failure or a disk has corrupted is downloaded again."""
        copy = f"the copy of {self.url}/{ref.name} in {self._cache.root}"

        def read() -> bytes:
            with os.fdopen(self.open(ref), "rb") as file:
                return file.read(ref.bytes)

        def once(fresh: bool) -> bytes:
            if fresh:
                self._cache.forget(ref)
            return read_again(read, copy)

        return read_verified(once, ref, copy, fresh)

    def local(self, ref: FileRef) -> Path:
        return self._cache.path(ref, self._store.fetch)

    def open(self, ref: FileRef) -> int:
        return self._cache.open(ref, self._store.fetch)

    def refetch_if_corrupt(self, ref: FileRef) -> bool:
        return self._cache.refetch_if_corrupt(ref)

    def prefetch(self, refs: Sequence[FileRef]) -> None:
        self._cache.prefetch(refs, self._store.fetch)

    @cached_property
    def _cache(self) -> ObjectCache:
        return ObjectCache()

    def remove(self, name: str) -> None:
        _recent.pop(f"{self.url}/{name}", None)
        self._store.remove(name)
