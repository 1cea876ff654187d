"""Which files of a source are samples: globs over their paths, a least size, a most number. PURE: nothing is opened.

The options are the same for folders, tars and arrays. A tar is a folder of its members: a pattern may match its own name (`00003.tar`),
the path of a member in it (`cat/*.jpg`), or both (`00003.tar/cat/*`).
"""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from aecore.data.sources import Listing
from aecore.data.sources._labels import groups_by, is_expression
from aecore.data.sources._names import expand_braces, file_of
from aecore.data.sources._skipped import EXAMPLES, Skipped
from aecore.errors import ConfigError, DataError, counted
from aecore.registry import to_dict
from aecore.store import is_tar

FILTERS = ("include", "exclude", "min_size", "limit", "extensions")  # options that choose among the samples of a source
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
    out, star = "", ""  # `star`: the last one of a name and what follows it
    for token in _TOKEN.findall(glob):
        if token == "*":
            # what follows an earlier star is taken where it comes first, for good: else a name takes its length to the power of the stars
            out, star = f"{out}(?>{star})" if star else out, "[^/]*?"
        elif token in ("/", "**", "**/"):
            out, star = out + _last(star) + _MEANING.get(token, token), ""
        elif len(token) > 2 and token[0] == "[":
            inside, negated = (token[2:-1], "^") if token[1] in "!^" else (token[1:-1], "")
            part = f"(?!/)[{negated}{_SPECIAL.sub(_ESCAPED, inside)}]"
            out, star = (out, star + part) if star else (out + part, "")
        else:
            part = _MEANING.get(token, re.escape(token))
            out, star = (out, star + part) if star else (out + part, "")
    return out + _last(star)


def _last(star: str) -> str:
    """Return the last star of a name and what follows it, up to the end of the name."""
    return star.replace("[^/]*?", "[^/]*", 1)


def _tars_of(include: Sequence[str]) -> Callable[[str], bool] | None:
    """Return whether a tar, by its path, may hold what these globs match; None if one of them names no tar, so that any may."""
    found = list[str]()
    for name in (name.removeprefix("./").rstrip("/") for pattern in include for name in expand_braces(pattern)):
        parts = name.split("/")
        last = next((number for number, part in enumerate(parts) if is_tar(part)), None)
        if last is None:
            return None
        found.append(("/" if len(parts) > 1 else "") + "/".join(parts[: last + 1]))
    return matcher(found, "source.include") if found else None


def globs(option: str, given: tuple[str, ...] | str) -> tuple[str, ...]:
    """Return the globs that an option gives, a single one as a list of one; ConfigError, which names the option, for what is none."""
    found = (given,) if isinstance(given, str) else given
    matcher(found, option)
    return found


class PathFilter:
    """Decides which files of a source are samples; see the options `include`, `exclude` and `min_size` of `FolderSpec`."""

    def __init__(self, include: tuple[str, ...] | str, exclude: tuple[str, ...] | str, min_size: int, what: str = "file(s)") -> None:
        include, exclude = globs("source.include", include), globs("source.exclude", exclude)
        self._what = what  # that samples are in messages
        self.is_set = bool(include or exclude or min_size)
        self._include = matcher(include, "source.include") if include else None
        self._include_tars = _tars_of(include)
        self._exclude = matcher(exclude, "source.exclude") if exclude else None
        self._min_size = min_size
        self._without_match = {  # patterns that no path has matched so far
            (option, pattern): matcher([pattern], option)
            for option, patterns in (("source.include", include), ("source.exclude", exclude))
            for pattern in patterns
        }

    def takes(self, path: str, size: int, skipped: Skipped, inside: str = "") -> bool:
        """Return whether a file is a sample; one that is not is counted. `inside` is the path of a member in the tar that begins `path`."""
        if self._without_match:
            self._matched(path, inside)
        if self._exclude is not None and (self._exclude(path) or (inside and self._exclude(inside))):
            skipped.add(f"{self._what} that source.exclude matches", path)
        elif self._include is not None and not (self._include(path) or (inside and self._include(inside))):
            skipped.add(f"{self._what} that source.include does not match", path)
        elif size < self._min_size:
            skipped.add(f"{self._what} of less than source.min_size={self._min_size} bytes", path)
        else:
            return True
        return False

    def excludes(self, path: str) -> bool:
        """Return whether `exclude` matches a file that is left in all the same; patterns that match it have a match."""
        self._matched(path)
        return self._exclude is not None and self._exclude(path)

    def takes_folder(self, path: str, skipped: Skipped, what: str = "folder(s)") -> bool:
        """Return whether a folder is listed; one that is not is counted."""
        if self._exclude is None or not self._exclude(path):
            return True
        self._matched(path)
        skipped.add(f"{what} that source.exclude matches", path)
        return False

    def takes_tar(self, path: str, skipped: Skipped) -> bool:
        """Return whether a tar is opened; one that is not is counted. None is if `include` names others, by a name that ends as tars do."""
        if not self.takes_folder(path, skipped, "tar(s)"):
            return False
        if self._include_tars is None or self._include_tars(path):
            return True
        skipped.add("tar(s) that source.include does not match", path)
        return False

    def _matched(self, *paths: str) -> None:
        self._without_match = {key: matches for key, matches in self._without_match.items() if not any(map(matches, paths))}

    def unused(self) -> list[str]:
        """Return a note about each pattern that matched nothing: it may be misspelt."""
        found = list(self._without_match)
        shown = [f"{option} has {pattern!r}, which matches no file: check it" for option, pattern in found[:EXAMPLES]]
        more = len(found) - EXAMPLES
        others = counted(more, "more pattern", "more patterns")
        return [*shown, f"and {others} of source.include and source.exclude without a match"] if more > 0 else shown


def with_limit(listing: Listing, limit: int | None, group: str | None, names: Sequence[str]) -> Listing:
    """Return at most `limit` rows of a listing, chosen by the hashes of their `names`; whole groups, if `group` or it says any.

    Raises
    ------
    DataError
        If not even one group fits.
    """
    if limit is None or len(listing) <= limit:
        return listing
    groups = listing.groups
    if is_expression(group):
        paths = [*map(file_of, listing.sources)] if listing.paths is None else listing.paths
        groups, _ = groups_by(str(group), paths, listing.sources, listing.unusable)
    rows = _chosen(names, groups, limit)
    if not rows:
        raise DataError(f"source.limit={limit} is less than the samples of any bag (source.group): raise it")
    left = f"{len(listing) - len(rows)} of {counted(len(listing), 'sample', 'samples')}"
    note = f"{left} left out by source.limit={limit}, by a hash of their names"
    found = listing.take(np.array(rows, np.int64))
    return dataclasses.replace(found, notes=(*found.notes, note))


def within_limit(listing: Listing, limit: int) -> list[int]:
    """Return at most `limit` rows of a listing by the hashes of their keys, whole groups; none if not even one fits."""
    return _chosen(listing.keys, listing.groups, limit)


def _chosen(names: Sequence[str], groups: Sequence[str] | None, limit: int) -> list[int]:
    """Return the rows of at most `limit` names, ascending: those with the smallest hashes, so they are spread over all folders.

    With `groups` whole ones are taken as long as they fit. The choice depends neither on the order nor on the machine.
    """
    if groups is None:
        hashed = np.frombuffer(b"".join(map(_hash, names)), ">u8")
        return sorted(np.argsort(hashed, kind="stable")[:limit].tolist())
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


def left_out(source: Any, recorded: Mapping[str, Any], sources: Sequence[str], sizes: Sequence[int]) -> list[bool]:
    """Return which samples of a dataset the options of `source` leave out, as far as they differ from the `recorded` ones.

    Where paths and sizes do not tell (a lower limit, files of many samples), all of them.
    """
    asked = to_dict(source, identity_only=True)
    if all(asked.get(name) == recorded.get(name) for name in FILTERS):
        return [False] * len(sources)
    limit, before = asked.get("limit"), recorded.get("limit")
    if source.kind not in ("folder", "webdataset") or (limit is not None and (before is None or limit < before)):
        return [True] * len(sources)
    chosen, extensions = PathFilter(source.include, source.exclude, source.min_size), getattr(source, "extensions", None)
    skipped, found = Skipped(), list[bool]()
    for name, size in zip(sources, sizes, strict=True):
        path = file_of(name) if source.frames == "all" else name
        tar, _, member = path.partition("#") if source.kind == "webdataset" else ("", "", "")
        member = member.partition("#")[2]
        path = f"{tar}/{member}" if tar else path
        known = extensions is None or path.rpartition(".")[2].lower() in extensions
        found.append(not (known and chosen.takes(path, size, skipped, member)))
    return found
