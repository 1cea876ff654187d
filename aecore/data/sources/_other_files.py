"""Files that are no samples: counted by what they are, with what to do with them."""

from aecore.data.format.file_kinds import TABLE, remedy_for
from aecore.data.format.record import DATA_EXTENSIONS
from aecore.data.sources._names import array_format
from aecore.data.sources._skipped import Skipped

_KINDS = {ext: (kind.what, remedy_for(kind, one=False)) for kind in TABLE for ext in kind.extensions.split()}
_IDX = ("file(s) of idx arrays", "shard them by source.kind=arrays")
_ARRAYS = ("array(s)", "source.extensions=EXTS takes each file as one sample, source.kind=arrays each row of its first axis")
_UPPER = ("array(s)", "source.extensions=EXTS takes each file as one sample; to take their rows rename them to .npy or .npz")
_PICTURES = "image(s)"
OF_SYSTEM, _OF_SYSTEM = "file(s) of the operating system", ("thumbs.db", "ehthumbs.db", "desktop.ini", ".ds_store")
_NAMELESS = ("file(s) without an extension", "give them the extension of what they are, if they are samples (.png, .jpg, .npy)")
_UNKNOWN = ("file(s) of unknown extensions", "convert them to PNG, TIFF or JPEG, or save each as .npy, if they are samples")


def is_of_system(name: str) -> bool:
    """Return whether a file or folder is metadata of Windows or macOS: `._0.jpg` holds attributes of `0.jpg`, no picture."""
    last = name[name.rfind("/") + 1 :]
    return last.startswith("._") or last.lower() in _OF_SYSTEM or ("__" in name and "__macosx" in name.lower().split("/"))


def kind_of_file(name: str) -> tuple[str, str]:
    """Return what a file that is no sample is, by its name (a plural), and what to do with it."""
    what, remedy = _kind(name)
    return what.replace("(s)", "s"), remedy


def _kind(name: str) -> tuple[str, str]:
    last = name.rpartition("/")[2].lower()
    if is_of_system(name):
        return OF_SYSTEM, ""
    if array_format(last) == "idx":
        return _IDX
    stem, dot, ext = last.rpartition(".")
    if not dot or not stem:
        return _NAMELESS
    double = f"{stem.rpartition('.')[2]}.{ext}"
    if double in _KINDS:
        return _KINDS[double]
    if ext in ("npy", "npz"):
        return _ARRAYS if name.endswith((".npy", ".npz")) else _UPPER
    if ext in DATA_EXTENSIONS:
        return _PICTURES, ""
    return _KINDS.get(ext, _UNKNOWN)


def unseen_part(path: str) -> str | None:
    """Return the file, or the first of its folders, that is hidden or of the operating system, so that nothing in it is a sample."""
    if "/." not in f"/{path}" and not is_of_system(path):  # nearly all
        return None
    parts = path.split("/")
    above = ("/".join(parts[: depth + 1]) for depth in range(len(parts)))
    return next(part for part in above if is_of_system(part) or part[part.rfind("/") + 1 :].startswith("."))


def skip_unseen(skipped: Skipped, part: str) -> None:
    """Count what `unseen_part` returned."""
    skipped.add(OF_SYSTEM if is_of_system(part) else "hidden file(s) or folder(s)", part)


def skip_file(skipped: Skipped, path: str, pictures: str = "add EXTS to source.extensions to take them too") -> None:
    """Count a file that is no sample here; `pictures` is what to do with images, which some sources read."""
    what, remedy = _kind(path)
    skipped.add(what, path, pictures if what == _PICTURES else remedy, ext=path.rpartition(".")[2].lower())
