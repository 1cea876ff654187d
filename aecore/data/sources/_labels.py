"""Labels and groups by the rule of a recipe (`source.label`, `source.group`, `source.classes`): one place for all sources.

`by_rules` is applied to what a source listed; `label_names` makes the labels once it is known whether the top folders are splits.
Expressions are those of RE2, through Arrow: their time is linear in the text, so no pattern can stall a run; there are no look-aheads and
no back-references. The word characters are the letters and digits of every script, digits and white space those of every script, as
Python's, and names are searched in normal form C. RE2 knows the boundaries of ASCII words only: where one is asked for in another name,
Python searches, after RE2 has found what the expression without boundaries matches (of other names a pattern could take years).
"""

import dataclasses
import functools
import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from aecore.artifact.documents import parse_json
from aecore.data.classes import MAX_CLASS_BYTES, in_order, quoted, spelled
from aecore.data.format.bad_sample import BadSample
from aecore.data.sources import Listing, take
from aecore.data.sources._names import file_of, split_of_folder
from aecore.errors import ConfigError, DataError
from aecore.native.texts import Texts
from aecore.store import absolute_url, open_files, read_again

REGEX, JSON = "regex:", "json:"
_SHOWN = 80  # characters of a label in a message
_LONE, _STANDS = re.compile("[\ud800-\udfff]"), re.compile("[\U0010d800-\U0010dfff]")  # surrogates; characters of private use for them
_PLANE = 1 << 20  # between the two
MAX_CLASSES_BYTES = 1 << 24
_WORD = r"\pL\pM\pN_\x{10D800}-\x{10DFFF}"  # in a class of characters; a byte that is no UTF-8 was a letter of another encoding
_TOKEN = re.compile(r"\\Q.*?(?:\\E|\Z)|\\.|\[:\^?\w+:\]|\[\^?\]?|\(\?P?<|\(\?|.", re.DOTALL)
_GROUPS = frozenset(("(", "(?<", "(?P<"))
_BOUNDARIES = frozenset((r"\b", r"\B"))
_SPACE = r"\t-\r\x{1C}-\x{20}\x{85}\pZ"
_SETS = {"w": _WORD, "d": r"\p{Nd}", "s": _SPACE}  # what RE2 takes for ASCII characters only
_ONLY_RE2 = re.compile(r"\\[pPQCzx]|\[:|\(\?[a-zA-Z-]*U")  # what Python does not read, or reads otherwise


class Expression:
    """The expression of a rule `regex:...`: what it finds is its first group, the whole match if it has none.

    Raises ConfigError, which names `option`, for one that RE2 does not read.
    """

    def __init__(self, option: str, rule: str) -> None:
        text = spelled(rule.removeprefix(REGEX))
        self._rule, self._pattern = f"{option}={rule}", _one_group(text)
        self._has_boundary = not _BOUNDARIES.isdisjoint(_TOKEN.findall(text))
        self._without = _one_group("".join("(?:)" if token in _BOUNDARIES else token for token in _TOKEN.findall(text)))
        self._text = text
        try:
            self.search(["", "x"])
        except (pa.ArrowInvalid, UnicodeEncodeError) as error:
            reason = str(error).partition("Invalid regular expression: ")[2] or str(error)
            raise ConfigError(
                f"{option}={rule} is not an expression that RE2 reads ({reason}): it has no look-ahead and no back-references; "
                rf"an example is {REGEX}^(\w+)\."
            ) from error

    def search(self, texts: Sequence[str]) -> list[str]:
        """Return what it finds first in each text, "" where it finds nothing.

        ConfigError if it asks for the boundary of a word in a text of other letters than ASCII's in a way that Python does not read.
        """
        found = _extracted(texts, self._pattern)
        if self._has_boundary and (others := [row for row, text in enumerate(texts) if not text.isascii()]):
            possible = _extracted([texts[row] for row in others], self._without, whole=True)
            for row, may in zip(others, possible, strict=True):
                found[row] = self._by_python(texts[row]) if may else ""
        return found

    def _by_python(self, text: str) -> str:
        match = self._python(text).search(text)
        return "" if match is None else (match[1 if match.re.groups else 0] or "")

    def _python(self, text: str) -> re.Pattern[str]:
        """Return the expression as Python reads it; ConfigError, which names `text`, if it does not."""
        try:
            if _ONLY_RE2.search(self._text):
                raise re.error("it has what only RE2 reads")
            return re.compile(re.sub(r"\(\?<(?=\w)", "(?P<", self._text))
        except re.error as error:
            raise ConfigError(
                rf"{self._rule} has \b or \B, which RE2 knows for words of ASCII letters only, {text!r} has others, and Python does not "
                rf"read the expression ({error}): write what is before or after the word instead, for example (?:^|\W)(\w+)"
            ) from error


def _extracted(texts: Sequence[str], pattern: str, *, whole: bool = False) -> list[Any]:  # any: str, or bool with `whole`
    """Return what the one group of a pattern finds in each text, "" for nothing; with `whole` whether the pattern matches at all."""
    found: Any = pc.extract_regex(pa.array(texts, pa.string()), pattern)  # any: the stubs know no structs
    return list(found.is_valid().to_pylist() if whole else found.field(0).fill_null("").to_pylist())


def _one_group(pattern: str) -> str:
    """Return an expression of which the first group, or the whole if it has none, is the first one with a name, as Arrow wants it.

    Its word characters, digits and white space are not those of ASCII alone.
    """
    inside, groups, out = False, 0, list[str]()
    for token in _TOKEN.findall(pattern):
        name = token[1:] if len(token) == 2 and token[0] == "\\" else {"[:word:]": "w", "[:^word:]": "W"}.get(token, "")
        if name.lower() in _SETS:
            characters = _SETS[name.lower()]
            if not inside:
                token = f"[{characters}]" if name.islower() else f"[^{characters}]"
            else:
                token = characters if name.islower() else _others(characters)
        elif token.startswith("[") and not inside:
            inside = True
        elif token == "]":
            inside = False
        elif not inside and token in _GROUPS:
            groups += 1
            token = token if token != "(" else "(?P<found_>" if groups == 1 else "(?:"
        out.append(token)
    text = "".join(out)
    return text if groups else f"(?P<found_>{text})"


@functools.cache
def _others(characters: str) -> str:
    """Return all characters but these, as ranges: a class has no way to say of a union of classes that it is left out."""
    codes = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    is_one: Any = pc.match_substring_regex(pa.array(map(chr, codes), pa.string()), f"[{characters}]")  # any: no types of values
    others = (code for code, found in zip(codes, is_one.to_pylist(), strict=True) if not found)
    runs = ([code for _, code in run] for _, run in itertools.groupby(enumerate(others), lambda pair: pair[1] - pair[0]))
    return "".join(rf"\x{{{run[0]:X}}}-\x{{{run[-1]:X}}}" for run in runs)


def is_expression(rule: str | None) -> bool:
    """Return whether a rule is `regex:<expression>`."""
    return rule is not None and rule.startswith(REGEX)


def require_rule(option: str, rule: str | None, words: Sequence[str]) -> None:
    """ConfigError unless a rule is one of these words, `json:<field>` where that is one of them, or a good `regex:<expression>`."""
    if rule is None or rule in words or (f"{JSON}<field>" in words and rule.startswith(JSON) and rule != JSON):
        return
    if is_expression(rule) and rule != REGEX:
        Expression(option, rule)
        return
    raise ConfigError(
        rf"{option} is {rule!r}, expected {', '.join(words)}{' or ' if words else ''}{REGEX}<expression>, for example {REGEX}^(\w+)\."
    )


def by_rules(source: Any, listing: Listing) -> Listing:  # any: every source kind has its own spec class
    """Return what a source listed, with the groups and what labels are made of as `source.group` and `source.label` say.

    Paths in a tar have split folders too, if all of their top folders are named by split words, or all of those in one folder around them.
    Where the name of a tar says its split, a top folder of the same meaning is no part of a label. Samples whose label is no text are
    unusable (`bad_label`), and those in which an expression finds nothing.

    Raises
    ------
    DataError
        If an expression finds nothing in any sample.
    """
    rule, group = getattr(source, "label", None), getattr(source, "group", None)
    if listing.paths is not None:
        paths = listing.paths
    else:
        paths = [*map(file_of, listing.sources)] if getattr(source, "frames", "first") == "all" else listing.sources
    changes: dict[str, Any] = {"label_names": listing.label_names, "unusable": listing.unusable}
    if is_expression(group):
        changes["groups"], changes["unusable"] = groups_by(str(group), paths, listing.sources, listing.unusable)
        listing = dataclasses.replace(listing, unusable=changes["unusable"])
    elif listing.groups is not None:
        changes["groups"] = Texts.of(listing.groups).mapped(_printable)
    if rule == "none":
        changes["label_names"] = None
    elif is_expression(rule) or rule in ("path", "leaf"):
        if listing.paths is not None:
            plain = [_plain(path) if "//" in path or "./" in path or path[:1] == "/" else path for path in listing.paths]
            paths, splits, label_paths = _with_split_folders(plain, listing.splits, listing.unusable)
            folders = [path.rpartition("/")[0] for path in paths]
            changes |= {"splits": splits, "label_paths": label_paths, "label_names": folders}
        changes["label_rule"] = rule
        if is_expression(rule):
            named = dataclasses.replace(listing, **{**changes, "label_names": list(paths)})
            changes |= {"label_names": named.label_names, "unusable": _without_bad_found(str(rule), named)}
    if not is_expression(rule):
        changes |= _without_bad_labels(changes["label_names"], listing.unusable, leaf=rule == "leaf")
    return dataclasses.replace(listing, **changes)


def bad_label(name: str) -> BadSample | None:
    """Return why no class can have this name, None if one can: it is no text, and written as some, two names could become one.

    The one rule for folders, tars, members of tars, arrays and fields: such a sample goes to the quarantine.
    """
    if "\0" in name:
        return BadSample("label", f"its label {name[:_SHOWN]!r} has NUL in it: write it without")
    if len(name) > MAX_CLASS_BYTES or len(name.encode("utf-8", "surrogatepass")) > MAX_CLASS_BYTES:
        return BadSample("label", f"its label {name[:_SHOWN]!r}... has more than {MAX_CLASS_BYTES} bytes: give the name of a class")
    if _printable(name) == name:
        return None
    try:
        shown = repr(name[:_SHOWN].encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:  # half a pair that came from no byte
        shown = ascii(name[:_SHOWN])
    return BadSample(
        "label", f"its label {shown} is not UTF-8: rename the folder, file or tar that it comes from, or save it as UTF-8 text"
    )


def _without_bad_labels(names: Sequence[str] | None, unusable: list[BadSample | None] | None, *, leaf: bool) -> dict[str, Any]:
    """Return `label_names` without those that no class can have, and `unusable` with their samples."""
    if names is None:
        return {}
    bad = {name: why for name in Texts.of(names).distinct() if (why := bad_label(name.rpartition("/")[2] if leaf else name)) is not None}
    if not bad:
        return {}
    marked = [known or bad.get(name) for known, name in zip(unusable or [None] * len(names), names, strict=True)]
    return {"label_names": ["" if name in bad else name for name in names], "unusable": marked}


def groups_by(
    rule: str, paths: Sequence[str], sources: Sequence[str], unusable: list[BadSample | None] | None
) -> tuple[list[str], list[BadSample | None] | None]:
    """Return the group that an expression finds for each sample, and what is unusable, with those in which it finds nothing.

    What is unusable is in a group of its own. DataError if it finds nothing in any sample.
    """
    found, lost = found_in("source.group", rule, paths, sources, unusable=unusable)
    groups = [name or _printable(source) for name, source in zip(found, sources, strict=True)]
    return groups, _with_lost(unusable, lost, len(paths))


def _with_lost(unusable: list[BadSample | None] | None, lost: Mapping[int, BadSample], num: int) -> list[BadSample | None] | None:
    return [lost.get(row, known) for row, known in enumerate(unusable or [None] * num)] if lost else unusable


def _without_bad_found(rule: str, listing: Listing) -> list[BadSample | None] | None:
    """Return what is unusable, also samples in whose paths, the label names of a listing, the rule finds no label that a class can have.

    A label is searched below the split folders or not, as `splits.by` says, which is not known here: so in both ways. One that is found
    in neither way is missing.
    """
    paths = listing.label_names or []
    tops = listing.splits if listing.label_paths else None
    _, lost = found_in("source.label", rule, paths, listing.sources, tops, listing.unusable)
    found = _with_lost(listing.unusable, lost, len(paths))
    rows = [row for row, path in enumerate(paths) if (found is None or found[row] is None) and bad_label(path) is not None]
    if not rows:
        return found
    judged = list[BadSample | None](found or [None] * len(paths))
    for splits in (None, tops) if tops else (None,):
        around = None if splits is None else [splits[row] for row in rows]
        names, _, _ = _search("source.label", rule, [paths[row] for row in rows], around, rows=range(len(rows)))
        for row, name in zip(rows, names, strict=True):
            judged[row] = judged[row] or bad_label(name)
    return judged if any(judged) else found


def _plain(path: str) -> str:
    """Return a path without empty parts and `.`, which name no folder: `a//b` and `./a/b` are in `a`."""
    return "/".join(part for part in path.split("/") if part not in ("", "."))


def _with_split_folders(
    paths: list[str], splits: Sequence[str] | None, unusable: Sequence[BadSample | None] | None
) -> tuple[Sequence[str], Sequence[str] | None, bool]:
    """Return paths, the splits of their samples, and whether the paths begin with these; what is unusable decides nothing."""
    if splits is not None:
        tops = {path.partition("/")[0] for path in paths}
        means = {top: split_of_folder(top) for top in tops}
        cut = [means[path.partition("/")[0]] == split != "" and "/" in path for path, split in zip(paths, splits, strict=True)]
        return [path.partition("/")[2] if within else path for path, within in zip(paths, cut, strict=True)], splits, False
    usable = paths if unusable is None else [path for path, bad in zip(paths, unusable, strict=True) if bad is None]
    around = {path.partition("/")[0] for path in usable}
    for found, those in (
        (paths, usable),
        *([([path.partition("/")[2] for path in part] for part in (paths, usable))] if len(around) == 1 else []),
    ):
        tops = {path.partition("/")[0] for path in those if "/" in path}
        if tops and all(map(split_of_folder, tops)):
            return found, [top if "/" in path and split_of_folder(top := path.partition("/")[0]) else "" for path in found], True
    return paths, None, False


def label_names(listing: Listing, below_split: bool) -> Texts | None:
    """Return the class of each sample in normal form C ("": none, as of what is unusable); None if no sample has one.

    With `below_split` the top folders are splits, and no part of a class.

    Raises
    ------
    DataError
        If the expression of the listing's rule finds a label only where `splits.by` says that none is searched.
    """
    if listing.label_names is None:
        return None
    names, rule = Texts.of(listing.label_names), listing.label_rule
    below_top = below_split and listing.splits is not None and listing.label_paths
    if is_expression(rule):
        found, lost = found_in("source.label", rule, names, listing.sources, listing.splits if below_top else None, listing.unusable)
        if lost:  # found where `splits.by` says that it is not searched: see `_without_bad_found`
            raise DataError(f"{next(iter(lost.values())).message}, as splits.by={'folders' if below_split else 'hash or none'} has it")
        names = Texts.of(found)
    elif below_top:
        names = names.mapped(lambda name: name.partition("/")[2])
    if rule == "leaf":
        names = names.mapped(lambda name: name.rpartition("/")[2])
    names = names.mapped(spelled)
    if listing.unusable is not None:
        names = Texts.of([name if bad is None else "" for name, bad in zip(names, listing.unusable, strict=True)])
    return names if any(names.distinct()) else None


def found_in(
    option: str,
    rule: str,
    paths: Sequence[str],
    sources: Sequence[str],
    tops: Sequence[str] | None = None,
    unusable: Sequence[BadSample | None] | None = None,
) -> tuple[list[str], dict[int, BadSample]]:
    """Return what the expression of a rule finds in each path ("": nothing), and the rows of those without it, with the reason.

    Nothing is searched in samples that are unusable.
    A label is searched in the file's name, then in the path below its top folder, if `tops` names one, then in the whole path; a group in
    the key, which is the whole path without its extension, then in the name. Each time without the extension first, then with it.

    Raises
    ------
    DataError
        If it finds nothing in any of them; some are named by `sources`.
    """
    searchable = [row for row in range(len(paths)) if unusable is None or unusable[row] is None]
    found, left, searched = _search(option, rule, paths, tops, rows=searchable)
    if left and len(left) == len(searchable):
        shown = ", ".join(dict.fromkeys(repr(_printable(part(texts[left[0]]))) for texts, part in searched))
        what = "the only sample" if len(left) == 1 else f"any of {len(left)} samples"
        raise DataError(
            f"{option}={rule} finds nothing in {what}: {quoted([*map(_printable, take(sources, np.array(left)))])} "
            f"(it was searched in {shown}): change the expression"
        )
    reason, names = ("no_label", "label") if option == "source.label" else ("no_group", "group")
    lost = {
        row: BadSample(reason, f"{option}={rule} finds no {names} in {_printable(sources[row])!r}: change the expression or rename it")
        for row in left
    }
    return list(map(_printable, found)), lost


def _search(
    option: str, rule: str, paths: Sequence[str], tops: Sequence[str] | None, *, rows: Sequence[int]
) -> tuple[list[str], Sequence[int], list[tuple[list[str], Callable[[str], str]]]]:
    """Return what the expression finds in these rows of the paths, lone surrogates included, in which rows nothing, and where it searched.

    That are texts, one for each path, and what is searched of them.
    """
    expression, whole = Expression(option, rule), list(map(spelled, paths))
    below = whole if tops is None else [path[len(spelled(top)) + 1 :] if top else path for path, top in zip(whole, tops, strict=True)]
    names = [path.rpartition("/")[2] for path in whole]
    several = [names, below, whole] if option == "source.label" else [whole, names]
    searched: list[tuple[list[str], Callable[[str], str]]] = [(texts, part) for texts in several for part in (_stem, str)]
    found, left = [""] * len(whole), rows
    for texts, part in searched:
        for row, name in zip(left, expression.search([_without_lone(part(texts[row])) for row in left]), strict=True):
            found[row] = _with_lone(name)
        left = [row for row in left if not found[row]]
    return found, left, searched


def _without_lone(text: str) -> str:
    """Return a text that RE2 reads: other characters, which are those of words, stand for lone surrogates."""
    return text if text.isascii() else _LONE.sub(lambda lone: chr(ord(lone[0]) + _PLANE), text)


def _with_lone(text: str) -> str:
    return text if text.isascii() else _STANDS.sub(lambda other: chr(ord(other[0]) - _PLANE), text)


def _stem(path: str) -> str:
    folder, slash, name = path.rpartition("/")
    return folder + slash + (name.rpartition(".")[0] or name)


def _printable(text: str) -> str:
    """Return the text without the lone surrogates that file names may hold."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def json_field(data: Any, path: str) -> Any:  # any: plain JSON data
    """Return the value at a path such as `ann.class` or `objects.0.name`, None if there is none; a key with dots goes first."""
    if isinstance(data, Mapping) and path in data:
        return data[path]
    first, _, rest = path.partition(".")
    if isinstance(data, list):
        below = data[int(first)] if first.isascii() and first.isdigit() and len(first) < 10 and int(first) < len(data) else None
    else:
        below = data.get(first) if isinstance(data, Mapping) else None
    return json_field(below, rest) if rest and below is not None else None if rest else below


def with_class_names(source: Any) -> Any:  # any: every source kind has its own spec class
    """Return the spec of a source with the names of `source.classes`, in normal form C, instead of numbers or the file that holds them.

    A file has one name a line, or is a JSON list. DataError if it cannot be read, ConfigError if a name is empty or there twice.
    """
    given = fixed_classes(source)
    return dataclasses.replace(source, classes=_names(given)) if given else source


def fixed_classes(source: Any) -> tuple[str, ...] | str:  # any: as above
    """Return `source.classes`, () if the recipe fixes none or the source has no such option."""
    found: tuple[str, ...] | str = getattr(source, "classes", ())
    return found


def _names(given: Sequence[str | int] | str) -> tuple[str, ...]:
    names = tuple(spelled(str(name)) for name in (_of_file(absolute_url(given, "source.classes")) if isinstance(given, str) else given))
    twice = in_order(name for name, count in Counter(names).items() if count > 1)
    if any("\0" in name for name in names):
        raise ConfigError(
            f"source.classes has {quoted([name for name in names if chr(0) in name])}: the names of classes have no NUL in them"
        )
    if twice or "" in names:
        raise ConfigError(f"source.classes has {quoted(twice) + ' twice' if twice else 'an empty name'}: each class has one name")
    return names


def _of_file(url: str) -> list[str]:
    try:
        data = _first_bytes(url)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"source.classes {url} cannot be read: {error.strerror or error}; give a list of names, or a file") from error
    except OSError as error:
        data = read_again(lambda: _first_bytes(url), url, error)
    try:
        text = data.decode("utf-8-sig")
        found = parse_json(text) if url.lower().endswith(".json") else [line.strip() for line in text.splitlines()]
    except ValueError as error:
        raise DataError(f"source.classes {url} is no list of names ({error}): write one name a line, in UTF-8") from error
    if len(data) > MAX_CLASSES_BYTES or not isinstance(found, list) or not all(type(name) in (str, int) for name in found):
        raise DataError(f"source.classes {url} is no list of names: write one name a line, or a JSON list")
    return [str(name) for name in found if name != ""]


def _first_bytes(url: str) -> bytes:
    folder, _, name = url.rpartition("/")
    with os.fdopen(open_files(folder or "/").open(name), "rb") as file:
        return file.read(MAX_CLASSES_BYTES + 1)
