"""The pipeline: shard, train, encode and evaluate under one root. A step of a pipeline is called a stage in names of functions.

One run of it is a tick of a schedule: `refresh.py` decides what is trained, and with which model the dataset of today is encoded.
"""

import logging
from collections.abc import Callable, Collection

from aecore.errors import DataError
from pipelines.recipe.recipe import Recipe
from pipelines.recipe.yaml import Tree
from pipelines.steps.refresh import FIRST, Round, rounds
from pipelines.steps.steps import STEPS, check_source, with_absolute_urls

PIPELINE = "pipeline"  # its name, wherever the name of a step is expected
RunStage = Callable[[str, Recipe], Tree]
BEFORE = "unfinished-"  # of the names of steps that finish what an earlier tick began

logger = logging.getLogger(__name__)


def stage(recipe: Recipe, name: str, now: Round = FIRST) -> Recipe:
    """Return the recipe of one step of a pipeline, whose `out` is a root that holds `dataset/`, and a run and a table for each round.

    A pipeline with `data` trains on that dataset and does not shard.
    """
    root, step = recipe.require("out"), STEPS[name]
    data = recipe.require("data") if recipe.tree.get("data") else f"{root}/dataset"
    made = {"dataset": data, "run": f"{root}/{now.run}", "table": f"{root}/{now.table}"}
    inputs = {key: made[kind] for key, kind in (("data", "dataset"), ("run", "run")) if key in step.addresses}
    unread = {"data", "run"} | ({"source"} - {*step.sections})
    tree = with_absolute_urls(recipe)
    rest = {key: value for key, value in (now.recipe_of_run(tree) if name == "train" else tree).items() if key not in unread}
    return Recipe(rest | inputs | {"out": made[step.makes] if step.makes else root})


def sections_and_addresses(name: str, recipe: Recipe) -> tuple[list[str], list[str]]:
    """Return the sections and the addresses that a step (or PIPELINE) reads of this recipe.

    A pipeline reads what its steps read, but of the addresses at the top only `data` and `out`.
    """
    if name != PIPELINE:
        return list(STEPS[name].sections), list(STEPS[name].addresses)
    parts = [STEPS[stage] for stage in (*stages(recipe), "evaluate")]
    inside = [address for part in parts for address in part.addresses if "." in address]
    return list(dict.fromkeys([*(section for part in parts for section in part.sections), "refresh"])), ["data", "out", *inside]


def check_pipeline(recipe: Recipe) -> None:
    """ConfigError for what would otherwise stop a pipeline only after its first steps."""
    from aecore.encoding.encoder import require_posterior
    from aecore.training.job import require_pairs_are_taken, require_possible

    recipe.require("out")
    if "shard" in stages(recipe):
        check_source(recipe)
    require_possible(recipe.train, recipe.checkpoint, recipe.cluster.num_workers)
    require_posterior(recipe.model, recipe.encode)
    require_pairs_are_taken(recipe.pairs, recipe.model.kind)


def check_address(recipe: Recipe) -> None:
    """ConfigError if the recipe needs a cluster or job server and neither it nor the environment names one."""
    from pipelines.cluster.job_client import job_address
    from pipelines.cluster.session import cluster_address

    if recipe.cluster.kind == "job":
        job_address(recipe.cluster)
    elif recipe.cluster.num_workers > 0:
        cluster_address(recipe.cluster)


def stages(recipe: Recipe) -> list[str]:
    """Return the steps of a pipeline before evaluate, in order."""
    return ["train", "encode"] if recipe.tree.get("data") else ["shard", "train", "encode"]


def run_stages(recipe: Recipe, run: RunStage) -> Tree:
    """Run all steps of a pipeline with `run(name, recipe of the step)`, evaluate if the dataset has the split; return summaries by name.

    Steps that first finish what an earlier tick began are named with BEFORE.
    """
    from aecore.data.dataset import open_dataset

    summaries: Tree = {}
    data = stage(recipe, "evaluate").require("data")
    if "shard" in stages(recipe):
        summaries["shard"] = run("shard", stage(recipe, "shard"))
    missing = missing_split(recipe, data, open_dataset(data).manifest.splits)  # checked before hours of work
    *before, last = rounds(recipe, data)
    for each in (*before, last):
        logger.info("%s: %s", f"{recipe.require('out')}/{each.run}", each.why)
        for name in ("train", "encode", "evaluate"):
            part = stage(recipe, name, each)
            skipped = {"step": name, "dataset": data, "not_evaluated": missing, "seconds": 0.0}
            done = skipped if name == "evaluate" and missing is not None else run(name, part)
            summaries[name if each is last else f"{BEFORE}{name}"] = done
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
