"""Prefect flow: a dataset and a model to a latent table."""

from typing import Any

from prefect import flow

from pipelines.flows.stages import run_step, stop_job


@flow(name="aepipe-encode", persist_result=False, on_cancellation=[stop_job])
def encode_flow(recipe: dict[str, Any]) -> dict[str, Any]:
    """Run the step `encode` of a recipe (a tree of plain JSON) and return its summary."""
    return run_step("encode", recipe)
