"""Where files are staged before an upload: a folder of this user on the local disk, cleaned of files of dead processes."""

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
    """Return a hash of host and PID namespace: containers and machines that share a folder do not see each other's processes."""
    namespace = Path("/proc/self/ns/pid")
    inode = namespace.stat().st_ino if namespace.exists() else 0
    return hashlib.sha256(f"{socket.gethostname()} {inode}".encode()).hexdigest()[:8]


def new_path() -> Path:
    """Return a path for a staged file; its name holds this process's id and PID namespace."""
    return _folder() / f"{os.getpid()}-{_pid_namespace()}-{uuid.uuid4().hex}"


def _folder() -> Path:
    """Return this user's folder for staged files; once per process it is cleaned of files of dead processes of this PID namespace."""
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
