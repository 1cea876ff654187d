"""Samples of equal content: duplicates, leaks between splits, contradicting labels; which of them a dataset leaves out.

All of it is a function of the set of samples that are there (split, key, class, sha256 of the stored bytes), whatever the order or the
generation in which they came. More samples never bring one back that is left out, so what is known before new files are read decides which
of the known ones are written again. Nothing is done sample by sample in Python: 16 bytes of each hash are sorted, and only groups of equal
ones are looked at.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray

from aecore.data.format.spill import filtered, ranges, take_rows
from aecore.data.sources._filter import FILTERS
from aecore.data.write.spec import ShardSpec
from aecore.data.write.splits import SplitSpec
from aecore.errors import DataError, counted

pc: Any = pyarrow.compute  # any: pyarrow's stubs know no types of values
Column = Any  # any: as above
Mask = NDArray[np.bool_]
CONTENT = ("split", "key", "label_name", "sample_sha256")  # columns of a ledger that decide
TRAIN, HELD_OUT = "train", ("val", "test")
SHOWN = 5  # examples, and keys of each
_FREE = {"source": FILTERS, "splits": ("leaks",), "shards": ("duplicates",)}  # settings that a run may change where a dataset follows
_HEX, _BYTES = 64, 16  # characters of a hash, bytes of it that are compared


def fixed_identity(identity: Mapping[str, Any], *, follows: bool) -> dict[str, Any]:  # any: plain JSON data
    """Return what of a dataset's identity no later run may change, `source.classes` apart; all of it unless it follows its source."""
    free = _FREE if follows else {}
    return {**identity, **{name: _without(identity[name], free[name]) for name in free if name in identity}}


def _without(settings: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:  # any: as above
    return {name: value for name, value in settings.items() if name not in names}


@dataclass(frozen=True, slots=True)
class Policy:
    """What becomes of samples of equal content: `shards.duplicates` and `splits.leaks`."""

    duplicates: str = "keep"
    leaks: str = "warn"

    @classmethod
    def of(cls, shards: ShardSpec, splits: SplitSpec) -> "Policy":
        """Return the policy of resolved settings."""
        return cls(shards.duplicates or "keep", splits.leaks or "warn")

    @property
    def is_plain(self) -> bool:
        """Whether everything stays."""
        return self == Policy()


def dropped(rows: pa.Table, policy: Policy) -> NDArray[Any]:  # any: texts
    """Return of each sample why it is left out: `duplicate`, `leak`, or "" for those that stay.

    `leak`: it is in train, and its content in val or test too. `duplicate`: of the samples of one content, in whatever splits, the smallest
    key stays; where leaks are dropped one of val or test, if there is any.
    """
    why = np.full(len(rows), "", object)
    at, group = _groups(rows)
    if not len(at):
        return why
    some = take_rows(rows.select(["split", "key"]), at)
    held = _mask(pc.is_in(some["split"], value_set=pa.array(HELD_OUT)))
    leak, drops = np.zeros(len(at), np.bool_), policy.leaks == "drop"
    if drops:
        leak = _mask(pc.equal(some["split"], TRAIN)) & np.isin(group, group[held])
    if policy.duplicates == "drop":
        ranked = pa.table([pa.array(group), pa.array(~held & drops), some["key"]], names=["group", "rank", "key"])
        order = pc.sort_indices(ranked, sort_keys=[(name, "ascending") for name in ranked.column_names]).to_numpy()
        later = order[1:][group[order[1:]] == group[order[:-1]]]
        why[at[later]] = "duplicate"
    why[at[leak]] = "leak"
    return why


def equal_content(rows: pa.Table) -> dict[str, Any]:  # any: plain JSON data
    """Return counts and examples of samples that have the content of another one, as plain JSON data.

    `duplicates`: all of them. `leaks`: those in more than one split. `contradicting_labels`: those of more than one class. `contents` are
    the different contents that this concerns, `samples` all samples of these; examples are those of the smallest keys.
    """
    at, group = _groups(rows)
    some = take_rows(rows.select(["split", "key", "label_name"]), at)
    named = _mask(pc.not_equal(pc.fill_null(some["label_name"], ""), ""))
    splits, in_splits = _several(group, some["split"], np.ones(len(at), np.bool_))
    _, contradicting = _several(group, some["label_name"], named)
    pairs: dict[str, int] = {}
    for names in splits.values():
        pairs[", ".join(names)] = pairs.get(", ".join(names), 0) + 1
    every = np.ones(len(at), np.bool_)
    return {
        "duplicates": _facts(some, group, every, None),
        "leaks": {**_facts(some, group, in_splits, "split"), "splits": dict(sorted(pairs.items()))},
        "contradicting_labels": _facts(some, group, contradicting & named, "label_name"),
    }


def reported(ledger: pa.Table, left: pa.Table) -> dict[str, Any]:  # any: plain JSON data
    """Return `equal_content` of the samples of a ledger and of those that are left out.

    `remaining` of each kind are the contents that still are such without the latter: what a reader of the dataset finds.
    """
    there = equal_content(ledger)
    found = equal_content(pa.concat_tables([ledger, left])) if len(left) else there
    return {name: {**facts, "remaining": there[name]["contents"]} for name, facts in found.items()}


def require_allowed(rows: pa.Table, policy: Policy, url: str) -> None:
    """DataError if there are duplicates or leaks and the policy refuses them."""
    if "refuse" not in (policy.duplicates, policy.leaks):
        return
    found = equal_content(rows)
    for refused, name, key, what, remedy in (
        (policy.duplicates, "duplicates", "shards.duplicates", "have the content of another one", "drop: one of each stays; or keep"),
        (policy.leaks, "leaks", "splits.leaks", "have the content of one in another split", "drop: it goes from train; or warn"),
    ):
        facts = found[name]
        if refused == "refuse" and facts["contents"]:
            examples = "; ".join(_example(each) for each in facts["examples"])
            raise DataError(
                f"{url}: {facts['samples']} samples of {counted(facts['contents'], 'content', 'contents')} {what}, and {key}=refuse: "
                f"{examples}. No generation was committed. Remove them from the source, or set {key} ({remedy})"
            )


def lines_of(found: Mapping[str, Any]) -> list[tuple[str, str]]:  # any: plain JSON data
    """Return what `reported` found, each kind as a sentence for a log."""
    lines = []
    for name, what in (
        ("duplicates", "{} have the content of another one ({}, for example {})"),
        ("leaks", "{} have the content of one in another split ({}, for example {})"),
        ("contradicting_labels", "{} have the content of one of another class ({}, for example {})"),
    ):
        facts = found[name]
        if facts["contents"]:
            contents = counted(facts["contents"], "content", "contents")
            samples = counted(facts["samples"], "sample", "samples")
            if facts["remaining"] < facts["contents"]:  # the others are left out
                samples, contents = f"{samples} of the source", f"{contents}, still so in the dataset: {facts['remaining'] or 'none'}"
            lines.append((name, what.format(samples, contents, _example(facts["examples"][0]))))
    return lines


def _example(example: Mapping[str, list[str]] | list[str]) -> str:
    if isinstance(example, list):
        return " = ".join(example)
    return " = ".join(f"{', '.join(keys)} ({name})" for name, keys in example.items())


def _facts(some: pa.Table, group: NDArray[np.int64], mask: Mask, by: str | None) -> dict[str, Any]:  # any: plain JSON data
    """Return the counts of the rows of a mask and the examples of their groups; with `by` keys by the values of that column."""
    chosen, numbers = filtered(some.select(["key"] if by is None else ["key", by]), mask), group[mask]
    order = pc.sort_indices(chosen["key"]).to_numpy()
    numbers = numbers[order]
    _, first = np.unique(numbers, return_index=True)
    examples: list[Any] = []  # any: lists of keys, or such by value
    for number in numbers[np.sort(first)[:SHOWN]].tolist():
        rows = order[numbers == number]
        if by is None:
            examples.append(_keys(chosen, rows))
            continue
        values = chosen[by].take(pa.array(rows))
        found = {value: _keys(chosen, rows[_mask(pc.equal(values, value))]) for value in values.unique().to_pylist()}
        examples.append(dict(sorted(found.items(), key=lambda item: item[1])))
    return {"samples": len(chosen), "contents": len(first), "examples": examples}


def _keys(chosen: pa.Table, rows: NDArray[Any]) -> list[Any]:  # any: integers of any width; texts
    return chosen["key"].take(pa.array(rows[:SHOWN])).to_pylist()


def _several(group: NDArray[np.int64], values: Column, mask: Mask) -> tuple[dict[int, list[str]], Mask]:
    """Return the values of each group that has several (of the rows of a mask), sorted, and which rows are of these groups."""
    names = pc.unique(values)
    codes = pc.index_in(values, value_set=names).to_numpy()
    pairs = np.unique(group[mask] * (len(names) + 1) + codes[mask])
    numbers, code = np.divmod(pairs, len(names) + 1)
    found, count = np.unique(numbers, return_counts=True)
    several = found[count > 1]
    texts, kept = names.to_pylist(), np.isin(numbers, several)
    by_group: dict[int, list[str]] = {}
    for number, each in zip(numbers[kept].tolist(), code[kept].tolist(), strict=True):
        by_group.setdefault(number, []).append(texts[each])
    return {number: sorted(names) for number, names in by_group.items()}, np.isin(group, several)


def _groups(rows: pa.Table) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the rows whose content is there more than once, and a number of that content for each; quarantined ones have none."""
    stored = _mask(pc.is_valid(rows["sample_sha256"]))
    if "quarantined" in rows.column_names:
        stored &= ~_mask(rows["quarantined"])
    at = np.flatnonzero(stored)
    hashes = rows["sample_sha256"]
    parts = (hashes.slice(start, stop - start).filter(pa.array(stored[start:stop])) for start, stop in ranges(len(rows)))
    words = np.concatenate([np.zeros((0, 2), np.uint64), *(_words(chunk) for part in parts for chunk in part.chunks if len(chunk))])
    first = np.sort(words[:, 0])  # few have that of another, so few are sorted with their rows
    some = np.flatnonzero(np.isin(words[:, 0], first[1:][first[1:] == first[:-1]]))
    at, words = at[some], words[some]
    order = np.lexsort((words[:, 1], words[:, 0]))
    words = words[order]
    starts = np.ones(len(at), np.bool_)
    starts[1:] = (words[1:] != words[:-1]).any(axis=1)
    group = np.cumsum(starts) - 1
    many = np.bincount(group, minlength=1)[group] > 1 if len(group) else starts
    return at[order[many]], group[many]


def _words(hashes: Column) -> NDArray[np.uint64]:
    """Return the first 16 bytes of hashes in hex as two numbers each."""
    offsets = np.frombuffer(hashes.buffers()[1], "<i4")[hashes.offset : hashes.offset + len(hashes) + 1]
    if (np.diff(offsets) != _HEX).any():
        raise DataError("the listing of a dataset has values of sample_sha256 that are no sha256 in hex: restore it")
    text = np.frombuffer(hashes.buffers()[2] or b"", np.uint8)[offsets[0] : offsets[-1]].reshape(-1, _HEX)[:, : 2 * _BYTES]
    return np.frombuffer(bytes.fromhex(text.tobytes().decode("ascii")), "<u8").reshape(-1, 2).astype(np.uint64)


def _mask(values: Column) -> Mask:
    found: Mask = (values.to_numpy() if isinstance(values, pa.ChunkedArray) else values.to_numpy(zero_copy_only=False)).astype(np.bool_)
    return found.copy()
