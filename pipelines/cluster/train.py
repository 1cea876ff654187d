"""TorchTrainer around `aecore.training.loop.fit`: Ray places the ranks, joins them to one process group and restarts them.

The run folder is the source of truth: a restarted group resumes from its newest valid checkpoint, whatever Ray recorded, and the
result is read from it. Ray's own storage is a temporary folder with a name unique to this attempt (with the same name Ray would return
the metrics of a finished run). Checkpoints are reported by reference: a pointer file with URL, step and hash; on several nodes only
the metrics are reported, since Ray would need a second shared storage. `CheckpointConfig.num_to_keep` stays unset, because Ray would
delete the folders of the pointers; `aecore` decides which checkpoints are kept.

Ctrl-C or SIGTERM ends the current step, writes a checkpoint and prints its step. Workers get no signals: rank 0 polls an actor that
the driver sets, at most once a second, and the ranks learn of it at their next flush of metrics.
"""

import concurrent.futures
import json
import logging
import math
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from aecore.checkpoint.files import committed_checkpoints
from aecore.errors import AecoreError, ClusterError, Interrupted, RunFailed, WorkerDied, from_outside
from aecore.store import name_torch_cache, open_store
from aecore.training.job import TrainJob
from aecore.training.loop import fit
from aecore.training.preflight import schedule_warnings
from aecore.training.ranks import Rank
from aecore.training.result import RunResult, finished_run
from aecore.training.session import Session
from pipelines.cluster.alive import require_alive
from pipelines.cluster.interrupt import GRACE_S, StopFlag, StopRequest
from pipelines.cluster.memory import disable_malloc_trim
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
from pipelines.recipe.recipe import ClusterSpec

POLL_S = 0.25
ASK_EVERY_S, ASK_S = 1.0, 5.0  # a single rank would ask after every step
JUST_FINISHED = "interrupted when the run had just finished: its model is published"
logger = logging.getLogger(__name__)
OnPoll = Callable[[], None]


def train(job: TrainJob, cluster: ClusterSpec, on_poll: OnPoll | None = None) -> RunResult:
    """Train `job` on `cluster.num_workers` Ray workers (0: in this process); a finished run returns at once.

    `on_poll` is called a few times a second while the workers train; it may read the run folder to show progress.
    """
    done = finished_run(open_store(job.out))
    if done is not None:
        return fit(job)  # checks that the run belongs to this job, and returns its result
    if cluster.num_workers == 0:
        return _train_here(job, cluster, on_poll)
    connect(cluster)
    require_local_urls_fit(cluster, job.data, job.out, job.train.init_from or "")
    require_resources(cluster, cluster.num_workers)
    for warning in schedule_warnings(job.model, Session(job).total_steps):
        logger.warning("%s", warning)  # the log of the workers is not forwarded
    with tempfile.TemporaryDirectory(prefix="aepipe-ray-", ignore_cleanup_errors=True) as folder:
        return _train_on_ray(job, cluster, Path(folder), on_poll)


def _train_here(job: TrainJob, cluster: ClusterSpec, on_poll: OnPoll | None) -> RunResult:
    import torch

    require_gpu_is_there(cluster)
    torch.set_num_threads(cluster.threads_per_worker)
    disable_malloc_trim()
    ended = threading.Event()
    watcher = threading.Thread(target=_poll_until, args=(ended, on_poll or (lambda: None)), daemon=True)
    watcher.start()
    stop = StopRequest()
    try:
        with stop:
            result = fit(job, rank=Rank(device="cuda" if cluster.use_gpu else "cpu"), stop=stop)
    except Interrupted as interrupted:
        stop.end(str(interrupted))
    finally:
        ended.set()
        watcher.join()
    if stop():
        stop.end(JUST_FINISHED)
    return result


def _poll_until(ended: threading.Event, on_poll: OnPoll) -> None:
    while not ended.wait(POLL_S):
        on_poll()


def _train_on_ray(job: TrainJob, cluster: ClusterSpec, folder: Path, on_poll: OnPoll | None) -> RunResult:
    """Run the trainer in a thread: in the main thread, which polls here, Ray Train would replace the SIGINT handler."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here: Any = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)  # lost only with this node
    flag = ray.remote(num_cpus=0, scheduling_strategy=here)(StopFlag).remote()
    trainer = _trainer(job, cluster, folder, flag)
    pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="ray-train")
    stop = StopRequest()
    with stop:
        future = pool.submit(trainer.fit)
        try:
            in_time = _wait_for(future, stop, flag, on_poll or (lambda: None))
            failed = future.exception() if in_time else None
        finally:
            if not future.done():  # interrupted or cancelled: the controller and its workers end with the connection
                disconnect()
            pool.shutdown(wait=False, cancel_futures=True)
    if not in_time:
        stop.end(f"interrupted, and the workers did not end their step within {GRACE_S:.0f} s: {_saved(job)}")
    if failed is not None:
        error = _to_aecore_error(failed, job) if isinstance(failed, Exception) else failed
        if stop() and isinstance(error, Interrupted):
            stop.end(str(error))
        raise error from failed
    result = finished_run(open_store(job.out))
    if result is None:
        raise RunFailed(f"{job.out}: training ended without a published model: run the same command again")
    if stop():
        stop.end(JUST_FINISHED)
    return result


def _wait_for(future: "concurrent.futures.Future[Any]", stop: StopRequest, flag: Any, on_poll: OnPoll) -> bool:
    """Return whether the trainer ended; after a request to stop it has `GRACE_S` to do so."""
    deadline: float | None = None
    while not concurrent.futures.wait([future], POLL_S).done:
        require_alive()
        on_poll()
        if deadline is None and stop():
            flag.request.remote()
            deadline = time.monotonic() + GRACE_S
        elif deadline is not None and time.monotonic() > deadline:
            return False
    return True


def _saved(job: TrainJob) -> str:
    """Return a message about the newest checkpoint of a run."""
    steps = [step for step, _ in committed_checkpoints(open_store(job.out))]
    if not steps:
        return "no checkpoint was written yet, the same command starts from the beginning"
    return f"its newest checkpoint is that of step {max(steps)}, the same command continues from there"


def _trainer(job: TrainJob, cluster: ClusterSpec, folder: Path, flag: Any) -> Any:
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig

    from pipelines.cluster.rendezvous import FileTorchConfig

    backend = "nccl" if cluster.use_gpu else "gloo"
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(cluster.timeout_s))
    placing: dict[str, Any] = {"controller_failure_limit": cluster.max_failures}  # Ray's default: try for ever
    best: dict[str, Any] = {"checkpoint_score_attribute": "validation_loss", "checkpoint_score_order": "min"} if job.checkpoint.best else {}
    return _trainer_type()(
        _rank_loop,
        train_loop_config={"job": job, "threads": cluster.threads_per_worker, "pointers": num_nodes() == 1, "stop": flag},
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


def _trainer_type() -> Any:
    """Return TorchTrainer; on a local Ray without two actors of Ray Train (2.60, no option) that take four seconds of CPU at each start.

    One hands out shards of Ray Data, which there are none of; the other frees what a controller held that was killed, and a local Ray
    ends with its driver.
    """
    from ray.train.torch import TorchTrainer

    if not is_local():
        return TorchTrainer

    class LocalTrainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            unused = ("DatasetsCallback", "PlacementGroupCleanerCallback")
            every: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]  # mypy sees the class of Ray Train v1
            return [callback for callback in every if type(callback).__name__ not in unused]

    return LocalTrainer


def _rank_loop(config: Mapping[str, Any]) -> None:
    """Run `fit` on every rank, in the process group that Ray created."""
    name_torch_cache()
    import ray.train
    import ray.train.torch
    import torch

    torch.set_num_threads(config["threads"])
    disable_malloc_trim()
    context = ray.train.get_context()
    rank = Rank(context.get_world_rank(), context.get_world_size(), str(ray.train.torch.get_device()))

    def report(ref: Any, metrics: Mapping[str, Any]) -> None:
        numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        if "validation" in metrics:
            numbers |= {f"validation_{name}": value for name, value in metrics["validation"].items()}
        if ref is None or not config["pointers"]:
            ray.train.report(numbers)
            return
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            pointer = {"url": f"{config['job'].out}/{ref.name}", "step": ref.step, "sha256": ref.sha256}
            Path(folder, "pointer.json").write_text(json.dumps(pointer))
            ray.train.report(numbers, checkpoint=ray.train.Checkpoint.from_directory(folder))

    def ask() -> bool:
        try:
            return bool(ray.get(config["stop"].is_requested.remote(), timeout=ASK_S))
        except ray.exceptions.RayError:  # the driver kills this worker itself, or the node of the actor is lost
            return False

    try:
        fit(config["job"], rank=rank, on_checkpoint=report, stop=_at_most_every(ASK_EVERY_S, ask))
    except Exception as error:
        known = from_outside(error)
        if known is None or known is error or isinstance(error, ConnectionError | TimeoutError):  # the last: another rank may have died
            raise
        raise known from error  # ends the run: only a worker that dies is started again


def _at_most_every(seconds: float, ask: Callable[[], bool]) -> Callable[[], bool]:
    """Return a cheap function with the last answer of `ask`, which it asks at most once in `seconds` and not again after a true one."""
    asked, answer = -math.inf, False

    def last_answer() -> bool:
        nonlocal asked, answer
        if not answer and time.monotonic() - asked >= seconds:
            answer, asked = ask(), time.monotonic()
        return answer

    return last_answer


def _stop_callback() -> Any:
    """Return a Ray Train callback that ends the run at an `AecoreError`, which a restart would only repeat."""
    from ray.train import UserCallback

    class StopAtAecoreErrors(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, BaseException]) -> None:
            for error in _within(worker_exceptions.values()):
                if isinstance(error, AecoreError):
                    raise error

    return StopAtAecoreErrors()


def _within(errors: Iterable[BaseException | None]) -> Iterator[BaseException]:
    """Yield these exceptions and their causes, each once (Ray wraps what a worker raised)."""
    left, seen = list(errors), set[int]()
    while left:
        error = left.pop(0)
        if error is None or id(error) in seen:
            continue
        seen.add(id(error))
        yield error
        inner = [getattr(error, name, None) for name in ("_base_exc", "cause", "controller_failure", "__cause__")]
        left += [found for found in (*inner, *getattr(error, "worker_failures", {}).values()) if isinstance(found, BaseException)]


def _to_aecore_error(error: Exception, job: TrainJob) -> AecoreError:
    import ray

    inside = list(_within([error]))
    for found in inside:
        if isinstance(found, AecoreError):
            return found
    short = next((found for found in inside if isinstance(found, ray.exceptions.OutOfMemoryError)), None)  # 20 lines, the first says it
    lines = [line for line in str(short or error).strip().splitlines() if line.strip()]
    message = f"{lines[0]} (is there enough memory?)" if short else lines[-1] if lines else type(error).__name__
    if "Startup" in type(getattr(error, "controller_failure", None)).__name__:  # Ray's own classes for it are private
        return ClusterError(f"the workers did not start: {message}; ask for fewer workers, or raise cluster.timeout_s")
    return WorkerDied(f"training failed after cluster.max_failures restarts: {message}; {_saved(job)}")
