"""What an operating system says to a file on a bad day: injected into the calls of this process for all files below one folder.

The calls of Python are replaced (`os.open`, `os.stat`, ..., and files from `open`), not those of libraries: with the compiled loops off,
everything that `aecore` itself reads, lists and commits passes through them.
"""

import builtins
import contextlib
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CALLS = {  # operation -> functions of `os` that do it
    "open": ("open",),
    "read": ("read", "pread", "preadv"),
    "write": ("write",),
    "link": ("link",),
    "fsync": ("fsync",),
    "listdir": ("listdir", "scandir"),
    "stat": ("stat", "lstat"),
    "unlink": ("unlink", "remove", "rmdir"),
}


class Faults:
    """Each call of `operation` on a file below `root` fails with the error `code`, after the first `spared` ones; `raised` counts them."""

    def __init__(self, root: Path, operation: str, code: int, spared: int = 0) -> None:
        self.root, self.operation, self.code, self.spared, self.raised = str(root), operation, code, spared, 0

    def meet(self, operation: str, where: Any, folder: int | None = None) -> None:
        """Raise the error if it is the turn of this call."""
        if operation != self.operation or not self.covers(where, folder):
            return
        self.spared -= 1
        if self.spared < 0:
            self.raised += 1
            raise OSError(self.code, os.strerror(self.code), *([] if isinstance(where, int) else [os.fsdecode(where)]))

    def covers(self, where: Any, folder: int | None = None) -> bool:
        """Return whether a path or descriptor is a file below the root."""
        try:
            if isinstance(where, int):
                path = os.readlink(f"/proc/self/fd/{where}")
            else:
                path = os.path.join("" if folder is None else os.readlink(f"/proc/self/fd/{folder}"), os.fsdecode(where))
        except (OSError, TypeError):
            return False
        return path == self.root or path.startswith(f"{self.root}/")


class _SickFile(io.FileIO):
    def __init__(self, faults: Faults, file: Any, mode: str, opener: Any) -> None:
        self._faults = faults
        super().__init__(file, mode, opener=opener)

    def readinto(self, buffer: Any) -> Any:
        self._faults.meet("read", self.fileno())
        return super().readinto(buffer)

    def readall(self) -> Any:
        self._faults.meet("read", self.fileno())
        return super().readall()

    def write(self, data: Any) -> Any:
        self._faults.meet("write", self.fileno())
        return super().write(data)


@contextlib.contextmanager
def faults(root: Path, operation: str, code: int, spared: int = 0) -> Iterator[Faults]:
    """Let the operation fail for every file below `root`, but for the first `spared` calls."""
    found, real_open = Faults(root, operation, code, spared), io.open

    def failing(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(where: Any = ".", *args: Any, **options: Any) -> Any:
            found.meet(operation, where, options.get("dir_fd"))
            return real(where, *args, **options)

        return call

    def opened(file: Any, mode: str = "r", buffering: int = -1, *text: Any, **options: Any) -> Any:
        found.meet("open", file)
        if operation not in ("read", "write") or not found.covers(file):
            return real_open(file, mode, buffering, *text, **options)
        raw = _SickFile(found, file, mode.translate({ord("b"): None, ord("t"): None}), options.get("opener"))
        if buffering == 0:
            return raw
        buffer = io.BufferedReader(raw) if "r" in mode else io.BufferedWriter(raw)
        return buffer if "b" in mode else io.TextIOWrapper(buffer, *text, **options)

    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS[operation]:
            patch.setattr(os, name, failing(name, getattr(os, name)))
        for module in (io, builtins):
            patch.setattr(module, "open", opened)
        yield found
