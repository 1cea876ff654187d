"""Metrics of a run: one line a step, in parts that checkpoints list.

    metrics/<first>-<last>-<attempt>.jsonl

A part is committed before the checkpoint that names it; parts of a killed attempt that no checkpoint names are not part of the run.
Sums stay on the device between flushes; a flush is one all-reduce for all steps since the last one. All ranks must flush at the same
step, but a part is due by time: each flush carries rank 0's estimate of the step of the next one to the other ranks.
"""

import json
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from aecore.errors import DataError, Diverged
from aecore.ranks import Rank, all_sum
from aecore.store import FileRef, Store, canonical_json


@dataclass
class MetricLog:
    """Collects one rank's sums and writes the parts (rank 0). `parts` names the committed parts of steps 1..now."""

    store: Store
    rank: Rank
    attempt: str
    every_s: float
    parts: list[FileRef] = field(default_factory=list)
    _names: tuple[str, ...] = ()
    _sums: list[Tensor] = field(default_factory=list)
    _rows: list[dict[str, Any]] = field(default_factory=list)
    _due_rows: int = 1
    _since: float = field(default_factory=time.monotonic)

    def add(self, row: Mapping[str, Any], means: Mapping[str, Tensor], rows: int) -> None:
        """Record one step: `means` over this rank's `rows` samples (0 rows: none of it counts). No device sync."""
        self._names = tuple(means)
        self._sums.append(torch.stack([mean.detach().float() for mean in means.values()]) * rows)
        self._rows.append(dict(row))

    @property
    def due(self) -> bool:
        """Whether so many steps were added that about `every_s` seconds must have passed; the same on all ranks."""
        return len(self._rows) >= self._due_rows

    def flush(self, validation: Mapping[str, float] | None = None) -> dict[str, Any]:
        """Reduce and write what was added; return the last step's row. Diverged at a loss that is not finite."""
        if not self._rows:
            return {}
        sums = torch.stack(self._sums)
        totals = all_sum(self.rank, torch.cat([sums.flatten(), sums.new_tensor([self._next_due()])])).tolist()
        self._due_rows, self._since = int(totals.pop()), time.monotonic()
        width = len(self._names)
        for number, row in enumerate(self._rows):
            total = totals[number * width : (number + 1) * width]
            row.update({name: value / row["samples"] for name, value in zip(self._names, total, strict=True)})
        rows, self._rows, self._sums = self._rows, [], []
        bad = next((row for row in rows if not math.isfinite(row["loss"])), None)
        if bad is not None:
            raise Diverged(
                f"the loss is {bad['loss']} at step {bad['step']} (epoch {bad['epoch']}): training stopped, the checkpoints before "
                "it are kept; lower optim.lr, set optim.clip, or check that transform.scale and model.likelihood fit the data, "
                "and write to another out"
            )
        if validation is not None:
            _require_finite(validation, rows[-1]["step"])
            rows[-1]["validation"] = dict(validation)
        self._write(rows)
        return rows[-1]

    def _next_due(self) -> int:
        """Return rank 0's estimate of the steps that `every_s` seconds hold; 0 on the other ranks, so that the sum is the estimate."""
        if self.rank.index != 0:
            return 0
        seconds = max(time.monotonic() - self._since, 1e-6)
        return max(1, min(100_000, round(self.every_s * len(self._rows) / seconds)))

    def _write(self, rows: list[dict[str, Any]]) -> None:
        name = f"metrics/{rows[0]['step']:08d}-{rows[-1]['step']:08d}-{self.attempt}.jsonl"
        if self.rank.index == 0:
            self.parts.append(self.store.put(name, b"".join(canonical_json(row) + b"\n" for row in rows), role="metrics"))


def _require_finite(validation: Mapping[str, float], step: int) -> None:
    for name, value in validation.items():
        if not math.isfinite(value):
            raise Diverged(
                f"validation {name} is {value} after step {step}: training stopped, the checkpoints before it are kept; "
                "check the validation split for values that are not finite, and transform.scale and model.likelihood"
            )


def read_rows(store: Store, parts: Iterable[FileRef]) -> list[dict[str, Any]]:
    """Return the rows of committed parts, in order; DataError if one is missing or damaged."""
    return [json.loads(line) for part in parts for line in store.read(part.name, ref=part).splitlines()]


def row_of(store: Store, parts: Iterable[FileRef], step: int) -> dict[str, Any]:
    """Return the row of one step; DataError if no part holds it."""
    for part in parts:
        first, last = part.name.removeprefix("metrics/").split("-")[:2]
        if int(first) <= step <= int(last):
            return next(row for row in read_rows(store, [part]) if row["step"] == step)
    raise DataError(f"{store.url} has no metrics of step {step}: its newest checkpoint does not list them")


def last_row(store: Store) -> dict[str, Any] | None:
    """Return the row of the highest step that any attempt has written so far, None before the first: for progress only.

    A part that `gc` removes between the listing and the reading is not the newest any more: the listing is read again.
    """
    for _ in range(5):
        parts = [name for name in store.list("metrics") if name.endswith(".jsonl")]
        newest = max(parts, key=lambda name: name.split("-")[1], default=None)
        if newest is None:
            return None
        try:
            row: dict[str, Any] = json.loads(store.read(f"metrics/{newest}").splitlines()[-1])
        except DataError:
            if store.size(f"metrics/{newest}") is not None:
                raise
            continue
        return row
    return None
