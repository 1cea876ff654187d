"""Detect the kind of source at an address: by file names alone, and for folders of arrays also by the shapes in some headers.

A bucket is judged by the same rules as a folder. Its objects are listed page by page up to the first image: mostly one page. A bucket
without images is listed to its end, and again by the source: a million tars or arrays cost a thousand requests more.
"""

import re
from collections.abc import Collection
from typing import TYPE_CHECKING, NamedTuple

from aecore.artifact.documents import read_json
from aecore.artifact.kinds import detect_artifact
from aecore.data.format.record import IMAGE_EXTENSIONS
from aecore.data.sources._names import array_format
from aecore.data.sources._other_files import is_of_system
from aecore.errors import ConfigError
from aecore.store import Files, absolute_url, is_tar, open_files, open_store, split_urls

if TYPE_CHECKING:
    from aecore.data.sources._arrayshapes import Peek

DEFAULT = "folder"
_OF_ROWS = frozenset({"images", "labels", "factors", "lengths", "store_as"})  # options that only rows have
PEEKED = 16  # files whose headers are read
_MANIFEST = re.compile(r"dataset\.\d{6}\.json")
_OF_DATASET = re.compile(r"(?:dataset|run)\.\d{6}\.json")


class Detected(NamedTuple):
    """The kind of a source, and the extensions of the files that are its samples (None: the kind's default)."""

    kind: str
    extensions: tuple[str, ...] | None = None


def detect_source(url: str, dataset: str = "", options: Collection[str] = ()) -> Detected:
    """Return arrays or webdataset if all data files at `url` are of that kind, dataset for those of this package, else folder.

    A folder, on a disk or in a bucket, is judged by the names of the files below it, up to the first image. One with images or with
    several kinds is a folder of files, and so is one with a dataset of aecore somewhere below it. In a
    folder of `.npy` or `.npz` files each is one sample (folder) or holds rows that are (arrays): their names and shapes tell, see
    `_arrayshapes`, unless `dataset`, the address to write to, holds a dataset already, which goes on as it began, or the names of the
    `options` that are given say it: those of labels, factors and lengths are about rows.

    Raises
    ------
    ConfigError
        If arrays in a folder may as well be samples as rows of samples.
    StoreError
        If a bucket cannot be listed.
    """
    where = absolute_url(url, "SRC")
    known = _of_name(where)
    if known is not None:
        return Detected(known)
    if len(parts := split_urls(where)) > 1:
        others = [part for part in parts if not _is_dataset(part)]
        if not others:
            return Detected("dataset")
        what = f"{', '.join(others)} {'holds' if len(others) == 1 else 'hold'} no dataset"
        raise ConfigError(f"{what}: only datasets are merged; shard it first")
    files, kinds, arrays = open_files(where), set[str](), list[str]()
    for name in files.names():
        kind = _of_name(name)
        if _OF_DATASET.fullmatch(name) and _is_dataset(where):
            return Detected("dataset")
        if kind == DEFAULT or _MANIFEST.fullmatch(name.rpartition("/")[2]):
            return Detected(DEFAULT)
        kinds |= {kind} if kind is not None else set()
        if kind == "arrays":
            arrays.append(name)
    if kinds == {"arrays"}:
        return Detected("arrays") if _OF_ROWS & {*options} else _recorded(dataset) or _of_arrays(files, sorted(arrays))
    return Detected(kinds.pop() if len(kinds) == 1 else DEFAULT)


def _is_dataset(url: str) -> bool:
    found = detect_artifact(open_store(url))
    return found is not None and found.kind == "dataset"


def _of_arrays(files: Files, names: list[str]) -> Detected:
    """Return the kind of a folder that holds arrays and no images."""
    from aecore.data.sources._arrayshapes import hold_rows, peek  # most folders hold no arrays

    chosen = names[:: -(-len(names) // PEEKED)]
    peeks = [found for name in chosen if (found := peek(files, name)) is not None]
    extensions = tuple(sorted({name.rpartition(".")[2] for name in names}))
    answer = hold_rows(names, peeks)
    if answer is None:
        raise ConfigError(_question(files.url, names, peeks[0], extensions))
    return Detected("arrays") if answer else Detected(DEFAULT, extensions)


def _question(where: str, names: list[str], example: "Peek", extensions: tuple[str, ...]) -> str:
    return (
        f"{where} holds {len(names)} files of arrays such as {example.name}, of shape {example.shape}: each may be one sample, or each of "
        f"its {example.shape[0]} rows. Set source.kind=folder source.extensions=[{','.join(extensions)}] for one sample per file, or "
        "source.kind=arrays for one per row"
    )


def _recorded(dataset: str) -> Detected | None:
    """Return what a dataset, finished or not, was written with; None if there is none that was written from arrays."""
    if not dataset:
        return None
    store = open_store(dataset)
    there = detect_artifact(store)
    if there is None or there.kind != "dataset" or there.file is None:
        return None
    identity = read_json(store, there.file).get("identity", {})
    source = identity.get("dataset", identity).get("source", {})
    if source.get("kind") == "arrays":
        return Detected("arrays")
    extensions = tuple(source.get("extensions", ()))
    return Detected(DEFAULT, extensions) if source.get("kind") == DEFAULT and {"npy", "npz"} & {*extensions} else None


def _of_name(name: str) -> str | None:
    if is_of_system(name):
        return None
    if is_tar(name):
        return "webdataset"
    if array_format(name) is not None:
        return "arrays"
    return DEFAULT if name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS else None
