"""Names of external files: their format, their split, whether they hold images or labels; brace patterns. No file is opened."""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence

from aecore.errors import ConfigError

_SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test", "t10k": "test"}
_LATER = {
    "dev": "val",
    "testing": "test",
}  # unknown to version 1: they count only where no other word does, so samples that it stored keep their split
_WORDS = _SPLITS | _LATER
_DATA = frozenset({"images", "image", "imgs", "img", "data", "x", "inputs", "features"})
_LABELS = frozenset({"labels", "label", "targets", "target", "y"})
_OF_LABELS = frozenset({"class", "classes", "id", "ids", "fine", "coarse", "true", "gt"})  # which labels they are
_FORMAT = re.compile(r"idx\d|ubyte|npy|npz|gz")
_WORD = re.compile(r"[^a-z0-9]+")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_IDX_ENDING = re.compile(r"(?:[-._]idx\d?)?(?:[-._]ubyte)?$", re.IGNORECASE)
FRAME = re.compile(r"(.+)#([0-9]{9})", re.DOTALL)  # a sample that `_frames.with_frames` listed
FRAME_ENDING = "#[0-9]{9}$"
MAX_NAMES = 1_000_000  # of one pattern


def array_format(name: str) -> str | None:
    """Return npy, npz or idx if a file of this name is read, None if not."""
    plain = name.removesuffix(".gz")
    if plain.endswith((".npy", ".npz")):
        return plain[-3:] if plain == name else None
    last = plain.rpartition("/")[2].lower()
    return "idx" if (last.endswith("-ubyte") and "idx" in last) or last.endswith(".idx") else None


def stem_of(name: str) -> str:
    """Return a file's name without its format's suffix: `mnist/train-images` of `mnist/train-images-idx3-ubyte.gz`."""
    folder, slash, last = name.rpartition("/")
    last = last.removesuffix(".gz")
    last = _IDX_ENDING.sub("", last) if array_format(name) == "idx" else last[:-4]
    return folder + slash + last


def file_of(source: str) -> str:
    """Return the file of a sample that `_frames.with_frames` listed."""
    match = FRAME.fullmatch(source)
    return source if match is None else match[1]


def words(name: str) -> list[str]:
    """Return the words of a name, lower case, without those of the format."""
    return [word for word in _WORD.split(name.lower()) if word and not _FORMAT.fullmatch(word)]


def split_of(path: str) -> str:
    """Return train, val or test if the first component of `path` with a word for a split names only one, else ""."""
    return split_in_version_1(path) or _split_by(path, _LATER)


def split_in_version_1(path: str) -> str:
    """Return the same with the words that version 1 knew."""
    return _split_by(path, _SPLITS)


def _split_by(path: str, known: Mapping[str, str]) -> str:
    for component in path.split("/"):
        found = {known[word] for word in words(component) if word in known}
        if found:
            return found.pop() if len(found) == 1 else ""
    return ""


def split_words(name: str) -> frozenset[str]:
    """Return the words of a name that mean a split."""
    return frozenset(word for word in words(name) if word in _WORDS)


def begins_keys(name: str, names: Sequence[str]) -> bool:
    """Return whether the keys of the array `name`, one of `names` of a file, begin with its name.

    It does if the name contains a split, with the words of version 1, in which an array without one had keys without its name.
    """
    others = [other for other in names if not split_in_version_1(other)]
    return name not in others or len(others) > 1


def split_of_folder(name: str) -> str:
    """Return train, val or test if the name of a folder is one of the words for it, in any case, else ""."""
    return _WORDS.get(name.lower(), "")


def is_labels(name: str) -> bool:
    """Return whether a name means labels and not images (`train_labels`, `y_test`)."""
    return bool(_LABELS & set(words(name))) and not is_data(name)


def is_data(name: str) -> bool:
    """Return whether a name means images or data (`train_images`, `x_test`)."""
    return bool(_DATA & set(words(name)))


def subject(name: str) -> tuple[str, ...]:
    """Return the words of a name that mean neither images nor labels: equal for an array and its labels."""
    return tuple(word for word in words(name) if word not in _DATA | _LABELS)


def without_split(name: str) -> tuple[str, ...]:
    """Return the words of a name that are not a split."""
    return tuple(word for word in words(name) if word not in _WORDS)


def partner(name: str, arrays: Sequence[str], labels: Iterable[str]) -> str | None:
    """Return the labels of the array `name`, one of `arrays`; None if none belong to it by their name, or several do.

    Labels belong to an array if the words of both names are the same but for those that mean images and labels (`x_test` and `y_test`,
    `cats` and `cats_labels`). The only labels belong to the only array if all of their other words are in its name too (`cats` and
    `labels`). Words that say which labels they are may be added (`images` and `class_labels`). Everything else names another array:
    `dogs_labels` are none of `cats`, and `y_test` none of `x_train`.
    """
    known, mine = list(labels), subject(name)
    same = [other for other in known if subject(other) == mine]
    same = same or [other for other in known if _named_subject(other) == mine]
    if not same and len(arrays) == len(known) == 1 and set(_named_subject(known[0])) <= {*mine}:
        same = known
    return same[0] if len(same) == 1 else None


def _named_subject(labels: str) -> tuple[str, ...]:
    """Return the words of the name of labels that may name an array."""
    return tuple(word for word in subject(labels) if word not in _OF_LABELS)


def expand_braces(pattern: str) -> list[str]:
    """Return the names of a pattern such as `{00000..00009}.tar` or `{a,b}.tar`; ConfigError if braces are unbalanced or too many."""
    parts = _BRACES.split(pattern)  # text, choices, text, ...
    if any(brace in text for text in parts[::2] for brace in "{}"):
        raise ConfigError(f"{pattern!r} has braces that do not fit each other: write {{00000..00009}} or {{a,b}}, not nested")
    options = [_choices(text, pattern) if number % 2 else [text] for number, text in enumerate(parts)]
    count = 1
    for option in options:
        count *= len(option)
    if count > MAX_NAMES:
        raise ConfigError(f"{pattern!r} expands to {count} names, at most {MAX_NAMES}: give the folder instead")
    return ["".join(chosen) for chosen in itertools.product(*options)]


def _choices(text: str, pattern: str) -> list[str]:
    match = _RANGE.fullmatch(text)
    if match is None:
        return text.split(",")
    first, last, width = int(match[1]), int(match[2]), len(match[1]) if match[1].startswith("0") else 0
    if not 0 <= last - first < MAX_NAMES:
        raise ConfigError(f"{pattern!r} has the range {{{text}}}: expected at most {MAX_NAMES} numbers, the smaller one first")
    return [str(number).zfill(width) for number in range(first, last + 1)]
