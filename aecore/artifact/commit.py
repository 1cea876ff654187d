"""The commit protocol that datasets, tables and runs share: claim a generation, record parts, publish a manifest LAST.

    run.NNNNNN.json        put-if-absent: generation N belongs to this identity; the same identity continues it
    records/<part>.json    the commit point of one part
    <stem>.NNNNNN.json     the manifest; a reader takes the highest one, and it names everything that exists for a reader

A manifest's number is its parent's plus one, so of two concurrent appends exactly one gets the name; the other one fails with
RunFailed and can run again. Claims have their own numbers (a dead claim leaves a gap); part names carry the claim's number.
"""

import contextlib
import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aecore.artifact.documents import read_json, sealed, typed
from aecore.errors import ConfigError, DataError, Hint, RunFailed
from aecore.registry import flatten, shown
from aecore.store import AlreadyExists, FileRef, Store, canonical_json


@dataclass(frozen=True, slots=True)
class PartRecord:
    """One finished part: its files, its rows, and its entry of the manifest. Timings are kept here, never in a manifest.

    `detail` is a pure function of the part's content (plain JSON); `timings` are seconds by step.
    """

    part: str
    files: tuple[FileRef, ...]
    rows: int
    quarantined: int = 0
    detail: Mapping[str, Any] = field(default_factory=dict)
    timings: Mapping[str, float] = field(default_factory=dict)

    def file(self, suffix: str) -> FileRef:
        """Return the file whose name ends in `suffix`; KeyError if there is none."""
        for ref in self.files:
            if ref.name.endswith(suffix):
                return ref
        raise KeyError(suffix)

    def file_in(self, folder: str) -> FileRef | None:
        """Return the file in a folder, None if there is none."""
        return next((ref for ref in self.files if ref.name.startswith(f"{folder}/")), None)


def part_stem(prefix: str, claim: int, number: int) -> str:
    """Return `train-000000` for claim 1, `train-g000002-000000` for claim 2."""
    return f"{prefix}-{number:06d}" if claim == 1 else f"{prefix}-g{claim:06d}-{number:06d}"


def is_stem_of(split: str, stem: str) -> bool:
    """Return whether a part of this split, made under any claim, may have this name."""
    return re.fullmatch(rf"{re.escape(split)}(-g\d{{6}})?-\d{{6,}}", stem) is not None


def claim_of(stem: str) -> int:
    """Return the number of the claim under which a part, or the removal of samples from one (`<part>-gNNNNNN`), of this name was made."""
    match = re.search(r"-g(\d{6})(?:-\d{6,})?$", stem)
    return int(match[1]) if match else 1


def require_parent(number: int, parent: int, parent_sha256: str | None) -> None:
    """ValueError unless a generation follows the one before it, and the first follows none."""
    if parent != number - 1 or (parent_sha256 is None) != (parent == 0):
        raise ValueError(
            f"generation {number} states the parent {parent} with the sha256 {shown(parent_sha256)}, expected {number - 1} with "
            f"{'none' if number == 1 else 'its own'}"
        )


def newest_number(store: Store, stem: str) -> int | None:
    """Return the highest N of `<stem>.NNNNNN.json`, None if there is none."""
    return newest_of(store.list(), stem)


def newest_of(names: Iterable[str], stem: str) -> int | None:
    """Return the highest N of `<stem>.NNNNNN.json` among the names, a listing of the artefact that the caller has made."""
    pattern = re.compile(re.escape(stem) + r"\.(\d{6})\.json")
    numbers = [int(match[1]) for name in names if (match := pattern.fullmatch(name))]
    return max(numbers, default=None)


def claim_generation(store: Store, kind: str, identity: Mapping[str, Any], info: Mapping[str, Any]) -> int:
    """Return the number of the claim of `identity`: an earlier one of the same identity, else a new one.

    `info` (addresses, versions) is recorded with the identity and never compared. ConfigError if the URL belongs to an artefact of
    another `kind` ("dataset", "run", "table").
    """
    names = store.list()
    require_kind(store, kind, names)
    wanted = canonical_json(identity)
    known = find_claim(store, identity, names)
    if known is not None:
        return known
    number = newest_of(names, "run") or 0
    while True:
        number += 1
        claim = {"kind": kind, "claim": number, "identity": identity, "info": info}
        try:
            store.put(f"run.{number:06d}.json", sealed(claim), role="run")
            return number
        except AlreadyExists:  # another process has just taken this number: for the same work, or for other work?
            if canonical_json(read_json(store, f"run.{number:06d}.json")["identity"]) == wanted:
                return number


def find_claim(store: Store, identity: Mapping[str, Any], names: Sequence[str], above: int = 0) -> int | None:
    """Return the number of the newest claim of `identity` among the names, a listing of the artefact; None if none above `above` is."""
    wanted = canonical_json(identity)
    for number in range(newest_of(names, "run") or 0, above, -1):
        name = f"run.{number:06d}.json"
        if name in names and canonical_json(read_json(store, name)["identity"]) == wanted:
            return number
    return None


def require_kind(store: Store, kind: str, names: Sequence[str] | None = None) -> None:
    """ConfigError if the URL holds another kind of artefact; `names` is its listing, if that is known."""
    number = newest_of(store.list() if names is None else names, "run")
    there = kind if number is None else read_json(store, f"run.{number:06d}.json").get("kind", kind)
    if there != kind:
        raise ConfigError(f"{store.url} holds a {there}, not a {kind}: write the {kind} to another URL")


def put_or_adopt(
    store: Store,
    name: str,
    content: bytes | Path,
    *,
    role: str,
    accepts: Callable[[FileRef, bytes], bool] | None = None,
    sha256: str | None = None,
) -> tuple[FileRef, bytes | None]:
    """Commit `content` (bytes, or a file made with `store.stage`) as `name`, or adopt what another attempt committed under that name.

    Parameters
    ----------
    accepts : callable, optional
        Called only if the name holds other bytes: whether these (reference, bytes) are accepted instead of `content`; none are by default.
        It raises DataError for bytes that are damaged.
    sha256 : str, optional
        That of a staged file, if it is known.

    Returns
    -------
    ref : FileRef
        The committed file.
    adopted : bytes or None
        Its bytes if they are another attempt's and differ from `content`, else None.

    Raises
    ------
    AlreadyExists
        If the name holds bytes that are not accepted; nothing is overwritten. Its hint is that of `left_behind`.
    """
    try:
        if isinstance(content, Path):
            return store.put_staged(name, content, role=role, sha256=sha256), None
        return store.put(name, content, role=role), None
    except AlreadyExists as taken:
        taken.hint = left_behind(store)
        if accepts is None:
            raise
        data = store.read(name)
        there = FileRef(name, len(data), hashlib.sha256(data).hexdigest())
        try:
            accepted = accepts(there, data)
        except DataError as damage:  # what helps against damage of a finished file does not help here
            raise taken from damage
        if not accepted:
            raise
        return there, data


def left_behind(store: Store) -> Hint:
    """Return the hint of an error about a file that an attempt left which did not finish: all that it left can be given up."""
    return Hint("left-behind", {"url": store.url})


def write_record(store: Store, record: PartRecord) -> PartRecord:
    """Commit one part; if another attempt was first, return its record (same part, so the files are equal)."""
    content = sealed(dataclasses.asdict(record))
    _, first = put_or_adopt(store, f"records/{record.part}.json", content, role="record", accepts=lambda ref, there: True)
    known = record if first is None else read_record(store, record.part)
    assert known is not None
    return known


def recorded_parts(store: Store) -> frozenset[str]:
    """Return the names of the parts that have a record, with one listing instead of a request per part.

    A hint: a part that it misses is made again, and its commit finds the first one.
    """
    return frozenset(name.removesuffix(".json") for name in store.list("records"))


def read_record(store: Store, part: str) -> PartRecord | None:
    """Return the record of a part whose files all exist with their sizes; None if it was never committed.

    A committed part with a missing or truncated file is a DataError: the file existed once and was removed or changed.
    """
    if store.size(f"records/{part}.json") is None:
        return None
    data = read_json(store, f"records/{part}.json")
    try:
        record = typed(PartRecord, {**data, "files": tuple(typed(FileRef, ref) for ref in data["files"])})
    except (TypeError, ValueError) as error:
        raise DataError(f"{store.url}/records/{part}.json was not written by aecore ({error}): restore it") from error
    with damage_of_part(store, part):
        store.check_all(record.files)
    return record


@contextlib.contextmanager
def damage_of_part(store: Store, part: str) -> Iterator[None]:
    """Add to the message of a DataError about a recorded part, of a generation that is not committed, how the part is made again."""
    try:
        yield
    except DataError as error:
        raise DataError(
            f"{error}. While no manifest names the part, it helps too to remove that file and {store.url}/records/{part}.json: the same "
            "command makes both again"
        ) from error


def require_counts(store: Store, record: PartRecord, found: Mapping[str, tuple[object, object]]) -> None:
    """DataError unless a record says of its files what they say themselves: `found` is name -> (in the record, in the file)."""
    for name, (said, is_there) in found.items():
        if said != is_there:
            raise DataError(
                f"{store.url}/records/{record.part}.json says {name} {said!r}, its files {is_there!r}: one of them was changed; "
                "restore it, or write to another URL"
            )


def require_there(store: Store, new: Iterable[FileRef], old: Iterable[FileRef] = ()) -> None:
    """DataError unless all that a manifest or a checkpoint is about to name exists: nothing that is named may be gone.

    `new` files are looked at with their sizes, those that are named already (`old`) by one listing of each folder; what a listing does not
    show is asked for by itself, since that of a service may be late.
    """
    store.check_all(list(new))
    names: dict[str, list[str]] = {}
    for ref in old:
        names.setdefault(ref.name.rpartition("/")[0], []).append(ref.name)
    for folder, wanted in names.items():
        listed = set(store.list(folder))
        unlisted = sorted(name for name in wanted if name.rpartition("/")[2] not in listed)
        gone = next((name for name in unlisted if store.size(name) is None), None)
        if gone is not None:
            raise DataError(
                f"{store.url}/{gone} is gone ({len(unlisted)} of {len(wanted)} files are not listed): something removed it while this "
                "command ran, and it is named already: nothing was committed; restore it"
            )


def commit_manifest(
    store: Store,
    stem: str,
    parent: int,
    manifest: Mapping[str, Any],
    *,
    new: Iterable[FileRef] = (),
    old: Iterable[FileRef] = (),
    require_continued: Callable[[int], None] = lambda number: None,
) -> int:
    """Publish `<stem>.<parent+1>.json`, which names the files `new`, and `old` ones that its parent names.

    `require_continued(number)` is called if another command was faster: it raises the ConfigError with which the same command, run again,
    would refuse the generation that is there now.

    Raises
    ------
    RunFailed
        If another generation was committed since `parent` (0: none) was read, to which the same command, run again, appends.
    ConfigError
        If it would be refused, as its settings are other ones.
    DataError
        If one of the files is gone.
    """
    require_there(store, new, old)
    number = parent + 1
    try:
        store.put(f"{stem}.{number:06d}.json", sealed({"number": number, **manifest}), role="manifest")
    except AlreadyExists:
        name = f"{stem}.{number:06d}.json"
        try:
            require_continued(number)
        except ConfigError as error:
            raise ConfigError(f"another command committed {name} while this one ran: {error}") from None
        what = "another append was committed" if parent else "another command committed the same place"
        raise RunFailed(f"{store.url}: {what} as {name} while this one ran; run the same command again to append to it") from None
    return number


def require_same(
    url: str,
    what: str,
    asked: Mapping[str, Any],
    recorded: Mapping[str, Any],
    *,
    urls: Mapping[str, tuple[object, object]] | None = None,
    hints: Mapping[str, str] | None = None,
    absent: Mapping[str, Any] | None = None,
) -> None:
    """ConfigError that shows the differing fields (dotted) with both values, unless the two identities are equal.

    Parameters
    ----------
    url, what : str
        URL of the artefact and the noun for it, for the message.
    asked, recorded : Mapping
        The identity that is asked for and the one of the artefact. A field that only one of them has is None in the other.
    urls : Mapping, optional
        Field -> (recorded, asked) URLs that the hashes in this field, or in those below it, belong to: a hash alone tells a user nothing.
    hints : Mapping, optional
        Field -> what else can be done if it differs.
    absent : Mapping, optional
        Values of later fields that a record lacks, instead of None (see `aecore.registry.absent_values`), nested like the identities.
    """
    missing = list(flatten(absent or {}))
    wanted, known = dict([*missing, *flatten(asked)]), dict([*missing, *flatten(recorded)])
    differing = [key for key in sorted({*wanted, *known}) if wanted.get(key) != known.get(key)]
    if not differing:
        return
    lines = ""
    for key in differing:
        where = next((pair for field, pair in (urls or {}).items() if f"{key}.".startswith(f"{field}.")), (None, None))
        lines += f"\n  {key}: there {_shown(known.get(key), where[0])}, asked {_shown(wanted.get(key), where[1])}"
    more = "".join(f"; {hint}" for hint in dict.fromkeys((hints or {}).get(key, "") for key in differing) if hint)
    raise ConfigError(f"{url} holds another {what}:{lines}\nwrite to another URL, or use the values that are there{more}")


def _shown(value: object, where: object) -> str:
    """Return a value of an identity as messages show it: a hash is cut, and preceded by the URL that it belongs to."""
    short = value[:12] if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else repr(value)
    return short if where is None or value is None else f"{where} ({short})"
