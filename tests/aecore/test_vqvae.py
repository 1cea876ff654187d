"""The codebook and the vector-quantised autoencoder: against the formulas, over ranks, through a run."""

import copy
import dataclasses
import functools
import logging
import math
import os

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from aecore._base import Batch
from aecore.checkpoint.config import ModelConfig
from aecore.checkpoint.weights import load_model
from aecore.data.format.transform import TransformSpec
from aecore.data.sources.arrays import ArraysSpec
from aecore.data.write.job import shard_dataset
from aecore.encoding.job import EncodeSpec, encode_dataset
from aecore.errors import ConfigError, DataError
from aecore.evaluate import evaluate_run
from aecore.evaluate._probe import linear_probe, nearest_neighbours
from aecore.nn.conv import ConvSpec
from aecore.nn.mlp import MLPSpec
from aecore.registry import MODELS
from aecore.table.table import open_table
from aecore.training.loop import fit
from aecore.training.ranks import Rank
from aecore.variational import VQVAE, VectorQuantizer, VQVAESpec
from tests.aecore.encoding import saved_run
from tests.aecore.training import fit_on, losses, on_ranks, published_weights, small_job, sprites_dataset

K, E = 16, 4


def batch_of(x: Tensor, positions: Tensor | None = None, num_global: int | None = None) -> Batch:
    rows = torch.arange(len(x)) if positions is None else positions
    return Batch(x, rows, rows, len(x) if num_global is None else num_global)


def small(codebook: str = "ema", **options: float) -> VQVAE:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(1, 8, 4, 2, 1), nn.SiLU(), nn.Conv2d(8, E, 1))
    decoder = nn.Sequential(nn.Conv2d(E, 8, 1), nn.SiLU(), nn.ConvTranspose2d(8, 1, 4, 2, 1))
    return VQVAE(encoder, decoder, VectorQuantizer(K, E, codebook=codebook, **options), code_shape=(4, 4))


def test_the_layer_has_the_tutorials_defaults() -> None:
    quantizer = VectorQuantizer()
    assert quantizer.codebook.shape == (512, 64)
    assert VectorQuantizer(num_embeddings=512, embedding_dim=64)(torch.randn(2, 64, 7, 7)).z.shape == (2, 64, 7, 7)


@pytest.mark.parametrize("axes", [(), (5,), (3, 2), (2, 3, 2)], ids=str)
def test_each_vector_gets_the_nearest_entry(axes: tuple[int, ...]) -> None:
    quantizer, z = VectorQuantizer(K, E), torch.randn(3, E, *axes)
    output = quantizer(z)
    vectors = z.movedim(1, -1).reshape(-1, E)
    expected = torch.cdist(vectors.double(), quantizer.codebook.double()).argmin(1)
    assert (output.codes.dtype, output.codes.shape) == (torch.int32, (3, *axes))
    assert torch.equal(output.codes.flatten().long(), expected)
    assert torch.equal(output.z.movedim(1, -1).reshape(-1, E), quantizer.codebook[expected])
    assert torch.equal(output.z, quantizer.embed(output.codes))


def test_the_gradient_passes_straight_through() -> None:
    quantizer, z = VectorQuantizer(K, E), torch.randn(3, E, 5, requires_grad=True)
    weight = torch.randn(3, E, 5)
    (quantizer(z).z * weight).sum().backward()
    assert torch.equal(z.grad, weight)


@pytest.mark.parametrize("codebook", ["ema", "loss"])
def test_the_loss_is_the_papers(codebook: str) -> None:
    quantizer = VectorQuantizer(K, E, commitment_cost=0.3, codebook=codebook)
    z = torch.randn(3, E, 5, requires_grad=True)
    output = quantizer(z)
    output.loss.backward()
    difference = (z - quantizer.embed(output.codes)).detach()
    squared = difference.square().sum() / 3
    torch.testing.assert_close(output.loss, squared * (1.3 if codebook == "loss" else 0.3))
    torch.testing.assert_close(z.grad, 0.3 * 2 * difference / 3)
    if codebook == "loss":
        expected = torch.zeros(K, E).index_add_(0, output.codes.flatten(), -2 * difference.movedim(1, -1).reshape(-1, E) / 3)
        torch.testing.assert_close(quantizer.codebook.grad, expected)
    else:
        assert not list(quantizer.parameters())


def test_perplexity_is_the_number_of_codes_in_even_use() -> None:
    quantizer = VectorQuantizer(K, E)
    z = quantizer.codebook[:6].repeat(3, 1)
    assert quantizer(z).perplexity.item() == pytest.approx(6)
    skewed = quantizer(quantizer.codebook[[0, 0, 0, 1]]).perplexity.item()
    assert skewed == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))


def test_moving_averages_are_those_of_the_formula() -> None:
    quantizer = VectorQuantizer(K, E, decay=0.9, reset_below=0.0)
    start = quantizer.codebook.clone()
    count, total = torch.ones(K), start.clone()
    for step in range(3):
        z = torch.randn(40, E, generator=torch.Generator().manual_seed(step))
        codes = quantizer(z).codes
        chosen = nn.functional.one_hot(codes.long(), K).float()
        quantizer.update(z, codes)
        count, total = 0.9 * count + 0.1 * chosen.sum(0), 0.9 * total + 0.1 * chosen.T @ z
        torch.testing.assert_close(quantizer.codebook, total / count[:, None])
    assert quantizer.num_updates == 3


def test_moving_averages_end_at_the_means_of_the_clusters() -> None:
    torch.manual_seed(0)
    centres = 5 * torch.randn(8, E)
    quantizer = VectorQuantizer(32, E, decay=0.8)  # as many as there are centres can settle on fewer, as k-means can
    for _ in range(100):
        z = centres[torch.randint(8, (64,))] + 0.01 * torch.randn(64, E)
        quantizer.update(z, quantizer(z).codes)
    distances = torch.cdist(centres, quantizer.codebook).amin(1)
    assert (distances < 0.03).all()
    assert quantizer(centres).perplexity.item() == pytest.approx(8)


@pytest.mark.parametrize("codebook", ["ema", "loss"])
def test_a_codebook_begins_in_the_data(codebook: str) -> None:
    quantizer, z = VectorQuantizer(K, E, codebook=codebook), 100 + torch.randn(9, E, 4)
    quantizer.update(z, quantizer(z).codes)
    rows = z.movedim(1, -1).reshape(-1, E)
    assert torch.cdist(quantizer.codebook.detach().double(), rows.double()).amin(1).max() < 1e-3
    assert len(quantizer.codebook.detach().unique(dim=0)) == K, "no vector is taken twice while there are enough"


@pytest.mark.parametrize("codebook", ["ema", "loss"])
def test_dead_codes_come_back_and_live_ones_stay(codebook: str) -> None:
    quantizer = VectorQuantizer(K, E, codebook=codebook, decay=0.5, reset_below=0.1)
    z = torch.randn(64, E)
    quantizer.update(z, quantizer(z).codes)
    with torch.no_grad():
        quantizer.codebook[5:] = 1e3  # far from everything
    alive = quantizer.codebook[:5].clone()
    for _ in range(8):
        codes = quantizer(z).codes
        assert (codes < 5).all() or (quantizer.codebook[5:] < 1e3).all()
        quantizer.update(z, codes)
    assert quantizer.codebook.abs().max() < 1e2
    assert quantizer(z).perplexity > 8
    if codebook == "loss":
        assert torch.equal(quantizer.codebook[:5], alive)


def test_without_resets_dead_codes_stay_dead() -> None:
    quantizer = VectorQuantizer(K, E, decay=0.5, reset_below=0.0)
    quantizer.codebook[5:] = 1e3
    quantizer.ema_sum.copy_(quantizer.codebook)
    z = torch.randn(64, E)
    for _ in range(2000):  # long enough for the moving averages to underflow
        quantizer.update(z, quantizer(z).codes)
    assert (quantizer.codebook[5:] == 1e3).all()
    assert quantizer.codebook.isfinite().all()


@pytest.mark.parametrize("codebook", ["ema", "loss"])
def test_evaluation_changes_no_state_and_training_does(codebook: str) -> None:
    model, batch = small(codebook), batch_of(torch.rand(6, 1, 8, 8))
    before = copy.deepcopy(model.state_dict())
    model.eval()
    model.loss(batch)
    model.latents(batch), model.reconstruct(batch)
    model.train()
    model.encode(batch.x), model.decode(model.encode(batch.x).codes), model(batch.x)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    model.loss(batch)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(before[name], value)}
    assert changed == {f"quantizer.{name}" for name in ("codebook", "ema_count", "num_updates", *(["ema_sum"] * (codebook == "ema")))}


def test_diagnostics_do_not_hold_the_weights_of_the_terms() -> None:
    model, x = small(commitment_cost=0.5).eval(), torch.rand(6, 1, 8, 8)
    output = model(x)
    result = model.compute_loss(x, output, beta=2.0)
    commitment = (output.z_e - model.quantizer.embed(output.codes)).square().sum() / 6
    assert result.diagnostics["commitment"] == pytest.approx(commitment.item())
    assert result.diagnostics["log_likelihood"] == pytest.approx(-0.5 * (output.x_hat - x).square().sum().item() / 6)
    torch.testing.assert_close(result.objective, commitment - result.tensors["log_likelihood"])
    assert 1 <= result.diagnostics["perplexity"] <= K


def test_codes_decode_to_the_reconstruction_to_the_bit() -> None:
    model, batch = small().eval(), batch_of(torch.rand(6, 1, 8, 8))
    codes = model.latents(batch)["codes"]
    assert (codes.dtype, codes.shape) == (torch.int32, (6, 16))
    assert torch.equal(model.decode_latents(codes), model.reconstruct(batch))
    assert torch.equal(model.decode_latents(codes, likelihood="bernoulli"), model.reconstruct(batch, likelihood="bernoulli"))
    assert torch.equal(model.decode(model.encode(batch.x).codes).x_hat, model.reconstruct(batch))
    assert torch.equal(model.decode(model.encode(batch.x).z).x_hat, model.reconstruct(batch))


@pytest.mark.parametrize("backbone", [ConvSpec(channels=(8, 8)), MLPSpec(hidden=(16,))], ids=["conv", "mlp"])
def test_flat_codes_of_a_spec_decode_to_the_reconstruction(backbone: object) -> None:
    model = MODELS.build(VQVAESpec(num_embeddings=K, embedding_dim=E, latent_dim=5), backbone, (3, 9, 7)).eval()
    batch = batch_of(torch.rand(4, 3, 9, 7))
    codes = model.latents(batch)["codes"]
    assert codes.shape == (4, 3 * 2 if isinstance(backbone, ConvSpec) else 5)
    assert torch.equal(model.decode_latents(codes), model.reconstruct(batch))


def test_a_map_is_quantised_where_it_is() -> None:
    """One code per position of the map: what changes in a corner of the image changes codes around it only."""
    backbone = ConvSpec(channels=(8, 8), norm="none")
    model = MODELS.build(VQVAESpec(num_embeddings=256, embedding_dim=E), backbone, (1, 16, 16)).eval()
    sizes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert not [name for name, shape in sizes.items() if len(shape) == 2], "no linear layer mixes positions"
    x = torch.zeros(1, 1, 16, 16)
    other = x.clone()
    other[..., :3, :3] = 5.0
    first, second = (model.latents(batch_of(image))["codes"].reshape(4, 4) for image in (x, other))
    assert torch.equal(first[2:, 2:], second[2:, 2:])
    assert not torch.equal(first[:2, :2], second[:2, :2])


@pytest.mark.parametrize("codes", [torch.tensor([[K] * 16]), torch.tensor([[-1] * 16])])
def test_codes_that_the_codebook_does_not_have_are_refused(codes: Tensor) -> None:
    with pytest.raises(DataError, match="this codebook has 0 to 15"):
        small().decode_latents(codes)


def test_vectors_of_another_size_and_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match=r"embedding_dim = 4, got \(2, 5\)"):
        VectorQuantizer(K, E)(torch.zeros(2, 5))
    for wrong in ({"num_embeddings": 0}, {"decay": 1.0}, {"reset_below": -0.1}, {"commitment_cost": -1.0}, {"codebook": "kmeans"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            VectorQuantizer(**{"num_embeddings": K, "embedding_dim": E, **wrong})
    with pytest.raises(ConfigError, match="did you mean 'ema'"):
        VQVAESpec(codebook="emma")


def test_half_precision_is_quantised_in_float32() -> None:
    one, other, z = VectorQuantizer(K, E), VectorQuantizer(K, E), torch.randn(300, E)
    other.load_state_dict(one.state_dict())
    expected = one(z)
    one.update(z, expected.codes)
    with torch.autocast("cpu", torch.bfloat16):
        output = other(z)
        other.update(z, output.codes)
    assert torch.equal(output.codes, expected.codes)
    assert torch.equal(output.loss, expected.loss)
    assert torch.equal(other.codebook, one.codebook)


def _trained_codebook(codebook: str, cuts: list[list[int]], rank: Rank = Rank()) -> dict[str, Tensor]:  # noqa: B008  # frozen
    """Train on the rows of each global batch that `cuts` gives to this rank; an empty share is one repeated row."""
    model = small(codebook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(12):
        x = torch.rand(10, 1, 8, 8, generator=torch.Generator().manual_seed(step))
        cut = cuts[step % len(cuts)]
        rows = torch.arange(10)[cut[rank.rank] : cut[rank.rank + 1]]
        mine = x[rows] if len(rows) else x[:1]
        result = model.loss(batch_of(mine, rows, 10))
        optimizer.zero_grad()
        (result.objective * len(rows) / 10).backward()
        if rank.world_size > 1:
            for parameter in model.parameters():
                torch.distributed.all_reduce(parameter.grad)
        optimizer.step()
    return {**model.state_dict(), "perplexity": result.tensors["perplexity"]}


@pytest.mark.parametrize("codebook", ["ema", "loss"])
def test_two_ranks_have_the_codebook_of_one(codebook: str) -> None:
    one = _trained_codebook(codebook, [[0, 10]])
    work = functools.partial(_trained_codebook, codebook, [[0, 5, 10], [0, 3, 10], [0, 10, 10], [0, 0, 10]])
    for state in on_ranks(work, 2):
        assert state.keys() == one.keys()
        for name, value in state.items():
            torch.testing.assert_close(value, one[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return sprites_dataset(tmp_path_factory.mktemp("vqvae") / "sprites", val=0.1)


SPEC = VQVAESpec(num_embeddings=32, embedding_dim=8, likelihood="bernoulli")
NETS = ConvSpec(channels=(8, 16, 16))


@pytest.mark.parametrize("codebook", ["ema", "loss"])
def test_a_killed_run_ends_with_the_bits_of_an_uninterrupted_one(data: str, tmp_path, codebook: str) -> None:
    spec = dataclasses.replace(SPEC, codebook=codebook)
    options = {"max_steps": 12, "every_steps": 5, "model": spec, "backbone": NETS}
    fit(small_job(data, tmp_path / "whole", **options))
    job = small_job(data, tmp_path / "run", **options)
    if (pid := os.fork()) == 0:
        os.environ["AECORE_FAULT"] = "checkpoint.linked:2"
        logging.disable(logging.CRITICAL)
        fit(job)
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    fit(job)
    assert published_weights(tmp_path / "run") == published_weights(tmp_path / "whole")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_run_on_two_ranks_logs_the_perplexity_of_the_whole_batch(data: str, tmp_path) -> None:
    for world_size in (1, 2):
        fit_on(small_job(data, tmp_path / str(world_size), max_steps=8, val_split="val", model=SPEC, backbone=NETS), world_size)
    one, two = (losses(tmp_path / str(world_size)) for world_size in (1, 2))
    for name in ("loss", "log_likelihood", "commitment", "perplexity"):
        assert [row[name] for row in two] == pytest.approx([row[name] for row in one], rel=1e-4), name
    assert two[-1]["validation"] == pytest.approx(one[-1]["validation"], rel=1e-4)
    assert one[-1]["perplexity"] > 4


def test_a_run_learns_and_its_codes_are_a_table(data: str, tmp_path) -> None:
    fit(small_job(data, tmp_path / "run", epochs=4, model=SPEC, backbone=NETS))
    rows = losses(tmp_path / "run")
    assert rows[-1]["log_likelihood"] > 0.3 * rows[0]["log_likelihood"]
    encode_dataset(str(tmp_path / "run"), data, str(tmp_path / "table"), EncodeSpec(reconstruction=True))
    table = open_table(str(tmp_path / "table"))
    codes = table.numpy("codes")
    assert (codes.shape[1], codes.dtype) == (16, "int32")
    model = load_model(str(tmp_path / "run")).model
    images = model.decode_latents(torch.from_numpy(codes[:8].copy()), likelihood="bernoulli")
    assert images.shape == (8, 1, 32, 32)


def test_probes_read_the_codebooks_vectors_of_the_codes_in_the_table(data: str, tmp_path) -> None:
    config = ModelConfig(SPEC, NETS, TransformSpec(), (1, 32, 32))
    run = saved_run(tmp_path / "run", config)
    found = evaluate_run(run, data, "val", probe=True).probe
    encode_dataset(run, data, str(tmp_path / "table"))
    table, codebook = open_table(str(tmp_path / "table")), load_model(run).model.quantizer.embed
    sides = []
    for split in ("train", "val"):
        part = table.select(split)
        vectors = codebook(torch.from_numpy(part.numpy("codes").copy()).reshape(-1, 4, 4)).flatten(1)  # [n, E * P]
        sides += [vectors.numpy(), part.arrow("label").to_numpy()]
    assert found is not None
    assert (found["column"], found["linear"], found["knn"]) == ("codes", linear_probe(*sides), nearest_neighbours(*sides))


def test_a_row_that_is_not_finite_has_no_code_and_no_place_in_the_table(tmp_path) -> None:
    x = torch.rand(3, 1, 8, 8)
    x[1] = torch.nan
    codes = small().eval().latents(batch_of(x))["codes"]
    assert (codes[1] == -1).all()
    assert (codes[[0, 2]] >= 0).all()

    vectors = np.random.default_rng(0).random((40, 5), np.float32)
    vectors[7, 2] = np.inf
    np.savez(tmp_path / "vectors.npz", x_train=vectors)
    data = str(tmp_path / "data")
    shard_dataset(ArraysSpec(url=str(tmp_path / "vectors.npz")), data)
    run = saved_run(tmp_path / "run", ModelConfig(SPEC, MLPSpec(hidden=(16,)), TransformSpec(), (5,)))
    encode_dataset(run, data, str(tmp_path / "table"))
    table = open_table(str(tmp_path / "table"))
    assert table.num_rows == 39
    assert table.numpy("codes").min() >= 0
