"""Where files are staged before they are sent: a folder of this user on this machine's disk, kept clean."""

import hashlib
import os
import socket
import tempfile
import threading
import uuid
from pathlib import Path

from aecore.errors import StoreError

_cleaned: set[int] = set()
_cleaning = threading.Lock()


def _pid_namespace() -> str:
    """Return where our process id means something: containers and machines that share a folder do not see each other's processes."""
    namespace = Path("/proc/self/ns/pid")
    inode = namespace.stat().st_ino if namespace.exists() else 0
    return hashlib.sha256(f"{socket.gethostname()} {inode}".encode()).hexdigest()[:8]


def new_path() -> Path:
    """Return a path for a file to stage; its name says which process has it."""
    return _folder() / f"{os.getpid()}-{_pid_namespace()}-{uuid.uuid4().hex}"


def _folder() -> Path:
    """Return this user's folder for staged files; what processes of this place that are gone left there is removed, once per process."""
    folder = Path(tempfile.gettempdir(), f"aecore-staged-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise StoreError(f"{folder} belongs to another user: set TMPDIR to a folder of your own")
    with _cleaning:
        if os.getpid() not in _cleaned:
            _cleaned.add(os.getpid())
            for path in folder.iterdir():
                pid, _, rest = path.name.partition("-")
                if pid.isdigit() and rest.startswith(f"{_pid_namespace()}-") and not Path("/proc", pid).exists():
                    path.unlink(missing_ok=True)
    return folder
