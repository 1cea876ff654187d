"""Files that are probably masks of the images next to them: they are samples like all others, so the log says how to leave them out."""

from collections.abc import Iterator, Sequence

from aecore.data.sources._skipped import first_of
from aecore.errors import counted
from aecore.native.texts import Texts

_WORDS = ("mask", "seg", "label", "annot", "_gt", "-gt", "/gt", "matte", "trimap")
_NAMES = ("mask", "masks", "seg", "segmentation", "segmentations", "label", "labels", "labelids", "gt", "annotation", "annotations")
_FOLDERS = frozenset((*_NAMES, "trimap", "trimaps", "matte", "mattes"))
_SUFFIXES = tuple(f"{mark}{word}" for mark in "_-." for word in sorted(_FOLDERS))
SHOWN = 3
BLOCK = 4000  # names: what is in none of three such blocks is not looked for in a million others


def mask_notes(paths: Sequence[str], folders: Sequence[str]) -> tuple[str, ...]:
    """Return the notes about masks: `a_mask.png` next to `a.png`, `masks/a.png` next to `images/a.png`, `a.png` next to `a.jpg`."""
    found, paths, folders = dict[str, list[str]](), Texts.of(paths), Texts.of(folders)
    starts = () if len(paths) <= 3 * BLOCK else (0, len(paths) // 2, len(paths) - BLOCK)
    some = [path for at in starts for path in paths[at : at + BLOCK].tolist()] or paths.tolist()
    text = "\0".join((*some, *folders.distinct())).lower()
    if any(word in text for word in _WORDS):
        for pattern, path in (*_by_suffix(paths), *_by_folder(paths, folders)):
            found.setdefault(pattern, []).append(path)
    endings = {ending.lower() for ending in {path[-4:] for path in some}}
    if endings & {".jpg", "jpeg"} and ".png" in endings:
        for pattern, path in _by_extension(paths):
            found.setdefault(pattern, []).append(path)
    notes = []
    for pattern, those in sorted(found.items(), key=lambda item: -len(item[1]))[:SHOWN]:
        others = _num_matches(pattern, paths) - len(those)
        advice = f"source.exclude='{pattern}' leaves them out" + (f", and {counted(others, 'file', 'files')} with them" if others else "")
        if others > len(those):  # the pattern is that of the samples
            advice = "if they are masks, name them in source.exclude"
        examples = first_of(those)
        what = counted(len(those), "file has", "files have")
        notes.append(f"{what} the name of another sample and may be masks of it ({examples}): each is a sample too; {advice}")
    return tuple(notes)


def _num_matches(pattern: str, paths: Sequence[str]) -> int:
    """Return how many files one of the patterns of this module leaves out."""
    if pattern.startswith("*"):
        return sum(path.endswith(pattern[1:]) for path in paths)
    return sum(f"/{pattern}/" in f"/{path}" for path in paths)


def _by_suffix(paths: Sequence[str]) -> Iterator[tuple[str, str]]:
    stems = {path.rpartition(".")[0] for path in paths}
    for path in paths:
        stem, _, ext = path.rpartition(".")
        for suffix in _SUFFIXES:
            if stem.lower().endswith(suffix) and stem[: -len(suffix)] in stems:
                yield f"*{stem[-len(suffix) :]}.{ext}", path
                break


def _by_folder(paths: Sequence[str], folders: Texts) -> Iterator[tuple[str, str]]:
    known = set(folders.distinct())
    siblings = dict[tuple[str, str], set[str]]()  # what is above a folder of masks and below it -> the names that are between these
    for folder in known:
        for above, name, below in _components(folder):
            if name.lower() in _FOLDERS:
                siblings.setdefault((above, below), set())
    for folder in known if siblings else ():
        for above, name, below in _components(folder):
            if (above, below) in siblings:
                siblings[above, below].add(name)
    twins = dict[str, tuple[str, str, str]]()  # a folder of masks -> its name, what is above it and below it
    for folder in known if siblings else ():
        for above, name, below in _components(folder):
            if name.lower() in _FOLDERS and len(siblings[above, below]) > 1:
                twins[folder] = name, above, below
    if not twins:
        return
    among = dict[tuple[str, str, str], set[str]]()  # what is around a folder of masks, name of a file -> the folders that have it
    pairs = {(above, below) for _, above, below in twins.values()}
    for path, folder in zip(paths, folders, strict=True):
        for above, _, below in _components(folder):
            if (above, below) in pairs:
                among.setdefault((above, below, _stem(path)), set()).add(folder)
    for path, folder in zip(paths, folders, strict=True):
        if folder in twins and len(among[(*twins[folder][1:], _stem(path))]) > 1:
            yield twins[folder][0], path


def _components(folder: str) -> Iterator[tuple[str, str, str]]:
    """Yield each component of a path with what is above it and below it."""
    names = folder.split("/")
    for at, name in enumerate(names):
        yield "/".join(names[:at]), name, "/".join(names[at + 1 :])


def _by_extension(paths: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield PNGs next to JPEGs of the same name: a mask has to be stored without loss."""
    photos = {path.rpartition(".")[0] for path in paths if path.lower().endswith((".jpg", ".jpeg"))}
    for path in paths:
        if path.lower().endswith(".png") and path[:-4] in photos:
            yield f"*{path[-4:]}", path


def _stem(path: str) -> str:
    return path.rpartition("/")[2].rpartition(".")[0]
