"""Exact sums over every sample of a split, once; then the optional scores.

The ELBO is at beta 1 with one sample of the posterior and noise from (seed, batch index); at z = mu it would read 5-6 nats too good
on MNIST. The reconstruction error is at z = mu, in data space. A dimension is an active unit if the variance of its posterior
mean over the data is above 0.01 (Burda et al. 2015, "Importance Weighted Autoencoders"). The batch size is part of the noise.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aecore._base.batch import Batch
from aecore._base.trainable import Trainable, has_posterior
from aecore.checkpoint.compatibility import check_input_shape, require_known_labels
from aecore.checkpoint.weights import LoadedModel, load_model
from aecore.data.dataset import Dataset, open_dataset
from aecore.data.format.transform import Transform
from aecore.data.read.loader import InputSpec, Loader
from aecore.errors import ConfigError, DataError
from aecore.evaluate._scores import Scores, require_scorable, scores_of
from aecore.evaluate._spec import EvaluateSpec
from aecore.evaluate._warnings import ACTIVE_VARIANCE, pitfalls
from aecore.loss import kl_divergence_diag_gaussian
from aecore.store import absolute_url
from aecore.training.objective import Objective
from aecore.training.ranks import Rank
from aecore.training.validation import split_means
from aecore.variational.marginal import log_marginal

MAX_CODES = 1 << 16  # entries of a codebook whose use is counted


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Means over the samples of a split, in nats (`mse`: per element of the scaled data).

    `binarize` is that of the samples that were scored: none, or dynamic for black and white ones that are drawn from the grey values
    (probes and factor scores are always of the grey). `elbo`, `kl`, `kl_per_dimension` and `active_units` are None for a model without
    a posterior, `perplexity` and `codes_used` for one without a codebook. `log_marginal` is the bound of `iwae` importance samples on
    log p(x), with all constants; it, `probe` and `disentanglement` are None where they were not asked for.
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
    binarize: str
    lineage: dict[str, Any]
    warnings: tuple[str, ...] = ()
    iwae: int = 0
    log_marginal: float | None = None
    perplexity: float | None = None
    codes_used: int | None = None
    probe: dict[str, Any] | None = None
    disentanglement: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return dataclasses.asdict(self)


def evaluate_run(run: str, data: str, split: str = "test", *, rank: Rank = Rank(), **knobs: Any) -> Evaluation:  # noqa: B008  # frozen
    """Call `evaluate` with `EvaluateSpec(split=split, **knobs)`."""
    return evaluate(run, data, EvaluateSpec(split=split, **knobs), rank=rank)


def evaluate(run: str, data: str, spec: EvaluateSpec = EvaluateSpec(), *, rank: Rank = Rank()) -> Evaluation:  # noqa: B008  # frozen
    """Evaluate a finished run (or one checkpoint) on a split of a dataset; writes nothing (for the figures see `aecore.report`).

    Reads every sample of the split once; probes and factor scores read theirs besides. Every rank calls it with the same arguments
    and gets the same result; with `rank.world_size > 1` the default process group must exist.

    Raises
    ------
    DataError
        No such split, samples of another shape, a damaged or undecodable sample, a count that is not the manifest's, means that are
        not finite, or data without the labels or factors that a score needs.
    ConfigError
        A score that this model or this installation cannot give.
    """
    dataset, loaded = open_for_evaluation(run, data, spec, rank.device)
    config, transform = loaded.config, spec.transform(loaded.config.transform)
    objective = Objective(loaded.model, Transform(transform), config.model.likelihood).eval()
    with Loader(
        dataset, spec.split, transform=transform, spec=InputSpec(cache="none"), channels=config.channels, classes=config.classes
    ) as loader:
        means = split_means(objective, loader, seed=spec.seed, batch=spec.batch, rank=rank, extra=_Extra(spec, config.model.likelihood))
    _require_finite(spec.split, means)
    return _evaluation(loaded, dataset, spec, means, scores_of(loaded, dataset, spec, rank))


def open_for_evaluation(run: str, data: str, spec: EvaluateSpec, device: str) -> tuple[Dataset, LoadedModel]:
    """Open dataset and model, and refuse an evaluation that cannot work; reads the model and no sample."""
    dataset = open_dataset(absolute_url(data, "data"))
    loaded = load_model(absolute_url(run, "run"), device=device)
    check_input_shape(dataset, loaded)
    dataset.manifest.split(spec.split, "evaluate.split")
    scored = [spec.split, spec.train_split] if spec.probe or spec.factors else [spec.split]
    require_known_labels(dataset, loaded, scored)
    spec.transform(loaded.config.transform)
    if spec.iwae and not has_posterior(loaded.config.model.columns):
        raise ConfigError(
            f"evaluate.iwae={spec.iwae} and model.kind={loaded.config.model.kind} has no posterior to draw from: leave evaluate.iwae out"
        )
    require_scorable(loaded, dataset, spec)
    return dataset, loaded


@dataclass(frozen=True, slots=True)
class _Extra:
    """Sums over the rows of a batch in addition to the loss: for the warnings, the posterior, the codebook and log p(x)."""

    spec: EvaluateSpec
    likelihood: str

    def __call__(self, model: Trainable, batch: Batch, number: int) -> dict[str, Tensor]:
        x = batch.x.flatten(1)
        terms = {
            "not_finite": (~x.isfinite()).any(1).sum(),
            "outside_unit": ((x < 0) | (x > 1)).any(1).sum(),
            "x": x.double().mean(1).sum(),
            "x_squared": x.double().square().mean(1).sum(),
        }
        latents = model.latents(batch)
        if has_posterior(latents):
            mu = latents["mu"].double()
            terms["kl_per_dimension"] = kl_divergence_diag_gaussian(mu, latents["log_var"].double(), reduce_sum=False).sum(0)
            terms["mu"], terms["mu_squared"] = mu.sum(0), mu.square().sum(0)
        if "codes" in latents:
            terms["codes"] = _code_counts(latents["codes"])
        real = [value.shape[1] for name, value in latents.items() if name not in ("log_var", "codes")]
        if real and "codes" not in latents:  # entries of a codebook bound a latent of any size
            terms["latent_dim"] = x.new_full((), real[0] * len(batch), dtype=torch.float64)
        if self.spec.iwae:
            num, seed = self.spec.iwae, self.spec.seed
            rows = log_marginal(model, batch, num_samples=num, seed=seed, index=number, likelihood=self.likelihood)
            terms["log_marginal"] = rows.sum()
        return terms


def _code_counts(codes: Tensor) -> Tensor:
    """Return how often each entry of the codebook was chosen by the rows, `[MAX_CODES]`."""
    flat = codes.flatten().long()
    flat = flat[flat >= 0]  # none for a sample that holds NaN, which other terms report
    if len(flat) and int(flat.max()) >= MAX_CODES:
        raise DataError(f"the model chose entry {int(flat.max())} of its codebook, and at most {MAX_CODES} entries are counted")
    return torch.bincount(flat, minlength=MAX_CODES).double()


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


def _evaluation(loaded: LoadedModel, dataset: Dataset, spec: EvaluateSpec, means: Mapping[str, Tensor], scores: Scores) -> Evaluation:
    num_samples, likelihood = dataset.manifest.num_samples(spec.split), loaded.config.model.likelihood
    per_dimension, codes = means.get("kl_per_dimension"), means.get("codes")

    def mean(name: str) -> float | None:
        return float(means[name]) if name in means else None

    return Evaluation(
        split=spec.split,
        num_samples=num_samples,
        log_likelihood=float(means["log_likelihood"]),
        mse=float(means["mse"]),
        elbo=mean("elbo"),
        kl=mean("kl_divergence"),
        kl_per_dimension=None if per_dimension is None else tuple(per_dimension.tolist()),
        active_units=_active_units(means),
        likelihood=likelihood,
        seed=spec.seed,
        batch=spec.batch,
        binarize=spec.transform(loaded.config.transform).binarize,
        lineage=lineage_of(loaded, dataset),
        warnings=(*pitfalls(loaded.config.model, means, num_samples, loaded.config.input_shape, _active_units(means)), *scores.warnings),
        iwae=spec.iwae,
        log_marginal=mean("log_marginal"),
        perplexity=None if codes is None else _perplexity(codes),
        codes_used=None if codes is None else int((codes > 0).sum()),
        probe=scores.probe,
        disentanglement=scores.disentanglement,
    )


def lineage_of(loaded: LoadedModel, dataset: Dataset) -> dict[str, Any]:
    """Return which checkpoint and which data numbers or figures come from."""
    return {
        "checkpoint": {"sha256": loaded.sha256, "step": loaded.checkpoint.step, "url": loaded.url},
        "dataset": {"url": dataset.url, "number": dataset.manifest.number, "sha256": dataset.manifest.dataset_sha256},
    }


def _active_units(means: Mapping[str, Tensor]) -> int | None:
    if "mu" not in means:
        return None
    return int((means["mu_squared"] - means["mu"].square() > ACTIVE_VARIANCE).sum())


def _perplexity(counts: Tensor) -> float:
    """Return the exponential of the entropy of how often each entry is chosen over the whole split."""
    shares = counts / counts.sum()
    return float(torch.special.entr(shares).sum().exp())
