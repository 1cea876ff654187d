"""`compact_dataset`: shards of which a large share is removed are written again without these samples, as the next generation.

Ordinals, keys, labels, further columns and the stored bytes of live samples stay, and so does their order; nothing is decoded. A shard of
which nothing is live has no successor. The old parts stand as `retired` in the manifest, and their files stay for readers of older
generations until they are collected. The listing of the generation holds all that is known of live samples, and of those that are left out
since another one has their content (parts that have such are not compacted): nothing names other ones any more.
Killed anywhere, the same call finds its claim and continues.
"""

import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from aecore.artifact.commit import PartRecord, claim_generation, commit_manifest, part_stem, put_or_adopt, read_record, write_record
from aecore.artifact.documents import read_json
from aecore.artifact.withdrawn import made_of
from aecore.data.dataset import Dataset, open_dataset
from aecore.data.format.index import content_sha256, data_members
from aecore.data.format.limits import exclusive_cumsum, split_by_limits
from aecore.data.format.tar import Samples, TarPacker
from aecore.data.manifest import STEM, RejectedPart, ShardRef
from aecore.data.removal import LEFT_OUT, read_removed
from aecore.data.write.ledger import read_known, samples_sha256
from aecore.data.write.manifest_build import Living, next_manifest
from aecore.data.write.pack import members_column
from aecore.data.write.remove import live_details, live_tables
from aecore.data.write.report import ensure_report
from aecore.data.write.shard import put_table
from aecore.errors import ConfigError, DataError, counted
from aecore.native.loops import StreamHash
from aecore.store import FileRef, Store, sha256_json
from aecore.store._direct import DiskWriter
from aecore.threads import map_ordered

pc: Any = pyarrow.compute  # any: pyarrow's stubs know no types of values
logger = logging.getLogger(__name__)
CHUNK_BYTES = 8 << 20  # of samples that are read and packed at a time
WRITERS = 2  # parts at a time
Part = ShardRef | RejectedPart


@dataclass(frozen=True, slots=True)
class Compacted:
    """A part that is taken out: its live and removed rows (quarantined ones too), its bytes, and the part that takes its place, if any."""

    part: str
    by: str | None
    live: int
    removed: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Compaction:
    """What a compaction did (in a dry run: would do).

    Attributes
    ----------
    adopted
        Parts of external tars, which only `copy` writes again.
    left_out
        Parts with samples that are left out because another one has their content: they are stored, and come back when that one goes.
    """

    url: str
    generation: int
    share: float
    parts: tuple[Compacted, ...]
    adopted: tuple[str, ...]
    left_out: tuple[str, ...]
    dry_run: bool

    def to_dict(self) -> dict[str, Any]:  # any: plain JSON data
        """Return plain JSON data."""
        return dataclasses.asdict(self)


def compact_dataset(url: str, share: float, *, copy: bool = False, dry_run: bool = False) -> Compaction:
    """Write parts anew of whose rows more than `share` are removed, without these; the old ones stay until they are collected.

    Equal to before are the live samples with their order, `content_sha256`, classes and counts; `dataset_sha256`, and with it the order of
    training, are others. Runs that began before finish on their generation.

    Parameters
    ----------
    url : str
        URL of the dataset.
    share : float
        0: every part with a removed row.
    copy : bool
        Also copy what is live of adopted tars into tars of the dataset's own.
    dry_run : bool
        Write nothing.

    Raises
    ------
    ConfigError
        If `share` is not at least 0 and below 1.
    DataError
        If there is no dataset, or what is live of a part is damaged: then nothing is committed.
    RunFailed
        If another generation was committed meanwhile.
    """
    if not 0 <= share < 1:
        raise ConfigError(f"the share of removed rows is {share:g}, expected at least 0 and below 1: 0.5 writes shards anew that lost half")
    dataset = open_dataset(url)
    store, parent = dataset.store, dataset.manifest
    chosen = [part for part in parent.parts if _removed(part) > share * (_live(part) + _removed(part))]
    adopted = [part for part in chosen if isinstance(part, ShardRef) and part.tar_base_url is not None and part.live and not copy]
    chosen = [part for part in chosen if part not in adopted]
    with_left_out = {part.stem for part in chosen if _leaves_out(store, part)}
    chosen = [part for part in chosen if part.stem not in with_left_out]
    kept = tuple(part.stem for part in adopted), tuple(sorted(with_left_out))
    if dry_run or not chosen:
        return Compaction(store.url, parent.number, share, _told(chosen, _names(chosen, parent.claim + 1)), *kept, dry_run)
    started = time.perf_counter()
    generation = {
        "dataset": parent.identity,
        "listing": sha256_json({"compacted": [part.stem for part in chosen]}),
        "parent": parent.number,
        "parent_manifest": sha256_json(parent.to_json()),
    }
    claim = claim_generation(store, "dataset", generation, {})
    names = _names(chosen, claim)
    work = [(part, name) for part in chosen if (name := names[part.stem]) is not None]
    records = [*map_ordered(lambda each: _compact(dataset, *each), work, threads=WRITERS)]
    ledger, left_out = read_known(store, parent)
    content = samples_sha256(ledger)
    if parent.content_sha256 not in (None, content):
        raise DataError(
            f"{store.url}: the listings of generation {parent.number} hold samples of content_sha256 {content}, its manifest says "
            f"{parent.content_sha256}: one of them was changed; restore it (nothing was committed)"
        )
    listing = put_table(store, f"listings/{claim:06d}.parquet", pa.concat_tables([ledger, left_out]), {"claim": claim}, "listing")
    details = live_details(store, tuple(part for part in parent.parts if part.stem not in names), {})
    living = Living(parent.removal, content, details=details, merged=True, compacted=names)
    manifest = next_manifest(parent, parent.identity, parent.classes, records, listing, sha256_json(generation), living, parent.about)
    known = {*parent.own_files}
    new, old = ([ref for ref in manifest.own_files if (ref in known) is there] for there in (False, True))
    with made_of(store.url, parent.number, f"{store.url}/{STEM}.{manifest.number:06d}.json"):
        commit_manifest(store, STEM, parent.number, manifest.to_json(), new=new, old=old)
    logger.info(
        "%s: generation %d, %s written again without removed samples, %.1f s",
        store.url,
        manifest.number,
        counted(len(chosen), "part", "parts"),
        time.perf_counter() - started,
    )
    ensure_report(Dataset(store, manifest), {"compact": time.perf_counter() - started}, before=ledger)
    return Compaction(store.url, manifest.number, share, _told(chosen, names), *kept, dry_run)


def _live(part: Part) -> int:
    return part.live_quarantined + (part.live if isinstance(part, ShardRef) else 0)


def _removed(part: Part) -> int:
    return 0 if part.removed is None else part.removed.samples + part.removed.quarantined


def _leaves_out(store: Store, part: Part) -> bool:
    removed = read_removed(store, part)
    return removed is not None and bool(pc.any(pc.is_in(removed["reason"], value_set=pa.array(LEFT_OUT))).as_py())


def _names(chosen: Sequence[Part], claim: int) -> dict[str, str | None]:
    """Return the part that takes the place of each; None where nothing is live."""
    names, numbers = dict[str, str | None](), Counter[str]()
    for part in chosen:
        names[part.stem] = part_stem(part.split, claim, numbers[part.split]) if _live(part) else None
        numbers[part.split] += bool(_live(part))
    return names


def _told(chosen: Sequence[Part], names: Mapping[str, str | None]) -> tuple[Compacted, ...]:
    return tuple(
        Compacted(part.stem, names[part.stem], _live(part), _removed(part), sum(ref.bytes for ref in part.own_files)) for part in chosen
    )


def _compact(dataset: Dataset, part: Part, stem: str) -> PartRecord:
    """Commit what is live of a part under another name; an earlier attempt's record is returned as it is."""
    store = dataset.store
    if (known := read_record(store, stem)) is not None:
        return known
    assert part.removed is not None
    started, stated = time.perf_counter(), read_json(store, f"records/{part.removed.record}.json")["detail"]
    removed = read_removed(store, part)
    assert removed is not None
    index, quarantine = live_tables(store, part, removed)
    detail: dict[str, Any] = {"split": part.split, "planned": part.planned, "first_ordinal": part.first_ordinal}  # any: plain JSON data
    detail |= {"lost": part.planned - len(index) - len(quarantine), "samples": len(index), "quarantined": len(quarantine)}
    detail["reasons"] = stated["reasons"]
    files, metadata = list[FileRef](), {"format": 1, "split": part.split, "stem": stem}
    if isinstance(part, ShardRef) and len(index):
        tar, index = _put_tar(dataset, part, stem, index)
        files += [tar, put_table(store, f"shards/{stem}.parquet", index, {**metadata, "tar_sha256": tar.sha256}, "index")]
        detail |= {"content_sha256": content_sha256(index), "bytes": tar.bytes}
        detail |= {name: stated[name] for name in ("shapes", "extensions", "classes", "groups") if name in stated}
    if len(quarantine):
        files.append(put_table(store, f"quarantine/{stem}.parquet", quarantine, metadata, "quarantine"))
    seconds = time.perf_counter() - started
    logger.info("part %s: %s of %s, %.2f s", stem, counted(len(index), "sample", "samples"), part.stem, seconds)
    return write_record(store, PartRecord(stem, tuple(files), len(index), len(quarantine), detail, {"compact_s": seconds}))


def _put_tar(dataset: Dataset, part: ShardRef, stem: str, live: pa.Table) -> tuple[FileRef, pa.Table]:
    """Commit the tar of the live samples; return it, and their index with the places that they have there."""
    with dataset.store.stage() as path:
        tar = StreamHash()
        index = _pack(dataset, part, live, path, tar)
        return put_or_adopt(dataset.store, f"shards/{stem}.tar", path, role="tar", sha256=tar.hexdigest())[0], index


def _pack(dataset: Dataset, part: ShardRef, live: pa.Table, path: Path, tar: StreamHash) -> pa.Table:
    packer, reader = TarPacker(), dataset.reader(part)
    rows = np.flatnonzero(np.isin(reader.index["ordinal"].to_numpy(), live["ordinal"].to_numpy()))
    exts, _, sizes = data_members(live)
    labels = pc.fill_null(live["label"], -1).to_numpy().astype(np.int32)
    keys: list[Any] = live["key"].to_pylist()  # any: pyarrow's stubs make them optional
    names: list[Any] = exts.to_pylist()  # any: as above
    try:
        with DiskWriter(path) as file:
            for start, stop in split_by_limits((exclusive_cumsum(sizes), CHUNK_BYTES)):
                contents = reader.read_members(rows[start:stop])
                pages = packer(Samples(keys[start:stop], names[start:stop], contents, labels[start:stop]))
                tar.append(pages)
                file.pages(pages)
            end = packer.end()
            tar.append(end)
            file.end(end)
    finally:
        reader.close()
    codes = exts.dictionary_encode()
    members = members_column(codes.dictionary.to_pylist(), codes.indices.to_numpy().astype(np.int64), sizes, labels)
    return live.set_column(live.column_names.index("members"), "members", members).combine_chunks()
