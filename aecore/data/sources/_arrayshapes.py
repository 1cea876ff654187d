"""Whether files of arrays are samples or hold samples as rows, by their names and shapes. Only headers are read.

Rows: idx files; arrays with labels of the same length; names that say no more than split and content (`x_train.npy`, `images.npy`); a
single file, unless it lies in a class folder and has the shape of a sample; arrays whose first axis is far longer than the others
(`[60000, 28, 28]`), or of images (`[500, 32, 32, 3]`) unless there are more files than rows. Samples: an axis of channels next to two
sides (`[H, W, 5]`, `[5, H, W]`), volumes, short sequences, and long ones if their lengths differ (chunks of rows have one length, but
the last).
"""

import zipfile
from collections.abc import Sequence
from math import inf
from typing import IO, NamedTuple

from aecore.data.format.record import NpyError, read_npy_header
from aecore.data.sources._arrayfile import array_format, stem_of
from aecore.data.sources._names import is_data, is_labels, partner, subject, without_split
from aecore.errors import DataError
from aecore.store import Files

MOST_CHANNELS = 16
COLOURS = (1, 3, 4)
FAR = 8  # the first axis of rows is this much longer than the others of images
LONG, VERY_LONG = 1000, 20_000  # steps of a sequence that may be rows, and that are rows if a row has at least FEATURES values
FEATURES = 16


class Peek(NamedTuple):
    """The shape of the array in a file that would hold the samples, and whether labels in the same `.npz` say that it holds rows."""

    name: str
    shape: tuple[int, ...]
    labelled: bool | None = None  # True: a label for each row; False: one label


def peek(files: Files, name: str) -> Peek | None:
    """Return what the header of a `.npy` or `.npz` says; None for other files and damaged ones, which are judged when they are read.

    Of an object a few kilobytes are requested. StoreError if they cannot be.
    """
    if array_format(name) not in ("npy", "npz"):
        return None
    try:
        with files.start(name) as file:
            return Peek(name, read_npy_header(file).shape) if array_format(name) == "npy" else _of_npz(file, name)
    except (OSError, DataError, NpyError, zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError):
        return None


def _of_npz(packed: IO[bytes], name: str) -> Peek | None:
    shapes = dict[str, tuple[int, ...]]()
    with zipfile.ZipFile(packed) as archive:
        for member in archive.namelist():
            if member.endswith(".npy"):
                with archive.open(member) as file:
                    shapes[member[:-4]] = read_npy_header(file).shape
    data = [key for key in shapes if not is_labels(key) and shapes[key]]
    data = [key for key in data if is_data(key)] or data
    if not data:
        return None
    first = data[0]
    labels = partner(first, data, [key for key in shapes if is_labels(key)])
    if len({without_split(key) for key in data}) < len(data):  # x_train, x_test
        return Peek(name, shapes[first], True)
    if labels is None:
        return Peek(name, shapes[first])
    return Peek(name, shapes[first], bool(shapes[labels]) and shapes[labels][0] == shapes[first][0])


def hold_rows(names: Sequence[str], peeks: Sequence[Peek]) -> bool | None:
    """Return whether the files `names` hold samples as rows (False: each file is a sample); None if neither is clear.

    `peeks` are the headers of some of them.
    """
    if any(array_format(name) == "idx" for name in names):
        return True
    if len(names) == 1:
        return not ("/" in names[0] and peeks and _of_shape(peeks[0], 1) is False)
    stems = [stem_of(name).rpartition("/")[2] for name in names]
    data = [stem for stem in stems if not is_labels(stem)]
    if len(set(stems)) == len(stems) and data:
        if any(partner(stem, data, [other for other in stems if is_labels(other)]) for stem in data):
            return True
        if not any(without_split(" ".join(subject(stem))) for stem in data):  # train.npy, x_test.npy
            return True
    answers = {_of_shape(found, len(data) or len(names)) for found in peeks}
    if True in answers:
        return None if False in answers else True
    if answers == {None}:
        return False if _differ_like_sequences(peeks) else None
    return False


def _differ_like_sequences(peeks: Sequence[Peek]) -> bool:
    lengths = {found.shape[0] for found in peeks}
    return len(lengths) > 2 and len({found.shape[1:] for found in peeks}) == 1 and all(len(found.shape) == 2 for found in peeks)


def _of_shape(found: Peek, num_files: int) -> bool | None:
    if found.labelled is not None:
        return found.labelled
    shape = found.shape
    if len(shape) < 2 or 0 in shape:
        return False
    rows, rest = shape[0], shape[1:]
    if len(shape) == 2:
        if rows < LONG or rows <= 4 * rest[0]:
            return False
        return True if rows >= VERY_LONG and rest[0] >= FEATURES else None
    if len(shape) == 3:
        if rows > FAR * max(rest):
            return True
        if _is_channels(shape[2], shape[:2]) or _is_channels(rows, rest) or rows <= max(rest):
            return False
        return None
    if len(shape) == 4 and (shape[3] in COLOURS or shape[1] in COLOURS):
        return num_files <= rows
    return rows > MOST_CHANNELS and num_files <= rows


def _is_channels(axis: int, sides: Sequence[float]) -> bool:
    return axis <= MOST_CHANNELS and axis < min(sides, default=inf)
