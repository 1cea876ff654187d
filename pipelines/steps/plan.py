"""`aepipe run --dry-run`: every step with its output URL, and the dry runs of those whose input exists. Writes nothing."""

from aecore.store import open_store
from pipelines.recipe.recipe import Recipe
from pipelines.recipe.yaml import Tree
from pipelines.steps import pipeline
from pipelines.steps.refresh import FIRST, Round, rounds
from pipelines.steps.steps import STEPS


def plan_pipeline(recipe: Recipe) -> Tree:
    """Return steps, recipe and plans; raises what would stop the real run, as far as it is known before.

    Sharding is always planned, training if the dataset exists, encoding if the run has ended: both for the current dataset, new samples
    are counted under `shard` only. If a run exists, `refresh` has the policy and the runs that would be finished or made.
    """
    from aecore.artifact.commit import newest_number
    from aecore.data.dataset import open_dataset
    from aecore.data.manifest import STEM
    from aecore.training.result import finished_run

    names = pipeline.stages(recipe)
    data = pipeline.stage(recipe, "evaluate").require("data")
    plans = {"shard": STEPS["shard"](pipeline.stage(recipe, "shard"), dry_run=True)} if "shard" in names else {}
    is_there = newest_number(open_store(data), STEM) is not None or not plans
    splits = dict.fromkeys([*(open_dataset(data).manifest.splits if is_there else ()), *(plans["shard"]["samples"] if plans else ())])
    missing = pipeline.missing_split(recipe, data, splits)
    todo = rounds(recipe, data) if is_there else [FIRST]
    if todo != [FIRST]:
        plans["refresh"] = {"policy": recipe.refresh.policy, "runs": [each.to_dict() for each in todo], **_next(recipe, plans, todo)}
    if is_there:
        plans["train"] = STEPS["train"](pipeline.stage(recipe, "train", todo[0]), dry_run=True)
        if finished_run(open_store(pipeline.stage(recipe, "encode", todo[0]).require("run"))) is not None:
            plans["encode"] = STEPS["encode"](pipeline.stage(recipe, "encode", todo[0]), dry_run=True)
    places = {name: pipeline.stage(recipe, name, todo[-1]).tree["out"] for name in names}
    return {"stages": places, **({"not_evaluated": missing} if missing else {}), **plans, "recipe": recipe.resolved()}


def _next(recipe: Recipe, plans: Tree, todo: list[Round]) -> Tree:
    """Return what would follow from a generation that sharding would make: what of it is trained on is known only when it is there."""
    shard = plans.get("shard")
    if shard is None or "nothing new" in shard["notes"]:
        return {}
    if recipe.refresh.policy == "keep":
        then = f"{todo[-1].run} encodes the new generation"
    else:
        then = f"a new run if the new generation changes what {todo[-1].run} is trained on, else that encodes it"
    return {"then": f"{then} (train and encode are checked here with the generation that is there)"}
