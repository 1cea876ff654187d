"""Random access to the samples of one split: read by offset, verified, decoded, and cached in RAM where they fit.

Samples are numbered through the live ones of the split's shards in manifest order: here, and nowhere else, such a number becomes the row of
a shard, and nothing above knows of what was removed. A batch is sorted by shard and offset before it is read; every
sample's bytes are compared with the index's sha256 when they are read (1 us for a small image), so damage after the shard was
written is found before training uses it. At most `MAX_OPEN` shards, and indexes of `MAX_INDEXED` samples (0.6 kB each), are open at a time.
The RAM cache holds decoded samples (each rank its own) and fills as samples are first read: the first epoch pays for decoding.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from aecore.data.classes import UNKNOWN, label_map
from aecore.data.dataset import Dataset
from aecore.data.format.decode import DecodeError, Decoder, Pixels, Reading
from aecore.data.format.ragged import SequenceDecoder
from aecore.data.format.sample_format import SampleFormat
from aecore.data.manifest import ShardRef
from aecore.data.read.shard_reader import ShardReader
from aecore.data.removal import live_rows
from aecore.errors import ConfigError, DataError
from aecore.native.bytes_column import BytesColumn
from aecore.store import Files, open_files

Int64s = NDArray[np.int64]
CacheMode = Literal["auto", "ram", "none"]
MAX_OPEN, MAX_INDEXED = 256, 400_000


class Rows(NamedTuple):
    """n decoded samples: pixels `[n, H, W, C]` (or arrays), planned ordinals, class ids (-1: none), of sequences the lengths."""

    pixels: Pixels
    ordinals: Int64s
    labels: Int64s
    lengths: Int64s | None = None

    def take(self, where: Any) -> "Rows":  # any: an index of an array
        """Return these rows."""
        return Rows(*(None if column is None else column[where] for column in self))  # type: ignore[arg-type]  # as they were


@dataclass(frozen=True, slots=True)
class _OpenShard:
    """A shard and its live samples: their index, ordinals and labels, and the rows of the shard that they are (None: all)."""

    reader: ShardReader
    index: pa.Table
    ordinals: Int64s
    labels: Int64s
    rows: Int64s | None

    def stored(self, numbers: Int64s) -> Int64s:
        """Return the rows of the shard that live samples are."""
        return numbers if self.rows is None else self.rows[numbers]


class SplitRows:
    """Random access to one split of a dataset; safe to use from several threads. Nothing is read before the first sample.

    With `channels`, those of a model's images, alpha that is one more is composed over the background. With `classes`, the names that a
    model numbers, labels are the numbers of these; None: those of the dataset.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        reading: Reading,
        cache: CacheMode = "auto",
        cache_bytes: int = 2 << 30,
        channels: int | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        self.dataset = dataset
        self.split = split
        self.shards = dataset.manifest.split(split)
        self.counts = np.array([shard.live for shard in self.shards], np.int64)
        self.num_samples = int(self.counts.sum())
        if not self.num_samples:
            raise DataError(f"{dataset.url}: split {split!r} has no samples")
        self.sample_format = SampleFormat.from_shapes(dataset.manifest.sample.shapes, sequences=True)
        if channels is not None and self.sample_format.without_alpha.shape[2:] == (channels,):
            self.sample_format = self.sample_format.without_alpha
        self.labelled = bool(dataset.classes)
        self.classes = dataset.classes if classes is None else tuple(classes)
        self._labels = label_map(dataset.classes, self.classes)
        self._starts = np.cumsum(self.counts) - self.counts
        self._decoder, self._pixels = Decoder(reading, self.sample_format), reading.pixels
        self._sequences = SequenceDecoder(self.sample_format) if self.sample_format.varying else None
        self.caching = _use_cache(cache, self.num_samples * self.sample_format.nbytes, cache_bytes)
        self._cache: Rows | None = None
        self._filled = np.zeros(0, np.bool_)
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._lock = threading.RLock()
        self._files: dict[str, Files] | None = None  # of adopted tars, by their base
        self._too_many = False

    def read(self, indices: Int64s) -> Rows:
        """Return the samples with these indices, in this order. DataError names shard and key of a damaged or undecodable sample."""
        with self._lock:
            if not self.caching:
                return self._load(indices)
            cache = self._cache or self._make_cache()
            missing = indices[~self._filled[indices]]
            if len(missing):
                missing = np.unique(missing)
                for column, values in zip(cache, self._load(missing), strict=True):
                    if column is not None and values is not None:
                        column[missing] = values
                self._filled[missing] = True
                if self.in_ram:
                    self.close()
            return cache.take(indices)

    def read_shard(self, number: int, rows: Int64s, on_bad: Callable[[DecodeError], None]) -> Rows:
        """Return these live samples of one shard, not cached; those that do not decode are reported (undefined pixels)."""
        with self._lock:
            shard = self._shard(number)
            members = shard.reader.read_members(shard.stored(rows))
            ordinals, labels = shard.ordinals[rows], shard.labels[rows]
        return self._decoded(members, ordinals, labels, on_bad)

    @property
    def in_ram(self) -> bool:
        """Whether every sample is cached: nothing is read or decoded any more."""
        return bool(len(self._filled)) and bool(self._filled.all())

    def index(self, number: int) -> pa.Table:
        """Return the index of the live samples of one shard; it is read and verified once while the shard is open."""
        with self._lock:
            return self._shard(number).index

    def prefetch(self, now: Int64s, later: Int64s | None = None) -> None:
        """Start background download of these shards, in this order (no-op for local files).

        Closes shards that are not in `now`, so that the cache may evict them.
        """
        if self.in_ram:
            return
        with self._lock:
            for number in self._open.keys() - set(now.tolist()):
                self._open[number].reader.close()  # its index is kept; a full cache may evict a file that is not open
        if len(now) and self._pieces_of(self.shards[int(now[0])]) is not None:
            return
        shards = [self.shards[number] for number in (*now.tolist(), *(() if later is None else later.tolist()))]
        self.dataset.prefetch(shards)

    def shards_of(self, start: int, stop: int) -> Int64s:
        """Return the indices of the shards that hold the samples [start, stop)."""
        first, last = np.searchsorted(self._starts, [start, stop - 1], side="right") - 1
        return np.arange(first, last + 1)

    def close(self) -> None:
        """Close the open shards; a later read opens them again."""
        with self._lock:
            while self._open:
                self._open.popitem()[1].reader.close()

    def _make_cache(self) -> Rows:
        self._filled = np.zeros(self.num_samples, np.bool_)
        # mostly zero pages: RAM is taken as it fills
        pixels = np.zeros((self.num_samples, *self.sample_format.shape), self.sample_format.dtype)
        lengths = None if self._sequences is None else np.zeros(self.num_samples, np.int64)
        self._cache = Rows(pixels, np.zeros(self.num_samples, np.int64), np.zeros(self.num_samples, np.int64), lengths)
        return self._cache

    def _load(self, indices: Int64s) -> Rows:
        order = np.argsort(indices, kind="stable")
        numbers = np.searchsorted(self._starts, indices[order], side="right") - 1
        parts, ordinals, labels = list[BytesColumn](), np.empty(len(indices), np.int64), np.empty(len(indices), np.int64)
        firsts = np.flatnonzero(np.diff(numbers, prepend=-1))  # first place of each shard
        for number, places in zip(numbers[firsts].tolist(), np.split(order, firsts[1:]), strict=True):
            shard, live = self._shard(number), indices[places] - self._starts[number]
            ordinals[places], labels[places] = shard.ordinals[live], shard.labels[live]
            files, rows = self._pieces_of(self.shards[number]), shard.stored(live)
            parts.append(shard.reader.read_members(rows) if files is None else shard.reader.read_pieces(files, rows))
        members = BytesColumn.concat(parts).take(np.argsort(order))  # those of a shard were read together
        try:
            return self._decoded(members, ordinals, labels)
        except DecodeError as error:
            raise self._undecodable(int(indices[error.row]), error) from error

    def _pieces_of(self, shard: ShardRef) -> Files | None:
        """Return the files that hold an adopted tar, if those of the split are in a bucket and do not all fit into the cache.

        A step reads samples of several tars, and so would keep them all, or fetch each again and again.
        """
        if shard.tar_base_url is None or self.dataset.tars(shard).is_local:
            return None
        if self._files is None:
            adopted = {(known.tar_base_url, known.tar.name): known.tar.bytes for known in self.shards if known.tar_base_url is not None}
            self._files = {url: open_files(self.dataset.tars(known).url) for url, known in self._bases().items()}
            self._too_many = any(files.room is not None and sum(adopted.values()) > files.room for files in self._files.values())
        return self._files[shard.tar_base_url] if self._too_many else None

    def _bases(self) -> dict[str, ShardRef]:
        return {shard.tar_base_url: shard for shard in self.shards if shard.tar_base_url is not None}

    def _decoded(self, members: BytesColumn, ordinals: Int64s, labels: Int64s, on_bad: Callable[[DecodeError], None] | None = None) -> Rows:
        if self._sequences is None:
            return Rows(self._decoder.batch(members, on_bad), ordinals, labels)
        pixels, lengths = self._sequences.batch(members, on_bad)
        return Rows(pixels, ordinals, labels, lengths)

    def _undecodable(self, index: int, error: DecodeError) -> DataError:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        key = self._shard(number).index["key"][index - int(self._starts[number])].as_py()
        remedy = "shard the data again with shards.check=decode, which puts such samples into the quarantine"
        if self._pixels != self.dataset.pixels and error.reason == "shape":
            remedy = (
                f"the dataset was written with shards.pixels={self.dataset.pixels} and is read with transform.pixels={self._pixels}: shard "
                f"the data again to another URL, or set transform.pixels={self.dataset.pixels}"
            )
        return DataError(f"{self.dataset.url}: sample {key!r} of shard {self.shards[number].stem} cannot be decoded ({error}); {remedy}")

    def _shard(self, number: int) -> _OpenShard:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        indexed = sum(self.shards[known].samples for known in self._open)
        while self._open and (len(self._open) >= MAX_OPEN or indexed + self.shards[number].samples > MAX_INDEXED):
            oldest, shard = self._open.popitem(last=False)
            shard.reader.close()
            indexed -= self.shards[oldest].samples
        reader = self.dataset.reader(self.shards[number])
        rows = live_rows(self.dataset.store, self.shards[number], reader.index)
        index: Any = reader.index if rows is None else reader.index.take(rows)  # any: pyarrow's stubs know no `fill_null`
        ordinals, labels = index["ordinal"].to_numpy(), index["label"].fill_null(-1).to_numpy().astype(np.int64)
        if self._labels is not None:
            labels = self._renumbered(number, labels)
        self._open[number] = shard = _OpenShard(reader, index, ordinals.astype(np.int64), labels, rows)
        return shard

    def _renumbered(self, number: int, labels: Int64s) -> Int64s:
        """Return labels of the dataset as those of `classes`; DataError for a class that is not in them."""
        assert self._labels is not None
        found: Int64s = self._labels[labels]
        if (found == UNKNOWN).any():
            name = self.dataset.classes[labels[np.argmax(found == UNKNOWN)]]
            raise DataError(
                f"{self.dataset.url}: shard {self.shards[number].stem} has samples of class {name!r}, which the model does not know: "
                "shard the data again, or use a model that was trained with this class"
            )
        return found


def _use_cache(mode: CacheMode, needed: int, limit: int) -> bool:
    if mode == "ram" and needed > limit:
        raise ConfigError(
            f"input.cache=ram needs {needed} bytes for the decoded split, input.cache_bytes is {limit}: raise it, or use input.cache=none"
        )
    return mode != "none" and needed <= limit
