"""Loss terms of autoencoders: log-likelihoods, densities, KL divergences, regularizers, schedules of weights, the result type."""

from aecore.loss._density import log_density_diag_gaussian
from aecore.loss._divergence import kl_divergence_diag_gaussian
from aecore.loss._likelihood import (
    LOGITS,
    LikelihoodType,
    expected_value,
    log_likelihood,
    parse_likelihood,
    row_log_likelihood,
    sample_log_likelihood,
)
from aecore.loss._result import LossResult

__all__ = [
    "LOGITS",
    "LikelihoodType",
    "LossResult",
    "expected_value",
    "kl_divergence_diag_gaussian",
    "log_density_diag_gaussian",
    "log_likelihood",
    "parse_likelihood",
    "row_log_likelihood",
    "sample_log_likelihood",
]
