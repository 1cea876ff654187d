"""Count again what a shard holds: the record that its writer would write for the bytes that are there now.

Manifests and records state counts, formats, classes and places of samples; all of that follows from index, quarantine and members, which
`verify` reads anyway. Headers of PNG, JPEG and `.npy` members are compared with the index; those of other formats would have to be decoded.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from aecore.artifact.commit import PartRecord
from aecore.data.format.bad_sample import BadSample
from aecore.data.format.image import ImageHeader, has_png_meaning, stated_header
from aecore.data.format.record import DATA_EXTENSIONS, ArrayHeader, Sample, array_header
from aecore.data.manifest import RejectedPart, Removed, ShardRef
from aecore.data.removal import REASONS
from aecore.data.sources import Listing
from aecore.data.sources._skipped import first_of
from aecore.data.write.splits import SplitSpec, assign_splits, hashes
from aecore.errors import ConfigError, DataError
from aecore.registry import from_dict, shown

_Header = ImageHeader | ArrayHeader | None
_IN_ORDER = 64  # rows of a shard whose place in the shuffle is looked at: a wrong seed puts them in another order
_PNG_START, _NPY_START = 33, 10  # bytes: of a PNG up to its first chunk of pixels, of a `.npy` before the text of its header


def _array_start(data: bytes) -> bytes:
    """Return the bytes of the header of a `.npy` and the number of all."""
    return data[: _NPY_START + int.from_bytes(data[8:_NPY_START], "little")] + len(data).to_bytes(8, "little")


class Headers:
    """The headers of the members of one shard, in order, as the settings of the dataset (`shards`) read them."""

    def __init__(self, shards: Mapping[str, Any]) -> None:  # any: plain JSON data
        self._pixels: Any = shards.get("pixels", 1)  # any: a Literal
        self._layout: Any = shards.get("layout", "auto")  # any: as above
        self._codes: list[int] = []
        self._known: dict[_Header, int] = {}
        self._starts: dict[tuple[str, bytes], int] = {}  # of members that begin with all that is known of them: datasets repeat them

    def __call__(self, sample: Sample) -> None:
        """Add the header of the next sample; DataError if it is damaged, which its sha256 does not say."""
        ext, data = sample.data
        plain = ext == "png" and not (self._pixels == 2 and has_png_meaning(data))
        start = ext, data[:_PNG_START] if plain else _array_start(data) if ext == "npy" else b""
        code = self._starts.get(start)
        if code is None:
            try:
                header = self._header(ext, data)
            except BadSample as error:
                raise DataError(f"sample {sample.key!r} is no readable {ext} ({error}): restore it or write the dataset again") from error
            if header is not None and header.ext != ext:
                raise DataError(f"sample {sample.key!r} is stored as {ext} and is {header.ext}: restore it or write the dataset again")
            code = self._known.setdefault(header, len(self._known))
            if start[1]:
                self._starts[start] = code
        self._codes.append(code)

    def _header(self, ext: str, data: bytes) -> _Header:
        if ext == "npy":
            return array_header(data, pixels=self._pixels, layout=self._layout)
        return stated_header(data, ext, pixels=self._pixels)

    def problems(self, index: pa.Table) -> Iterator[str]:
        """Yield the columns of the index that are not what the headers say."""
        codes: Any = pa.array(self._codes, pa.int32())  # any: pyarrow's stubs take it for booleans
        known = list(self._known)
        seen = pa.array([header is not None for header in known]).take(codes)
        for name in ("width", "height", "mode", "length"):
            kind = index.schema.field(name).type
            right: Any = pa.array([getattr(header, name, None) for header in known], kind).take(codes)  # any: as above
            stated: Any = index.column(name).combine_chunks()
            if not (stated.equals(right) if None not in self._known else stated.filter(seen).equals(right.filter(seen))):
                yield f"the column {name} is not what the samples' headers say"

    def formats(self, index: pa.Table, rows: NDArray[np.int64] | None = None) -> dict[str, int]:
        """Return the samples (with `rows`, these of the index) by format, as the index has it for samples whose header is not known."""
        counts: Counter[str] = Counter()
        codes = np.array(self._codes, np.int64)
        if rows is not None:
            codes, index = codes[rows], index.take(rows)
        numbers = np.bincount(codes, minlength=len(self._known)).tolist()
        for header, code in self._known.items():
            if header is not None and numbers[code]:
                counts[header.format_text] += numbers[code]
        if None in self._known:
            unknown = index.filter(pa.array(codes == self._known[None]))
            for row in unknown.group_by(["width", "height", "mode"]).aggregate([([], "count_all")]).to_pylist():
                if None not in row.values():  # else the sum is wrong, which is seen
                    counts[ImageHeader(row["width"], row["height"], row["mode"], "").format_text] += row["count_all"]
        return dict(counts)

    def unlike(self, shards: Mapping[str, Any]) -> Iterator[str]:  # any: plain JSON data
        """Yield the formats that the settings `shards.resize` and `shards.mode` do not leave."""
        side, mode = shards.get("resize"), shards.get("mode", "keep")
        for header in self._known:
            if isinstance(header, ImageHeader) and (
                (side is not None and (header.width, header.height) != (side, side)) or mode not in ("keep", header.mode)
            ):
                yield f"there are samples of format {header.format_text}, and the settings say shards.resize={side}, shards.mode={mode}"


def record_of(part: ShardRef | RejectedPart, index: pa.Table | None, quarantine: pa.Table | None, shapes: Mapping[str, int]) -> PartRecord:
    """Return the record of a part with this content (without timings)."""
    num, bad = 0 if index is None else len(index), 0 if quarantine is None else len(quarantine)
    ordinals = [table["ordinal"] for table in (index, quarantine) if table is not None]
    first = part.first_ordinal if part.lost else min(pc.min(column).as_py() for column in ordinals if len(column))
    detail: dict[str, Any] = {"split": part.split, "planned": num + bad + part.lost, "first_ordinal": first}
    detail |= {"samples": num, "quarantined": bad} | ({"lost": part.lost} if part.lost else {})
    detail["reasons"] = {} if quarantine is None else _counts(quarantine["reason"])
    files = [part.quarantine]
    if isinstance(part, ShardRef):
        assert index is not None
        files = [part.index, part.quarantine] if part.tar_base_url is not None else [part.tar, part.index, part.quarantine]
        detail |= {"content_sha256": part.index_content_sha256, "bytes": part.tar.bytes, "shapes": dict(shapes)}
        detail |= {"extensions": _extensions(index), "classes": _counts(_class_names(index))}
        if index["group"].null_count < num:
            detail["groups"] = pc.count_distinct(index["group"]).as_py()
        if part.tar_base_url is not None:
            detail |= {"tar": dataclasses.asdict(part.tar), "home": part.tar_base_url}
    return PartRecord(part.stem, tuple(ref for ref in files if ref is not None), num, bad, detail)


def removal_record_of(
    part: ShardRef | RejectedPart, removed: Removed, index: pa.Table | None, quarantine: pa.Table | None, shapes: Mapping[str, int]
) -> PartRecord:
    """Return the record of a removal that leaves these rows of index and quarantine, and samples of these `shapes` (without timings)."""
    num, bad = 0 if index is None else len(index), 0 if quarantine is None else len(quarantine)
    detail: dict[str, Any] = {"split": part.split, "samples": num, "quarantined": bad, "content_sha256": removed.content_sha256}
    detail["reasons"] = {} if quarantine is None else _counts(quarantine["reason"])
    lost, groups = 0, 0
    if isinstance(part, ShardRef):
        assert index is not None
        detail |= {"bytes": part.tar.bytes, "shapes": dict(shapes)}
        detail |= {"extensions": _extensions(index), "classes": _counts(_class_names(index))}
        lost = part.samples - num
        if part.groups:
            detail["groups"] = pc.count_distinct(index["group"]).as_py()
            groups = part.groups - detail["groups"]
    detail |= {"removed_samples": lost, "removed_quarantined": part.planned - part.lost - num - bad - lost, "removed_groups": groups}
    return PartRecord(removed.record, (removed.file,), num, bad, detail)


def removal_problems(removed: pa.Table, index: pa.Table | None, quarantine: pa.Table | None, before: pa.Table | None) -> Iterator[str]:
    """Yield where a removal file does not name samples of its part, each once, among them those of the removal `before` it."""
    ordinals: Any = removed["ordinal"].combine_chunks()  # any: pyarrow's stubs know no types of values
    if ordinals.null_count or (np.diff(ordinals.to_numpy(zero_copy_only=False)) <= 0).any():
        yield "its rows are not in the order of their ordinals, each once"
        return
    tables = [table.select(["ordinal", "key"]) for table in (index, quarantine) if table is not None]
    stored = pa.concat_tables([table.replace_schema_metadata(None) for table in tables])
    at = pc.index_in(ordinals, value_set=stored["ordinal"].combine_chunks())
    keys: Any = removed["key"].combine_chunks()  # any: as above
    if at.null_count:
        yield f"it names the ordinal {ordinals.filter(at.is_null())[0].as_py()}, which the part does not have"
    elif not (wanted := stored["key"].combine_chunks().take(at)).equals(keys):
        row = pc.index(pc.equal(wanted, keys).fill_null(False), False).as_py()
        yield f"it names the sample {shown(keys[row].as_py())} of ordinal {ordinals[row].as_py()}, which is {shown(wanted[row].as_py())}"
    known = pc.is_in(removed["reason"], value_set=pa.array(REASONS)).to_numpy()
    if not known.all():
        yield f"it gives the reason {shown(removed['reason'][int(np.argmin(known))].as_py())}, expected one of {', '.join(REASONS)}"
    if before is not None:
        left = before.filter(pc.invert(pc.is_in(before["ordinal"], value_set=ordinals)))
        if len(left):
            yield f"it does not name {shown(left['key'][0].as_py())}, which a generation before removed: what is removed never comes back"


def _counts(column: Any) -> dict[str, int]:  # any: a chunked array
    return {str(item["values"]): item["counts"] for item in pc.value_counts(column).to_pylist() if item["values"] is not None}


def _class_names(index: pa.Table) -> Any:  # any: as above
    names = index["label_name"]
    return index["label"].cast(pa.string()) if names.null_count == len(index) else names


def _extensions(index: pa.Table) -> dict[str, int]:
    members: Any = index["members"].combine_chunks()  # any: pyarrow's stubs give no flatten
    return {ext: count for ext, count in _counts(members.flatten().field("ext")).items() if ext in DATA_EXTENSIONS}


def require_values(where: str, index: pa.Table | None, quarantine: pa.Table | None) -> None:
    """DataError if a row of a part has no key or no ordinal."""
    for what, table in (("index", index), ("quarantine", quarantine)):
        for name in ("key", "ordinal"):
            if table is not None and table[name].null_count:
                raise DataError(f"{where}: the {what} has rows without {name}: restore it or write the dataset again")


def row_problems(
    part: ShardRef | RejectedPart, index: pa.Table | None, quarantine: pa.Table | None, classes: Sequence[str], identity: Mapping[str, Any]
) -> Iterator[str]:
    """Yield where rows of index and quarantine are not those of this part: ordinals, split, classes, and the settings (`identity`)."""
    ordinals = [table["ordinal"].to_numpy() for table in (index, quarantine) if table is not None]
    first, stop = part.first_ordinal, part.first_ordinal + part.planned
    found = np.sort(np.concatenate(ordinals))
    placed = len(found) + part.lost == part.planned and (np.diff(found) > 0).all() and (found >= first).all() and (found < stop).all()
    if not placed:
        yield f"the ordinals of samples and quarantine are not {first} to {stop - 1}, each once{' but the lost ones' if part.lost else ''}"
    if quarantine is not None and quarantine["split"].unique().to_pylist() != [part.split]:
        yield f"the quarantine has rows of other splits than {part.split}"
    if index is None:
        return
    if (np.diff(ordinals[0]) <= 0).any():
        yield "the rows of the index are not in the order of their ordinals"
    names, labels = index["label_name"].combine_chunks(), index["label"].combine_chunks()
    numbers: Any = pc.index_in(names, value_set=pa.array(classes, pa.string()))  # any: pyarrow's stubs know no types of values
    if names.null_count < len(index) and not numbers.equals(labels):
        yield "the labels are not the numbers of their class names in the manifest"
    yield from _setting_problems(part, index, identity)


def _setting_problems(part: ShardRef | RejectedPart, index: pa.Table, identity: Mapping[str, Any]) -> Iterator[str]:
    """Yield where the samples of a shard are not where `splits.*` and `shards.*` put them."""
    try:
        splits = from_dict(SplitSpec, identity["splits"])
        shards = dict(identity["shards"])
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        yield f"the manifest's identity has no readable splits and shards ({error})"
        return
    keys: Any = index["key"].to_pylist()  # any: pyarrow's stubs make them optional
    groups: Any = index["group"].to_pylist() if index["group"].null_count == 0 else None  # any: as above
    shares = [name for name in ("val", "test") if getattr(splits, name)]
    if splits.stratify or splits.by == "content":
        pass  # follows from all samples that there were at the first generation; from bytes that were read before those that are stored
    elif shares and part.split in ("train", *shares):  # folders and columns name the other splits, a hash divides train
        sources: Any = index["source"].to_pylist()  # any: as above
        listing = Listing(keys, sources, np.zeros(len(index), np.int64), groups=groups)
        found = assign_splits(listing, dataclasses.replace(splits, by="hash", column=None))
        if found.keys() != {part.split}:
            yield f"its samples belong to {', '.join(found)} by val={splits.val:g}, test={splits.test:g} and seed={splits.seed} of splits"
    elif splits.by == "hash" or (splits.by == "none" and part.split != "train"):
        yield f"splits.by={splits.by}, val={splits.val:g}, test={splits.test:g} make no split {part.split}"
    elif not shares and splits.column in index.column_names:
        values = {str(value) for value in index[splits.column].unique().to_pylist()}
        if values != {part.split}:
            yield f"the column {splits.column}, which names the split, holds {first_of(sorted(values))}"
    if "adopted" in identity:
        return
    most = shards.get("max_samples")
    if groups is None and isinstance(most, int) and part.planned > most:
        yield f"it has {part.planned} samples, and the settings say shards.max_samples={most}"
    if shards.get("shuffle"):
        places = hashes((groups or keys)[:_IN_ORDER], f"order {shards.get('seed')} {part.split}")
        if (places[1:] < places[:-1]).any():
            yield f"its samples are not in the order of shards.seed={shards.get('seed')}"
