"""Which files of a source are samples: globs over their paths, a least size, a most number. PURE: nothing is opened."""

import hashlib
import re
from collections.abc import Callable, Sequence

from aecore.data.sources._names import expand_braces
from aecore.data.sources._skipped import EXAMPLES, Skipped
from aecore.errors import ConfigError

_TOKEN = re.compile(r"\*\*/|\*\*|\*|\?|\[[!^]?\]?[^\]/]*\]|.", re.DOTALL)
_MEANING = {"**/": "(?:[^/]*/)*", "**": ".*", "*": "[^/]*", "?": "[^/]"}
_SPECIAL, _ESCAPED = re.compile(r"[\\\[\]^&~|]"), r"\\\g<0>"  # inside brackets


def matcher(patterns: Sequence[str], option: str) -> Callable[[str], bool]:
    """Return whether a relative path, or a folder above it, matches one of these globs.

    `*`, `?` and `[a-z]` stay within one name, `**` crosses folders, `{a,b}` are alternatives. A pattern without a slash is compared with
    every name of the path (`*_mask.png`, `thumbnails`), one with a slash with the path from its beginning (`train/*/0*.png`).

    Raises
    ------
    ConfigError
        A pattern is empty or its braces are unbalanced; the message names `option`.
    """
    loose, anchored = list[str](), list[str]()
    for pattern in patterns:
        text = pattern.removeprefix("./").rstrip("/")
        if not text.strip("/"):
            raise ConfigError(f"{option} has the pattern {pattern!r}: expected a glob such as '*_mask.png' or 'train/cat'")
        for each in expand_braces(text):
            (anchored if "/" in each else loose).append(_expression(each.removeprefix("/")))
    below = "(?:/.*)?"
    parts = [*(f"(?:.*/)?{each}{below}" for each in loose), *(f"{each}{below}" for each in anchored)]
    try:
        whole = re.compile("|".join(parts), re.DOTALL)
    except re.error as error:
        raise ConfigError(f"{option} is {', '.join(patterns)}, which is no glob ({error}): write a range as [a-z]") from None
    return lambda path: whole.fullmatch(path) is not None


def _expression(glob: str) -> str:
    """Return the regular expression of a glob without braces."""
    out = ""
    for token in _TOKEN.findall(glob):
        if len(token) > 2 and token[0] == "[":
            inside, negated = (token[2:-1], "^/") if token[1] in "!^" else (token[1:-1], "")
            out += f"[{negated}{_SPECIAL.sub(_ESCAPED, inside)}]"
        else:
            out += _MEANING.get(token, re.escape(token))
    return out


class PathFilter:
    """Decides which files of a source are samples; see the options `include`, `exclude` and `min_size` of `FolderSpec`."""

    def __init__(self, include: Sequence[str], exclude: Sequence[str], min_size: int) -> None:
        self.is_set = bool(include or exclude or min_size)
        self._include = matcher(include, "source.include") if include else None
        self._exclude = matcher(exclude, "source.exclude") if exclude else None
        self._min_size = min_size
        self._without_match = {  # patterns that no path has matched so far
            (option, pattern): matcher([pattern], option)
            for option, patterns in (("source.include", include), ("source.exclude", exclude))
            for pattern in patterns
        }

    def takes(self, path: str, size: int, skipped: Skipped) -> bool:
        """Return whether a file is a sample; one that is not is counted."""
        if self._without_match:
            self._without_match = {key: matches for key, matches in self._without_match.items() if not matches(path)}
        if self._exclude is not None and self._exclude(path):
            skipped.add("files that source.exclude matches", path)
        elif self._include is not None and not self._include(path):
            skipped.add("files that source.include does not match", path)
        elif size < self._min_size:
            skipped.add(f"files of less than source.min_size={self._min_size} bytes", path)
        else:
            return True
        return False

    def takes_folder(self, path: str, skipped: Skipped) -> bool:
        """Return whether a folder is listed; one that is not is counted."""
        if self._exclude is None or not self._exclude(path):
            return True
        self._without_match = {key: matches for key, matches in self._without_match.items() if not matches(path)}
        skipped.add("folders that source.exclude matches", path)
        return False

    def unused(self) -> list[str]:
        """Return a note about each pattern that matched nothing: it may be misspelt."""
        found = list(self._without_match)
        shown = [f"{option} has {pattern!r}, which matches no file: check it" for option, pattern in found[:EXAMPLES]]
        more = len(found) - EXAMPLES
        return shown + ([f"and {more} more patterns of source.include and source.exclude match nothing"] if more > 0 else [])


def chosen(names: Sequence[str], groups: Sequence[str] | None, limit: int) -> list[int]:
    """Return the rows of at most `limit` names, ascending: those with the smallest hashes, so they are spread over all folders.

    With `groups` whole ones are taken as long as they fit. The choice depends neither on the order nor on the machine.
    """
    if groups is None:
        order = sorted(range(len(names)), key=lambda row: _hash(names[row]))
        return sorted(order[:limit])
    rows: dict[str, list[int]] = {}
    for row, group in enumerate(groups):
        rows.setdefault(group, []).append(row)
    found = list[int]()
    for group in sorted(rows, key=_hash):
        if len(found) + len(rows[group]) <= limit:
            found += rows[group]
    return sorted(found)


def _hash(name: str) -> bytes:
    return hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
