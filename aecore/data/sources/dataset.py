"""Datasets of this package as a source: their live samples with the same bytes, classes, splits, bags, columns and quarantine.

So a dataset gets shards of another size, and several become one. Classes are merged by their names, further columns by theirs (null where a
dataset has none), and no two samples may have one key. The state of a sample is the sha256 of its stored bytes: a dataset that was written
from others follows them without reading what it has. Only the newest generation of each is listed; its shards are read by offset, and every
sample is compared with the sha256 of its index.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray

from aecore.data.dataset import Dataset, open_dataset
from aecore.data.format.bad_sample import BadSample
from aecore.data.format.index import INDEX_SCHEMA, SOURCE_SHA256, data_members, plain_type, read_table
from aecore.data.format.record import encode_key, joined_key
from aecore.data.manifest import STEM, RejectedPart, ShardRef, read_manifest
from aecore.data.removal import read_removed
from aecore.data.sources import NAME_HELP, Listing, Source, require_name
from aecore.errors import ConfigError, DataError
from aecore.native.loops import read_pieces, sha256s
from aecore.registry import SOURCES, knob, spec
from aecore.store import absolute_url, close_read, split_urls

pc: Any = pyarrow.compute  # any: pyarrow's stubs know no types of values
WINDOW_SAMPLES, WINDOW_BYTES = 1 << 14, 32 << 20  # that are read ahead, shard by shard
MOST_PLACES = 4_000_000  # samples whose places are kept in memory (about 50 bytes each)
_FIRST = ("key", "source", "bytes", "label_name", "split", "group", "state", "reason", "message")  # of a row; further columns follow
_FURTHER = "column."  # before the name of each of these, which may be one of the others


@spec
class DatasetSpec:
    """Datasets of this package: their samples as they are stored, in shards of another size or merged."""

    kind: Literal["dataset"] = "dataset"
    url: str = knob("", "dataset, or several with :: between them, each a URL or a path that begins with / or .", identity=False)
    keys: Literal["same", "prefixed"] = knob(
        "same",
        "same: as in the datasets, of which no two may have one; prefixed: keys and bags with the dataset's name before them, the last "
        "folder of its address, or as many of the last ones as tell all apart",
    )
    classes: tuple[str | int, ...] | str = knob((), "names of all classes in their order, or a file with one name a line")
    name: str = knob("", NAME_HELP, identity=False)

    def __post_init__(self) -> None:
        require_name(self.name)


@dataclass(frozen=True, slots=True)
class _Places:
    """Where the samples of a shard are in its tar: `[n]` int64, the hash of each `[n, 32]`, and its extension."""

    dataset: Dataset
    shard: ShardRef
    begins: NDArray[np.int64]
    sizes: NDArray[np.int64]
    digests: NDArray[np.uint8]
    exts: list[str]
    codes: NDArray[np.int8]

    def __len__(self) -> int:
        return len(self.begins)

    def read(self, rows: NDArray[np.int64]) -> list[bytes]:
        """Return the bytes of samples, verified; DataError that names the first that is damaged."""
        tars = self.dataset.tars(self.shard)
        descriptor = tars.open(self.shard.tar)
        try:
            found = read_pieces(descriptor, self.begins[rows], self.sizes[rows])
        finally:
            close_read(descriptor)
        if np.array_equal(sha256s(found), self.digests[rows]):
            return list(found)
        reader = self.dataset.reader(self.shard)  # which fetches a corrupt copy in the cache again
        try:
            return reader.read_rows(rows)
        finally:
            reader.close()


@SOURCES.register(DatasetSpec)
class DatasetSource:
    """The live samples of the datasets at the `url` of a `DatasetSpec`; sources are `[<name>/]<part>.tar#<row>`."""

    def __init__(self, datasets: DatasetSpec) -> None:
        self._spec = datasets
        self.urls = [absolute_url(url, "source.url") for url in split_urls(datasets.url)]
        if len({*self.urls}) < len(self.urls):
            raise ConfigError(f"source.url names a dataset twice ({', '.join(self.urls)}): give each once")
        self._names = _names(self.urls) if len(self.urls) > 1 or datasets.keys == "prefixed" else [""]
        self._known: OrderedDict[str, _Places] = OrderedDict()
        self._shards = dict[str, dict[str, tuple[Dataset, ShardRef]]]()  # by address and stem, of the generations that were opened
        self.generations = dict[str, int]()
        self.layouts = dict[str, str]()  # by which the arrays of a dataset are read, where it has any

    def listing(self) -> Listing:
        """List the live samples of the newest generations, then what is in their quarantines.

        Raises
        ------
        DataError
            If one of the addresses holds no dataset, two samples have one key, columns of one name have values of different types, or some
            samples are in bags and others are not.
        """
        datasets = [open_dataset(url) for url in self.urls]
        self.generations = {dataset.url: dataset.number for dataset in datasets}
        settings = {each.url: each.manifest.identity.get("shards", {}) for each in datasets if "npy" in each.manifest.sample.extensions}
        self.layouts = {url: str(shards.get("layout", "auto")) for url, shards in settings.items()}
        tables = [[*_rows(dataset, name)] for dataset, name in zip(datasets, self._names, strict=True)]
        rows = _united(
            [table for found in tables for table in found], [each for each, found in zip(self.urls, tables, strict=True) for _ in found]
        )
        if not len(rows):
            raise DataError(f"{', '.join(self.urls)} {'have' if len(self.urls) > 1 else 'has'} no samples")
        of = np.repeat(np.arange(len(datasets)), [sum(map(len, found)) for found in tables])
        self._require_apart(rows, of, "key", "a sample")
        is_bad = pc.is_valid(rows["reason"])
        groups = _groups(rows, is_bad)
        if groups is not None:
            self._require_apart(rows, of, "group", "a bag")
        given: dict[str, list[Any]] = {name: rows[name].to_pylist() for name in _FIRST if name != "bytes"}  # any: texts
        keys, bags = given["key"], groups
        if self._spec.keys == "prefixed":
            names = [encode_key(name) for name in self._names]
            keys = [joined_key(names[number], key) for number, key in zip(of.tolist(), keys, strict=True)]
            bags = None if groups is None else [f"{self._names[number]}/{bag}" for number, bag in zip(of.tolist(), groups, strict=True)]
        labels = [name or "" for name in given["label_name"]]
        unusable = None
        if pc.any(is_bad).as_py():
            why = zip(given["reason"], given["message"], strict=True)
            unusable = [None if reason is None else BadSample(reason, message) for reason, message in why]
        columns: dict[str, Any] = {  # any: arrays
            name.removeprefix(_FURTHER): rows[name].combine_chunks() for name in rows.column_names if name not in _FIRST
        }
        return Listing(
            keys,
            given["source"],
            rows["bytes"].to_numpy(),
            label_names=labels if any(labels) else None,
            splits=given["split"],
            groups=bags,
            columns=columns,
            notes=tuple(f"{dataset.url}: generation {dataset.number}, {dataset.manifest.num_samples()} samples" for dataset in datasets),
            label_paths=False,
            paths=keys,
            unusable=unusable,
            states=given["state"],
            named_splits=True,
            classes=tuple(dict.fromkeys(name for dataset in datasets for name in dataset.classes)),
        )

    def _require_apart(self, rows: pa.Table, of: NDArray[np.int64], name: str, what: str) -> None:
        """DataError if a key, or a bag, is that of samples of two datasets, which the dataset's name before it would tell apart."""
        if len(self.urls) == 1 or self._spec.keys == "prefixed":
            return
        codes = rows[name].combine_chunks().dictionary_encode().indices
        known = codes.is_valid().to_numpy(zero_copy_only=False)
        pairs = np.unique(np.stack([codes.drop_null().to_numpy().astype(np.int64), of[known]]), axis=1)
        twice = np.flatnonzero(np.diff(pairs[0]) == 0)
        if len(twice):
            first, both = pairs[0, twice[0]], [self.urls[number] for number in pairs[1, twice[0] : twice[0] + 2].tolist()]
            value = rows[name].combine_chunks().dictionary_encode().dictionary[int(first)].as_py()
            raise DataError(
                f"{both[0]} and {both[1]} have {what} {value!r} both ({len(np.unique(pairs[0, twice]))} in all): set source.keys=prefixed, "
                "which puts the name of its dataset before each, or leave them out of one"
            )

    def read(self, source: str) -> tuple[str, bytes]:
        """Return extension and bytes of one sample; DataError if it is damaged, or its shard is not there any more."""
        return self.prefetch([source])(source)

    def read_states(self, sources: Sequence[str]) -> list[str]:
        """Return the sha256 of each of these samples, which were read."""
        return [self._places(part).digests[row].tobytes().hex() for part, row in map(_place, sources)]

    def prefetch(self, sources: Sequence[str]) -> Callable[[str], tuple[str, bytes]]:
        """Return a `read` for exactly these samples in this order; some MB of them are read at a time, shard by shard."""
        found = self._ahead(sources)

        def read(source: str) -> tuple[str, bytes]:
            name, ext, data = next(found)
            assert name == source, "samples are read in the order of `sources`"
            return ext, data

        return read

    def _ahead(self, sources: Sequence[str]) -> Iterator[tuple[str, str, bytes]]:
        start = 0
        while start < len(sources):
            wanted, total, stop = dict[str, list[tuple[int, int]]](), 0, start
            while stop < min(len(sources), start + WINDOW_SAMPLES) and (total < WINDOW_BYTES or stop == start):
                part, row = _place(sources[stop])
                wanted.setdefault(part, []).append((row, stop - start))
                total += int(self._places(part).sizes[row])
                stop += 1
            window: list[tuple[str, bytes]] = [("", b"")] * (stop - start)
            for part in sorted(wanted):
                places, chosen = self._places(part), sorted(wanted[part])
                rows = np.array([row for row, _ in chosen], np.int64)
                for (row, at), data in zip(chosen, places.read(rows), strict=True):
                    window[at] = places.exts[places.codes[row]], data
            for name, (ext, data) in zip(sources[start:stop], window, strict=True):
                yield name, ext, data
            start = stop

    def _places(self, part: str) -> _Places:
        """Return the places of the samples of a part, `[<name>/]<stem>`."""
        if part not in self._known:
            name, _, stem = part.rpartition("/")
            self._known[part] = _places_of(*self._find(self.urls[self._names.index(name)], stem))
            while len(self._known) > 1 and sum(map(len, self._known.values())) > MOST_PLACES:
                self._known.popitem(last=False)
        self._known.move_to_end(part)
        return self._known[part]

    def _find(self, url: str, stem: str) -> tuple[Dataset, ShardRef]:
        """Return a shard of the newest generation that names it: what was listed may have been retired since.

        A generation is opened once, not once for each of its shards.
        """
        known = self._shards.setdefault(url, {})
        if stem not in known:
            known.update(_shards_with(url, stem))
        return known[stem]


def require_writable(source: Source, out: str, layout: str) -> None:
    """Of a `DatasetSource`: ConfigError if it would be written from itself, or arrays read by another `shards.layout` than theirs."""
    assert isinstance(source, DatasetSource)
    if out in source.urls:
        raise ConfigError(f"{out} would be written from itself: give another URL for what is made of it")
    for url, known in source.layouts.items():
        if known != layout:
            raise ConfigError(
                f"the arrays of {url} were written with shards.layout={known}, and shards.layout={layout} may take other axes for those of "
                f"images: set shards.layout={known}"
            )


def _names(urls: Sequence[str]) -> list[str]:
    """Return the name of each dataset: the last folder of its address, or as many of the last ones as tell all apart, with - between."""
    parts = [[part for part in url.partition("://")[2].split("/") if part] if "://" in url else url.strip("/").split("/") for url in urls]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["-".join(each[-depth:]) for each in parts]
        if len({*names}) == len(names):
            return names
    raise ConfigError(f"source.url names {', '.join(urls)}, whose folders have one name: copy or move one of them")


def _place(source: str) -> tuple[str, int]:
    part, _, row = source.rpartition(".tar#")
    return part, int(row)


def _rows(dataset: Dataset, name: str) -> Iterator[pa.Table]:
    """Yield the live samples of each shard as rows of `_FIRST` and of its further columns, then those of each quarantine."""
    above = f"{name}/" if name else ""
    for shard in dataset.manifest.shards:
        if not shard.live:
            continue
        stored = dataset.reader(shard).index
        index, rows = stored, np.arange(len(stored))
        if shard.removed is not None:
            index = dataset.index(shard)
            rows = np.flatnonzero(np.isin(stored["ordinal"].to_numpy(), index["ordinal"].to_numpy()))
        numbers = pa.array(rows).cast(pa.string())
        names = index["label_name"] if index["label_name"].null_count < len(index) else index["label"].cast(pa.string())
        given: dict[str, Any] = {  # any: arrays
            "key": index["key"],
            "source": pc.binary_join_element_wise(f"{above}{shard.stem}.tar", numbers, "#"),
            "bytes": pa.array(data_members(index)[2]),
            "label_name": names,
            "group": index["group"],
            "state": index["sha256"],
        }
        further = [column for column in index.column_names if column not in INDEX_SCHEMA.names and column != SOURCE_SHA256]
        given |= {f"{_FURTHER}{column}": index[column].cast(plain_type(index[column].type)) for column in further}
        yield _table(shard, given, len(index))
    for part in dataset.manifest.parts:
        if part.live_quarantined:
            yield _quarantined(dataset, part, above)


def _quarantined(dataset: Dataset, part: ShardRef | RejectedPart, above: str) -> pa.Table:
    ref, store = part.quarantine, dataset.store
    assert ref is not None, "a part without a quarantine has no quarantined samples"
    bad, removed = read_table(store.read(ref.name, ref=ref), f"{store.url}/{ref.name}", part.quarantined), read_removed(store, part)
    if removed is not None:
        bad = bad.filter(pc.invert(pc.is_in(bad["ordinal"], value_set=removed["ordinal"].combine_chunks())))
    numbers = pc.binary_join_element_wise("quarantine", bad["ordinal"].cast(pa.string()), "-")
    given: dict[str, Any] = {  # any: arrays
        "key": bad["key"],
        "source": pc.binary_join_element_wise(f"{above}{part.stem}", numbers, "#"),
        "bytes": pa.array(np.zeros(len(bad), np.int64)),
        "state": pc.binary_join_element_wise(bad["reason"], pc.fill_null(bad["sha256"], ""), ":"),
        "reason": bad["reason"],
        "message": bad["message"],
    }
    return _table(part, given, len(bad))


def _table(part: ShardRef | RejectedPart, given: Mapping[str, Any], count: int) -> pa.Table:  # any: arrays
    columns = {**dict.fromkeys(_FIRST, pa.nulls(count, pa.string())), "split": pa.repeat(part.split, count), **given}
    return pa.table(columns)


def _united(tables: Sequence[pa.Table], urls: Sequence[str]) -> pa.Table:
    """Return all rows in one table, null where a dataset has no such column; DataError for columns of one name and different types."""
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowTypeError, pa.ArrowInvalid):
        known = dict[str, tuple[pa.DataType, str]]()
        for table, url in zip(tables, urls, strict=True):
            for field in table.schema:
                kind, there = known.setdefault(field.name, (field.type, url))
                try:
                    united = pa.unify_schemas([pa.schema([(field.name, kind)]), pa.schema([field])], promote_options="permissive")
                except (pa.ArrowTypeError, pa.ArrowInvalid) as error:
                    raise DataError(
                        f"the column {field.name.removeprefix(_FURTHER)!r} has values of type {kind} in {there} and {field.type} in {url}: "
                        "a column has one type; shard one of them again with another name or type for it"
                    ) from error
                known[field.name] = united.field(0).type, there
        raise


def _groups(rows: pa.Table, is_bad: Any) -> list[Any] | None:  # any: arrays, texts
    """Return the bag of each sample (what is in quarantine is in none, so each has its own); None if there are none."""
    good = rows["group"].filter(pc.invert(is_bad))
    if good.null_count == len(good):
        return None
    if good.null_count:
        without = rows.filter(pc.and_(pc.invert(is_bad), pc.is_null(rows["group"])))
        raise DataError(
            f"{len(without)} samples are in no bag (first: {without['source'][0].as_py()!r}) and the others are: datasets with bags and "
            "ones without are not merged"
        )
    return list(pc.coalesce(rows["group"], rows["key"]).to_pylist())


def _places_of(dataset: Dataset, shard: ShardRef) -> _Places:
    index = dataset.reader(shard).index
    ext, begins, sizes = data_members(index)
    codes = ext.dictionary_encode()
    digests = np.frombuffer(bytes.fromhex("".join(map(str, index["sha256"].to_pylist()))), np.uint8).reshape(-1, 32)
    return _Places(dataset, shard, begins, sizes, digests, codes.dictionary.to_pylist(), codes.indices.to_numpy().astype(np.int8))


def _shards_with(url: str, stem: str) -> dict[str, tuple[Dataset, ShardRef]]:
    """Return the shards, by their stems, of the newest generation that names this one; DataError if none does."""
    dataset = newest = open_dataset(url)
    for number in range(newest.number, 0, -1):
        if number < newest.number:
            if newest.store.size(f"{STEM}.{number:06d}.json") is None:
                break
            dataset = Dataset(newest.store, read_manifest(newest.store, number))
        shards = {shard.stem: (dataset, shard) for shard in dataset.manifest.shards}
        if stem in shards:
            return shards
    raise DataError(f"{url} has no shard {stem} any more: run the same command again, which lists its samples anew")
