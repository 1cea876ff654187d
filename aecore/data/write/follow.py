"""Compare what a source lists with the ledger of a dataset: what is new, changed, relabelled, gone, or to be tried again.

A sample is identified by its origin and its key. An equal state means that its bytes were not touched; what has another one is read again,
and only its hash decides. Rows of other origins are never touched. Columns are compared in Arrow, row by row nothing is done in Python.
Gone are samples that a complete listing lacks (a source that cannot be listed completely raises), and so many of them, or such ones, as
look like a lost disk are refused: nothing is written then.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray

from aecore.data.format.index import LEDGER_SCHEMA, make_table
from aecore.data.format.spill import filtered, is_large, narrow, ranges, slices, spilled, take_rows
from aecore.data.removal import Reason
from aecore.data.sources import Listing
from aecore.data.sources._names import FRAME_ENDING
from aecore.data.sources._skipped import shown_examples
from aecore.data.write.equal import CONTENT, Policy, dropped, require_allowed
from aecore.data.write.ledger import columns_sha256
from aecore.data.write.plan import Placement
from aecore.data.write.reread import Reread
from aecore.errors import DataError, counted
from aecore.native.texts import Texts

pc: Any = pyarrow.compute  # any: pyarrow's stubs know no types of values
EXAMPLES = 5
FREE = 10  # samples that may be gone whatever their share is
Mask = NDArray[np.bool_]
_REASONS: tuple[Reason | None, ...] = (None, "gone", "changed", "relabelled", "moved", "retried")
_GONE, _CHANGED, _RELABELLED, _MOVED, _RETRIED = range(1, len(_REASONS))
_LEFT_OUT = len(_REASONS)  # of samples that the dataset leaves out already, which nothing removes
Column = Any  # any: as above


class Tars(Protocol):
    """What is known of adopted tars, each of which is compared and indexed as a whole."""

    def of(self, sources: Column) -> list[str]:
        """Return the tar of each sample."""

    def changed(self, names: set[str]) -> set[str]:
        """Return those of these tars that have other bytes than when they were indexed, or are gone."""


@dataclass(frozen=True, slots=True)
class Rules:
    """How a comparison is made.

    Attributes
    ----------
    url : str
        The dataset's, for messages.
    drop : bool
        Whether samples whose source is gone are removed.
    max_removed, checksum, accept_filter
        See `ShardSpec`.
    reread : callable
        What rows of the listing are now.
    outside : callable
        Which rows of a ledger the filter of the source leaves out.
    tars : Tars, optional
        Of adopted tars.
    all_frames : bool
        Whether a file of several frames is several samples.
    split_folders : bool
        Whether the top folders are the splits.
    named_places : bool
        Whether `source` is a place that other samples may have later, and no file: a sample that is not listed is gone, whatever is there.
    policy : Policy
        What becomes of samples of equal content.
    """

    url: str
    drop: bool
    max_removed: float
    checksum: bool
    accept_filter: bool
    reread: Callable[[Listing], Reread]
    outside: Callable[[pa.Table], Mask]
    tars: Tars | None = None
    all_frames: bool = False
    split_folders: bool = False
    named_places: bool = False
    policy: Policy = field(default_factory=Policy)


@dataclass(frozen=True, slots=True)
class Changes:
    """What a run does with a dataset.

    Attributes
    ----------
    written : `[n]` bool
        The rows of the listing that are written: new ones, and those that take the place of removed ones.
    removed : table
        Split, ordinal, key and reason of the rows of the ledger that are removed.
    renewed : table
        Rows of the ledger whose state or origin is another one, with that; and of samples that were left out, of which something is
        another one, or which are left out no more (without `sample_sha256`).
    was_left, left : table
        What was known of samples that the generation before left out, and what is known of those that still are.
    excess : table
        Samples that are there, and that the policy leaves out.
    noted : bool
        Whether samples that are left out are gone from the source, or have another class, bag or column: what is said of them changes.
    stayed : int
        Quarantined samples of this origin that stay.
    left_out : bool
        Whether known samples stay that the filter of the source leaves out.
    shown : mapping
        What happens to samples -> their number and examples of their sources.
    """

    written: Mask
    removed: pa.Table
    renewed: pa.Table
    stayed: int
    left_out: bool
    was_left: pa.Table
    left: pa.Table
    excess: pa.Table
    noted: bool
    shown: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # any: a number, a list of texts


def compare(listing: Listing, placed: Placement, ledger: pa.Table, left: pa.Table, rules: Rules) -> Changes:
    """Return what is to be done so that the dataset follows its source.

    `left` is what is known of samples that are left out since another one has their content: they are compared as the others are, and
    written once the policy does not leave them out any more.

    Raises
    ------
    DataError
        If a key is that of a sample of another origin, a bag has samples of several origins, so many samples are gone that the source may
        be incomplete, or the policy refuses known samples.
    StoreError
        If a sample that has to be read again cannot be read.
    """
    asked = _asked(listing, placed)
    (known, others), (idle, left_by_others) = (_by_origin(table, listing.origin) for table in (ledger, left))
    _require_free_keys(asked, others, rules, listing.origin)
    if len(idle):
        idle = filtered(idle, ~_is_in(idle["key"], ledger["key"]))
    out = np.repeat([False, True], [len(known), len(idle)])  # of the known ones: left out
    known = pa.concat_tables([known, idle]) if len(idle) else known
    at, before = _known_rows(asked, known)
    rows = narrow(np.flatnonzero(at >= 0))
    was_out = out[at[rows]]
    now = take_rows(asked, rows)
    tars = None if rules.tars is None else _TarRows(rules.tars, asked, known)
    is_changed, settled = _content(listing, rows, now, before, rules, tars)
    was_bad = _mask(before["quarantined"])
    moved = ~is_changed & _differ(now, before, "split")
    relabelled = ~is_changed & ~moved & ~was_bad & ~was_out & _otherwise(now, before)
    reasons = np.zeros(len(known), np.int8)  # numbers of `_REASONS`
    for mask, reason in (
        (is_changed & was_bad, "retried"),
        (is_changed & ~was_bad, "changed"),
        (moved, "moved"),
        (relabelled, "relabelled"),
    ):
        reasons[at[rows[mask]]] = _REASONS.index(reason)
    written = at < 0
    written[rows[is_changed | moved | relabelled]] = True

    missing = ~out & _mask(pc.is_valid(known["origin"]))
    missing[at[rows]] = False
    renamed, reframed = _listed_otherwise(asked, known, missing, rules)
    reasons[renamed] = _MOVED
    reasons[reframed] = _CHANGED
    missing &= ~(renamed | reframed)
    lost = missing & (np.zeros(len(known), np.bool_) if tars is None else tars.gone)  # their bytes are not there any more
    outside = missing & ~lost
    outside[outside] = rules.outside(filtered(known, outside)) if outside.any() else False
    gone = missing & ~outside
    if tars is not None and not rules.drop:
        tars.require_there(gone & ~lost, rules)
    if rules.drop or lost.any():
        gone = gone if rules.drop else lost
        _require_few_gone(asked, filtered(known, ~out), gone[~out], listing, rules)
        reasons[gone] = _GONE
    if rules.accept_filter:
        reasons[outside] = _GONE
    excess, back = known.slice(0, 0), was_out & ~is_changed & ~was_bad & ~moved
    if not rules.policy.is_plain:
        again = ~is_changed & ~was_bad & (moved | relabelled)  # with the same content
        excess, back = _equal_content([filtered(known, ~out & (reasons == 0)), others], now, before, again, back, rules)
    written[rows[back]] = True
    reasons[out] = _LEFT_OUT
    whole = _whole_bags(asked, known, others, written, at, reasons, rules)
    is_removed = ~out & (reasons != 0)
    renewed = _renewed(now, before, ~is_removed[at[rows]] & ~was_out & settled)
    still = was_out & ~written[rows]
    forgotten = out.copy()
    forgotten[at[rows[still]]] = False
    added = at < 0
    added[rows] = was_out & written[rows]
    shown = {
        "added": (asked, added & ~_is_in(asked["source"], filtered(known, renamed | reframed)["source"])),
        "changed": (known, reasons == _CHANGED),
        "relabelled": (known, (reasons == _RELABELLED) | (reasons == _MOVED)),
        "removed": (known, reasons == _GONE),
        "retried": (known, reasons == _RETRIED),
    } | {
        name: (known, mask)
        for name, mask in (
            ("with_their_bag", whole),
            ("kept", missing & ~outside & ~is_removed),
            ("outside_filter", outside & ~is_removed),
        )
        if mask.any()
    }
    if len(excess):
        shown["left_out"] = (excess, np.ones(len(excess), np.bool_))
    reasons[whole] = _CHANGED
    is_removed |= whole
    return Changes(
        written=written,
        removed=_removed(known, reasons, is_removed),
        renewed=pa.concat_tables([renewed, _renewed_left(now, before, still & settled), _without_content(filtered(known, forgotten))]),
        stayed=int(np.count_nonzero(_mask(known["quarantined"]) & ~is_removed)),
        left_out=bool((outside & ~is_removed).any()),
        was_left=left,
        left=pa.concat_tables([_as_listed(filtered(now, still), filtered(before, still)), left_by_others]),
        excess=excess,
        noted=bool(forgotten.any() or (_otherwise(now, before) & still & settled).any()),
        shown={name: _shown(*each) for name, each in shown.items()},
    )


def _known_rows(asked: pa.Table, known: pa.Table) -> tuple[NDArray[Any], pa.Table]:  # any: integers of any width
    """Return the row of `known` that has the key of each of `asked`, -1 where there is none; and these rows of `known`, in this order.

    Of many keys numbers are compared, and of those that agree the texts.
    """
    if not is_large(len(known)):
        at = _values(pc.fill_null(pc.index_in(asked["key"], value_set=known["key"].combine_chunks()), -1))
        return at, take_rows(known, at[at >= 0])
    numbers = Texts(known["key"]).numbers()
    order = narrow(np.argsort(numbers))
    numbers = numbers[order]
    pieces = list[NDArray[Any]]()
    for (part,) in slices(asked.select(["key"])):
        wanted = Texts(part["key"]).numbers()
        places = np.searchsorted(numbers, wanted)
        places[places == len(numbers)] = 0
        pieces.append(np.where(numbers[places] == wanted, order[places], order.dtype.type(-1)))
    del numbers, order
    at = np.concatenate([np.zeros(0, np.int32), *pieces])
    before, rows = take_rows(known, at[at >= 0]), np.flatnonzero(at >= 0)
    wrong = rows[_differ(take_rows(asked.select(["key"]), rows), before, "key")]
    if len(wrong):  # two keys have one number
        keys = known["key"].combine_chunks()
        at[wrong] = _values(pc.fill_null(pc.index_in(take_rows(asked, wrong)["key"], value_set=keys), -1))
        before = take_rows(known, at[at >= 0])
    return at, before


def _by_origin(table: pa.Table, origin: str) -> tuple[pa.Table, pa.Table]:
    """Return the rows of an origin, with those that have no known one and may be of this one, and the others."""
    own = _mask(pc.fill_null(pc.equal(table["origin"], origin), True))
    return filtered(table, own), filtered(table, ~own)


def _equal_content(stay: list[pa.Table], now: pa.Table, before: pa.Table, written: Mask, left: Mask, rules: Rules) -> tuple[pa.Table, Mask]:
    """Return the samples that are there and that the policy leaves out, and which of the `left` ones it does not leave out any more.

    `stay` are rows that stay; of the listed ones (`now`, as they were `before`) those are `written` again whose content is the same.
    DataError if the policy refuses what is there.
    """
    back, columns = np.zeros(len(now), np.bool_), [*CONTENT, "source"]
    listed = now.set_column(now.column_names.index("sample_sha256"), "sample_sha256", before["sample_sha256"])
    parts = [table.select(columns) for table in (*stay, filtered(listed, written), filtered(listed, left))]
    rows, there = pa.concat_tables(parts), sum(map(len, parts[:-1]))
    require_allowed(rows, rules.policy, rules.url)
    why = dropped(rows, rules.policy) != ""
    back[left] = ~why[there:]
    return filtered(rows, why & (np.arange(len(rows)) < there)), back


def _as_listed(now: pa.Table, before: pa.Table) -> pa.Table:
    """Return known rows with all that is listed of them now."""
    for name in ("source", "bytes", "label_name", "group", "columns", "origin", "state"):
        before = before.set_column(LEDGER_SCHEMA.get_field_index(name), name, now[name])
    return before


def _renewed_left(now: pa.Table, before: pa.Table, stays: Mask) -> pa.Table:
    """Return the rows of samples that are left out, as they are listed now, where that is something else."""
    now, before = filtered(now, stays), filtered(before, stays)
    differ = _differ(now, before, "state") & _mask(pc.is_valid(now["state"]))
    differ |= _otherwise(now, before)
    return _as_listed(filtered(now, differ), filtered(before, differ))


def _without_content(rows: pa.Table) -> pa.Table:
    """Return the rows of samples that are left out no more: gone from the source, or written again."""
    for name in ("sample_sha256", "state"):
        rows = rows.set_column(LEDGER_SCHEMA.get_field_index(name), name, pa.nulls(len(rows), pa.string()))
    return rows


def _asked(listing: Listing, placed: Placement) -> pa.Table:
    """Return the rows of a listing, with split and class as they are placed, by the columns of a ledger."""
    splits, codes = [*placed.members], np.zeros(len(listing), np.int8)
    for number, split in enumerate(splits):
        codes[placed.members[split]] = number
    names = placed.names

    def part(start: int, stop: int) -> pa.Table:
        return _asked_part(listing.slice(start, stop), splits, codes[start:stop], None if names is None else names[start:stop])

    if not is_large(len(listing)):
        return part(0, len(listing))
    return spilled(itertools.starmap(part, ranges(len(listing))), LEDGER_SCHEMA)


def _asked_part(listing: Listing, splits: Sequence[str], codes: NDArray[np.int8], names: Texts | None) -> pa.Table:
    columns = {
        "key": listing.keys,
        "source": listing.sources,
        "bytes": listing.sizes,
        "split": pa.array(splits, pa.string()).take(pa.array(codes, pa.int8())),
        "label_name": names,
        "group": listing.groups,
        "columns": columns_sha256(listing.columns, len(listing)),
        "origin": pa.repeat(pa.scalar(listing.origin), len(listing)),
        "state": listing.states,
    }
    return make_table(LEDGER_SCHEMA, columns, len(listing))


def _content(
    listing: Listing, rows: NDArray[Any], now: pa.Table, before: pa.Table, rules: Rules, tars: "_TarRows | None"
) -> tuple[Mask, Mask]:
    """Return which of the known samples have other bytes, and of which the listed state is that of the bytes that were compared."""
    stated = pc.and_(pc.is_valid(now["state"]), pc.is_valid(before["state"]))
    same_size = pc.fill_null(pc.equal(now["bytes"], before["bytes"]), False)
    same = _mask(pc.and_(same_size, pc.fill_null(pc.equal(now["state"], before["state"]), False)))
    changed, settled = np.zeros(len(rows), np.bool_), np.ones(len(rows), np.bool_)
    if rules.checksum:
        same[:] = False
    elif tars is None:  # its size alone says that it changed
        changed = _mask(pc.and_(pc.and_(stated, pc.invert(same_size)), pc.invert(before["quarantined"])))
    doubtful = np.flatnonzero(~same & ~changed)
    if tars is not None:
        return tars.compare(doubtful, rows, now, before), settled
    if not len(doubtful):
        return changed, settled
    found, chosen = rules.reread(listing.take(rows[doubtful])), take_rows(before, doubtful)
    stored, bad = pa.array(found.stored, pa.string()), pa.array(found.bad, pa.string())
    as_stored = pc.fill_null(pc.equal(stored, chosen["sample_sha256"]), False)
    as_bad = pc.and_(pc.is_null(stored), pc.equal(pc.fill_null(bad, ""), pc.fill_null(chosen["sha256"], "")))
    changed[doubtful] = ~_mask(pc.if_else(chosen["quarantined"], as_bad, as_stored))
    settled[doubtful] = ~found.unsettled
    return changed, settled


class _TarRows:
    """The rows of a comparison by their adopted tars; `gone` are known rows of a tar that changed in place."""

    def __init__(self, tars: Tars, asked: pa.Table, known: pa.Table) -> None:
        self._tars = tars
        self._known = np.array(tars.of(known["source"]), object)
        self.gone = np.zeros(len(known), np.bool_)
        self._there = {*tars.of(asked["source"])}

    def compare(self, doubtful: NDArray[np.int64], rows: NDArray[np.int64], now: pa.Table, before: pa.Table) -> Mask:
        """Return which known samples are of a tar that changed, or of another tar than before, after hashing those that may have."""
        tars_now, tars_before = (np.array(self._tars.of(table["source"]), object) for table in (now, before))
        absent = {*self._known} - self._there
        changed = self._tars.changed({*tars_before[doubtful]} - absent)
        self.gone = np.isin(self._known, [*changed])
        other: Mask = tars_now != tars_before
        return other | np.isin(tars_before, [*changed]) | _differ(now, before, "source")

    def require_there(self, kept: Mask, rules: Rules) -> None:
        """DataError if samples that are kept, though they are not listed, are in a tar that is gone: they are nowhere else."""
        lost = sorted(self._tars.changed({*self._known[kept]} - self._there))
        if lost:
            raise DataError(
                f"{counted(len(lost), 'tar', 'tars')} that {rules.url} has adopted ({shown_examples(lost[:EXAMPLES], len(lost))}) "
                f"{'is' if len(lost) == 1 else 'are'} not there any more, and shards.removed=keep cannot keep samples whose bytes are "
                "nowhere else: restore what is gone, or drop these samples (shards.removed=drop); nothing was written"
            )


def _listed_otherwise(asked: pa.Table, known: pa.Table, missing: Mask, rules: Rules) -> tuple[Mask, Mask]:
    """Return which missing samples are listed under another key, and which are frames of a file that has another number of them."""
    renamed, reframed = np.zeros((2, len(known)), np.bool_)
    if not missing.any():
        return renamed, reframed
    there = filtered(known, missing)["source"]
    if not rules.named_places:
        renamed[missing] = _is_in(there, asked["source"].filter(pa.array(_is_in(asked["source"], there))))
    if rules.all_frames:
        files, there = (pc.replace_substring_regex(sources, FRAME_ENDING, "") for sources in (asked["source"], there))
        reframed[missing] = _is_in(there, files)
    return renamed, reframed & ~renamed


def _whole_bags(
    asked: pa.Table, known: pa.Table, others: pa.Table, written: Mask, at: NDArray[Any], reasons: NDArray[np.int8], rules: Rules
) -> Mask:
    """Return the known samples that are removed because their bag gains or changes a sample; mark all of such bags as `written`.

    A bag is adjacent in one shard, so it is written whole. DataError if some of its samples cannot be read from this source.
    """
    if asked["group"].null_count == len(asked):
        return np.zeros(len(known), np.bool_)
    groups = pc.fill_null(asked["group"], "")
    touched = pc.unique(groups.filter(pa.array(written & _mask(pc.not_equal(groups, "")))))
    if not len(touched):
        return np.zeros(len(known), np.bool_)
    inside = _is_in(groups, touched)
    old = np.zeros(len(known), np.bool_)
    old[at[inside & (at >= 0)]] = True
    old &= reasons == 0
    left = _is_in(known["group"], touched) & ~old & (reasons == 0)
    stuck = pa.concat_tables([filtered(known, left), others.filter(pa.array(_is_in(others["group"], touched)))])
    if len(stuck):
        first = stuck.slice(0, 1).to_pylist()[0]
        where = f"{first['source']!r} of {first['group']!r} (from {first['origin'] or 'an unknown address'})"
        raise DataError(
            f"{counted(len(touched), 'bag', 'bags')} of {rules.url} gained or changed samples and would be written anew, but "
            f"{counted(len(stuck), 'sample of it is', 'samples of them are')} not listed by this source, for example {where}: a bag has "
            "one source. Restore these files, put new samples into new bags, or drop what is gone (shards.removed=drop, "
            "shards.accept_filter=true); nothing was written"
        )
    written |= inside
    return old


def _require_free_keys(asked: pa.Table, others: pa.Table, rules: Rules, origin: str) -> None:
    """DataError if a listed key is that of a sample of another origin: both would be one sample."""
    taken = _is_in(asked["key"], others["key"])
    if not taken.any():
        return
    key = asked.filter(pa.array(taken))["key"][0].as_py()
    there = others.filter(pc.equal(others["key"], key))["origin"][0].as_py()
    raise DataError(
        f"{rules.url} has {counted(int(taken.sum()), 'sample', 'samples')} with the keys of this source ({origin or 'no address'}) from "
        f"{there or 'a source without an address'}, for example {key!r}: if it is the same source at another address, set "
        f"source.name={there or '<the old address>'}, which takes these samples over; if they are others, give them other names or write "
        "to another URL; nothing was written"
    )


def _require_few_gone(asked: pa.Table, known: pa.Table, gone: Mask, listing: Listing, rules: Rules) -> None:
    """DataError if so many samples are gone, or such ones, that the source may be incomplete (see `ShardSpec.max_removed`)."""
    count = int(gone.sum())
    if not count or rules.max_removed == 1:
        return
    whole_ones, lost = list[str](), filtered(known, gone)
    too_many = count > FREE and count > rules.max_removed * len(known)
    in_files = listing.paths is None
    for what, parts in (
        ("class", [table["label_name"] for table in (lost.filter(pc.invert(lost["quarantined"])), asked)]),
        ("split", [lost["split"], asked["split"]]),
        *(
            ("folder", [_folders(table["source"], depth, in_files=in_files) for table in (lost, asked)])
            for depth in (1, 2)[: 1 + rules.split_folders]
        ),
    ):
        names = pc.unique(pc.fill_null(parts[0], ""))
        names = names.filter(pa.array(~_is_in(names, parts[1]))).to_pylist()
        whole = sorted(name for name in names if name)
        if whole:
            shown = ", ".join(map(repr, whole[:EXAMPLES])) + (", ..." if len(whole) > EXAMPLES else "")
            many = f"{len(whole)} {what}{'es' if what == 'class' else 's'} ({shown})"
            whole_ones.append(f"all samples of {f'the {what} {shown}' if len(whole) == 1 else many}")
    if too_many or whole_ones:
        share = 1 if whole_ones else math.ceil(count / len(known) * 1000) / 1000
        of_all = [f"{count} of {len(known)} samples, more than shards.max_removed={rules.max_removed:g} allows"] if too_many else []
        examples = shown_examples(list[Any](lost["source"].slice(0, EXAMPLES).to_pylist()), count)  # any: texts
        where = f"{count} are gone from {listing.origin or 'the source'}, {examples}"
        raise DataError(
            f"{rules.url} would lose {' and '.join(of_all + whole_ones)}: {where}. Nothing was written. If a disk, a folder or a bucket is "
            "not there, restore it; if they were removed on purpose, run once with "
            f"shards.max_removed={share:g}, or keep them with shards.removed=keep"
        )


def _folders(sources: Column, depth: int, *, in_files: bool) -> Column:
    """Return the first `depth` folders of each source, "" where there are fewer; `in_files`: sources are paths, else paths before a #."""
    paths = sources if in_files else pc.replace_substring_regex(sources, "#.*", "")
    found = pc.extract_regex(paths.combine_chunks(), f"^(?P<folder>(?:[^/]*/){{{depth}}})")
    return pc.fill_null(pc.struct_field(found, "folder"), "")


def _renewed(now: pa.Table, before: pa.Table, stays: Mask) -> pa.Table:
    """Return the known rows with the state and size that are listed now, where these are others."""
    other = pc.and_(pc.is_valid(now["state"]), pc.fill_null(pc.not_equal(now["state"], before["state"]), True))
    chosen = stays & _mask(pc.or_(other, pc.is_null(before["origin"])))
    now, renewed = filtered(now, chosen), filtered(before, chosen)
    origin = pc.fill_null(renewed["origin"], now["origin"])
    for name, column in (("bytes", now["bytes"]), ("state", now["state"]), ("origin", origin)):
        renewed = renewed.set_column(LEDGER_SCHEMA.get_field_index(name), name, column)
    return renewed


def _removed(known: pa.Table, reasons: NDArray[np.int8], is_removed: Mask) -> pa.Table:
    rows, given = filtered(known.select(["split", "ordinal", "key"]), is_removed), pa.array(_REASONS, pa.string())
    return rows.append_column("reason", given.take(pa.array(reasons[is_removed], pa.int8())))


def _shown(table: pa.Table, mask: Mask) -> dict[str, Any]:  # any: plain JSON data
    rows = np.flatnonzero(mask)
    return {"samples": len(rows), "examples": [table["source"][row].as_py() for row in rows[:EXAMPLES].tolist()]}


def _differ(now: pa.Table, before: pa.Table, name: str) -> Mask:
    pairs = slices(now.select([name]), before.select([name]))
    parts = (_mask(pc.not_equal(*(pc.fill_null(table[name], "") for table in pair))) for pair in pairs)
    return np.concatenate([np.zeros(0, np.bool_), *parts])


def _otherwise(now: pa.Table, before: pa.Table) -> Mask:
    return _differ(now, before, "label_name") | _differ(now, before, "group") | _differ(now, before, "columns")


def _is_in(values: Column, known: Column) -> Mask:
    chunks = known.combine_chunks() if isinstance(known, pa.ChunkedArray) else known
    return _mask(pc.is_in(values, value_set=chunks))


def _mask(values: Column) -> Mask:
    found: Mask = _values(values).astype(np.bool_)
    return found.copy()


def _values(values: Column) -> Any:  # any: an array of numpy
    return values.to_numpy() if isinstance(values, pa.ChunkedArray) else values.to_numpy(zero_copy_only=False)
