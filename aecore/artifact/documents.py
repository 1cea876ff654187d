"""The small JSON files of artefacts: manifests, claims, records, `checkpoint.json`, `config.json`. Nothing in them is believed.

Each is canonical JSON with `format` and `sha256`, the hash of everything else in it. A reader refuses a file which is larger than its
kind can be or nested deep, whose hash is missing or wrong, whose keys are not those of its kind, which has a key twice, or whose content
disagrees with its name; before that it reads the file once more past every cache. Version 1 hashed only manifests: a file of that version
opens without a hash if its keys are exactly those that its kind had then.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import re
import types
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from aecore.errors import DataError
from aecore.registry import flatten, shown
from aecore.store import FileRef, Store, canonical_json, sha256_json

T = TypeVar("T")
logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
SMALL, LARGE, MAX_DEPTH = 1 << 24, 1 << 30, 64  # bytes of a file, of a manifest (a million shards); levels of nesting
SHOWN = 3  # disagreement fields in a message
CLAIM = "run.000001.json"  # the first claim of an artefact, and the only one of a run
CHECKPOINT_NAME = r"checkpoints/step-(\d{8,})-([0-9a-z]+)"  # step, attempt
METRICS_NAME = r"metrics/(\d{8,})-(\d{8,})-([0-9a-z]+)\.jsonl"  # first step, last step, attempt
_SEALED = {"format", "sha256"}
_noted: set[str] = set()  # addresses of artefacts of version 1 that the log has named


@dataclass(frozen=True, slots=True)
class _Kind:
    """One kind of file: where it is, its keys, and those of version 1, which had no hash.

    `pattern` is matched against the end of its address; if it has a group, the first is the value of the key `repeats`.
    A file has at most `most` bytes. `keys_v1` are all sets of keys that files of version 1 may have: while that was current, claims got the
    key `kind`, and those of before have none. `again` says when the same command writes it again if it is removed.
    """

    pattern: str
    keys: frozenset[str]
    repeats: str = ""
    optional: frozenset[str] = frozenset()
    most: int = SMALL
    keys_v1: tuple[frozenset[str], ...] = ()
    again: str = ""


def _keys(text: str) -> frozenset[str]:
    return frozenset(text.split())


_CLAIM = _keys("claim identity info kind")
_DATASET = _keys(
    "classes dataset_sha256 identity listings number parent parent_sha256 quarantined reasons rejected sample shards statistics"
)
_TABLE = _keys("columns identity lineage num_rows number parent parent_sha256 parts quarantined")
_RECORD = _keys("detail files part quarantined rows timings")
_CHECKPOINT = _keys("best files info metrics step")
_CONFIG = _keys("backbone input_shape model transform")
_REPORT = _keys("contradicting_labels counts duplicates leaks left_out manifest_sha256 number odd pixels seconds tiny")
_GENERATED, _FIGURES = _keys("files identity lineage shape"), _keys("files identity left_out")
_FORMAT = {"format"}

_KINDS = (
    _Kind(
        r"run\.(\d{6})\.json",
        _CLAIM,
        "claim",
        keys_v1=(_CLAIM | _FORMAT, _CLAIM - {"kind"} | _FORMAT),
        again="while no manifest was committed under it",
    ),
    _Kind(r"records/([^/]+)\.json", _RECORD, "part", keys_v1=(_RECORD | _FORMAT,), again="while no manifest names its part"),
    _Kind(
        r"dataset\.(\d{6})\.json",
        _DATASET | {"claim_sha256"},
        "number",
        optional=_keys("removal content_sha256 retired about"),
        most=LARGE,
        keys_v1=(_DATASET | _FORMAT,),
    ),
    _Kind(r"report/(\d{6})\.json", _REPORT, "number", again="at any time"),
    _Kind(r"table\.(\d{6})\.json", _TABLE | {"claim_sha256"}, "number", most=LARGE, keys_v1=(_TABLE | _FORMAT,)),
    _Kind(rf"{CHECKPOINT_NAME}/checkpoint\.json", _CHECKPOINT, "step", keys_v1=(_CHECKPOINT | _FORMAT,)),
    _Kind(r"checkpoint\.json", _CHECKPOINT, keys_v1=(_CHECKPOINT | _FORMAT,)),
    _Kind(r"config\.json", _CONFIG, optional=_keys("classes"), keys_v1=(_CONFIG | _FORMAT,)),
    _Kind(r"(?:samples|decoded)\.json", _GENERATED, keys_v1=(_GENERATED,)),
    _Kind(r"figures\.json", _FIGURES, keys_v1=(_FIGURES,)),
)


def sealed(data: Mapping[str, Any]) -> bytes:
    """Return the bytes of a file of this version: `data`, the format, and the hash of both."""
    body = {**data, "format": FORMAT_VERSION}
    return canonical_json({**body, "sha256": sha256_json(body)})


def read_json(store: Store, name: str, *, ref: FileRef | None = None) -> dict[str, Any]:
    """Return what a JSON file of the artefact says, without its format and hash; with `ref`, the file must be that one.

    A file that does not hold together is read once more past every cache before it is refused.

    Raises
    ------
    DataError
        If it is missing, damaged, of a newer format, or not a file of its kind.
    """
    return read_document(store, name, ref=ref)[0]


def read_document(store: Store, name: str, *, ref: FileRef | None = None) -> tuple[dict[str, Any], bytes]:
    """Return what a JSON file says, as `read_json` does, and its bytes."""
    data, content = _read(store, name, ref)
    return _without_seal(data), content


def _without_seal(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key not in _SEALED}


def _read(store: Store, name: str, ref: FileRef | None = None) -> tuple[dict[str, Any], bytes]:
    """Return a JSON file with its format and hash, and its bytes."""
    content = read_bytes(store, name, ref=ref)
    try:
        return _parsed(store, name, content), content
    except DataError:
        again = read_bytes(store, name, ref=ref, fresh=True)
        if again == content:
            raise
        logger.warning("%s/%s arrived damaged and was read again", store.url, name)
        return _parsed(store, name, again), again


@dataclass(frozen=True, slots=True)
class Document:
    """What a file says, without its format and hash, the sha256 of its bytes, and whether it states a hash (version 1 did not)."""

    content: dict[str, Any]
    sha256: str
    is_sealed: bool


def read_all(store: Store) -> tuple[dict[str, Document], list[str]]:
    """Return all claims, manifests and records of an artefact by name, also those that a later generation has replaced.

    The second value says what is wrong with those that cannot be read.
    """
    names = [*store.list(), *(f"records/{name}" for name in store.list("records"))]
    found, problems = dict[str, Document](), []
    for name in names:
        if not any(re.fullmatch(kind.pattern, name) for kind in _KINDS):  # a stranger's, as file managers leave them
            continue
        try:
            data, written = _read(store, name)
            found[name] = Document(_without_seal(data), hashlib.sha256(written).hexdigest(), "sha256" in data)
        except DataError as error:
            problems.append(str(error))
    return found, problems


def problems_of(store: Store) -> list[str]:
    """Return what is wrong with the claims, manifests and records of an artefact, also those that a later generation has replaced."""
    return read_all(store)[1]


def guarded(where: str, problems: Iterable[str]) -> Iterator[str]:
    """Yield problems, and one more if what they are about is so unlike what aecore writes that they cannot be looked for."""
    try:
        yield from problems
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError, NotImplementedError) as error:
        yield f"{where} was not written by aecore, or changed since ({error!r}): restore it"


def disagreement(stated: Any, right: Any) -> str:  # any: plain data
    """Return in which (dotted) fields two plain data differ, with both values; "" if in none."""
    there, wanted = dict(flatten(stated, lists=True)), dict(flatten(right, lists=True))
    names = [name for name in {**wanted, **there} if there.get(name) != wanted.get(name)]
    texts = [f"{name or 'value'} {shown(there.get(name))} instead of {shown(wanted.get(name))}" for name in names[:SHOWN]]
    return ", ".join(texts) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def read_bytes(store: Store, name: str, *, ref: FileRef | None = None, fresh: bool = False) -> bytes:
    """Return the bytes of a JSON file; DataError if it is missing, or has more of them than any file of its kind."""
    return store.read(name, ref=ref, fresh=fresh, limit=_kind_of(store, name)[0].most)


def typed(kind: type[T], fields: Mapping[str, Any]) -> T:
    """Return a dataclass of what a file says; TypeError or ValueError if a field has another type, or is a number that counts nothing.

    A hash says that a file is what its writer wrote, not that the writer was aecore. Of a collection only its own type is looked at.
    """
    made = kind(**fields)
    for name, known in _types_of(kind):  # type: ignore[arg-type]  # a class can be hashed
        value = getattr(made, name)
        if type(value) not in known:
            raise TypeError(f"{name} is {shown(value)}, expected {' or '.join(sorted(each.__name__ for each in known))}")
        if type(value) is int and not 0 <= value < 1 << 63:
            raise ValueError(f"{name} is {shown(value)}, expected a number from 0")
    return made


@functools.cache
def _types_of(kind: Hashable) -> tuple[tuple[str, frozenset[type]], ...]:
    """Return the types that the values of each field of a dataclass may have."""
    found, hints = [], get_type_hints(kind)
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        hint = hints[field.name]
        options = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        plain = (get_origin(option) or option for option in options)
        found.append((field.name, frozenset(dict if option is Mapping else option for option in plain)))
    return tuple(found)


def require_counts_of(data: Mapping[str, Any], **counts: int) -> None:
    """ValueError if a manifest says another total than what its parts add up to."""
    for name, count in counts.items():
        if type(data[name]) is not int or data[name] != count:
            raise ValueError(f"{name} is {shown(data[name])}, its parts have {count}")


def require_once(values: Iterable[object], what: str) -> None:
    """ValueError if a value is there twice."""
    counts = Counter(values)
    if counts and (twice := counts.most_common(1)[0])[1] > 1:
        raise ValueError(f"it names {what} twice: {twice[0]!r}")


def _parsed(store: Store, name: str, content: bytes) -> dict[str, Any]:
    where = f"{store.url}/{name}"
    try:
        data = parse_json(content, object_pairs_hook=_no_key_twice, parse_constant=_no_constant)
        if not isinstance(data, dict):
            raise ValueError("it is no object")
        _require_whole(store, name, data)
    except _Misplaced as error:
        raise DataError(f"{where} is not in its place: {error}; {_remedy(store, name, error.stated)}") from error
    except ValueError as error:
        again = _kind_of(store, name)[0].again
        more = f"; {again}, it may also be removed: the same command writes it again" if again else ""
        raise DataError(f"{where} is damaged: {error}; restore it from a copy, or write to another URL{more}") from error
    if "sha256" not in data and store.url not in _noted:
        _noted.add(store.url)
        logger.info("%s was written by version 1, whose small files state no hash: a change in them cannot be detected", store.url)
    return data


class _Misplaced(ValueError):
    """A file that holds together, and whose name repeats another value than it states."""

    def __init__(self, key: str, stated: object) -> None:
        super().__init__(f"it states {key} {stated!r}, which its name does not")
        self.stated = stated


def _remedy(store: Store, name: str, stated: object) -> str:
    """Return what to do about a file that has the name of another: there is nothing to restore if the right name is taken."""
    kind, named = _kind_of(store, name)
    match = re.fullmatch(kind.pattern, name)
    if match is not None and named is not None:
        other = name[: match.start(1)] + (str(stated).zfill(len(named)) if named.isdigit() else str(stated)) + name[match.end(1) :]
        if re.fullmatch(kind.pattern, other) and store.size(other) is not None:
            return f"it is a copy of {other}, or of that of another artefact: remove it, or restore the right one if there was one"
    return "restore the right one from a copy, or remove it"


def parse_json(text: str | bytes, *, depth: int = MAX_DEPTH, **hooks: Any) -> Any:  # any: JSON data, and the hooks of `json.loads`
    """Return the data of a JSON text from outside; ValueError if it is no JSON, or nested too deep for code that recurses into it."""
    try:
        data = json.loads(text, **hooks)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    level = [data] if isinstance(data, dict | list) else []  # level by level, not by recursion
    for _ in range(depth):
        inside = (value.values() if isinstance(value, dict) else value for value in level)
        level = [value for values in inside for value in values if isinstance(value, dict | list)]
        if not level:
            return data
    raise ValueError(f"it is nested more than {depth} levels deep")


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        raise ValueError(f"the key {Counter(key for key, _ in pairs).most_common(1)[0][0]!r} stands there twice")
    return data


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _require_whole(store: Store, name: str, data: Mapping[str, Any]) -> None:
    """ValueError unless hash, format, keys and the values that the file's name repeats are right."""
    kind, named = _kind_of(store, name)
    version, stated = data.get("format", 1), data.get("sha256")
    intact = stated == sha256_json({key: value for key, value in data.items() if key != "sha256"})
    if stated is not None and not intact:
        raise ValueError("its content does not have the sha256 that it states")
    if type(version) is not int or version < 1:
        raise ValueError(f"it states format {version!r}, expected 1 to {FORMAT_VERSION}")
    if version > FORMAT_VERSION:
        raise ValueError(f"it has format {version}, this version reads up to {FORMAT_VERSION}: upgrade aecore")
    keys = data.keys() - {"sha256"}
    if version == 1 and keys in kind.keys_v1:
        pass
    elif version == 1 or stated is None:
        raise ValueError(f"it states no sha256, and its keys are not those of version 1{_shown(keys, (*kind.keys_v1, kind.keys)[0])}")
    elif not kind.keys <= keys - _FORMAT <= kind.keys | kind.optional:
        raise ValueError(f"its keys are not those of this kind of file{_shown(keys - _FORMAT, kind.keys | kind.optional)}")
    if kind.repeats and named is not None and str(data[kind.repeats]) != (str(int(named)) if named.isdigit() else named):
        raise _Misplaced(kind.repeats, data[kind.repeats])


def _kind_of(store: Store, name: str) -> tuple[_Kind, str | None]:
    """Return the kind of a file and what its name says of it: only of a checkpoint the folder's own name counts as well."""
    where = "/".join([*store.url.split("/")[-2:], name]) if name == "checkpoint.json" else name
    for kind in _KINDS:
        if match := re.search(rf"(?:^|/){kind.pattern}$", where):
            return kind, match[1] if match.lastindex else None
    raise AssertionError(f"{name} is no JSON file of an artefact")


def _shown(found: frozenset[str] | set[str], expected: frozenset[str]) -> str:
    parts = {"unknown": sorted(found - expected), "missing": sorted(expected - found)}
    return "".join(f", {word}: {', '.join(map(repr, keys))}" for word, keys in parts.items() if keys)
