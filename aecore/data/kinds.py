"""Which kind of source lies at an address, said by names alone: nothing is opened."""

from aecore.data.arrayfile import array_format
from aecore.data.foreign import TAR_ENDINGS
from aecore.data.record import IMAGE_EXTENSIONS
from aecore.errors import AecoreError
from aecore.store import absolute_url, open_files

DEFAULT = "folder"


def kind_of(url: str) -> str:
    """Return arrays or webdataset where all that is data at `url` is of that kind, else folder.

    A folder counts by the names of the files below it; one that holds images, or kinds side by side, is a folder of files.
    """
    where = absolute_url(url, "SRC")
    known = _of_name(where)
    if known is not None:
        return known
    try:
        names = open_files(where).sizes()
    except AecoreError:
        return DEFAULT  # whose own error says what is wrong
    kinds = {kind for name in names if (kind := _of_name(name)) is not None}
    return kinds.pop() if len(kinds) == 1 else DEFAULT


def _of_name(name: str) -> str | None:
    if name.endswith(TAR_ENDINGS):
        return "webdataset"
    if array_format(name) is not None:
        return "arrays"
    return DEFAULT if name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS else None
