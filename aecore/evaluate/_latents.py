"""Latents of a split as arrays, with the labels and factors that the index holds: what probes and factor scores work on."""

from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from aecore._base.batch import Batch
from aecore._base.trainable import latent_column
from aecore.checkpoint.weights import LoadedModel
from aecore.data.dataset import Dataset
from aecore.data.format.transform import Transform
from aecore.data.read.loader import InputSpec, Loader
from aecore.errors import DataError, Hint

FACTOR = "factor_"
MANY_LEVELS, FEW_LEVELS = 100, 20  # a numeric factor with more levels is cut into as many bins of equal width
Int64s = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Latents:
    """Latents `[n, D]` float32 and labels `[n]` of some samples of a split."""

    values: Floats
    labels: Int64s


@dataclass(frozen=True, slots=True)
class Factors:
    """Levels `[n, F]` of the factors that vary, by name; `cut` names those that were cut into bins."""

    names: tuple[str, ...]
    levels: Int64s
    cut: tuple[str, ...]


class SplitLatents:
    """Reads one split of a dataset through a loaded model, as evaluation does: stored bytes, transform, `latents`."""

    def __init__(self, loaded: LoadedModel, dataset: Dataset, split: str, *, batch: int, device: str) -> None:
        self.loaded, self.batch, self.device = loaded, batch, device
        self.column = latent_column(loaded.config.model.columns)
        self.transform = Transform(loaded.config.transform)
        config = loaded.config
        self.loader = Loader(
            dataset, split, transform=config.transform, spec=InputSpec(cache="none"), channels=config.channels, classes=config.classes
        )
        self.num_samples, self.labelled = self.loader.num_samples, self.loader.rows.labelled

    def all(self) -> Latents:
        """Return the latents of every sample, in stored order."""
        with closing(self.loader.range_batches(0, self.num_samples, self.batch)) as batches:
            return self._latents(batches)

    def of(self, indices: Int64s) -> Latents:
        """Return the latents of the samples with these numbers, in this order."""
        chunks = np.array_split(indices, range(self.batch, len(indices), self.batch))
        return self._latents(self.loader.take(chunk) for chunk in chunks)

    def _latents(self, batches: Iterable[Batch]) -> Latents:
        values, labels = [], []
        for stored in batches:
            ready = self.transform(stored.to(self.device))
            latent = self.loaded.model.embedding(ready)
            if len(latent) != len(stored.ordinals):
                raise DataError(f"the model gives {len(latent)} latents for {len(stored.ordinals)} samples: probes need one of each")
            values.append(latent.float().cpu().numpy())
            labels.append(np.full(len(latent), -1) if stored.label is None else stored.label.cpu().numpy())
        return Latents(np.concatenate(values), np.concatenate(labels).astype(np.int64))

    def factor_columns(self) -> dict[str, Any]:  # any: Arrow columns
        """Return name -> column of the `factor_*` columns of all samples, in stored order; DataError if a shard lacks one."""
        rows = self.loader.rows
        rows.dataset.store.prefetch([shard.index for shard in rows.shards])
        tables = [rows.index(number) for number in np.flatnonzero(rows.counts).tolist()]
        names = sorted({name for table in tables for name in table.column_names if name.startswith(FACTOR)})
        for name in names:
            if any(name not in table.column_names or table[name].null_count for table in tables):
                raise DataError(f"{name} is missing for samples of split {rows.split!r} of {rows.dataset.url}: scores need it of all")
        return {name.removeprefix(FACTOR): pa.chunked_array([c for table in tables for c in table[name].chunks]) for name in names}

    def close(self) -> None:
        self.loader.close()

    def __enter__(self) -> "SplitLatents":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def factors_of(splits: Iterable[SplitLatents]) -> Factors:
    """Return the factors of the samples of several splits, one after the other; DataError if fewer than one of them varies."""
    splits = list(splits)
    columns = [split.factor_columns() for split in splits]
    names = [name for name in columns[0] if all(name in other for other in columns)]
    levels, kept, cut = [], [], []
    for name in names:
        values = np.concatenate([np.asarray(column[name].to_numpy()) for column in columns])
        known, level = np.unique(values, return_inverse=True)
        if len(known) > MANY_LEVELS and np.issubdtype(values.dtype, np.number):
            edges = np.histogram_bin_edges(values.astype(np.float64), FEW_LEVELS)
            level = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, FEW_LEVELS - 1)
            cut.append(name)
        if len(known) > 1:
            kept.append(name)
            levels.append(level.astype(np.int64))
    if not kept:
        where = splits[0].loader.rows.dataset.url
        raise DataError(
            f"{where} has no {FACTOR}* column that varies (it has: {', '.join(names) or 'none'}): factor scores need data "
            "with known factors, such as source.kind=sprites; leave out evaluate.factors",
            hint=Hint("no-factors"),
        )
    return Factors(tuple(kept), np.stack(levels, axis=1), tuple(cut))


def require_labelled(split: SplitLatents, latents: Latents) -> Latents:
    """Return the latents; DataError if a sample has no label."""
    bare = int((latents.labels < 0).sum())
    if bare or not split.labelled:
        rows = split.loader.rows
        raise DataError(
            f"{bare} of {len(latents.labels)} samples of split {rows.split!r} of {rows.dataset.url} have no label: probes need "
            "labelled data (class folders, or labels in the arrays); leave out evaluate.probe"
        )
    return latents


def draw_indices(total: int, num: int, seed: int) -> Int64s:
    """Return `num` different numbers below `total` (all of them if there are fewer), shuffled by the seed."""
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed)).numpy()[:num]
