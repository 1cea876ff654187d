"""What a pipeline does with its model: which run a tick trains and encodes with, decided from what is on disk alone.

A run is pinned to the generation of the dataset that its claim names. `refresh.policy` decides whether a later generation, if it changes
what the run was trained on, gets another run. So a tick without a change finds everything done, and one that was killed is continued by
the next one, wherever and whenever that is: a run that is not finished, or has no table yet, comes before a new one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aecore.artifact.commit import newest_number
from aecore.artifact.documents import CLAIM, read_json
from aecore.artifact.root import folder_of, generation_of, stage_folders
from aecore.checkpoint.files import MANIFEST
from aecore.errors import ConfigError
from aecore.store import open_store
from pipelines.recipe.recipe import Recipe
from pipelines.recipe.yaml import Tree
from pipelines.steps.steps import urls_at


@dataclass(frozen=True, slots=True)
class Round:
    """One run of a root and what follows it: train, encode, evaluate.

    Parameters
    ----------
    suffix : int
        The number in the names of its folders; 0: `run/` and `table/`.
    why : str
        Why this run, for the log.
    starts_from : str or None
        The run whose weights are its start, as its claim says or is to say. The recipe decides that of the first run.
    is_new : bool
        Nothing of it is there yet.
    """

    suffix: int
    why: str
    starts_from: str | None = None
    is_new: bool = False

    @property
    def run(self) -> str:
        """The folder of its run."""
        return folder_of("run", self.suffix)

    @property
    def table(self) -> str:
        """The folder of its table."""
        return folder_of("table", self.suffix)

    def recipe_of_run(self, tree: Tree) -> Tree:
        """Return the tree of the recipe that trains its run: later ones start where their claims say, whatever the policy is today."""
        if not self.suffix:
            return tree
        train = {key: value for key, value in (tree.get("train") or {}).items() if key != "init_from"}
        return {**tree, "train": train if self.starts_from is None else {**train, "init_from": self.starts_from}}

    def to_dict(self) -> Tree:
        """Return plain JSON data, for a dry run."""
        start = {} if self.starts_from is None else {"starts_from": self.starts_from}
        return {"run": self.run, "table": self.table, "why": self.why, "new_run": self.is_new, **start}


FIRST = Round(0, "the first run", is_new=True)


def rounds(recipe: Recipe, data: str) -> list[Round]:
    """Return the runs that a tick finishes or makes, in order; the last one is the one whose table is up to date afterwards.

    `data` is the pipeline's dataset, which exists. ConfigError if the policy needs to know what a run was trained on, which its claim does
    not say.
    """
    newest = _newest(recipe)
    if newest is None:
        return [FIRST]
    root, policy = recipe.require("out"), recipe.refresh.policy
    store = open_store(f"{root}/{folder_of('run', newest)}")
    claim = read_json(store, CLAIM)
    there, now = claim["info"]["dataset_number"], newest_number(open_store(data), "dataset") or 0
    published = store.size(f"model/{MANIFEST}") is not None
    done = published and newest_number(open_store(f"{root}/{folder_of('table', newest)}"), "table") is not None
    known = Round(newest, _why(policy, there, now, published=published, done=done), _start_of(root, claim))
    if policy == "keep" or now <= there:
        return [known]
    if not there:
        raise ConfigError(
            f"refresh.policy={policy} trains again when a generation changes what a run is trained on, and {store.url} read tars without "
            "generations (input.reader=webdataset): use refresh.policy=keep"
        )
    if not _trains_on_other_data(recipe, data, claim):
        return [Round(newest, f"generation {now} changes nothing that {known.run} is trained on", known.starts_from)]
    start = f"{root}/{known.run}" if policy == "continue" else urls_at(recipe, ["train.init_from"]).get("train.init_from")
    why = f"refresh.policy={policy}: generation {now} changes what {known.run} was trained on, which was generation {there}"
    return [*([] if done else [known]), Round(now, why, start, is_new=True)]


def _newest(recipe: Recipe) -> int | None:
    """Return the suffix of the newest run that was claimed; None if there is none."""
    root = open_store(recipe.require("out"))
    claimed = (name for name in reversed(stage_folders(root.list(), "run")) if root.size(f"{name}/{CLAIM}") is not None)
    return next(map(generation_of, claimed), None)


def _why(policy: str, there: int, now: int, *, published: bool, done: bool) -> str:
    if not published:
        return f"its training on generation {there} was not finished"
    if not done:
        return "its table was not made"
    return f"refresh.policy={policy}: it encodes generation {now} too" if now > there else f"it is of generation {there}, the newest"


def _start_of(root: str, claim: Mapping[str, Any]) -> str | None:
    """Return the run that a claim names as the start; the one of this root if the root was moved since."""
    recorded = claim["info"].get("init_from")
    if recorded is None:
        return None
    moved = f"{root}/{str(recorded).rpartition('/')[2]}"
    is_there = [open_store(url).size(f"model/{MANIFEST}") is not None for url in (str(recorded), moved)]
    return moved if is_there == [False, True] else str(recorded)


def _trains_on_other_data(recipe: Recipe, data: str, claim: Mapping[str, Any]) -> bool:
    """Return whether the splits that a run reads have other samples now than those of its claim."""
    from aecore.data.dataset import open_dataset

    dataset, train = open_dataset(data), recipe.train
    splits = [split for split in (train.split, train.val_split) if split is not None]
    return bool({split: dataset.training_key(split) for split in splits} != claim["identity"]["data"])
