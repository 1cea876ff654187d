"""A folder tree of images (or `.npy` arrays), on a disk or in a bucket: class folders, optionally below split folders.

Skipped and counted: hidden files and folders, files of other extensions, and symbolic links that leave the tree or lead to
folders (a folder would be listed twice, or endlessly). Everything else is listed by name and size; nothing is opened.
"""

import bisect
import contextlib
import errno
import os
import stat
import sys
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter
from pathlib import Path
from typing import Literal

import numpy as np

from aecore.data.format.record import DATA_EXTENSIONS, IMAGE_EXTENSIONS, MAX_SAMPLE_BYTES, encode_keys
from aecore.data.sources import Listing
from aecore.errors import ConfigError, DataError, did_you_mean
from aecore.native.loops import list_folder
from aecore.registry import SOURCES, knob, spec
from aecore.store import absolute_url, cannot_read, close_read, is_remote, open_files

FIRST_READ_BYTES, LARGE_READ_BYTES = 1 << 13, 1 << 16  # a large buffer costs as much as the rest of a small file
LISTERS = 2  # threads
_USUAL = {f".{ext}": ext for ext in DATA_EXTENSIONS if len(ext) == 3}
_READ_FLAGS = os.O_RDONLY | os.O_NONBLOCK  # a FIFO reads as empty


@spec
class FolderSpec:
    """Images in folders; the label is the path below the split folder (`train/Greek/character01/0709_01.png`)."""

    kind: Literal["folder"] = "folder"
    url: str = knob("", "folder that holds the class folders or the split folders", identity=False)
    extensions: tuple[str, ...] = knob(tuple(sorted(IMAGE_EXTENSIONS)), "file extensions that are samples, without the dot")
    group: Literal["parent"] | None = knob(None, "parent: each file's folder is a bag that stays whole, its label the path above that")

    def __post_init__(self) -> None:
        for ext in self.extensions:
            if ext not in DATA_EXTENSIONS:
                raise ConfigError(f"source.extensions has {ext!r}, which is not read{did_you_mean(ext, DATA_EXTENSIONS)}")


@SOURCES.register(FolderSpec)
def _open_folder(folder: FolderSpec) -> "FolderSource":
    return (BucketSource if is_remote(absolute_url(folder.url, "source.url")) else FolderSource)(folder)


class FolderSource:
    """The files below the `url` of a `FolderSpec`; sources are paths relative to it, with `/`."""

    def __init__(self, folder: FolderSpec) -> None:
        self._url = absolute_url(folder.url, "source.url")
        self._root = Path(self._url)
        self._prefix = f"{self._url}/"
        self._extensions = frozenset(folder.extensions)
        self._bags = folder.group == "parent"
        self._first_read = FIRST_READ_BYTES  # until the first file that does not fit

    def listing(self) -> Listing:
        """List all files of the known extensions, sorted by relative path.

        Raises
        ------
        DataError
            If the folder is missing, is a file (an archive must be unpacked), cannot be read, or holds no such file.
        """
        self._require_folder()
        skipped: Counter[str] = Counter()
        found = self._walk(skipped)
        notes = tuple(f"skipped {count} {what}" for what, count in sorted(skipped.items()))
        if not found:
            raise DataError(
                f"source.url {self._url} holds no file with one of the extensions {', '.join(sorted(self._extensions))}"
                + (f" ({'; '.join(notes)})" if notes else "")
                + ": check the address, or set source.extensions"
            )
        paths = sorted(found)
        sizes = np.fromiter(map(found.__getitem__, paths), dtype=np.int64, count=len(found))
        labels = _folders(paths)
        known = {folder: sys.intern(folder.partition("/")[0]) for folder in set(labels)}
        tops = list(map(known.__getitem__, labels))
        if not self._bags:
            return Listing(_keys(paths), paths, sizes, label_names=labels, splits=tops, notes=notes)
        if "" in known:
            raise DataError(
                f"{self._url}/{paths[labels.index('')]} is in no folder, and source.group=parent takes the folder of a file as its bag: "
                "move it into one, or leave source.group out"
            )
        above = [label.rpartition("/")[0] for label in labels]
        return Listing(_keys(paths), paths, sizes, label_names=above, splits=tops, groups=labels, notes=notes)

    def read(self, source: str) -> tuple[str, bytes]:
        """Return extension and all bytes of one file; OSError if it cannot be read, or is shorter than its size.

        DataError, before all is read, if it has more than `MAX_SAMPLE_BYTES`: it has grown since it was listed.
        """
        path = self._prefix + source
        descriptor = os.open(path, _READ_FLAGS)  # half the time of `open`
        try:
            data, size = os.read(descriptor, self._first_read), os.fstat(descriptor).st_size
            if len(data) == self._first_read or len(data) < size:
                self._first_read = LARGE_READ_BYTES
                if size > MAX_SAMPLE_BYTES:
                    raise DataError(
                        f"{path} has grown to {size} bytes since it was listed, at most {MAX_SAMPLE_BYTES} are read as one sample: "
                        "wait until it is written, or move it away, then run the same command again"
                    )
                data += _rest(descriptor, size)
        except OSError as error:
            raise OSError(error.errno, error.strerror, path) from error
        finally:
            close_read(descriptor)
        if len(data) < size:
            raise OSError(errno.EIO, f"only {len(data)} of its {size} bytes were read", path)
        return _extension(source), data

    def file_root(self) -> Path | None:
        """Return the folder: samples are the bytes of the files below it."""
        return self._root

    def _require_folder(self) -> None:
        if self._root.is_dir():
            return
        if not self._root.exists():
            raise DataError(f"source.url {self._root} does not exist: check the address")
        if not self._root.is_file():
            raise DataError(f"source.url {self._root} is a pipe or a device: source.kind=folder reads a folder")
        if zipfile.is_zipfile(self._root):
            target = self._root.with_suffix("")
            unpack = f"unpack it (`unzip {self._root} -d {target}`) and give the folder {target}"
            raise DataError(f"source.url {self._root} is a zip file: {unpack}")
        raise DataError(f"source.url {self._root} is a file: source.kind=folder reads a folder (unpack an archive first)")

    def _walk(self, skipped: Counter[str]) -> dict[str, int]:
        """Return the bytes of every sample by its relative path, unsorted."""
        found: dict[str, int] = {}  # strings and numbers: the garbage collector would traverse a list of tuples again and again
        with ThreadPoolExecutor(LISTERS) as listing:
            folders = deque([("", listing.submit(_entries, self._root))])
            while folders:
                prefix, entries = folders.popleft()
                try:
                    within = self._sort_out(prefix, entries.result(), found, skipped)
                except OSError as error:
                    where = self._root / prefix / (error.filename if isinstance(error.filename, str) else "")
                    raise cannot_read(where, error) from error
                folders += [(name, listing.submit(_entries, self._root / name)) for name in within]
        return found

    def _sort_out(self, prefix: str, entries: dict[str, int], found: dict[str, int], skipped: Counter[str]) -> list[str]:
        """Add the samples of one folder to `found`; return the folders in it."""
        names = sorted(entries)
        if min(entries.values(), default=-1) >= 0 and names[0][0] > "." and set(map(_USUAL.get, _endings(names))) <= self._extensions:
            found.update(zip([prefix + name for name in names], map(entries.__getitem__, names), strict=True))  # nearly all folders
            return []
        folders = []
        for name in names:
            path, size = prefix + name, entries[name]
            if name[0] == ".":
                skipped["hidden files or folders"] += 1
            elif size < 0 and stat.S_ISDIR(os.lstat(self._prefix + path).st_mode):
                folders.append(_class_name(f"{path}/", self._root))
            elif "." not in name or _extension(name) not in self._extensions:
                skipped["files of other extensions"] += 1
            elif size < 0 and os.path.islink(self._prefix + path) and not self._stays_inside(path):
                skipped["symbolic links that leave the folder or lead to none of its files"] += 1
            else:
                found[path] = os.stat(self._prefix + path).st_size if size < 0 else size
        return folders

    def _stays_inside(self, link: str) -> bool:
        target = Path(os.path.realpath(self._root / link))
        return target.is_file() and target.is_relative_to(os.path.realpath(self._root))


class BucketSource(FolderSource):
    """The objects below an `s3://` URL, listed and named as the same files in a folder would be."""

    def __init__(self, folder: FolderSpec) -> None:
        super().__init__(folder)
        self._files = open_files(self._url)

    def read(self, source: str) -> tuple[str, bytes]:
        """Return extension and all bytes of one object."""
        return _extension(source), self._files.read(source)

    def file_root(self) -> None:
        """Return None: objects are not local files."""

    def prefetch(self, sources: Sequence[str]) -> Callable[[str], tuple[str, bytes]]:
        """Return a `read` for exactly these objects in this order, which are downloaded in the background."""
        read = self._files.prefetch(sources)
        return lambda source: (_extension(source), read(source))

    def _require_folder(self) -> None:
        """Do nothing: listing the objects finds out."""

    def _walk(self, skipped: Counter[str]) -> dict[str, int]:
        found = self._files.sizes()
        known = {name: size for name, size in found.items() if "." in name and _extension(name) in self._extensions}
        if len(known) < len(found):
            skipped["files of other extensions"] = len(found) - len(known)
        return known


def _extension(source: str) -> str:
    return _USUAL.get(source[-4:]) or source.rpartition(".")[2].lower()  # a third of the time for nearly all names


def _endings(names: Iterable[str]) -> set[str]:
    """Return the different last four characters."""
    return set(map(itemgetter(slice(-4, None)), names))


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        close_read(descriptor)


def _entries(folder: Path) -> dict[str, int]:
    """Return the bytes of every regular file in a folder by its name, -1 for everything else. OSError if it cannot be read."""
    with _opened(folder) as descriptor:
        return list_folder(descriptor)


def _rest(descriptor: int, size: int) -> bytes:
    """Return what is left to read of a file of this size, in one read if the size is right."""
    pieces = list[bytes]()
    while piece := os.read(descriptor, max(size, LARGE_READ_BYTES)):
        pieces.append(piece)
    return b"".join(pieces)


def _folders(paths: list[str]) -> list[str]:
    """Return the folder of each of these sorted paths, "" for those in none."""
    folders = list[str]()
    while len(folders) < len(paths):
        begin = len(folders)
        folder = sys.intern(paths[begin].rpartition("/")[0])
        stop = bisect.bisect_left(paths, f"{folder}0", begin) if folder else len(paths)  # 0 follows / in ASCII
        inside = paths[begin:stop]
        if folder and "".join(inside).count("/") == len(inside) * (folder.count("/") + 1):  # nothing below it
            folders += [folder] * len(inside)
        else:
            folders += [sys.intern(path.rpartition("/")[0]) for path in inside]
    return folders


def _keys(paths: list[str]) -> list[str]:
    """Return the key of each path: without its extension, unless two files of one folder differ only in it."""
    usual = len(endings := _endings(paths)) == 1 and endings.pop() in _USUAL
    stems = [path[:-4] for path in paths] if usual else [path.rpartition(".")[0] for path in paths]
    if len(set(stems)) == len(stems):
        return encode_keys(stems)
    shared = {stem for stem, count in Counter(stems).items() if count > 1}
    return encode_keys([path if stem in shared else stem for path, stem in zip(paths, stems, strict=True)])


def _class_name(folder: str, root: Path) -> str:
    try:
        folder.encode()
    except UnicodeEncodeError:
        raise DataError(f"the folder name {os.fsencode(folder)!r} below {root} is not UTF-8 and would name a class: rename it") from None
    return folder
