"""Data sets with chosen shard sizes, written by the real writer: for tests of what reads them."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from aecore.artifact.commit import PartRecord
from aecore.data.dataset import Dataset
from aecore.data.sources import Listing
from aecore.data.write.manifest_build import next_manifest
from aecore.data.write.shard import pack_shard
from aecore.data.write.spec import ShardSpec, ShardTask
from aecore.store import open_store


@dataclass(frozen=True)
class MemorySource:
    """Named bytes as a source; `png` unless the name has another extension."""

    files: Mapping[str, bytes]

    def listing(self) -> Listing:
        return Listing(list(self.files), list(self.files), np.array([len(data) for data in self.files.values()], np.int64))

    def read(self, source: str) -> tuple[str, bytes]:
        return source.rpartition(".")[2] if "." in source else "png", self.files[source]


def image(number: int, side: int = 4) -> NDArray[np.uint8]:
    """Picture number n: its first pixels are the digits of n to the base 256, the others random."""
    pixels = np.random.default_rng(number).integers(0, 256, (side, side), dtype=np.uint8)
    pixels[0, :2] = number % 256, number // 256
    return pixels


def encoded(pixels: NDArray[np.generic], format: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


def write(url: Path, shards: Sequence[Sequence[bytes]], split: str = "train", labels: bool = True, ext: str = "png") -> Dataset:
    """Write one split of these shards; sample n (through all shards) has key `kn`, ordinal n and label n % 3."""
    store, records, first = open_store(url), list[PartRecord](), 0
    for number, members in enumerate(shards):
        names = [f"k{first + row}.{ext}" for row in range(len(members))]
        ordinals = np.arange(first, first + len(members))
        task = ShardTask(
            split=split,
            stem=f"{split}-{number:06d}",
            source=None,
            keys=[name.split(".")[0] for name in names],
            sources=names,
            sizes=np.fromiter(map(len, members), np.int64),
            ordinals=ordinals,
            labels=(ordinals % 3).astype(np.int32) if labels else None,
            label_names=[f"class {ordinal % 3}" for ordinal in ordinals] if labels else None,
            shards=ShardSpec(),
        )
        records.append(pack_shard(store, task, MemorySource(dict(zip(names, members, strict=True))))())
        first += len(members)
    listing = store.put("listing.json", b"{}", role="listing")
    classes = [f"class {label}" for label in range(3)] if labels else []
    return Dataset(store, next_manifest(None, {}, classes, records, listing, "0" * 64))


def write_images(url: Path, counts: Sequence[int], **options: object) -> Dataset:
    """Write gray images `image(n)` in shards of these sizes."""
    numbers = iter(range(sum(counts)))
    return write(url, [[encoded(image(next(numbers))) for _ in range(count)] for count in counts], **options)  # type: ignore[arg-type]
