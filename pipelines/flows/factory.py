"""The factory of the flows: one flow and one task per step, with retries where they can help and progress in the run's log.

Every step can run again after a kill (files are put-if-absent, records show what is done), so a task is retried after storage and
unknown errors. A wrong config, damaged data or a NaN loss would only fail again, and a cluster had its `cluster.timeout_s`: these
are not retried, and no dead worker, which the fan-out or Ray Train has started again as often as is allowed.
Progress is polled by the driver, since the output of Ray workers does not reach Prefect. Prefect's cache is off: the records on disk
decide what is done.

With `cluster.kind=job` a task submits the step (or the whole pipeline) as a Ray job, or joins the running one, and follows it. A
cancelled run stops its job: in the task when it notices, and in the hook `stop_job`, which Prefect calls after it ended the process.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prefect import flow, get_run_logger, runtime, task
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext

from aecore.errors import ClusterError, ConfigError, DataError, Diverged, RunFailed, ServiceLost, WorkerDied
from aecore.registry import flatten
from pipelines.cluster.jobs import JobStopped
from pipelines.cluster.outside import known_error
from pipelines.recipe.recipe import Recipe
from pipelines.steps.hints import next_command
from pipelines.steps.logs import OURS, make_printable
from pipelines.steps.pipeline import PIPELINE
from pipelines.steps.progress import both, log_to, terminal
from pipelines.steps.steps import STEPS
from pipelines.steps.submit import run_as_job, stop

PREFIX = "aepipe-"  # of the names of flows
RETRIES, RETRY_DELAY_S = 2, (2.0, 10.0)
CRASHES = 3  # in a row: then the process of a run is not restarted any more
CRASH_RESTARTED = "its process was gone: run again by aepipe"


def make_flow(name: str, body: Callable[[dict[str, Any]], dict[str, Any]] | None = None) -> Any:
    """Return the Prefect flow of a step, or of the pipeline, whose `body` takes the recipe; it stops its Ray job when it is cancelled.

    Its entry point is `pipelines.flows.NAME.NAME_flow`, which deployments on servers keep: a module of that name has to hold it.
    """

    def run(recipe: dict[str, Any]) -> dict[str, Any]:
        make_printable("prefect", *OURS)
        return run_step(name, recipe) if body is None else body(recipe)

    run.__module__, run.__name__, run.__qualname__ = f"{__package__}.{name}", f"{name}_flow", f"{name}_flow"
    run.__doc__ = f"Run `{name}` on a recipe (a tree of plain JSON) and return its summary."
    return flow(name=f"{PREFIX}{name}", persist_result=False, on_cancellation=[stop_job])(run)


def is_retryable(task: Any, task_run: Any, state: Any) -> bool:
    """Return whether a failed task may succeed on a retry."""
    try:
        state.result()
    except ServiceLost:
        return True
    except (ClusterError, ConfigError, DataError, Diverged, JobStopped, WorkerDied):
        return False
    except Exception:  # Prefect raises it after the last attempt
        return True
    return False


def run_step(name: str, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Run one step as a Prefect task and return its summary."""
    require_not_always_crashing()
    summary: dict[str, Any] = _TASKS[name](recipe)
    return summary


def require_not_always_crashing() -> None:
    """RunFailed if the automation of `deploy/crash_restart.py` restarted this run and its process died CRASHES times in a row."""
    run = FlowRunContext.get()
    if run is None or run.flow_run is None or run.flow_run.deployment_id is None:
        return
    with get_client(sync_client=True) as client:
        states = client.read_flow_run_states(run.flow_run.id)
    crashes = 0
    for state in sorted(states, key=lambda state: state.timestamp):
        if state.is_scheduled() and state.message != CRASH_RESTARTED:  # started by a person or a schedule
            crashes = 0
        crashes += state.is_crashed()
    if crashes >= CRASHES:
        raise RunFailed(
            f"the process of this run died {crashes} times in a row, so it is not restarted automatically: look for the reason in the "
            "worker's log (memory?), then run it again from Prefect's page; what is committed is kept"
        )


def _make(name: str) -> Any:
    @task(
        name=name,
        retries=RETRIES,
        retry_delay_seconds=list(RETRY_DELAY_S),
        retry_condition_fn=is_retryable,
        cache_policy=NO_CACHE,
        persist_result=False,
    )
    def step(recipe: dict[str, Any]) -> dict[str, Any]:
        logger = get_run_logger()
        for package in OURS:  # their log in this process belongs to the run's log
            logging.getLogger(package).setLevel(logging.INFO)
        make_printable("prefect", *OURS)  # a task may run in another process than its flow
        parsed, report = Recipe(recipe), both(terminal(), log_to(logger))
        try:
            if parsed.cluster.kind == "job":
                summary = run_as_job(name, parsed, report, logger.info, _is_cancelled)
            else:
                summary = STEPS[name](parsed, report)
                logger.info("%s done in %.1f s", name, summary["seconds"])
        except Exception as error:
            known = known_error(error)
            if known is None:
                raise
            if (more := next_command(known)) is not None:
                logger.error(more)
            if known is error:
                raise
            raise known from error
        for made, part in summary.items() if name == PIPELINE else [(name, summary)]:
            publish_artifacts(made, part)
        return summary

    return step


def _is_cancelled() -> bool:
    """Return whether the current flow run was cancelled."""
    run_id = runtime.flow_run.id
    if run_id is None:
        return False
    try:
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(run_id).state
    except Exception as error:  # the job goes on without the server; a later query may succeed
        logging.getLogger(__name__).debug("cannot ask Prefect whether the run is cancelled: %s", error)
        return False
    return state is not None and (state.is_cancelling() or state.is_cancelled())


def stop_job(flow: Any, flow_run: Any, state: Any) -> None:
    """Stop the Ray job of a cancelled flow run. Prefect calls it with these parameter names, in another process than the run's."""
    name, tree = flow.name.removeprefix(PREFIX), (flow_run.parameters or {}).get("recipe")
    if isinstance(tree, dict) and (recipe := Recipe(tree)).cluster.kind == "job":
        job_id, status = stop(name, recipe)
        logging.getLogger(__name__).info("cancelled: Ray job %s: %s", job_id, status)


@contextlib.contextmanager
def _logged(what: str) -> Iterator[None]:
    """Log that the server does not take `what`, instead of raising it: the step has succeeded."""
    try:
        yield
    except Exception as error:
        known = known_error(error)
        logging.getLogger(__name__).warning("%s is not on the run's page: %s", what, known or error, exc_info=known is None)


def publish_artifacts(name: str, summary: Mapping[str, Any]) -> None:
    """Publish counts or metrics as a table and the address as a link on the run's page, if the server takes them."""
    rows = [{"what": key, "value": value if isinstance(value, int | float | str) else str(value)} for key, value in flatten(summary)]
    url = next((summary[key] for key in ("dataset", "model", "table") if key in summary), None)
    with _logged(f"the summary of {name}"):
        create_table_artifact(table=rows, key=f"aepipe-{name}", description=f"result of `{name}`")
        if url is not None and name != "evaluate":
            create_link_artifact(link=f"file://{url}" if url.startswith("/") else url, link_text=url, key=f"aepipe-{name}-url")


def publish_report(title: str, text: str) -> None:
    """Publish a markdown report on the run's page, if the server takes it."""
    with _logged("the report"):
        create_markdown_artifact(markdown=f"# {title}\n\n{text}\n", key="aepipe-pipeline", description=title)


_TASKS = {name: _make(name) for name in (*STEPS, PIPELINE)}
