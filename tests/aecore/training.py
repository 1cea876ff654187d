"""What the training tests share: a small sprites dataset, a small job, and N gloo processes that work as ranks."""

import dataclasses
import functools
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from aecore.checkpoint.files import newest_checkpoint
from aecore.data.sources.sprites import SpritesSpec
from aecore.data.write.job import shard_dataset
from aecore.data.write.plan import SplitSpec
from aecore.data.write.spec import ShardSpec
from aecore.nn.mlp import MLPSpec
from aecore.store import open_store
from aecore.training.loop import CheckpointSpec, TrainJob, TrainSpec, fit
from aecore.training.metrics import read_rows
from aecore.training.optimizer import OptimSpec
from aecore.training.ranks import Rank
from aecore.variational import VAESpec
from tests.processes import RUN_S, children, wait_until

RankWork = Callable[..., Any]  # takes `rank`


def sprites_dataset(folder: Path, *, num_samples: int = 0, val: float = 0.0, max_samples: int = 700) -> str:
    """Shard the 3,072 default sprites, or this many of them (or reuse `folder`)."""
    shard_dataset(SpritesSpec(num_samples=num_samples), str(folder), SplitSpec(by="hash", val=val), ShardSpec(max_samples=max_samples))
    return str(folder)


def small_job(data: str, out: str | Path, **changes: Any) -> TrainJob:
    """Return a job of a small VAE; `changes` are fields of TrainSpec, CheckpointSpec or TrainJob."""
    train = {key: value for key, value in changes.items() if key in {field.name for field in dataclasses.fields(TrainSpec)}}
    checkpoint = {key: value for key, value in changes.items() if key in {field.name for field in dataclasses.fields(CheckpointSpec)}}
    rest = {key: value for key, value in changes.items() if key not in train and key not in checkpoint}
    job = TrainJob(
        data=data,
        out=str(out),
        model=VAESpec(latent_dim=4, likelihood="bernoulli"),
        backbone=MLPSpec(hidden=(32,)),
        optim=OptimSpec(lr=1e-3),
        train=TrainSpec(**{"global_batch": 64, "lanes": 16, "epochs": 1, "block": 64, **train}),
        checkpoint=CheckpointSpec(**checkpoint),
    )
    return dataclasses.replace(job, **rest)


def losses(out: str | Path) -> list[dict[str, Any]]:
    """Return all rows of metrics that the newest checkpoint of a run names."""
    store = open_store(out)
    checkpoint = newest_checkpoint(store)
    assert checkpoint is not None
    return read_rows(store, checkpoint.metrics)


def published_weights(out: str | Path) -> bytes:
    """Return the bytes of the published weights."""
    return (Path(out) / "model/model.safetensors").read_bytes()


def _rank_main(work: RankWork, index: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=index, world_size=world_size)
        result = work(rank=Rank(index, world_size))
        dist.destroy_process_group()
        Path(folder, f"result-{index}").write_bytes(pickle.dumps(result))
    except BaseException:
        Path(folder, f"error-{index}").write_text(traceback.format_exc())
        os._exit(1)


def fit_on(job: TrainJob, world_size: int) -> None:
    """Run `fit` on `world_size` ranks; world_size 1 runs in this process."""
    if world_size == 1:
        fit(job)
    else:
        on_ranks(functools.partial(fit, job), world_size)


def on_ranks(work: RankWork, world_size: int) -> list[Any]:
    """Return what `work(rank=...)` returns on each of `world_size` processes joined by gloo.

    A fork of a process in which Ray's and Arrow's threads run is aborted now and then (1 of some thousand) by a lock that one of them held:
    such work, which did not fail by itself, is done once more.
    """
    for last in (False, True):
        codes, errors, results = _tried_on_ranks(work, world_size)
        if last or -signal.SIGABRT not in codes:
            break
    assert not errors, errors[0]  # of one that was aborted the others say that the connection is closed
    assert not any(codes), codes
    return results


def _tried_on_ranks(work: RankWork, world_size: int) -> tuple[list[int | None], list[str], list[Any]]:
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pickle.dumps(work)  # a job must be able to travel
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=_rank_main, args=(work, index, world_size, folder)) for index in range(world_size)]
        with children(*processes):  # one that failed leaves the others waiting for it

            def over() -> bool:
                codes = [process.exitcode for process in processes]
                return None not in codes or any(codes)

            wait_until(over, "all ranks end, or one fails", RUN_S)
        errors = [path.read_text() for path in sorted(Path(folder).glob("error-*"))]
        codes = [process.exitcode for process in processes]
        return (
            codes,
            errors,
            [] if any(codes) else [pickle.loads(Path(folder, f"result-{index}").read_bytes()) for index in range(world_size)],
        )
