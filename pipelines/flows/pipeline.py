"""Prefect flow: shard -> train -> encode, and evaluate on the held-out split where there is one.

`out` is a root that gets `dataset/`, `run/` and `table/`; with `data` set, that dataset is used and nothing is sharded.
All steps share one Ray. After a kill, every step continues from what is committed.
With `cluster.kind=job` all steps are one Ray job that this flow follows: a retry or the next run joins it while it runs.
"""

from typing import Any

from pipelines.flows.factory import make_flow, publish_report, run_step
from pipelines.recipe.recipe import Recipe
from pipelines.steps.pipeline import PIPELINE, check_address, run_stages
from pipelines.steps.steps import with_absolute_urls


def run_pipeline(recipe: dict[str, Any]) -> dict[str, Any]:
    """Run all steps of a recipe (a tree of plain JSON) and return their summaries by name."""
    parsed = Recipe(recipe)
    check_address(parsed)
    if parsed.cluster.kind == "job":
        summaries = run_step(PIPELINE, with_absolute_urls(parsed))
    else:
        summaries = run_stages(parsed, lambda name, part: run_step(name, part.tree))
    publish_report(parsed.name, report(summaries))
    return summaries


pipeline_flow = make_flow(PIPELINE, run_pipeline)


def report(summaries: dict[str, dict[str, Any]]) -> str:
    """Return the summaries as one markdown table per step."""
    lines: list[str] = []
    for name, summary in summaries.items():
        lines += [f"## {name}", "", "| what | value |", "|---|---|"]
        lines += [f"| {key} | {value} |" for key, value in summary.items() if key != "step"] + [""]
    return "\n".join(lines)
