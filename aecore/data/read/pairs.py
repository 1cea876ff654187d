"""Pairs for training: the partner of each sample, drawn anew in every epoch and stored nowhere.

A partner is a pure function of (training split, seed, epoch, ordinal of the sample), so it does not depend on ranks, batches or
resuming. It shares the label, or all factors (`factor_*` columns of the index) but k. The price: every rank holds the labels
or factors of the whole split in memory (about 50 bytes per sample and 8 more per factor), and reads the indexes before the first step.

A sample without a partner (alone in its class, a hole in the grid of factors) is paired with itself: no sample is left out of
an epoch, and two equal posteriors add no wrong gradient. A note reports how many there are; if it is all of them, that is an error.
"""

import hashlib
import math
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from aecore.errors import ConfigError, DataError
from aecore.registry import knob, spec

if TYPE_CHECKING:
    from aecore.data.read.rows import SplitRows

Int64s = NDArray[np.int64]
Bits = NDArray[np.uint64]
FACTOR = "factor_"
PROPOSALS = 32  # random combinations that are looked up before the whole split is searched
LOOKED_AT = 256  # samples that are searched for partners when a split is opened
_GOLDEN, _MIX1, _MIX2, _MASK = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, (1 << 64) - 1


@spec
class PairSpec:
    """How partners are drawn (`pairs.*` of a recipe), for models that train on pairs; others take no `pairs.*`."""

    by: Literal["auto", "label", "factors"] = knob("auto", "what partners share: their label, or all factors but k; auto: factors if known")
    k: int | Literal["random"] = knob("random", "factors in which partners differ; random: drawn per pair, 1 to one less than all", ge=1)

    def __post_init__(self) -> None:
        if isinstance(self.k, str) and self.k != "random":
            raise ConfigError(f"PairSpec.k is {self.k!r}, expected a number from 1 or 'random'")
        if self.by == "label" and self.k != "random":
            raise ConfigError(f"PairSpec.k is {self.k}, which PairSpec.by=label does not use: leave it out, or use PairSpec.by=factors")


class Partners(Protocol):
    """Draws the partners of one split; `notes` are messages for the user."""

    notes: tuple[str, ...]

    def partners_of(self, indices: Int64s, epoch: int) -> Int64s:
        """Return the index of the partner of each sample `[n]` in an epoch."""
        ...


def find_partners(rows: "SplitRows", pairs: PairSpec, seed: int) -> Partners:
    """Read the labels or factors of a split and return its `Partners`.

    Raises
    ------
    DataError
        No labels, no factors, unlabelled samples, or no two samples that could be partners.
    ConfigError
        `pairs.k` is not possible with the factors of the split.
    """
    where = f"split {rows.split!r} of {rows.dataset.url}"
    rows.dataset.store.prefetch([shard.index for shard in rows.shards])
    tables = [_needed(rows.index(number)) for number in np.flatnonzero(rows.counts).tolist()]
    key = f"{rows.dataset.training_key(rows.split)}|{seed}"
    draws = Draws(key, np.concatenate([table["ordinal"].to_numpy() for table in tables]))
    names = [name for name in tables[0].column_names if name.startswith(FACTOR)]
    if pairs.by == "factors" or (pairs.by == "auto" and names):
        return FactorPartners(where, _levels(where, tables, names), pairs.k, draws)
    if not rows.labelled:
        raise DataError(
            f"{where} has neither labels nor {FACTOR}* columns to draw pairs by: shard images in class folders, or a source with factors"
            if pairs.by == "auto"
            else f"{where} has no labels, which pairs.by=label needs: shard images in class folders"
        )
    if pairs.k != "random":
        raise ConfigError(f"pairs.k is {pairs.k}, but {where} has no {FACTOR}* columns: leave pairs.k out to draw pairs by label")
    return LabelPartners(where, np.concatenate([table["label"].fill_null(-1).to_numpy() for table in tables]), draws)


class Draws:
    """Random bits as a function of (key, epoch, ordinal, name of the draw): SplitMix64 on counters, vectorized over samples."""

    def __init__(self, key: str, ordinals: Int64s) -> None:
        self._key = key
        self._counters = ordinals.astype(np.uint64) * np.uint64(_GOLDEN)

    def bits(self, indices: Int64s, epoch: int, draw: str) -> Bits:
        """Return 64 random bits per sample `[n]`."""
        digest = hashlib.sha256(f"{self._key}|{epoch}|{draw}".encode()).digest()
        start, twist = (np.uint64(int.from_bytes(digest[at : at + 8], "little")) for at in (0, 8))
        return _mixed(_mixed(self._counters[indices] + start) ^ twist)

    def below(self, indices: Int64s, epoch: int, draw: str, limits: Int64s | int) -> Int64s:
        """Return a number from [0, limit) per sample; limits are below 2^31."""
        high = self.bits(indices, epoch, draw) >> np.uint64(33)
        return ((high * np.asarray(limits, np.uint64)) >> np.uint64(31)).astype(np.int64)


def _mixed(x: Bits) -> Bits:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_MIX1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_MIX2)
    return x ^ (x >> np.uint64(31))


class _Groups:
    """Samples grouped by an integer code: the members of each code are adjacent in `members`."""

    def __init__(self, codes: Int64s) -> None:
        self.members = np.argsort(codes, kind="stable")
        self.codes, self.starts, self.counts = np.unique(codes[self.members], return_index=True, return_counts=True)

    def find(self, codes: Int64s) -> tuple[Int64s, Int64s]:
        """Return start and count in `members` of each code; count 0 where nothing has it."""
        places = np.minimum(np.searchsorted(self.codes, codes), len(self.codes) - 1)
        return self.starts[places], np.where(self.codes[places] == codes, self.counts[places], 0)


class LabelPartners:
    """Partners of the same label, every other sample of the class with the same probability.

    Parameters
    ----------
    where : str
        Names the split in messages.
    labels : `[n]` int64
        Class id of each sample of the split; -1 is none.
    draws : Draws
        Over the same samples.
    """

    def __init__(self, where: str, labels: Int64s, draws: Draws) -> None:
        if (labels < 0).any():
            bare = f"{int((labels < 0).sum())} of {len(labels)} samples"
            raise DataError(f"{bare} in {where} have no label, which pairs.by=label needs: move them into class folders and shard again")
        self._labels, self._draws, self._groups = labels.astype(np.int64), draws, _Groups(labels.astype(np.int64))
        self._place = np.empty(len(labels), np.int64)
        self._place[self._groups.members] = np.arange(len(labels))
        alone = int((self._groups.counts == 1).sum())
        classes = len(self._groups.counts)
        if alone == classes:
            raise DataError(f"every class in {where} has one sample: there are no pairs of the same label")
        note = f"{alone} of {classes} classes in {where} have one sample, which is paired with itself"
        self.notes: tuple[str, ...] = (f"pairs share their label, one of {classes}", *([note] if alone else []))

    def partners_of(self, indices: Int64s, epoch: int) -> Int64s:
        """Return the index of the partner of each sample `[n]` in an epoch."""
        starts, counts = self._groups.find(self._labels[indices])
        own = self._place[indices] - starts
        other = self._draws.below(indices, epoch, "partner", np.maximum(counts - 1, 1))
        other += (other >= own) & (counts > 1)  # the others of the class: the sample itself is skipped
        return self._groups.members[starts + np.where(counts > 1, other, own)]


class FactorPartners:
    """Partners that differ in exactly k factors: first the set of factors is drawn uniformly, then a new level of each.

    Combinations that no sample has are drawn again; k stays what it was, as long as a partner with it exists.

    Parameters
    ----------
    where : str
        Names the split in messages.
    levels : dict of `[n]` int64
        Level of each sample, 0 to L-1, by name of the factor; factors with one level are ignored.
    k : int or "random"
        Factors that differ; random: 1 to K-1 with equal probability.
    draws : Draws
        Over the same samples.
    """

    def __init__(self, where: str, levels: dict[str, Int64s], k: int | Literal["random"], draws: Draws) -> None:
        varying = {name: column for name, column in levels.items() if column.max() > 0}
        self.num_factors = len(varying)
        self._require_possible(where, list(varying), k)
        self._k, self._draws = k, draws
        self._levels = np.stack(list(varying.values()), axis=1)
        self._sizes = self._levels.max(0) + 1
        if math.prod(self._sizes.tolist()) >= 1 << 62:
            raise DataError(
                f"the factors of {where} have over 2^62 combinations ({', '.join(varying)}): pairs need factors with few levels"
            )
        self._weights = np.cumprod(np.concatenate([[1], self._sizes[:-1]]))
        self._groups = _Groups(self._levels @ self._weights)
        self.notes: tuple[str, ...] = self._notes(where, list(varying))

    def _require_possible(self, where: str, names: list[str], k: int | str) -> None:
        if len(names) < 2:
            found = ", ".join(names) or "none"
            raise DataError(f"pairs.by=factors needs at least 2 {FACTOR}* columns that vary in {where}, found {found}: use pairs.by=label")
        if not isinstance(k, str) and k >= len(names):
            raise ConfigError(
                f"pairs.k is {k}, expected 1 to {len(names) - 1}: partners share at least one of the {len(names)} factors "
                f"that vary in {where} ({', '.join(names)})"
            )

    def _notes(self, where: str, names: list[str]) -> tuple[str, ...]:
        """Return messages: what is drawn, and how many of some evenly spread samples have no partner. DataError if none of them has one."""
        wanted = f"{self._k} of {len(names)} factors" if self._k != "random" else f"1 to {len(names) - 1} of {len(names)} factors"
        total = len(self._levels)
        some = np.unique(np.linspace(0, total - 1, min(total, LOOKED_AT)).astype(np.int64))
        alone = int((self.partners_of(some, 0) == some).sum())
        if alone == len(some):
            raise DataError(f"no two samples of {where} differ in {wanted} ({', '.join(names)}): use another pairs.k, or more of the grid")
        share = f"{alone} of {len(some)} sampled rows of {where} have no partner that differs in {wanted}: paired with themselves"
        return (f"pairs differ in {wanted} ({', '.join(names)})", *([share] if alone else []))

    def partners_of(self, indices: Int64s, epoch: int) -> Int64s:
        """Return the index of the partner of each sample `[n]` in an epoch."""
        num_changed = self._num_changed(indices, epoch)
        partners = np.full(len(indices), -1, np.int64)
        for attempt in range(PROPOSALS):
            missing = np.flatnonzero(partners < 0)
            if not len(missing):
                return partners
            partners[missing] = self._proposed(indices[missing], epoch, attempt, num_changed[missing])
        for place in np.flatnonzero(partners < 0):
            partners[place] = self._searched(indices[place : place + 1], epoch, int(num_changed[place]))
        return partners

    def _num_changed(self, indices: Int64s, epoch: int) -> Int64s:
        if isinstance(self._k, int):
            return np.full(len(indices), self._k)
        return 1 + self._draws.below(indices, epoch, "k", self.num_factors - 1)

    def _proposed(self, indices: Int64s, epoch: int, attempt: int, num_changed: Int64s) -> Int64s:
        """Return a sample with the drawn combination of levels, -1 where none has it."""
        columns = range(self.num_factors)
        scores = np.stack([self._draws.bits(indices, epoch, f"{attempt}|score|{column}") for column in columns], axis=1)
        rank = np.argsort(np.argsort(scores, axis=1, kind="stable"), axis=1, kind="stable")
        steps = [1 + self._draws.below(indices, epoch, f"{attempt}|level|{column}", int(self._sizes[column]) - 1) for column in columns]
        changed = rank < num_changed[:, None]
        levels = (self._levels[indices] + np.where(changed, np.stack(steps, axis=1), 0)) % self._sizes
        starts, counts = self._groups.find(levels @ self._weights)
        place = starts + self._draws.below(indices, epoch, f"{attempt}|same", np.maximum(counts, 1))
        return np.where(counts > 0, self._groups.members[place], -1)

    def _searched(self, index: Int64s, epoch: int, num_changed: int) -> int:
        """Return one of all samples that differ in `num_changed` factors, with a random k in the nearest possible number; else itself."""
        differing = (self._levels != self._levels[index]).sum(1)
        possible = [num_changed] if self._k != "random" else sorted(range(1, self.num_factors), key=lambda k: (abs(k - num_changed), k))
        for number in possible:
            found = np.flatnonzero(differing == number)
            if len(found):
                return int(found[self._draws.below(index, epoch, "search", len(found))[0]])
        return int(index[0])


def _needed(index: pa.Table) -> Any:  # any: pyarrow's stubs know no `fill_null` of a column
    """Return the few columns of an index that pairs are drawn by; the others are freed when the shard is closed."""
    return index.select([name for name in index.column_names if name in ("ordinal", "label") or name.startswith(FACTOR)])


def _levels(where: str, tables: list[Any], names: list[str]) -> dict[str, Int64s]:
    """Return the factors as level numbers, in the order of their values."""
    levels = {}
    for name in names:
        if not all(name in table.column_names for table in tables):
            raise DataError(f"{name} is a column of only some shards of {where}: pairs.by=factors needs it of every sample")
        column = pa.chunked_array([chunk for table in tables for chunk in table[name].chunks])
        if column.null_count:
            raise DataError(
                f"{name} is missing for {column.null_count} of {len(column)} samples in {where}: pairs.by=factors needs it of all"
            )
        levels[name.removeprefix(FACTOR)] = np.unique(column.to_numpy(), return_inverse=True)[1].astype(np.int64)
    return levels
