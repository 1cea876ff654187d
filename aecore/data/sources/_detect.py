"""Detect the kind of source at an address, by file names alone: no file is opened."""

import os
import re
from collections.abc import Iterator

from aecore.data.format.record import IMAGE_EXTENSIONS
from aecore.data.sources._arrayfile import array_format
from aecore.data.sources._external_tars import TAR_ENDINGS
from aecore.store import absolute_url, is_remote

DEFAULT = "folder"
_MANIFEST = re.compile(r"dataset\.\d{6}\.json")


def kind_of(url: str) -> str:
    """Return arrays or webdataset if all data files at `url` are of that kind, else folder.

    A local folder is judged by the names of the files below it, up to the first image. One with images or with several kinds is a
    folder of files, and so is a dataset of aecore: sharding its tars again would lose the metadata in its index. A bucket is not listed
    for this: set `source.kind`, unless the address is one file.
    """
    where = absolute_url(url, "SRC")
    known = _of_name(where)
    if known is not None:
        return known
    kinds = set[str]()
    for name in () if is_remote(where) else _names(where):
        kind = _of_name(name)
        if kind == DEFAULT or _MANIFEST.fullmatch(name):
            return DEFAULT
        kinds |= {kind} if kind is not None else set()
    return kinds.pop() if len(kinds) == 1 else DEFAULT


def _names(folder: str) -> Iterator[str]:
    for _, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (name for name in names if not name.startswith("."))


def _of_name(name: str) -> str | None:
    if name.endswith(TAR_ENDINGS):
        return "webdataset"
    if array_format(name) is not None:
        return "arrays"
    return DEFAULT if name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS else None
