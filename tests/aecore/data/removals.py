"""Generations that remove samples, written file by file as DESIGN says, without the code of `shard` that decides what is removed."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from aecore.artifact.commit import PartRecord, claim_generation, commit_manifest, write_record
from aecore.artifact.documents import read_json
from aecore.data.dataset import Dataset, open_dataset
from aecore.data.format.image import image_header
from aecore.data.format.index import INDEX_SCHEMA, LEDGER_SCHEMA, QUARANTINE_SCHEMA, REMOVED_SCHEMA, content_sha256, make_table, read_table
from aecore.data.format.record import array_header
from aecore.data.manifest import STEM, RejectedPart, Removed, ShardRef
from aecore.data.removal import read_removed, removal_name
from aecore.data.write.manifest_build import Living, next_manifest
from aecore.data.write.shard import put_table
from aecore.store import sha256_json

Part = ShardRef | RejectedPart


def remove(url: object, keys: Iterable[str] | Mapping[str, str], *, reason: str = "gone", removal: str = "drop") -> Dataset:
    """Commit the next generation of the dataset at `url` without the live samples of these keys (key -> reason, or all for `reason`)."""
    dataset = open_dataset(str(url))
    store, parent = dataset.store, dataset.manifest
    reasons = dict(keys) if isinstance(keys, Mapping) else dict.fromkeys(keys, reason)
    generation = {"dataset": parent.identity, "listing": sha256_json(sorted(reasons)), "parent": parent.number}
    claim = claim_generation(store, "dataset", generation, {"source": parent.identity.get("source", {})})
    details, removed, left = [], dict[str, Removed](), dict(reasons)
    for part in parent.parts:
        stem = part.stem if part.removed is None else part.removed.file.name[len("removed/") : -len(".parquet")]
        detail = read_json(store, f"records/{stem}.json")["detail"]
        rows = {row["ordinal"]: row for table in _tables(dataset, part) for row in table.select(["ordinal", "key"]).to_pylist()}
        known = [] if part.removed is None else read_removed(store, part).to_pylist()  # type: ignore[union-attr]
        for row in known:
            del rows[row["ordinal"]]
        new = [{**row, "reason": left.pop(row["key"])} for row in rows.values() if row["key"] in left]
        if new:
            record = put_removal(dataset, part, claim, [*known, *new])
            detail, removed[part.stem] = record.detail, removed_of(record)
        details.append(detail)
    assert not left, f"no live samples have these keys: {left}"
    listing = put_table(store, f"listings/{claim:06d}.parquet", make_table(LEDGER_SCHEMA, {}, 0), {"claim": claim}, "listing")
    living = Living(removal, None, removed, details)
    manifest = next_manifest(parent, parent.identity, parent.classes, [], listing, sha256_json(generation), living)
    rows = live_content(Dataset(store, manifest))
    manifest = next_manifest(
        parent, parent.identity, parent.classes, [], listing, sha256_json(generation), Living(removal, rows, removed, details)
    )
    commit_manifest(store, STEM, manifest.parent, manifest.to_json(), new=[*(item.file for item in removed.values()), listing])
    return open_dataset(str(url))


def put_removal(dataset: Dataset, part: Part, claim: int, rows: list[dict[str, Any]], name: str = "") -> PartRecord:
    """Write the removal file of a part and its record, which states what is live; nothing names them yet."""
    store = dataset.store
    index, quarantine = _tables(dataset, part)
    rows = sorted(rows, key=lambda row: row["ordinal"])
    table = pa.Table.from_pylist(rows, REMOVED_SCHEMA)
    ref = put_table(store, name or removal_name(part.stem, claim), table, {"format": 1, "split": part.split, "stem": part.stem}, "removal")
    is_gone, was_bad = (pc.is_in(each["ordinal"], value_set=table["ordinal"].combine_chunks()) for each in (index, quarantine))
    gone, live, bad = index.filter(is_gone), index.filter(pc.invert(is_gone)), quarantine.filter(pc.invert(was_bad))
    detail: dict[str, Any] = {"split": part.split, "samples": len(live), "quarantined": len(bad)}
    detail |= {"reasons": dict(Counter(bad["reason"].to_pylist()))}
    groups = 0
    if isinstance(part, ShardRef):
        own = read_json(store, f"records/{part.stem}.json")["detail"]
        names = [
            str(row["label"]) if row["label_name"] is None else row["label_name"] for row in live.to_pylist() if row["label"] is not None
        ]
        extensions = Counter(member["ext"] for row in live["members"].to_pylist() for member in row if member["ext"] != "cls")
        detail |= {"bytes": part.tar.bytes, "extensions": dict(extensions), "classes": dict(Counter(names))}
        detail["shapes"] = dict(Counter(own["shapes"]) - _shapes(dataset, part, is_gone))
        if part.groups:
            detail["groups"] = len(set(live["group"].to_pylist()))
            groups = part.groups - detail["groups"]
    counts = {"removed_samples": len(gone), "removed_quarantined": len(quarantine) - len(bad), "removed_groups": groups}
    detail |= {"content_sha256": content_sha256(table), **counts}
    stem = ref.name[len("removed/") : -len(".parquet")]
    return write_record(store, PartRecord(stem, (ref,), len(live), len(bad), detail))


def removed_of(record: PartRecord) -> Removed:
    """Return what a manifest says of the removal that has this record."""
    detail = record.detail
    counts = detail["removed_samples"], detail["removed_quarantined"], detail["removed_groups"]
    return Removed(record.files[0], detail["content_sha256"], *counts)


def live_content(dataset: Dataset) -> str:
    """Return the hash of the live samples, one by one: `content_sha256` of the manifest."""
    lines = []
    for shard in dataset.manifest.shards:
        for row in dataset.index(shard).to_pylist():
            further = {name: _plain(row[name]) for name in sorted(row) if name not in (*INDEX_SCHEMA.names, "source_sha256")}
            further = {name: value for name, value in further.items() if value is not None}
            columns = hashlib.sha256(json.dumps(further, separators=(",", ":"), ensure_ascii=False).encode()).hexdigest() if further else ""
            lines.append(f"{shard.split}\0{row['key']}\0{row['label_name'] or ''}\0{row['sha256']}\0{columns}\n".encode())
    return hashlib.sha256(b"".join(sorted(lines))).hexdigest()


def _plain(value: Any) -> Any:  # any: a value of a column
    return int(value) if isinstance(value, float) and value.is_integer() else value


def live_keys(dataset: Dataset, split: str = "train") -> list[str]:
    """Return the keys of a split that readers have to hand out, in stored order: row by row, by another way than theirs."""
    found = []
    for shard in dataset.manifest.splits[split]:
        removed = read_removed(dataset.store, shard)
        gone = set() if removed is None else set(removed["ordinal"].to_pylist())
        index = dataset.reader(shard).index
        found += [key for key, ordinal in zip(index["key"].to_pylist(), index["ordinal"].to_pylist(), strict=True) if ordinal not in gone]
    return found


def _tables(dataset: Dataset, part: Part) -> tuple[pa.Table, pa.Table]:
    """Return index and quarantine of a part, without rows where there is none."""
    index, ref = pa.table({"ordinal": pa.array([], pa.int64()), "key": pa.array([], pa.string())}), part.quarantine
    if isinstance(part, ShardRef):
        index = dataset.reader(part).index
    data = None if ref is None else read_table(dataset.store.read(ref.name, ref=ref), ref.name)
    return index, QUARANTINE_SCHEMA.empty_table() if data is None else data


def _shapes(dataset: Dataset, shard: ShardRef, mask: Any) -> Counter[str]:
    """Return the formats of some samples of a shard, from their bytes."""
    rows = [row for row, chosen in enumerate(mask.to_pylist()) if chosen]
    reader, found = dataset.reader(shard), Counter[str]()
    pixels = dataset.pixels
    for sample in (sample for row, sample in enumerate(reader.iterate()) if row in set(rows)):
        ext, data = sample.data
        found[array_header(data, pixels=pixels).format_text if ext == "npy" else image_header(data, ext, pixels=pixels).format_text] += 1
    reader.close()
    return found
