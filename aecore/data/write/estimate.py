"""What sharding a source of any number of samples would take, from what some of its samples take on this machine.

Some samples, spread over the plan, are packed, committed and recorded as a run does it, into a folder that is removed again: a few of
them as a shard, then many, so that what a shard costs and what a sample costs are known apart. Everything else is counted: shards by the
limits of the settings, requests by what a store is asked for a sample, a shard and a generation. Nothing is written to the output.
"""

import functools
import math
import os
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from aecore.artifact.commit import PartRecord
from aecore.artifact.fanout import collect, serial
from aecore.data.format.index import table_bytes
from aecore.data.write.ledger import recorded_rows
from aecore.data.write.manifest_build import Living, next_manifest
from aecore.data.write.plan import DatasetPlan, Estimate
from aecore.data.write.shard import Handed
from aecore.data.write.spec import ShardSpec, ShardTask
from aecore.errors import ConfigError
from aecore.store import FileRef, canonical_json, is_remote, open_store

MOST_SAMPLES, MOST_BYTES = 4000, 128 << 20  # that are measured; one more if the first is larger
ROUNDS = 3
FEW = 8  # samples of a shard that shows what a shard costs
PAGE = 1000  # objects in an answer of a bucket that lists
SHARD_REQUESTS = 6  # of a bucket: tar, index and record are put, and each is seen before the manifest names it
GENERATION_REQUESTS = 8  # listings of the dataset, claim, listing, manifest


def estimate(
    plan: DatasetPlan, make_worker: Any, out: str, source: Any, samples: int, listed: int, listing_s: float, shards: ShardSpec
) -> Estimate:  # any: `ShardWorker` and what makes it, every source kind has its own spec class
    """Return what `samples` of the kind that is planned take.

    Parameters
    ----------
    make_worker : callable
        `make_worker(folder, source, handed)` is a worker that writes shards to a folder.
    listed, listing_s : int, float
        Samples that were listed, and the seconds that listing, comparing and planning them took.

    Raises
    ------
    ConfigError
        If nothing is planned, so that nothing can be measured.
    """
    if not plan.tasks:
        raise ConfigError("no sample is new, so none can be measured: give an `out` that does not exist")
    with tempfile.TemporaryDirectory(prefix="aecore-estimate-") as folder:
        store, handed = open_store(folder), Handed()
        tasks = [_chosen(plan.tasks, most, number) for number, most in enumerate((FEW, *(FEW, MOST_SAMPLES) * ROUNDS))]
        seconds, records, tables = list[float](), list[PartRecord](), list[pa.Table]()
        for task in tasks:  # the first one pays for what is loaded once
            begun = time.perf_counter()
            (record,) = collect(serial, functools.partial(make_worker, folder, source, handed), [task], what="measured shards")
            tables.append(recorded_rows(store, task, "", record, handed.take(record.part)))
            seconds.append(time.perf_counter() - begun)
            records.append(record)
        few, many, few_s, many_s = *tasks[1:3], min(seconds[1::2]), min(seconds[2::2])  # of a machine in use the least is the steadiest
        records, tables = records[1:3], tables[1:3]
        sample_s = max(many_s - few_s, 0.0) / (len(many) - len(few)) if len(many) > len(few) else many_s / len(many)
        shard_s = max(few_s - len(few) * sample_s, 0.0)
        sizes = {suffix: [_bytes(record, suffix) for record in records] for suffix in (".tar", ".parquet")}
        listing = [len(table_bytes(table, {"claim": 1})) for table in tables]
        manifests = [_manifest_bytes(records[:count]) for count in (1, 2)]
    sample_tar, _ = _per_sample(sizes[".tar"], few, many)
    sample_index, shard_index = _per_sample(sizes[".parquet"], few, many)
    sample_listing, _ = _per_sample(listing, few, many)
    sample_source = float(np.concatenate([task.sizes for task in plan.tasks]).mean())
    in_shard = max(1, min(shards.max_samples, int(shards.max_bytes / max(sample_source, 1))))
    count = math.ceil(samples / in_shard)
    manifest = manifests[0] + (count - 1) * (manifests[1] - manifests[0])
    listing_unit_s = listing_s / max(listed, 1)
    url = getattr(source, "url", "")
    return Estimate(
        samples=samples,
        shards=count,
        tar_bytes=round(samples * sample_tar),
        index_bytes=round(samples * sample_index + count * shard_index),
        listing_bytes=round(samples * sample_listing),
        manifest_bytes=manifest,
        source_requests=samples + math.ceil(samples / PAGE) if url and is_remote(url) else 0,
        requests=SHARD_REQUESTS * count + GENERATION_REQUESTS if is_remote(out) else 0,
        hours=(samples * (sample_s + listing_unit_s) + count * shard_s) / 3600,
        measured={
            "samples": sum(map(len, tasks)),
            "listed": listed,
            "listing_us": 1e6 * listing_unit_s,
            "pack_us": 1e6 * sample_s,
            "shard_s": shard_s,
            "source_bytes": sample_source,
            "tar_bytes": sample_tar,
            "cpus": os.cpu_count() or 1,
        },
    )


def _chosen(tasks: Sequence[ShardTask], most: int, number: int) -> ShardTask:
    """Return a task with some samples of the middle task: a plan shuffles, so these are any samples."""
    task = tasks[len(tasks) // 2]
    within = int(np.searchsorted(np.cumsum(task.sizes), MOST_BYTES, side="right"))
    count = max(1, min(most, within, len(task)))
    rows = slice(0, count)
    return ShardTask(
        split=task.split,
        stem=f"{task.split}-{number:06d}",
        source=task.source,
        keys=task.keys[rows],
        sources=task.sources[rows],
        sizes=task.sizes[rows],
        ordinals=task.ordinals[rows],
        labels=None if task.labels is None else task.labels[rows],
        label_names=None if task.label_names is None else task.label_names[rows],
        groups=None if task.groups is None else task.groups[rows],
        columns={name: column[rows] for name, column in task.columns.items()},
        shards=task.shards,
        unusable=None if task.unusable is None else task.unusable[rows],
        states=None if task.states is None else task.states[rows],
    )


def _manifest_bytes(records: Sequence[PartRecord]) -> int:
    """Return the bytes of the manifest of these shards."""
    nowhere = FileRef("listings/000001.parquet", 0, "0" * 64)
    manifest = next_manifest(None, {}, (), records, nowhere, "0" * 64, Living("drop", "0" * 64))
    return len(canonical_json(manifest.to_json()))


def _bytes(record: PartRecord, suffix: str) -> int:
    return sum(ref.bytes for ref in record.files if ref.name.endswith(suffix))


def _per_sample(sizes: Sequence[int], few: ShardTask, many: ShardTask) -> tuple[float, float]:
    """Return what a sample adds to a file, and what the file takes without one."""
    if len(many) == len(few):
        return sizes[1] / len(many), 0.0
    sample = max(sizes[1] - sizes[0], 0) / (len(many) - len(few))
    return sample, max(sizes[0] - len(few) * sample, 0.0)
