"""States of external files: short texts, compared for equality only, that tell whether a file is still the one that was seen.

Of a local file modification time, change time and inode: the change time cannot be set, so a rewritten file of the same size has another
state even if its modification time was restored. Of an object its ETag and modification time. A state that is younger than the grain of
the storage's clock is worth nothing, since a later change may leave it as it is: see `settled_ns`.
"""

import functools
import logging
import os
import re
import tempfile
import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import NamedTuple

logger = logging.getLogger(__name__)
YOUNG_NS = 2 * 10**9  # the coarsest grain of a storage's clock
UNSURE_NS = 7 * 86_400 * 10**9  # the same where only this machine's clock can be asked
STATE_BYTES = 50  # of a local state
_MOST = (1 << 64) - 1
# stamped by this kernel's clock, so nothing has to be written to ask for it
_LOCAL = frozenset(("bcachefs", "btrfs", "erofs", "ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs", "squashfs", "tmpfs", "xfs", "zfs"))


class Seen(NamedTuple):
    """The state of a file (None: the storage has none), and whether it was young then: a later change may not show in it."""

    state: str | None
    young: bool


def local_state(found: os.stat_result) -> str:
    """Return the state of a local file: `mtime:ctime:inode`, times in ns, each as 16 hex digits (as files.c writes it)."""
    return f"{found.st_mtime_ns & _MOST:016x}:{found.st_ctime_ns & _MOST:016x}:{found.st_ino & _MOST:016x}"


def local_seen(found: os.stat_result, settled: int) -> Seen:
    """Return what is seen of a local file; `settled` is that of `settled_ns`."""
    return Seen(local_state(found), max(found.st_mtime_ns, found.st_ctime_ns) > settled)


def object_state(etag: str, modified: datetime) -> str:
    """Return the state of an object: `etag:modified`. Listings may give fractions of a second, where other answers have none."""
    return f"{etag.strip(chr(34))}:{modified.astimezone(UTC).replace(microsecond=0).isoformat()}"


def object_seen(etag: str, modified: datetime, date: str | None) -> Seen:
    """Return what is seen of an object; `date` is that of the answer that shows it, by the clock of the service."""
    now = time.time_ns() - UNSURE_NS if date is None else _seconds(date) * 10**9 - YOUNG_NS
    return Seen(object_state(etag, modified), int(modified.timestamp() * 1e9) > now)


@functools.lru_cache(64)  # a page of a listing has a thousand objects and one time
def _seconds(date: str) -> int:
    return int(parsedate_to_datetime(date).timestamp())


def settled_ns(folder: Path) -> int:
    """Return the time (ns since the epoch) after which a change of a file below `folder` is young; ask before the first look at one.

    That is 2 s ago by the clock that stamps the files: on a disk of this machine the kernel's, on a file server's that of a file written
    just now. Where none can be written it is this machine's, by which nothing younger than 7 days is taken for settled.
    """
    if _file_system(folder) in _LOCAL:
        return time.time_ns() - YOUNG_NS
    try:
        with tempfile.TemporaryFile(dir=folder, prefix=".aecore-") as probe:
            return os.fstat(probe.fileno()).st_mtime_ns - YOUNG_NS
    except OSError as error:
        logger.info(
            "%s: the clock of its file server cannot be asked (%s), so this machine's is used: files changed in the last 7 days are read "
            "by each run",
            folder,
            error.strerror or error,
        )
        return time.time_ns() - UNSURE_NS


def _file_system(folder: Path) -> str:
    """Return the type of the file system of a folder, "" if it is not known."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return ""
    where, found = f"{os.path.realpath(folder)}/", ("", "")
    for fields in (line.split(" ") for line in lines):
        place = re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), fields[4]).rstrip("/") + "/"
        if where.startswith(place) and len(place) >= len(found[0]):  # a later mount hides an earlier one
            found = place, fields[fields.index("-") + 1]
    return found[1]
