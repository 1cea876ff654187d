"""Find what another run of `shard` adds to a dataset, and refuse changed samples: a dataset only grows.

A sample is identified by its key; its size and its address tell whether it is unchanged.
"""

import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from aecore.artifact.documents import read_json
from aecore.data.dataset import read_listings
from aecore.data.format.index import LISTING_SCHEMA, make_table, read_table
from aecore.data.format.record import DATA_EXTENSIONS
from aecore.data.format.sample_format import SampleFormat, sequence_shape
from aecore.data.manifest import DatasetManifest
from aecore.data.sources import Listing, take
from aecore.data.sources._filter import within_limit
from aecore.data.sources._names import FRAME_ENDING
from aecore.data.write.spec import ShardSpec
from aecore.errors import DataError, counted
from aecore.native.texts import Texts
from aecore.store import Store
from aecore.threads import map_ordered

logger = logging.getLogger(__name__)
SHOWN = 5  # examples in an error
LOOKERS = 16  # requests for sizes at a time


def listing_table(listing: Listing) -> pa.Table:
    """Return keys, sources and sizes of a listing as a table of `LISTING_SCHEMA`."""
    return make_table(LISTING_SCHEMA, {"key": listing.keys, "source": listing.sources, "bytes": listing.sizes}, len(listing))


def warn_of_orphans(store: Store, stems: Collection[str], *, adopted: bool = False) -> None:
    """Log a warning if shards without any manifest are in the place of a first generation, which plans the parts `stems`.

    They are of another attempt that was given up, or of generations whose manifests were lost: then the user has to know before a new
    generation 1 hides them, and before a collection of garbage removes them. Where tars are adopted, those there are external.
    """
    endings = (".parquet",) if adopted else (".tar", ".parquet")
    found = [
        f"{folder}/{name}"
        for folder in ("shards", "quarantine")
        for name in store.list(folder)
        if name.endswith(endings) and name.rpartition(".")[0] not in stems
    ]
    if found:
        total = sum(size or 0 for size in map_ordered(store.size, found, threads=LOOKERS))
        logger.warning(
            "%s: %d files (%d bytes; first: %s) are there without a manifest, and the new generation does not name them. If "
            "dataset.NNNNNN.json was lost, stop here and restore it from a copy; if they are of an attempt that you gave up, leave them: "
            "collecting garbage removes them. Nothing of them is read, changed or deleted now",
            store.url,
            len(found),
            total,
            found[0],
        )


def warn_if_address_changed(store: Store, parent: DatasetManifest, source: Any, listing: Listing) -> None:  # any: as above
    """Log a warning if samples of `listing` are known from another address: only key and size identify them."""
    url, keys = getattr(source, "url", None), Texts.of(listing.keys).column().combine_chunks()
    counts: Counter[str] = Counter()
    for ref in parent.listings:
        claim = f"run.{ref.name.removeprefix('listings/').removesuffix('.parquet')}.json"
        there = read_json(store, claim).get("info", {}).get("source", {}).get("url") if store.size(claim) is not None else None
        if there is not None and there != url:
            known = read_table(store.read(ref.name, ref=ref), f"{store.url}/{ref.name}", schema=LISTING_SCHEMA)["key"]
            counts[there] += int(np.count_nonzero(pc.is_in(known, value_set=keys).to_numpy()))
    for there, count in counts.items():
        if count:
            logger.warning(
                "%s: %d samples of %s have the keys of samples that came from %s. Known samples are compared by key and size only and are "
                "not read again: if these are other samples, give them other names or write to another URL",
                store.url,
                count,
                url,
                there,
            )


def report_formats(store: Store, parent: DatasetManifest | None, manifest: DatasetManifest) -> None:
    """Log a warning if the samples have several formats, with the remedy; a note if they are sequences of several lengths."""
    shapes = manifest.sample.shapes
    error = _not_one(shapes)
    if error is None:
        return
    if parent is not None:
        if _not_one(parent.sample.shapes) is None:  # else it was reported before
            what = f"generation {manifest.number} cannot be trained on or encoded as generation {parent.number} could"
            logger.warning("%s: %s: %s", store.url, what, error)
        return
    try:
        longest = SampleFormat.from_shapes(shapes, sequences=True)
    except DataError:
        counts = ", ".join(f"{shape} ({count})" for shape, count in sorted(shapes.items(), key=lambda item: -item[1])[:SHOWN])
        what = str(error) if len(shapes) == 1 or str(error).startswith("the samples have") else f"{counts}: {error}"
        logger.warning("%s: nothing can be trained on these samples as they are: %s", store.url, what)
        return
    kind = f"up to {longest.shape[0]} steps ({len(shapes)} lengths)"
    if may_be_sequences(shapes):
        text = (
            f"the samples are arrays [T, {', '.join(map(str, longest.shape[1:]))}] whose first axes differ, as of sequences of {kind}, "
            "which models of sequences read (model.kind=rvae); if they are images [H, W, C], save them with one shape "
            "(numpy.pad, or cut them)"
        )
    else:
        text = (
            f"the samples are sequences of {kind}, which models of sequences read (model.kind=rvae); for others save them with one shape "
        )
        text += "(numpy.pad)"
    logger.info("%s: %s", store.url, text)


def may_be_sequences(shapes: Mapping[str, int]) -> bool:
    """Return whether samples that were taken for images `[H, W, C]` of several heights may be sequences `[T, ...]` of several lengths."""
    found = [SampleFormat.parse(shape) for shape in shapes]
    return len(found) > 1 and all(known.from_array for known in found) and sequence_shape(found) is not None


def _not_one(shapes: Mapping[str, int]) -> DataError | None:
    """Return why these are not the shapes of one format, None if they are."""
    try:
        SampleFormat.from_shapes(shapes)
    except DataError as error:
        return error
    return None


def new_rows(store: Store, parent: DatasetManifest, listing: Listing, shards: ShardSpec, source: Any) -> NDArray[np.int64]:
    """Return the rows whose keys the dataset does not know, as many as `source.limit` leaves; DataError if a known sample changed."""
    known, asked = read_listings(store, parent), listing_table(listing)
    at = pc.index_in(asked["key"].combine_chunks(), value_set=known["key"].combine_chunks())
    is_known = at.is_valid().to_numpy(zero_copy_only=False)
    before = known["bytes"].combine_chunks().take(at.drop_null()).to_numpy()
    changed = np.flatnonzero(is_known)[before != listing.sizes[is_known]]
    if len(changed) and shards.resize is None and shards.mode == "keep":
        stored = _stored_sizes(store, parent, take(listing.keys, changed))
        changed = changed[[stored.get(listing.keys[row]) != listing.sizes[row] for row in changed.tolist()]]
    if len(changed):
        raise DataError(_changed(store, listing, changed, "other sizes than when they were sharded"))
    is_there = pc.is_in(asked["source"].combine_chunks(), value_set=known["source"].combine_chunks()).to_numpy(zero_copy_only=False)
    moved = np.flatnonzero(is_there & ~is_known)
    if len(moved):  # `a.jpg` was added next to `a.png`, so `a` would become `a%2Epng` and be written twice
        raise DataError(_changed(store, listing, moved, "another key than when they were sharded (a file of the same stem was added)"))
    if getattr(source, "frames", "first") == "all":
        turned, refused = _other_frames(known, asked, listing, limited=getattr(source, "limit", None) is not None)
        if len(turned):  # a file of one frame is the sample `a`, one of several is `a/000000000`, ...: they would be there twice
            raise DataError(_changed(store, listing, turned, "another number of pages or frames than when they were sharded"))
        is_known = is_known | np.isin(np.arange(len(listing)), refused)
    limit = getattr(source, "limit", None)
    fresh = np.flatnonzero(~is_known)
    if limit is None or len(known) + len(fresh) <= limit:
        return fresh
    chosen = within_limit(listing.take(fresh), max(0, limit - len(known)))
    logger.info(
        "%s: %s left out, since source.limit=%d counts all samples of the dataset, and it has %d",
        store.url,
        counted(len(fresh) - len(chosen), "new sample", "new samples"),
        limit,
        len(known),
    )
    return fresh[chosen]


def _other_frames(known: pa.Table, asked: pa.Table, listing: Listing, *, limited: bool) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the rows of files that have another number of pages or frames than they had, and those that are refused as they were.

    Of a limited listing, which has some frames of a file and not others, only a change between one and several is seen. A file that is
    refused as a whole is one row; to older versions each of its frames was one, of a share of its bytes.
    """
    files, there = (pc.replace_substring_regex(table["source"].combine_chunks(), FRAME_ENDING, "").to_pylist() for table in (asked, known))
    names, were = (table["source"].to_pylist() for table in (asked, known))
    were_single = {name: name == source for name, source in zip(there, were, strict=True)}
    parts = dict(zip(there, known["bytes"].to_pylist(), strict=True))
    before, now = Counter(there), Counter(files)
    turned, refused = list[int](), list[int]()
    for row, name in enumerate(files):
        if name not in before:
            continue
        is_whole = listing.unusable is not None and listing.unusable[row] is not None
        is_single = name == names[row]
        if is_whole and is_single and not were_single[name] and -(-int(listing.sizes[row]) // before[name]) == parts[name]:
            refused.append(row)
        elif is_single != were_single[name] or (not limited and before[name] != now[name]):
            turned.append(row)
    return np.array(turned, np.int64), np.array(refused, np.int64)


def require_whole_bags(store: Store, listing: Listing, fresh: NDArray[np.int64]) -> None:
    """Raise DataError if new samples belong to an existing bag: a bag is contiguous in one shard, and shards are not rewritten."""
    if listing.groups is None or len(fresh) == len(listing):
        return
    codes, groups = Texts.of(listing.groups).codes()
    is_new = np.zeros(len(listing), np.bool_)
    is_new[fresh] = True
    is_known = np.zeros(len(groups), np.bool_)
    is_known[codes[~is_new]] = True
    grown = fresh[is_known[codes[fresh]]]
    if len(grown):
        what = counted(len(grown), "new sample belongs", "new samples belong")
        raise DataError(
            f"{what} to bags that {store.url} has already, for example {listing.sources[grown[0]]!r} "
            f"to {listing.groups[grown[0]]!r}. A bag cannot grow: put new samples into new bags, or write to another URL"
        )


def _stored_sizes(store: Store, parent: DatasetManifest, keys: Sequence[str]) -> dict[str, int]:
    """Return the stored bytes of these samples: a file that grew between listing and reading was stored whole."""
    sizes: dict[str, int] = {}
    wanted = Texts.of(keys).column().combine_chunks()
    for shard in parent.shards:
        where = f"{store.url}/{shard.index.name}"
        index = read_table(store.read(shard.index.name, ref=shard.index), where, shard.samples).select(["key", "members"])
        for row in index.filter(pc.is_in(index["key"], value_set=wanted)).to_pylist():
            sizes[row["key"]] = next(member["size"] for member in row["members"] if member["ext"] in DATA_EXTENSIONS)
    return sizes


def _changed(store: Store, listing: Listing, rows: NDArray[np.int64], what: str) -> str:
    examples = ", ".join(repr(listing.sources[row]) for row in rows[:SHOWN].tolist())
    more = ", ..." if len(rows) > SHOWN else ""
    have = "sample has" if len(rows) == 1 else "samples have"
    return (
        f"{len(rows)} {have} {what}: {examples}{more}. A dataset only grows: give changed files new names, "
        f"restore the old ones, or write to another URL than {store.url}"
    )
