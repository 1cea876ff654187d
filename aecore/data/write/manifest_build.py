"""Build the next manifest from part records and the parent. Pure: equal records give an equal manifest on any machine, at any time."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from aecore.artifact.commit import PartRecord
from aecore.data.manifest import DatasetManifest, RejectedPart, SampleInfo, ShardRef, SplitStatistics, content_sha256, in_order
from aecore.store import FileRef


def next_manifest(
    parent: DatasetManifest | None,
    identity: Mapping[str, Any],
    classes: Sequence[str],
    records: Sequence[PartRecord],
    listing: FileRef,
    claim_sha256: str | None,
) -> DatasetManifest:
    """Return the manifest of `parent` plus these parts (in the order of the plan): a pure function, no times, no addresses."""
    shards = [_shard_of(record) for record in records if record.rows]
    rejected = [
        RejectedPart(record.detail["split"], record.part, record.detail["planned"], record.detail["first_ordinal"], _quarantine_of(record))
        for record in records
        if not record.rows
    ]
    splits = in_order([*(parent.shards if parent else ()), *shards])
    everything = [shard for split in splits.values() for shard in split]
    details = [record.detail for record in records]
    return DatasetManifest(
        number=parent.number + 1 if parent else 1,
        parent=parent.number if parent else 0,
        parent_sha256=parent.dataset_sha256 if parent else None,
        claim_sha256=claim_sha256,
        identity=identity,
        classes=tuple(classes),
        splits=splits,
        rejected=(*(parent.rejected if parent else ()), *rejected),
        listings=(*(parent.listings if parent else ()), listing),
        sample=SampleInfo(
            extensions=_added(parent.sample.extensions if parent else {}, details, "extensions"),
            shapes=_added(parent.sample.shapes if parent else {}, details, "shapes"),
        ),
        statistics=_statistics(parent.statistics if parent else {}, details),
        reasons=_added(parent.reasons if parent else {}, details, "reasons"),
        dataset_sha256=content_sha256(everything, classes),
    )


def _shard_of(record: PartRecord) -> ShardRef:
    detail = record.detail
    return ShardRef(
        split=detail["split"],
        stem=record.part,
        samples=record.rows,
        planned=detail["planned"],
        first_ordinal=detail["first_ordinal"],
        tar=FileRef(**detail["tar"]) if "tar" in detail else record.file(".tar"),  # an adopted tar is no file of the dataset
        index=next(ref for ref in record.files if ref.name.startswith("shards/") and ref.name.endswith(".parquet")),
        index_content_sha256=detail["content_sha256"],
        quarantine=_quarantine_of(record) if record.quarantined else None,
        quarantined=record.quarantined,
        tar_base_url=detail.get("home"),
        groups=detail.get("groups", 0),
    )


def _quarantine_of(record: PartRecord) -> FileRef:
    return next(ref for ref in record.files if ref.name.startswith("quarantine/"))


def _added(known: Mapping[str, int], details: Iterable[Mapping[str, Any]], name: str) -> dict[str, int]:
    total = Counter(known)
    for detail in details:
        total.update(detail.get(name, {}))
    return dict(sorted(total.items()))


def _statistics(known: Mapping[str, SplitStatistics], details: Sequence[Mapping[str, Any]]) -> dict[str, SplitStatistics]:
    found = dict(known)
    for split in {detail["split"]: None for detail in details}:
        old = known.get(split, SplitStatistics(0, 0, 0, {}))
        own = [detail for detail in details if detail["split"] == split]
        classes = _added(old.classes, own, "classes")
        classes.pop("", None)  # samples without a class
        found[split] = SplitStatistics(
            samples=old.samples + sum(detail["samples"] for detail in own),
            quarantined=old.quarantined + sum(detail["quarantined"] for detail in own),
            bytes=old.bytes + sum(detail.get("bytes", 0) for detail in own),
            classes=classes,
        )
    return found
