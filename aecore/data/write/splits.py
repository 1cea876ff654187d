"""PURE: assign samples to splits by folders, a column, or a hash.

A hash is of (seed, key), or of the group, so a sample keeps its split when the dataset grows, regardless of the other samples. Pages and
frames of a file (`source.frames=all`) are nearly alike: together they have the key of their file.
"""

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from aecore.data.classes import spelled
from aecore.data.format.bad_sample import BadSample
from aecore.data.manifest import SPLIT_ORDER, DatasetManifest
from aecore.data.sources import Listing, take
from aecore.data.sources._names import file_of, split_of, split_of_folder
from aecore.data.sources._skipped import first_of
from aecore.errors import ConfigError, DataError, counted, did_you_mean
from aecore.native.texts import Texts
from aecore.registry import knob, spec

_SPLIT_NAME = re.compile(r"(?!.*-g\d{6}$)[A-Za-z0-9][A-Za-z0-9_-]*")  # stems append -g000002: a split must not look like that


@spec
class SplitSpec:
    """Which sample belongs to which split (`splits.*` of a recipe)."""

    by: Literal["auto", "folders", "hash", "content", "column", "none"] = knob(
        "auto",
        "folders: the top folders, or the words in the names of tars (valid, dev: val; training: train; ...); hash: of the key or group; "
        "content: of the stored bytes, so equal ones are in one split, and new files are read once before they are written; "
        "auto: column if one is named, else folders if all of them name a split, else hash where val or test is set, else none",
    )
    val: float = knob(0.0, "share of the training samples that becomes the split val, by hash", ge=0.0, le=1.0)
    test: float = knob(0.0, "share of the training samples that becomes the split test, by hash", ge=0.0, le=1.0)
    seed: int = knob(0, "seed of the hash", ge=0)
    column: str | None = knob(None, "metadata column that names the split (splits.by=column)")
    files: Literal["auto", "whole", "cut"] = knob(
        "auto",
        "pages and frames of a file (source.frames=all); whole: in one split; cut: each by its own hash; auto: whole in new datasets",
        since=2,
        absent="cut",
    )
    stratify: bool = knob(False, "val and test get their share of every class, as near as whole samples or groups allow", since=2)
    leaks: Literal["warn", "drop", "refuse"] | None = knob(
        None,
        "samples of train whose bytes are in val or test too; drop: they leave train; refuse: no generation with equal bytes in two "
        "splits; null: what the dataset has, warn for a new one",
        since=2,
    )

    def __post_init__(self) -> None:
        if self.val + self.test >= 1:
            raise ConfigError(f"splits.val + splits.test is {self.val + self.test:g}: nothing would be left to train on, expected < 1")
        if (self.by == "column") != (self.column is not None) and not (self.by == "auto" and self.column is not None):
            raise ConfigError(f"splits.by={self.by} with splits.column={self.column}: give both by=column and a column, or neither")
        if self.stratify and not (self.val or self.test):
            raise ConfigError("splits.stratify=true needs splits.val or splits.test above 0: the shares that every class keeps")
        if self.by in ("hash", "content") and not (self.val or self.test):
            raise ConfigError(f"splits.by={self.by} needs splits.val or splits.test above 0 (splits.by=none puts everything into train)")
        if self.by == "content" and self.files == "whole":
            raise ConfigError(
                "splits.by=content splits by the bytes of each sample, and splits.files=whole by files: leave one of them out"
            )
        if self.by == "none" and (self.val or self.test):
            raise ConfigError("splits.by=none puts everything into train: set splits.by=hash to use splits.val and splits.test")


def without_bad_splits(listing: Listing, splits: SplitSpec) -> Listing:
    """Return a listing in which samples are unusable (`no_split`) whose column or folder of the split is missing or cannot name one.

    Unless that are all of them: then it is none of splits, which is refused later.
    """
    if splits.column is not None and splits.column in listing.columns:
        what, values = f"splits.column={splits.column}", listing.columns[splits.column].tolist()
        good = [value is not None and value == value and _SPLIT_NAME.fullmatch(str(value)) is not None for value in values]
        wrong = [row for row, is_good in enumerate(good) if not is_good]
    elif splits.by == "folders" and listing.splits is not None:
        what, values = "its top folder", Texts.of(listing.splits)
        codes, tops = values.codes()
        names_none = [top != "" and _SPLIT_NAME.fullmatch(split_of_folder(top) or top) is None for top in tops]
        wrong = np.flatnonzero(np.array(names_none, np.bool_)[codes]).tolist()
    else:
        return listing
    known = listing.unusable
    bad = [row for row in wrong if known is None or known[row] is None]
    if not bad or len(bad) == (len(listing) if known is None else known.count(None)):
        return listing
    unusable = list[BadSample | None](known or [None] * len(listing))
    for row in bad:
        text = f"{what} is {values[row]!r}, which cannot name a split (letters, digits, - and _): write the name of one"
        unusable[row] = BadSample("no_split", text)
    return dataclasses.replace(listing, unusable=unusable)


def resolve_splits(
    listing: Listing,
    splits: SplitSpec,
    recorded: Mapping[str, Any] | None = None,  # any: plain JSON data
    known: Collection[str] = (),
    *,
    frames: bool = False,
) -> SplitSpec:
    """Return `splits` with `auto` resolved for this listing: column, folders, hash or none; files whole or cut.

    An existing dataset keeps its `recorded` choice wherever that is still possible; `known` are the names of its splits. `frames` says
    that a file may be several samples: else its pages need no rule, and the identity none.
    """
    if splits.files == "auto":
        whole = frames and recorded is None and splits.by != "content"
        splits = dataclasses.replace(splits, files=(recorded or {}).get("files", "whole" if whole else "cut"))
    if splits.by != "auto":
        return splits
    if splits.column is not None:
        return dataclasses.replace(splits, by="column")
    # files directly in the source's folder change nothing
    tops = set[str]() if listing.splits is None else {*Texts.of(listing.splits).distinct()} - {""}
    all_known = bool(tops) and (listing.named_splits or all(split_of_folder(name) or name in known for name in tops))
    kept = (recorded or {}).get("by")
    if kept in ("none", "hash", "content") or (kept == "folders" and all_known):
        try:
            return dataclasses.replace(splits, by=kept)
        except ConfigError:
            pass  # not possible with the requested splits.val and splits.test: the comparison of identities reports it
    if all_known:
        return dataclasses.replace(splits, by="folders")
    return dataclasses.replace(splits, by="hash" if splits.val or splits.test else "none")


def split_warnings(listing: Listing, splits: SplitSpec) -> list[str]:
    """Return warnings about resolved `splits`: folders that look like splits and are not used, samples outside the split folders."""
    if splits.by in ("none", "hash", "content"):
        folders = {folder for keys in Texts.of(listing.keys).slices() for folder in {key.rpartition("/")[0] for key in keys}}
        found = sorted({name for folder in folders for name in folder.split("/") if split_of_folder(name)})
        if not found:  # train_set and val_set, where a class called test_tube is none
            named = {top: split_of(top) for top in {folder.partition("/")[0] for folder in folders}}
            found = sorted(top for top, split in named.items() if split) if len({*named.values()} - {""}) > 1 else []
        if found:
            if not any(map(split_of_folder, found)):
                remedy = "rename them to train, val and test"
            elif listing.splits is None:
                remedy = "put the samples of each split into files of their own that are named by it (train, val), for a new dataset"
            else:
                remedy = "give the folder that holds nothing but split folders as source.url"
                remedy += ", or set splits.by=folders into a new dataset" if {*found} & {*Texts.of(listing.splits).distinct()} else ""
            return [
                f"folders are named like splits ({first_of(found)}) and splits.by={splits.by} was chosen, so their samples are not kept "
                f"apart: {remedy}; if these are classes, set splits.by={splits.by} explicitly"
            ]
    if splits.by == "folders" and listing.splits is not None and "" in Texts.of(listing.splits).distinct():
        unusable = listing.unusable or [None] * len(listing)
        by_name = listing.paths is not None and not listing.label_paths  # the split is in the names of files that hold many samples
        names: Sequence[str]
        if listing.paths is None or by_name:
            names = [source.partition("#")[0] if by_name else file_of(source) for source in listing.sources]
        else:
            names = listing.paths
        loose = [name for name, top, bad in zip(names, listing.splits, unusable, strict=True) if not top and bad is None]
        if not loose:
            return []
        known = first_of(list(dict.fromkeys(loose)))
        if by_name:
            one, many = "sample is in a file whose name says no split and goes", "samples are in files whose names say no split and go"
            what = counted(len(loose), one, many)
            return [f"{what} to train ({known}): name the files by their split (train, val), or leave them out by source.exclude"]
        what = counted(len(loose), "sample is in no split folder and goes", "samples are in no split folder and go")
        return [f"{what} to train ({known}): move them into one, or out of source.url"]
    return []


def assign_splits(
    listing: Listing,
    splits: SplitSpec,
    names: Sequence[str] | None = None,
    parent: DatasetManifest | None = None,
    known: Mapping[str, str] | None = None,
    contents: list[str] | None = None,
) -> dict[str, NDArray[np.int64]]:
    """Return the rows of each split (ascending) for resolved `splits`: train, val, test first, other names sorted, none empty.

    Folders named by a word for a split are stored under its usual name, unless their own name is among the splits of the `parent`.
    `contents` are what `splits.by=content` hashes. `names` are the classes of the samples, for
    `splits.stratify`, which completes the shares of the parent: the units (keys, groups or contents)
    that are `known` to be in one of the splits that share the training samples keep it.
    """
    values = _split_values(listing, splits, parent.splits if parent else ())
    rows = {"train": np.arange(len(listing))} if values is None else _rows_by_value(values)
    train = rows.get("train", np.zeros(0, dtype=np.int64))
    kept: dict[str, NDArray[np.int64]] = {}
    everything = contents if contents is not None else units_of(listing.keys, listing.sources, listing.groups, splits)
    if splits.stratify and known:
        units = take(everything, train)
        shared = ("train", *_carved(splits))
        places = np.array([shared.index(split) if (split := known.get(unit)) in shared else -1 for unit in units], np.int64)
        kept = {split: train[places == number] for number, split in enumerate(shared)}
        train = train[places < 0]
    if contents is not None and listing.groups is not None:
        raise ConfigError(
            "splits.by=content would cut groups of samples (source.group), which stay whole: use splits.by=hash, of the group"
        )
    units = take(everything, train)
    if splits.stratify:
        place = _stratified(units, _strata(listing, names, train), splits, parent)
    else:
        place = hashes(units, f"split {splits.seed}") / 2.0**64 if splits.val or splits.test else np.ones(len(train))
    for name, start, share in (("val", 0.0, splits.val), ("test", splits.val, splits.test)):
        if share and name in rows:
            raise ConfigError(f"the source has its own split {name!r} ({len(rows[name])} samples): set splits.{name}=0")
        if share:
            rows[name] = train[(place >= start) & (place < start + share)]
    rows["train"] = train[place >= splits.val + splits.test]
    rows |= {split: np.sort(np.concatenate([rows[split], there])) for split, there in kept.items()}
    names = [*SPLIT_ORDER, *sorted(name for name in rows if name not in SPLIT_ORDER)]
    return {name: rows[name] for name in names if len(rows.get(name, ()))}


def units_of(keys: Sequence[str], sources: Sequence[str], groups: Sequence[str] | None, splits: SplitSpec) -> Sequence[str]:
    """Return what is hashed of each sample: its group, or its key (with `splits.files=whole` that of the file that it is a frame of)."""
    if groups is not None or splits.files != "whole":
        return keys if groups is None else groups
    return [key if file_of(source) == source else key.rpartition("/")[0] for key, source in zip(keys, sources, strict=True)]


def _split_values(listing: Listing, splits: SplitSpec, known: Collection[str]) -> Texts | None:
    if splits.by == "folders":
        if listing.splits is None:
            raise ConfigError("splits.by=folders: this source has no folders (use hash, column or none)")
        tops = Texts.of(listing.splits)
        is_name = {*tops.distinct()} if listing.named_splits else known
        names = {top: top if top in is_name else split_of_folder(top) or top for top in tops.distinct()}
        names |= {"": "train"} if len(names) > 1 else {}
        values, what = tops.mapped(names.__getitem__), "the top folder"
        if listing.unusable is not None:
            pairs = zip(values, listing.unusable, strict=True)
            values = Texts.of([value if bad is None or _SPLIT_NAME.fullmatch(value) else "train" for value, bad in pairs])
    elif splits.by == "column":
        column = splits.column or ""
        if column not in listing.columns:
            raise ConfigError(f"splits.column {column!r} is no column of the source{did_you_mean(column, listing.columns)}")
        texts, what = [str(value) for value in listing.columns[column].tolist()], f"the value of {column}"
        for row, bad in enumerate(listing.unusable or ()):
            texts[row] = texts[row] if bad is None else "train"  # it may have no value
        values = Texts.of(texts)
    else:
        return None
    for name in sorted(values.distinct()):
        if not _SPLIT_NAME.fullmatch(name):
            row = values.index(name)
            raise DataError(
                f"{what} {name!r} of {listing.sources[row]!r} cannot name a split (letters, digits, - and _): "
                "rename it, or use splits.by=hash or none"
            )
    return values


def _strata(listing: Listing, names: Sequence[str] | None, rows: NDArray[np.int64]) -> Texts:
    if names is None:
        raise ConfigError(f"splits.stratify=true needs classes, and none of the {len(listing)} samples has a label: see source.label")
    return Texts.of(names).take(rows)


def _stratified(units: Sequence[str], strata: Texts, splits: SplitSpec, parent: DatasetManifest | None) -> NDArray[np.float64]:
    """Return the place of each sample in [0, 1]: below `splits.val` is val, below the sum of both shares test, above it train.

    Units (samples or whole groups) of a class are taken in the order of their hashes, until the class has its share of what the dataset
    has of it with these samples; what is left by rounding goes to the classes with the largest remainders, so that the whole split has its
    share as well. A group belongs to the class that most of its samples have.
    """
    if not len(units):
        return np.ones(0)
    codes, known = Texts.of(units).codes()
    labels, named = strata.codes()
    classes = sorted(named)
    labels = np.array([classes.index(name) for name in named])[labels]
    pairs, counts = np.unique(codes * len(classes) + labels, return_counts=True)
    unit, label = np.divmod(pairs, len(classes))
    best = np.lexsort((label, -counts, unit))
    stratum, sizes = label[best][np.flatnonzero(np.diff(unit[best], prepend=-1))], np.bincount(codes)
    order = np.lexsort((hashes(known, f"split {splits.seed}"), stratum))
    new = np.bincount(stratum, sizes, len(classes)).astype(np.float64)
    ends = np.cumsum(sizes[order]) - (np.cumsum(new) - new)[stratum[order]]
    middles = ends - sizes[order] / 2
    stored = {name: _stored(parent, name, classes) for name in ("train", "val", "test")}
    ties = hashes(classes, f"stratify {splits.seed}")
    total = new + sum((stored[name] for name in ("train", *_carved(splits))), np.zeros(len(classes)))
    val = _whole_shares(splits.val * total - stored["val"], new, ties)
    test = _whole_shares(splits.test * total - stored["test"], new - val, ties)
    chosen = np.where(middles < val[stratum[order]], 0.0, np.where(middles < (val + test)[stratum[order]], splits.val, 1.0))
    places = np.empty(len(known))
    places[order] = chosen
    return places[codes]


def _carved(splits: SplitSpec) -> list[str]:
    return [name for name, share in (("val", splits.val), ("test", splits.test)) if share]


def _stored(parent: DatasetManifest | None, split: str, classes: Sequence[str]) -> NDArray[np.float64]:
    """Return how many samples of each class a split has already ("": of those without one)."""
    if parent is None or split not in parent.statistics:
        return np.zeros(len(classes))
    counts = dict(parent.statistics[split].classes)
    counts[""] = parent.statistics[split].samples - sum(counts.values())
    forms = {spelled(name): count for name, count in counts.items()}
    return np.array([counts.get(name, forms.get(name, 0)) for name in classes], np.float64)


def _whole_shares(wanted: NDArray[np.float64], most: NDArray[np.float64], ties: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Return whole numbers from 0 to `most`, each less than 1 from `wanted` cut to these, whose sum is as near as that allows to its sum.

    The largest remainders are rounded up; equal ones in the order of `ties`.
    """
    cut = np.clip(wanted, 0, most)
    shares = np.floor(cut + 1e-9)
    rest = np.round(cut - shares, 9)
    order = np.lexsort((ties, -rest))
    up = order[rest[order] > 0][: max(round(float(wanted.sum() - shares.sum())), 0)]
    shares[up] += 1
    return shares


def _rows_by_value(values: Texts) -> dict[str, NDArray[np.int64]]:
    codes, known = values.codes()
    return {value: np.flatnonzero(codes == number) for number, value in enumerate(known)}


def hashes(names: Sequence[str], salt: str) -> NDArray[np.uint64]:
    """Return 64 hash bits of each name: stable across versions and machines (0.15 us each)."""
    return Texts.of(names).hashes(salt)
