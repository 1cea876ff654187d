"""Prefect flow: raw data to a dataset of shards."""

from typing import Any

from prefect import flow

from pipelines.flows.stages import run_step, stop_job


@flow(name="aepipe-shard", persist_result=False, on_cancellation=[stop_job])
def shard_flow(recipe: dict[str, Any]) -> dict[str, Any]:
    """Run the step `shard` of a recipe (a tree of plain JSON) and return its summary."""
    return run_step("shard", recipe)
