"""Other libraries as numerical references at equal weights, where they are right; skipped where they are not installed."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aecore._base import Batch
from aecore.vanilla import AE
from aecore.variational import VAE, AdaGVAE
from aecore.variational.bound import VariationalObjective
from aecore.variational.marginal import log_marginal
from tests.peers import load_or_skip

B, FEATURES, D, S = 5, 12, 3, 4


def encoder() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(FEATURES, 8), nn.Tanh())


@pytest.fixture
def x() -> Tensor:
    return torch.rand(B, FEATURES, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_state_dicts_of_pyautoencoder_load_as_they_are_and_give_its_numbers(x: Tensor, likelihood: str) -> None:
    theirs = pytest.importorskip("pyautoencoder.variational").VAE(encoder(), nn.Linear(D, FEATURES), latent_dim=D)
    theirs.build(x)
    ours = VAE(encoder(), nn.Linear(D, FEATURES), latent_dim=D)
    ours.build(x)
    result = ours.load_state_dict(theirs.state_dict())
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    torch.manual_seed(1)
    expected = theirs(x, S=S)
    torch.manual_seed(1)
    found = ours(x, S=S)
    for name in ("x_hat", "z", "mu", "log_var"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
    ours_loss = ours.compute_loss(x, found, beta=2.0, likelihood=likelihood)
    theirs_loss = theirs.compute_loss(x, expected, beta=2.0, likelihood=likelihood)
    torch.testing.assert_close(ours_loss.objective, theirs_loss.objective)
    for name, value in theirs_loss.diagnostics.items():
        assert ours_loss.diagnostics[name] == pytest.approx(float(value), rel=1e-5)
    torch.testing.assert_close(AdaGVAE(ours).state_dict()["vae.sampling_layer.mu.weight"], theirs.sampling_layer.mu.weight.detach())


def test_state_dicts_of_its_plain_autoencoder_load_too(x: Tensor) -> None:
    theirs = pytest.importorskip("pyautoencoder.vanilla").AE(encoder(), nn.Linear(8, FEATURES))
    ours = AE(encoder(), nn.Linear(8, FEATURES))
    ours.load_state_dict(theirs.state_dict())
    found, expected = ours(x), theirs(x)
    torch.testing.assert_close((found.x_hat, found.z), (expected.x_hat, expected.z))
    torch.testing.assert_close(ours.compute_loss(x, found).objective, theirs.compute_loss(x, expected).objective)


class _Nets:
    """Our networks in the form that pythae takes."""

    def __init__(self, ours: VAE) -> None:
        nets = load_or_skip("pythae.models.nn")
        output = load_or_skip("pythae.models.base.base_utils").ModelOutput

        class Encoder(nets.BaseEncoder):  # type: ignore[misc, name-defined]  # a class of the peer
            def __init__(self) -> None:
                nets.BaseEncoder.__init__(self)
                self.body, self.heads = copy.deepcopy(ours.encoder), copy.deepcopy(ours.sampling_layer)

            def forward(self, x: Tensor) -> Any:
                mu, log_var = self.heads.get_params(self.body(x))
                return output(embedding=mu, log_covariance=log_var)

        class Decoder(nets.BaseDecoder):  # type: ignore[misc, name-defined]  # a class of the peer
            def __init__(self) -> None:
                nets.BaseDecoder.__init__(self)
                self.body = copy.deepcopy(ours.decoder)

            def forward(self, z: Tensor) -> Any:
                return output(reconstruction=self.body(z).sigmoid())

        self.encoder, self.decoder = Encoder(), Decoder()


@pytest.fixture
def ours(x: Tensor) -> VAE:
    torch.manual_seed(0)
    model = VAE(encoder(), nn.Linear(D, FEATURES), D, VariationalObjective(objective="iwae", num_samples=S))
    model.build(x)
    return model


@pytest.mark.filterwarnings("ignore")  # what the peer warns about is its own
def test_losses_gradients_and_log_likelihoods_of_pythae(x: Tensor, ours: VAE) -> None:
    models = load_or_skip("pythae.models")
    nets, settings = _Nets(ours), {"input_dim": (FEATURES,), "latent_dim": D, "reconstruction_loss": "bce"}
    vae = models.VAE(models.VAEConfig(**settings), nets.encoder, nets.decoder)
    torch.manual_seed(2)
    theirs = vae({"data": x})
    torch.manual_seed(2)
    eps = torch.randn(B, D).unsqueeze(1)
    rows = torch.arange(B)
    batch = Batch(x, rows, rows, B)
    found = ours.eval().loss(batch, eps=eps, likelihood="bernoulli")
    assert found.objective.item() == pytest.approx(theirs.loss.item(), rel=1e-5)
    assert found.diagnostics["kl_divergence"] == pytest.approx(theirs.reg_loss.item(), rel=1e-5)

    torch.manual_seed(3)
    log_p = vae.get_nll(x.round(), n_samples=8000, batch_size=1000)
    marginal = log_marginal(ours, Batch(x.round(), rows, rows, B), num_samples=8000, likelihood="bernoulli").mean()
    assert float(marginal) == pytest.approx(float(log_p), abs=0.02)  # its sign is that of log p


@pytest.mark.filterwarnings("ignore")
def test_gradients_of_the_iwae_of_pythae(x: Tensor, ours: VAE) -> None:
    """Its loss is a surrogate whose value is not the bound; its gradient is the bound's."""
    models = load_or_skip("pythae.models")
    nets = _Nets(ours)
    config = models.IWAEConfig(input_dim=(FEATURES,), latent_dim=D, reconstruction_loss="bce", number_samples=S)
    iwae = models.IWAE(config, nets.encoder, nets.decoder)
    torch.manual_seed(4)
    iwae({"data": x}).loss.backward()
    torch.manual_seed(4)
    rows = torch.arange(B)
    ours.loss(Batch(x, rows, rows, B), eps=torch.randn(B, S, D), likelihood="bernoulli").objective.backward()
    theirs = [*iwae.encoder.body.parameters(), *iwae.encoder.heads.parameters(), *iwae.decoder.body.parameters()]
    mine = [*ours.encoder.parameters(), *ours.sampling_layer.parameters(), *ours.decoder.parameters()]
    for expected, parameter in zip(theirs, mine, strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-4, atol=1e-6)
