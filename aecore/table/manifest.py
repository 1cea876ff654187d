"""`table.NNNNNN.json`: the parts of a latent table and the lineage of their rows.

A manifest names every part with its size and hash, and the chain of custody: checkpoint, dataset generation, shards. It is a
pure function of the part records and of the inputs, without timestamps, so the same work gives the same bytes. Parts are in the order
of the dataset's manifest. A generation adds the parts of new shards, and names other parts of a shard that lost samples, or of all shards
where columns were added: copies of the old ones without these rows, or with these columns (`copied_from`).
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aecore.artifact.commit import PartRecord, is_stem_of, require_parent
from aecore.artifact.documents import disagreement, read_json, require_counts_of, require_once, typed
from aecore.errors import DataError
from aecore.registry import LARGEST_SIZE, shown
from aecore.store import FileRef, Store, sha256_json

STEM = "table"
ALL, METADATA = "all", "metadata"  # words of `encode.columns`: every column but `members`; those of tables of before
DTYPES = ("float32", "float16", "int32")  # of encoded columns
LATER = ("footer_sha256", "removed_sha256", "copied_from")  # keys that a part lacks where they say nothing
_COPY = re.compile(r"(-r\d{6})?(-t\d{6})?")  # what follows the shard in the name of a part: rows of it, the claim that wrote it again


@dataclass(frozen=True, slots=True)
class TablePart:
    """One Parquet file: the live rows `[row_start, row_stop)` of one input shard, less the quarantined ones and those not chosen."""

    split: str
    stem: str
    rows: int
    file: FileRef
    shard: str
    shard_sha256: str
    row_start: int
    row_stop: int
    quarantined: int = 0
    quarantine: FileRef | None = None
    footer_sha256: str | None = None  # no page checksum covers it; None in parts of version 1: their file's is compared
    removed_sha256: str | None = (
        None  # content hash of the removal file of the shard by which its live rows are counted; None: all are live
    )
    copied_from: str | None = None  # sha256 of the part whose rows it has; None: they were encoded

    @classmethod
    def from_record(cls, record: PartRecord) -> "TablePart":
        """Return the manifest's entry of a recorded part."""
        by_folder = {ref.name.split("/")[0]: ref for ref in record.files}
        where: dict[str, Any] = {name: record.detail[name] for name in ("split", "shard", "shard_sha256", "row_start", "row_stop")}
        where |= {name: record.detail.get(name) for name in LATER}
        return cls(
            stem=record.part,
            rows=record.rows,
            file=by_folder["data"],
            quarantined=record.quarantined,
            quarantine=by_folder.get("quarantine"),
            **where,
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data; a part of before keeps the keys that it had."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in LATER or value is not None}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "TablePart":
        """Return the part from the result of `to_json`."""
        quarantine = data["quarantine"]
        files = {"file": typed(FileRef, data["file"]), "quarantine": typed(FileRef, quarantine) if quarantine else None}
        return typed(cls, {**data, **files})


@dataclass(frozen=True, slots=True)
class TableManifest:
    """One generation of a table and all before it.

    `identity` is shared by all generations (checkpoint, preprocessing, columns, dtype, batch); `columns` are the encoded columns
    with dtype and length; `lineage` names the checkpoint and the dataset generation that the rows cover.
    """

    number: int
    parent: int
    parent_sha256: str | None
    claim_sha256: str | None  # of the identity of the claim that made this generation; None in manifests of version 1
    identity: Mapping[str, Any]
    columns: Mapping[str, Any]
    lineage: Mapping[str, Any]
    parts: tuple[TablePart, ...]

    @property
    def num_rows(self) -> int:
        """Number of rows of all parts."""
        return sum(part.rows for part in self.parts)

    @property
    def index_columns(self) -> tuple[str, ...]:
        """What `encode.columns` said of the columns that rows take from the index (see `aecore.table.part.passed_names`)."""
        return tuple(self.identity.get("index_columns", (METADATA,)))

    @property
    def files(self) -> tuple[FileRef, ...]:
        """Every file that the manifest names: parts and quarantine."""
        return tuple(ref for part in self.parts for ref in (part.file, part.quarantine) if ref is not None)

    @property
    def quarantined(self) -> int:
        """Number of samples that are in quarantine instead of in a part."""
        return sum(part.quarantined for part in self.parts)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data; `from_json` reads it back."""
        data: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        data["parts"] = [part.to_json() for part in self.parts]
        return data | {"num_rows": self.num_rows, "quarantined": self.quarantined}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "TableManifest":
        """Return the manifest from the result of `to_json`; KeyError or TypeError for other data."""
        names = [field.name for field in dataclasses.fields(cls) if field.name not in ("parts", "claim_sha256")]
        parts = tuple(TablePart.from_json(part) for part in data["parts"])
        require_once([part.file.name for part in parts], "a part")
        made = typed(cls, {**{name: data[name] for name in names}, "claim_sha256": data.get("claim_sha256"), "parts": parts})
        _require_lineage(made)
        _require_agreement(made)
        require_counts_of(data, num_rows=made.num_rows, quarantined=made.quarantined)
        return made


def part_size(rows_per_part: int, batch: int) -> int:
    """Return the rows of a part: `rows_per_part` rounded up to whole batches; 0: those of its shard."""
    return -(-rows_per_part // batch) * batch


def _require_lineage(manifest: TableManifest) -> None:
    """KeyError or TypeError unless lineage and identity name the checkpoint and the dataset as readers expect."""
    lineage, checkpoint, dataset = manifest.lineage, manifest.lineage["checkpoint"], manifest.lineage["dataset"]
    texts = (checkpoint["url"], checkpoint["sha256"], dataset["url"], dataset["sha256"], manifest.identity["checkpoint_sha256"])
    if not all(type(text) is str for text in texts) or not all(type(number) is int for number in (checkpoint["step"], dataset["number"])):
        raise TypeError(f"its lineage names {shown(checkpoint)} and {shown(dataset)}")
    if not isinstance(lineage["encoded_by"], list) or not all(isinstance(each, dict) for each in lineage["encoded_by"]):
        raise TypeError(f"its lineage says encoded_by {shown(lineage['encoded_by'])}")


def _require_agreement(manifest: TableManifest) -> None:
    """ValueError if what a manifest states twice differs: columns, numbers, addresses, the names of parts, the hash of the claim."""
    identity, lineage = manifest.identity, manifest.lineage
    require_parent(manifest.number, manifest.parent, manifest.parent_sha256)
    for name, kind, least in (("batch", int, 1), ("rows_per_part", int, 0), ("dtype", str, ""), ("preprocessing", dict, None)):
        if type(identity[name]) is not kind or (kind is int and identity[name] < least):
            raise ValueError(f"its identity has the {name} {shown(identity[name])}")
    chosen = identity.get("index_columns", [])
    if not isinstance(chosen, list) or not all(type(name) is str for name in chosen) or type(identity.get("where", "")) is not str:
        raise ValueError(f"its identity has the index_columns {shown(chosen)} and the predicate {shown(identity.get('where'))}")
    for name, info in manifest.columns.items():
        dtypes = ("float32", "int32") if info["dim"] is None else (identity["dtype"], "int32")
        if (
            info["dtype"] not in dtypes
            or info["dtype"] not in DTYPES
            or not (info["dim"] is None or (type(info["dim"]) is int and 0 < info["dim"] <= LARGEST_SIZE))
        ):
            raise ValueError(
                f"its column {name} is {shown(info)}, expected a dtype of {' or '.join(dtypes)} and a dim up to {LARGEST_SIZE:,} or null"
            )
    if differences := disagreement(dict(manifest.columns), identity["columns"]):
        raise ValueError(f"its columns are not those of its identity: {differences}")
    if lineage["checkpoint"]["sha256"] != identity["checkpoint_sha256"]:
        made_by, wanted = lineage["checkpoint"]["sha256"], identity["checkpoint_sha256"]
        raise ValueError(f"its lineage names the checkpoint with sha256 {made_by[:12]}, its identity the one with {wanted[:12]}")
    claimed = sha256_json({"table": identity, "dataset_sha256": lineage["dataset"]["sha256"]})
    if manifest.claim_sha256 not in (None, claimed):
        raise ValueError(f"claim_sha256 is {shown(manifest.claim_sha256)}, its identity and its dataset have {claimed}")
    size = part_size(identity["rows_per_part"], identity["batch"])
    for part in manifest.parts:
        copied = part.copied_from is not None
        if size and ((part.row_start % size and not copied) or part.row_stop - part.row_start > size):
            raise ValueError(f"{part.stem} has the rows {part.row_start} to {part.row_stop}, expected {size} by rows_per_part and batch")
        names = [(part.file, f"data/split={part.split}/{part.stem}.parquet"), (part.quarantine, f"quarantine/{part.stem}.parquet")]
        wrong = next((ref.name for ref, name in names if ref is not None and ref.name != name), None)
        rows = "" if not size else f"-r{part.row_start // size:06d}"
        named = _COPY.fullmatch(part.stem.removeprefix(part.shard))
        same_rows = named is not None and ((named[1] or "") == rows or (copied and size and named[1]))
        if wrong is not None or not same_rows or (copied and named is not None and not named[2]) or not is_stem_of(part.split, part.shard):
            raise ValueError(f"the part {shown(part.stem)} of shard {shown(part.shard)} is {shown(wrong or part.file.name)}")
        if (part.quarantine is None) != (part.quarantined == 0) or part.row_stop < part.row_start:
            raise ValueError(f"{part.stem} has {part.quarantined} quarantined of the rows {part.row_start} to {part.row_stop}")


def read_table_manifest(store: Store, number: int) -> TableManifest:
    """Return one generation's manifest; DataError if it is missing, damaged or not of a table."""
    name = f"{STEM}.{number:06d}.json"
    return table_manifest_of(read_json(store, name), f"{store.url}/{name}")


def table_manifest_of(data: Mapping[str, Any], where: str) -> TableManifest:
    """Return what a file says, as `TableManifest.from_json` does; DataError that names `where` if it is something else."""
    try:
        return TableManifest.from_json(data)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{where} is not a table manifest ({error!r}): it is damaged or was not written by aecore") from error
