"""Prefect flow: shard -> train -> encode, and evaluate on the held-out split where there is one.

`out` is a root that gets `dataset/`, `run/` and `table/`; with `data` set, that dataset is used and nothing is sharded.
One Ray serves all stages. Run again after a kill, every stage continues what it finds.
"""

from typing import Any

from prefect import flow, get_run_logger

from aecore.data.manifest import open_dataset
from pipelines.config import Recipe
from pipelines.flows.stages import leave_report, run_step
from pipelines.steps import stage, stages


@flow(name="aepipe-pipeline", persist_result=False)
def pipeline_flow(recipe: dict[str, Any]) -> dict[str, Any]:
    """Run all stages of a recipe (a tree of plain JSON) and return their summaries by name."""
    parsed = Recipe(recipe)
    summaries = {name: run_step(name, stage(parsed, name).tree) for name in stages(parsed)}
    split = parsed.evaluate.split
    if split in open_dataset(stage(parsed, "evaluate").require("data")).manifest.splits:
        summaries["evaluate"] = run_step("evaluate", stage(parsed, "evaluate").tree)
    else:
        get_run_logger().info("no split %r in the dataset: nothing to evaluate on", split)
    leave_report(parsed.name, report(summaries))
    return summaries


def report(summaries: dict[str, dict[str, Any]]) -> str:
    """Return the summaries as one markdown table per stage."""
    lines: list[str] = []
    for name, summary in summaries.items():
        lines += [f"## {name}", "", "| what | value |", "|---|---|"]
        lines += [f"| {key} | {value} |" for key, value in summary.items() if key != "step"] + [""]
    return "\n".join(lines)
