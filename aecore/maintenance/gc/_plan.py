"""The plan of a collection: files to remove, in order; groups that have to wait; names of external files."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from aecore.store import Store

DAY_S = 86400.0
TEMPORARY = re.compile(r"\.tmp/[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Garbage:
    """One file to remove, its size, and why it is not needed."""

    name: str
    bytes: int
    why: str


@dataclass(frozen=True, slots=True)
class Waiting:
    """Files that are left for now: what they belong to, how many, and why."""

    what: str
    files: int
    bytes: int
    why: str


@dataclass
class Plan:
    """The findings for one artefact; `garbage` is in the order of removal."""

    store: Store
    before: float  # files written after this moment may belong to an attempt that still runs
    unfinished: bool
    keep_generations: int = 2  # parts that these name stay
    replaced_before: float = 0.0  # parts stay that were replaced after this moment
    garbage: list[Garbage] = field(default_factory=list)
    waiting: list[Waiting] = field(default_factory=list)
    not_ours: list[str] = field(default_factory=list)

    def young(self, names: Iterable[str]) -> bool:
        """Return whether one of the files was written after `before`."""
        return any((written := self.store.modified(name)) is not None and written > self.before for name in names)

    def add(self, names: Iterable[str], why: str) -> None:
        """Add files to the garbage; one that no longer exists is left out."""
        for name in names:
            size = self.store.size(name)
            if size is not None:
                self.garbage.append(Garbage(name, size, why))

    def wait(self, what: str, names: Sequence[str], why: str) -> None:
        """Record that files are kept for now."""
        sizes = [size for name in names if (size := self.store.size(name)) is not None]
        self.waiting.append(Waiting(what, len(sizes), sum(sizes), why))

    def remove_or_wait(self, what: str, names: Sequence[str], why: str) -> bool:
        """Remove a group of files unless one of them is young; return whether it is removed."""
        if self.young(names):
            self.wait(what, names, "it may still be written: something in it is younger than the limit")
            return False
        self.add(names, why)
        return True

    def temporary_files(self) -> None:
        """Add the files of killed processes in `.tmp/`."""
        for name in below(self.store, ".tmp"):
            if not TEMPORARY.fullmatch(name):
                self.not_ours.append(name)
            elif not self.young([name]):
                self.add([name], "temporary file of a process that was killed")


def below(store: Store, folder: str) -> Iterator[str]:
    """Yield the names directly below a folder, with the folder in front."""
    prefix = f"{folder}/" if folder else ""
    return (f"{prefix}{name}" for name in store.list(folder))
