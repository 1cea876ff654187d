"""Maps parts over a pool of Ray actors: one worker per actor, created once; results in order of completion.

An actor processes one part at a time. If it dies, a new actor gets the same part, twice at most: a part can be run again, since its
files are put-if-absent and its record shows whether it is done. A part that kills its worker every time becomes a `PartFailure` with
`WorkerDied`, which nothing above retries; Ray itself retries nothing here. If a node is lost for good, the new actor starts where another
one has finished. Only tasks and records are sent, never sample bytes.
"""

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from aecore.artifact.fanout import FanOut, MakeWorker, Outcome, PartFailure, Worker, make_part, serial
from aecore.errors import AecoreError, ClusterError, WorkerDied
from aecore.store import name_torch_cache
from pipelines.cluster.memory import disable_malloc_trim
from pipelines.cluster.outside import known_error
from pipelines.cluster.session import connect, require_local_urls_fit, require_resources, wait_for_one, worker_resources
from pipelines.recipe.recipe import ClusterSpec

T = TypeVar("T")
logger = logging.getLogger(__name__)
TASK_RETRIES = 2  # the only retries of a dead worker besides `cluster.max_failures` in training


class PartWorker:
    """The Ray actor: creates the job's worker at its first call and keeps it."""

    def __init__(self, threads: int) -> None:
        name_torch_cache()
        disable_malloc_trim()
        self._threads = threads
        self._worker: Worker | None = None

    def prepare(self, make_worker: MakeWorker) -> AecoreError | None:
        """Create the worker; return an `AecoreError` as a value, since Ray would change the type of a raised one."""
        import sys

        made = _or_error(make_worker)
        if isinstance(made, AecoreError):
            return made
        self._worker = made
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(self._threads)
        return None

    def run(self, make_worker: MakeWorker, task: Any) -> Outcome:
        """Process one part. A restarted actor has lost its worker and creates it again."""
        if self._worker is None:
            error = self.prepare(make_worker)
            if error is not None:
                return PartFailure(task.stem, type(error).__name__, str(error), hint=error.hint)
        assert self._worker is not None
        return make_part(self._worker, task)


def ray_fan_out(cluster: ClusterSpec, *urls: str) -> FanOut:
    """Return a fan-out over `cluster.num_workers` Ray actors, or `serial` for 0. Ray is started when there is a task.

    `urls` are the addresses that the workers read and write; on several nodes they must not be local paths.
    """
    if cluster.num_workers == 0:
        disable_malloc_trim()
        return serial

    def fan_out(make_worker: MakeWorker, tasks: Sequence[Any]) -> Iterator[Outcome]:
        if not tasks:
            return iter(())
        connect(cluster)
        require_local_urls_fit(cluster, *urls)
        num_workers = min(cluster.num_workers, len(tasks))
        require_resources(cluster, num_workers)
        return _run(cluster, num_workers, make_worker, tasks)

    return fan_out


def call_on_worker(cluster: ClusterSpec, function: Callable[[], Any], *urls: str) -> Any:
    """Call `function` on one worker of the cluster and return its result (small plain data); it is called again if the worker dies.

    Raises
    ------
    WorkerDied
        If the worker died TASK_RETRIES + 1 times.
    """
    connect(cluster)
    require_local_urls_fit(cluster, *urls)
    require_resources(cluster, 1)
    import ray

    remote = ray.remote(_call).options(**_options(cluster), max_retries=0)  # Ray retries without end what ran out of memory
    for start in range(TASK_RETRIES + 1):
        try:
            result = ray.get(wait_for_one([remote.remote(function, cluster.threads_per_worker)], cluster))
        except _deaths(ray) as died:
            if start == TASK_RETRIES:
                raise WorkerDied(f"its worker died {TASK_RETRIES + 1} times: {_first_line(died)}; is there enough memory?") from died
            logger.warning("the worker died, starting another one: %s", _first_line(died))
            continue
        if isinstance(result, AecoreError):
            raise result
        return result
    raise AssertionError("not reached")


def _call(function: Callable[[], Any], threads: int) -> Any:
    """Run on a worker; an `AecoreError` is returned as a value, since Ray would change the type of a raised one."""
    name_torch_cache()
    import torch

    torch.set_num_threads(threads)
    disable_malloc_trim()
    return _or_error(function)


def _or_error(function: Callable[[], T]) -> T | AecoreError:
    """Return the result of `function`, or its error if that is typed or comes from the outside; a bug is raised."""
    try:
        return function()
    except Exception as error:
        known = known_error(error)
        if known is None:
            raise
        return known


def _options(cluster: ClusterSpec) -> dict[str, Any]:
    resources = worker_resources(cluster)
    return {"num_cpus": resources.pop("CPU", 0.0), "num_gpus": resources.pop("GPU", 0.0), "resources": resources}


def _run(cluster: ClusterSpec, num_workers: int, make_worker: MakeWorker, tasks: Sequence[Any]) -> Iterator[Outcome]:
    import ray

    remote = ray.remote(PartWorker).options(**_options(cluster))
    factory = ray.put(make_worker)
    actors: list[Any] = [remote.remote(cluster.threads_per_worker) for _ in range(num_workers)]
    deaths: Counter[str] = Counter()  # by stem of the part that was being made
    waiting, busy = deque(tasks), dict[Any, tuple[Any, Any]]()

    def assign_next(actor: Any) -> None:
        task = waiting.popleft()
        busy[actor.run.remote(factory, task)] = (actor, task)

    try:
        _prepare(ray, actors, factory, cluster.timeout_s)
        for actor in actors:
            assign_next(actor)
        while busy:
            done = wait_for_one(list(busy), cluster)
            actor, task = busy.pop(done)
            try:
                outcome: Outcome = ray.get(done)
            except _deaths(ray) as died:
                _kill(ray, actor)
                actors[actors.index(actor)] = actor = remote.remote(cluster.threads_per_worker)
                deaths[task.stem] += 1
                if deaths[task.stem] <= TASK_RETRIES:
                    logger.warning("the worker of %s died, starting another one: %s", task.stem, _first_line(died))
                    waiting.appendleft(task)
                    assign_next(actor)
                    continue
                outcome = PartFailure(task.stem, WorkerDied.__name__, f"its worker died {deaths[task.stem]} times ({_first_line(died)})")
            except ray.exceptions.RayError as error:  # the task or its record cannot be serialised: our bug, fails this part only
                outcome = PartFailure(task.stem, type(error).__name__, str(error))
            if waiting:
                assign_next(actor)
            else:
                _kill(ray, actor)  # frees its resources for a worker whose node is lost
            yield outcome
    finally:
        for actor in actors:
            _kill(ray, actor)


def _deaths(ray: Any) -> tuple[type[Exception], ...]:
    """Return the errors of a worker that has ended: its process, its node, or the network to it; or Ray killed it for its memory."""
    known = ray.exceptions
    return known.RayActorError, known.WorkerCrashedError, known.OutOfMemoryError, known.NodeDiedError


def _kill(ray: Any, actor: Any) -> None:
    """End an actor; never raises: what its parts came to is known, and an error of the work must stay the error."""
    try:
        ray.kill(actor)
    except Exception as error:  # the connection to the cluster is lost, for example
        logger.warning("cannot end a worker: %s", _first_line(error))


def _prepare(ray: Any, actors: Sequence[Any], factory: Any, timeout_s: float) -> None:
    """Wait until every actor has created its worker; raise the error of one that could not."""
    refs = [actor.prepare.remote(factory) for actor in actors]
    ready, late = ray.wait(refs, num_returns=len(refs), timeout=timeout_s)
    for ref in ready:
        try:
            error = ray.get(ref)
        except _deaths(ray) as died:
            raise ClusterError(f"a worker died while it started: {_first_line(died)}; is there enough memory?") from died
        if error is not None:
            raise error
    if late:
        raise ClusterError(
            f"{len(late)} of {len(refs)} workers did not start within cluster.timeout_s={timeout_s:.0f}: ask for fewer workers, or raise it"
        )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
