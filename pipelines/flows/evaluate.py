"""Prefect flow: a model scored on a split of a dataset."""

from typing import Any

from prefect import flow

from pipelines.flows.stages import run_step, stop_job


@flow(name="aepipe-evaluate", persist_result=False, on_cancellation=[stop_job])
def evaluate_flow(recipe: dict[str, Any]) -> dict[str, Any]:
    """Run the step `evaluate` of a recipe (a tree of plain JSON) and return its summary."""
    return run_step("evaluate", recipe)
