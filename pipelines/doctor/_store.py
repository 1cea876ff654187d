"""Does a place keep what a store promises? Put-if-absent under a race, read after write, listing, hard links, space, clock."""

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from aecore.errors import StoreError
from aecore.store import AlreadyExists, Store, absolute_url, open_store
from pipelines.cluster.session import import_environment
from pipelines.doctor._check import Check, Finding, failed, ok, skipped, warning

RACERS, ROUNDS = 4, 6
RACE_S = 60.0
SKEW_S = 5.0
LOW_BYTES, LOWEST_BYTES = 5 << 30, 100 << 20
WRITABLE = "give another URL, or see that this user may write there and that the service answers"
OTHER = "write to another place: without it two runs at once could mix their files"


def store_checks(url: str | None) -> list[Check]:
    if url is None:
        return [
            Check("store", lambda: skipped("store", "no URL given: `aepipe doctor URL` tries put-if-absent and the rest there"), StoreError)
        ]
    where = absolute_url(url)
    checks = [Check("store", lambda: semantics(where), StoreError, RACE_S + 60, WRITABLE)]
    return checks if "://" in where else [*checks, Check("store: free space", lambda: space(Path(where)), StoreError)]


def semantics(url: str) -> Iterator[Finding]:
    """Try everything in a folder of our own below `url`, and remove it."""
    with _place(url) as store:
        started = time.time()
        first = store.put("one", b"first", role="doctor")
        yield ok("store: write", f"wrote to {url} in {time.time() - started:.2f} s")
        yield _read_back(store, first.sha256)
        yield _exclusive(store)
        if "://" not in url:
            yield _hard_links(Path(store.url))
        yield _clock(store)
        yield race(store.url)


@contextlib.contextmanager
def _place(url: str) -> Iterator[Store]:
    """Give a store below `url` that nobody uses, and remove it with all that is in it and all that was made for it."""
    made = [] if "://" in url else [folder for folder in (Path(url), *Path(url).parents) if not folder.exists()]
    store = open_store(f"{url}/aepipe-doctor-{secrets.token_hex(6)}")
    try:
        yield store
    finally:
        with contextlib.suppress(StoreError):
            for name in [name for name in store.list() if name != ".tmp"]:
                store.remove(name)
        if "://" not in url:
            for folder in (Path(store.url, ".tmp"), Path(store.url), *made):
                with contextlib.suppress(OSError):  # not empty: something of somebody else came in
                    folder.rmdir()


def _read_back(store: Store, sha256: str) -> Finding:
    wrong = [what for what, found in (("read", store.read("one") == b"first"), ("list", "one" in store.list())) if not found]
    if wrong or store.size("one") != 5:
        return failed("store: read after write", f"what was just written is not there for {' and '.join(wrong) or 'size'}", OTHER)
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
            "store: hard links", f"not possible: {error.strerror}", "write to a file system that knows them (not FAT, not some FUSE mounts)"
        )
    if links != 2:
        return failed("store: hard links", f"a linked file counts {links} links, expected 2", OTHER)
    return ok("store: hard links", "work, and fsync does too")


def _clock(store: Store) -> Finding:
    store.put("now", b"now", role="doctor")
    written, now = store.modified("now"), time.time()
    skew = abs(now - (written or 0.0))
    if skew > SKEW_S:
        said = f"the clock of the storage and of this machine are {skew:,.0f} s apart"
        return warning("store: clock", said, "synchronise them (NTP): `aepipe gc` reckons the age of files, S3 refuses at 15 minutes")
    return ok("store: clock", f"{skew:.1f} s apart at most")


def race(url: str) -> Finding:
    """Let several processes write one name at one moment, several times: exactly one may win, and its bytes have to be there."""
    command = [sys.executable, "-P", "-W", "ignore", "-m", "pipelines.doctor._racer", url, str(ROUNDS)]
    environment = os.environ | import_environment()
    racers = [
        subprocess.Popen([*command, str(number)], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for number in range(RACERS)
    ]
    try:
        deadline = time.monotonic() + RACE_S
        for racer in racers:
            assert racer.stdout is not None
            if not racer.stdout.readline():
                return failed("store: race", "a process could not open the store", "see the checks above")
        start = time.time() + 0.3
        said = []
        for racer in racers:
            assert racer.stdin is not None
            racer.stdin.write(f"{start}\n")
            racer.stdin.flush()
        for racer in racers:
            output, _ = racer.communicate(timeout=max(0.1, deadline - time.monotonic()))
            if racer.returncode:
                return failed("store: race", "a process failed while it wrote (its error is above)", "see the checks above")
            said.append(json.loads(output.splitlines()[-1]))
    finally:
        for racer in racers:
            racer.kill()
            racer.communicate()
    store = open_store(url)
    for name in range(ROUNDS):
        winners = [number for number, won in enumerate(said) if won[name]]
        if len(winners) != 1 or store.read(f"race-{name}") != str(winners[0]).encode() * 1000:
            return failed("store: race", f"{len(winners)} of {RACERS} processes were told that they had written one name", OTHER)
    return ok("store: race", f"one winner of {RACERS} processes, {ROUNDS} times")


def space(place: Path) -> Finding:
    folder = next(parent for parent in (place, *place.parents) if parent.exists())
    free = shutil.disk_usage(folder).free
    said = f"{free / 1e9:.1f} GB free under {folder}"
    if free < LOWEST_BYTES:
        return failed("store: free space", said, "free space there, or write to another URL")
    if free < LOW_BYTES:
        return warning("store: free space", said, "see that it is enough for shards, checkpoints and the table")
    return ok("store: free space", said)
