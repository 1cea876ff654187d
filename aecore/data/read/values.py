"""What a dataset's samples are once they are decoded, whatever files, keys and shards hold them: `values_sha256`."""

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aecore.data.dataset import Dataset
from aecore.data.format.limits import exclusive_cumsum, split_by_limits
from aecore.data.format.record import DATA_EXTENSIONS
from aecore.data.manifest import ShardRef
from aecore.data.removal import live_rows
from aecore.data.write.report import decoded_values
from aecore.threads import map_ordered

LOSSY = frozenset({"jpg", "jpeg", "webp"})  # decoders differ by a few levels: of these the bytes count
_BLOCK_BYTES, _THREADS = 1 << 24, 2


def values_sha256(dataset: Dataset) -> tuple[str, int]:
    """Return the hash of all live samples as a multiset of (split, class name, values), and how many count by their bytes.

    Values are dtype, shape and all numbers: images as `[C, H, W]`, arrays as they are, one of two axes as an image of one channel. So a
    folder of PNGs, an npz and idx files of the same images have one hash. Samples of lossy formats, and those that cannot be decoded,
    count by their bytes. Everything is read and decoded; 32 bytes a sample are kept.
    """
    digests, by_bytes = list[bytes](), 0
    for shard in dataset.manifest.shards:
        if shard.live:
            for digest, is_by_bytes in _shard(dataset, shard):
                digests.append(digest)
                by_bytes += is_by_bytes
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest(), by_bytes


def _shard(dataset: Dataset, shard: ShardRef) -> list[tuple[bytes, bool]]:
    layout, reader = dataset.manifest.identity.get("shards", {}).get("layout", "auto"), dataset.reader(shard)
    try:
        rows = live_rows(dataset.store, shard, reader.index)
        rows = np.arange(len(reader)) if rows is None else rows
        index: Any = reader.index.take(rows)  # any: pyarrow's stubs know no types of values
        names = [name or "" for name in index["label_name"].to_pylist()]
        members = index["members"].to_pylist()
        data = [next(member for member in each if member["ext"] in DATA_EXTENSIONS) for each in members]
        sizes = np.array([member["size"] for member in data], np.int64)
        found = list[tuple[bytes, bool]]()

        def digest(row: int, content: bytes) -> tuple[bytes, bool]:
            values = None if data[row]["ext"] in LOSSY else decoded_values(content, layout)
            own = hashlib.sha256(b"bytes\0" + content).digest() if values is None else _of_values(values)
            return hashlib.sha256(f"{shard.split}\0{names[row]}\0".encode() + own).digest(), values is None

        for start, stop in split_by_limits((exclusive_cumsum(sizes), _BLOCK_BYTES)):
            block = reader.read_rows(rows[start:stop])
            found += map_ordered(lambda each: digest(*each), zip(range(start, stop), block, strict=True), threads=_THREADS)
        return found
    finally:
        reader.close()


def _of_values(values: NDArray[Any]) -> bytes:  # any: every sample has its own dtype
    if values.ndim == 4 and values.shape[3] == 1:  # an array of three axes that is no image
        values = values[..., 0]
    elif values.ndim == 3:
        values = values.transpose(2, 0, 1)
    elif values.ndim == 2:
        values = values[None]
    whole = np.ascontiguousarray(values)
    whole = whole.astype(whole.dtype.newbyteorder("<"), copy=False)
    return hashlib.sha256(f"{whole.dtype.str}\0{whole.shape}\0".encode() + whole.tobytes()).digest()
