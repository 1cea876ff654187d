"""`dataset.NNNNNN.json`: every file that a reader may open, with its size and hash, and counts of what the files hold.

A manifest is a pure function of the part records and of its parent: no times, no addresses, so the same data and config give
the same bytes. Shards are only added: those of the parent come first in every split, `classes` grows at the end. What is removed later
stays in its shard, and a removal file beside it says so (`Removed`); samples that are not removed are live, and only they count. Compaction
alone takes parts out: a new one has what was live of such a part, with the same ordinals, and the old one is `Retired`.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aecore.artifact.commit import claim_of, is_stem_of, require_parent
from aecore.artifact.documents import disagreement, read_json, require_counts_of, require_once, typed
from aecore.data.about import require_stated
from aecore.data.format.sample_format import SampleFormat
from aecore.errors import DataError
from aecore.registry import shown
from aecore.store import FileRef, Store, absolute_url, environment_value, is_remote, open_store, recorded_url, resolve_url, sha256_json

STEM = "dataset"
TAR_PREFIXES = "AECORE_TAR_PREFIXES"  # addresses below which the tars of adopted datasets may lie
SPLIT_ORDER = ("train", "val", "test")
REMOVAL = ("drop", "keep")  # what becomes of samples whose source is gone
LATER = ("removal", "content_sha256", "about")  # fields that are left out where they are None, as in manifests of before


@dataclass(frozen=True, slots=True)
class Retired:
    """A part that generation `number` took out because most of it was removed; files and counts are in the manifests before.

    Attributes
    ----------
    split, stem, first_ordinal, planned
        Those of the part.
    sha256 : str, optional
        That of its tar, which tables name; None if it had none.
    number : int
        The generation that took it out. Readers of older ones need its files until these are collected.
    by : str, optional
        The stem of the part that has what was live of it, with the same ordinals; None: nothing was.
    """

    split: str
    stem: str
    first_ordinal: int
    planned: int
    sha256: str | None
    number: int
    by: str | None


@dataclass(frozen=True, slots=True)
class Removed:
    """What a generation, or one before it, removed of a part: the file that names the rows, its content hash, and their numbers.

    `samples` of the rows are in the tar, `quarantined` in the quarantine; `groups` bags are left without a sample.
    """

    file: FileRef
    content_sha256: str
    samples: int
    quarantined: int = 0
    groups: int = 0

    @property
    def record(self) -> str:
        """The name of its record, `<stem>-gNNNNNN`: it states the counts of the part's live samples."""
        return self.file.name.rpartition("/")[2].removesuffix(".parquet")


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
    removed : Removed, optional
        What was removed since the shard was written; None: nothing.
    lost : int
        Of the planned samples, those that were removed before a compaction wrote this shard, and that no file has any more.
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
    removed: Removed | None = None
    lost: int = 0

    @property
    def live(self) -> int:
        """Number of samples that are in the tar and not removed."""
        return self.samples - (self.removed.samples if self.removed else 0)

    @property
    def live_quarantined(self) -> int:
        """Number of quarantined samples that are not removed."""
        return self.quarantined - (self.removed.quarantined if self.removed else 0)

    @property
    def live_groups(self) -> int:
        """Number of bags with a live sample."""
        return self.groups - (self.removed.groups if self.removed else 0)

    @property
    def own_files(self) -> tuple[FileRef, ...]:
        """Its files in the dataset's own folder: all but the tar of an adopted one."""
        removed = None if self.removed is None else self.removed.file
        files = (self.tar if self.tar_base_url is None else None, self.index, self.quarantine, removed)
        return tuple(ref for ref in files if ref is not None)


@dataclass(frozen=True, slots=True)
class RejectedPart:
    """A planned shard without a single good sample: no tar, all `planned` samples but the `lost` ones are in its quarantine."""

    split: str
    stem: str
    planned: int
    first_ordinal: int
    quarantine: FileRef
    removed: Removed | None = None
    lost: int = 0

    @property
    def quarantined(self) -> int:
        """Number of samples in the quarantine."""
        return self.planned - self.lost

    @property
    def live_quarantined(self) -> int:
        """Number of quarantined samples that are not removed."""
        return self.quarantined - (self.removed.quarantined if self.removed else 0)

    @property
    def own_files(self) -> tuple[FileRef, ...]:
        """Its files in the dataset's own folder."""
        return (self.quarantine,) if self.removed is None else (self.quarantine, self.removed.file)


@dataclass(frozen=True, slots=True)
class SplitStatistics:
    """Counts of one split: live samples in shards, live quarantined ones, bytes of its tars, live samples per class name."""

    samples: int
    quarantined: int
    bytes: int
    classes: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class SampleInfo:
    """Formats of the live samples: counts by extension of the data member and by shape (`28x28x1/L`: height, width, channels, mode)."""

    extensions: Mapping[str, int]
    shapes: Mapping[str, int]

    @property
    def formats(self) -> frozenset[SampleFormat]:
        """The formats that samples have when they are decoded; DataError if one has a mode that is not decoded."""
        return frozenset(map(SampleFormat.parse, self.shapes))


@dataclass(frozen=True, slots=True)
class DatasetManifest:
    """One generation of a dataset and all before it.

    `parent` is the number of the generation that it follows (0: none). `listings` say what is known of the source of every sample, so that
    the next run knows what is new, changed or gone; the last is this generation's. `reasons` counts the live quarantine. `removal` says
    what becomes of samples whose source is gone (`shards.removed`), and `content_sha256` is the hash of the live samples (see
    `aecore.data.write.ledger`); both are None in datasets of before there was removal. `retired` are the parts that compactions took
    out, the oldest first. `about` is what people say of the dataset.
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
    removal: str | None = None
    content_sha256: str | None = None
    retired: tuple[Retired, ...] = ()
    about: Mapping[str, Any] | None = None  # any: texts, and a boolean

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
        """Every file that the manifest names and that has to exist: shards, indexes, quarantine, removal files, listings.

        An adopted tar of which no sample is live need not: its owner may have changed or removed it.
        """
        adopted = [shard.tar for shard in self.shards if shard.tar_base_url is not None and shard.live]
        return (*adopted, *self.own_files)

    @property
    def own_files(self) -> tuple[FileRef, ...]:
        """Those in the dataset's own folder: all but adopted tars."""
        return (*(ref for part in self.parts for ref in part.own_files), *self.listings)

    @property
    def claim(self) -> int:
        """Number of the claim under which this generation was made; 0 if its listing has no such name."""
        return claim_of_listing(self.listings[-1])

    @property
    def quarantined(self) -> int:
        """Number of live samples that are in quarantine instead of in a shard."""
        return sum(part.live_quarantined for part in self.parts)

    @property
    def has_removed(self) -> bool:
        """Whether something was removed from a part."""
        return any(part.removed is not None for part in self.parts)

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
        """Return the number of live samples of a split, of all splits if None."""
        return sum(shard.live for shard in (self.shards if split is None else self.split(split)))

    def num_planned(self, split: str) -> int:
        """Return the number of samples ever planned for a split: the ordinal of the next one (0 for a new split)."""
        gone = sum(part.planned for part in self.retired if part.split == split and part.by is None)
        return gone + sum(part.planned for part in self.parts if part.split == split)

    def heirs(self) -> dict[tuple[str, str], str | None]:
        """Return split and stem of each retired part -> the part that has what is live of it now; None: nothing is."""
        found: dict[tuple[str, str], str | None] = {}
        for part in reversed(self.retired):  # the newest first: what took its place may have been retired later
            found[part.split, part.stem] = None if part.by is None else found.get((part.split, part.by), part.by)
        return found

    def num_groups(self, split: str) -> int:
        """Return the number of bags of a split that have a live sample, 0 if its samples form none."""
        shards = self.split(split)
        return sum(shard.live_groups for shard in shards) if all(shard.groups for shard in shards) else 0

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data (`from_json` reads it back); shards are one list, since JSON objects have no order."""
        data = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name not in ("splits", "retired")}
        data = {name: value for name, value in data.items() if name not in LATER or value is not None}
        if self.retired:
            data["retired"] = [dataclasses.asdict(part) for part in self.retired]
        data["classes"] = list(self.classes)
        data["rejected"] = [_part_to_json(part) for part in self.rejected]
        data["listings"] = [dataclasses.asdict(ref) for ref in self.listings]
        data["sample"] = dataclasses.asdict(self.sample)
        data["statistics"] = {name: dataclasses.asdict(counts) for name, counts in self.statistics.items()}
        data["shards"] = [_part_to_json(shard) for shard in self.shards]
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
            "rejected": tuple(_rejected_from_json(part) for part in data["rejected"]),
            "listings": tuple(typed(FileRef, ref) for ref in data["listings"]),
            "sample": typed(SampleInfo, data["sample"]),
            "statistics": {name: typed(SplitStatistics, counts) for name, counts in data["statistics"].items()},
            "reasons": data["reasons"],
            "dataset_sha256": data["dataset_sha256"],
            "retired": tuple(typed(Retired, part) for part in data.get("retired", [])),
            **{name: data[name] for name in LATER if name in data},
        }
        manifest = typed(cls, fields)
        if not isinstance(data["classes"], list) or not all(isinstance(name, str) for name in manifest.classes):
            raise TypeError(f"classes is {shown(data['classes'])}, expected a list of names")
        require_counts_of(data, quarantined=manifest.quarantined)
        require_once([(part.split, part.stem) for part in manifest.parts], "a shard")
        require_once([ref.name for ref in manifest.own_files], "a file")
        _require_names(manifest)
        _require_retired(manifest)
        _require_sums(manifest)
        return manifest


def _require_names(manifest: DatasetManifest) -> None:
    """ValueError unless parent, parts and files have the numbers and names that follow from each other."""
    require_parent(manifest.number, manifest.parent, manifest.parent_sha256)
    if not 1 <= len(manifest.listings) <= manifest.number or (manifest.removal is None and len(manifest.listings) != manifest.number):
        raise ValueError(f"it names {len(manifest.listings)} listings, expected one for each of {manifest.number} generations")
    require_stated(manifest.about)
    if manifest.removal not in (None, *REMOVAL):
        raise ValueError(f"removal is {shown(manifest.removal)}, expected {' or '.join(REMOVAL)}")
    for part in manifest.parts:
        _require_removed(part, manifest.removal)
        newest = max(claim_of(part.stem), claim_of(part.removed.record) if part.removed else 0)
        if manifest.removal is not None and newest > manifest.claim:  # its number of listings says nothing: they may have been merged
            raise ValueError(f"{part.stem} is of claim {newest}, the newest of the listings that it names is of claim {manifest.claim}")
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


def _require_removed(part: ShardRef | RejectedPart, removal: str | None) -> None:
    """ValueError unless what is removed of a part was there, and its file has the name of one of the part's."""
    if part.removed is None:
        return
    if removal is None:
        raise ValueError(f"{part.stem} has removed samples, and the manifest does not say what removes samples")
    name = part.removed.file.name
    if re.fullmatch(rf"removed/{re.escape(part.stem)}-g\d{{6}}\.parquet", name) is None:
        raise ValueError(f"the removal file of {part.stem} is {shown(name)}, expected removed/{part.stem}-gNNNNNN.parquet")
    groups = 0
    samples, quarantined = 0, part.quarantined
    if isinstance(part, ShardRef):
        samples, groups = part.samples, part.groups
    stated = part.removed.samples, part.removed.quarantined, part.removed.groups
    if any(more > most for more, most in zip(stated, (samples, quarantined, groups), strict=True)) or not sum(stated[:2]):
        raise ValueError(
            f"{stated[0]} samples, {stated[1]} quarantined ones and {stated[2]} bags are removed from {part.stem}, which has {samples}, "
            f"{quarantined} and {groups}"
        )


def _require_retired(manifest: DatasetManifest) -> None:
    """ValueError unless the retired parts have left what they say, and just these parts have lost samples."""
    require_once([(part.split, part.stem) for part in (*manifest.parts, *manifest.retired)], "a part")
    if list(manifest.retired) != sorted(manifest.retired, key=lambda part: part.number) or (manifest.retired and manifest.removal is None):
        raise ValueError("its retired parts are not in the order of the generations that took them out, or it does not say what removes")
    there = {(part.split, part.stem): part for part in (*manifest.parts, *manifest.retired)}
    left = set[tuple[str, str]]()
    for part in manifest.retired:
        heir = None if part.by is None else there.get((part.split, part.by))
        placed = heir is not None and (heir.first_ordinal, heir.planned) == (part.first_ordinal, part.planned)
        placed &= not isinstance(heir, Retired) or heir.number > part.number
        if not is_stem_of(part.split, part.stem) or not 1 < part.number <= manifest.number or not (part.by is None or placed):
            raise ValueError(f"the retired part {shown(part.stem)} has left {shown(part.by)}, which is no part with its ordinals")
        left |= set() if part.by is None else {(part.split, part.by)}
    lost = {(part.split, part.stem) for part in manifest.parts if part.lost}
    if lost != left & {(part.split, part.stem) for part in manifest.parts} or any(part.lost < 0 for part in manifest.parts):
        raise ValueError(
            f"the parts that lost samples are {shown(sorted(lost))}, those that took the place of others {shown(sorted(left))}"
        )


def _require_part(split: str, stem: str, names: Mapping[str, tuple[str, str]]) -> None:
    if not is_stem_of(split, stem):
        raise ValueError(f"a part of the split {shown(split)} is named {shown(stem)}, expected {split}-NNNNNN or {split}-gNNNNNN-NNNNNN")
    for what, (found, wanted) in names.items():
        if found != wanted:
            raise ValueError(f"the {what} of {stem} is {shown(found)}, expected {wanted}")


def _require_sums(manifest: DatasetManifest) -> None:
    """ValueError unless all counts are the sums of what the parts have, and the parts of a split follow each other."""
    right = {part.split: {"samples": 0, "quarantined": 0, "bytes": 0} for part in manifest.parts}
    gone = [part for part in manifest.retired if part.by is None]
    ends = dict.fromkeys((part.split for part in (*manifest.parts, *gone)), 0)
    for part in sorted((*manifest.parts, *gone), key=lambda part: part.first_ordinal):
        if part.first_ordinal != ends[part.split]:
            raise ValueError(f"{part.stem} begins at ordinal {part.first_ordinal}, the part before it ends at {ends[part.split]}")
        ends[part.split] += part.planned
        if isinstance(part, Retired):
            continue
        counts = right[part.split]
        if isinstance(part, ShardRef):
            counts["samples"] += part.live
            counts["bytes"] += part.tar.bytes
        counts["quarantined"] += part.live_quarantined
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


def _part_to_json(part: ShardRef | RejectedPart) -> dict[str, Any]:
    data = dataclasses.asdict(part)
    optional = {"home": data.pop("tar_base_url", None), "groups": data.pop("groups", 0)}
    optional |= {name: data.pop(name) for name in ("removed", "lost")}
    return data | {key: value for key, value in optional.items() if value not in (None, 0)}  # most parts have none of them


def _shard_from_json(data: Mapping[str, Any]) -> ShardRef:
    files = {name: typed(FileRef, data[name]) if data[name] else None for name in ("tar", "index", "quarantine")}
    fields = {**data, **files, "removed": _removed_from_json(data)}
    return typed(ShardRef, {"tar_base_url": fields.pop("home", None), **fields})


def _rejected_from_json(data: Mapping[str, Any]) -> RejectedPart:
    return typed(RejectedPart, {**data, "quarantine": typed(FileRef, data["quarantine"]), "removed": _removed_from_json(data)})


def _removed_from_json(data: Mapping[str, Any]) -> Removed | None:
    if "removed" not in data:
        return None
    return typed(Removed, {**data["removed"], "file": typed(FileRef, data["removed"]["file"])})


def in_order(shards: Iterable[ShardRef]) -> dict[str, tuple[ShardRef, ...]]:
    """Return shards by split in manifest order, keeping their order inside a split."""
    found: dict[str, list[ShardRef]] = {}
    for shard in shards:
        found.setdefault(shard.split, []).append(shard)
    names = [*(name for name in SPLIT_ORDER if name in found), *sorted(name for name in found if name not in SPLIT_ORDER)]
    return {name: tuple(found[name]) for name in names}


def shards_sha256(shards: Iterable[ShardRef], classes: Sequence[str]) -> str:
    """Return the hash of the contents of shards in this order, of what is removed from them, and of the class names.

    It is independent of Parquet's encoding.
    """
    rows = [
        [shard.split, shard.stem, shard.samples, shard.tar.sha256, shard.index_content_sha256]
        + ([] if shard.removed is None else [shard.removed.content_sha256])
        for shard in shards
    ]
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
