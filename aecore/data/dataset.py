"""An opened dataset: its store, the generation that is read, and the readers of its shards."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aecore.artifact.commit import newest_number
from aecore.artifact.kinds import other_kind
from aecore.data.manifest import STEM, DatasetManifest, ShardRef, read_manifest, tar_store
from aecore.errors import DataError, Hint
from aecore.store import Store, open_store

if TYPE_CHECKING:
    import pyarrow as pa

    from aecore.data.read.shard_reader import ShardReader


@dataclass(frozen=True, slots=True)
class Dataset:
    """An opened dataset: where it is, and the generation that is read."""

    store: Store
    manifest: DatasetManifest

    @property
    def url(self) -> str:
        """The dataset's address."""
        return self.store.url

    def tars(self, shard: ShardRef) -> Store:
        """Return the store that holds the tar of a shard of this manifest."""
        return tar_store(self.store, shard)

    def prefetch(self, shards: Sequence[ShardRef]) -> None:
        """Start the background download of these shards, index and tar, in this order (no-op for local files)."""
        own = [[shard.index, shard.tar] if shard.tar_base_url is None else [shard.index] for shard in shards]
        self.store.prefetch([ref for refs in own for ref in refs])
        for base_url in dict.fromkeys(shard.tar_base_url for shard in shards if shard.tar_base_url is not None):
            adopted = [shard for shard in shards if shard.tar_base_url == base_url]
            self.tars(adopted[0]).prefetch([shard.tar for shard in adopted])

    def reader(self, shard: ShardRef) -> "ShardReader":
        """Return the strict reader of one shard of this manifest."""
        from aecore.data.read.shard_reader import ShardReader  # imported late: who reads manifests alone needs no reader

        return ShardReader(self.store, shard)


def read_listings(store: Store, manifest: DatasetManifest) -> "pa.Table":
    """Return key, source and source bytes of every sample that was ever planned, quarantined ones too; verified."""
    import pyarrow as pa  # imported late: who reads manifests alone needs no tables

    from aecore.data.format.index import read_table

    return pa.concat_tables([read_table(store.read(ref.name, ref=ref), f"{store.url}/{ref.name}") for ref in manifest.listings])


def open_dataset(url: str, number: int | None = None) -> Dataset:
    """Open the newest generation of the dataset at `url`, or generation `number`; reads the manifest and nothing else.

    Raises
    ------
    DataError
        If there is no manifest (it says whether an unfinished run is there), or not that one.
    """
    store = open_store(url)
    newest = newest_number(store, STEM)
    if newest is None:
        raise _nothing_here(store)
    if number is not None and store.size(f"{STEM}.{number:06d}.json") is None:
        raise DataError(f"{store.url} has no generation {number} (the newest is {newest})")
    return Dataset(store, read_manifest(store, newest if number is None else number))


def _nothing_here(store: Store) -> DataError:
    other = other_kind(store, "dataset")
    if other is not None:
        return other
    if newest_number(store, "run") is None:
        return DataError(
            f"{store.url} holds no dataset: write one with aecore.data.write.job.shard_dataset, or check the address; external tars need "
            "an index (adopt_shards, in the same module), or are read without one with input.reader=webdataset",
            hint=Hint("no-dataset", {"url": store.url}),
        )
    parts = sum(name.endswith(".json") for name in store.list("records"))
    return DataError(
        f"{store.url} holds an unfinished run ({parts} parts recorded, no manifest): run the command that wrote it again to finish it"
    )
