"""`aepipe show` and `aepipe verify`: any kind of artefact, or a root that holds several. Reads only."""

import dataclasses
from typing import Any

from aecore.artifact.documents import CLAIM, read_json
from aecore.artifact.kinds import Artifact, detect_artifact
from aecore.artifact.root import folder_of, generation_of, stage_of
from aecore.artifact.subset import VerifySubset, parse_subset
from aecore.errors import ConfigError, DataError
from aecore.store import Store, absolute_url, open_store
from pipelines.recipe.yaml import Tree


def located(store: Store) -> Artifact:
    """Return the artefact at a URL; DataError if there is none."""
    found = detect_artifact(store)
    if found is None:
        there = ", ".join(store.list()[:8])
        text = f"{store.url} holds no dataset, run or table{f' (it has: {there})' if there else ''}: check the address; "
        raise DataError(f"{text}`aepipe shard`, `train` and `encode` write them")
    return found


def show(url: str) -> Tree:
    """Return a summary of the artefact at `url` (plain JSON): manifests are read, data is not."""
    store = open_store(url)
    found = located(store)
    if found.kind == "root":
        return {"kind": found.kind, "url": store.url, **{name: show(f"{store.url}/{name}") for name in found.stages}}
    if found.is_unfinished:
        return {"kind": "unfinished", "url": store.url, "of": found.kind, **_unfinished(store, found)}
    if found.is_generated:
        return {"kind": found.kind, "url": store.url, "what": found.name, **read_json(store, str(found.file))}
    return {"kind": found.kind, "url": store.url, **_SHOW[found.kind](store)}


def _dataset(store: Store) -> Tree:
    from aecore.data.dataset import open_dataset
    from pipelines.steps.steps import dataset_summary

    dataset = open_dataset(store.url)
    manifest = dataset.manifest
    homes = sorted({dataset.tars(shard).url for shard in manifest.shards if shard.tar_base_url is not None})
    return {
        **dataset_summary(manifest),
        **({"adopted_from": homes} if homes else {}),
        "shapes": dict(manifest.sample.shapes),
        "extensions": dict(manifest.sample.extensions),
        "class_names": list(manifest.classes),
        "identity": dict(manifest.identity),
        "report": _report(dataset),
    }


def _report(dataset: Any) -> Tree:
    """Return the report of a generation, or the `state` of one that is missing or damaged: the next run of `shard` makes it again."""
    from aecore.data.write.report import read_report

    try:
        report = read_report(dataset)
    except DataError as error:
        return {"state": f"damaged, the next run of aepipe shard makes it again: {error}"}
    return {"state": "missing, the next run of aepipe shard makes it"} if report is None else report


def _table(store: Store) -> Tree:
    from aecore.table.table import open_table
    from pipelines.steps.steps import table_summary

    return table_summary(open_table(store.url).manifest)


def table_files(url: str, *, sql: bool = False) -> Tree:
    """Return the `files` of the newest generation of the table at `url`, or with `sql` the `sql` of a view of them.

    In a root it is its newest table. ConfigError if there is another kind of artefact.
    """
    from aecore.table.table import open_table

    store = open_store(url)
    found = located(store)
    if found.kind != "table" and found.newest("table") is None:
        raise ConfigError(f"{store.url} holds {found.name}: --files and --sql are of a latent table")
    table = open_table(store.url)
    return {"sql": table.sql()} if sql else {"files": table.files()}


def _run(store: Store) -> Tree:
    from aecore.checkpoint.files import committed_checkpoints
    from aecore.training.metrics import last_epoch
    from aecore.training.result import finished_run

    claim, done = read_json(store, CLAIM), finished_run(store)
    metrics = dict(done.metrics) if done else last_epoch(store) or {}
    return {
        "finished": done is not None,
        "step": done.step if done else metrics.get("step", 0),
        "total_steps": claim["info"]["total_steps"],
        "model": done.model_url if done else None,
        "input_shape": _input_shape(store),
        "checkpoint_sha256": done.checkpoint_sha256 if done else None,
        "metrics": metrics or None,
        "checkpoints": [name for _, name in committed_checkpoints(store)],
        "data": claim["info"]["data"],
        "dataset_generation": claim["info"].get("dataset_number"),
        **({"init_from": claim["info"]["init_from"]} if "init_from" in claim["info"] else {}),
        "identity": claim["identity"],
    }


def _input_shape(store: Store) -> list[int] | None:
    """Return the shape of a run's samples, images as `[C, H, W]`, as its model or newest checkpoint says; None if it has none yet."""
    from aecore.checkpoint.files import committed_checkpoints

    for name in ("model", *(name for _, name in committed_checkpoints(store))):
        if store.size(f"{name}/config.json") is not None:
            found: list[int] | None = read_json(store, f"{name}/config.json").get("input_shape")
            return found
    return None


def _checkpoint(store: Store) -> Tree:
    from aecore.checkpoint.files import read_checkpoint

    checkpoint = read_checkpoint(store, "", verify=False)
    return {
        "step": checkpoint.step,
        "checkpoint_sha256": checkpoint.sha256,
        "files": {ref.name: ref.bytes for ref in checkpoint.files},
        "info": dict(checkpoint.info),
        "config": read_json(store, "config.json", ref=checkpoint.file("config.json")),
    }


_SHOW = {"dataset": _dataset, "table": _table, "run": _run, "checkpoint": _checkpoint}


def _unfinished(store: Store, found: Artifact) -> Tree:
    return {
        "recorded_parts": sum(name.endswith(".json") for name in store.list("records")),
        "identity": read_json(store, str(found.file))["identity"],
    }


def verify(url: str, *, read_data: bool = False, dataset: str | None = None, subset: str | None = None) -> Tree:
    """Check the artefact at `url` and return what was checked; DataError lists all problems.

    Without `read_data` names and sizes are checked, with it every byte against its sha256, with `subset` (`k/n`) those of the shards
    and parts of one slice; the small files of a run are always read. `dataset` is the current URL of the dataset of a table
    (default: where it was encoded from; in a root: its own `dataset/`): each row is looked up in its indexes. A table of a root has
    to belong to the run of the same suffix, if there is one. What is not complete is a problem as well.

    Raises
    ------
    ConfigError
        `dataset` is given where there is no table to compare with it, `subset` is no `k/n` or comes with `read_data`.
    """
    if subset is not None and read_data:
        raise ConfigError(f"--read-data reads everything and --read-data-subset {subset} a part of it: leave out one of them")
    only = None if subset is None else parse_subset(subset)
    store = open_store(url)
    found = located(store)
    if dataset is not None:
        _require_comparable(store, found, dataset)
    return _verify(store, found, read_data, only, dataset)


def _verify(
    store: Store, found: Artifact, read_data: bool, only: VerifySubset | None, dataset: str | None = None, run: str | None = None
) -> Tree:
    """Check what is located at a URL; `dataset` and `run` are those that it has to belong to."""
    if found.is_unfinished:
        raise DataError(_unfinished_text(store, found.kind))
    if found.is_generated:
        raise DataError(f"{store.url} holds {found.name}: no hashes of them are kept; the same command elsewhere makes the same")
    facts = {
        "dataset": lambda: _verify_dataset(store, read_data, only),
        "table": lambda: _verify_table(store, read_data, only, dataset, run),
        "run": lambda: _verify_run(store, read_data, dataset),
        "checkpoint": lambda: _verify_checkpoint(store),
        "root": lambda: _verify_root(store, found, read_data, only, dataset),
    }[found.kind]()
    if only is not None:
        facts.pop("read_data", None)  # neither all nor nothing: `slice` says what was read
    return {"kind": found.kind, "url": store.url, **facts}


def _verify_root(store: Store, found: Artifact, read_data: bool, only: VerifySubset | None, dataset: str | None) -> Tree:
    """Check all artefacts of a root, and that they belong to each other; a root may have been moved as a whole."""
    own = {name: f"{store.url}/{name}" for name in found.stages}
    stages: Tree = {}
    problems = []
    for name, url in own.items():
        place = open_store(url)
        stage = stage_of(name)
        data = (dataset if dataset is not None and stage == "table" else own.get("dataset")) if stage != "dataset" else None
        run = own.get(folder_of("run", generation_of(name))) if stage == "table" else None
        try:
            stages[name] = _verify(place, located(place), read_data, only, data, run)
        except DataError as error:
            problems.append(str(error))
    if problems:  # one of the dataset may be met by the others as well
        raise DataError("\n".join(dict.fromkeys("\n".join(problems).split("\n"))))
    ignored = [name for name in store.list() if name not in own]
    return stages | ({"not_looked_at": ignored} if ignored else {})


def _verify_dataset(store: Store, read_data: bool, only: VerifySubset | None) -> Tree:
    from aecore.data.dataset import open_dataset
    from aecore.data.read.verify import verify_dataset

    checked = verify_dataset(open_dataset(store.url), read_data=read_data, only=only)
    if checked.problems:
        raise DataError("\n".join(checked.problems))
    facts = dataclasses.asdict(checked)
    del facts["problems"]  # none, or they were raised
    return {"read_data": facts.pop("data_read"), **facts}


def _verify_table(store: Store, read_data: bool, only: VerifySubset | None, dataset: str | None, run: str | None) -> Tree:
    from aecore.table.table import open_table
    from aecore.table.verify import verify_table

    facts = verify_table(open_table(store.url), read_data=read_data, dataset_url=dataset, run_url=run, only=only).to_dict()
    del facts["url"]
    return {"rows": facts.pop("num_rows"), **facts}


def _verify_run(store: Store, read_data: bool, dataset: str | None) -> Tree:
    """Check a run, and with `read_data` what it was trained on: a dataset where it was then, or at `dataset`."""
    from aecore.training.verify import verify_run

    run = verify_run(store, read_data=read_data, dataset_url=dataset)
    problems = [*run.problems, *([] if run.finished else [_unfinished_text(store, "run")])]
    if problems:
        raise DataError("\n".join(problems))
    return {"checkpoints": list(run.checkpoints), "files": run.files, "finished": run.finished}


def _verify_checkpoint(store: Store) -> Tree:
    from aecore.checkpoint.files import read_checkpoint

    checkpoint = read_checkpoint(store, "")
    return {"checkpoint_sha256": checkpoint.sha256, "files": len(checkpoint.files)}


def _unfinished_text(store: Store, kind: str) -> str:
    return f"{store.url} is an unfinished {kind}: run the command that wrote it again to finish it"


def _require_comparable(store: Store, found: Artifact, dataset: str) -> None:
    """ConfigError if there is no table to compare with `dataset`; checks that it exists, before data is read."""
    from aecore.data.dataset import open_dataset

    if found.kind != "table" and found.newest("table") is None:
        raise ConfigError(
            f"--dataset {dataset} names the dataset of a table, but {store.url} is a {found.kind} without a table: leave it out"
        )
    open_dataset(absolute_url(dataset, "--dataset"))
