"""Numbers that look fine and are not: what the means over a split say about the wrong likelihood, scale or size of the latent."""

import math
from collections.abc import Mapping

from torch import Tensor

from aecore._base.trainable import ModelSpec
from aecore.registry import to_dict

ACTIVE_VARIANCE = 0.01
COLLAPSED_SHARE = 0.1  # fewer active units than this share of the latent dimensions: the decoder ignores most of the latent
WIDE_DATA = 3.0  # standard deviation over all values: standardised data have 1, images in [-1, 1] at most 1


def pitfalls(
    model: ModelSpec, means: Mapping[str, Tensor], num_samples: int, input_shape: tuple[int, ...], active: int | None
) -> list[str]:
    """Return a sentence for each pitfall that the means show, with what to do about it."""
    return [
        *_outside_unit(model.likelihood, means, num_samples),
        *_unnormalised(model, means),
        *_collapse(means, active),
        *_overcomplete(means, input_shape),
    ]


def _outside_unit(likelihood: str, means: Mapping[str, Tensor], num_samples: int) -> list[str]:
    outside = round(float(means["outside_unit"]) * num_samples)
    if likelihood != "bernoulli" or not outside:
        return []
    return [
        f"the bernoulli likelihood is a probability of values in [0, 1], {outside} of {num_samples} scaled samples hold others: "
        "train with model.likelihood=gaussian or transform.scale=unit"
    ]


def _unnormalised(model: ModelSpec, means: Mapping[str, Tensor]) -> list[str]:
    deviation = math.sqrt(max(float(means["x_squared"] - means["x"].square()), 0.0))
    scale = to_dict(model).get("scale", 1.0)  # not every kind has the knob
    if model.likelihood != "gaussian" or scale != 1.0 or deviation <= WIDE_DATA:
        return []
    return [
        f"the gaussian likelihood has unit variance and the input is not normalised (its values deviate by {deviation:.3g}): the "
        "reconstruction outweighs every other term; train with transform.scale=unit, or standardise float data before sharding"
    ]


def _collapse(means: Mapping[str, Tensor], active: int | None) -> list[str]:
    if active is None or active >= max(1.0, COLLAPSED_SHARE * len(means["mu"])):
        return []
    return [
        f"posterior collapse: {active} of {len(means['mu'])} latent dimensions are active (variance of mu above {ACTIVE_VARIANCE}): "
        "lower model.beta, or raise it slowly with model.beta_warmup_steps"
    ]


def _overcomplete(means: Mapping[str, Tensor], input_shape: tuple[int, ...]) -> list[str]:
    size = math.prod(input_shape)  # 0: sequences of any length
    if not size or "latent_dim" not in means or (dim := round(float(means["latent_dim"]))) < size:
        return []
    return [
        f"the latent has {dim} dimensions and the input {size} values: nothing has to be compressed, a copy reconstructs perfectly; "
        "lower model.latent_dim"
    ]
