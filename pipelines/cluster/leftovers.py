"""What killed drivers leave of their local Rays: processes that go on, and folders of sessions.

Ray ends its own processes with the driver, but a worker in the middle of a long call may not notice, and the folder of a session stays
whatever happens. `connect` writes into each new session which process started it. A folder is removed only if it has such a note, that
process has ended, and no process of this user has a file of it open or names it in its command line. Processes are named, not ended.
"""

import contextlib
import logging
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from aecore.errors import StoreError, counted
from aecore.store import pid_namespace, private_folder
from pipelines.cluster.process import is_alive, process_name

logger = logging.getLogger(__name__)
MAX_SOCKET_LENGTH, SOCKET_LENGTH = 107, 68  # of a path; of what Ray puts below: /ray/session_DATE_TIME_PID/sockets/plasma_store
SHARED = Path("/tmp")  # not TMPDIR, which may be long: a session holds sockets, whose paths may have 107 characters
NOTE = "started-by"  # in the folder of a session: PID namespace and name of its driver
_SESSION = re.compile(r"session_[\d_-]+_(\d+)")


@dataclass(frozen=True)
class Leftover:
    """The session of a driver that has ended: its folder and age, the processes that still use it.

    `is_noted` is whether its driver left a note. Without one it is of an earlier version or of a Ray that was started by hand, and in
    another container it may be in use.
    """

    folder: Path
    age_s: float
    pids: tuple[int, ...]
    is_noted: bool

    @property
    def age(self) -> str:
        """Return the age in hours or days."""
        hours = self.age_s / 3600
        return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.0f} days"

    @property
    def remedy(self) -> str:
        """Return the command that ends its processes."""
        return f"kill -9 {' '.join(map(str, self.pids))}"


def session_root() -> Path:
    """Return the folder for sessions of local Rays; nothing is created.

    Ray lets everybody write to what it makes there, so nobody else may enter it: that of RAY_TMPDIR if it is private, else one below it.
    Ray's default, /tmp/ray, is not used: it may hold the address of a dead cluster, where the clean-up of TorchTrainer.fit would look for
    12 s.
    """
    name, named = f"aepipe-ray-{os.getuid()}", os.environ.get("RAY_TMPDIR")
    if not named:
        return SHARED / name
    folder = Path(named).absolute()  # not resolved: a short link is how one keeps the paths of sockets short
    root = folder if folder.name == name or _is_private(folder) else folder / name
    if len(str(root)) + SOCKET_LENGTH <= MAX_SOCKET_LENGTH:
        return root
    logger.warning("RAY_TMPDIR=%s is too long for the paths of Ray's sockets: using %s", named, SHARED / name)
    return SHARED / name


def _is_private(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        state = folder.stat()
        return state.st_uid == os.getuid() and not state.st_mode & 0o077
    return False


def make_session_root() -> Path:
    """Return `session_root` as a private folder; another one if somebody else has taken its name."""
    root = session_root()
    try:
        return private_folder(root, "have it removed")
    except StoreError as error:
        try:
            other = tempfile.mkdtemp(prefix="aepipe-ray-", dir=root.parent)
        except OSError:
            raise StoreError(f"{error}, or set RAY_TMPDIR to a folder of your own") from None
        logger.warning("%s; until then sessions of local Rays are in folders like %s", error, other)
        return Path(other)


def note_driver(session: Path) -> None:
    """Write into the folder of a session that this process has started it."""
    with open(os.open(session / NOTE, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "w") as file:
        file.write(f"{pid_namespace()} {process_name(os.getpid())}")


def leftovers(root: Path) -> list[Leftover]:
    """Return the sessions below `root` whose drivers have ended, oldest first; without a note only those that nothing uses.

    Nothing is changed.
    """
    dead = [(folder, noted) for folder, noted, alive in _sessions(root / "ray") if not alive]
    users = _users([folder for folder, _ in dead])
    found = []
    for folder, noted in dead:
        with contextlib.suppress(FileNotFoundError):  # another run has removed it
            if noted or not users[folder]:
                found.append(Leftover(folder, time.time() - folder.stat().st_mtime, users[folder], noted))
    return found


def clear_leftovers(root: Path) -> None:
    """Remove the folders of sessions that nothing uses any more, but the newest one; name the processes of the others in the log."""
    removed, newest = 0, os.path.realpath(root / "ray" / "session_latest")  # its logs may explain why its driver ended
    for left in leftovers(root):
        if left.pids:
            logger.warning(
                "%s outlived the driver of a local Ray (%s, started %s ago): end them with `%s`",
                counted(len(left.pids), "process", "processes"), left.folder.name, left.age, left.remedy,
            )  # fmt: skip
        elif left.is_noted and left.folder.name != os.path.basename(newest):
            shutil.rmtree(left.folder, ignore_errors=True)  # another run may remove it too
            removed += 1
    if removed:
        logger.info("removed %s of sessions of Ray that have ended below %s", counted(removed, "folder", "folders"), root)


def _sessions(folder: Path) -> Iterator[tuple[Path, bool, bool]]:
    """Yield folder, whether it has a note, and whether its driver may be alive, of each session that belongs to this user."""
    try:
        found = sorted(entry for entry in folder.iterdir() if _SESSION.fullmatch(entry.name))
    except OSError:
        return
    for path in found:
        with contextlib.suppress(OSError):  # removed meanwhile
            state = path.lstat()
            if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.getuid():
                continue
            note = path / NOTE
            if note.is_file() and not note.is_symlink():
                namespace, _, driver = note.read_text().partition(" ")
                yield path, True, namespace != pid_namespace() or is_alive(driver)
            else:
                match = _SESSION.fullmatch(path.name)
                assert match is not None
                yield path, False, Path("/proc", match[1]).exists()


def _users(folders: Sequence[Path]) -> dict[Path, tuple[int, ...]]:
    """Return for each folder the processes of this user that name it in their command line or have one of its files open."""
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()] if folders else []
    used = {pid: _names_used(Path("/proc", str(pid))) for pid in pids}
    return {folder: tuple(pid for pid, names in used.items() if f"{os.path.realpath(folder)}/" in names) for folder in folders}


def _names_used(process: Path) -> str:
    """Return the command line of a process and the paths of its open files; what cannot be read has ended or belongs to another user."""
    names = []
    with contextlib.suppress(OSError):
        names.append((process / "cmdline").read_bytes().decode(errors="replace"))
        for descriptor in os.listdir(process / "fd"):
            with contextlib.suppress(OSError):
                names.append(os.readlink(process / "fd" / descriptor))
    return "\0".join(names)
