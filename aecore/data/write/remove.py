"""Write removal files: what a generation removes of the parts before it, with a record for each that states what is left (`removal.py`)."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from aecore.artifact.commit import PartRecord, write_record
from aecore.artifact.documents import read_json
from aecore.data.dataset import Dataset
from aecore.data.format.image import ImageHeader, image_header
from aecore.data.format.index import QUARANTINE_SCHEMA, REMOVED_SCHEMA, content_sha256, data_members, read_table
from aecore.data.format.record import array_header
from aecore.data.manifest import RejectedPart, ShardRef
from aecore.data.removal import read_removed, removal_name
from aecore.data.write.shard import put_table
from aecore.store import Store
from aecore.threads import map_ordered

pc: Any = pyarrow.compute  # any: pyarrow's stubs know no types of values
Part = ShardRef | RejectedPart
WRITERS = 4  # parts at a time
READERS = 16  # records at a time


def remove_samples(dataset: Dataset, removed: pa.Table, claim: int) -> list[PartRecord]:
    """Commit removal files and records of all parts of a generation that hold these samples (split, ordinal, key, reason).

    A file names also what was removed of its part before. Equal samples give equal bytes, so the same claim can do it again.
    """
    splits = {name: removed.filter(pc.equal(removed["split"], name)).sort_by("ordinal") for name in pc.unique(removed["split"]).to_pylist()}
    parts = (part for part in dataset.manifest.parts if part.split in splits)
    work = [(part, rows) for part in parts if len(rows := _rows_of(part, splits[part.split]))]
    return [*map_ordered(lambda each: _remove(dataset, *each, claim), work, threads=WRITERS)]


def part_of(record: PartRecord) -> str:
    """Return the stem of the part of which the removal with this record removes samples."""
    return record.part.rpartition("-g")[0]


def live_details(store: Store, parts: tuple[Part, ...], new: Mapping[str, PartRecord]) -> list[Mapping[str, Any]]:
    """Return the counts of live samples of each part, as its newest record states them; `new` has the removals of now, by stem."""

    def detail(part: Part) -> Mapping[str, Any]:
        if part.stem in new:
            return new[part.stem].detail
        name = part.stem if part.removed is None else part.removed.record
        found: Mapping[str, Any] = read_json(store, f"records/{name}.json")["detail"]
        return found

    return [*map_ordered(detail, parts, threads=READERS)]


def _rows_of(part: Part, removed: pa.Table) -> pa.Table:
    """Return the rows of a part among those of its split, which are sorted: a search, so many parts cost no pass over all rows each."""
    start, stop = np.searchsorted(removed["ordinal"].to_numpy(), [part.first_ordinal, part.first_ordinal + part.planned]).tolist()
    return removed.slice(start, stop - start).select(REMOVED_SCHEMA.names)


def _remove(dataset: Dataset, part: Part, rows: pa.Table, claim: int) -> PartRecord:
    store, before = dataset.store, read_removed(dataset.store, part)
    table = pa.concat_tables([rows if before is None else before.replace_schema_metadata(None), *([] if before is None else [rows])])
    table = table.sort_by("ordinal").combine_chunks()
    name = removal_name(part.stem, claim)
    file = put_table(store, name, table, {"format": 1, "split": part.split, "stem": part.stem}, "removal")
    index, quarantine = _tables(store, part)
    live, bad = _without(table, index, quarantine)
    detail: dict[str, Any] = {"split": part.split, "samples": len(live), "quarantined": len(bad), "reasons": _counts(bad["reason"])}
    groups = 0
    if isinstance(part, ShardRef):
        names = live["label_name"] if live["label_name"].null_count < len(live) else live["label"].cast(pa.string())
        detail |= {"bytes": part.tar.bytes, "classes": _counts(names), "extensions": _counts(data_members(live)[0])}
        detail["shapes"] = _shapes(dataset, part, index, live)
        if part.groups:
            detail["groups"] = pc.count_distinct(live["group"]).as_py()
            groups = part.groups - detail["groups"]
    counts = {"removed_samples": len(index) - len(live), "removed_quarantined": len(quarantine) - len(bad), "removed_groups": groups}
    detail |= {"content_sha256": content_sha256(table), **counts}
    assert counts["removed_samples"] + counts["removed_quarantined"] == len(table), f"{part.stem} lacks samples that are removed from it"
    stem = name.removeprefix("removed/").removesuffix(".parquet")
    return write_record(store, PartRecord(stem, (file,), len(live), len(bad), detail))


def _tables(store: Store, part: Part) -> tuple[pa.Table, pa.Table]:
    """Return index and quarantine of a part, without rows where there is none."""
    no_index = pa.table({"ordinal": pa.array([], pa.int64())})
    refs = part.index if isinstance(part, ShardRef) else None, part.quarantine
    index, quarantine = (None if ref is None else read_table(store.read(ref.name, ref=ref), f"{store.url}/{ref.name}") for ref in refs)
    return no_index if index is None else index, QUARANTINE_SCHEMA.empty_table() if quarantine is None else quarantine


def live_tables(store: Store, part: Part, removed: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Return index and quarantine of a part without the removed rows; without rows where there is none."""
    return _without(removed, *_tables(store, part))


def _without(removed: pa.Table, index: pa.Table, quarantine: pa.Table) -> tuple[pa.Table, pa.Table]:
    gone = removed["ordinal"].combine_chunks()
    live, bad = (each.filter(pc.invert(pc.is_in(each["ordinal"], value_set=gone))) for each in (index, quarantine))
    return live, bad


def _counts(column: Any) -> dict[str, int]:  # any: as above
    return {str(item["values"]): item["counts"] for item in pc.value_counts(column).to_pylist() if item["values"] is not None}


def _shapes(dataset: Dataset, shard: ShardRef, index: pa.Table, live: pa.Table) -> dict[str, int]:
    """Return the live samples of a shard by format.

    The index has that of most images (not the channels of CMYK or TIFF), of arrays only the length of the first axis. Where what it has
    does not explain what the shard's record states, the headers of the live samples are read.
    """
    own = Counter(read_json(dataset.store, f"records/{shard.stem}.json")["detail"]["shapes"])
    others = own.keys() - _formats(index, None).keys()
    of_arrays = next(iter(others)) if len(others) == 1 else None
    found = _formats(live, of_arrays) if _formats(index, of_arrays) == own else _formats_of_bytes(dataset, shard, index, live)
    return dict(found)


def _formats(index: pa.Table, of_arrays: str | None) -> Counter[str]:
    """Return the samples of an index by the format that it states; arrays, if there are any, have the given one."""
    found: Counter[str] = Counter()
    for row in index.group_by(["width", "height", "mode"]).aggregate([([], "count_all")]).to_pylist():
        if row["mode"] is not None:
            found[ImageHeader(row["width"], row["height"], row["mode"], "").format_text] += row["count_all"]
        elif of_arrays is not None:
            found[of_arrays] += row["count_all"]
    return found


def _formats_of_bytes(dataset: Dataset, shard: ShardRef, index: pa.Table, live: pa.Table) -> Counter[str]:
    if not len(live):
        return Counter()
    rows = np.flatnonzero(np.isin(index["ordinal"].to_numpy(), live["ordinal"].to_numpy()))
    shards = dataset.manifest.identity.get("shards", {})
    layout, pixels, reader = shards.get("layout", "auto"), dataset.pixels, dataset.reader(shard)
    try:
        read = reader.read_rows(rows)
    finally:
        reader.close()
    found: Counter[str] = Counter()
    for ext, data in zip(data_members(live)[0].to_pylist(), read, strict=True):
        is_array = ext == "npy"
        header = array_header(data, pixels=pixels, layout=layout) if is_array else image_header(data, ext, pixels=pixels, max_pixels=2**32)
        found[header.format_text] += 1
    return found
