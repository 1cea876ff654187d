"""The steps and their table: a recipe in, a plain JSON summary out. Command line, flows and Ray jobs call the same functions.

A step takes its sections of the recipe, gets workers from `cluster/` and calls the function of `aecore`. Imports are inside the
functions. Every step can be called again after a kill: what is committed is found, not made again.

`STEPS` alone declares what a step reads of a recipe. Keys of jobs, absolute addresses, the URLs of a pipeline, dry runs, flows and
deployments are derived from it, and a step that is called through it cannot read anything else.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from aecore.artifact.documents import parse_json
from aecore.errors import ConfigError, DataError, StoreError
from aecore.store import absolute_url, open_store
from pipelines.recipe.recipe import SECTIONS, ClusterSpec, Recipe, build_section
from pipelines.recipe.yaml import Tree, value_at
from pipelines.steps.progress import Report, TrainWatch, on_part, silent

logger = logging.getLogger(__name__)
FILES = ("source.classes",)  # options that may be files, which the process that runs a step reads


@dataclass(frozen=True, slots=True)
class Step:
    """A step and what it reads of a recipe: only these sections, these addresses and `cluster`.

    Parameters
    ----------
    run : callable
        `run(recipe, report, dry_run=...)`, the function of the step.
    sections : tuple of str
        Sections whose identity knobs decide what the step makes.
    addresses : tuple of str
        Keys of the recipe that hold a URL which the step reads or writes: at the top, or inside one of the sections.
    makes : str or None
        The artefact that the step writes to `out`; None if it writes none.
    """

    run: Callable[..., Tree]
    sections: tuple[str, ...]
    addresses: tuple[str, ...]
    makes: Literal["dataset", "run", "table"] | None

    def __call__(self, recipe: Recipe, report: Report = silent, *, dry_run: bool = False, **options: Any) -> Tree:  # any: of the step
        """Run the step, with absolute addresses since workers have another working directory."""
        reads = (*self.sections, *self.addresses, "cluster")
        return self.run(Recipe(with_absolute_urls(recipe, self.addresses)).only(reads), report, dry_run=dry_run, **options)


def urls_at(recipe: Recipe, addresses: Iterable[str]) -> dict[str, str]:
    """Return address -> absolute URL of those of these addresses that the recipe gives."""
    given = {address: value_at(recipe.tree, address) for address in addresses}
    return {address: absolute_url(url, address) for address, url in given.items() if url and isinstance(url, str)}  # no list of names


def with_absolute_urls(recipe: Recipe, addresses: Iterable[str] | None = None) -> Tree:
    """Return the tree of a recipe with these addresses (default: all) and its `FILES` absolute, for a process in another directory."""
    tree: Tree = json.loads(json.dumps(recipe.tree))
    for address, url in urls_at(recipe, [*(ADDRESSES if addresses is None else addresses), *FILES]).items():
        *above, key = address.split(".")
        (tree[above[0]] if above else tree)[key] = url
    return tree


def shard(recipe: Recipe, report: Report = silent, *, dry_run: bool = False, samples: int | None = None) -> Tree:
    """Write `source` as a dataset to `out`, or make the one that is there follow it. A dry run estimates what `samples` would take."""
    from aecore.data.write.job import shard_dataset

    make = shard_dataset if samples is None else functools.partial(shard_dataset, samples=samples)
    return _dataset("shard", make, recipe, report, dry_run=dry_run)


def adopt(recipe: Recipe, report: Report = silent, *, dry_run: bool = False) -> Tree:
    """Index the tars of `source` in place, as the dataset `out`, or make the one that is there follow them."""
    from aecore.data.write.job import adopt_shards

    return _dataset("adopt", adopt_shards, recipe, report, dry_run=dry_run)


def _dataset(name: str, make: Callable[..., Any], recipe: Recipe, report: Report, *, dry_run: bool) -> Tree:
    from aecore.data.manifest import DatasetManifest
    from pipelines.cluster.fanout import ray_fan_out

    check_source(recipe)
    started, out = time.perf_counter(), recipe.require("out")
    workers = recipe.cluster.num_workers
    made = make(
        recipe.source,
        out,
        recipe.splits,
        recipe.shards,
        fan_out=ray_fan_out(recipe.cluster, *urls_at(recipe, STEPS[name].addresses).values()),
        dry_run=dry_run,
        on_part=on_part(name, "shards", report, milestones=workers > 0),
        about=recipe.about,
    )
    if isinstance(made, DatasetManifest):
        facts = {**dataset_summary(made), **_equal_content(out, made)}
    else:
        facts = {name: value for name, value in dataclasses.asdict(made).items() if name != "estimate" or value is not None}
    return {"step": name, "dataset": out, **facts, "dry_run": dry_run, "seconds": _since(started)}


def _equal_content(out: str, made: Any) -> Tree:
    """Return what the report of a generation says of equal content; nothing if it cannot be read: the log says why."""
    from aecore.data.dataset import Dataset
    from aecore.data.write.report import read_report

    with contextlib.suppress(DataError, StoreError):  # the generation is committed, whatever happens here
        report = read_report(Dataset(open_store(out), made)) or {}
        return {name: report[name] for name in ("left_out", "duplicates", "leaks", "contradicting_labels") if name in report}
    return {}


def check_source(recipe: Recipe) -> None:
    """ConfigError that shows an example if the source needs an address and has none."""
    if getattr(recipe.source, "url", None) == "":
        raise ConfigError("source.url is missing: add source.url=..., for example source.url=/data/images")


def dataset_summary(manifest: Any) -> Tree:
    """Return the counts of live samples of a dataset manifest as plain JSON.

    With `bags` if they are in bags, and of a dataset that follows its source what was removed from its shards and their quarantine.
    """
    bags = {split: manifest.num_groups(split) for split in manifest.splits}
    removed = {split: sum(shard.samples - shard.live for shard in shards) for split, shards in manifest.splits.items()}
    refused = sum(part.removed.quarantined for part in manifest.parts if part.removed is not None)
    return {
        "generation": manifest.number,
        "samples": {split: manifest.num_samples(split) for split in manifest.splits},
        **({"bags": bags} if any(bags.values()) else {}),
        "shards": len(manifest.shards),
        "bytes": sum(shard.tar.bytes for shard in manifest.shards),
        "classes": len(manifest.classes),
        "quarantined": manifest.quarantined,
        "reasons": dict(manifest.reasons),
        **({"removed": removed, "removed_quarantined": refused} if manifest.has_removed else {}),
        **({} if manifest.removal is None else {"removal": manifest.removal}),
        "dataset_sha256": manifest.dataset_sha256,
        **({} if manifest.content_sha256 is None else {"content_sha256": manifest.content_sha256}),
        **({} if manifest.about is None else {"about": dict(manifest.about)}),
    }


def train(recipe: Recipe, report: Report = silent, *, dry_run: bool = False) -> Tree:
    """Train on `data` and publish the model under `out`."""
    from aecore.training.result import finished_run
    from pipelines.cluster.train import train as train_job

    started, job, cluster = time.perf_counter(), train_job_of(recipe), recipe.cluster
    if dry_run:
        return _train_plan(job, cluster.num_workers)
    store = open_store(job.out)
    before = finished_run(store)
    watch = TrainWatch(store, report, milestones=cluster.num_workers > 0)
    result = train_job(job, cluster, watch)
    watch.look()
    numbers = {name: value for name, value in result.metrics.items() if name not in ("step", "epoch", "samples")}
    return {
        "step": "train",
        "run": job.out,
        "model": result.model_url,
        "made": before is None,
        "steps": result.step,
        "epoch": result.metrics.get("epoch"),
        "metrics": numbers,
        "checkpoint_sha256": result.checkpoint_sha256,
        "seconds": _since(started),
    }


def train_job_of(recipe: Recipe) -> Any:
    """Return the `aecore.training.job.TrainJob` of a recipe."""
    from aecore.training.job import TrainJob, require_streamable

    given = recipe.tree.get("source")  # no section of this step: it only may not ask for what would have no effect
    require_streamable(recipe.train, recipe.input, build_section("source", given) if given else None)
    parts = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(TrainJob) if field.name in SECTIONS}
    return TrainJob(data=recipe.require("data"), out=recipe.require("out"), **parts)


def _train_plan(job: Any, num_workers: int) -> Tree:
    """Return what `train` would do with this number of workers (0: in this process); writes nothing."""
    from contextlib import closing

    from aecore.training.ranks import Rank
    from aecore.training.session import Session

    with closing(Session(job, Rank(world_size=max(num_workers, 1)))) as session:
        return {"step": "train", "run": job.out, "dry_run": True, **session.plan()}


def encode(recipe: Recipe, report: Report = silent, *, dry_run: bool = False) -> Tree:
    """Encode `data` with the model of `run` into the table at `out`."""
    from aecore.artifact.commit import newest_number
    from aecore.encoding.job import encode_dataset
    from aecore.table.manifest import TableManifest
    from pipelines.cluster.fanout import ray_fan_out
    from pipelines.cluster.session import require_gpu_is_there

    started, cluster = time.perf_counter(), recipe.cluster
    run, data, out = recipe.require("run"), recipe.require("data"), recipe.require("out")
    if cluster.num_workers == 0:
        require_gpu_is_there(cluster)
    before = newest_number(open_store(out), "table")
    made = encode_dataset(
        run,
        data,
        out,
        recipe.encode,
        device="cuda" if cluster.use_gpu else "cpu",
        threads=cluster.threads_per_worker,
        fan_out=ray_fan_out(cluster, *urls_at(recipe, STEPS["encode"].addresses).values()),
        dry_run=dry_run,
        on_part=on_part("encode", "parts", report, milestones=cluster.num_workers > 0),
    )
    facts = {"made": made.number != before, **table_summary(made)} if isinstance(made, TableManifest) else made.to_dict()
    return {"step": "encode", "table": out, **facts, "dry_run": dry_run, "seconds": _since(started)}


def table_summary(manifest: Any) -> Tree:
    """Return the counts of a table manifest as plain JSON."""
    return {
        "generation": manifest.number,
        "rows": manifest.num_rows,
        "parts": len(manifest.parts),
        "quarantined": manifest.quarantined,
        "columns": dict(manifest.columns),
        "lineage": {**manifest.lineage, "encoded_by": [_producer(each) for each in manifest.lineage["encoded_by"]]},
    }


def _producer(facts: Mapping[str, str]) -> Tree:
    """Return what a lineage says of an encoder, with its versions as a section, if they are one."""
    with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):  # no JSON: shown as it is stated
        versions = parse_json(facts["versions"])
        if all(isinstance(version, str) for version in versions.values()):
            return {**facts, "versions": versions}
    return {**facts}


def evaluate(recipe: Recipe, report: Report = silent, *, dry_run: bool = False) -> Tree:
    """Evaluate the model of `run` on one split of `data`.

    In this process, or with cluster.kind=address on one worker of the cluster, which has the GPUs and the memory.
    """
    from pipelines.cluster.fanout import call_on_worker

    started, cluster = time.perf_counter(), recipe.cluster
    run, data = recipe.require("run"), recipe.require("data")
    if dry_run:
        return {"step": "evaluate", "dry_run": True, "run": run, "dataset": data, **_evaluation_plan(run, data, recipe.evaluate)}
    here = functools.partial(_evaluate_here, run, data, recipe.evaluate, cluster)
    result = call_on_worker(cluster, here, *urls_at(recipe, STEPS["evaluate"].addresses).values()) if cluster.kind == "address" else here()
    return {"step": "evaluate", "run": run, "dataset": data, **result, "seconds": _since(started)}


def _evaluation_plan(run: str, data: str, spec: Any) -> Tree:
    """Return what would be evaluated; checks model, data and the requirements of the scores, and reads no sample."""
    from aecore.evaluate import open_for_evaluation

    dataset, loaded = open_for_evaluation(run, data, spec, "cpu")
    if spec.figures is not None:
        from aecore.data.format.pictures import require_matplotlib

        require_matplotlib()
    return {
        "split": spec.split,
        "samples": dataset.manifest.num_samples(spec.split),
        "model": loaded.config.model.kind,
        "figures": spec.figures,
    }


def _evaluate_here(run: str, data: str, spec: Any, cluster: ClusterSpec) -> Tree:
    import torch

    from aecore.evaluate import evaluate
    from aecore.training.ranks import Rank
    from pipelines.cluster.memory import disable_malloc_trim
    from pipelines.cluster.session import require_gpu_is_there

    require_gpu_is_there(cluster)
    torch.set_num_threads(cluster.threads_per_worker)
    disable_malloc_trim()
    rank = Rank(device="cuda" if cluster.use_gpu else "cpu")
    if spec.figures is None:
        return evaluate(run, data, spec, rank=rank).to_dict()
    from aecore.data.format.pictures import require_matplotlib
    from aecore.report.figures import write_figures

    require_matplotlib()
    scores = evaluate(run, data, spec, rank=rank).to_dict()
    return {**scores, "figures": write_figures(run, data, spec.figures, spec, device=rank.device)}


STEPS: dict[str, Step] = {
    "shard": Step(
        run=shard,
        sections=("source", "splits", "shards", "about"),
        addresses=("source.url", "out"),
        makes="dataset",
    ),
    "adopt": Step(
        run=adopt,
        sections=("source", "splits", "shards", "about"),
        addresses=("source.url", "out"),
        makes="dataset",
    ),
    "train": Step(
        run=train,
        sections=("model", "backbone", "transform", "optim", "train", "checkpoint", "input", "pairs"),
        addresses=("data", "train.init_from", "out"),
        makes="run",
    ),
    "encode": Step(
        run=encode,
        sections=("encode",),
        addresses=("run", "data", "out"),
        makes="table",
    ),
    "evaluate": Step(
        run=evaluate,
        sections=("evaluate",),
        addresses=("run", "data", "evaluate.figures"),
        makes=None,
    ),
}
ADDRESSES = tuple(dict.fromkeys(address for step in STEPS.values() for address in step.addresses))


def _since(started: float) -> float:
    return round(time.perf_counter() - started, 2)
