"""Class names: how they are spelled, their order over generations, and how the labels of one list of classes become those of another.

A label is a number only inside one list of names: a dataset has its list (`DatasetManifest.classes`), a checkpoint of a conditional model
the one that it was trained with. Between the two labels are mapped by name. Names are compared in Unicode's normal form C: file systems
and archives write the same name in several forms.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from aecore.errors import DataError

UNKNOWN = -2  # the label of a class that the list does not have; -1 is no label
SHOWN = 5  # names in a message
MAX_CLASS_BYTES = 1 << 10  # of a name: a manifest has all of them
_MARK = "\ufeff"  # some editors begin UTF-8 files with it
_NUMBER = re.compile(r"[0-9]{1,18}")


def spelled(name: str) -> str:
    """Return the name in normal form C (`é` as one character, however it was written), without a byte order mark before it."""
    return unicodedata.normalize("NFC", name).removeprefix(_MARK)


def is_spelled(name: str) -> bool:
    """Return whether a name is as `spelled` returns it."""
    return unicodedata.is_normalized("NFC", name) and not name.startswith(_MARK)


def in_order(names: Iterable[str]) -> list[str]:
    """Return the names sorted; numbers by value, so that class 10 of 100 is number 10."""
    found = set(names)
    return sorted(found, key=lambda name: (int(name), name)) if all(map(_NUMBER.fullmatch, found)) else sorted(found)


def numbers_of(names: Iterable[str], classes: Sequence[str]) -> dict[str, int]:
    """Return the number of each name in `classes`: of the same name, else of the same one in normal form C; UNKNOWN if there is none."""
    by_name = {name: number for number, name in enumerate(classes)}
    by_form = {spelled(name): number for number, name in reversed(list(enumerate(classes)))}
    return {name: by_name.get(name, by_form.get(spelled(name), UNKNOWN)) for name in names}


def label_map(classes: Sequence[str], other: Sequence[str]) -> NDArray[np.int64] | None:
    """Return what the labels of `classes` are in `other`, with -1 last, so that `found[labels]` maps them; None if nothing changes."""
    numbers = [*numbers_of(classes, other).values(), -1]
    return None if numbers == [*range(len(classes)), -1] else np.array(numbers, np.int64)


def require_known(counts: Mapping[str, int], classes: Sequence[str], where: str, whose: str, remedy: str) -> None:
    """DataError, which names them, if samples have classes that `classes` lacks.

    `counts` are the samples of each class in `where`; `whose` says whose list it is, `remedy` what to do.
    """
    numbers = numbers_of(counts, classes)
    unknown = in_order(name for name, number in numbers.items() if number == UNKNOWN and counts[name])
    if unknown:
        num = sum(counts[name] for name in unknown)
        samples = "1 sample" if num == 1 else f"{num} samples"
        what = "the class" if len(unknown) == 1 else f"{len(unknown)} classes"
        raise DataError(
            f"{where} has {samples} of {what} {quoted(unknown)}, which {whose} does not have (it has {quoted(classes) or 'none'}): {remedy}"
        )


def quoted(names: Sequence[str]) -> str:
    """Return the names as messages show them, the first ones of many."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(repr, names[:SHOWN])) + more
