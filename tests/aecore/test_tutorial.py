"""The networks of the tutorial (seed 003), written by hand and given to our classes, and its recipes, which build the same ones.

The parameter counts that the tutorial prints do not come from its code; these are the ones of its code.
"""

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aecore.registry import MODELS
from aecore.vanilla import AE, DenoisingAE, SparseAE
from aecore.variational import VAE, VQVAE, VectorQuantizer
from pipelines.recipe.recipe import load_recipe


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def stack(*widths: int, last: type[nn.Module] | None = None) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1], *([last()] if last else []))


def conv_encoder(*channels: int, act: nn.Module) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for before, after in pairwise(channels):
        layers += [nn.Conv2d(before, after, kernel_size=3, stride=2, padding=1), nn.BatchNorm2d(after), act]
    return [*layers, nn.Flatten()]


def up(before: int, after: int, padding: int = 1) -> nn.Module:
    return nn.ConvTranspose2d(before, after, kernel_size=3, stride=2, padding=1, output_padding=padding)


def autoencoder() -> AE:
    return AE(stack(784, 256, 128, 64, 32), stack(32, 64, 128, 256, 784, last=nn.Sigmoid))


def conv_autoencoder(latent_dim: int = 64) -> AE:
    encoder = nn.Sequential(*conv_encoder(1, 32, 64, act=nn.ReLU()), nn.Linear(64 * 7 * 7, latent_dim))
    first = [nn.Linear(latent_dim, 64 * 7 * 7), nn.Unflatten(1, (64, 7, 7))]
    return AE(encoder, nn.Sequential(*first, up(64, 32), nn.BatchNorm2d(32), nn.ReLU(), up(32, 1), nn.Sigmoid()))


def vae() -> VAE:
    encoder = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())
    model = VAE(encoder, stack(20, 256, 256, 784), latent_dim=20)
    model.build(torch.zeros(1, 784))
    return model


def conv_vae(latent_dim: int = 32) -> VAE:
    act = nn.LeakyReLU(0.2)
    first = [nn.Linear(latent_dim, 128 * 4 * 4), nn.Unflatten(1, (128, 4, 4))]
    rest = [up(128, 64, 0), nn.BatchNorm2d(64), act, up(64, 32), nn.BatchNorm2d(32), act, up(32, 1)]
    model = VAE(nn.Sequential(*conv_encoder(1, 32, 64, 128, act=act)), nn.Sequential(*first, *rest), latent_dim)
    model.build(torch.zeros(1, 1, 28, 28))
    return model


@pytest.mark.parametrize(("make", "parameters"), [(autoencoder, 489_136), (vae, 549_688), (conv_autoencoder, 442_433)])
def test_the_tutorials_networks_have_the_parameters_that_its_code_gives(make, parameters: int) -> None:
    assert count(make()) == parameters


def images(flat: bool) -> Tensor:
    """Coarse black and white patterns."""
    coarse = torch.rand(16, 1, 7, 7, generator=torch.Generator().manual_seed(0)) > 0.8
    x = coarse.float().repeat_interleave(4, 2).repeat_interleave(4, 3)
    return x.flatten(1) if flat else x


def takes_flat(model: nn.Module) -> bool:
    return isinstance(next(layer for layer in model.modules() if isinstance(layer, nn.Linear | nn.Conv2d)), nn.Linear)


def denoising() -> DenoisingAE:
    encoder = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Dropout(0.2), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 64))
    return DenoisingAE(encoder, stack(64, 128, 256, 784, last=nn.Sigmoid), noise_factor=0.5)


def sparse() -> SparseAE:
    return SparseAE(stack(784, 256, 64, last=nn.ReLU), stack(64, 256, 784, last=nn.Sigmoid), sparsity_weight=1e-3)


def quantised() -> VQVAE:
    encoder = nn.Sequential(*conv_encoder(1, 32, act=nn.ReLU())[:-1], nn.Conv2d(32, 64, 3, stride=2, padding=1))
    decoder = nn.Sequential(up(64, 32), nn.ReLU(), up(32, 1), nn.Sigmoid())
    return VQVAE(encoder, decoder, VectorQuantizer(num_embeddings=512, embedding_dim=64))


@pytest.mark.parametrize("make", [autoencoder, conv_autoencoder, denoising, sparse, quantised])
def test_the_tutorials_training_loop_lowers_the_loss(make) -> None:
    torch.manual_seed(0)
    model = make()
    x, optimizer = images(takes_flat(model)), torch.optim.Adam(model.parameters(), lr=1e-3)
    values = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model.compute_loss(x, model(x)).objective
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.9 * values[0]
    assert model(x).x_hat.shape == x.shape
    assert 0 <= model(x).x_hat.min() <= model(x).x_hat.max() <= 1


@pytest.mark.parametrize("make", [vae, conv_vae])
def test_the_tutorials_vae_loss_is_ours_times_the_batch(make) -> None:
    """Its loss sums over the batch and takes probabilities; ours means over the batch and takes logits."""
    model = make()
    x = images(takes_flat(model))
    output = model(x)
    result = model.compute_loss(x, output, beta=4.0, likelihood="bernoulli")
    reconstruction = torch.sigmoid(output.x_hat.squeeze(1))
    kl = -0.5 * torch.sum(1 + output.log_var - output.mu.pow(2) - output.log_var.exp())
    expected = F.binary_cross_entropy(reconstruction, x, reduction="sum") + 4.0 * kl
    torch.testing.assert_close(result.objective * len(x), expected, rtol=1e-4, atol=0)


def test_the_tutorials_generation_and_interpolation_run() -> None:
    model = vae().eval()
    assert model.decoder(torch.randn(64, model.latent_dim)).view(-1, 1, 28, 28).shape == (64, 1, 28, 28)
    x = images(flat=True)
    start, end = model.encode(x[:1]).mu, model.encode(x[1:2]).mu
    steps = torch.cat([(1 - alpha) * start + alpha * end for alpha in torch.linspace(0, 1, 10)])
    assert model.decode(steps.unsqueeze(1)).x_hat.shape == (10, 1, 784)


def test_original_noisy_and_denoised_rows() -> None:
    model, x = denoising().eval(), images(flat=True)
    noisy = model.add_noise(x)
    denoised = model(noisy, add_noise=False).x_hat
    assert not torch.equal(noisy, x)
    assert 0 <= noisy.min() <= noisy.max() <= 1
    assert denoised.shape == x.shape


RECIPES = {"mnist_ae": autoencoder, "mnist_conv_ae": conv_autoencoder, "mnist_dae": denoising, "mnist_sae": sparse}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_build_the_tutorials_networks(name: str) -> None:
    """Of the same size, with GroupNorm for BatchNorm, and activations that keep runs on other numbers of ranks equal."""
    recipe = load_recipe(name, [])
    model = MODELS.build(recipe.model, recipe.backbone, (1, 28, 28))
    by_hand = RECIPES[name]()
    assert count(model) == count(by_hand)
    assert type(model) is type(by_hand)


def test_the_recipe_of_the_vqvae_has_the_exercises_codebook() -> None:
    recipe = load_recipe("mnist_vqvae", [])
    model = MODELS.build(recipe.model, recipe.backbone, (1, 28, 28)).eval()
    assert model.quantizer.codebook.shape == VectorQuantizer().codebook.shape == (512, 64)
    assert model.encode(images(flat=False)).codes.shape == (16, 49)
