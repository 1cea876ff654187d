"""The inputs of the figures of one model on one split: some samples, their latents, the decoder. Legend: n rows, D latent."""

from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aecore._base.batch import Batch
from aecore.checkpoint.weights import LoadedModel
from aecore.data.dataset import Dataset
from aecore.data.format.transform import Transform
from aecore.data.read.loader import InputSpec, Loader
from aecore.errors import ConfigError
from aecore.evaluate import EvaluateSpec
from aecore.evaluate._latents import Latents, SplitLatents, draw_indices
from aecore.registry import to_dict
from aecore.sampling import decode_batches, prior_dim

Int64s = NDArray[np.int64]
POINTS = 2000  # latents of a map


class NotDrawn(Exception):  # not an error: a figure that this model or these data do not have
    """Why there is no such figure."""


class View:
    """A loaded model and one split of a dataset, as the figures ask for them; `with` closes the files."""

    def __init__(self, loaded: LoadedModel, dataset: Dataset, spec: EvaluateSpec, device: str) -> None:
        self.loaded, self.dataset, self.spec, self.device = loaded, dataset, spec, device
        self.transform = Transform(loaded.config.transform)
        config = loaded.config
        self.loader = Loader(
            dataset, spec.split, transform=config.transform, spec=InputSpec(cache="none"), channels=config.channels, classes=config.classes
        )
        self.shape = loaded.config.input_shape
        self.chosen = draw_indices(self.loader.num_samples, POINTS, spec.seed)

    def batch(self, indices: Int64s) -> Batch:
        """Return samples of the split by number, scaled, on the device."""
        return self.transform(self.loader.take(indices).to(self.device))

    def reconstruct(self, batch: Batch) -> Tensor:
        """Return the reconstructions of a batch, on the CPU."""
        return self.loaded.model.reconstruct(batch, likelihood=self.loaded.config.model.likelihood).cpu()

    def decode(self, z: Tensor, label: int | None) -> Tensor:
        """Return samples `[n, *shape]` of latents `[n, D]`, on the CPU; all of class `label` for a conditional model."""
        labels = torch.full((len(z),), label or 0) if self.conditional else None
        try:
            return decode_batches(self.loaded, z.float(), labels, self.spec.batch)
        except ConfigError as refused:
            raise NotDrawn(str(refused)) from refused

    @property
    def conditional(self) -> bool:
        """Whether the model needs the class of every sample."""
        return "label" in self.loaded.model.encode_inputs

    @property
    def num_classes(self) -> int:
        """Classes that a conditional model knows; 1 for the others."""
        return int(to_dict(self.loaded.config.model).get("num_classes", 1))

    @property
    def prior_dim(self) -> int:
        """D of the prior; NotDrawn for a model without one."""
        try:
            return prior_dim(self.loaded)
        except ConfigError as refused:
            raise NotDrawn(str(refused)) from refused

    @cached_property
    def latents(self) -> Latents:
        """Latents and labels of up to `POINTS` samples, drawn by the seed."""
        with SplitLatents(self.loaded, self.dataset, self.spec.split, batch=self.spec.batch, device=self.device) as reader:
            return reader.of(self.chosen)

    @property
    def decodable(self) -> Latents:
        """The latents, where the decoder takes points between them; NotDrawn where it takes codes."""
        if "codes" in self.loaded.config.model.columns:
            raise NotDrawn(f"model.kind={self.loaded.config.model.kind} decodes codes, which cannot be interpolated")
        return self.latents

    def label_name(self, label: int) -> str:
        """Return the name of a class, its number where it has none."""
        classes = self.loader.rows.classes
        return classes[label].rpartition("/")[2] if 0 <= label < len(classes) else str(label) if label >= 0 else ""

    def by_class(self, num: int) -> Int64s:
        """Return numbers of up to `num` samples, one of each class in turn; without labels the first of the drawn ones."""
        labels = self.labels
        turn = np.zeros(len(labels), np.int64)
        for label in np.unique(labels):
            places = np.flatnonzero(labels == label)
            turn[places] = np.arange(len(places))
        order = np.lexsort((labels, turn))[:num]
        return np.asarray(self.chosen[order])

    @cached_property
    def labels(self) -> Int64s:
        """Class ids of the drawn samples; -1 where there is none."""
        found = self.loader.take(self.chosen).label
        return np.full(len(self.chosen), -1) if found is None else found.numpy()

    def close(self) -> None:
        self.loader.close()

    def __enter__(self) -> "View":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
