"""Where external tars are: a folder, one file, patterns with braces or stars, several addresses joined by `::`."""

import contextlib
import itertools
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from aecore.data.sources._names import expand_braces
from aecore.data.sources._other_files import is_of_system
from aecore.errors import ConfigError, DataError, counted
from aecore.store import Files, LocalFiles, absolute_url, is_remote, is_tar, open_files, split_urls

_ENDINGS_IN_VERSION_1 = (".tar", ".tar.gz", ".tgz")
_SPECIAL = re.compile(r"[*?\[{]")


@dataclass(frozen=True)
class ExternalTars:
    """External tars, by their names below `files`; `others` counts the other files there."""

    files: Files
    names: tuple[str, ...]
    others: int = 0

    @classmethod
    def at(cls, url: str, what: str = "source.url", rules: int = 2) -> "ExternalTars":
        """Return the tars at an address, as webdataset writes it.

        A folder means all tars below it. `shards/{00000..00009}.tar` and `{a,b}.tar` name files, which are checked when they are opened;
        `*`, `?` and `[...]` match within a name and `**` over folders; `a.tar::b.tar` joins addresses. With `rules=1`, those of
        version 1, a folder's tars have one of the endings that it knew, and links to folders are left out.

        Raises
        ------
        DataError
            If there is no tar.
        ConfigError
            If braces do not match each other, or joined addresses are in different places.
        """
        address = absolute_url(url, what)
        parts = split_urls(address)
        parts = parts if all(map(is_tar, parts)) else [address]
        if len(parts) == 1 and not _is_pattern(parts[0]):
            if is_tar(parts[0]) and not os.path.isdir(parts[0]):
                folder, _, name = parts[0].rpartition("/")
                return cls(open_files(folder or "/"), (name,))
            return cls._in_folder(parts[0], rules)
        wanted = [name for part in parts for name in (expand_braces(part) if "{" in part and _is_pattern(part) else [part])]
        root = _common_folder([name if not _is_pattern(name) else name[: _SPECIAL.search(name).start()] for name in wanted], what)  # type: ignore[union-attr]  # a pattern has one
        files = open_files(root or "/")
        start = len(root) + (not root.endswith("/"))
        known: list[str] | None = None
        names = list[str]()
        for name in wanted:
            if not _is_pattern(name):
                names.append(name[start:])
                continue
            known = [there for there in _sizes(files, rules) if _is_data(there)] if known is None else known
            found = _matches(name[start:], known)
            if not found:
                raise DataError(f"no tar matches {name}: check the address, {counted(len(known), 'tar is', 'tars are')} below {files.url}")
            names += found if rules == 1 else _once(files, found)
        return cls(files, tuple(dict.fromkeys(names)))

    @classmethod
    def _in_folder(cls, where: str, rules: int) -> "ExternalTars":
        files = open_files(where)
        sizes = _sizes(files, rules)
        names = sorted(name for name in sizes if (name.endswith(_ENDINGS_IN_VERSION_1) if rules == 1 else _is_data(name)))
        names = names if rules == 1 else _once(files, names)
        if not names:
            raise DataError(
                f"{files.url} holds no .tar file, plain or compressed (.tar.gz, .tgz, .tar.zst, .tar.bz2, .tar.xz): check the address"
            )
        return cls(files, tuple(names), len(sizes) - len(names))

    @classmethod
    def named(cls, url: str, names: tuple[str, ...]) -> "ExternalTars":
        """Return the tars with these names."""
        return cls(open_files(url), names)

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each tar; DataError if one is missing."""
        known = {} if isinstance(self.files, LocalFiles) else self.files.sizes()
        if isinstance(self.files, LocalFiles):  # of the names themselves, which may lead over links
            for path, name in ((self.files.local(name), name) for name in self.names):
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    known[name] = path.stat().st_size
        for name in self.names:
            if name not in known:
                raise DataError(f"{self.files.url}/{name} does not exist: check the address")
        return {name: known[name] for name in self.names}


def _is_data(name: str) -> bool:
    return is_tar(name) and not is_of_system(name)


def _sizes(files: Files, rules: int) -> dict[str, int]:
    """Return the files of a folder; below a local one also those in folders that are links, unless by the rules of version 1."""
    return files.sizes(follow_links=True) if isinstance(files, LocalFiles) and rules > 1 else files.sizes()


def _once(files: Files, names: list[str]) -> list[str]:
    """Return each tar by one of these sorted names: the one that leads over no link, if it is among them, else the first."""
    if not isinstance(files, LocalFiles):
        return names
    real, first = os.path.realpath(files.root), dict[str, str]()  # real path -> name
    for name in names:
        path = os.path.realpath(files.local(name))
        first[path] = name if path == os.path.join(real, name) else first.get(path, name)
    return sorted(first.values())


def _is_pattern(where: str) -> bool:
    """Return whether an address has braces or stars and is no file or folder of that very name."""
    return _SPECIAL.search(where) is not None and (is_remote(where) or not os.path.exists(where))


def _common_folder(places: Iterable[str], what: str) -> str:
    """Return the deepest folder that holds all of these files (or beginnings of names)."""
    folders = [place.rpartition("/")[0].split("/") for place in places]
    same = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*folders, strict=False))
    common = [column[0] for column in same]
    if is_remote("/".join(folders[0])) and len(common) < 3:
        raise ConfigError(f"{what} joins tars of different buckets or disks: give one folder or bucket, or copy them into one")
    return "/".join(common)


def _matches(pattern: str, names: Iterable[str]) -> list[str]:
    """Return the names that match; `*` stays within a component, `**` matches any number of them."""
    parts = pattern.split("/")
    return sorted(name for name in names if _fits(parts, name.split("/")))


def _fits(parts: Sequence[str], components: Sequence[str]) -> bool:
    if not parts or not components:
        return not components and all(part == "**" for part in parts)
    if parts[0] == "**":
        return _fits(parts[1:], components) or _fits(parts, components[1:])
    return fnmatchcase(components[0], parts[0]) and _fits(parts[1:], components[1:])
