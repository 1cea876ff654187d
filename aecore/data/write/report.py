"""The report of a generation: what a person asks first of a dataset, in one small file, made after the commit.

`report/NNNNNN.json`, and beside it `report/NNNNNN.sha256` (as `sha256sum` writes it), which is put last. No manifest names it: a dataset
without its report, or with a damaged one, is complete, and the next run makes it again. Counts come from the manifest, equal content from
what is known of every sample. Mean, standard deviation and constant samples are of at most 4,096 training samples, fewer where they are
large, the first by a hash of their key, so a generation that changes little decodes little: the sums of the report before are exact
numbers, to which what came is added and from which what went is subtracted.
"""

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray

from aecore.artifact.documents import read_document, sealed
from aecore.artifact.withdrawn import made_of
from aecore.data.dataset import Dataset
from aecore.data.format.image import ImageHeader
from aecore.data.format.limits import exclusive_cumsum, split_by_limits
from aecore.data.format.record import array_header, array_values
from aecore.data.format.sample_format import SampleFormat
from aecore.data.manifest import ShardRef, read_manifest
from aecore.data.write.equal import TRAIN, reported
from aecore.data.write.ledger import read_known
from aecore.data.write.remove import live_details
from aecore.data.write.splits import hashes
from aecore.errors import AecoreError, DataError
from aecore.native.bytes_column import BytesColumn
from aecore.native.loops import decode_pngs
from aecore.native.texts import Texts
from aecore.registry import shown
from aecore.store import AlreadyExists, Store, sha256_json
from aecore.threads import map_ordered

logger = logging.getLogger(__name__)
pc: Any = pyarrow.compute  # any: pyarrow's stubs know no types of values
Report = dict[str, Any]  # any: plain JSON data
Int64s = NDArray[np.int64]
FOLDER = "report"
MOST_SAMPLES, MOST_VALUES = 4096, 1 << 24  # that are decoded for mean and standard deviation: less than 0.1 s
MOST_EXACT = 1 << 30  # values, of all samples with shards.check=decode: about 10 s, once
MOST_VALUE = 1e100
TINY, TINY_SHARE, LONG, RARE = 8, 0.25, 4.0, 0.01
SHOWN = 5  # examples
_BLOCK_VALUES, _SLICE_VALUES, _THREADS = 1 << 22, 1 << 20, 2
_PLAIN = {"L": 1, "RGB": 3}  # modes whose small PNGs are decoded in one call


_COUNTS = {str: int}
_EQUAL = {"samples": int, "contents": int, "remaining": int, "examples": [{str: [str]}]}
_FEW = {"samples": int, "formats": _COUNTS, "examples": [str]}
_SUMS = {"channels": int, "dtype": str, "samples": int, "values": int, "sum": [float], "squares": [float], "mean": [float], "std": [float]}
_FORM = {
    "number": int,
    "manifest_sha256": str,
    "counts": {"splits": _COUNTS, "quarantined": _COUNTS, "classes": {str: _COUNTS}, "sizes": _COUNTS, "modes": _COUNTS},
    "left_out": int,
    "duplicates": {**_EQUAL, "examples": [[str]]},
    "leaks": {**_EQUAL, "splits": _COUNTS},
    "contradicting_labels": _EQUAL,
    "tiny": _FEW,
    "odd": _FEW,
    "pixels": {
        "samples": int,
        "of": int,
        "exact": bool,
        "chosen_by": str,
        "formats": [_SUMS],
        "constant": {"samples": int, "examples": [str]},
        "unreadable": int,
    },
    "seconds": {str: float},
}


def report_name(number: int) -> str:
    """Return the name of the report of a generation."""
    return f"{FOLDER}/{number:06d}.json"


def _hash_name(number: int) -> str:
    return f"{FOLDER}/{number:06d}.sha256"


def read_report(dataset: Dataset) -> Report | None:
    """Return the report of the generation; None if it was never made to its end. DataError if it is damaged or of another generation."""
    store, number = dataset.store, dataset.number
    name = report_name(number)
    if store.size(name) is None or store.size(_hash_name(number)) is None:
        return None
    report, content = read_document(store, name)
    if store.read(_hash_name(number)) != _hash_line(number, content):
        raise DataError(f"{store.url}/{name} is not what {_hash_name(number)} states: one of them was changed")
    if (wrong := _unlike(report, _FORM)) is not None:
        raise DataError(f"{store.url}/{name} was not written by aecore: {wrong}")
    if report["manifest_sha256"] != _manifest_sha256(dataset):
        raise DataError(f"{store.url}/{name} is the report of another generation {number}: it was copied from elsewhere")
    return report


def _unlike(found: Any, form: Any, where: str = "it") -> str | None:  # any: plain JSON data, and types in its place
    """Return where plain data is not of a form: types, a list of one form, a mapping by name or (`str`) of any names; None if nowhere."""
    if isinstance(form, dict):
        if not isinstance(found, dict) or (str not in form and found.keys() != form.keys()):
            return f"{where} is {shown(found)}, expected an object" + (f" of {', '.join(form)}" if str not in form else "")
        inside = [(found[name], form.get(name, form.get(str)), f"{where}.{name}") for name in found]
    elif isinstance(form, list):
        if not isinstance(found, list):
            return f"{where} is {shown(found)}, expected a list"
        inside = [(each, form[0], f"{where}[{number}]") for number, each in enumerate(found)]
    else:
        fits = type(found) in ((int, float) if form is float else (form,))
        return None if fits else f"{where} is {shown(found)}, expected {form.__name__}"
    return next((wrong for each in inside if (wrong := _unlike(*each)) is not None), None)


def report_state(dataset: Dataset) -> str:
    """Return `ok`, `missing`, or what is wrong with the report of a generation, or an earlier one. Neither is a fault of the dataset."""
    try:
        report = read_report(dataset)
        _require_earlier(dataset)
    except DataError as error:
        return f"damaged: {error}"
    return "missing" if report is None else "ok"


def _require_earlier(dataset: Dataset) -> None:
    """DataError if the report of another generation is not what the file beside it states."""
    store, there = dataset.store, {*dataset.store.list(FOLDER)}
    for number in range(1, dataset.number):
        name = report_name(number)
        if {PurePosixPath(name).name, PurePosixPath(_hash_name(number)).name} <= there and store.read(_hash_name(number)) != _hash_line(
            number, store.read(name)
        ):
            raise DataError(
                f"{store.url}/{name} is not what {_hash_name(number)} states: one of them was changed; nothing needs the report of an "
                "earlier generation: remove both"
            )


def ensure_report(
    dataset: Dataset,
    seconds: Mapping[str, float],
    known: tuple[pa.Table, pa.Table] | None = None,
    before: pa.Table | None = None,
) -> Report | None:
    """Return the report of a generation, which is made if there is none that can be read; None (and a warning) if that fails.

    Parameters
    ----------
    seconds : mapping
        What the stages of the run took.
    known : tuple of tables, optional
        Ledger of the generation and what it leaves out (see `read_known`); read where it is not given.
    before : table, optional
        The ledger of its parent.
    """
    try:
        try:
            report = read_report(dataset)
        except DataError as error:
            logger.warning("%s; it is made again", error)
            report = None
        if report is None:
            started = time.perf_counter()
            report = _made(dataset, read_known(dataset.store, dataset.manifest) if known is None else known, before)
            report["seconds"] = {name: round(spent, 3) for name, spent in {**seconds, "report": time.perf_counter() - started}.items()}
            with made_of(dataset.url, dataset.number, f"{dataset.url}/{report_name(dataset.number)}"):  # examples are keys of samples
                _put(dataset.store, dataset.number, report)
        return report
    except (
        AecoreError,
        OSError,
        MemoryError,
        ValueError,
        KeyError,
        TypeError,
    ) as error:  # the generation is committed, whatever happens here
        logger.warning("%s: the report of generation %d cannot be made (%s); the dataset is complete", dataset.url, dataset.number, error)
        return None


def _put(store: Store, number: int, report: Report) -> None:
    content = sealed(report)
    for name in (_hash_name(number), report_name(number)):  # of one that was damaged, or not finished
        if store.size(name) is not None:
            store.remove(name)
    try:
        store.put(report_name(number), content, role="report")
        store.put(_hash_name(number), _hash_line(number, content), role="report")
    except AlreadyExists:  # another process has just made it
        logger.info("%s: another process makes %s", store.url, report_name(number))


def _hash_line(number: int, content: bytes) -> bytes:
    return f"{hashlib.sha256(content).hexdigest()}  {number:06d}.json\n".encode()


def _manifest_sha256(dataset: Dataset) -> str:
    return sha256_json(dataset.manifest.to_json())


def _made(dataset: Dataset, known: tuple[pa.Table, pa.Table], before: pa.Table | None) -> Report:
    manifest, (ledger, left) = dataset.manifest, known
    return {
        "number": manifest.number,
        "manifest_sha256": _manifest_sha256(dataset),
        "counts": _counts(dataset),
        "left_out": len(left),
        **reported(ledger, left),
        **_unusual(dataset),
        "pixels": _pixels(dataset, ledger, before),
    }


def _counts(dataset: Dataset) -> dict[str, Any]:  # any: plain JSON data
    """Return the samples by split, class, size and mode, as the manifest has them."""
    manifest, sizes, modes = dataset.manifest, Counter[str](), Counter[str]()
    for text, count in manifest.sample.shapes.items():
        dims, _, mode = text.partition("/")
        is_image = _is_image(text)
        sizes["x".join(dims.split("x")[:2]) if is_image else dims] += count
        modes[mode] += count
    return {
        "splits": {split: manifest.num_samples(split) for split in manifest.splits},
        "quarantined": dict(manifest.reasons),
        "classes": {split: dict(manifest.statistics[split].classes) for split in manifest.splits},
        "sizes": {name: count for name, count in sizes.most_common() if count},
        "modes": {name: count for name, count in modes.most_common() if count},
    }


def _is_image(text: str) -> bool:
    try:
        return SampleFormat.parse(text).image
    except DataError:  # a mode that is not decoded
        return True


def _unusual(dataset: Dataset) -> dict[str, Any]:  # any: as above
    """Return the images that are tiny or odd by their headers: counts by format, and keys of some.

    Tiny: a side below 8 pixels, or below a quarter of the median one. Odd: one side more than 4 times the other, or a mode that fewer than
    1 % of the images have.
    """
    images = {text: count for text, count in dataset.manifest.sample.shapes.items() if count and _is_image(text)}
    total, modes = sum(images.values()), Counter[str]()
    sides = {text: sorted(int(side) for side in text.partition("/")[0].split("x")[:2]) for text in images}
    for text, count in images.items():
        modes[text.partition("/")[2]] += count
    shorts = sorted((sides[text][0], count) for text, count in images.items())
    ends = np.cumsum([count for _, count in shorts])
    median = shorts[int(np.searchsorted(ends, total / 2))][0] if shorts else 0
    tiny = {text for text, (short, _) in sides.items() if short < max(TINY, TINY_SHARE * median)}
    odd = {text for text, (short, long) in sides.items() if long > LONG * short or modes[text.partition("/")[2]] < RARE * total}
    examples = _examples(dataset, {"tiny": tiny, "odd": odd})
    return {
        name: {
            "samples": sum(images[text] for text in found),
            "formats": {text: images[text] for text in sorted(found, key=lambda text: (-images[text], text))},
            "examples": examples[name],
        }
        for name, found in (("tiny", tiny), ("odd", odd))
    }


def _examples(dataset: Dataset, wanted: Mapping[str, set[str]]) -> dict[str, list[str]]:
    """Return keys of some live images of these formats; only shards that have some are looked at, and no more than needed."""
    found: dict[str, list[str]] = {name: [] for name in wanted}
    if not any(wanted.values()):
        return found
    for shard, detail in zip(dataset.manifest.parts, live_details(dataset.store, dataset.manifest.parts, {}), strict=True):
        short = {name for name, texts in wanted.items() if len(found[name]) < SHOWN and texts & {*detail.get("shapes", {})}}
        if isinstance(shard, ShardRef) and short:
            index = dataset.index(shard)
            for row in index.group_by(["width", "height", "mode"]).aggregate([([], "count_all")]).to_pylist():
                if None in (row["width"], row["height"], row["mode"]):
                    continue
                text = ImageHeader(row["width"], row["height"], row["mode"], "").format_text
                for name in short:
                    if text in wanted[name] and len(found[name]) < SHOWN:
                        is_such = [pc.equal(index[column], row[column]) for column in ("width", "height", "mode")]
                        keys: list[Any] = index.filter(pc.and_(pc.and_(*is_such[:2]), is_such[2]))["key"].to_pylist()  # any: texts
                        found[name] += keys[: SHOWN - len(found[name])]
    return found


@dataclass
class _Sums:
    """Sums over decoded samples, by channels and dtype: `[samples, values of a channel, sums, sums of squares]`."""

    formats: dict[tuple[int, str], list[Any]] = field(default_factory=dict)  # any: numbers and lists of numbers
    constant: dict[str, int] = field(default_factory=dict)  # keys
    num_constant: int = 0
    unreadable: int = 0

    @classmethod
    def of(cls, pixels: Mapping[str, Any]) -> "_Sums":
        """Return the sums that a report states."""
        formats = {
            (each["channels"], each["dtype"]): [each["samples"], each["values"], list(each["sum"]), list(each["squares"])]
            for each in pixels["formats"]
        }
        return cls(formats, dict.fromkeys(pixels["constant"]["examples"], 1), pixels["constant"]["samples"], pixels["unreadable"])

    @property
    def is_exact(self) -> bool:
        """Whether all sums are whole numbers, which do not depend on their order."""
        return all(np.dtype(dtype).kind in "biu" and np.dtype(dtype).itemsize <= 2 for _, dtype in self.formats)

    def add(self, values: NDArray[Any], keys: Sequence[str]) -> None:  # any: every dataset has its own dtype
        """Add samples `[n, P, C]`: n samples of P values in C channels."""
        count, size, channels = values.shape
        name = values.dtype.name
        whole = values.dtype.kind in "biu" and values.dtype.itemsize <= 2
        same, step = np.ones(count, np.bool_), max(1, _SLICE_VALUES // (count * channels))
        of_format = self.formats.setdefault((channels, name), [0, 0, [0] * channels, [0] * channels])
        of_format[0] += count
        of_format[1] += count * size
        for start in range(0, size, step):  # a part of a large image, since sums need eight times its bytes
            wide = values[:, start : start + step].astype(np.int64 if whole else np.float64)
            for at, sums in ((2, wide.sum(axis=(0, 1))), (3, np.einsum("npc,npc->c", wide, wide))):
                of_format[at] = [known + more for known, more in zip(of_format[at], sums.tolist(), strict=True)]
            same &= (wide == values[:, :1]).all(axis=(1, 2))
        self.num_constant += int(same.sum())
        self.constant |= dict.fromkeys((keys[row] for row in np.flatnonzero(same).tolist()), 1)

    def less(self, other: "_Sums") -> "_Sums":
        """Return the sums without those of `other`, all of whose samples are in these."""
        formats = dict(self.formats)
        for key, (samples, values, *sums) in other.formats.items():
            mine = formats[key]
            rest = [[left - right for left, right in zip(mine[at + 2], sums[at], strict=True)] for at in range(2)]
            formats[key] = [mine[0] - samples, mine[1] - values, *rest]
        kept = {key: 1 for key in self.constant if key not in other.constant}
        left = {key: each for key, each in formats.items() if each[0]}
        return _Sums(left, kept, self.num_constant - other.num_constant, self.unreadable - other.unreadable)

    def plus(self, other: "_Sums") -> "_Sums":
        """Return the sums of both."""
        formats = {key: [each[0], each[1], list(each[2]), list(each[3])] for key, each in self.formats.items()}
        for key, each in other.formats.items():
            mine = formats.setdefault(key, [0, 0, [0] * key[0], [0] * key[0]])
            mine[0], mine[1] = mine[0] + each[0], mine[1] + each[1]
            for at in (2, 3):
                mine[at] = [left + right for left, right in zip(mine[at], each[at], strict=True)]
        constant = {**self.constant, **other.constant}
        return _Sums(formats, constant, self.num_constant + other.num_constant, self.unreadable + other.unreadable)

    def to_json(self) -> dict[str, Any]:  # any: as above
        """Return plain JSON data."""
        formats = []
        for (channels, dtype), (samples, values, sums, squares) in sorted(self.formats.items()):
            means = [total / values if values else 0.0 for total in sums]
            variances = [max(square / values - mean**2, 0.0) if values else 0.0 for square, mean in zip(squares, means, strict=True)]
            stated = {"channels": channels, "dtype": dtype, "samples": samples, "values": values, "sum": sums, "squares": squares}
            formats.append(stated | {"mean": means, "std": [variance**0.5 for variance in variances]})
        constant = {"samples": self.num_constant, "examples": sorted(self.constant)[:SHOWN]}
        return {"formats": formats, "constant": constant, "unreadable": self.unreadable}


def _pixels(dataset: Dataset, ledger: pa.Table, before: pa.Table | None) -> dict[str, Any]:  # any: as above
    """Return mean, standard deviation and constant ones of the chosen training samples."""
    shards = dataset.manifest.identity.get("shards", {})
    train = _training(ledger)
    most = min(MOST_SAMPLES, len(train), _most_samples(dataset, MOST_VALUES))
    if shards.get("check") == "decode" and len(train) <= _most_samples(dataset, MOST_EXACT):
        most = len(train)
    places = _places(dataset, train)
    chosen = _first(places, train["ordinal"].to_numpy(), most)
    sums = None if before is None else _changed_sums(dataset, train, places, chosen, _training(before))
    if sums is None:
        sums = _measured(dataset, chosen)
    stated = {"samples": len(chosen), "of": len(train), "exact": len(chosen) == len(train), "chosen_by": _salt(dataset)}
    return stated | sums.to_json()


def _training(ledger: pa.Table) -> pa.Table:
    is_one = pc.and_(pc.equal(ledger["split"], TRAIN), pc.invert(ledger["quarantined"]))
    return ledger.select(["key", "ordinal"]).filter(is_one).combine_chunks()


def _most_samples(dataset: Dataset, values: int) -> int:
    """Return how many average samples have this many values."""
    shapes = dataset.manifest.sample.shapes
    sizes = [
        (np.prod([int(side) for side in text.partition("/")[0].split("x") if side], dtype=float), count) for text, count in shapes.items()
    ]
    total, count = sum(size * count for size, count in sizes), sum(count for _, count in sizes)
    return max(1, int(values * count / total)) if total else MOST_SAMPLES


def _salt(dataset: Dataset) -> str:
    """Return the salt of the hash: that of the write-time shuffle, so that the chosen ones are next to each other in a new shard."""
    return f"order {dataset.manifest.identity.get('shards', {}).get('seed', 0)} {TRAIN}"


def _places(dataset: Dataset, train: pa.Table) -> NDArray[np.uint64]:
    """Return what training samples are chosen by: a hash of the key; in a first generation its shuffle has sorted them by that."""
    manifest = dataset.manifest
    sorted_by_it = manifest.parent == 0 and manifest.identity.get("shards", {}).get("shuffle") and "adopted" not in manifest.identity
    if sorted_by_it and not any(shard.groups for shard in manifest.shards):
        return train["ordinal"].to_numpy().astype(np.uint64)
    return _hashes(dataset, train)


def _hashes(dataset: Dataset, rows: pa.Table) -> NDArray[np.uint64]:
    return hashes(Texts(rows["key"]), _salt(dataset))


def _first(places: NDArray[np.uint64], ordinals: Int64s, most: int) -> Int64s:
    """Return the ordinals of the first samples by place, sorted."""
    return np.sort(ordinals[np.lexsort((ordinals, places))[:most]])


def _changed_sums(dataset: Dataset, train: pa.Table, places: NDArray[np.uint64], chosen: Int64s, before: pa.Table) -> _Sums | None:
    """Return the sums of the report of the parent without those of samples that are chosen no more, and with those of new ones.

    None if there is no such report, its sums are no whole numbers, what went cannot be read any more, or it were as much work.
    """
    try:
        there = read_report(Dataset(dataset.store, read_manifest(dataset.store, dataset.manifest.parent)))
    except DataError:  # damaged, or the parent is not there any more
        return None
    if there is None or there["pixels"]["chosen_by"] != _salt(dataset):
        return None
    known = _Sums.of(there["pixels"])
    ordinals, were = train["ordinal"].to_numpy(), before["ordinal"].to_numpy()
    stayed, gone = np.isin(ordinals, were), before.filter(pa.array(~np.isin(were, ordinals)))
    lost = _hashes(dataset, gone)
    old = _first(
        np.concatenate([places[stayed], lost]), np.concatenate([ordinals[stayed], gone["ordinal"].to_numpy()]), there["pixels"]["samples"]
    )
    came, went = np.setdiff1d(chosen, old), np.setdiff1d(old, chosen)
    if not known.is_exact or len(came) + len(went) > len(chosen):
        return None
    try:
        lost_sums = _measured(dataset, went)
    except AecoreError:  # of an adopted tar that its owner has changed: they are not there any more
        return None
    return known.less(lost_sums).plus(_measured(dataset, came))


def _measured(dataset: Dataset, ordinals: Int64s) -> _Sums:
    """Decode training samples, removed ones too, and return their sums."""
    sums = _Sums()
    for shard in dataset.manifest.splits.get(TRAIN, ()):
        start, stop = np.searchsorted(ordinals, [shard.first_ordinal, shard.first_ordinal + shard.planned]).tolist()
        if start == stop:
            continue
        reader = dataset.reader(shard)
        try:
            rows = np.flatnonzero(np.isin(reader.index["ordinal"].to_numpy(), ordinals[start:stop]))
            table = reader.index.select(["key", "width", "height", "mode", "members"]).take(rows)
            members: list[Any] = table["members"].to_pylist()  # any: what pyarrow makes of them
            sizes = np.array([sum(member["size"] for member in each) for each in members], np.int64)
            for kind, of_kind in _by_format(table):
                size = int(np.prod(kind[:2], dtype=np.int64)) if None not in kind else 0
                limits = (np.arange(len(of_kind) + 1) * size, _BLOCK_VALUES), (exclusive_cumsum(sizes[of_kind]), _BLOCK_VALUES)
                for first, last in split_by_limits(*limits):
                    block = of_kind[first:last]
                    keys: list[Any] = table["key"].take(block).to_pylist()  # any: texts
                    _add(sums, dataset, reader.read_members(rows[block]), keys, kind)
        finally:
            reader.close()
    return sums


def _by_format(table: pa.Table) -> Iterator[tuple[tuple[Any, Any, Any], Int64s]]:  # any: numbers and texts of an index, or None
    columns = [table[name].combine_chunks().dictionary_encode() for name in ("width", "height", "mode")]
    codes = np.zeros(len(table), np.int64)
    for column in columns:
        codes = codes * (len(column.dictionary) + 1) + pc.fill_null(column.indices, len(column.dictionary)).to_numpy()
    for code in np.unique(codes).tolist():
        rows = np.flatnonzero(codes == code)
        yield tuple(column[int(rows[0])].as_py() for column in columns), rows


def _add(sums: _Sums, dataset: Dataset, members: BytesColumn, keys: Sequence[str], kind: tuple[Any, Any, Any]) -> None:  # any: as above
    """Decode samples of one format and add them."""
    width, height, mode = kind
    left = np.arange(len(keys))
    if mode in _PLAIN:
        pixels = np.empty((len(keys), height, width, _PLAIN[mode]), np.uint8)
        done = decode_pngs(members, pixels, as_stored=dataset.pixels == 1)
        if done.any():
            rows = np.flatnonzero(done)
            sums.add(pixels[rows].reshape(len(rows), height * width, -1), [keys[row] for row in rows.tolist()])
        left = np.flatnonzero(~done)
    if not len(left):
        return
    layout = dataset.manifest.identity.get("shards", {}).get("layout", "auto")
    decoded = map_ordered(lambda row: decoded_values(members[row], layout), left.tolist(), threads=_THREADS)
    for row, values in zip(left.tolist(), decoded, strict=True):
        if values is None or not values.size or not _has_sums(values):
            sums.unreadable += 1
        else:
            sums.add(values.reshape(1, -1, values.shape[-1] if values.ndim == 3 else 1), [keys[row]])


def _has_sums(values: NDArray[Any]) -> bool:  # any: every dataset has its own dtype
    """Return whether these are real numbers of which a sum of squares can be stated: no NaN, nothing infinite or nearly so."""
    return values.dtype.kind in "biu" or (values.dtype.kind == "f" and float(np.abs(values).max()) < MOST_VALUE)


def decoded_values(data: bytes, layout: Any = "auto") -> NDArray[Any] | None:  # any: a Literal; every sample has its own dtype
    """Return an image as `[H, W, C]`, an array as it is, with one more axis if it has three and is none; None if it is unreadable."""
    from aecore.data.format.decode import NPY_MAGIC  # and all decoders: small plain PNGs need none
    from aecore.data.format.pixels import decode_image

    try:
        if not data.startswith(NPY_MAGIC):
            return decode_image(data).pixels
        header = array_header(data, layout=layout)
        values = array_values(data, header)
        return values if header.is_image or values.ndim != 3 else values[..., None]
    except MemoryError:
        raise
    except Exception:  # whatever a codec raises for a damaged sample
        return None
