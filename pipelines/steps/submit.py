"""The client of a Ray job that runs a step or a pipeline: submits or joins it, follows it, returns its summary or raises its error.

The key of a job is a hash of what it makes: the identity fields of the sections that the step reads, and its addresses. Neither the size
of the cluster nor the recipe's name is in it, so another submit of the same work joins the running job.
A client that ends (Ctrl-C, a killed worker) leaves the job running; only `aepipe submit --stop` or a cancelled flow run stops it.
"""

import logging
from collections.abc import Callable
from typing import Any

from aecore import errors
from aecore.errors import AecoreError, ClusterError, RunFailed
from aecore.registry import to_dict
from aecore.store import sha256_json
from pipelines.cluster.jobs import Ended, JobServer, JobSpec, JobStopped
from pipelines.recipe.recipe import Recipe
from pipelines.recipe.yaml import Tree
from pipelines.steps import job_main
from pipelines.steps.pipeline import sections_and_addresses
from pipelines.steps.progress import Report, from_line
from pipelines.steps.steps import urls_at, with_absolute_urls

logger = logging.getLogger(__name__)
OnLine = Callable[[str], None]


def job_of(name: str, recipe: Recipe) -> JobSpec:
    """Return the job of step `name` (or PIPELINE) of a recipe."""
    tree = with_absolute_urls(recipe)
    key = f"aepipe-{name}-{sha256_json(identity(name, recipe))[:16]}"
    urls = tuple(_addresses(name, recipe).values())
    metadata = {"aepipe": name, "recipe": recipe.name, "out": str(tree.get("out") or "")}
    return JobSpec(key, job_main.arguments(name, tree), urls, metadata)


def identity(name: str, recipe: Recipe) -> Tree:
    """Return what identifies a job, as plain JSON."""
    sections, _ = sections_and_addresses(name, recipe)
    specs = {section: to_dict(getattr(recipe, section), identity_only=True) for section in sections}
    known = {section: spec for section, spec in specs.items() if spec}  # a later section is left out at its defaults
    return {"step": name, "addresses": _addresses(name, recipe), **known}


def _addresses(name: str, recipe: Recipe) -> dict[str, str]:
    return urls_at(recipe, sections_and_addresses(name, recipe)[1])


def run_as_job(name: str, recipe: Recipe, report: Report, on_line: OnLine, stop_requested: Callable[[], bool] = lambda: False) -> Tree:
    """Submit or join the job of a step and follow it to its end; return the summary of the step.

    Raises
    ------
    AecoreError
        The error that ended the job, with its class and exit code; `JobStopped` if it was stopped; ClusterError if the cluster could
        not run it.
    """
    server = JobServer(recipe.cluster)
    job_id = submit(server, job_of(name, recipe))
    result: dict[str, Any] = {}
    last = ""

    def listen(line: str) -> None:
        nonlocal last
        last = line.strip() or last
        found, progress = job_main.result_of(line), from_line(line)
        if found is not None:
            result.update(found)
        elif progress is not None:
            report(progress)
        else:
            on_line(line)

    try:
        ended = server.follow(job_id, listen, stop_requested)
    except BaseException as stop:
        if isinstance(stop, Exception) or not stop_requested():
            if isinstance(stop, KeyboardInterrupt):
                raise KeyboardInterrupt(
                    f"stopped watching; Ray job {job_id} goes on: the same command joins it again, "
                    "`aepipe submit RECIPE ... --stop` stops it"
                ) from None
            raise
        server.stop(job_id)
        raise
    if not result:  # no lines were received (a proxy without websockets)
        for line in server.log(job_id).splitlines():
            result.update(job_main.result_of(line) or {})
    return _summary(ended, result, last)


def submit(server: JobServer, job: JobSpec) -> str:
    """Submit a job or join it; return its id."""
    job_id, is_new = server.submit(job)
    if is_new:
        logger.warning("submitted Ray job %s to %s", job_id, server.address)
    else:
        logger.warning("joined Ray job %s, which runs already on %s", job_id, server.address)
    return job_id


def stop(name: str, recipe: Recipe) -> tuple[str | None, str]:
    """Stop the job of a step if it is running; return its id (None: not running) and its status."""
    server = JobServer(recipe.cluster)
    job_id = server.running(job_of(name, recipe).key)
    return job_id, "nothing is running" if job_id is None else server.stop(job_id)


def plan(name: str, recipe: Recipe) -> Tree:
    """Return what would be submitted, without a request to the server."""
    job = job_of(name, recipe)
    return {"job": job.key, "arguments": list(job.arguments), "metadata": dict(job.metadata), "identity": identity(name, recipe)}


def _summary(ended: Ended, result: dict[str, Any], last: str) -> Tree:
    if ended.status == "SUCCEEDED" and isinstance(result.get("summary"), dict):
        summary: Tree = result["summary"]
        return summary
    if ended.status == "STOPPED":
        raise JobStopped(f"Ray job {ended.id} was stopped; what is finished is kept, the same command goes on from there")
    if "error" in result:
        raise errors.from_json({"exit_code": ended.exit_code, **result, "message": f"{result.get('message')} (Ray job {ended.id})"})
    raise _failure(ended, last)


def _failure(ended: Ended, last: str) -> AecoreError:
    """Return the error of a job without a result: it did not start, or its process was killed. `last` is its last line."""
    if ended.exit_code in (126, 127) or "No module named" in last:
        return ClusterError(
            f"Ray job {ended.id}: its interpreter on the head node cannot run aecore ({last}): install this version there, "
            "and name the interpreter that has it in cluster.python"
        )
    if ended.status == "SUCCEEDED":
        return RunFailed(f"Ray job {ended.id} succeeded, and its log holds no result: run the same command again, finished work is kept")
    if ended.exit_code is None:
        return ClusterError(f"Ray job {ended.id} could not run: {(ended.message.strip() or ended.status).splitlines()[-1]}")
    if ended.exit_code in (-9, 137):
        return RunFailed(f"the process of Ray job {ended.id} was killed (is there enough memory on the head?): run the same command again")
    return RunFailed(f"Ray job {ended.id} ended with exit code {ended.exit_code}: {last}; its log: ray job logs {ended.id}")
