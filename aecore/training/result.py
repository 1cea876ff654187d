"""The result of a run, as its files have it. No torch is imported."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aecore.checkpoint.files import CheckpointRef, newest_checkpoint, read_checkpoint, require_own_model
from aecore.store import Store
from aecore.training.metrics import epoch_of


@dataclass(frozen=True, slots=True)
class RunResult:
    """The result of `fit`: the published model, its step, and the means of that step's epoch (see `metrics.EpochMean`)."""

    url: str
    model_url: str
    step: int
    metrics: Mapping[str, Any]
    checkpoint_sha256: str


def finished_run(store: Store, run_sha256: str | None = None) -> RunResult | None:
    """Return the result of a run whose model is published, None if it is not (yet)."""
    if store.size("model/checkpoint.json") is None:
        return None
    model = read_checkpoint(store, "model")
    require_own_model(store, model, run_sha256)
    newest = newest_checkpoint(store, model.info.get("run_sha256"))
    return result_of(store, model, {} if newest is None else epoch_of(store, newest.metrics, model.step).to_dict())


def result_of(store: Store, model: CheckpointRef, metrics: Mapping[str, Any]) -> RunResult:
    """Return the result of a run whose published model and means of its epoch are known."""
    return RunResult(store.url, f"{store.url}/model", model.step, metrics, model.sha256)
