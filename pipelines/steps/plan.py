"""`aepipe run --dry-run`: every step with its output URL, and the dry runs of those whose input exists. Writes nothing."""

from aecore.store import open_store
from pipelines.recipe.recipe import Recipe
from pipelines.recipe.yaml import Tree
from pipelines.steps import pipeline
from pipelines.steps.steps import STEPS


def plan_pipeline(recipe: Recipe) -> Tree:
    """Return steps, recipe and plans; raises what would stop the real run, as far as it is known before.

    Sharding is always planned, training if the dataset exists, encoding if the run has ended: both for the current dataset, new samples
    are counted under `shard` only.
    """
    from aecore.artifact.commit import newest_number
    from aecore.data.dataset import open_dataset
    from aecore.data.manifest import STEM
    from aecore.training.result import finished_run

    last, names = pipeline.stage(recipe, "evaluate"), pipeline.stages(recipe)
    data, store = last.require("data"), open_store(last.require("run"))
    plans = {"shard": STEPS["shard"](pipeline.stage(recipe, "shard"), dry_run=True)} if "shard" in names else {}
    is_there = newest_number(open_store(data), STEM) is not None or not plans
    splits = dict.fromkeys([*(open_dataset(data).manifest.splits if is_there else ()), *(plans["shard"]["samples"] if plans else ())])
    missing = pipeline.missing_split(recipe, data, splits)
    if is_there:
        plans["train"] = STEPS["train"](pipeline.stage(recipe, "train"), dry_run=True)
        if finished_run(store) is not None:
            plans["encode"] = STEPS["encode"](pipeline.stage(recipe, "encode"), dry_run=True)
    places = {name: pipeline.stage(recipe, name).tree["out"] for name in names}
    return {"stages": places, **({"not_evaluated": missing} if missing else {}), **plans, "recipe": recipe.resolved()}
