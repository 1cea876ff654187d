"""Loss terms of autoencoders: log-likelihoods, KL divergences, their result type, schedules of their weights."""

from aecore.loss._divergence import kl_divergence_diag_gaussian
from aecore.loss._likelihood import LikelihoodType, expected_value, log_likelihood, sample_log_likelihood
from aecore.loss._result import LossResult

__all__ = ["LikelihoodType", "LossResult", "expected_value", "kl_divergence_diag_gaussian", "log_likelihood", "sample_log_likelihood"]
