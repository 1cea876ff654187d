"""TorchTrainer around `aecore.train.fit`: Ray places the ranks, joins them to one process group and restarts them.

The run folder is the only truth: a restarted group resumes from our newest valid checkpoint, whatever Ray remembers, and the
answer is what `fit` read from the run folder. Ray's own storage is a temporary folder under a name of this attempt (the same
name would give back the metrics of a finished run). Checkpoints are reported by reference: a pointer file with our URL, step
and hash; on several nodes only the metrics, since Ray would want a second storage that all of them see. `CheckpointConfig.num_to_keep`
stays unset, because Ray would delete what the pointers stand in; retention is ours.
"""

import concurrent.futures
import json
import os
import tempfile
import threading
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from aecore.errors import AecoreError, ClusterError, RunFailed
from aecore.memory import keep_freed_memory
from aecore.ranks import Rank
from aecore.run import RunResult, TrainJob, finished_run
from aecore.store import open_store
from aecore.train import fit
from pipelines.cluster.session import (
    connect,
    disconnect,
    is_local,
    num_nodes,
    require_gpu_is_there,
    require_local_urls_fit,
    require_resources,
    worker_resources,
)
from pipelines.config import ClusterSpec

POLL_S = 0.25
OnPoll = Callable[[], None]


def train(job: TrainJob, cluster: ClusterSpec, on_poll: OnPoll | None = None) -> RunResult:
    """Train `job` on `cluster.num_workers` Ray workers (0: in this process); a finished run returns at once.

    `on_poll` is called a few times a second while the workers train; it may read the run folder to show progress.
    """
    done = finished_run(open_store(job.out))
    if done is not None:
        return fit(job)  # checks that the run is this job's, and returns its result
    if cluster.num_workers == 0:
        return _train_here(job, cluster, on_poll)
    connect(cluster)
    require_local_urls_fit(cluster, job.data, job.out, job.train.init_from or "")
    require_resources(cluster, cluster.num_workers)
    with tempfile.TemporaryDirectory(prefix="aepipe-ray-", ignore_cleanup_errors=True) as folder:
        return _train_on_ray(job, cluster, Path(folder), on_poll)


def _train_here(job: TrainJob, cluster: ClusterSpec, on_poll: OnPoll | None) -> RunResult:
    import torch

    require_gpu_is_there(cluster)
    torch.set_num_threads(cluster.threads_per_worker)
    keep_freed_memory()
    stop = threading.Event()
    watcher = threading.Thread(target=_poll_until, args=(stop, on_poll or (lambda: None)), daemon=True)
    watcher.start()
    try:
        return fit(job, rank=Rank(device="cuda" if cluster.use_gpu else "cpu"))
    finally:
        stop.set()
        watcher.join()


def _poll_until(stop: threading.Event, on_poll: OnPoll) -> None:
    while not stop.wait(POLL_S):
        on_poll()


def _train_on_ray(job: TrainJob, cluster: ClusterSpec, folder: Path, on_poll: OnPoll | None) -> RunResult:
    """Run the trainer in a thread: Ray Train replaces the SIGINT handler of a main thread, and ours has to poll anyway."""
    trainer = _trainer(job, cluster, folder)
    pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="ray-train")
    future = pool.submit(trainer.fit)
    try:
        while True:
            try:
                future.result(timeout=POLL_S)
                break
            except concurrent.futures.TimeoutError:
                if on_poll is not None:
                    on_poll()
    except (KeyboardInterrupt, SystemExit):
        raise
    except Exception as error:
        raise _typed(error) from error
    finally:
        if not future.done():  # interrupted or cancelled: the controller and its workers end with the connection
            disconnect()
        pool.shutdown(wait=False, cancel_futures=True)
    result = finished_run(open_store(job.out))
    if result is None:
        raise RunFailed(f"{job.out}: training ended without a published model: run the same command again")
    return result


def _trainer(job: TrainJob, cluster: ClusterSpec, folder: Path) -> Any:
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from pipelines.cluster.rendezvous import FileTorchConfig

    backend = "nccl" if cluster.use_gpu else "gloo"
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(cluster.timeout_s))
    placing: dict[str, Any] = {"controller_failure_limit": cluster.max_failures}  # Ray's default: try for ever
    best: dict[str, Any] = {"checkpoint_score_attribute": "validation_loss", "checkpoint_score_order": "min"} if job.checkpoint.best else {}
    return TorchTrainer(
        _rank_loop,
        train_loop_config={"job": job, "threads": cluster.threads_per_worker, "pointers": num_nodes() == 1},
        torch_config=FileTorchConfig(backend=backend, folder=str(folder)) if is_local() else TorchConfig(backend=backend),
        scaling_config=ScalingConfig(
            num_workers=cluster.num_workers, use_gpu=cluster.use_gpu, resources_per_worker=worker_resources(cluster)
        ),
        run_config=RunConfig(
            name=f"{Path(job.out).name}-{uuid.uuid4().hex[:8]}",
            storage_path=str(folder),
            failure_config=FailureConfig(max_failures=cluster.max_failures, **placing),
            checkpoint_config=CheckpointConfig(**best),
            callbacks=[_stop_callback()],
        ),
    )


def _rank_loop(config: Mapping[str, Any]) -> None:
    """Run on every rank: join the process group that Ray made to `fit`."""
    import ray.train
    import ray.train.torch
    import torch

    torch.set_num_threads(config["threads"])
    keep_freed_memory()
    context = ray.train.get_context()
    rank = Rank(context.get_world_rank(), context.get_world_size(), str(ray.train.torch.get_device()))

    def report(ref: Any, metrics: Mapping[str, Any]) -> None:
        numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        if "validation" in metrics:
            numbers |= {f"validation_{name}": value for name, value in metrics["validation"].items()}
        if ref is None or not config["pointers"]:
            ray.train.report(numbers)
            return
        with tempfile.TemporaryDirectory() as folder:
            pointer = {"url": f"{config['job'].out}/{ref.name}", "step": ref.step, "sha256": ref.sha256}
            Path(folder, "pointer.json").write_text(json.dumps(pointer))
            ray.train.report(numbers, checkpoint=ray.train.Checkpoint.from_directory(folder))

    fit(config["job"], rank=rank, on_checkpoint=report)


def _stop_callback() -> Any:
    """Return a Ray Train callback that ends the run at an error which another attempt would meet again."""
    from ray.train import UserCallback

    class StopAtOurErrors(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, BaseException]) -> None:
            error = _ours(list(worker_exceptions.values()))
            if error is not None:
                raise error

    return StopAtOurErrors()


def _ours(errors: list[BaseException | None]) -> AecoreError | None:
    """Return the first `AecoreError` in or behind these exceptions (Ray wraps what a worker raised)."""
    seen: set[int] = set()
    while errors:
        error = errors.pop(0)
        if error is None or id(error) in seen:
            continue
        seen.add(id(error))
        if isinstance(error, AecoreError):
            return error
        inner = [getattr(error, name, None) for name in ("_base_exc", "cause", "controller_failure", "__cause__")]
        errors += [found for found in (*inner, *getattr(error, "worker_failures", {}).values()) if isinstance(found, BaseException)]
    return None


def _typed(error: Exception) -> AecoreError:
    ours = _ours([error])
    if ours is not None:
        return ours
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    message = lines[-1] if lines else type(error).__name__
    if "Startup" in type(getattr(error, "controller_failure", None)).__name__:  # Ray's own classes for it are private
        return ClusterError(f"the workers did not start: {message}; ask for fewer workers, or raise cluster.timeout_s")
    return RunFailed(
        f"training failed for good after cluster.max_failures restarts: {message}; its checkpoints are kept, run the same command again"
    )
