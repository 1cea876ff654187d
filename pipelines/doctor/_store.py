"""Checks the guarantees of a store: put-if-absent under a race, read after write, listing, hard links, space, clock."""

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from aecore.errors import StoreError
from aecore.store import RACERS, ROUNDS, SKEW_S, AlreadyExists, Store, absolute_url, ahead_s, is_remote, open_store
from pipelines.doctor._check import Check, Finding, failed, ok, skipped, warning

TIMEOUT_S = 120.0
LOW_BYTES, LOWEST_BYTES = 5 << 30, 100 << 20
WRITABLE = "use another URL, or check that this user may write there and that the service answers"
OTHER = "use another store: without it two concurrent runs could mix their files"


def store_checks(url: str | None) -> list[Check]:
    if url is None:
        return [Check("store", lambda: skipped("store", "no URL given: `aepipe doctor URL` checks put-if-absent and more"), StoreError)]
    where = absolute_url(url)
    checks = [Check("store", lambda: semantics(where), StoreError, TIMEOUT_S, WRITABLE)]
    return checks if is_remote(where) else [*checks, Check("store: free space", lambda: space(Path(where)), StoreError)]


def semantics(url: str) -> Iterator[Finding]:
    """Check the guarantees in a temporary folder below `url`."""
    with _place(url) as store:
        atomic = raced(store)
        yield atomic
        if atomic.state == "failed":
            return
        started = time.time()
        first = store.put("one", b"first", role="doctor")
        yield ok("store: write", f"wrote to {url} in {time.time() - started:.2f} s")
        yield _read_back(store, first.sha256)
        yield _exclusive(store)
        if not is_remote(url):
            yield _hard_links(Path(store.url))
        yield _clock(store)


@contextlib.contextmanager
def _place(url: str) -> Iterator[Store]:
    """Yield a new store below `url`; remove it at the end, with the parent folders that were created for it."""
    made = [] if is_remote(url) else [folder for folder in (Path(url), *Path(url).parents) if not folder.exists()]
    store = open_store(f"{url}/aepipe-doctor-{secrets.token_hex(6)}")
    try:
        yield store
    finally:
        with contextlib.suppress(StoreError):
            for name in [name for name in store.list() if name != ".tmp"]:
                store.remove(name)
        if not is_remote(url):
            for folder in (Path(store.url, ".tmp"), Path(store.url), *made):
                with contextlib.suppress(OSError):  # not empty: another process wrote to it
                    folder.rmdir()


def _read_back(store: Store, sha256: str) -> Finding:
    wrong = [what for what, found in (("read", store.read("one") == b"first"), ("list", "one" in store.list())) if not found]
    if wrong or store.size("one") != 5:
        return failed("store: read after write", f"what was just written is missing in {' and '.join(wrong) or 'size'}", OTHER)
    return ok("store: read after write", f"read, listed and hashed ({sha256[:8]})")


def _exclusive(store: Store) -> Finding:
    try:
        store.put("one", b"other", role="doctor")
    except AlreadyExists:
        if store.read("one") == b"first":
            return ok("store: put-if-absent", "a second write under one name is refused, the first stays")
    return failed("store: put-if-absent", "a second write under one name was not refused", OTHER)


def _hard_links(folder: Path) -> Finding:
    path, link = folder / "one", folder / "linked"
    try:
        os.link(path, link)
        links = path.stat().st_nlink
    except OSError as error:
        return failed(
            "store: hard links", f"not possible: {error.strerror}", "use a file system that has them (not FAT, not some FUSE mounts)"
        )
    if links != 2:
        return failed("store: hard links", f"a linked file counts {links} links, expected 2", OTHER)
    return ok("store: hard links", "work, and fsync does too")


def _clock(store: Store) -> Finding:
    skew = abs(ahead_s(store))
    if skew > SKEW_S:
        message = f"the clock of the storage and of this machine are {skew:,.0f} s apart"
        return warning("store: clock", message, "synchronise them (NTP): `aepipe gc` depends on the age of files, S3 refuses 15 minutes")
    return ok("store: clock", f"{skew:.1f} s apart at most")


def raced(store: Store) -> Finding:
    """Check that of several overlapping writes of one name exactly one succeeds, and that its bytes are stored."""
    wrong = store.test_creation()
    if wrong is not None:
        return failed("store: race", wrong, OTHER)
    return ok("store: race", f"one winner of {RACERS} overlapping writes, {ROUNDS} times")


def space(place: Path) -> Finding:
    folder = next(parent for parent in (place, *place.parents) if parent.exists())
    free = shutil.disk_usage(folder).free
    message = f"{free / 1e9:.1f} GB free under {folder}"
    if free < LOWEST_BYTES:
        return failed("store: free space", message, "free space there, or write to another URL")
    if free < LOW_BYTES:
        return warning("store: free space", message, "check that it is enough for shards, checkpoints and the table")
    return ok("store: free space", message)
