"""Encode a dataset with a trained model: rows of one shard in, one Parquet part out, each sample exactly once.

Batches are cut inside a shard, so rows, order and bytes do not depend on the number of workers. Latents are the posterior mean;
sampled columns take their noise from (seed, key, sha256 of the sample). A row that does not decode, or whose latents are not finite, goes
to the quarantine with a reason. The table follows its dataset: a new generation encodes the shards that are new, and writes parts whose
shard lost samples again without them (`aecore.encoding.copied`); nothing is ever deleted here.
"""

import dataclasses
import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from aecore._base.trainable import has_posterior
from aecore.artifact.commit import (
    PartRecord,
    claim_generation,
    claim_of,
    commit_manifest,
    newest_of,
    recorded_parts,
    require_kind,
    require_same,
)
from aecore.artifact.documents import CLAIM, read_bytes, read_json
from aecore.artifact.fanout import FanOut, MakeWorker, OnPart, collect, serial
from aecore.artifact.withdrawn import made_of
from aecore.checkpoint.compatibility import check_input_shape, require_known_labels
from aecore.checkpoint.weights import FoundModel, find_model, load_model
from aecore.data.dataset import Dataset, open_dataset
from aecore.data.format.transform import TransformSpec
from aecore.data.manifest import DatasetManifest, ShardRef
from aecore.data.read.where import parse_where
from aecore.encoding.copied import MakeCopyWorker, live_ranges
from aecore.encoding.encoder import OPTIONAL_COLUMNS, Encoder, EncodeSpec
from aecore.encoding.worker import EncodeWorker, MakeEncodeWorker
from aecore.encoding.writer import EncodeSetup, EncodeTask, recorded_part
from aecore.errors import ConfigError, DataError, RunFailed, counted, did_you_mean
from aecore.registry import absent_values, as_recorded, to_dict
from aecore.store import Store, absolute_url, canonical_json, open_store, sha256_json
from aecore.table.manifest import ALL, METADATA, STEM, TableManifest, TablePart, part_size, read_table_manifest
from aecore.table.part import passed_names

logger = logging.getLogger(__name__)
_AGAIN = re.compile(r"-t\d{6}$")  # in the name of a part that was written under a claim of its own
MAX_STREAMS = 8  # more would wait for the thread that reads and decodes, not for the model

__all__ = ["EncodePlan", "EncodeSpec", "EncodeTask", "EncodeWorker", "encode_dataset", "plan_encoding"]


@dataclass(frozen=True, slots=True)
class EncodePlan:
    """What one call of `encode_dataset` does: the parts to make, those that exist, and what the table will be.

    `parent` is the newest manifest (None: a new table); `done` are the records, by stem, of an earlier attempt that was not committed.
    """

    setup: EncodeSetup
    make_worker: MakeWorker
    identity: Mapping[str, Any]
    lineage: Mapping[str, Any]
    manifest: DatasetManifest
    shards: tuple[ShardRef, ...]
    tasks: tuple[EncodeTask, ...]
    parent: TableManifest | None
    parent_sha256: str | None
    done: Mapping[str, PartRecord]
    claim: int = 0  # the number of the claim under which the parts are named

    @property
    def up_to_date(self) -> bool:
        """True if the newest generation already holds this generation of the dataset, with all columns."""
        parent, dataset = self.parent, self.lineage["dataset"]["sha256"]
        return parent is not None and parent.lineage["dataset"]["sha256"] == dataset and not _added(self.identity, parent.identity)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data, for a dry run."""
        known = 0 if self.parent is None else len(self.parent.parts)
        made = [task for task in self.tasks if task.source is None]
        copied = len(self.tasks) - len(made)
        facts = {"new_parts": len(made), "new_rows": sum(task.row_stop - task.row_start for task in made), "known_parts": known}
        return {**facts, **({"copied_parts": copied} if copied else {}), "identity": self.identity, "lineage": self.lineage}


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
    plan = _under(store, plan, _claim(store, plan))
    tasks = [task for task in plan.tasks if task.stem not in plan.done]
    known_threads = torch.get_num_threads()
    try:
        made = collect(fan_out, plan.make_worker, tasks, what="parts", on_part=on_part)
    finally:
        torch.set_num_threads(known_threads)
    made_by_stem = {**plan.done, **{record.part: record for record in made}}
    manifest = _manifest(plan, [made_by_stem[task.stem] for task in plan.tasks])
    _warn(store, manifest)
    known = set(() if plan.parent is None else plan.parent.files)
    new, old = ([ref for ref in manifest.files if (ref in known) is there] for there in (False, True))
    dataset = plan.lineage["dataset"]

    def require_continued(number: int) -> None:
        there = read_table_manifest(store, number)
        _require_same_table(store, plan.identity, there.identity, plan.setup.model_url, spec)
        _require_descendant(store, plan.manifest, dataset, there)

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
    """Load the checkpoint and the manifests, check that they fit together, and return the plan; writes nothing.

    The weights are not loaded where nothing is to be encoded: parts are copied, or all is there.
    """
    data_url, run_url, store = absolute_url(data, "data"), absolute_url(run, "run"), open_store(out)
    with ThreadPoolExecutor(2) as pool:  # every request to a bucket has a latency
        finding, inspecting = pool.submit(find_model, run_url), pool.submit(_inspect, store)
        dataset = open_dataset(data_url)
        found = finding.result()
        claimed, newest_claim, (parent, parent_sha256), recorded = inspecting.result()
    there = claimed if parent is None else parent.identity
    spec = _spec_of(store, spec, there, parent)
    _require_known(dataset, spec)
    shards = tuple(shard for shard in dataset.manifest.shards if spec.split in ("", shard.split))
    tasks = _tasks(store, dataset, shards, spec, parent)
    loaded, columns = None, _known_columns(found, spec, parent)
    if columns is None or any(task.source is None for task in tasks):
        loaded = load_model(run_url)  # on the CPU: the workers' device may not be on this machine
        check_input_shape(dataset, loaded)
        require_known_labels(dataset, loaded, [spec.split] if spec.split else dataset.manifest.splits)
        columns = Encoder(loaded, spec, "cpu").describe()
    identity = _identity(found, spec, columns)
    _require_same_table(store, identity, there, found.url, spec)
    lineage = _lineage(found, dataset)
    _require_descendant(store, dataset.manifest, lineage["dataset"], parent)
    url, number = dataset.url, dataset.manifest.number
    setup = EncodeSetup(found.url, found.sha256, url, number, store.url, spec, columns, device, threads)
    make_worker = MakeCopyWorker(setup) if loaded is None else MakeEncodeWorker(setup, loaded, recorded, _num_streams(device, threads))
    plan = EncodePlan(setup, make_worker, identity, lineage, dataset.manifest, shards, tuple(tasks), parent, parent_sha256, {})
    return _under(store, plan, newest_claim + 1, recorded)


def _spec_of(store: Store, spec: EncodeSpec, there: Mapping[str, Any] | None, parent: TableManifest | None) -> EncodeSpec:
    """Return the settings as a table that exists has them where they are the defaults, with the columns that are to be added."""
    if spec.add_columns and parent is None:
        raise ConfigError(
            f"{store.url} holds no table to which columns ({', '.join(spec.add_columns)}) could be added: encode.columns names those of a "
            "new one"
        )
    if there is not None:
        known = there.get("index_columns")
        spec = as_recorded(
            spec, {name: value for name, value in there.items() if name != "columns"} | ({} if known is None else {"columns": known})
        )
        if known is not None and spec.columns == EncodeSpec().columns:
            spec = dataclasses.replace(spec, columns=tuple(known))
    new = () if ALL in spec.columns else tuple(name for name in spec.add_columns if name not in spec.columns)
    return dataclasses.replace(spec, columns=(ALL,) if ALL in new else (*spec.columns, *dict.fromkeys(new)))


def _require_known(dataset: Dataset, spec: EncodeSpec) -> None:
    """ConfigError if split, predicate or columns name what the dataset does not have."""
    manifest = dataset.manifest
    if spec.split and spec.split not in manifest.splits:
        raise ConfigError(f"encode.split is {spec.split!r}{did_you_mean(spec.split, manifest.splits)} in dataset {dataset.url}")
    asked = {*spec.columns} - {ALL, METADATA}
    if not spec.where and not asked:
        return
    # shards of one generation have the same columns, but where it wrote those of others again
    first = {(claim_of(shard.stem), shard.stem if shard.lost else ""): shard for shard in reversed(manifest.shards)}
    known = {name for shard in first.values() for name in dataset.reader(shard).index.column_names if name != "members"}
    if spec.where:
        parse_where(spec.where).require_known(known)
    names = {*passed_names(sorted(known), (ALL,))}
    for name in sorted(asked - names):
        raise ConfigError(f"encode.columns names {name!r}, which no index of dataset {dataset.url} has{did_you_mean(name, names)}")


def _known_columns(found: FoundModel, spec: EncodeSpec, parent: TableManifest | None) -> Mapping[str, Any] | None:
    """Return the encoded columns of the table if these settings and this checkpoint have just them; None: the model has to be asked."""
    if parent is None or (found.sha256, spec.dtype) != (parent.identity["checkpoint_sha256"], parent.identity["dtype"]):
        return None
    posterior = has_posterior(parent.columns)
    there = {option: column in parent.columns and (posterior or option == "reconstruction") for option, column in OPTIONAL_COLUMNS.items()}
    return parent.columns if all(getattr(spec, option) is known for option, known in there.items()) else None


def _tasks(store: Store, dataset: Dataset, shards: Sequence[ShardRef], spec: EncodeSpec, parent: TableManifest | None) -> list[EncodeTask]:
    """Return the parts to make: those of new shards, and those of the parent that its shard has left, or that get more columns."""
    known: dict[tuple[str, str | None], list[TablePart]] = {}
    heirs = dataset.manifest.heirs()
    for part in () if parent is None else parent.parts:
        known.setdefault((part.split, heirs.get((part.split, part.shard), part.shard)), []).append(part)
    added = parent is not None and parent.index_columns != spec.columns
    tasks = []
    for shard in shards:
        removed = None if shard.removed is None else shard.removed.content_sha256
        parts = known.get((shard.split, shard.stem))
        if parts is None:
            tasks += part_tasks(shard, spec)
        elif added or any((part.shard, part.removed_sha256) != (shard.stem, removed) for part in parts):
            ranges = live_ranges(store, dataset, shard, parts, part_size(spec.rows_per_part, spec.batch))
            for part, (start, stop) in zip(parts, ranges, strict=True):
                rows = _AGAIN.sub("", part.stem).removeprefix(part.shard)
                tasks.append(EncodeTask(f"{shard.stem}{rows}", shard, start, stop, spec.columns, part))
    return tasks


def _under(store: Store, plan: EncodePlan, claim: int, recorded: Set[str] | None = None) -> EncodePlan:
    """Return the plan with the names that parts get under a claim, and with those of them that an earlier attempt recorded.

    A part has the name of its shard, and `-t` with the claim's number where the same rows of the shard may be there in another form:
    after samples were removed from it, or with more columns. A claim is of one generation of the dataset and one choice of columns.
    """
    parent = plan.parent
    added = parent is not None and _added(plan.identity, parent.identity)
    tasks = []
    for task in plan.tasks:
        stem = _AGAIN.sub("", task.stem)
        again = added or task.source is not None or task.shard.removed is not None
        tasks.append(dataclasses.replace(task, stem=f"{stem}-t{claim:06d}" if again else stem))
    recorded = recorded_parts(store) if recorded is None else recorded
    chosen, checkpoint = bool(plan.setup.spec.where), plan.setup.checkpoint_sha256
    begun = [task for task in tasks if task.stem in recorded]
    done = {task.stem: record for task in begun if (record := recorded_part(store, task, checkpoint, chosen=chosen)) is not None}
    return dataclasses.replace(plan, tasks=tuple(tasks), done=done, claim=claim)


def _added(identity: Mapping[str, Any], parent: Mapping[str, Any]) -> bool:
    """Return whether a table gets columns that its parent does not have."""
    return bool(list(identity.get("index_columns", [])) != list(parent.get("index_columns", [])))


def _num_streams(device: str, threads: int) -> int:
    """Return how many forward passes of `threads` threads the CPUs of this process can run at a time; a GPU runs one."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # the first not on macOS
    return max(1, min(MAX_STREAMS, cpus // threads)) if device == "cpu" else 1


def part_tasks(shard: ShardRef, spec: EncodeSpec) -> list[EncodeTask]:
    """Return the parts of one shard: one, or ranges of `rows_per_part` rows rounded up to whole batches."""
    if not spec.rows_per_part:
        return [EncodeTask(shard.stem, shard, 0, shard.live, spec.columns)]
    size = part_size(spec.rows_per_part, spec.batch)
    starts = range(0, max(shard.live, 1), size)
    ranges = [(start, min(start + size, shard.live)) for start in starts]
    return [EncodeTask(f"{shard.stem}-r{number:06d}", shard, *each, spec.columns) for number, each in enumerate(ranges)]


def _identity(found: FoundModel, spec: EncodeSpec, columns: Mapping[str, Any]) -> dict[str, Any]:
    """Return what every part of the table shares. `rows_per_part` is in it: a glob over two layouts in one folder would read rows twice."""
    fields = {name: value for name, value in to_dict(spec, identity_only=True).items() if name not in OPTIONAL_COLUMNS}
    if "columns" in fields:  # this name is taken by the encoded ones
        fields["index_columns"] = fields.pop("columns")
    transform = to_dict(found.config.transform, identity_only=True)
    return {
        **fields,  # without those that `columns` covers
        "checkpoint_sha256": found.sha256,
        "preprocessing": {"transform": transform, "input_shape": list(found.config.input_shape)},
        "columns": columns,
        "seed": spec.seed if spec.sample else None,
    }


def _lineage(found: FoundModel, dataset: Dataset) -> dict[str, Any]:
    checkpoint = {"sha256": found.sha256, "step": found.checkpoint.step, "url": found.url, "info": dict(found.checkpoint.info)}
    manifest = dataset.manifest
    return {
        "run": found.url.removesuffix("/model"),
        "checkpoint": checkpoint,
        "dataset": {"url": dataset.url, "number": manifest.number, "sha256": manifest.dataset_sha256},
    }


def _inspect(store: Store) -> tuple[Mapping[str, Any] | None, int, tuple[TableManifest | None, str | None], Set[str]]:
    """Return the state of the table: identity of its first claim, newest claim, newest manifest with its hash, recorded parts."""
    names = store.list()
    require_kind(store, "table", names)
    claimed = _claimed(store) if CLAIM in names else None
    recorded = recorded_parts(store) if "records" in names else frozenset[str]()
    return claimed, newest_of(names, "run") or 0, _parent(store, names), recorded


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
    if spec.add_columns:  # what is to be added is not there
        there = None if there is None else {**there, "index_columns": wanted.get("index_columns")}
    if there is not None and {"index_columns": None, **wanted} != {"index_columns": None, **there}:
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
    own = {name for name in options if name != "columns"}
    asked = {name: value for name, value in identity.items() if name in own}
    if identity.get("index_columns") is not None:
        asked["columns"] = identity["index_columns"]
    optional = {option: column for option, column in OPTIONAL_COLUMNS.items() if column != "z" or has_posterior(columns)}
    asked |= {option: column in columns for option, column in optional.items()}
    kept = {name: info for name, info in columns.items() if name in both or name not in optional.values()}
    rest = {name: value for name, value in identity.items() if name not in own and name != "index_columns"}
    return {**rest, "encode": asked, "columns": kept}


def _require_descendant(store: Store, manifest: DatasetManifest, dataset: Mapping[str, Any], parent: TableManifest | None) -> None:
    """Raise ConfigError unless every shard of the table is or was a shard of the dataset, whose number and address are given."""
    there = {(shard.split, shard.stem): shard.tar.sha256 for shard in manifest.shards}
    there |= {(part.split, part.stem): part.sha256 for part in manifest.retired if part.sha256 is not None}
    for part in () if parent is None else parent.parts:
        if there.get((part.split, part.shard)) != part.shard_sha256:
            raise ConfigError(
                f"{store.url} holds rows of the shard {part.split}/{part.shard} (sha256 {part.shard_sha256[:12]}), which generation "
                f"{dataset['number']} of dataset {dataset['url']} does not have: a table belongs to one dataset, write to another URL"
            )


def _claim_identity(plan: EncodePlan) -> dict[str, Any]:
    return {"table": plan.identity, "dataset_sha256": plan.lineage["dataset"]["sha256"]}


def _claim(store: Store, plan: EncodePlan) -> int:
    """Claim the next generation and return the number of the claim."""
    claim = claim_generation(store, "table", _claim_identity(plan), {"lineage": plan.lineage, "compression": plan.setup.spec.compression})
    if claim > 1 and plan.parent is None:  # another process may have claimed the same URL at the same time
        _require_same_table(store, plan.identity, _claimed(store), plan.setup.model_url, plan.setup.spec)
    return claim


def _manifest(plan: EncodePlan, records: Sequence[PartRecord]) -> TableManifest:
    """Return the next manifest: recorded parts and those of the parent that none was copied from, in the order of the dataset's shards.

    Of a shard that was retired with nothing live there is no part any more.
    """
    new = [TablePart.from_record(record) for record in records]
    copied, gone = {part.copied_from for part in new}, {retired for retired, heir in plan.manifest.heirs().items() if heir is None}
    old = [part for part in (() if plan.parent is None else plan.parent.parts) if (part.split, part.shard) not in gone]
    parts = [*(part for part in old if part.file.sha256 not in copied), *new]
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
    where = manifest.identity.get("where")
    if where and manifest.parts and not manifest.num_rows and not manifest.quarantined:
        raise DataError(f"encode.where={where!r} chooses no sample of {manifest.lineage['dataset']['url']}: no table was committed")
    if manifest.quarantined and not manifest.num_rows:
        raise RunFailed(f"{store.url}: all {manifest.quarantined} rows were refused, see {store.url}/quarantine; no table was committed")
    if manifest.quarantined:
        logger.warning("%d of %d samples are in %s/quarantine", manifest.quarantined, manifest.quarantined + manifest.num_rows, store.url)
