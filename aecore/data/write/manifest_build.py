"""Build the next manifest from part records and the parent. Pure: equal records give an equal manifest on any machine, at any time."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from aecore.artifact.commit import PartRecord
from aecore.data.manifest import (
    DatasetManifest,
    RejectedPart,
    Removed,
    Retired,
    SampleInfo,
    ShardRef,
    SplitStatistics,
    in_order,
    shards_sha256,
)
from aecore.store import FileRef

Part = ShardRef | RejectedPart
P = TypeVar("P", bound=Part)


def next_manifest(
    parent: DatasetManifest | None,
    identity: Mapping[str, Any],
    classes: Sequence[str],
    records: Sequence[PartRecord],
    listing: FileRef,
    claim_sha256: str | None,
    living: "Living | None" = None,
    about: Mapping[str, Any] | None = None,
) -> DatasetManifest:
    """Return the manifest of `parent` plus these parts (in the order of the plan): a pure function, no times, no addresses.

    Without `living` nothing is ever removed, as in datasets of before there was removal.
    """
    living = living or Living(None, None)
    shards = [living.less(_shard_of(record)) for record in records if record.rows]
    rejected = [
        RejectedPart(
            record.detail["split"],
            record.part,
            record.detail["planned"],
            record.detail["first_ordinal"],
            _quarantine_of(record),
            lost=record.detail.get("lost", 0),
        )
        for record in records
        if not record.rows
    ]
    new: list[Part] = [*shards, *rejected]
    heirs = {part.stem: part for part in new if part.stem in living.compacted.values()}
    parts = [*living.of(parent.parts if parent else (), heirs), *(part for part in new if part.stem not in heirs)]
    splits = in_order(part for part in parts if isinstance(part, ShardRef))
    everything = [shard for split in splits.values() for shard in split]
    # counts are never decremented: with removed samples they are made anew from those of all parts
    before, details = parent, [living.counts.get(record.part, record.detail) for record in records]
    if living.details is not None:
        before, details = None, [*living.details, *details]
    return DatasetManifest(
        number=parent.number + 1 if parent else 1,
        parent=parent.number if parent else 0,
        parent_sha256=parent.dataset_sha256 if parent else None,
        claim_sha256=claim_sha256,
        identity=identity,
        classes=tuple(classes),
        splits=splits,
        rejected=tuple(part for part in parts if isinstance(part, RejectedPart)),
        listings=(*(parent.listings if parent and not living.merged else ()), listing),
        sample=SampleInfo(
            extensions=_added(before.sample.extensions if before else {}, details, "extensions"),
            shapes=_added(before.sample.shapes if before else {}, details, "shapes"),
        ),
        statistics=_statistics(before.statistics if before else {}, details),
        reasons=_added(before.reasons if before else {}, details, "reasons"),
        dataset_sha256=shards_sha256(everything, classes),
        removal=living.removal,
        content_sha256=living.content_sha256,
        retired=() if parent is None else (*parent.retired, *living.retired(parent)),
        about=about,
    )


@dataclass(frozen=True, slots=True)
class Living:
    """What a generation of a dataset that follows its source has beside its new parts.

    Attributes
    ----------
    removal : str, optional
        What becomes of samples whose source is gone; None: nothing is ever removed.
    content_sha256 : str, optional
        The hash of the live samples.
    removed : mapping
        Of the parts from which this generation removes samples, by stem, what is removed of them now.
    details : sequence of mappings, optional
        Where something is removed: the details of all parts of the parent in its order, as their records have them, of live samples only.
    counts : mapping
        Of the new parts from which the generation removes samples at once, by stem, the details of live samples.
    merged : bool
        Whether the listing holds all that those of the parent say, and takes their place.
    compacted : mapping
        Of the parts that this generation takes out, by stem, the new part that has what was live (None: nothing was). `details` lacks them.
    """

    removal: str | None
    content_sha256: str | None
    removed: Mapping[str, Removed] = field(default_factory=dict)
    details: Sequence[Mapping[str, Any]] | None = None  # any: plain JSON data
    counts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # any: as above
    merged: bool = False
    compacted: Mapping[str, str | None] = field(default_factory=dict)

    def less(self, part: P) -> P:
        """Return a part with what is removed of it now."""
        return part if part.stem not in self.removed else dataclasses.replace(part, removed=self.removed[part.stem])

    def of(self, parts: Sequence[Part], heirs: Mapping[str, Part]) -> list[Part]:
        """Return parts of the parent with what is removed of them now; what takes the place of one has its place."""
        found = list[Part]()
        for part in parts:
            if part.stem not in self.compacted:
                found.append(self.less(part))
            elif (by := self.compacted[part.stem]) is not None:
                found.append(heirs[by])
        return found

    def retired(self, parent: DatasetManifest) -> list[Retired]:
        """Return the parts of the parent that this generation takes out."""
        return [
            Retired(
                part.split,
                part.stem,
                part.first_ordinal,
                part.planned,
                part.tar.sha256 if isinstance(part, ShardRef) else None,
                parent.number + 1,
                self.compacted[part.stem],
            )
            for part in parent.parts
            if part.stem in self.compacted
        ]


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
        lost=detail.get("lost", 0),
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
