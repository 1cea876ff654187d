"""Compare two training runs: config, data, metrics, loss curves at common steps, weights, checkpoints, throughput.

`loss` is the minimised objective, so runs with different beta are compared by `elbo`. In rows older than version 2 (key `metrics`, see
`aecore.training.metrics`) `elbo` has another meaning, and no difference of the two is given.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aecore.artifact.documents import CLAIM, read_json
from aecore.checkpoint.files import MANIFEST, CheckpointRef, committed_checkpoints, newest_checkpoint, read_checkpoint
from aecore.errors import AecoreError, DataError
from aecore.maintenance.compare._fields import differing
from aecore.store import FileRef, Store, open_store, sha256_json
from aecore.training.metrics import changed_meaning, epoch_means, read_rows, version_of

Row = Mapping[str, Any]


@dataclass(frozen=True)
class _Run:
    """One run: its claim, the rows of its metrics, its newest checkpoint, and the one whose weights are compared."""

    store: Store
    claim: Mapping[str, Any]
    newest: CheckpointRef
    chosen: CheckpointRef
    finished: bool
    rows: Sequence[Row]
    epochs: Sequence[Row]  # means


def compare_runs(a: str, b: str) -> dict[str, Any]:
    """Compare two runs (finished or not: then their newest checkpoints); DataError if one has no valid checkpoint yet."""
    left, right = _open(a), _open(b)
    weights = _weights(left, right)
    return {
        "same_weights": weights["max_difference"] == 0 and not weights["differing_shapes"],
        "identity": differing(left.claim["identity"], right.claim["identity"]),
        "recorded": differing(left.claim["info"], right.claim["info"]),
        "data": {
            "generation": [run.claim["info"].get("dataset_number") for run in (left, right)],
            "dataset_sha256": [run.claim["info"].get("dataset_sha256") for run in (left, right)],
        },
        "finished": [left.finished, right.finished],
        "steps": [left.newest.step, right.newest.step],
        "epochs": [run.epochs[-1]["epoch"] if run.epochs else None for run in (left, right)],
        "metrics": [version_of(run.epochs[-1]) if run.epochs else None for run in (left, right)],
        "final": _side_by_side(_last(left), _last(right)),
        "best": _side_by_side(_best(left), _best(right)),
        "curves": _curves(left.rows, right.rows),
        "weights": weights,
        "checkpoints": _checkpoints(left, right),
        "samples_per_s": [_samples_per_s(run) for run in (left, right)],
    }


def _open(url: str) -> _Run:
    store = open_store(url)
    claim = read_json(store, CLAIM)
    newest = newest_checkpoint(store, sha256_json(claim["identity"]))
    finished = store.size(f"model/{MANIFEST}") is not None
    if newest is None:
        remedy = "its model is all that is left, and restoring one brings its metrics back" if finished else "run its train command (again)"
        raise DataError(f"{store.url} has no valid checkpoint: there is nothing to compare; {remedy}")
    chosen = read_checkpoint(store, "model") if finished else newest
    rows = read_rows(store, newest.metrics)
    return _Run(store, claim, newest, chosen, finished, rows, epoch_means(rows))


def _numbers(row: Row) -> dict[str, float]:
    """Return the numbers of an epoch, those of the validation as `validation.<name>`."""
    flat = {**row, **{f"validation.{name}": value for name, value in (row.get("validation") or {}).items()}}
    return {name: value for name, value in flat.items() if isinstance(value, int | float) and name not in ("epoch", "samples", "metrics")}


def _last(run: _Run) -> Row:
    return run.epochs[-1] if run.epochs else {}


def _best(run: _Run) -> Row:
    """Return the means of the epoch of the lowest validation loss, without validation that of the lowest mean loss.

    Where beta changed between epochs that of the highest ELBO: the loss would choose one in which the KL counted little.
    """
    validated = [row for row in run.epochs if row.get("validation")]
    if validated:
        return min(validated, key=lambda row: row["validation"]["loss"])
    if len({row["beta"] for row in run.epochs}) > 1 and all("elbo" in row and version_of(row) > 1 for row in run.epochs):
        return max(run.epochs, key=lambda row: row["elbo"])
    return min(run.epochs, key=lambda row: row["loss"], default={})


def _side_by_side(left: Row, right: Row) -> dict[str, Any]:
    a, b, alike = _numbers(left), _numbers(right), version_of(left) == version_of(right)
    names = [*a, *(name for name in b if name not in a)]
    both = {name: {"a": a.get(name), "b": b.get(name)} for name in names}
    comparable = {name for name in names if name in a and name in b and (alike or not changed_meaning(name))}
    return {name: {**pair, **({"delta": b[name] - a[name]} if name in comparable else {})} for name, pair in both.items()}


def _curves(a: Sequence[Row], b: Sequence[Row]) -> dict[str, Any]:
    """Return how the loss curves differ at common steps: |a - b| / max(|a|, |b|)."""
    other = {row["step"]: row["loss"] for row in b}
    pairs = [(row["step"], row["loss"], other[row["step"]]) for row in a if row["step"] in other]
    relative = [(abs(x - y) / max(abs(x), abs(y), 1e-30), step) for step, x, y in pairs]
    worst, step = max(relative, default=(None, None), key=lambda each: each[0] or 0.0)
    first = next((step for step, x, y in pairs if x != y), None)
    return {"common_steps": len(pairs), "max_relative_difference": worst, "at_step": step, "first_differing_step": first}


def _weights(a: _Run, b: _Run) -> dict[str, Any]:
    """Compare the tensors of the published weights (of an unfinished run: of its newest checkpoint), one after the other."""
    refs = [run.chosen.file("model.safetensors") for run in (a, b)]
    facts: dict[str, Any] = {"step": [a.chosen.step, b.chosen.step], "differing_shapes": {}, "max_difference": 0.0, "in": None}
    if refs[0].sha256 == refs[1].sha256:
        return facts
    from aecore.checkpoint.weights import read_weights  # imports torch

    left, right = (read_weights(run.store, run.chosen) for run in (a, b))
    for name in sorted({*left, *right}):  # safetensors returns another order at each call
        shapes = [list(tensors[name].shape) if name in tensors else None for tensors in (left, right)]
        if shapes[0] != shapes[1]:
            facts["differing_shapes"][name] = shapes
            continue
        gap = float((left[name].double() - right[name].double()).abs().max()) if left[name].numel() else 0.0
        if gap > facts["max_difference"]:
            facts |= {"max_difference": gap, "in": name}
    return facts


def _checkpoints(a: _Run, b: _Run) -> dict[str, Any]:
    """Return the hashes of the weights of the checkpoints that are kept, by step, and those of the published models."""
    kept = [_hashes(run) for run in (a, b)]
    steps = sorted({*kept[0], *kept[1]})
    return {
        "published": [run.chosen.sha256 if run.finished else None for run in (a, b)],
        "weights_by_step": {str(step): [kept[0].get(step), kept[1].get(step)] for step in steps},
    }


def _hashes(run: _Run) -> dict[int, str]:
    found: dict[int, str] = {}
    for step, name in committed_checkpoints(run.store):
        try:
            found.setdefault(step, read_checkpoint(run.store, name, verify=False).file("model.safetensors").sha256)
        except (AecoreError, KeyError, TypeError):
            continue  # a damaged one, which verification reports
    return found


def _samples_per_s(run: _Run) -> float | None:
    """Return the samples per second between metric parts of one attempt, from their modification times.

    None where no attempt wrote two parts, or where the times are those of a copy (all at once).
    """
    samples, seconds = 0, 0.0
    parts = {_steps(part): part for part in run.newest.metrics}
    before: FileRef | None = None
    for (first, last), part in sorted(parts.items()):
        if before is not None and _attempt(before) == _attempt(part):
            times = run.store.modified(before.name), run.store.modified(part.name)
            if times[0] is not None and times[1] is not None:
                seconds += times[1] - times[0]
                samples += sum(row["samples"] for row in run.rows if first <= row["step"] <= last)
        before = part
    return round(samples / seconds, 1) if seconds > 0.05 else None


def _steps(part: FileRef) -> tuple[int, int]:
    first, last = part.name.removeprefix("metrics/").split("-")[:2]
    return int(first), int(last)


def _attempt(part: FileRef) -> str:
    return part.name.rpartition("-")[2]
