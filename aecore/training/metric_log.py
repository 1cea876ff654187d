"""Writes the metrics of a run (`aecore.training.metrics`) while it trains.

Sums stay on the device between flushes; a flush is one all-reduce for all steps since the last one. All ranks must flush at the same
step, but a part is due by time: each flush carries rank 0's estimate of the step of the next one to the other ranks, and whether rank 0
was asked to stop. Several ranks therefore flush about every second, and write a part when `every_s` seconds have passed.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from aecore.errors import DataError, Diverged
from aecore.store import FileRef, Store, canonical_json
from aecore.training.metrics import VERSION, EpochMean, epoch_of
from aecore.training.ranks import Rank, all_sum

AGREE_S = 1.0  # between flushes of several ranks: the longest wait of a request to stop


@dataclass
class MetricLog:
    """Collects one rank's sums and writes the parts (rank 0). `parts` names the committed parts of steps 1..now.

    `stop` returns whether the run shall end. Rank 0 calls it at every flush, or, as the only rank, after every step (so it must be cheap);
    `stopping` is its value at the last flush, the same on all ranks.

    `require_finite_data` is called before a loss that is not finite stops the run, with the step, or with None if it is the validation's:
    it raises DataError if samples are not finite.
    """

    store: Store
    rank: Rank
    attempt: str
    every_s: float
    require_finite_data: Callable[[int | None], None]
    stop: Callable[[], bool] = bool
    stopping: bool = False
    epoch: EpochMean = field(default_factory=EpochMean)
    parts: list[FileRef] = field(default_factory=list)
    _names: tuple[str, ...] = ()
    _sums: list[Tensor] = field(default_factory=list)
    _rows: list[dict[str, Any]] = field(default_factory=list)
    _reduced: list[dict[str, Any]] = field(default_factory=list)  # rows that are no longer in `_rows` and not yet in a part
    _due_rows: int = 1
    _agreed: bool = False
    _since: float = field(default_factory=time.monotonic)
    _written: float = -math.inf

    def add(self, row: Mapping[str, Any], means: Mapping[str, Tensor], rows: int) -> None:
        """Record one step: `means` over this rank's `rows` samples (0 rows: none of it counts). No device sync."""
        self._names = tuple(means)
        self._sums.append(torch.stack([mean.detach().float() for mean in means.values()]) * rows)
        self._rows.append({**row, "metrics": VERSION})

    @property
    def due(self) -> bool:
        """Whether a flush is due by the number of steps added, or the only rank shall stop; equal on all ranks."""
        return len(self._rows) >= self._due_rows or (self.rank.world_size == 1 and self.stop())

    def agree_to_stop(self) -> bool:
        """Return whether the run shall end, without a flush; equal on all ranks, and `stopping` from the next flush on."""
        asked = torch.tensor(self.rank.rank == 0 and self.stop(), dtype=torch.float32, device=self.rank.device)
        self._agreed = bool(all_sum(self.rank, asked) > 0)
        return self._agreed

    def flush(self, validation: Mapping[str, float] | None = None, *, commit: bool = True, hold: bool = False) -> dict[str, Any]:
        """Reduce what was added and return the last step's row. Raises Diverged at a loss that is not finite.

        Reduced rows are written as a part if `commit` or `stopping`, else when a part is due. With `hold` the last row is left out: it
        waits for its validation, and the attempt that has it calls `release`.
        """
        if not self._rows:
            return {}
        sums = torch.stack(self._sums)
        carried = sums.new_tensor([self._next_due(), float(self.rank.rank == 0 and self.stop())])
        totals = all_sum(self.rank, torch.cat([sums.flatten(), carried])).tolist()
        self.stopping = totals.pop() > 0 or self._agreed
        self._due_rows, self._since = int(totals.pop()), time.monotonic()
        width = len(self._names)
        for number, row in enumerate(self._rows):
            total = totals[number * width : (number + 1) * width]
            row.update({name: value / row["samples"] for name, value in zip(self._names, total, strict=True)})
        rows, self._rows, self._sums = self._rows, [], []
        bad = next((row for row in rows if not math.isfinite(row["loss"])), None)
        if bad is not None:
            self.require_finite_data(bad["step"])
            raise Diverged(
                f"the loss is {bad['loss']} at step {bad['step']} (epoch {bad['epoch'] + 1}): training stopped, the checkpoints before "
                "it are kept; lower optim.lr, set optim.clip, or check that transform.scale and model.likelihood fit the data, "
                "and write to another out"
            )
        if validation is not None:
            self._require_finite(validation, rows[-1]["step"])
            rows[-1]["validation"] = dict(validation)
        last = rows.pop() if hold else rows[-1]
        for row in rows:
            self.epoch.add(row)
        self._reduced += rows
        if commit or self.stopping or self.rank.world_size == 1 or self._since - self._written >= self.every_s:
            self._write()
        return last

    def release(self, row: Mapping[str, Any], validation: Mapping[str, float]) -> dict[str, Any]:
        """Write and return a row that was held, with its validation; Diverged if that is not finite."""
        self._require_finite(validation, row["step"])
        whole = {**row, "validation": dict(validation)}
        self.epoch.add(whole)
        self._reduced.append(whole)
        self._write()
        return whole

    def resume(self, parts: Iterable[FileRef], step: int) -> None:
        """Continue after `step`, the last of these committed parts; a damaged part costs the means of this epoch only."""
        self.parts = list(parts)
        with contextlib.suppress(DataError):
            self.epoch = epoch_of(self.store, self.parts, step)

    def _require_finite(self, validation: Mapping[str, float], step: int) -> None:
        for name, value in validation.items():
            if not math.isfinite(value):
                self.require_finite_data(None)
                raise Diverged(
                    f"validation {name} is {value} after step {step}: training stopped, the checkpoints before it are kept; "
                    "check transform.scale and model.likelihood"
                )

    def _next_due(self) -> int:
        """Return rank 0's estimate of the steps until the next flush; 0 on the other ranks, so that the sum is the estimate."""
        if self.rank.rank != 0:
            return 0
        seconds = max(time.monotonic() - self._since, 1e-6)
        wanted = self.every_s if self.rank.world_size == 1 else min(self.every_s, AGREE_S)
        return max(1, min(100_000, round(wanted * len(self._rows) / seconds)))

    def _write(self) -> None:
        if not self._reduced:  # the only row is held
            return
        rows, self._reduced, self._written = self._reduced, [], time.monotonic()
        name = f"metrics/{rows[0]['step']:08d}-{rows[-1]['step']:08d}-{self.attempt}.jsonl"
        if self.rank.rank == 0:
            self.parts.append(self.store.put(name, b"".join(canonical_json(row) + b"\n" for row in rows), role="metrics"))
