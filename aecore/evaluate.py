"""How good a model is on a split: exact sums over every sample, once.

The ELBO is at beta 1 with one sample of the posterior and noise from (seed, batch index); at z = mu it would read 5-6 nats too good
on MNIST. The reconstruction error is at z = mu, in data space. A dimension is an active unit if the variance of its posterior
mean over the data is above 0.01 (Burda et al. 2015, "Importance Weighted Autoencoders"). The batch size is part of the noise.
"""

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from aecore._base.batch import Batch
from aecore._base.trainable import Trainable
from aecore.checkpoint import LoadedModel, load_model, require_fit, require_labels
from aecore.data.loader import InputSpec, Loader
from aecore.data.manifest import Dataset, open_dataset
from aecore.data.transform import Transform
from aecore.errors import DataError
from aecore.loss import kl_divergence_diag_gaussian
from aecore.objective import Objective
from aecore.ranks import Rank
from aecore.store import absolute_url
from aecore.validation import split_means

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


def evaluate_run(
    run: str,
    data: str,
    split: str = "test",
    *,
    seed: int = 0,
    batch: int = 512,
    rank: Rank = Rank(),  # noqa: B008  # frozen
) -> Evaluation:
    """Evaluate a finished run (or one checkpoint) on a split of a dataset; reads every sample once and writes nothing.

    Every rank calls it with the same arguments and gets the same result; with `rank.world > 1` the default process group must exist.

    Raises
    ------
    DataError
        No such split, samples of another shape, a damaged or undecodable sample, a count that is not the manifest's, or means
        that are not finite.
    """
    dataset = open_dataset(absolute_url(data, "data"))
    loaded = load_model(absolute_url(run, "run"), device=rank.device)
    require_fit(dataset, loaded)
    require_labels(dataset.url, dataset.manifest.classes, loaded.model)
    config = loaded.config
    objective = Objective(loaded.model, Transform(config.transform), config.model.likelihood).eval()
    with Loader(dataset, split, transform=config.transform, spec=InputSpec(cache="none")) as loader:
        means = split_means(objective, loader, seed=seed, batch=batch, rank=rank, extra=_posterior_and_data)
    _require_finite(split, means)
    evaluation = _evaluation(loaded, dataset, split, means, seed, batch)
    for warning in evaluation.warnings if rank.index == 0 else ():
        logger.warning(warning)
    return evaluation


def _posterior_and_data(model: Trainable, batch: Batch) -> dict[str, Tensor]:
    """Return sums over the rows of a batch: samples that are not finite or not in [0, 1], KL and moments of mu per dimension `[D]`."""
    x = batch.x.flatten(1)
    terms = {"not_finite": (~x.isfinite()).any(1).sum(), "outside_unit": ((x < 0) | (x > 1)).any(1).sum()}
    latents = model.latents(batch)
    if {"mu", "log_var"} <= latents.keys():
        mu = latents["mu"].double()
        terms["kl_per_dimension"] = kl_divergence_diag_gaussian(mu, latents["log_var"].double(), reduce_sum=False).sum(0)
        terms["mu"], terms["mu_squared"] = mu.sum(0), mu.square().sum(0)
    return terms


def _require_finite(split: str, means: Mapping[str, Tensor]) -> None:
    """Raise DataError that names the terms whose mean is not finite, and whether the data or the model made them so."""
    bad = [name for name, mean in means.items() if not mean.isfinite().all()]
    if bad:
        cause = (
            "samples hold NaN or infinity: shard the source again with shards.check=decode, which leaves them out"
            if means["not_finite"] > 0
            else "every sample is finite, so the model gives NaN or infinity: evaluate another checkpoint"
        )
        raise DataError(f"split {split!r} has no finite mean of {', '.join(bad)}: {cause}")


def _evaluation(loaded: LoadedModel, dataset: Dataset, split: str, means: Mapping[str, Tensor], seed: int, batch: int) -> Evaluation:
    num_samples, likelihood = dataset.manifest.num_samples(split), loaded.config.model.likelihood
    active, per_dimension = _active_units(means), means.get("kl_per_dimension")
    return Evaluation(
        split=split,
        num_samples=num_samples,
        log_likelihood=float(means["log_likelihood"]),
        mse=float(means["mse"]),
        elbo=float(means["elbo"]) if "elbo" in means else None,
        kl=float(means["kl_divergence"]) if "kl_divergence" in means else None,
        kl_per_dimension=None if per_dimension is None else tuple(per_dimension.tolist()),
        active_units=active,
        likelihood=likelihood,
        seed=seed,
        batch=batch,
        lineage={
            "checkpoint": {"sha256": loaded.sha256, "step": loaded.checkpoint.step, "url": loaded.url},
            "dataset": {"url": dataset.url, "number": dataset.manifest.number, "sha256": dataset.manifest.dataset_sha256},
        },
        warnings=(*_likelihood_warnings(likelihood, means, num_samples), *_collapse_warnings(means, active)),
    )


def _active_units(means: Mapping[str, Tensor]) -> int | None:
    if "mu" not in means:
        return None
    return int((means["mu_squared"] - means["mu"].square() > ACTIVE_VARIANCE).sum())


def _likelihood_warnings(likelihood: str, means: Mapping[str, Tensor], num_samples: int) -> list[str]:
    outside = round(float(means["outside_unit"]) * num_samples)
    if likelihood != "bernoulli" or not outside:
        return []
    return [
        f"the bernoulli likelihood is a probability of values in [0, 1], {outside} of {num_samples} scaled samples hold others: "
        "train with model.likelihood=gaussian or transform.scale=unit"
    ]


def _collapse_warnings(means: Mapping[str, Tensor], active: int | None) -> list[str]:
    if active is None or active >= max(1.0, COLLAPSED_SHARE * len(means["mu"])):
        return []
    return [
        f"posterior collapse: {active} of {len(means['mu'])} latent dimensions are active (variance of mu above {ACTIVE_VARIANCE}): "
        "lower model.beta, or raise it slowly with model.beta_warmup_steps"
    ]
