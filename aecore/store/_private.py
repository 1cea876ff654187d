"""Folders of this user in places that others can write to, such as /tmp.

Whoever comes first may put a link, a file or a folder of theirs under a name that we are going to use, and so read what we write or
choose what we read. So such a folder is opened without following a link, and what was opened, not its name, is checked. In a place
where everybody may rename everything (writable by all, without the sticky bit) no check lasts: name another one.
"""

import os
import stat
from pathlib import Path

from aecore.errors import StoreError


def private_folder(path: Path, other: str) -> Path:
    """Return a folder that only this user can enter; it is created if it is missing, together with its parents.

    Parameters
    ----------
    path : Path
        Not a link. Use it for names of this program alone: a folder of this user that others can read is closed to them.
    other : str
        The last words of the message: how to name another folder.

    Raises
    ------
    StoreError
        It is a link or no folder, belongs to another user, could have been filled by others, or cannot be made.
    """
    descriptor = _opened(path, other)
    try:
        if os.fstat(descriptor).st_mode & 0o077:
            os.fchmod(descriptor, 0o700)
    finally:
        os.close(descriptor)
    return path


def named_folder(path: Path, other: str) -> Path:
    """Return a folder that the user named, as `private_folder` does, with two differences.

    A link is followed if this user made it, and who may read the folder is the user's choice: what is in it has to be private itself.
    """
    if path.is_symlink() and path.lstat().st_uid == os.getuid():
        path = path.resolve()
    os.close(_opened(path, other))
    return path


def _opened(path: Path, other: str) -> int:
    """Return a descriptor of a folder that belongs to this user and that nobody else can write to."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        taken = "is a link" if path.is_symlink() else "is no folder" if path.exists() else f"cannot be made or opened ({error.strerror})"
        raise StoreError(f"{path} {taken}, expected a folder of this user: {other}") from error
    found = os.fstat(descriptor)
    wrong = None
    if found.st_uid != os.getuid():
        wrong = f"belongs to user {found.st_uid}, expected {os.getuid()}"
    elif found.st_mode & 0o022:
        wrong = f"can be written by others (mode {stat.S_IMODE(found.st_mode):o}), expected 700: chmod go-w {path}, or"
    if wrong is not None:
        os.close(descriptor)
        raise StoreError(f"{path} {wrong}{'' if wrong.endswith(', or') else ':'} {other}")
    return descriptor
