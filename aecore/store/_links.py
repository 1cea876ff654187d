"""Symbolic links in a folder tree: followed to folders without going round in circles or reading one folder endlessly."""

import errno
import os
from collections import Counter

from aecore.errors import DataError

MOST_PATHS = 1000  # to one folder: links that fork at every level would be 2^levels folders
Chain = tuple[tuple[int, int, str], ...]  # device, inode and path of a folder and of all above it


class LinkedFolders:
    """The folders of a tree whose links are followed; `enter` each of them. `remedy` ends the messages."""

    def __init__(self, root: str, remedy: str) -> None:
        self._root, self._remedy = root, remedy
        self._times: Counter[tuple[int, int]] = Counter()

    def enter(self, folder: str, above: Chain) -> Chain:
        """Return the chain of a folder below those of `above`; paths are relative to the root, with a slash at their end.

        Raises
        ------
        DataError
            If it is one of the folders above it, which links lead back to, or if it was entered by more than `MOST_PATHS` paths.
        """
        state = os.stat(f"{self._root}/{folder}")
        place = state.st_dev, state.st_ino
        for device, inode, path in above:
            if (device, inode) == place:
                raise DataError(
                    f"{self._root}/{folder[:-1]} leads back to {f'{self._root}/{path}'[:-1]}, in which it is: links that go round in a "
                    f"circle are refused; {self._remedy}"
                )
        self._times[place] += 1
        if self._times[place] > MOST_PATHS:
            raise DataError(
                f"more than {MOST_PATHS} paths of links lead to one folder, the last is {self._root}/{folder[:-1]}: {self._remedy}"
            )
        return (*above, (*place, folder))


def leads_nowhere(path: str, error: OSError) -> str | None:
    """Return what a link names if `error` says that this is not there; None if it is no such link."""
    if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
        return None
    try:
        return os.readlink(path)
    except OSError:
        return None
