"""Prefect flow: a dataset to a trained model."""

from typing import Any

from prefect import flow

from pipelines.flows.stages import run_step, stop_job


@flow(name="aepipe-train", persist_result=False, on_cancellation=[stop_job])
def train_flow(recipe: dict[str, Any]) -> dict[str, Any]:
    """Run the step `train` of a recipe (a tree of plain JSON) and return its summary."""
    return run_step("train", recipe)
