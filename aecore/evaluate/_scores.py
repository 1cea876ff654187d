"""The scores that need more than the split itself: probes on labels, disentanglement of known factors.

Rank 0 computes and broadcasts them: they are small, and all ranks get the same bits. The factor scores take the samples of
both splits as one population, as their authors draw from the whole grid of factors; probes are fitted on one split and scored on the other.
"""

import dataclasses
import json
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from aecore.checkpoint.weights import LoadedModel
from aecore.data.dataset import Dataset
from aecore.errors import DataError
from aecore.evaluate._disentanglement import NUM_BINS, dci, factor_vae_score, mig, require_scikit_learn
from aecore.evaluate._latents import MANY_LEVELS, Floats, Int64s, SplitLatents, draw_indices, factors_of, require_labelled
from aecore.evaluate._probe import linear_probe, nearest_neighbours
from aecore.evaluate._spec import EvaluateSpec
from aecore.training.ranks import Rank, from_rank_zero


@dataclass(frozen=True, slots=True)
class Scores:
    """The requested scores; None for the others."""

    probe: dict[str, Any] | None = None
    disentanglement: dict[str, Any] | None = None
    warnings: tuple[str, ...] = ()


def require_scorable(loaded: LoadedModel, dataset: Dataset, spec: EvaluateSpec) -> None:
    """Raise for scores that cannot be computed: ConfigError without scikit-learn, DataError without labels or the split."""
    if not (spec.probe or spec.factors):
        return
    dataset.manifest.split(spec.train_split)
    if spec.probe and not dataset.manifest.classes:
        raise DataError(f"{dataset.url} has no labels, which evaluate.probe reads: shard class folders or labelled arrays, or leave it out")
    if spec.factors and spec.dci:
        require_scikit_learn()


def scores_of(loaded: LoadedModel, dataset: Dataset, spec: EvaluateSpec, rank: Rank) -> Scores:
    """Return the scores that the spec asks for, the same on every rank; DataError if the data have no labels or no factors."""
    if not (spec.probe or spec.factors):
        return Scores()
    computed, failed = None, None
    if rank.rank == 0:
        try:
            computed = json.dumps(dataclasses.asdict(_scores(loaded, dataset, spec, rank.device)))
        except DataError as error:
            failed = str(error)
    failed = from_rank_zero(rank, failed)
    if failed is not None:
        raise DataError(failed)
    found = json.loads(str(from_rank_zero(rank, computed)))
    return Scores(found["probe"], found["disentanglement"], tuple(found["warnings"]))


def _scores(loaded: LoadedModel, dataset: Dataset, spec: EvaluateSpec, device: str) -> Scores:
    with ExitStack() as stack:
        names = dict.fromkeys((spec.train_split, spec.split))  # one split if both are the same
        splits = [stack.enter_context(SplitLatents(loaded, dataset, name, batch=spec.batch, device=device)) for name in names]
        probe, warnings = _probe(splits[0], splits[-1], spec) if spec.probe else (None, [])
        if not spec.factors:
            return Scores(probe, None, tuple(warnings))
        disentanglement, more = _disentanglement(splits, spec)
        return Scores(probe, disentanglement, (*warnings, *more))


def _probe(fitted: SplitLatents, scored: SplitLatents, spec: EvaluateSpec) -> tuple[dict[str, Any], list[str]]:
    train = require_labelled(fitted, fitted.all())
    test = train if scored is fitted else require_labelled(scored, scored.all())
    warning = f"probes were fitted and scored on the same samples (split {spec.split!r}): set evaluate.train_split to another split"
    return {
        "train_split": spec.train_split,
        "train_samples": len(train.values),
        "classes": len(np.unique(train.labels)),
        "column": fitted.column,
        "linear": linear_probe(train.values, train.labels, test.values, test.labels),
        "knn": nearest_neighbours(train.values, train.labels, test.values, test.labels, spec.neighbours),
        "neighbours": spec.neighbours,
    }, [warning] if scored is fitted else []


def _disentanglement(splits: list[SplitLatents], spec: EvaluateSpec) -> tuple[dict[str, Any], list[str]]:
    factors = factors_of(splits)
    rows = draw_indices(len(factors.levels), spec.factor_samples + spec.factor_samples // 2, spec.seed)
    values, levels = _values(splits, rows), factors.levels[rows]
    fitted = min(spec.factor_samples, len(rows) * 2 // 3)
    found: dict[str, Any] = {
        "samples": len(rows),
        "factors": list(factors.names),
        "mig": mig(values[: spec.factor_samples], levels[: spec.factor_samples]),
        "mig_bins": NUM_BINS,
        "factor_vae": factor_vae_score(values, levels, spec.seed),
        "dci": None,
    }
    if spec.dci:
        found["dci"] = dataclasses.asdict(dci(values[:fitted], levels[:fitted], values[fitted:], levels[fitted:], spec.seed))
    note = (
        f"factors of more than {MANY_LEVELS} levels were cut into bins of equal width, which the scores depend on: {', '.join(factors.cut)}"
    )
    return found, [note] if factors.cut else []


def _values(splits: list[SplitLatents], rows: Int64s) -> Floats:
    """Return the latents of rows that are numbered through all splits, in the order of `rows`."""
    first, parts, places = 0, [], []
    for split in splits:
        inside = np.flatnonzero((rows >= first) & (rows < first + split.num_samples))
        if len(inside):
            parts.append(split.of(rows[inside] - first).values)
            places.append(inside)
        first += split.num_samples
    return np.concatenate(parts)[np.argsort(np.concatenate(places))]
