"""Bags of generated vectors or images as an .npz, sharded by the real job: what the tests of bags share."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aecore.data.dataset import Dataset, open_dataset
from aecore.data.sources.arrays import ArraysSpec
from aecore.data.write.job import shard_dataset
from aecore.data.write.spec import ShardSpec
from aecore.data.write.splits import SplitSpec

DIM = 6


def bag_sizes(num_bags: int, seed: int = 0) -> NDArray[np.int64]:
    """1 to 7 instances, unevenly."""
    return np.random.default_rng(seed).integers(1, 8, num_bags)


def write_npz(path: Path, num_bags: int = 40, images: bool = False) -> Path:
    """Write instances whose first number is their row in the file, with the bag and a label of each; rows of a bag are not adjacent."""
    rng = np.random.default_rng(1)
    bags = rng.permutation(np.repeat(np.arange(num_bags), bag_sizes(num_bags)))
    rows = np.arange(len(bags))
    if images:
        samples = rng.integers(0, 256, (len(bags), 4, 5), dtype=np.uint8)
        samples[:, 0, 0], samples[:, 0, 1] = rows % 256, rows // 256
    else:
        centres = rng.normal(size=(num_bags, DIM)).astype(np.float32)
        samples = centres[bags] + 0.3 * rng.normal(size=(len(bags), DIM)).astype(np.float32)
        samples[:, 0] = rows / 100
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, x=samples, y=bags % 2, bags=bags)
    return path


def bag_dataset(folder: Path, num_bags: int = 40, *, val: float = 0.0, max_samples: int = 30, images: bool = False) -> Dataset:
    """Shard such bags into a few shards (or reuse what is there)."""
    source = ArraysSpec(url=str(write_npz(folder / "raw.npz", num_bags, images)), group="bags")
    shard_dataset(source, str(folder / "data"), SplitSpec(by="hash" if val else "none", val=val), ShardSpec(max_samples=max_samples))
    return open_dataset(str(folder / "data"))
