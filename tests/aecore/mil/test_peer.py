"""torchmil itself at equal weights, where it is right: nets, KL, densities, losses. Runs only where torchmil is installed."""

import pytest
import torch

from aecore.mil import VariationalAutoEncoder, VariationalAutoEncoderMIL
from tests.peers import load_or_skip

peer = load_or_skip("torchmil.nn")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
B, N, F, D = 4, 3, 12, 5


@pytest.fixture(params=["single", "diagonal"])
def pair(request):
    """Ours and the peer's model of bags with the same weights: state dicts are interchangeable."""
    torch.manual_seed(0)
    options = {"input_shape": (F,), "layer_sizes": [8, 6, D], "activations": ["relu", "relu", "None"], "covar_mode": request.param}
    ours, theirs = VariationalAutoEncoderMIL(**options), peer.VariationalAutoEncoderMIL(**options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def test_posterior_and_likelihood_are_the_same(pair):
    ours, theirs = pair
    x, z = torch.randn(B, F), torch.randn(B, D)
    for name, value in (("get_raw_output_enc", x), ("get_raw_output_dec", z)):
        (mean, log_std), (expected, expected_std) = getattr(ours, name)(value), getattr(theirs, name)(value)
        torch.testing.assert_close(mean, expected)
        torch.testing.assert_close(log_std.expand_as(expected_std), expected_std)


def test_divergence_and_density_are_the_same(pair):
    ours, theirs = pair
    mean, log_std, x = torch.randn(B, D), torch.randn(B, D), torch.randn(B, D)
    torch.testing.assert_close(ours._kl_prior(mean, log_std), theirs._kl_prior(mean, log_std))
    expected = theirs._diagonal_log_gaussian_pdf(x, mean, log_std)
    torch.testing.assert_close(ours._diagonal_log_gaussian_pdf(x, mean, log_std), expected)


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_losses_of_instances_and_of_unmasked_bags_are_the_same(pair, reduction):
    ours, theirs = pair
    with torch.no_grad():
        theirs.encoder.net[4].weight[D:] = 0.0
        theirs.encoder.net[4].bias[D:] = -12.0  # no noise to speak of
    ours.load_state_dict(theirs.state_dict())
    X = torch.randn(B, N, F)
    for name, value in theirs.compute_loss(X, None, reduction).items():
        torch.testing.assert_close(ours.compute_loss(X, None, reduction)[name], value, atol=1e-3, rtol=1e-4)
    single = VariationalAutoEncoder((F,), [8, 6, D], ["relu", "relu", "None"], ours.covar_mode)
    single.load_state_dict(ours.state_dict())
    for name, value in super(type(theirs), theirs).compute_loss(X[0], reduction).items():
        torch.testing.assert_close(single.compute_loss(X[0], reduction)[name], value, atol=1e-3, rtol=1e-4)


def test_what_the_peer_does_wrong_is_right_here(pair):
    """If one of these begins to hold for the peer, compare more with it."""
    ours, theirs = pair
    X, mask = torch.randn(B, N, F), torch.ones(B, N)
    mask[0, 1:] = 0
    torch.manual_seed(1)
    ignored = theirs.compute_loss(X, mask)["VaeKL"]
    torch.testing.assert_close(ignored, theirs.compute_loss(X, None)["VaeKL"])
    assert not torch.allclose(ours.compute_loss(X, mask)["VaeKL"], ours.compute_loss(X, None)["VaeKL"])
    tanh = peer.VariationalAutoEncoder((F,), [8, D], ["tanh", "None"])
    assert "Tanh" not in str(tanh)
    assert "Tanh" in str(VariationalAutoEncoder((F,), [8, D], ["tanh", "None"]))
