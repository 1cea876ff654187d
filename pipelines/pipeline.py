"""A pipeline: shard, train, encode and evaluate one after the other under one root. It knows what a stage is given, not what it does."""

from collections.abc import Callable, Collection

from aecore.errors import DataError
from pipelines.config import Recipe
from pipelines.steps import check_source
from pipelines.tree import Tree

RunStage = Callable[[str, Recipe], Tree]


def stage(recipe: Recipe, name: str) -> Recipe:
    """Return the recipe of one stage of a pipeline: `out` is a root that holds `dataset/`, `run/` and `table/`.

    A pipeline with `data` trains on that dataset and has no shard stage.
    """
    root = recipe.require("out")
    data = recipe.require("data") if recipe.tree.get("data") else f"{root}/dataset"
    places: dict[str, Tree] = {
        "shard": {"data": None, "out": data},
        "train": {"data": data, "out": f"{root}/run"},
        "encode": {"run": f"{root}/run", "data": data, "out": f"{root}/table"},
        "evaluate": {"run": f"{root}/run", "data": data},
    }
    return Recipe(recipe.travelling() | places[name])


def check_pipeline(recipe: Recipe) -> None:
    """ConfigError for what would stop a pipeline only after its first stages."""
    from aecore.encoder import require_posterior
    from aecore.run import require_pairs_are_taken, require_possible

    recipe.require("out")
    if "shard" in stages(recipe):
        check_source(recipe)
    require_possible(recipe.train, recipe.checkpoint, recipe.cluster.num_workers)
    require_posterior(recipe.model, recipe.encode)
    require_pairs_are_taken(recipe.pairs, recipe.model.kind)


def check_address(recipe: Recipe) -> None:
    """ConfigError if no cluster or job server is named where the recipe needs one: in it, or in the environment of who runs it."""
    from pipelines.cluster.job_client import job_address
    from pipelines.cluster.session import cluster_address

    if recipe.cluster.kind == "job":
        job_address(recipe.cluster)
    elif recipe.cluster.num_workers > 0:
        cluster_address(recipe.cluster)


def stages(recipe: Recipe) -> list[str]:
    """Return the stages of a pipeline that come before evaluate, in order."""
    return ["train", "encode"] if recipe.tree.get("data") else ["shard", "train", "encode"]


def run_stages(recipe: Recipe, run: RunStage) -> Tree:
    """Run all stages of a pipeline with `run(name, recipe of the stage)`; evaluate where the dataset has the split. Summaries by name."""
    from aecore.data.dataset import open_dataset

    summaries: Tree = {}
    last, missing = stage(recipe, "evaluate"), None
    data = last.require("data")
    for name in stages(recipe):
        if name == "train":  # the last chance before hours of work
            missing = missing_split(recipe, data, open_dataset(data).manifest.splits)
        summaries[name] = run(name, stage(recipe, name))
    skipped = {"step": "evaluate", "dataset": data, "not_evaluated": missing, "seconds": 0.0}
    summaries["evaluate"] = run("evaluate", last) if missing is None else skipped
    return summaries


def missing_split(recipe: Recipe, data: str, splits: Collection[str]) -> str | None:
    """Return why a pipeline ends without an evaluation (only the default split may be missing), None if it has one.

    DataError if the dataset `data` has `splits` and the recipe names another one, to train or to be evaluated on.
    """
    from aecore.evaluate import EvaluateSpec

    asked = {"train.split": recipe.train.split, "train.val_split": recipe.train.val_split, "evaluate.split": recipe.evaluate.split}
    missing = {key: split for key, split in asked.items() if split is not None and split not in splits}
    for key, split in missing.items():
        if (key, split) != ("evaluate.split", EvaluateSpec().split):
            known = ", ".join(splits) or "none"
            raise DataError(f"{data} has no split {split!r} (it has: {known}): set {key} to another one, or make it with splits.*")
    return f"no split {recipe.evaluate.split!r}" if missing else None
