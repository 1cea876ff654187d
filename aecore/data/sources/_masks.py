"""Files that are probably masks of the images next to them: they are samples like all others, so the log says how to leave them out."""

from collections.abc import Iterator

_WORDS = ("mask", "seg", "label", "annot", "_gt", "-gt", "/gt", "matte", "trimap")
_NAMES = ("mask", "masks", "seg", "segmentation", "segmentations", "label", "labels", "labelids", "gt", "annotation", "annotations")
_FOLDERS = frozenset((*_NAMES, "trimap", "trimaps", "matte", "mattes"))
_SUFFIXES = tuple(f"{mark}{word}" for mark in "_-." for word in sorted(_FOLDERS))
SHOWN = 3
BLOCK = 4000  # names: what is in none of three such blocks is not looked for in a million others


def mask_notes(paths: list[str], folders: list[str]) -> tuple[str, ...]:
    """Return the notes about masks: `a_mask.png` next to `a.png`, `masks/a.png` next to `images/a.png`, `a.png` next to `a.jpg`."""
    found = dict[str, list[str]]()
    some = (
        paths if len(paths) <= 3 * BLOCK else [path for at in (0, len(paths) // 2, len(paths) - BLOCK) for path in paths[at : at + BLOCK]]
    )
    text = "\0".join((*some, *set(folders))).lower()
    if any(word in text for word in _WORDS):
        for pattern, path in (*_by_suffix(paths), *_by_folder(paths, folders)):
            found.setdefault(pattern, []).append(path)
    endings = {path[-4:].lower() for path in some}
    if endings & {".jpg", "jpeg"} and ".png" in endings:
        for pattern, path in _by_extension(paths):
            found.setdefault(pattern, []).append(path)
    notes = []
    for pattern, those in sorted(found.items(), key=lambda item: -len(item[1]))[:SHOWN]:
        examples = ", ".join(those[:SHOWN]) + (", ..." if len(those) > SHOWN else "")
        notes.append(
            f"{len(those)} files have the name of another sample and may be masks of it ({examples}): they are samples too; "
            f"source.exclude='{pattern}' leaves them out"
        )
    return tuple(notes)


def _by_suffix(paths: list[str]) -> Iterator[tuple[str, str]]:
    stems = {path.rpartition(".")[0] for path in paths}
    for path in paths:
        stem, _, ext = path.rpartition(".")
        for suffix in _SUFFIXES:
            if stem.lower().endswith(suffix) and stem[: -len(suffix)] in stems:
                yield f"*{stem[-len(suffix) :]}.{ext}", path
                break


def _by_folder(paths: list[str], folders: list[str]) -> Iterator[tuple[str, str]]:
    known = set(folders)
    twins = dict[str, tuple[str, list[str]]]()  # a folder of masks -> its own name, the folders next to it
    for folder in known:
        names = folder.split("/")
        for at, name in enumerate(names):
            if name.lower() in _FOLDERS:
                others = [other for other in known if (parts := other.split("/"))[:at] + parts[at + 1 :] == names[:at] + names[at + 1 :]]
                if len(others) > 1:
                    twins[folder] = name, [other for other in others if other != folder]
    if not twins:
        return
    stems = {(folder, _stem(path)) for path, folder in zip(paths, folders, strict=True)}
    for path, folder in zip(paths, folders, strict=True):
        if folder in twins and any((other, _stem(path)) in stems for other in twins[folder][1]):
            yield twins[folder][0], path


def _by_extension(paths: list[str]) -> Iterator[tuple[str, str]]:
    """Yield PNGs next to JPEGs of the same name: a mask has to be stored without loss."""
    photos = {path.rpartition(".")[0] for path in paths if path.lower().endswith((".jpg", ".jpeg"))}
    for path in paths:
        if path.lower().endswith(".png") and path[:-4] in photos:
            yield f"*{path[-4:]}", path


def _stem(path: str) -> str:
    return path.rpartition("/")[2].rpartition(".")[0]
