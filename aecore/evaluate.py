"""How good a model is on a split: exact sums over every sample, once.

The ELBO is at beta 1 with one sample of the posterior and noise from (seed, batch index); at z = mu it would read 5-6 nats too good
on MNIST. The reconstruction error is at z = mu, in data space. A dimension is an active unit if the variance of its posterior
mean over the data is above 0.01 (Burda et al. 2015, "Importance Weighted Autoencoders"). The batch size is part of the noise.
"""

import dataclasses
import logging
import math
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aecore._base.batch import Batch
from aecore.checkpoint import LoadedModel, load_model, require_fit
from aecore.data.loader import InputSpec, Loader
from aecore.data.manifest import Dataset, open_dataset
from aecore.data.transform import Transform
from aecore.errors import DataError
from aecore.loss import kl_divergence_diag_gaussian
from aecore.objective import noise_for
from aecore.store import absolute_url

logger = logging.getLogger(__name__)

ACTIVE_VARIANCE = 0.01
COLLAPSED_SHARE = 0.1  # fewer active units than this share of the latent dimensions: the decoder ignores most of the latent


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Means over the samples of a split, in nats (`mse`: per element of the scaled data).

    `elbo`, `kl`, `kl_per_dimension` and `active_units` are None for a model without a posterior.
    """

    split: str
    num_samples: int
    log_likelihood: float
    mse: float
    elbo: float | None
    kl: float | None
    kl_per_dimension: tuple[float, ...] | None
    active_units: int | None
    likelihood: str
    seed: int
    batch: int
    lineage: dict[str, Any]
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return dataclasses.asdict(self)


@dataclass
class _Sums:
    """Float64 sums over the samples so far; `moments` are of the posterior mean."""

    count: int = 0
    terms: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    lowest: float = float("inf")
    highest: float = float("-inf")
    data_finite: bool = True

    def add(self, batch: Batch, terms: dict[str, Tensor]) -> None:
        """Add sums over the rows of one batch (scalars or `[D]`)."""
        self.count += len(batch)
        for name, value in terms.items():
            self.terms[name] = self.terms.get(name, torch.zeros((), dtype=torch.float64)) + value.double().cpu()
        lowest, highest = (float(value) for value in torch.aminmax(batch.x))  # NaN if there is one
        self.data_finite = self.data_finite and math.isfinite(lowest) and math.isfinite(highest)
        self.lowest, self.highest = min(self.lowest, lowest), max(self.highest, highest)

    def mean(self, name: str) -> Tensor | None:
        """Return the mean of one term; None if the model has no such term."""
        return self.terms[name] / self.count if name in self.terms else None

    def require_finite(self, split: str) -> None:
        """Raise DataError that names the terms whose mean is not finite, and whether the data or the model made them so."""
        bad = [name for name, value in self.terms.items() if not value.isfinite().all()]
        if bad:
            cause = (
                "every sample is finite, so the model gives NaN or infinity: evaluate another checkpoint"
                if self.data_finite
                else "samples hold NaN or infinity: shard the source again with shards.check=decode, which leaves them out"
            )
            raise DataError(f"split {split!r} has no finite mean of {', '.join(bad)}: {cause}")


def evaluate_run(run: str, data: str, split: str = "test", *, device: str = "cpu", seed: int = 0, batch: int = 512) -> Evaluation:
    """Evaluate a finished run (or one checkpoint) on a split of a dataset; reads every sample once and writes nothing.

    Raises
    ------
    DataError
        No such split, samples of another shape, a damaged or undecodable sample, a count that is not the manifest's, or means
        that are not finite.
    """
    dataset = open_dataset(absolute_url(data, "data"))
    loaded = load_model(absolute_url(run, "run"), device=device)
    require_fit(dataset.url, dataset.manifest.input_shape(), loaded)
    loader = Loader(dataset, split, transform=loaded.config.transform, spec=InputSpec(cache="none"))
    with loader:
        sums = _sums(loaded, loader, device, seed, batch)
    if sums.count != dataset.manifest.num_samples(split):
        raise DataError(
            f"{sums.count} samples were read, the manifest of {dataset.url} says {dataset.manifest.num_samples(split)}: "
            f"run `aepipe verify {dataset.url} --read-data`"
        )
    sums.require_finite(split)
    evaluation = _evaluation(loaded, dataset, split, sums, seed, batch)
    for warning in evaluation.warnings:
        logger.warning(warning)
    return evaluation


@torch.inference_mode()
def _sums(loaded: LoadedModel, loader: Loader, device: str, seed: int, size: int) -> _Sums:
    transform, sums = Transform(loaded.config.transform), _Sums()
    with closing(loader.range_batches(0, loader.num_samples, size)) as batches:
        for number, stored in enumerate(batches):
            batch = transform(stored.to(device))
            sums.add(batch, _terms(loaded, batch, noise_for(loaded.model, batch, seed, number)))
    return sums


def _terms(loaded: LoadedModel, batch: Batch, eps: Tensor | None) -> dict[str, Tensor]:
    """Return sums over the rows of a batch: the model's own terms, squared error, KL and moments per dimension."""
    model = loaded.model
    likelihood = loaded.config.model.likelihood
    result = model.loss(batch, eps=eps, beta=1.0, likelihood=likelihood)
    terms = {name: value.double() * len(batch) for name, value in result.tensors.items()}
    error = model.reconstruct(batch, likelihood=likelihood) - batch.x
    terms["mse"] = error.double().square().flatten(1).mean(1).sum()
    latents = model.latents(batch)
    if {"mu", "log_var"} <= latents.keys():
        mu = latents["mu"].double()
        terms["kl_per_dimension"] = kl_divergence_diag_gaussian(mu, latents["log_var"].double(), reduce_sum=False).sum(0)
        terms["mu"], terms["mu_squared"] = mu.sum(0), mu.square().sum(0)
    return terms


def _evaluation(loaded: LoadedModel, dataset: Dataset, split: str, sums: _Sums, seed: int, batch: int) -> Evaluation:
    def mean(name: str) -> float | None:
        value = sums.mean(name)
        return None if value is None else float(value)

    per_dimension, active = sums.mean("kl_per_dimension"), _active_units(sums)
    likelihood = loaded.config.model.likelihood
    log_likelihood, mse = mean("log_likelihood"), mean("mse")
    assert log_likelihood is not None and mse is not None, "every model's loss names its log likelihood"
    return Evaluation(
        split=split,
        num_samples=sums.count,
        log_likelihood=log_likelihood,
        mse=mse,
        elbo=mean("elbo"),
        kl=mean("kl_divergence"),
        kl_per_dimension=None if per_dimension is None else tuple(per_dimension.tolist()),
        active_units=active,
        likelihood=likelihood,
        seed=seed,
        batch=batch,
        lineage={
            "checkpoint": {"sha256": loaded.sha256, "step": loaded.checkpoint.step, "url": loaded.url},
            "dataset": {"url": dataset.url, "number": dataset.manifest.number, "sha256": dataset.manifest.dataset_sha256},
        },
        warnings=_warnings(likelihood, sums, active, per_dimension),
    )


def _active_units(sums: _Sums) -> int | None:
    mean, squared = sums.mean("mu"), sums.mean("mu_squared")
    if mean is None or squared is None:
        return None
    return int((squared - mean.square() > ACTIVE_VARIANCE).sum())


def _warnings(likelihood: str, sums: _Sums, active: int | None, per_dimension: Tensor | None) -> tuple[str, ...]:
    found = []
    if likelihood == "bernoulli" and (sums.lowest < 0 or sums.highest > 1):
        found.append(
            f"the bernoulli likelihood is a probability of values in [0, 1], the scaled data lie in [{sums.lowest:g}, {sums.highest:g}]: "
            "train with model.likelihood=gaussian or transform.scale=unit"
        )
    latent_dim = 0 if per_dimension is None else len(per_dimension)
    if active is not None and active < max(1.0, COLLAPSED_SHARE * latent_dim):
        found.append(
            f"posterior collapse: {active} of {latent_dim} latent dimensions are active (variance of mu above {ACTIVE_VARIANCE}): "
            "lower model.beta, or raise it slowly with model.beta_warmup_steps"
        )
    return tuple(found)
