"""Folders of sequences as `.npy` files, and datasets of them: waves of numbers and sentences of token ids, of many lengths."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aecore.data.dataset import Dataset, open_dataset
from aecore.data.sources.folder import FolderSpec
from aecore.data.write.job import shard_dataset
from aecore.data.write.plan import SplitSpec
from aecore.data.write.spec import ShardSpec

VOCAB = 7


def wave(number: int, longest: int = 12, features: int = 2) -> NDArray[np.float32]:
    """Sine and cosine of a frequency and phase of their own, `[T, 2]` with T from 1 to `longest`."""
    rng = np.random.default_rng(number)
    frequency, phase, steps = rng.uniform(0.2, 1.0), rng.uniform(0, 6.3), np.arange(rng.integers(1, longest + 1))
    values = [np.sin(frequency * steps + phase + turn) for turn in np.linspace(0, 1.5, features)]
    return np.stack(values, 1).astype(np.float32)


def sentence(number: int, longest: int = 12) -> NDArray[np.int64]:
    """Ids that count on from a first one by a step of their own, `[T]`."""
    rng = np.random.default_rng(number)
    return (rng.integers(VOCAB) + rng.integers(1, 3) * np.arange(rng.integers(1, longest + 1))) % VOCAB


def folder_of(folder: Path, samples: list[NDArray[np.generic]], split: str = "train") -> Path:
    """Write `<folder>/<split>/<number % 3>/<number>.npy`."""
    for number, sample in enumerate(samples):
        path = folder / split / str(number % 3) / f"{number:04d}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, sample)
    return folder


def dataset_of(url: Path, samples: list[NDArray[np.generic]], *, max_samples: int = 9, val: float = 0.0, max_bad: float = 0.01) -> Dataset:
    """Shard sequences; `url` gets `in` and `data`."""
    source = FolderSpec(url=str(folder_of(url / "in", samples)), extensions=("npy",))
    splits = SplitSpec(by="hash", val=val) if val else SplitSpec(by="folders")
    shard_dataset(source, str(url / "data"), splits, ShardSpec(max_samples=max_samples, max_bad=max_bad))
    return open_dataset(str(url / "data"))
