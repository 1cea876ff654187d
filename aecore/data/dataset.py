"""What training asks of its data, and an opened dataset: its store, the generation that is read, and the readers of its shards."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from aecore.artifact.commit import newest_number, newest_of
from aecore.artifact.kinds import other_kind
from aecore.artifact.withdrawn import require_not_withdrawn
from aecore.data.format.image import PixelsVersion
from aecore.data.format.sample_format import common_formats, remedy_of, sequence_shape, shown_formats
from aecore.data.manifest import STEM, DatasetManifest, ShardRef, read_manifest, shards_sha256, tar_store
from aecore.errors import DataError, Hint
from aecore.store import Store, open_store

if TYPE_CHECKING:
    import pyarrow as pa

    from aecore.data.read.shard_reader import ShardReader


class TrainingData(Protocol):
    """What training asks of opened data: `Dataset` (with an index) or `StreamDataset` (external tars without one)."""

    @property
    def url(self) -> str:
        """The address."""

    @property
    def number(self) -> int:
        """The generation; 0: there are none."""

    @property
    def dataset_sha256(self) -> str:
        """The hash of all that is known of the content."""

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The class names, empty without labels; None: not known before the samples are read."""

    def training_key(self, split: str) -> str:
        """Return the hash of the content of a split, the key of its order; DataError if there is no such split."""

    def input_shape(self, *, sequences: bool = False) -> tuple[int, ...]:
        """Return the shape of all samples, images as `(C, H, W)`; with `sequences`, 0 for a first axis that varies; or DataError."""

    def num_samples(self, split: str) -> int | None:
        """Return the number of samples of a split; None: not known."""

    def num_groups(self, split: str) -> int:
        """Return the number of bags of a split, 0 if its samples form none."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """An opened dataset: where it is, and the generation that is read."""

    store: Store
    manifest: DatasetManifest

    @property
    def url(self) -> str:
        """The dataset's address."""
        return self.store.url

    @property
    def number(self) -> int:
        """The generation that is read."""
        return self.manifest.number

    @property
    def dataset_sha256(self) -> str:
        """The hash of the contents of all shards and of the class names."""
        return self.manifest.dataset_sha256

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names, empty without labels."""
        return self.manifest.classes

    @property
    def pixels(self) -> PixelsVersion:
        """The version of the rules by which its index reads images (`shards.pixels`)."""
        return 2 if self.manifest.identity.get("shards", {}).get("pixels") == 2 else 1

    @property
    def has_alpha(self) -> bool:
        """Whether the samples are images whose last channel is alpha."""
        return all(known.has_alpha for known in self.manifest.sample.formats)

    def training_key(self, split: str) -> str:
        """Return the key of a split's training order: a hash of its shards alone, so appends to other splits do not change it."""
        return shards_sha256(self.manifest.split(split), ())

    def input_shape(self, *, sequences: bool = False) -> tuple[int, ...]:
        """Return the one shape of all samples, images as `(C, H, W)`; DataError that names shards.resize if they differ.

        With `sequences` arrays may differ in their first axis, which is then 0, as in `(0, 3)`.
        """
        formats = common_formats(self.manifest.sample.formats)
        dims = {known.tensor_shape for known in formats}
        if not dims:
            raise DataError(f"dataset generation {self.manifest.number} has no samples: there is no input shape")
        steps = sequence_shape(formats)
        if sequences and len(dims) > 1 and steps is not None:
            return steps
        if len(dims) > 1:
            shapes, remedy = self.manifest.sample.shapes, remedy_of(formats)
            if steps is not None:
                remedy = "they are sequences of different lengths, for a model that takes lengths, such as model.kind=rvae"
            raise DataError(f"the samples have {len(shapes)} different shapes ({shown_formats(shapes)}): training needs one; {remedy}")
        return dims.pop()

    def num_samples(self, split: str) -> int:
        """See `DatasetManifest.num_samples`."""
        return self.manifest.num_samples(split)

    def num_groups(self, split: str) -> int:
        """See `DatasetManifest.num_groups`."""
        return self.manifest.num_groups(split)

    def tars(self, shard: ShardRef) -> Store:
        """Return the store that holds the tar of a shard of this manifest."""
        return tar_store(self.store, shard)

    def prefetch(self, shards: Sequence[ShardRef]) -> None:
        """Start the background download of these shards, index and tar, in this order (no-op for local files).

        Nothing is read of those without a live sample.
        """
        shards = [shard for shard in shards if shard.live]
        own = [[shard.index, shard.tar] if shard.tar_base_url is None else [shard.index] for shard in shards]
        self.store.prefetch([ref for refs in own for ref in refs])
        for base_url in dict.fromkeys(shard.tar_base_url for shard in shards if shard.tar_base_url is not None):
            adopted = [shard for shard in shards if shard.tar_base_url == base_url]
            self.tars(adopted[0]).prefetch([shard.tar for shard in adopted])

    def index(self, shard: ShardRef) -> "pa.Table":
        """Return the index of the live samples of a shard of this manifest, verified."""
        from aecore.data.removal import live_rows  # imported late: who reads manifests alone needs no tables

        index = self.reader(shard).index
        rows = live_rows(self.store, shard, index)
        return index if rows is None else index.take(rows)

    def quarantine(self) -> "pa.Table":
        """Return the rows of the quarantine of this generation (split, source, key, reason, message, ...), verified.

        The files in `quarantine/` also hold samples that were repaired or removed later.
        """
        import pyarrow as pa  # imported late: who reads manifests alone needs no tables
        import pyarrow.compute as pc

        from aecore.data.format.index import QUARANTINE_SCHEMA, read_table
        from aecore.data.removal import read_removed

        tables = [QUARANTINE_SCHEMA.empty_table()]
        for part in self.manifest.parts:
            if (ref := part.quarantine) is not None:
                rows = read_table(self.store.read(ref.name, ref=ref), f"{self.url}/{ref.name}").replace_schema_metadata(None)
                removed = read_removed(self.store, part)
                if removed is not None:
                    rows = rows.filter(pc.invert(pc.is_in(rows["ordinal"], value_set=removed["ordinal"].combine_chunks())))
                tables.append(rows)
        return pa.concat_tables(tables)

    def reader(self, shard: ShardRef) -> "ShardReader":
        """Return the strict reader of one shard of this manifest, of all samples that were ever stored in it."""
        from aecore.data.read.shard_reader import ShardReader  # imported late: who reads manifests alone needs no reader

        return ShardReader(self.store, shard)


def read_listings(store: Store, manifest: DatasetManifest) -> "pa.Table":
    """Return key, source and source bytes of every sample that was ever planned, quarantined ones too; verified."""
    import pyarrow as pa  # imported late: who reads manifests alone needs no tables

    from aecore.data.format.index import LISTING_SCHEMA, read_table

    return pa.concat_tables(
        [read_table(store.read(ref.name, ref=ref), f"{store.url}/{ref.name}", schema=LISTING_SCHEMA) for ref in manifest.listings]
    ).replace_schema_metadata(None)


def open_dataset(url: str, number: int | None = None) -> Dataset:
    """Open the newest generation of the dataset at `url`, or generation `number`; reads the manifest and nothing else.

    Raises
    ------
    DataError
        If there is no manifest (it says whether an unfinished run is there), or not that one, or it was withdrawn, or shards that only
        older generations have were collected.
    """
    store = open_store(url)
    names = store.list()
    newest = newest_of(names, STEM)
    if newest is None:
        raise _nothing_here(store)
    require_not_withdrawn(store, newest if number is None else number, names)
    if number is not None and store.size(f"{STEM}.{number:06d}.json") is None:
        raise DataError(f"{store.url} has no generation {number} (the newest is {newest})")
    manifest = read_manifest(store, newest if number is None else number)
    if number is not None and number < newest:
        _require_not_collected(store, manifest, newest)
    return Dataset(store, manifest)


def _require_not_collected(store: Store, manifest: DatasetManifest, newest: int) -> None:
    """DataError if a generation names shards that a later one has retired, and that were collected since."""
    try:
        retired = {(part.split, part.stem): part.number for part in read_manifest(store, newest).retired}
    except DataError:  # of that manifest, which is not the one that is opened
        return
    named = [part for part in manifest.parts if (part.split, part.stem) in retired]
    if not named:
        return
    there = {f"{folder}/{name}" for folder in ("shards", "quarantine", "removed") for name in store.list(folder)}
    for part in named:
        if gone := [ref.name for ref in part.own_files if ref.name not in there and store.size(ref.name) is None]:
            by = retired[part.split, part.stem]
            raise DataError(
                f"generation {manifest.number} of {store.url} is not complete any more: generation {by} wrote {part.stem} again without "
                f"removed samples, and {gone[0]} was collected; use generation {newest}, or restore the files"
            )


def _nothing_here(store: Store) -> DataError:
    other = other_kind(store, "dataset")
    if other is not None:
        return other
    if newest_number(store, "run") is None:
        python = (
            ", or write one with aecore.data.write.job.shard_dataset; external tars need an index (adopt_shards, in the same module), or "
            "are read without one with input.reader=webdataset"
        )
        hint = Hint("no-dataset", {"url": store.url, "python": python})
        return DataError(f"{store.url} holds no dataset: check the address{python}", hint=hint)
    parts = sum(name.endswith(".json") for name in store.list("records"))
    return DataError(
        f"{store.url} holds an unfinished run ({parts} parts recorded, no manifest): run the command that wrote it again to finish it"
    )
