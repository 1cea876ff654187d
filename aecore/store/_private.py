"""Folders of this user in places that others can write to, such as /tmp.

Whoever comes first may put a link, a file or a folder of theirs under a name that we are going to use, and so read what we write or
choose what we read. So such a folder is opened without following a link, and what was opened, not its name, is checked. In a place
where everybody may rename everything (writable by all, without the sticky bit) no check lasts: name another one.
"""

import contextlib
import os
import stat
import tempfile
from pathlib import Path

from aecore.errors import StoreError

TORCH_CACHE = "TORCHINDUCTOR_CACHE_DIR"


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


def make_private(path: Path) -> None:
    """Create a folder and its missing parents, each for this user alone: `Path.mkdir` gives its `mode` to the last one only.

    A folder that exists stays as it is. OSError if one cannot be made.
    """
    try:
        path.mkdir(mode=0o700, exist_ok=True)
    except FileNotFoundError:
        if path.parent == path:
            raise
        make_private(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)


def name_torch_cache() -> None:
    """Set TORCHINDUCTOR_CACHE_DIR to a folder of this user, unless it is set; to be called when a process begins, before it has threads.

    Torch's default, `/tmp/torchinductor_USER`, is a name that anybody can take before us, and what lies there is loaded and run. Later a
    thread may be reading the environment in compiled code: with glibc up to 2.40, `getenv` there ends the process now and then. Nothing
    is created or checked.
    """
    if TORCH_CACHE not in os.environ:
        with contextlib.suppress(FileNotFoundError):  # no place for temporary files: what needs one says so
            os.environ[TORCH_CACHE] = str(Path(tempfile.gettempdir(), _torch_folder()))


def keep_torch_cache_private() -> None:
    """Create or check the folder of `name_torch_cache`; to be called before the first optimizer, which makes torch create one.

    In a process that did not begin with `name_torch_cache`, a notebook, this sets the variable. Another folder stays as it is.

    Raises
    ------
    StoreError
        As `private_folder`.
    """
    name_torch_cache()
    place = Path(os.environ.get(TORCH_CACHE) or tempfile.gettempdir())
    if place.name == _torch_folder():
        private_folder(place, f"set {TORCH_CACHE} to a folder of your own")


def _torch_folder() -> str:
    return f"aecore-torch-{os.getuid()}"


def named_folder(path: Path, other: str) -> Path:
    """Return a folder that the user named, as `private_folder` does, with two differences.

    A link is followed if this user made it, and who may read the folder is the user's choice: what is in it has to be private itself.
    """
    path = _followed(path)
    os.close(_opened(path, other))
    return path


def own_folder(path: Path, other: str) -> Path:
    """Return `named_folder(path)`, or, where the user named a folder that others use too (`_is_shared`), a private one below it.

    A member of the shared folder's group may put another folder in the place of the private one at any moment: follow no link in it, and
    do not believe a file in it that belongs to another user.
    """
    path = _followed(path)
    return private_folder(path / f"aecore-{os.getuid()}", other) if _is_shared(path) else named_folder(path, other)


def _followed(path: Path) -> Path:
    return path.resolve() if path.is_symlink() and path.lstat().st_uid == os.getuid() else path


def _is_shared(path: Path) -> bool:
    """Return whether root (or this user) lets several users write to a folder, and did not let everybody rename what is there.

    So are the volumes of Kubernetes with an fsGroup (root's, setgid, mode 2775) and folders like /tmp (mode 1777).
    """
    try:
        found = path.lstat()
    except OSError:
        return False
    renamed_by_all = found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX
    trusted = stat.S_ISDIR(found.st_mode) and found.st_uid in (0, os.getuid()) and not renamed_by_all
    return bool(trusted and found.st_mode & 0o022)


def _opened(path: Path, other: str) -> int:
    """Return a descriptor of a folder that belongs to this user and that nobody else can write to."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        try:
            descriptor = os.open(path, flags)
        except FileNotFoundError:
            make_private(path)
            descriptor = os.open(path, flags)
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
