"""The conditional VAE: what labels do, what is refused, training and encoding with it. Legend: B batch, S samples, D latent."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal

from aecore._base import Batch
from aecore.checkpoint.weights import load_model
from aecore.data.sources.arrays import ArraysSpec
from aecore.data.write.job import shard_dataset
from aecore.data.write.plan import SplitSpec
from aecore.data.write.spec import ShardSpec
from aecore.encoding.job import EncodeSpec
from aecore.errors import ConfigError, DataError, InputError
from aecore.evaluate import evaluate_run
from aecore.nn.mlp import MLPSpec
from aecore.registry import MODELS
from aecore.table.table import open_table
from aecore.training.loop import fit
from aecore.variational import VAE, ConditionalVAE, ConditionalVAESpec
from aecore.variational.bound import VariationalObjective
from aecore.variational.marginal import log_marginal
from tests.aecore.encoding import encode
from tests.aecore.training import fit_on, losses, small_job, sprites_dataset

B, S, D, CLASSES = 6, 4, 3, 5


def batch_of(x: Tensor, label: Tensor | None = None) -> Batch:
    rows = torch.arange(len(x))
    return Batch(x, rows, rows, len(x), label=label)


@pytest.fixture
def model() -> ConditionalVAE:
    torch.manual_seed(0)
    cvae = ConditionalVAE(nn.Sequential(nn.Linear(12, 8), nn.Tanh()), nn.Linear(D + CLASSES, 12), D, CLASSES)
    cvae.build(torch.zeros(2, 12))
    return cvae


@pytest.fixture
def x() -> Tensor:
    return torch.rand(B, 12, generator=torch.Generator().manual_seed(1))


LABEL = torch.tensor([0, 1, 2, 3, 4, 0])


def test_it_is_the_vae_of_features_and_latents_with_the_one_hot_label_beside_them(model: ConditionalVAE, x: Tensor) -> None:
    hot, eps = nn.functional.one_hot(LABEL, CLASSES).float(), torch.randn(B, S, D)
    output = model(x, LABEL, S=S, eps=eps)
    features = torch.cat([model.encoder(x), hot], 1)
    torch.testing.assert_close(output.mu, model.sampling_layer.mu(features))
    torch.testing.assert_close(output.log_var, model.sampling_layer.log_var(features))
    torch.testing.assert_close(output.z, output.mu.unsqueeze(1) + (output.log_var / 2).exp().unsqueeze(1) * eps)
    for s in range(S):
        torch.testing.assert_close(output.x_hat[:, s], model.decoder(torch.cat([output.z[:, s], hot], 1)))
    reference = VAE(nn.Identity(), nn.Linear(D, 12), D)
    expected = reference.compute_loss(x, output, 2.0, "bernoulli").objective
    assert torch.equal(model.loss(batch_of(x, LABEL), eps=eps, beta=2.0, likelihood="bernoulli").objective, expected)


def test_labels_steer_encoding_and_generation(model: ConditionalVAE, x: Tensor) -> None:
    z = torch.randn(B, D)
    first, second = (model.decode_latents(z, label=torch.full((B,), k), likelihood="bernoulli") for k in (1, 2))
    assert first.shape == x.shape and not torch.allclose(first, second)
    torch.testing.assert_close(first, model.decode(z.unsqueeze(1), torch.ones(B, dtype=torch.int64)).x_hat.squeeze(1).sigmoid())
    assert not torch.allclose(model.encode(x, LABEL).mu, model.encode(x, LABEL.flip(0)).mu)
    assert model.eval().encode(x, LABEL, S=2).z.shape == (B, 2, D)
    torch.testing.assert_close(model.latents(batch_of(x, LABEL))["mu"], model.encode(x, LABEL).mu)
    torch.testing.assert_close(model.reconstruct(batch_of(x, LABEL)), model(x, LABEL).x_hat.squeeze(1).detach())


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (None, r"class id in 0..4 per input, and there are no labels: give label="),
        (torch.tensor([0, 1, 2, 3, 5, 9]), r"got 5, 9: set num_classes"),
        (torch.tensor([0, 1, -1, 3, 4, 0]), r"got -1 \(-1 is a sample without a label\)"),
        (torch.tensor([0, 1]), r"an integer tensor of shape \(6,\); got torch.int64 \(2,\)"),
        (torch.zeros(B), r"an integer tensor of shape \(6,\); got torch.float32 \(6,\)"),
        (torch.zeros(B, CLASSES, dtype=torch.int64), r"got torch.int64 \(6, 5\)"),
    ],
    ids=["none", "too large", "unlabelled", "too few", "floats", "one-hot"],
)
def test_wrong_labels_are_named(model: ConditionalVAE, x: Tensor, label: Tensor | None, message: str) -> None:
    calls: list[Any] = [
        lambda: model(x, label),
        lambda: model.encode(x, label),
        lambda: model.decode_latents(torch.zeros(B, D), label=label),
    ]
    for call in calls:
        with pytest.raises(InputError, match=message) as caught:
            call()
        assert isinstance(caught.value, ValueError) and caught.value.exit_code == 3


def test_where_labels_are_not_looked_at_a_wrong_one_becomes_nan(model: ConditionalVAE, x: Tensor) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda label: model.loss(batch_of(x, label), eps=torch.zeros(B, 1, D)), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(LABEL).objective, model.loss(batch_of(x, LABEL), eps=torch.zeros(B, 1, D)).objective)
    assert compiled(LABEL + 1).objective.isnan()


def test_wrong_latents_and_sizes_are_refused(model: ConditionalVAE) -> None:
    with pytest.raises(ValueError, match=r"\[B, S, D\] with D = 3.*decode_latents"):
        model.decode(torch.zeros(B, D), LABEL)
    with pytest.raises(ValueError, match="num_classes must be >= 1, got 0"):
        ConditionalVAE(nn.Identity(), nn.Identity(), 2, 0)
    with pytest.raises(ConfigError, match="num_classes is 0, expected >= 1"):
        ConditionalVAESpec(num_classes=0)
    with pytest.raises(ValueError, match=r"\[B, F\].*nn.Flatten"):
        ConditionalVAE(nn.Linear(6, 4), nn.Linear(4, 6), 2, 2).build(torch.zeros(2, 1, 6))


def test_a_label_that_explains_the_data_leaves_nothing_for_the_latent() -> None:
    """Two classes of constant images: given the label, the bound on log p(x) is that of the unit Gaussian's noise alone."""
    torch.manual_seed(0)
    label = torch.arange(200) % 2
    centre = torch.where(label[:, None] == 0, -2.0, 2.0).expand(-1, 4)
    x = centre + torch.randn(200, 4)
    model = ConditionalVAE(nn.Linear(4, 8), nn.Linear(2 + 2, 4), 2, 2)
    model.build(x)
    batch, optimizer = batch_of(x, label), torch.optim.Adam(model.parameters(), lr=3e-2)
    for _ in range(400):
        optimizer.zero_grad()
        model.loss(batch).objective.backward()
        optimizer.step()
    model.eval()
    found = log_marginal(model, batch, num_samples=50).mean()
    noise = Normal(centre, 1.0).log_prob(x).sum(1).mean()
    assert float(found) == pytest.approx(float(noise), abs=0.1)
    assert model.loss(batch).diagnostics["kl_divergence"] < 0.3  # the class alone would cost a plain VAE log 2
    assert not torch.allclose(log_marginal(model, batch_of(x, 1 - label), num_samples=50).mean(), found, atol=1.0)


def test_iwae_and_samples_come_from_the_bound(x: Tensor) -> None:
    model = ConditionalVAE(nn.Linear(12, 8), nn.Linear(D + CLASSES, 12), D, CLASSES, VariationalObjective(objective="iwae", num_samples=S))
    model.build(x)
    assert model.noise_shape() == (S, D)
    assert "iwae" in model.loss(batch_of(x, LABEL)).tensors
    assert model.eval().noise_shape() == (1, D)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return sprites_dataset(tmp_path_factory.mktemp("cvae") / "sprites", val=0.1)


SPEC = ConditionalVAESpec(latent_dim=4, num_classes=3, likelihood="bernoulli")


def test_it_trains_alike_on_one_and_two_ranks_and_encodes_to_a_table(data: str, tmp_path: Path) -> None:
    for world_size in (1, 2):
        fit_on(small_job(data, tmp_path / str(world_size), epochs=2, val_split="val", model=SPEC), world_size)
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    np.testing.assert_allclose([row["loss"] for row in two], [row["loss"] for row in one], rtol=1e-5)
    assert one[-1]["loss"] < 0.6 * one[0]["loss"]
    assert two[-1]["validation"]["elbo"] == pytest.approx(one[-1]["validation"]["elbo"], rel=1e-5)
    encode(str(tmp_path / "1"), data, tmp_path / "table", EncodeSpec(kl=True, reconstruction=True, sample=True))
    table = open_table(str(tmp_path / "table"))
    assert {"mu", "log_var", "z", "kl", "recon_error"} <= set(table.schema.names)
    found = evaluate_run(str(tmp_path / "1"), data, "val")
    assert found.elbo == pytest.approx(found.log_likelihood - found.kl, rel=1e-5)
    model = load_model(str(tmp_path / "1")).model
    images = model.decode_latents(torch.randn(3, 4), label=torch.tensor([0, 1, 2]), likelihood="bernoulli")
    assert images.shape == (3, 1, 32, 32)


def test_data_whose_labels_do_not_fit_are_refused_before_the_run_begins(data: str, tmp_path: Path) -> None:
    few = ConditionalVAESpec(latent_dim=4, num_classes=2, likelihood="bernoulli")
    with pytest.raises(DataError, match=r"has 3 classes, the ConditionalVAE takes labels in 0..1: train with model.num_classes=3"):
        fit(small_job(data, tmp_path / "few", model=few))
    np.save(tmp_path / "bare.npy", np.random.default_rng(0).integers(0, 255, (40, 8, 8), dtype=np.uint8))
    bare = str(tmp_path / "bare")
    shard_dataset(ArraysSpec(url=str(tmp_path / "bare.npy")), bare, SplitSpec(by="none"), ShardSpec())
    with pytest.raises(DataError, match="ConditionalVAE takes labels and dataset .* has none: shard images in class folders"):
        fit(small_job(bare, tmp_path / "none", model=SPEC, global_batch=16))
    assert not (tmp_path / "few").exists() and not (tmp_path / "none").exists()


def test_registered_model_is_built_for_the_classes_of_its_spec() -> None:
    built = MODELS.build(ConditionalVAESpec(latent_dim=4, num_classes=7), MLPSpec(hidden=(8,)), (1, 6, 6))
    assert (built.num_classes, built.latent_dim, built.noise_shape(2)) == (7, 4, (2, 4))
    assert built.train_inputs == built.encode_inputs == ("x", "label")
