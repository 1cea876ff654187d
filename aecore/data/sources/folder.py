"""A folder tree of images or arrays, each file one sample, on a disk or in a bucket: class folders, optionally below split folders.

Skipped and counted: hidden files and folders, files of other extensions, what the filters leave out, and symbolic links that leave the
tree or lead to folders, unless `source.follow_links` is set. Everything else is listed by name and size; nothing is opened (but the
first `.npz`, for the log). What only frames or `.npz` files need is imported for them: it is a tenth of the start of `aepipe shard`.
"""

import contextlib
import dataclasses
import errno
import os
import stat
import sys
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from aecore.data.format.bad_sample import BadSample
from aecore.data.format.record import DATA_EXTENSIONS, IMAGE_EXTENSIONS, encode_keys
from aecore.data.format.tar import MAX_MEMBER_BYTES
from aecore.data.sources import NAME_HELP, Listing, require_name
from aecore.data.sources._filter import PathFilter, globs, with_limit
from aecore.data.sources._labels import require_rule
from aecore.data.sources._masks import mask_notes
from aecore.data.sources._names import file_of
from aecore.data.sources._other_files import kind_of_file, skip_file, skip_unseen, unseen_part
from aecore.data.sources._skipped import Skipped, shown_examples
from aecore.errors import ConfigError, DataError, counted, did_you_mean
from aecore.native.loops import Entries, list_folder
from aecore.native.texts import Texts, joined, of_folder, of_width
from aecore.registry import SOURCES, knob, spec
from aecore.store import (
    LinkedFolders,
    Seen,
    absolute_url,
    cannot_read,
    close_read,
    is_remote,
    leads_nowhere,
    local_seen,
    local_state,
    open_files,
    settled_ns,
)

if TYPE_CHECKING:
    from aecore.data.sources._frames import FrameReader

FIRST_READ_BYTES, LARGE_READ_BYTES = 1 << 13, 1 << 16  # a large buffer costs as much as the rest of a small file
LISTERS = 2  # threads
FETCH = "fetch it (git annex get, dvc pull, or download it again), or remove the link"
FOLDER_EXTENSIONS = DATA_EXTENSIONS | {"npz"}
_USUAL = {f".{ext}": ext for ext in FOLDER_EXTENSIONS if len(ext) == 3}
_READ_FLAGS = os.O_RDONLY | os.O_NONBLOCK  # a FIFO reads as empty


@spec
class FolderSpec:
    """Images or arrays in folders, each file a sample; the label is the path below the split folder (`train/Greek/character01`)."""

    kind: Literal["folder"] = "folder"
    url: str = knob("", "folder that holds the class folders or the split folders", identity=False)
    extensions: tuple[str, ...] = knob(tuple(sorted(IMAGE_EXTENSIONS)), "file extensions that are samples, without the dot")
    group: str | None = knob(
        None,
        "samples that stay whole in one split and shard (a bag). parent: those of a folder, whose label is the path above it; "
        "regex:<expression>: those in whose keys it finds the same",
    )
    frames: Literal["first", "all", "refuse"] = knob("first", "of pages and animations: first, all as samples, or refuse the file", since=2)
    label: str = knob(
        "path", "path: the folders below the split; leaf: the last of them; regex:<expression>: its first group; none", since=2
    )
    classes: tuple[str | int, ...] | str = knob((), "names of all classes in their order, or a file with one name a line", since=2)
    follow_links: bool = knob(False, "follow symbolic links out of the folder, to files and to folders; loops are refused", since=2)
    include: tuple[str, ...] | str = knob((), "globs of the files or folders to take, such as 'train/*' or '*_rgb.png'; none: all", since=2)
    exclude: tuple[str, ...] | str = knob((), "globs of the files or folders to leave out, such as '*_mask.png' or thumbnails", since=2)
    min_size: int = knob(0, "bytes that a file has at least: smaller ones are left out", ge=0, since=2)
    limit: int | None = knob(None, "samples at most, chosen by a hash of their paths: spread over all folders", ge=1, since=2)
    name: str = knob("", NAME_HELP, identity=False, since=2)

    def __post_init__(self) -> None:
        require_rule("source.group", self.group, ("parent",))
        require_rule("source.label", self.label, ("path", "leaf", "none"))
        for ext in self.extensions:
            if ext not in FOLDER_EXTENSIONS:
                raise ConfigError(f"source.extensions has {ext!r}, which is not read{did_you_mean(ext, FOLDER_EXTENSIONS)}")
        require_name(self.name)
        object.__setattr__(self, "include", globs("source.include", self.include))
        object.__setattr__(self, "exclude", globs("source.exclude", self.exclude))


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
        self._group = folder.group
        self._bags = folder.group == "parent"
        self._frames = self._frame_reader() if folder.frames == "all" else None
        self._follow = folder.follow_links
        self._limit = folder.limit
        self._filter = PathFilter(folder.include, folder.exclude, folder.min_size)
        self._first_read = FIRST_READ_BYTES  # until the first file that does not fit
        self._states = dict[str, str | None]()  # of the files that were read, after that

    def listing(self) -> Listing:
        """List all files of the known extensions, sorted by relative path.

        Raises
        ------
        DataError
            If the folder is missing, is a file (an archive must be unpacked), cannot be read, or holds no such file.
        """
        self._require_folder()
        skipped = Skipped()
        found = self._walk(skipped)
        if not len(found):
            raise DataError(self._nothing(skipped))
        columns = found.columns()
        paths, labels = columns.paths, columns.folders
        if self._bags and "" in labels.distinct():
            raise DataError(
                f"{self._url}/{paths[labels.index('')]} is in no folder, and source.group=parent takes the folder of a file as its bag: "
                "move it into one, or leave source.group out"
            )
        names = labels.mapped(_clean)
        tops = names.mapped(lambda name: name.partition("/")[0])
        bags = labels if self._bags else None
        if self._bags:
            names = names.mapped(lambda name: name.rpartition("/")[0])
        listing = Listing(_keys(paths), paths, columns.sizes, label_names=names, splits=tops, groups=bags)
        listing = listing.with_young(columns.states, columns.young)
        listing = with_limit(listing, self._limit, self._group, paths)
        if len(listing) < len(paths):
            paths = Texts.of(listing.sources)
            labels = Texts.of([path.rpartition("/")[0] for path in paths])
        notes = (*self._says_what_is_a_sample(paths), *mask_notes(paths, labels), *skipped.lines(), *self._filter.unused(), *listing.notes)
        return self._framed(dataclasses.replace(listing, notes=notes))

    def _frame_reader(self) -> "FrameReader":
        from aecore.data.sources._frames import FrameReader

        return FrameReader(lambda source: self._file(source))

    def _framed(self, listing: Listing) -> Listing:
        if self._frames is None:
            return listing
        from aecore.data.sources._frames import with_frames

        framed = with_frames(listing, self._file, self._frames.max_pixels)
        return with_limit(framed, self._limit, self._group, framed.sources)

    def _nothing(self, skipped: Skipped) -> str:
        """Return the error of a folder without a sample."""
        found = "".join(f"\n  {note}" for note in (*skipped.lines(), *self._filter.unused()))
        what = f"source.url {self._url} holds no file with one of the extensions {', '.join(sorted(self._extensions))}"
        return f"{what} that is taken as a sample:{found}" if found else f"{what}, and no other file: check the address"

    def _says_what_is_a_sample(self, paths: Sequence[str]) -> list[str]:
        """Return the note about arrays, whose files could be samples or rows of samples."""
        if not self._extensions & {"npy", "npz"}:
            return []
        arrays = [path for path in paths if _extension(path) in ("npy", "npz")]
        if not arrays:
            return []
        files = counted(len(arrays), ".npy or .npz file", ".npy or .npz files")
        notes = [f"one sample per file: {files} (source.kind=arrays takes each row of them as one)"]
        first = next((path for path in arrays if _extension(path) == "npz"), None)
        if first is None:
            return notes
        from aecore.data.sources._npz import left_out

        if (known := left_out(self._prefix + first)) is not None:
            others = shown_examples(known[1], len(known[1]))
            notes.append(f"of an .npz one array is the sample: of {first} that is {known[0]!r}, not {others}")
        return notes

    def read(self, source: str) -> tuple[str, bytes]:
        """Return extension and all bytes of one file (or frame), of an `.npz` those of its one array as `npy`.

        Raises
        ------
        OSError
            If it cannot be read, or is shorter than its size.
        BadSample
            If it is a link that leads nowhere, or an `.npz` in which no array or several may be the sample.
        DataError
            Before all is read, if it has more than `MAX_MEMBER_BYTES`: it has grown since it was listed.
        """
        return self._file(source) if self._frames is None else self._frames(source)

    def prefetch(self, sources: Sequence[str]) -> Callable[[str], tuple[str, bytes]]:
        """Return a `read` for these samples: of several frames of a file the file stays open between them."""
        self._states.clear()
        if self._frames is not None:
            self._frames.expect(sources)
        return self.read

    def read_states(self, sources: Sequence[str]) -> list[str | None]:
        """Return the states of the files of these samples, which were read since the last `prefetch`, after their last byte was."""
        return [self._states.get(source if self._frames is None else file_of(source)) for source in sources]

    def bound_pixels(self, most: int) -> None:
        """Decode no frame of more pixels."""
        if self._frames is not None:
            self._frames.max_pixels = most

    def _file(self, source: str) -> tuple[str, bytes]:
        path = self._prefix + source
        try:
            descriptor = os.open(path, _READ_FLAGS)  # half the time of `open`
        except OSError as error:
            if self._follow and (target := leads_nowhere(path, error)) is not None:
                raise BadSample("broken_link", f"a symbolic link to {target!r}, which is not there: {FETCH}") from error
            raise
        try:
            data, found = os.read(descriptor, self._first_read), os.fstat(descriptor)
            size = found.st_size
            if len(data) == self._first_read or len(data) < size:
                self._first_read = LARGE_READ_BYTES
                if size > MAX_MEMBER_BYTES:
                    raise DataError(
                        f"{path} has grown to {size} bytes since it was listed, at most {MAX_MEMBER_BYTES} are read as one sample: "
                        "wait until it is written, or move it away, then run the same command again"
                    )
                data += _rest(descriptor, size)
                found = os.fstat(descriptor)
        except OSError as error:
            raise OSError(error.errno, error.strerror, path) from error
        finally:
            close_read(descriptor)
        if len(data) < size:
            raise OSError(errno.EIO, f"only {len(data)} of its {size} bytes were read", path)
        self._states[source] = local_state(found)
        return _member(source, data)

    def file_root(self) -> Path | None:
        """Return the folder, if samples are the bytes of the files below it."""
        return self._root if self._frames is None else None

    def _require_folder(self) -> None:
        if self._root.is_dir():
            return
        if not self._root.exists():
            raise DataError(f"source.url {self._root} does not exist: check the address")
        if not self._root.is_file():
            raise DataError(f"source.url {self._root} is a pipe or a device: source.kind=folder reads a folder")
        if zipfile.is_zipfile(self._root) and not self._url.lower().endswith(".npz"):
            target = self._root.with_suffix("")
            unpack = f"unpack it (`unzip {self._root} -d {target}`) and give the folder {target}"
            raise DataError(f"source.url {self._root} is a zip file: {unpack}")
        raise DataError(_is_a_file(self._url))

    def _walk(self, skipped: Skipped) -> "_Found":
        """Return the files that are samples."""
        found = _Found(settled_ns(self._root))
        links = LinkedFolders(self._url, "remove the link, or leave it out by source.exclude") if self._follow else None
        with ThreadPoolExecutor(LISTERS) as listing:
            folders = deque([("", () if links is None else links.enter("", ()), listing.submit(_entries, self._root))])
            while folders:
                prefix, chain, entries = folders.popleft()
                try:
                    within = self._sort_out(prefix, entries.result(), found, skipped)
                    inside = [(name, chain if links is None else links.enter(name, chain)) for name in within]
                except OSError as error:
                    where = self._root / prefix / (error.filename if isinstance(error.filename, str) else "")
                    raise cannot_read(where, error) from error
                folders += [(name, above, listing.submit(_entries, self._root / name)) for name, above in inside]
        return found

    def _sort_out(self, prefix: str, entries: Entries, found: "_Found", skipped: Skipped) -> list[str]:
        """Add the samples of one folder to `found`; return the folders in it."""
        if (
            len(entries.sizes)
            and entries.sizes.min() >= 0
            and entries.joined[:1] > b"."
            and set(map(_USUAL.get, _endings(entries.joined))) <= self._extensions
            and not self._filter.is_set
        ):
            found.add_folder(prefix, entries)  # nearly all folders
            return []
        folders = []
        for name, size, seen in zip(entries.names, entries.sizes.tolist(), found.seen_in(entries), strict=True):
            path = prefix + name
            if unseen_part(name) is not None:
                skip_unseen(skipped, path)
                continue
            mode = os.lstat(self._prefix + path).st_mode if size < 0 else stat.S_IFREG
            if stat.S_ISLNK(mode):
                mode, size, seen = self._linked(path, found.settled, skipped)  # of a link to nothing -1
                if mode == 0:
                    continue
            elif size < 0:
                size, seen = 0, None
            if stat.S_ISDIR(mode):
                if self._filter.takes_folder(path, skipped):
                    folders.append(f"{path}/")
            elif "." not in name or _extension(name) not in self._extensions:
                skip_file(skipped, path)
            elif self._filter.takes(path, size if size >= 0 else sys.maxsize, skipped):
                found.add(path, max(size, 0), seen)
        return folders

    def _linked(self, path: str, settled: int, skipped: Skipped) -> tuple[int, int, Seen | None]:
        """Return the mode and the bytes of what a link leads to (-1: nothing is there), and what is seen of it; mode 0 if not followed."""
        try:
            state = os.stat(self._prefix + path)
        except OSError as error:
            if leads_nowhere(self._prefix + path, error) is None:
                raise
            if self._follow and "." in path.rpartition("/")[2] and _extension(path) in self._extensions:
                return stat.S_IFREG, -1, None  # a sample that cannot be read: its quarantine row says so
            skipped.add("symbolic link(s) to nothing", path, FETCH)
            return 0, 0, None
        followed = state.st_mode, state.st_size, local_seen(state, settled)
        if self._follow:
            if stat.S_ISREG(state.st_mode) or stat.S_ISDIR(state.st_mode):
                return followed
            skipped.add("symbolic link(s) to pipes or devices", path, "remove the links")
            return 0, 0, None
        if stat.S_ISDIR(state.st_mode):
            skipped.add("symbolic link(s) to folders", path, "set source.follow_links=true to list what is in them")
            return 0, 0, None
        if not stat.S_ISREG(state.st_mode) or not self._stays_inside(path):
            skipped.add("symbolic link(s) out of the folder", path, "set source.follow_links=true to follow them")
            return 0, 0, None
        return followed

    def _stays_inside(self, link: str) -> bool:
        return Path(os.path.realpath(self._root / link)).is_relative_to(os.path.realpath(self._root))


class BucketSource(FolderSource):
    """The objects below an `s3://` URL, listed and named as the same files in a folder would be."""

    def __init__(self, folder: FolderSpec) -> None:
        super().__init__(folder)
        self._files = open_files(self._url)

    def _file(self, source: str) -> tuple[str, bytes]:
        data = self._files.read(source)
        self._states[source] = self._files.state(source)
        return _member(source, data)

    def file_root(self) -> None:
        """Return None: objects are not local files."""

    def prefetch(self, sources: Sequence[str]) -> Callable[[str], tuple[str, bytes]]:
        """Return a `read` for exactly these objects in this order, which are downloaded in the background."""
        if self._frames is not None:
            return super().prefetch(sources)
        self._states.clear()
        body = self._files.prefetch(sources)

        def read(source: str) -> tuple[str, bytes]:
            data = body(source)
            self._states[source] = self._files.state(source)
            return _member(source, data)

        return read

    def _require_folder(self) -> None:
        """Do nothing: listing the objects finds out."""

    def _walk(self, skipped: Skipped) -> "_Found":
        sizes = self._files.sizes(hidden=True)
        for part in sorted({part for name in sizes if (part := unseen_part(name)) is not None}):
            skip_unseen(skipped, part)
        if skipped:
            sizes = {name: size for name, size in sizes.items() if unseen_part(name) is None}
        every = not self._filter.is_set and {_USUAL.get(name[-4:]) for name in sizes} <= self._extensions
        found = _Found()
        for name, size in sizes.items():
            if not every and ("." not in name.rpartition("/")[2] or _extension(name) not in self._extensions):
                skip_file(skipped, name)
            elif every or self._filter.takes(name, size, skipped):
                found.add(name, size, self._files.seen(name))
        return found


class _Columns(NamedTuple):
    """The files that a walk found, sorted by path: paths, their folders ("" for those in none), sizes, states, the rows of young ones."""

    paths: Texts
    folders: Texts
    sizes: NDArray[np.int64]
    states: Texts
    young: Sequence[int]


class _Found:
    """The files that a walk finds, folder by folder. `settled` is that of `settled_ns`."""

    def __init__(self, settled: int = 0) -> None:
        self.settled = settled
        self._parts = list[_Columns]()
        self._rows = list[tuple[str, int, Seen | None]]()  # of files that were found one by one

    def __len__(self) -> int:
        return len(self._rows) + sum(len(part.paths) for part in self._parts)

    def add(self, path: str, size: int, seen: Seen | None) -> None:
        self._rows.append((path, size, seen))

    def add_folder(self, prefix: str, entries: Entries) -> None:
        """Add everything in a folder: regular files alone."""
        self._finish_rows()
        young = np.flatnonzero(entries.changed > self.settled)
        folders = Texts.coded([prefix[:-1]], np.zeros(len(entries.sizes), np.int32))
        paths, states = of_folder(prefix, entries.joined), of_width(entries.characters[:, :-1])
        self._parts.append(_Columns(paths, folders, entries.sizes, states, young.tolist()))

    def _finish_rows(self) -> None:
        if not self._rows:
            return
        paths, sizes, seen = zip(*self._rows, strict=True)
        folders = [path.rpartition("/")[0] for path in paths]
        known = {folder: number for number, folder in enumerate(dict.fromkeys(folders))}
        codes = np.array([known[folder] for folder in folders], np.int32)
        states = Texts.of([None if state is None else state.state for state in seen])
        young = [row for row, state in enumerate(seen) if state is not None and state.young]
        self._parts.append(_Columns(Texts.of(paths), Texts.coded(list(known), codes), np.array(sizes, np.int64), states, young))
        self._rows = []

    def columns(self) -> _Columns:
        """Return all files."""
        self._finish_rows()
        starts = np.cumsum([0, *(len(part.paths) for part in self._parts)]).tolist()
        young = [start + row for start, part in zip(starts, self._parts, strict=False) for row in part.young]
        paths, folders, states = (joined([getattr(part, name) for part in self._parts]) for name in ("paths", "folders", "states"))
        sizes = np.concatenate([part.sizes for part in self._parts])
        if paths.is_sorted():  # mostly they are, as folders are walked in their order
            return _Columns(paths, folders, sizes, states, young)
        order = paths.order()
        if young:
            is_young = np.zeros(len(sizes), np.bool_)
            is_young[young] = True
            young = np.flatnonzero(is_young[order]).tolist()
        return _Columns(paths.take(order), folders.take(order), sizes[order], states.take(order), young)

    def seen_in(self, entries: Entries) -> Iterator[Seen | None]:
        return map(Seen, entries.states, (entries.changed > self.settled).tolist())


def _member(source: str, data: bytes) -> tuple[str, bytes]:
    ext = _extension(source)
    if ext != "npz":
        return ext, data
    from aecore.data.sources._npz import only_array

    return "npy", only_array(data)


def _is_a_file(url: str) -> str:
    """Return the error about an address that is a file and not a folder."""
    if _extension(url) in IMAGE_EXTENSIONS:
        return f"source.url {url} is one image: give the folder that holds it, {url.rpartition('/')[0] or '/'}"
    what, remedy = kind_of_file(url)
    if _extension(url) in ("npy", "npz"):
        remedy = f"source.kind=arrays takes its rows as samples; for one sample per file give the folder, {url.rpartition('/')[0] or '/'}"
    return f"source.url {url} is a file, and source.kind=folder reads a folder; it is one of the {what}: {remedy}"


def _extension(source: str) -> str:
    return _USUAL.get(source[-4:]) or source.rpartition(".")[2].lower()  # a third of the time for nearly all names


def _endings(joined: bytes) -> set[str]:
    """Return the different last four characters of names, each ended by a zero byte, if these are ASCII; "" for shorter names."""
    data = np.frombuffer(joined, np.uint8)
    ends = np.flatnonzero(data == 0)
    if np.diff(ends, prepend=-1).min(initial=5) < 5:
        return {""}
    last = np.unique(data[ends[:, None] + np.arange(-4, 0)].view("<u4"))
    return {int(ending).to_bytes(4, "little").decode("latin-1") for ending in last}


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        close_read(descriptor)


def _entries(folder: Path) -> Entries:
    """Return what is in a folder. OSError if it cannot be read."""
    with _opened(folder) as descriptor:
        return list_folder(descriptor)


def _rest(descriptor: int, size: int) -> bytes:
    """Return what is left to read of a file of this size, in one read if the size is right."""
    pieces = list[bytes]()
    while piece := os.read(descriptor, max(size, LARGE_READ_BYTES)):
        pieces.append(piece)
    return b"".join(pieces)


def _clean(folder: str) -> str:
    """Return a folder without empty names: `a//b` in a bucket is the class `a/b`."""
    return "/".join(filter(None, folder.split("/"))) if "//" in f"/{folder}/" else folder


def _keys(paths: Texts) -> Texts:
    """Return the key of each path: without its extension, unless two files of one folder differ only in it."""
    stems = paths.without_ending(4) if paths.ending(4) in _USUAL else Texts.of([path.rpartition(".")[0] for path in paths])
    if stems.all_different():
        return encode_keys(stems)
    shared = {stem for stem, count in Counter(stems).items() if count > 1}
    return encode_keys(Texts.of([path if stem in shared else stem for path, stem in zip(paths, stems, strict=True)]))
