"""Encode a dataset with a trained model: rows of one shard in, one Parquet part out, each sample exactly once.

Batches are cut inside a shard, so rows, order and bytes do not depend on the number of workers. Latents are the posterior mean;
sampled columns take their noise from (seed, shard, batch). A row that does not decode, or whose latents are not finite, goes to the
quarantine with a reason. Shards that the table already knows are not read again: an append encodes the new ones only.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from aecore._base.trainable import has_posterior
from aecore.artifact.commit import PartRecord, claim_generation, commit_manifest, newest_of, recorded_parts, require_kind, require_same
from aecore.artifact.documents import CLAIM, read_bytes, read_json
from aecore.artifact.fanout import FanOut, OnPart, collect, serial
from aecore.artifact.withdrawn import made_of
from aecore.checkpoint.compatibility import check_input_shape, require_known_labels
from aecore.checkpoint.weights import LoadedModel, load_model
from aecore.data.dataset import Dataset, open_dataset
from aecore.data.format.transform import TransformSpec
from aecore.data.manifest import ShardRef
from aecore.encoding.encoder import OPTIONAL_COLUMNS, Encoder, EncodeSpec
from aecore.encoding.worker import EncodeSetup, EncodeTask, EncodeWorker, MakeEncodeWorker, recorded_part
from aecore.errors import ConfigError, RunFailed, counted
from aecore.registry import absent_values, as_recorded, to_dict
from aecore.store import Store, absolute_url, canonical_json, open_store, sha256_json
from aecore.table.manifest import STEM, TableManifest, TablePart, part_size, read_table_manifest

logger = logging.getLogger(__name__)
MAX_STREAMS = 8  # more would wait for the thread that reads and decodes, not for the model

__all__ = ["EncodePlan", "EncodeSpec", "EncodeTask", "EncodeWorker", "encode_dataset", "plan_encoding"]


@dataclass(frozen=True, slots=True)
class EncodePlan:
    """What one call of `encode_dataset` does: the parts to make, those that exist, and what the table will be.

    `parent` is the newest manifest (None: a new table); `done` are the records, by stem, of an earlier attempt that was not committed.
    """

    setup: EncodeSetup
    make_worker: MakeEncodeWorker
    identity: Mapping[str, Any]
    lineage: Mapping[str, Any]
    shards: tuple[ShardRef, ...]
    tasks: tuple[EncodeTask, ...]
    parent: TableManifest | None
    parent_sha256: str | None
    done: Mapping[str, PartRecord]

    @property
    def up_to_date(self) -> bool:
        """True if the newest generation already holds this generation of the dataset."""
        return self.parent is not None and self.parent.lineage["dataset"]["sha256"] == self.lineage["dataset"]["sha256"]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data, for a dry run."""
        known = 0 if self.parent is None else len(self.parent.parts)
        rows = sum(task.row_stop - task.row_start for task in self.tasks)
        return {"new_parts": len(self.tasks), "new_rows": rows, "known_parts": known, "identity": self.identity, "lineage": self.lineage}


def encode_dataset(
    run: str,
    data: str,
    out: str,
    spec: EncodeSpec = EncodeSpec(),  # noqa: B008  # frozen
    *,
    device: str = "cpu",
    threads: int = 1,
    fan_out: FanOut = serial,
    dry_run: bool = False,
    on_part: OnPart | None = None,
) -> TableManifest | EncodePlan:
    """Bring the latent table at `out` up to the newest generation of the dataset, and return its manifest.

    `run` is a finished run, its `model` folder or one checkpoint. Killed at any instant and called again it ends with the same rows;
    with nothing new it returns the existing manifest. `dry_run` checks everything, writes nothing and returns the plan. torch's thread
    count is set for the work and restored.

    Raises
    ------
    DataError
        No or unfitting data, a damaged shard, every row refused.
    ConfigError
        `out` belongs to another checkpoint, preprocessing or choice of columns (the differing fields are shown), or holds parts of
        another dataset.
    RunFailed
        A part failed for good (the others are kept), or another append was committed meanwhile.
    """
    plan = plan_encoding(run, data, out, spec, device=device, threads=threads)
    if dry_run:
        return plan
    if plan.parent is not None and plan.up_to_date:
        return plan.parent
    store = open_store(out)
    _claim(store, plan)
    tasks = [task for task in plan.tasks if task.stem not in plan.done]
    known_threads = torch.get_num_threads()
    try:
        made = collect(fan_out, plan.make_worker, tasks, what="parts", on_part=on_part)
    finally:
        torch.set_num_threads(known_threads)
    made_by_stem = {**plan.done, **{record.part: record for record in made}}
    manifest = _manifest(plan, [made_by_stem[task.stem] for task in plan.tasks])
    _warn(store, manifest)
    old = () if plan.parent is None else plan.parent.files
    known, dataset = set(old), plan.lineage["dataset"]
    new = [ref for ref in manifest.files if ref not in known]

    def require_continued(number: int) -> None:
        there = read_table_manifest(store, number)
        _require_same_table(store, plan.identity, there.identity, plan.setup.model_url, spec)
        _require_descendant(store, plan.shards, dataset, there)

    with made_of(dataset["url"], dataset["number"], f"{store.url}/{STEM}.{manifest.number:06d}.json"):
        commit_manifest(store, STEM, manifest.parent, manifest.to_json(), new=new, old=old, require_continued=require_continued)
    logger.info(
        "table %s: generation %d, %s, %d quarantined",
        store.url,
        manifest.number,
        counted(manifest.num_rows, "row", "rows"),
        manifest.quarantined,
    )
    return manifest


def plan_encoding(run: str, data: str, out: str, spec: EncodeSpec, *, device: str = "cpu", threads: int = 1) -> EncodePlan:
    """Load the checkpoint and the manifests, check that they fit together, and return the plan; writes nothing."""
    data_url, run_url, store = absolute_url(data, "data"), absolute_url(run, "run"), open_store(out)
    with ThreadPoolExecutor(2) as pool:  # every request to a bucket has a latency
        loading, inspecting = pool.submit(load_model, run_url), pool.submit(_inspect, store)
        dataset = open_dataset(data_url)
        loaded = loading.result()  # on the CPU: the workers' device may not be on this machine
        claimed, (parent, parent_sha256), recorded = inspecting.result()
    check_input_shape(dataset, loaded)
    require_known_labels(dataset, loaded, dataset.manifest.splits)
    there = claimed if parent is None else parent.identity
    if there is not None:
        spec = as_recorded(spec, there)
    columns = Encoder(loaded, spec, "cpu").describe()
    identity = _identity(loaded, spec, columns)
    _require_same_table(store, identity, there, loaded.url, spec)
    lineage = _lineage(loaded, dataset)
    _require_descendant(store, dataset.manifest.shards, lineage["dataset"], parent)
    known = set() if parent is None else {(part.split, part.shard) for part in parent.parts}
    shards = dataset.manifest.shards
    tasks = [task for shard in shards if (shard.split, shard.stem) not in known for task in part_tasks(shard, spec)]
    begun = [task for task in tasks if task.stem in recorded]
    done = {task.stem: record for task in begun if (record := recorded_part(store, task, loaded.sha256)) is not None}
    url, number = dataset.url, dataset.manifest.number
    setup = EncodeSetup(loaded.url, loaded.sha256, url, number, store.url, spec, columns, device, threads)
    make_worker = MakeEncodeWorker(setup, loaded, recorded, _num_streams(device, threads))
    return EncodePlan(setup, make_worker, identity, lineage, shards, tuple(tasks), parent, parent_sha256, done)


def _num_streams(device: str, threads: int) -> int:
    """Return how many forward passes of `threads` threads the CPUs of this process can run at a time; a GPU runs one."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # the first not on macOS
    return max(1, min(MAX_STREAMS, cpus // threads)) if device == "cpu" else 1


def part_tasks(shard: ShardRef, spec: EncodeSpec) -> list[EncodeTask]:
    """Return the parts of one shard: one, or ranges of `rows_per_part` rows rounded up to whole batches."""
    if not spec.rows_per_part:
        return [EncodeTask(shard.stem, shard, 0, shard.live)]
    size = part_size(spec.rows_per_part, spec.batch)
    starts = range(0, max(shard.live, 1), size)
    return [EncodeTask(f"{shard.stem}-r{number:06d}", shard, start, min(start + size, shard.live)) for number, start in enumerate(starts)]


def _identity(loaded: LoadedModel, spec: EncodeSpec, columns: Mapping[str, Any]) -> dict[str, Any]:
    """Return what every part of the table shares. `rows_per_part` is in it: a glob over two layouts in one folder would read rows twice."""
    fields = {name: value for name, value in to_dict(spec, identity_only=True).items() if name not in OPTIONAL_COLUMNS}
    transform = to_dict(loaded.config.transform, identity_only=True)
    return {
        **fields,  # without those that `columns` covers
        "checkpoint_sha256": loaded.sha256,
        "preprocessing": {"transform": transform, "input_shape": list(loaded.config.input_shape)},
        "columns": columns,
        "seed": spec.seed if spec.sample else None,
    }


def _lineage(loaded: LoadedModel, dataset: Dataset) -> dict[str, Any]:
    checkpoint = {"sha256": loaded.sha256, "step": loaded.checkpoint.step, "url": loaded.url, "info": dict(loaded.checkpoint.info)}
    manifest = dataset.manifest
    return {
        "run": loaded.url.removesuffix("/model"),
        "checkpoint": checkpoint,
        "dataset": {"url": dataset.url, "number": manifest.number, "sha256": manifest.dataset_sha256},
    }


def _inspect(store: Store) -> tuple[Mapping[str, Any] | None, tuple[TableManifest | None, str | None], Set[str]]:
    """Return the state of the table: the identity of its first claim, its newest manifest with its hash, the recorded parts."""
    names = store.list()
    require_kind(store, "table", names)
    claimed = _claimed(store) if CLAIM in names else None
    return claimed, _parent(store, names), recorded_parts(store) if "records" in names else frozenset()


def _claimed(store: Store) -> Mapping[str, Any]:
    claim = read_json(store, CLAIM)["identity"]
    identity: Mapping[str, Any] = claim.get("table", claim)
    return identity


def _parent(store: Store, names: Sequence[str]) -> tuple[TableManifest | None, str | None]:
    number = newest_of(names, STEM)
    if number is None:
        return None, None
    return read_table_manifest(store, number), hashlib.sha256(read_bytes(store, f"{STEM}.{number:06d}.json")).hexdigest()


def _require_same_table(
    store: Store, identity: Mapping[str, Any], there: Mapping[str, Any] | None, checkpoint: str, spec: EncodeSpec
) -> None:
    """Raise ConfigError if the table, or an attempt that was not committed, has another identity; `checkpoint` is the new one's URL."""
    wanted = json.loads(canonical_json(identity))
    if there is not None and wanted != there:
        claim = read_json(store, CLAIM) if store.size(CLAIM) is not None else {}
        lineage = claim.get("info", {}).get("lineage", {})
        urls = {"checkpoint_sha256": (lineage.get("checkpoint", {}).get("url"), checkpoint)}
        absent = {"encode": absent_values(spec), "preprocessing": {"transform": absent_values(TransformSpec)}}
        both = wanted.get("columns", {}).keys() & there.get("columns", {}).keys()
        asked, known = (_as_asked(identity, spec, both) for identity in (wanted, there))
        require_same(store.url, "table", asked, known, urls=urls, absent=absent)


def _as_asked(identity: Mapping[str, Any], spec: EncodeSpec, both: Set[str]) -> dict[str, Any]:
    """Return an identity with the names that a recipe has: `encode.kl` and not its column, unless `both` identities have that."""
    options, columns = to_dict(spec), identity.get("columns", {})
    asked = {name: value for name, value in identity.items() if name in options}
    optional = {option: column for option, column in OPTIONAL_COLUMNS.items() if column != "z" or has_posterior(columns)}
    asked |= {option: column in columns for option, column in optional.items()}
    kept = {name: info for name, info in columns.items() if name in both or name not in optional.values()}
    return {**{name: value for name, value in identity.items() if name not in options}, "encode": asked, "columns": kept}


def _require_descendant(store: Store, shards: Sequence[ShardRef], dataset: Mapping[str, Any], parent: TableManifest | None) -> None:
    """Raise ConfigError unless every shard of the table is a shard of the dataset, whose number and address are given."""
    there = {(shard.split, shard.stem): shard.tar.sha256 for shard in shards}
    for part in () if parent is None else parent.parts:
        if there.get((part.split, part.shard)) != part.shard_sha256:
            raise ConfigError(
                f"{store.url} holds rows of the shard {part.split}/{part.shard} (sha256 {part.shard_sha256[:12]}), which generation "
                f"{dataset['number']} of dataset {dataset['url']} does not have: a table belongs to one dataset, write to another URL"
            )


def _claim_identity(plan: EncodePlan) -> dict[str, Any]:
    return {"table": plan.identity, "dataset_sha256": plan.lineage["dataset"]["sha256"]}


def _claim(store: Store, plan: EncodePlan) -> None:
    claim = claim_generation(store, "table", _claim_identity(plan), {"lineage": plan.lineage, "compression": plan.setup.spec.compression})
    if claim > 1 and plan.parent is None:  # another process may have claimed the same URL at the same time
        _require_same_table(store, plan.identity, _claimed(store), plan.setup.model_url, plan.setup.spec)


def _manifest(plan: EncodePlan, records: Sequence[PartRecord]) -> TableManifest:
    """Return the next manifest: the parent's parts and the recorded ones in the order of the dataset's shards."""
    parts = [*(() if plan.parent is None else plan.parent.parts), *(TablePart.from_record(record) for record in records)]
    place = {(shard.split, shard.stem): number for number, shard in enumerate(plan.shards)}
    parts.sort(key=lambda part: (place[part.split, part.shard], part.row_start))
    producers = [] if plan.parent is None else list(plan.parent.lineage["encoded_by"])
    producers += [dict(record.detail["encoded_by"]) for record in records]
    unique = {canonical_json(producer): producer for producer in producers}
    lineage = {**plan.lineage, "encoded_by": [unique[key] for key in sorted(unique)]}
    number = 0 if plan.parent is None else plan.parent.number
    identity = json.loads(canonical_json(plan.identity))
    claim_sha256 = sha256_json(_claim_identity(plan))
    return TableManifest(number + 1, number, plan.parent_sha256, claim_sha256, identity, identity["columns"], lineage, tuple(parts))


def _warn(store: Store, manifest: TableManifest) -> None:
    if manifest.parts and not manifest.num_rows:
        raise RunFailed(f"{store.url}: all {manifest.quarantined} rows were refused, see {store.url}/quarantine; no table was committed")
    if manifest.quarantined:
        logger.warning("%d of %d samples are in %s/quarantine", manifest.quarantined, manifest.quarantined + manifest.num_rows, store.url)
