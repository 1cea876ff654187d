"""The result of a run, as its files have it. No torch is imported."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aecore.checkpoint.files import CheckpointRef, committed_checkpoints, read_checkpoint, require_own_model
from aecore.errors import DataError
from aecore.store import Store
from aecore.training.metrics import epoch_of

logger = logging.getLogger(__name__)
_warned: set[str] = set()


@dataclass(frozen=True, slots=True)
class RunResult:
    """The result of `fit`: the published model, its step, and the means of that step's epoch (see `metrics.EpochMean`)."""

    url: str
    model_url: str
    step: int
    metrics: Mapping[str, Any]
    checkpoint_sha256: str


def finished_run(store: Store, run_sha256: str | None = None) -> RunResult | None:
    """Return the result of a run whose model is published, None if it is not (yet).

    `model/` needs no checkpoint: without one that names the metrics of its step, the result has none, and the log says so.

    Raises
    ------
    DataError
        `model/` is damaged or belongs to another run, or metrics that a checkpoint names are damaged or gone.
    """
    if store.size("model/checkpoint.json") is None:
        return None
    model = read_checkpoint(store, "model")
    require_own_model(store, model, run_sha256)
    return result_of(store, model, _epoch(store, model))


def _epoch(store: Store, model: CheckpointRef) -> dict[str, Any]:
    """Return the means of the epoch in which a published model was written; empty if no checkpoint that names them can be read."""
    wanted = model.info.get("run_sha256")
    for name in [name for step, name in committed_checkpoints(store) if step >= model.step]:
        try:
            checkpoint = read_checkpoint(store, name, verify=None)  # its metrics have hashes of their own
        except DataError as error:
            _warn_once(f"skipping a damaged checkpoint: {error}")
            continue
        if wanted is None or checkpoint.info.get("run_sha256") == wanted:
            return epoch_of(store, checkpoint.metrics, model.step).to_dict()
    where = f"{store.url}: there is no checkpoint that names the metrics of step {model.step}"
    _warn_once(f"{where}: they are not known, and model/ does not need them")
    return {}


def _warn_once(text: str) -> None:
    """Log a warning once in a process: a command asks several times whether a run has finished."""
    if text not in _warned:
        _warned.add(text)
        logger.warning("%s", text)


def result_of(store: Store, model: CheckpointRef, metrics: Mapping[str, Any]) -> RunResult:
    """Return the result of a run whose published model and means of its epoch are known."""
    return RunResult(store.url, f"{store.url}/model", model.step, metrics, model.sha256)
