"""Where files are staged before an upload: a folder of this user on the local disk, cleaned of files of dead processes."""

import hashlib
import os
import socket
import tempfile
import threading
import uuid
from pathlib import Path

from aecore.store._private import private_folder

_cleaned: set[int] = set()
_cleaning = threading.Lock()


def pid_namespace() -> str:
    """Return a hash of host and PID namespace: containers and machines that share a folder do not see each other's processes."""
    namespace = Path("/proc/self/ns/pid")
    inode = namespace.stat().st_ino if namespace.exists() else 0
    return hashlib.sha256(f"{socket.gethostname()} {inode}".encode()).hexdigest()[:8]


def new_path() -> Path:
    """Return a path for a staged file; its name holds this process's id and PID namespace."""
    return _folder() / f"{os.getpid()}-{pid_namespace()}-{uuid.uuid4().hex}"


def _folder() -> Path:
    """Return this user's folder for staged files; once per process it is cleaned of files of dead processes of this PID namespace."""
    folder = private_folder(Path(tempfile.gettempdir(), f"aecore-staged-{os.getuid()}"), "set TMPDIR to a folder of your own")
    with _cleaning:
        if os.getpid() not in _cleaned:
            _cleaned.add(os.getpid())
            for path in folder.iterdir():
                pid, _, rest = path.name.partition("-")
                if pid.isdigit() and rest.startswith(f"{pid_namespace()}-") and not Path("/proc", pid).exists():
                    path.unlink(missing_ok=True)
    return folder
