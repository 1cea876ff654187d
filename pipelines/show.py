"""What lies at a URL, and whether it is whole: a dataset, a run, a latent table, or a root that holds all three. Reads only."""

import dataclasses

from aecore.errors import ConfigError, DataError
from aecore.generations import newest_number, read_json
from aecore.kinds import generated_here
from aecore.slices import parse_slice
from aecore.store import Store, absolute_url, open_store
from pipelines.tree import Tree

STAGE_FOLDERS = ("dataset", "run", "table")


def kind_of(store: Store) -> str:
    """Return dataset, table, run, unfinished, root or generated; DataError if the place holds none of our artefacts."""
    for kind in ("dataset", "table"):
        if newest_number(store, kind) is not None:
            return kind
    if store.size("run.000001.json") is not None:
        return "run" if "model" in read_json(store, "run.000001.json")["identity"] else "unfinished"
    if any(open_store(f"{store.url}/{name}").list() for name in STAGE_FOLDERS):
        return "root"
    if generated_here(store) is not None:
        return "generated"
    raise DataError(f"{store.url} holds no dataset, run or table: check the address; `aepipe shard`, `train` and `encode` write them")


def show(url: str) -> Tree:
    """Return a summary of the artefact at `url` (plain JSON): manifests are read, data is not."""
    store = open_store(url)
    kind = kind_of(store)
    if kind == "root":
        found = [name for name in STAGE_FOLDERS if open_store(f"{store.url}/{name}").list()]
        return {"kind": kind, "url": store.url, **{name: show(f"{store.url}/{name}") for name in found}}
    return {"kind": kind, "url": store.url, **_SHOW[kind](store)}


def _dataset(store: Store) -> Tree:
    from aecore.data.dataset import open_dataset
    from pipelines.steps import dataset_summary

    dataset = open_dataset(store.url)
    manifest = dataset.manifest
    homes = sorted({dataset.tars(shard).url for shard in manifest.shards if shard.home is not None})
    return {
        **dataset_summary(manifest),
        **({"adopted_from": homes} if homes else {}),
        "shapes": dict(manifest.sample.shapes),
        "extensions": dict(manifest.sample.extensions),
        "class_names": list(manifest.classes),
        "identity": dict(manifest.identity),
    }


def _table(store: Store) -> Tree:
    from aecore.table import open_table
    from pipelines.steps import table_summary

    return table_summary(open_table(store.url).manifest)


def _run(store: Store) -> Tree:
    from aecore.checkpoint import committed_checkpoints
    from aecore.metrics import last_epoch
    from aecore.run import finished_run

    claim, done = read_json(store, "run.000001.json"), finished_run(store)
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


def _unfinished(store: Store) -> Tree:
    return {
        "recorded_parts": sum(name.endswith(".json") for name in store.list("records")),
        "identity": read_json(store, "run.000001.json")["identity"],
    }


def _generated(store: Store) -> Tree:
    found = generated_here(store)
    assert found is not None
    kind, said, manifest = found
    return {"kind": kind, "what": said, **read_json(store, manifest)}


_SHOW = {"dataset": _dataset, "table": _table, "run": _run, "unfinished": _unfinished, "generated": _generated}


def verify(url: str, *, read_data: bool = False, dataset: str | None = None, subset: str | None = None) -> Tree:
    """Check the artefact at `url` and return what was checked; DataError that lists everything that is wrong.

    Without `read_data` names and sizes are checked, with it every byte against its sha256, with `subset` (`k/n`) those of the shards
    and parts of one slice; the small files of a run are always read. `dataset` is where the dataset of a table lies now, if not
    where it was encoded from (in a root: its own `dataset/`): each row is looked up in its indexes.

    Raises
    ------
    ConfigError
        `dataset` is given where there is no table to compare with it, `subset` is no `k/n` or comes with `read_data`.
    """
    if subset is not None and read_data:
        raise ConfigError(f"--read-data reads everything and --read-data-subset {subset} a part of it: leave out one of them")
    only = None if subset is None else parse_slice(subset)
    store = open_store(url)
    kind = kind_of(store)
    if dataset is not None:
        _require_comparable(store, kind, dataset)
    if kind == "dataset":
        from aecore.data.dataset import open_dataset
        from aecore.data.verify import verify_dataset

        checked = verify_dataset(open_dataset(store.url), read_data=read_data, only=only)
        if checked.problems:
            raise DataError("\n".join(checked.problems))
        facts = dataclasses.asdict(checked)
        del facts["problems"]  # none, or they were raised
        return {"kind": kind, "url": store.url, "read_data": facts.pop("data_read"), **facts}
    if kind == "table":
        from aecore.table import open_table
        from aecore.table_verify import verify_table

        facts = verify_table(open_table(store.url), read_data=read_data, dataset_url=dataset, only=only).to_dict()
        return {"kind": kind, "url": facts.pop("url"), "rows": facts.pop("num_rows"), **facts}
    if kind == "run":
        return {"kind": kind, "url": store.url, **_verify_run(store)}
    if kind == "root":
        found = [name for name in STAGE_FOLDERS if open_store(f"{store.url}/{name}").list()]
        own = f"{store.url}/dataset" if "dataset" in found else None  # a root may have been moved as a whole
        places = {"table": dataset if dataset is not None else own}
        stages = {name: verify(f"{store.url}/{name}", read_data=read_data, dataset=places.get(name), subset=subset) for name in found}
        return {"kind": kind, "url": store.url, **stages}
    if (generated := generated_here(store)) is not None:
        raise DataError(f"{store.url} holds {generated[1]}: no hashes of them are kept; the same command elsewhere makes the same")
    raise DataError(f"{store.url} is unfinished: run the command that wrote it again to finish it")


def _require_comparable(store: Store, kind: str, dataset: str) -> None:
    """Refuse a dataset that nothing would be compared with, or that is not there, before anything is read."""
    from aecore.data.dataset import open_dataset

    if kind in ("dataset", "run") or (kind == "root" and not open_store(f"{store.url}/table").list()):
        raise ConfigError(
            f"--dataset {dataset} says where the dataset of a table lies, but {store.url} is a {kind} without a table: leave it out"
        )
    open_dataset(absolute_url(dataset, "--dataset"))


def _verify_run(store: Store) -> Tree:
    """Check every file of every committed checkpoint and of the published model (they are small: always by sha256)."""
    from aecore.checkpoint import committed_checkpoints, verify_checkpoint
    from aecore.run import finished_run

    problems, checked = [], 0
    names = [name for _, name in committed_checkpoints(store)] + (["model"] if finished_run(store) else [])
    for name in names:
        try:
            checked += len(verify_checkpoint(store, name).files)
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    return {"checkpoints": names, "files": checked, "finished": "model" in names}
