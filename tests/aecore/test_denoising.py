"""The denoising autoencoder: what each corruption does, when it is done, and what the loss compares."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from aecore._base import Batch
from aecore.errors import ConfigError
from aecore.nn.mlp import MLPSpec
from aecore.registry import MODELS
from aecore.training.loop import fit
from aecore.vanilla import AE, DenoisingAE, DenoisingAESpec
from tests.aecore.training import fit_on, losses, small_job, sprites_dataset

N = 40_000


def batch_of(x: Tensor) -> Batch:
    return Batch(x, torch.arange(len(x)), torch.arange(len(x)), len(x))


def small(noise_factor: float = 0.5, **options: object) -> DenoisingAE:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.ReLU())
    decoder = nn.Sequential(nn.Linear(4, 12), nn.Unflatten(1, (1, 3, 4)), nn.Sigmoid())
    return DenoisingAE(encoder, decoder, noise_factor, **options)


def test_gaussian_noise_has_the_factor_as_its_deviation_and_stays_in_the_range() -> None:
    model, eps = small(0.1), torch.randn(N)
    noisy = model.add_noise(torch.full((N,), 0.5), eps)
    torch.testing.assert_close(noisy, 0.5 + 0.1 * eps)
    ends = small(0.5).add_noise(torch.rand(N))
    assert (ends.min(), ends.max()) == (0, 1)
    assert small(0.5, clamp=None).add_noise(torch.rand(N)).max() > 1
    assert small(5.0, clamp=(-1.0, 1.0)).add_noise(torch.zeros(N)).unique(return_counts=True)[0].min() == -1


def test_a_mask_sets_the_asked_share_to_zero_and_leaves_the_rest() -> None:
    x = torch.rand(N) + 0.5
    noisy = small(0.3, noise="mask").add_noise(x)
    hit = noisy == 0
    assert hit.float().mean().item() == pytest.approx(0.3, abs=0.01)
    assert torch.equal(noisy[~hit], x[~hit])


def test_salt_and_pepper_sets_half_of_the_share_to_each_end() -> None:
    x = torch.rand(N) * 0.5 + 0.25
    noisy = small(0.3, noise="salt_pepper", clamp=(-1.0, 1.0)).add_noise(x)
    assert (noisy == -1).float().mean().item() == pytest.approx(0.15, abs=0.01)
    assert (noisy == 1).float().mean().item() == pytest.approx(0.15, abs=0.01)
    rest = (noisy != -1) & (noisy != 1)
    assert torch.equal(noisy[rest], x[rest])


@pytest.mark.parametrize("noise", ["gaussian", "mask", "salt_pepper"])
def test_no_noise_and_full_noise(noise: str) -> None:
    x = torch.rand(N)
    assert torch.equal(small(0.0, noise=noise).add_noise(x), x)
    if noise != "gaussian":
        assert set(small(1.0, noise=noise).add_noise(x).unique().tolist()) <= {0.0, 1.0}


def test_inputs_are_corrupted_in_training_and_on_demand_only() -> None:
    model, x = small(), torch.rand(5, 1, 3, 4)
    clean = AE.forward(model, x).x_hat
    assert not torch.equal(model(x).x_hat, clean)
    assert torch.equal(model(x, add_noise=False).x_hat, clean)
    model.eval()
    assert torch.equal(model(x).x_hat, clean)
    assert not torch.equal(model(x, add_noise=True).x_hat, clean)
    batch = batch_of(x)
    model.train()
    assert torch.equal(model.latents(batch)["z"], model.eval().latents(batch)["z"])
    assert torch.equal(model.reconstruct(batch), clean)


def test_latents_and_reconstructions_are_of_the_clean_input_in_any_mode() -> None:
    model, batch = small().train(), batch_of(torch.rand(5, 1, 3, 4))
    assert torch.equal(model.reconstruct(batch), AE.forward(model, batch.x).x_hat)
    assert torch.equal(model.encode(batch.x).z, model.encoder(batch.x))


def test_the_loss_compares_the_reconstruction_of_the_noisy_with_the_clean_input() -> None:
    model, batch = small(), batch_of(torch.rand(5, 1, 3, 4))
    eps = torch.randn(5, 1, 1, 3, 4)
    noisy = (batch.x + 0.5 * eps[:, 0]).clamp(0, 1)
    expected = 0.5 * (model(noisy, add_noise=False).x_hat - batch.x).square().sum() / 5
    result = model.loss(batch, eps=eps)
    torch.testing.assert_close(result.objective, expected)
    assert result.diagnostics["log_likelihood"] == pytest.approx(-expected.item())
    clean = 0.5 * (model(batch.x, add_noise=False).x_hat - batch.x).square().sum() / 5
    torch.testing.assert_close(model.eval().loss(batch, eps=eps).objective, clean)


def test_without_given_noise_torchs_generator_draws_it() -> None:
    model, batch = small(), batch_of(torch.rand(5, 1, 3, 4))
    assert model.noise_shape() is None, "the trainer cannot know the shape of the inputs"
    torch.manual_seed(3)
    first = model.loss(batch).objective
    assert model.loss(batch).objective != first
    torch.manual_seed(3)
    assert torch.equal(model.loss(batch).objective, first)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_factor": -0.1}, "noise_factor must be >= 0, got -0.1"),
        ({"noise_factor": 1.5, "noise": "mask"}, r"a share in \[0, 1\] for mask noise, got 1.5"),
        ({"noise": "poisson"}, "got 'poisson'"),
        ({"noise": "salt_pepper", "clamp": None}, "ends of a range"),
    ],
)
def test_noise_that_cannot_be_made_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)
    spec = {"kind": "dae", **options, "clamp": "none" if "clamp" in options else "unit"}
    with pytest.raises(ConfigError, match=r"DenoisingAESpec"):
        MODELS.from_dict(spec)


def test_noise_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"eps must have the shape of x, \(2, 3\), got \(2, 4\)"):
        small().add_noise(torch.zeros(2, 3), torch.zeros(2, 4))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return sprites_dataset(tmp_path_factory.mktemp("dae") / "sprites", val=0.1)


@pytest.mark.parametrize("noise", ["gaussian", "mask", "salt_pepper"])
def test_any_number_of_ranks_sees_the_same_noise(data: str, tmp_path, noise: str) -> None:
    spec = DenoisingAESpec(latent_dim=8, noise=noise, noise_factor=0.4)
    for world_size in (1, 2):
        fit_on(small_job(data, tmp_path / str(world_size), max_steps=6, model=spec), world_size)
    one, two = (losses(tmp_path / str(world_size)) for world_size in (1, 2))
    np.testing.assert_allclose([row["loss"] for row in two], [row["loss"] for row in one], rtol=1e-5)


def test_it_learns_to_remove_noise(data: str, tmp_path) -> None:
    """After the same training it reconstructs noisy images better than an autoencoder that has seen clean ones only."""
    from aecore.checkpoint.weights import load_model
    from aecore.data.dataset import open_dataset
    from aecore.data.format.transform import Transform, TransformSpec
    from aecore.data.read.loader import Loader
    from aecore.vanilla import AESpec

    errors = {}
    with Loader(open_dataset(data), "val", transform=TransformSpec()) as loader:
        x = Transform(TransformSpec())(next(loader.range_batches(0, 256, 256))).x
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    for spec in (DenoisingAESpec(latent_dim=16, noise_factor=0.5), AESpec(latent_dim=16)):
        fit(small_job(data, tmp_path / spec.kind, epochs=6, model=spec, backbone=MLPSpec(hidden=(64,))))
        model = load_model(str(tmp_path / spec.kind)).model
        noisy = (x + 0.5 * eps).clamp(0, 1)
        errors[spec.kind] = (model.reconstruct(batch_of(noisy)) - x).square().mean().item()
    assert errors["dae"] < 0.8 * errors["ae"]
