"""Metrics of a run: one line a step, in parts that checkpoints list.

    metrics/<first>-<last>-<attempt>.jsonl

A row is of one step: `step, epoch, samples, lr, beta`, the means over its samples, at an epoch's end `validation`, and `metrics`, the
version of what the means are. 2: `loss` is the minimised objective, and the other terms that depend on beta are given at beta 1, per
sample (see `LossResult.reported`). Rows without it are version 1: there `elbo` and `iwae` include beta, and are sums over a pair. A
continued run may hold both; they are never averaged together.

A part is committed before the checkpoint that names it; parts of a killed attempt that no checkpoint names are not part of the run.
`aecore.training.metric_log` writes them; no torch is imported here.
"""

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from aecore.artifact.documents import parse_json
from aecore.errors import DataError
from aecore.store import FileRef, Store

MAX_PART_BYTES = 1 << 28  # of at most 100,000 rows
VERSION = 2  # of the meaning of a row
FACTS = ("step", "epoch", "samples", "lr", "beta", "validation", "metrics")  # of a row; all else are means over its samples


def version_of(row: Mapping[str, Any]) -> int:
    """Return the version of the means of a row or an epoch; 1 where none is written."""
    return int(row.get("metrics", 1))


def changed_meaning(name: str) -> bool:
    """Return whether the mean of this name is another number in version 1."""
    return name.partition("_")[0] in ("elbo", "iwae")


@dataclass
class EpochMean:
    """Means over the rows of one epoch, weighted by their samples; a row of another epoch begins anew.

    An epoch with rows of two versions has no mean of the terms that changed their meaning.
    """

    last: dict[str, Any] = field(default_factory=dict)
    _samples: int = 0
    _sums: dict[str, float] = field(default_factory=dict)
    _versions: set[int] = field(default_factory=set)

    def add(self, row: Mapping[str, Any]) -> None:
        """Count a row; rows come in the order of their steps."""
        if self.last.get("epoch") != row["epoch"]:
            self._samples, self._sums, self._versions = 0, {}, set()
        self.last = dict(row)
        self._samples += row["samples"]
        self._versions.add(version_of(row))
        for name, value in row.items():
            if name not in FACTS:
                self._sums[name] = self._sums.get(name, 0.0) + value * row["samples"]

    def to_dict(self) -> dict[str, Any]:
        """Return a row to show: the means, all samples, the facts of the last row; its `epoch` counts from 1. Empty without rows."""
        if not self.last:
            return {}
        means = {name: total / self._samples for name, total in self._sums.items()}
        mean = {**self.last, **means, "epoch": self.last["epoch"] + 1, "samples": self._samples, "metrics": version_of(self.last)}
        return mean if len(self._versions) == 1 else {name: value for name, value in mean.items() if not changed_meaning(name)}


def epoch_means(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the means of each epoch (see `EpochMean`) of rows in the order of their steps."""
    means: dict[int, EpochMean] = {}
    for row in rows:
        means.setdefault(row["epoch"], EpochMean()).add(row)
    return [mean.to_dict() for mean in means.values()]


def read_rows(store: Store, parts: Iterable[FileRef]) -> list[dict[str, Any]]:
    """Return the rows of committed parts, in order; DataError if one is missing or damaged."""
    return [row for part in parts for row in _rows(store, part.name, part)]


def is_row(row: object, step: int) -> bool:
    """Return whether this is what a flush returns of a step: the facts of the step, and finite means."""
    if not isinstance(row, dict) or not {"step", "epoch", "samples", "loss"} <= row.keys():
        return False
    if not all(isinstance(name, str) and type(value) in (int, float) and -1e300 < value < 1e300 for name, value in row.items()):
        return False
    return row["step"] == step and all(type(row[name]) is int and row[name] >= 0 for name in ("epoch", "samples")) and row["samples"] > 0


def epoch_of(store: Store, parts: Iterable[FileRef], step: int) -> EpochMean:
    """Return the means of the epoch of `step` up to there; DataError if no committed part ends with it, or one is damaged."""
    refs = {part.name: part for part in parts}
    try:
        mean = _epoch_until(refs, step, lambda name: read_rows(store, [refs[name]]))
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise DataError(f"{store.url} has metrics of step {step} that were not written by aecore ({error!r}): restore them") from error
    if mean is None:
        raise DataError(f"{store.url} has no metrics of step {step}: its newest checkpoint does not list them")
    return mean


def _epoch_until(names: Iterable[str], step: int, read: Callable[[str], list[dict[str, Any]]]) -> EpochMean | None:
    """Return the means of the epoch of `step` from the parts that end there, and before; attempts that overlap wrote the same rows."""
    by_end = {steps_of(name)[1]: name for name in names}
    rows: list[dict[str, Any]] = []
    name = by_end.get(step)
    while name is not None and (not rows or rows[0]["epoch"] == rows[-1]["epoch"]):
        rows = read(name) + rows
        name = by_end.get(steps_of(name)[0] - 1)
    mean = EpochMean()
    for row in rows:
        mean.add(row)
    return mean if rows else None


def steps_of(name: str) -> tuple[int, int]:
    """Return the first and the last step of a part, as its name says."""
    first, last = name.removeprefix("metrics/").split("-")[:2]
    return int(first), int(last)


def last_row(store: Store) -> dict[str, Any] | None:
    """Return the row of the highest step that any attempt has written so far, None before the first: for progress only."""
    return _newest(store, lambda names, newest: _rows(store, newest)[-1])


def last_epoch(store: Store) -> dict[str, Any] | None:
    """Return the means of the epoch of the highest step so far (see `EpochMean.to_dict`), None before the first: for progress only."""

    def look(names: list[str], newest: str) -> dict[str, Any]:
        mean = _epoch_until(names, steps_of(newest)[1], lambda name: _rows(store, name))
        return {} if mean is None else mean.to_dict()

    return _newest(store, look)


def _newest(store: Store, look: Callable[[list[str], str], dict[str, Any]]) -> dict[str, Any] | None:
    """Return `look(parts, newest part)`; lists again if `gc` removed a part before it was read."""
    for _ in range(5):
        names = [f"metrics/{name}" for name in store.list("metrics") if name.endswith(".jsonl")]
        newest = max(names, key=lambda name: steps_of(name)[1], default=None)
        if newest is None:
            return None
        try:
            return look(names, newest)
        except DataError:
            if all(store.size(name) is not None for name in names):
                raise
    return None


def _rows(store: Store, name: str, ref: FileRef | None = None) -> list[dict[str, Any]]:
    """Return the rows of a part; DataError if it has none, or a line that is no JSON object.

    Without `ref` no checkpoint names it yet, so its hash is not known: it is read for progress only.
    """
    lines = store.read(name, ref=ref, limit=MAX_PART_BYTES).splitlines()
    with contextlib.suppress(ValueError):
        rows = [parse_json(line) for line in lines]
        if rows and all(isinstance(row, dict) for row in rows):
            return rows
    remedy = "progress is not shown until the next part" if ref is None else "restore it from a copy"
    raise DataError(f"{store.url}/{name} is damaged: {len(lines)} lines, expected a JSON object in each; {remedy}")
