"""Every signature of torchmil's two classes as its documentation states them: names, order and defaults."""

import inspect

import pytest

from aecore.mil import VariationalAutoEncoder, VariationalAutoEncoderMIL

NONE = inspect.Parameter.empty
INIT = {"input_shape": (512,), "layer_sizes": [128, 64], "activations": ["relu", "None"], "covar_mode": "single", "jitter": 1e-07}
DRAWN = {"n_samples": 1, "return_mean_logstd": False}
SIGNATURES = [
    (VariationalAutoEncoder, "__init__", INIT),
    (VariationalAutoEncoder, "get_reparameterized_samples", {"mean": NONE, "log_std": NONE, "n_samples": 1}),
    (VariationalAutoEncoder, "get_raw_output_enc", {"X": NONE}),
    (VariationalAutoEncoder, "get_raw_output_dec", {"samples": NONE}),
    (VariationalAutoEncoder, "forward", {"X": NONE, **DRAWN}),
    (VariationalAutoEncoder, "get_posterior_samples", {"X": NONE, **DRAWN}),
    (VariationalAutoEncoder, "complete_forward_samples", {"X": NONE, "n_samples": 1}),
    (VariationalAutoEncoder, "compute_loss", {"X": NONE, "reduction": "mean", "n_samples": 1, "return_samples": False}),
    (VariationalAutoEncoder, "_kl_prior", {"mean": NONE, "log_std": NONE}),
    (VariationalAutoEncoder, "_diagonal_log_gaussian_pdf", {"inputs": NONE, "mean": NONE, "log_std": NONE}),
    (VariationalAutoEncoder, "log_marginal_likelihood_importance_sampling", {"X": NONE, "n_samples": 1}),
    (VariationalAutoEncoderMIL, "__init__", INIT),
    (VariationalAutoEncoderMIL, "forward", {"X": NONE, **DRAWN}),
    (VariationalAutoEncoderMIL, "log_marginal_likelihood_importance_sampling", {"X": NONE, "mask": None, "n_samples": 1}),
    (VariationalAutoEncoderMIL, "compute_loss", {"X": NONE, "mask": None, "reduction": "mean", "n_samples": 1, "return_samples": False}),
    (VariationalAutoEncoderMIL, "complete_forward_samples", {"X": NONE}),
]


@pytest.mark.parametrize(("cls", "name", "expected"), SIGNATURES, ids=lambda value: value if isinstance(value, str) else None)
def test_signature_is_that_of_the_documentation(cls, name, expected):
    parameters = dict(inspect.signature(getattr(cls, name)).parameters)
    parameters.pop("self")
    assert {key: parameter.default for key, parameter in parameters.items()} == expected
    assert list(parameters) == list(expected)
    assert {parameter.kind for parameter in parameters.values()} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


def test_the_class_of_bags_is_one_of_instances():
    assert issubclass(VariationalAutoEncoderMIL, VariationalAutoEncoder)
