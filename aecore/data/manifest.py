"""`dataset.NNNNNN.json`: every file that a reader may open, with its size and hash, and counts of what the files hold.

A manifest is a pure function of the part records and of its parent: no times, no addresses, so the same data and config give
the same bytes. Generations only add: the shards of the parent come first in every split, `classes` grows at the end.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aecore.artifact.commit import is_stem_of, require_parent
from aecore.artifact.documents import disagreement, read_json, require_counts_of, require_once, typed
from aecore.data.format.sample_format import SampleFormat
from aecore.errors import DataError
from aecore.registry import shown
from aecore.store import FileRef, Store, absolute_url, environment_value, is_remote, open_store, recorded_url, resolve_url, sha256_json

STEM = "dataset"
TAR_PREFIXES = "AECORE_TAR_PREFIXES"  # addresses below which the tars of adopted datasets may lie
SPLIT_ORDER = ("train", "val", "test")


@dataclass(frozen=True, slots=True)
class ShardRef:
    """One shard of a manifest: `samples` of `planned` are in the tar, `quarantined` are not; ordinals start at `first_ordinal`.

    Attributes
    ----------
    tar_base_url : str, optional
        Address that the name of an adopted tar is relative to (`home` on disk): an absolute URL, or a path below the dataset's own URL;
        None for a tar that was written by `aepipe shard`.
    groups : int
        Number of bags that the samples form; 0 where the source has none.
    """

    split: str
    stem: str
    samples: int
    planned: int
    first_ordinal: int
    tar: FileRef
    index: FileRef
    index_content_sha256: str
    quarantine: FileRef | None = None
    quarantined: int = 0
    tar_base_url: str | None = None
    groups: int = 0

    @property
    def own_files(self) -> tuple[FileRef, ...]:
        """Its files in the dataset's own folder: all but the tar of an adopted one."""
        files = (self.tar if self.tar_base_url is None else None, self.index, self.quarantine)
        return tuple(ref for ref in files if ref is not None)


@dataclass(frozen=True, slots=True)
class RejectedPart:
    """A planned shard without a single good sample: there is no tar, all `planned` samples are in its quarantine."""

    split: str
    stem: str
    planned: int
    first_ordinal: int
    quarantine: FileRef


@dataclass(frozen=True, slots=True)
class SplitStatistics:
    """Counts of one split: samples in shards, quarantined ones, bytes of its tars, samples per class name."""

    samples: int
    quarantined: int
    bytes: int
    classes: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class SampleInfo:
    """Formats of the samples: counts by extension of the data member and by shape (`28x28x1/L`: height, width, channels, mode)."""

    extensions: Mapping[str, int]
    shapes: Mapping[str, int]

    @property
    def formats(self) -> frozenset[SampleFormat]:
        """The formats that samples have when they are decoded; DataError if one has a mode that is not decoded."""
        return frozenset(map(SampleFormat.parse, self.shapes))


@dataclass(frozen=True, slots=True)
class DatasetManifest:
    """One generation of a dataset and all before it.

    `parent` is the number of the generation it adds to (0: none). `listings` has one file per generation: the keys and source
    sizes that were planned, so that an append knows which samples are already stored or in quarantine. `reasons` counts the quarantine.
    """

    number: int
    parent: int
    parent_sha256: str | None
    claim_sha256: str | None  # of the identity of the claim that made this generation; None in manifests of version 1
    identity: Mapping[str, Any]
    classes: tuple[str, ...]
    splits: Mapping[str, tuple[ShardRef, ...]]
    rejected: tuple[RejectedPart, ...]
    listings: tuple[FileRef, ...]
    sample: SampleInfo
    statistics: Mapping[str, SplitStatistics]
    reasons: Mapping[str, int]
    dataset_sha256: str

    @property
    def shards(self) -> tuple[ShardRef, ...]:
        """All shards in manifest order: train, val, test, other splits by name; inside a split by generation."""
        return tuple(shard for shards in self.splits.values() for shard in shards)

    @property
    def parts(self) -> "tuple[ShardRef | RejectedPart, ...]":
        """All shards, then all planned ones without a good sample."""
        return (*self.shards, *self.rejected)

    @property
    def files(self) -> tuple[FileRef, ...]:
        """Every file that the manifest names: shards, indexes, quarantine, listings."""
        shards = [ref for shard in self.shards for ref in (shard.tar, shard.index, shard.quarantine) if ref is not None]
        return (*shards, *(part.quarantine for part in self.rejected), *self.listings)

    @property
    def own_files(self) -> tuple[FileRef, ...]:
        """Those in the dataset's own folder: all but adopted tars."""
        return (*(ref for shard in self.shards for ref in shard.own_files), *(part.quarantine for part in self.rejected), *self.listings)

    @property
    def claim(self) -> int:
        """Number of the claim under which this generation was made; 0 if its listing has no such name."""
        return claim_of_listing(self.listings[-1])

    @property
    def quarantined(self) -> int:
        """Number of samples that are in quarantine instead of in a shard."""
        return sum(shard.quarantined for shard in self.shards) + sum(part.planned for part in self.rejected)

    def split(self, name: str, key: str | None = None) -> tuple[ShardRef, ...]:
        """Return the shards of a split; DataError with the known splits if there is none; `key` is the configuration key to name in it."""
        if name not in self.splits:
            known = ", ".join(list(self.splits)[:20]) + (", ..." if len(self.splits) > 20 else "") or "none"
            choose = "" if key is None or not self.splits else f"write {key}={next(iter(self.splits))}, or another of these; "
            raise DataError(
                f"the dataset (generation {self.number}) has no split {name!r} (it has: {known}): {choose}"
                "splits.* of the sharding job say how they are made"
            )
        return self.splits[name]

    def num_samples(self, split: str | None = None) -> int:
        """Return the number of samples of a split, of all splits if None."""
        return sum(shard.samples for shard in (self.shards if split is None else self.split(split)))

    def num_planned(self, split: str) -> int:
        """Return the number of samples ever planned for a split: the ordinal of the next one (0 for a new split)."""
        rejected = sum(part.planned for part in self.rejected if part.split == split)
        return rejected + sum(shard.planned for shard in self.splits.get(split, ()))

    def num_groups(self, split: str) -> int:
        """Return the number of bags of a split, 0 if its samples form none."""
        counts = [shard.groups for shard in self.split(split)]
        return sum(counts) if all(counts) else 0

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data (`from_json` reads it back); shards are one list, since JSON objects have no order."""
        data = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "splits"}
        data["classes"] = list(self.classes)
        data["rejected"] = [dataclasses.asdict(part) for part in self.rejected]
        data["listings"] = [dataclasses.asdict(ref) for ref in self.listings]
        data["sample"] = dataclasses.asdict(self.sample)
        data["statistics"] = {name: dataclasses.asdict(counts) for name, counts in self.statistics.items()}
        data["shards"] = [_shard_to_json(shard) for shard in self.shards]
        data["quarantined"] = self.quarantined
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "DatasetManifest":
        """Return the manifest from the data of `to_json`; KeyError, TypeError or ValueError if it is something else."""
        fields = {
            "number": data["number"],
            "parent": data["parent"],
            "parent_sha256": data["parent_sha256"],
            "claim_sha256": data.get("claim_sha256"),
            "identity": data["identity"],
            "classes": tuple(data["classes"]),
            "splits": in_order(_shard_from_json(shard) for shard in data["shards"]),
            "rejected": tuple(typed(RejectedPart, {**part, "quarantine": typed(FileRef, part["quarantine"])}) for part in data["rejected"]),
            "listings": tuple(typed(FileRef, ref) for ref in data["listings"]),
            "sample": typed(SampleInfo, data["sample"]),
            "statistics": {name: typed(SplitStatistics, counts) for name, counts in data["statistics"].items()},
            "reasons": data["reasons"],
            "dataset_sha256": data["dataset_sha256"],
        }
        manifest = typed(cls, fields)
        if not isinstance(data["classes"], list) or not all(isinstance(name, str) for name in manifest.classes):
            raise TypeError(f"classes is {shown(data['classes'])}, expected a list of names")
        require_counts_of(data, quarantined=manifest.quarantined)
        require_once([(part.split, part.stem) for part in manifest.parts], "a shard")
        require_once([ref.name for ref in manifest.own_files], "a file")
        _require_names(manifest)
        _require_sums(manifest)
        return manifest


def _require_names(manifest: DatasetManifest) -> None:
    """ValueError unless parent, parts and files have the numbers and names that follow from each other."""
    require_parent(manifest.number, manifest.parent, manifest.parent_sha256)
    if len(manifest.listings) != manifest.number:
        raise ValueError(f"it names {len(manifest.listings)} listings, expected one for each of {manifest.number} generations")
    for shard in manifest.shards:
        names = {"index": (shard.index.name, f"shards/{shard.stem}.parquet")}
        if shard.tar_base_url is None:
            names["tar"] = (shard.tar.name, f"shards/{shard.stem}.tar")
        if shard.quarantine is not None:
            names["quarantine"] = (shard.quarantine.name, f"quarantine/{shard.stem}.parquet")
        _require_part(shard.split, shard.stem, names)
        if (shard.quarantine is None) != (shard.quarantined == 0):
            raise ValueError(f"{shard.stem} has {shard.quarantined} quarantined samples and the quarantine {shown(shard.quarantine)}")
    for part in manifest.rejected:
        _require_part(part.split, part.stem, {"quarantine": (part.quarantine.name, f"quarantine/{part.stem}.parquet")})


def _require_part(split: str, stem: str, names: Mapping[str, tuple[str, str]]) -> None:
    if not is_stem_of(split, stem):
        raise ValueError(f"a part of the split {shown(split)} is named {shown(stem)}, expected {split}-NNNNNN or {split}-gNNNNNN-NNNNNN")
    for what, (found, wanted) in names.items():
        if found != wanted:
            raise ValueError(f"the {what} of {stem} is {shown(found)}, expected {wanted}")


def _require_sums(manifest: DatasetManifest) -> None:
    """ValueError unless all counts are the sums of what the parts have, and the parts of a split follow each other."""
    right = {part.split: {"samples": 0, "quarantined": 0, "bytes": 0} for part in manifest.parts}
    ends = dict.fromkeys(right, 0)
    for part in sorted(manifest.parts, key=lambda part: part.first_ordinal):
        if part.first_ordinal != ends[part.split]:
            raise ValueError(f"{part.stem} begins at ordinal {part.first_ordinal}, the part before it ends at {ends[part.split]}")
        ends[part.split] += part.planned
        counts = right[part.split]
        if isinstance(part, ShardRef):
            counts["samples"] += part.samples
            counts["quarantined"] += part.quarantined
            counts["bytes"] += part.tar.bytes
        else:
            counts["quarantined"] += part.planned
    stated = {
        split: {name: getattr(counts, name) for name in ("samples", "quarantined", "bytes")}
        for split, counts in manifest.statistics.items()
    }
    if stated != right:
        raise ValueError(f"its statistics are not those of its parts: {disagreement(stated, right)}")
    for split, known in manifest.statistics.items():
        if not known.classes.keys() <= set(manifest.classes) or sum(known.classes.values()) > known.samples:
            raise ValueError(f"its statistics say classes {shown(dict(known.classes))} of {known.samples} samples of {split}")
    samples = manifest.num_samples()
    for name, counted, total in (
        ("extensions", manifest.sample.extensions, samples),
        ("shapes", manifest.sample.shapes, samples),
        ("reasons", manifest.reasons, manifest.quarantined),
    ):
        require_counts_of({name: sum(counted.values())}, **{name: total})


def claim_of_listing(listing: FileRef) -> int:
    """Return the number of the claim that wrote a listing; 0 for a file of another name."""
    match = re.fullmatch(r"listings/(\d{6})\.parquet", listing.name)
    return int(match[1]) if match else 0


def claim_problems(manifest: DatasetManifest, name: str, identity: Mapping[str, Any]) -> Iterator[str]:
    """Yield where a manifest is not what the claim `name` of its generation has as its identity."""
    if manifest.claim_sha256 not in (None, sha256_json(identity)):
        yield (
            f"claim_sha256 is {manifest.claim_sha256}, the identity of {name} has {sha256_json(identity)}: one of them was changed, or is "
            "of another dataset; restore it"
        )
    right = {"dataset": manifest.identity, "parent": manifest.parent}
    if differences := disagreement({key: identity.get(key) for key in right}, right):
        yield f"{name} does not claim this generation: {differences}"


def _shard_to_json(shard: ShardRef) -> dict[str, Any]:
    data = dataclasses.asdict(shard)
    optional = {"home": data.pop("tar_base_url"), "groups": data.pop("groups")}  # most shards have neither
    return data | {key: value for key, value in optional.items() if value not in (None, 0)}


def _shard_from_json(data: Mapping[str, Any]) -> ShardRef:
    files = {name: typed(FileRef, data[name]) if data[name] else None for name in ("tar", "index", "quarantine")}
    fields = {**data, **files}
    return typed(ShardRef, {"tar_base_url": fields.pop("home", None), **fields})


def in_order(shards: Iterable[ShardRef]) -> dict[str, tuple[ShardRef, ...]]:
    """Return shards by split in manifest order, keeping their order inside a split."""
    found: dict[str, list[ShardRef]] = {}
    for shard in shards:
        found.setdefault(shard.split, []).append(shard)
    names = [*(name for name in SPLIT_ORDER if name in found), *sorted(name for name in found if name not in SPLIT_ORDER)]
    return {name: tuple(found[name]) for name in names}


def content_sha256(shards: Iterable[ShardRef], classes: Sequence[str]) -> str:
    """Return the hash of the contents of shards in this order, and of the class names: independent of Parquet's encoding."""
    rows = [[shard.split, shard.stem, shard.samples, shard.tar.sha256, shard.index_content_sha256] for shard in shards]
    return sha256_json({"shards": rows, "classes": list(classes)})


def tar_store(store: Store, shard: ShardRef) -> Store:
    """Return the store that holds the tar of a shard: the dataset's own `store`, unless the tar was adopted."""
    if shard.tar_base_url is None:
        return store
    url = recorded_url(resolve_url(store.url, shard.tar_base_url), f"`home` in the manifest of {store.url}")
    own = "/".join(store.url.split("/")[:3]) if is_remote(store.url) else store.url  # its bucket: the user has named it
    prefixes = [own, *(environment_value(TAR_PREFIXES) or ())]
    if (is_remote(url) or is_remote(store.url)) and not any(_is_below(url, absolute_url(prefix, TAR_PREFIXES)) for prefix in prefixes):
        raise DataError(
            f"the dataset {store.url} says that its tars are in {url}, which nobody here has named: requests there would be signed with "
            f"your credentials. If you trust it, set {TAR_PREFIXES}={url} (several are separated by commas)"
        )
    return open_store(url)


def _is_below(url: str, prefix: str) -> bool:
    return url == prefix or url.startswith(f"{prefix.rstrip('/')}/")


def read_manifest(store: Store, number: int) -> DatasetManifest:
    """Return one generation; DataError if the file is missing, damaged or not a dataset manifest."""
    name = f"{STEM}.{number:06d}.json"
    return manifest_of(read_json(store, name), f"{store.url}/{name}")


def manifest_of(data: Mapping[str, Any], where: str) -> DatasetManifest:
    """Return what a file says, as `DatasetManifest.from_json` does; DataError that names `where` if it is something else."""
    try:
        return DatasetManifest.from_json(data)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{where} is not a dataset manifest ({error!r}): it is damaged or was not written by aecore") from error
