"""Prefect flow: other people's tars to a dataset, in place."""

from typing import Any

from prefect import flow

from pipelines.flows.stages import run_step


@flow(name="aepipe-adopt", persist_result=False)
def adopt_flow(recipe: dict[str, Any]) -> dict[str, Any]:
    """Run the step `adopt` of a recipe (a tree of plain JSON) and return its summary."""
    return run_step("adopt", recipe)
