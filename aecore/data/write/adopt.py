"""Index external tars in place: not a byte of them is copied or changed, and every later step works on the result.

A shard of the dataset is then an external tar (or, where a split divides it, some samples of one) with an index: the offset and
the sha256 of every image, the sha256 of the whole tar. Another program wrote the headers, so a reader does not compare them; it checks
every image it reads, and `verify --read-data` every byte. The order of samples is that of the tars: the shuffle in training moves them by
whole tars and inside lanes only, so sharding again with `source.kind=webdataset` is better where the tars are sorted by class.
"""

import contextlib
import hashlib
import os
import time
from collections.abc import Collection, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from aecore.artifact.commit import PartRecord
from aecore.artifact.fanout import Commit
from aecore.data.dataset import read_listings
from aecore.data.format.index import MEMBERS, content_sha256
from aecore.data.manifest import DatasetManifest, ShardRef
from aecore.data.sources import Listing, Source
from aecore.data.sources._tar_samples import ARCHIVED
from aecore.data.sources.webdataset import WebdatasetSource, WebdatasetSpec, parse_source
from aecore.data.write.append import listing_table
from aecore.data.write.pack import ShardWriter
from aecore.data.write.shard import put_table, record_shard, recorded_shard
from aecore.data.write.spec import ShardSpec, ShardTask
from aecore.errors import ConfigError, DataError, Hint, counted
from aecore.store import FileRef, Files, Store, cache_turn, is_remote, open_store, read_again, resolve_url

SHOWN = 3  # examples in an error


class AdoptWorker:
    """Indexes tars: opens the output and the tars once, in the process it works in."""

    def __init__(self, out: str, spec: WebdatasetSpec) -> None:
        self._store = open_store(out)
        self._source = WebdatasetSource(spec)

    def __call__(self, task: ShardTask) -> Commit:
        """Return the call that commits the shard of `task`, or its record if it is committed."""
        known = recorded_shard(self._store, task)
        if known is not None:
            return lambda: known

        def commit() -> PartRecord:  # several at a time, in threads
            with self._turn(), contextlib.closing(self._source.for_thread()) as source:
                return index_tar(self._store, task, source)

        return commit

    def _turn(self) -> contextlib.AbstractContextManager[None]:
        """Wait until another tar may be open: of a bucket no more at a time, in all processes, than the cache may hold copies of."""
        tars = self._source.tars
        return contextlib.nullcontext() if tars.files.room is None else cache_turn(self._largest)

    @cached_property
    def _largest(self) -> int:
        """Bytes of the largest tar."""
        return max(self._source.tars.sizes().values())


def require_adoptable(source: Any, shards: ShardSpec) -> None:  # any: every source kind has its own spec class
    """Raise ConfigError for other sources than tars, and for options that would change the samples."""
    if not isinstance(source, WebdatasetSpec):
        python = "; shard_dataset writes the others"
        raise ConfigError(
            f"source.kind is {source.kind!r}: only tars are adopted (source.kind=webdataset){python}",
            hint=Hint("shard-instead", {"python": python}),
        )
    if shards.resize is not None or shards.mode != "keep" or shards.value_range is not None or source.frames == "all":
        python = ": use shard_dataset with source.kind=webdataset"
        raise ConfigError(
            "shards.resize, shards.mode, shards.value_range and source.frames=all change samples, and adopting leaves them as they "
            f"are{python}",
            hint=Hint("shard-instead", {"python": python}),
        )


def require_readable_by_offset(listing: Listing, source: Source) -> None:
    """Raise DataError, which says what to do, if samples are in a compressed tar or in a compressed member."""
    assert isinstance(source, WebdatasetSource)
    for row, name in enumerate(listing.sources):
        tar, member = parse_source(name)
        if listing.unusable is not None and listing.unusable[row] is not None:
            continue
        if (kind := source.compressed.get(tar)) is not None:
            what = f"{tar} is compressed ({kind}), so nothing in it can be read by offset: unpack it"
        elif member.name.lower().endswith(f".{ARCHIVED}"):
            what = f"{tar} holds {member.name!r}, an archive, of which no array can be read by offset: write .npy members"
        elif member.sparse:
            what = f"{tar} holds {member.name!r}, a sparse file, whose bytes are not in one place: pack it without --sparse (-S)"
        else:
            continue
        python = " (shard_dataset)"
        raise DataError(f"{what}, or shard it{python}", hint=Hint("shard-instead", {"python": python}))


def require_same_tars(store: Store, parent: DatasetManifest, source: Source, listing: Listing, fresh: Listing, *, limited: bool) -> None:
    """Raise DataError if tars that the dataset has adopted are others now, or gone: its indexes would no longer fit them.

    All are compared by size and by the names, places and sizes of their samples, which were listed anyway, and those in which new samples
    were found by their bytes. Bytes that changed in place are found when they are read, or all of them by verifying the data. A `limited`
    listing may lack known samples.
    """
    assert isinstance(source, WebdatasetSource)
    tars, growing = source.tars, {parse_source(name)[0] for name in fresh.sources}
    refs = _adopted(store, parent.shards)
    changed = dict[str, str]()
    for name, size in tars.sizes().items():
        known = refs.get(_place(tars.files.url, name))
        if known is not None and size != known.bytes:
            changed[name] = f"{name!r} has {size} bytes, {known.bytes} when it was adopted"
        elif known is not None and name in growing and _tar_ref(tars.files, name).sha256 != known.sha256:
            changed[name] = f"{name!r} has other bytes than when it was adopted"
    home = _home(tars.files.url)
    if {_home(resolve_url(store.url, shard.tar_base_url)) for shard in parent.shards if shard.tar_base_url} == {home}:
        whole = frozenset[str]() if limited else frozenset(tars.names)  # of several homes a listing does not say whose its names are
        changed = _moved(read_listings(store, parent), listing_table(listing), whole) | changed
    if not is_remote(tars.files.url):
        lost = (os.path.relpath(place, home) for place in refs if place.startswith(f"{home}/") and not os.path.exists(place))
        changed |= {name: f"{name!r} is not there any more" for name in lost}
    if changed:
        first = "; ".join([*changed.values()][:SHOWN]) + ("; ..." if len(changed) > SHOWN else "")
        raise DataError(
            f"{counted(len(changed), 'tar of', 'tars of')} {tars.files.url} changed since {store.url} indexed what was there: "
            f"{first}. Put new samples into new tars and restore these, or "
            "adopt them as they are now into a new URL; nothing was written"
        )


class AdoptedTars:
    """The tars that a dataset has adopted, as it has them, and as they are now (see `follow.Tars`)."""

    def __init__(self, store: Store, parent: DatasetManifest, source: Source) -> None:
        assert isinstance(source, WebdatasetSource)
        self._tars = source.tars
        self._known = _adopted(store, [shard for shard in parent.shards if shard.live])

    def of(self, sources: Any) -> list[str]:  # any: pyarrow's stubs know no types of values
        """Return the tar of each sample."""
        return files_of(sources.to_pylist())

    def changed(self, names: set[str]) -> set[str]:
        """Return those of these tars that have other bytes than when they were indexed, or of which no sample is in a shard."""
        sizes = self._tars.sizes()
        return {name for name in names if not self._is(name, sizes.get(name), self._known.get(_place(self._tars.files.url, name)))}

    def _is(self, name: str, size: int | None, known: FileRef | None) -> bool:
        return known is not None and size == known.bytes and _tar_ref(self._tars.files, name).sha256 == known.sha256


def _moved(known: pa.Table, asked: pa.Table, whole: Collection[str]) -> dict[str, str]:
    """Return which tars have known samples in other places than when they were adopted; of the `whole` ones all are listed again."""
    places = _sources(known)
    found = dict[str, list[str]]()
    for key, place in _sources(asked).items():
        there = places.pop(key, place)
        if there != place:
            found.setdefault(parse_source(place)[0], []).append(f"{key!r} at {_shown_place(place)}, where {_shown_place(there)} was known")
    for key, there in places.items():
        if (tar := parse_source(there)[0]) in whole:
            found.setdefault(tar, []).append(f"no {key!r}, which was at {_shown_place(there)}")
    return {tar: f"{tar!r} has {counted(len(some), 'other sample', 'other samples')}, for example {some[0]}" for tar, some in found.items()}


def _sources(table: Any) -> dict[str, str]:  # any: pyarrow's stubs take every value for one that may be None
    return dict(zip(table["key"].to_pylist(), table["source"].to_pylist(), strict=True))


def _shown_place(source: str) -> str:
    tar, member = parse_source(source)
    return f"{tar} byte {member.offset}"


def _adopted(store: Store, shards: Sequence[ShardRef]) -> dict[str, FileRef]:
    """Return the tars that shards were adopted from, by where they are."""
    return {_place(resolve_url(store.url, shard.tar_base_url), shard.tar.name): shard.tar for shard in shards if shard.tar_base_url}


def _place(url: str, name: str) -> str:
    """Return where a tar is, whatever links its address leads over."""
    return _home(f"{url}/{name}")


def _home(url: str) -> str:
    return url if is_remote(url) else os.path.realpath(url)


def files_of(sources: Sequence[str]) -> list[str]:
    """Return the tar of each sample."""
    return [parse_source(source)[0] for source in sources]


def base_url_in_manifest(tars_url: str, store: Store) -> str:
    """Return the manifest's `home` of tars: a relative path if they are inside the dataset, so that both move together."""
    if tars_url == store.url:
        return "."
    inside = tars_url.removeprefix(f"{store.url}/")
    return tars_url if inside == tars_url else inside


def index_tar(store: Store, task: ShardTask, source: WebdatasetSource) -> PartRecord:
    """Hash a tar and the samples of `task` in it, commit the index and the record; a bad sample goes to the quarantine."""
    started, files = time.perf_counter(), source.tars.files
    name = parse_source(task.sources[0])[0]
    tar = _tar_ref(files, name)
    writer = ShardWriter(task)
    writer.scan(source)
    detail: dict[str, Any] = {}
    committed: list[FileRef] = []
    packed = time.perf_counter()
    if len(writer.good[0]):
        index = _index(writer)
        metadata = {"format": 1, "split": task.split, "stem": task.stem, "tar_sha256": tar.sha256}
        committed.append(put_table(store, f"shards/{task.stem}.parquet", index, metadata, "index"))
        where = {"tar": {"name": tar.name, "bytes": tar.bytes, "sha256": tar.sha256}, "home": base_url_in_manifest(files.url, store)}
        detail = {"content_sha256": content_sha256(index), **where, **writer.counts(), "bytes": tar.bytes}
    return record_shard(store, writer, committed, detail, packed - started, packed)


def _tar_ref(files: Files, name: str) -> FileRef:
    return read_again(lambda: _ref_of(files, name), f"{files.url}/{name}")


def _ref_of(files: Files, name: str) -> FileRef:
    with os.fdopen(files.open(name), "rb") as file:
        return FileRef(name, os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest())


def _index(writer: ShardWriter) -> pa.Table:
    """Return the index of the good samples, with the offsets of their data in the tar."""
    index = writer.index()
    positions, codes, _ = writer.good
    places = [parse_source(writer.task.sources[position])[1] for position in positions.tolist()]
    exts = [header.ext for header in writer.headers]
    flat = pa.StructArray.from_arrays(
        [
            pa.array([exts[code] for code in codes.tolist()]),
            pa.array([place.offset for place in places]),
            pa.array([place.size for place in places]),
        ],
        fields=list(MEMBERS.value_type),
    )
    members = pa.ListArray.from_arrays(pa.array(np.arange(len(places) + 1), pa.int32()), flat).cast(MEMBERS)
    return index.set_column(index.column_names.index("members"), "members", members)
