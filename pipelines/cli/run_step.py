"""Runs a step or the pipeline for a verb: a step in this process or as a flow, the pipeline always as a flow.

A step is a flow if `PREFECT_API_URL` names a server; both ways call the same functions of `pipelines.steps`. Imports are inside
the functions, so that `aepipe --help` stays fast.
"""

import logging
import os
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from aecore.errors import ConfigError
from pipelines.cli.arguments import Args, Result
from pipelines.cli.overrides import require_no_conflict, require_not_of_run

if TYPE_CHECKING:
    from pipelines.recipe.recipe import Recipe
    from pipelines.recipe.yaml import Tree


def step(name: str, args: Args, base: Mapping[str, Any], **options: Any) -> Result:  # any: of the step
    """Run one step. `base` holds the keys set by arguments; a dry run shows the sections of the recipe that the step reads.

    `options` are those of its dry run.
    """
    from pipelines.cli import text
    from pipelines.recipe.recipe import load_recipe
    from pipelines.steps import pipeline, progress, steps

    require_no_conflict(base, args.overrides)
    if "run" in base:
        require_not_of_run(name, args.overrides)
    recipe = load_recipe(args.recipe, args.overrides, base=base)
    pipeline.check_address(recipe)
    if os.environ.get("PREFECT_API_URL") and not args.dry_run:
        summary = flow(name, debug=args.debug)(steps.with_absolute_urls(recipe))
    elif recipe.cluster.kind == "job" and not args.dry_run:
        summary = _as_job(name, recipe)
    else:
        report = progress.both(progress.terminal(), progress.log_to(logging.getLogger("pipelines")))
        summary = steps.STEPS[name](recipe, report, dry_run=args.dry_run, **options)
    if args.dry_run:
        summary = {**summary, "recipe": recipe.resolved((*steps.STEPS[name].sections, "cluster"))}
    return Result(summary, text.of_step)


def pipeline(args: Args) -> Result:
    """Run all steps of a recipe as one flow; a dry run lists them and plans those whose input exists."""
    from pipelines.cli import text
    from pipelines.recipe.recipe import load_recipe
    from pipelines.steps import pipeline
    from pipelines.steps.steps import with_absolute_urls

    recipe = load_recipe(args.recipe, args.overrides)
    pipeline.check_pipeline(recipe)
    pipeline.check_address(recipe)
    if args.dry_run:
        from pipelines.steps.plan import plan_pipeline

        return Result(plan_pipeline(recipe), text.of_tree)
    return Result(flow(pipeline.PIPELINE, debug=args.debug)(with_absolute_urls(recipe)), text.of_pipeline)


def submit(args: Args) -> Result:
    """Submit the pipeline as a Ray job, or join the running one, and follow it unless `--no-wait`; `--stop` stops it."""
    from pipelines.cli import text
    from pipelines.cluster.job_client import job_address
    from pipelines.cluster.jobs import JobServer
    from pipelines.recipe.recipe import load_recipe
    from pipelines.steps import pipeline
    from pipelines.steps import submit as jobs

    recipe = load_recipe(args.recipe, ["cluster.kind=job", *args.overrides])
    if recipe.cluster.kind != "job":
        raise ConfigError(f"cluster.kind={recipe.cluster.kind}, and `aepipe submit` submits a job: remove it, or use aepipe run")
    pipeline.check_pipeline(recipe)
    where = job_address(recipe.cluster)
    if args.dry_run:
        return Result({"address": where, **jobs.plan(pipeline.PIPELINE, recipe), "recipe": recipe.resolved()}, text.of_tree)
    if args.stop:
        job_id, status = jobs.stop(pipeline.PIPELINE, recipe)
        return Result({"job": job_id, "address": where, "status": status}, text.of_tree)
    if args.no_wait:
        job = jobs.job_of(pipeline.PIPELINE, recipe)
        return Result({"job": jobs.submit(JobServer(recipe.cluster), job), "address": where}, text.of_tree)
    return Result(_as_job(pipeline.PIPELINE, recipe), text.of_pipeline)


def _as_job(name: str, recipe: "Recipe") -> "Tree":
    """Run a step or the pipeline as a Ray job; its log goes to standard error, its progress is reported as for a local run."""
    from pipelines.steps import progress
    from pipelines.steps.submit import run_as_job

    report = progress.terminal() if sys.stderr.isatty() else progress.log_to(logging.getLogger("pipelines"))
    return run_as_job(name, recipe, report, progress.line_printer())


def flow(name: str, *, debug: bool) -> Callable[..., Any]:
    """Return a Prefect flow; its console shows tracebacks only with `debug` (Prefect always records them)."""
    from importlib import import_module

    flows: Any = import_module("pipelines.flows")
    flows.require_server()
    module = import_module(f"pipelines.flows.{name}")
    for logger in ("aecore", "pipelines"):  # Prefect's own handlers take over
        logging.getLogger(logger).handlers = []
    if not debug:
        import_module("pipelines.flows.console").hide_tracebacks()
    found: Callable[..., Any] = import_module("pipelines.flows.server").with_server(getattr(module, f"{name}_flow"))
    return found
