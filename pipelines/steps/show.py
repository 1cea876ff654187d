"""`aepipe show` and `aepipe verify`: any kind of artefact, or a root that holds several. Reads only."""

import dataclasses
import json

from aecore.artifact.documents import CLAIM, read_bytes, read_json
from aecore.artifact.kinds import Artifact, detect_artifact
from aecore.artifact.subset import parse_subset
from aecore.errors import ConfigError, DataError
from aecore.store import Store, absolute_url, open_store
from pipelines.recipe.yaml import Tree


def located(store: Store) -> Artifact:
    """Return the artefact at a URL; DataError if there is none."""
    found = detect_artifact(store)
    if found is None:
        raise DataError(f"{store.url} holds no dataset, run or table: check the address; `aepipe shard`, `train` and `encode` write them")
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
    }


def _table(store: Store) -> Tree:
    from aecore.table.table import open_table
    from pipelines.steps.steps import table_summary

    return table_summary(open_table(store.url).manifest)


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
        "checkpoint_sha256": done.checkpoint_sha256 if done else None,
        "metrics": metrics or None,
        "checkpoints": [name for _, name in committed_checkpoints(store)],
        "data": claim["info"]["data"],
        "identity": claim["identity"],
    }


def _checkpoint(store: Store) -> Tree:
    from aecore.checkpoint.files import read_checkpoint

    checkpoint = read_checkpoint(store, "", verify=False)
    return {
        "step": checkpoint.step,
        "checkpoint_sha256": checkpoint.sha256,
        "files": {ref.name: ref.bytes for ref in checkpoint.files},
        "info": dict(checkpoint.info),
        "config": json.loads(read_bytes(store, "config.json", ref=checkpoint.file("config.json"))),
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
    (default: where it was encoded from; in a root: its own `dataset/`): each row is looked up in its indexes.

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
    kind = found.kind
    if dataset is not None:
        _require_comparable(store, found, dataset)
    if found.is_unfinished:
        raise DataError(f"{store.url} is an unfinished {kind}: run the command that wrote it again to finish it")
    if found.is_generated:
        raise DataError(f"{store.url} holds {found.name}: no hashes of them are kept; the same command elsewhere makes the same")
    if kind == "dataset":
        from aecore.data.dataset import open_dataset
        from aecore.data.read.verify import verify_dataset

        checked = verify_dataset(open_dataset(store.url), read_data=read_data, only=only)
        if checked.problems:
            raise DataError("\n".join(checked.problems))
        facts = dataclasses.asdict(checked)
        del facts["problems"]  # none, or they were raised
        return {"kind": kind, "url": store.url, "read_data": facts.pop("data_read"), **facts}
    if kind == "table":
        from aecore.table.table import open_table
        from aecore.table.verify import verify_table

        facts = verify_table(open_table(store.url), read_data=read_data, dataset_url=dataset, only=only).to_dict()
        return {"kind": kind, "url": facts.pop("url"), "rows": facts.pop("num_rows"), **facts}
    if kind == "run":
        return _verify_run(store, read_data)
    if kind == "checkpoint":
        from aecore.checkpoint.files import read_checkpoint

        checkpoint = read_checkpoint(store, "")
        return {"kind": kind, "url": store.url, "checkpoint_sha256": checkpoint.sha256, "files": len(checkpoint.files)}
    own = f"{store.url}/dataset" if "dataset" in found.stages else None  # a root may have been moved as a whole
    stages: Tree = {}
    for name in found.stages:
        if name == "run" and located(place := open_store(f"{store.url}/run")).kind == "run":
            stages[name] = _verify_run(place, read_data, own)
        else:
            where = (dataset if dataset is not None else own) if name == "table" else None
            stages[name] = verify(f"{store.url}/{name}", read_data=read_data, dataset=where, subset=subset)
    return {"kind": kind, "url": store.url, **stages}


def _verify_run(store: Store, read_data: bool, dataset: str | None = None) -> Tree:
    """Check a run, and with `read_data` what it was trained on: a dataset where it was then, or at `dataset`."""
    from aecore.training.verify import verify_run

    run = verify_run(store, read_data=read_data, dataset_url=dataset)
    if run.problems:
        raise DataError("\n".join(run.problems))
    return {"kind": "run", "url": store.url, "checkpoints": list(run.checkpoints), "files": run.files, "finished": run.finished}


def _require_comparable(store: Store, found: Artifact, dataset: str) -> None:
    """ConfigError if there is no table to compare with `dataset`; checks that it exists, before data is read."""
    from aecore.data.dataset import open_dataset

    if found.kind != "table" and "table" not in found.stages:
        raise ConfigError(
            f"--dataset {dataset} names the dataset of a table, but {store.url} is a {found.kind} without a table: leave it out"
        )
    open_dataset(absolute_url(dataset, "--dataset"))
