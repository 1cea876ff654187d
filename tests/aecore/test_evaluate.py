"""evaluate: means over every sample of the split, once; the ELBO is sampled, the reconstruction error is at z = mu."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aecore._base.noise import seed_of, step_noise
from aecore.checkpoint.weights import load_model
from aecore.data.dataset import open_dataset
from aecore.data.sources.folder import FolderSpec
from aecore.data.write.job import shard_dataset
from aecore.data.write.plan import SplitSpec
from aecore.data.write.spec import ShardSpec
from aecore.errors import ConfigError, DataError
from aecore.evaluate import Evaluation, evaluate_run
from aecore.training.loop import fit
from aecore.variational import VAESpec
from tests.aecore.encoding import DIM, ae_config, model_config, saved_run, sprites_dataset
from tests.aecore.test_encode import stored_pixels
from tests.aecore.training import on_ranks, small_job


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return sprites_dataset(tmp_path_factory.mktemp("evaluate") / "dataset")


def wide(model: Any) -> None:
    """Spread the posterior means, so that units are active and sampling matters."""
    model.sampling_layer.mu.weight.mul_(20)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_run(tmp_path_factory.mktemp("evaluate") / "run", change=wide)


def pixels_of(data: str, split: str) -> torch.Tensor:
    sizes = {name: open_dataset(data).manifest.num_samples(name) for name in ("train", "test")}
    train, test = stored_pixels(data)[1].split([sizes["train"], sizes["test"]])
    return train if split == "train" else test


def test_numbers_are_those_of_one_pass_over_all_samples(data: str, run: str) -> None:
    found = evaluate_run(run, data, "test", batch=1000)
    x = pixels_of(data, "test")
    model: Any = load_model(run).model
    with torch.no_grad():
        posterior = model.encode(x, sample=False)
        mu, std = posterior.mu, (posterior.log_var / 2).exp()
        z = mu + std * step_noise(0, 0, (len(x), 1, DIM)).squeeze(1)
        log_px = -0.5 * (model.decoder(z) - x).square().flatten(1).sum(1)
        mse = (model.decoder(mu) - x).square().mean()
    per_dimension = torch.distributions.kl_divergence(torch.distributions.Normal(mu, std), torch.distributions.Normal(0.0, 1.0)).mean(0)
    assert found.num_samples == len(x)
    assert found.log_likelihood == pytest.approx(float(log_px.mean()), rel=1e-5)
    assert found.mse == pytest.approx(float(mse), rel=1e-5)
    assert found.kl_per_dimension == pytest.approx(per_dimension.tolist(), rel=1e-4)
    assert found.kl == pytest.approx(float(per_dimension.sum()), rel=1e-5)
    assert found.elbo == pytest.approx(float(log_px.mean() - per_dimension.sum()), rel=1e-5)
    assert found.active_units == int((mu.var(0, unbiased=False) > 0.01).sum())


def test_sums_are_exact_for_any_batch_size_and_repeat_to_the_bit(data: str, run: str) -> None:
    whole, pieces = evaluate_run(run, data, "test", batch=1000), evaluate_run(run, data, "test", batch=7)
    assert pieces.num_samples == whole.num_samples
    assert pieces.mse == pytest.approx(whole.mse, rel=1e-6)
    assert pieces.kl == pytest.approx(whole.kl, rel=1e-6)
    assert pieces.active_units == whole.active_units
    assert evaluate_run(run, data, "test", batch=7) == pieces


def numbers(found: Evaluation) -> dict[str, Any]:
    """The means of an evaluation by name."""
    scalars = {name: getattr(found, name) for name in ("log_likelihood", "mse", "elbo", "kl")}
    return scalars | {f"kl_{dimension}": kl for dimension, kl in enumerate(found.kl_per_dimension or ())}


@pytest.mark.parametrize(("world_size", "batch"), [(2, 7), (3, 20)])  # 27 samples: uneven ranges, and a rank without a batch
def test_any_number_of_ranks_gives_the_means_of_one(data: str, run: str, world_size: int, batch: int) -> None:
    alone = evaluate_run(run, data, batch=batch)
    ranks = on_ranks(functools.partial(evaluate_run, run, data, batch=batch), world_size)
    assert ranks == [ranks[0]] * world_size
    assert numbers(ranks[0]) == pytest.approx(numbers(alone), rel=1e-6)
    same = {"log_likelihood", "mse", "elbo", "kl", "kl_per_dimension"}
    assert all(value == alone.to_dict()[name] for name, value in ranks[0].to_dict().items() if name not in same)


def test_the_means_are_those_of_the_validation_in_training(tmp_path: Path, data: str) -> None:
    job = small_job(data, tmp_path / "run", val_split="test", global_batch=16)
    validation = fit(job).metrics["validation"]
    found = evaluate_run(job.out, data, "test", seed=seed_of("validation", job.train.seed), batch=16)
    assert (found.elbo, found.log_likelihood, found.kl, found.mse) == tuple(
        validation[name] for name in ("elbo", "log_likelihood", "kl_divergence", "mse")
    )
    assert found.elbo == -validation["loss"]


def test_the_elbo_is_sampled_with_the_seed(data: str, run: str) -> None:
    zero, one = evaluate_run(run, data, seed=0), evaluate_run(run, data, seed=1)
    assert zero.elbo != one.elbo
    assert zero.mse == one.mse


def test_a_model_of_grey_images_is_scored_on_black_and_white_ones(data: str, run: str, tmp_path: Path) -> None:
    found, grey = evaluate_run(run, data, "test", batch=1000, binarize="dynamic"), evaluate_run(run, data, "test", batch=1000)
    x = pixels_of(data, "test")
    drawn = (torch.rand(x.shape, generator=torch.Generator().manual_seed(seed_of(seed_of("binarize", 0, 0), 0))) < x).float()
    model: Any = load_model(run).model
    with torch.no_grad():
        mse = (model.decoder(model.encode(drawn, sample=False).mu) - drawn).square().mean()
    assert found.mse == pytest.approx(float(mse), rel=1e-5)
    assert (found.binarize, grey.binarize) == ("dynamic", "none")
    assert grey == evaluate_run(run, data, "test", batch=1000, binarize="none")


def test_a_run_on_other_scales_cannot_be_scored_on_black_and_white(tmp_path: Path, data: str) -> None:
    run = saved_run(tmp_path / "run", model_config(scale="symmetric"))
    with pytest.raises(ConfigError, match="binarize=dynamic draws from grey values.*scale is symmetric"):
        evaluate_run(run, data, "test", binarize="dynamic")


def test_a_plain_autoencoder_has_likelihood_and_error_only(tmp_path: Path, data: str) -> None:
    found = evaluate_run(saved_run(tmp_path / "ae", ae_config()), data)
    assert (found.elbo, found.kl, found.kl_per_dimension, found.active_units) == (None, None, None, None)
    assert found.log_likelihood == pytest.approx(-0.5 * 144 * found.mse, rel=1e-5)
    assert found.warnings == ()


def test_lineage_names_checkpoint_and_dataset(data: str, run: str) -> None:
    found = evaluate_run(run, data).to_dict()
    assert found["lineage"]["checkpoint"]["sha256"] == load_model(run).sha256
    assert found["lineage"]["dataset"]["sha256"] == open_dataset(data).manifest.dataset_sha256


def test_dead_dimensions_are_not_active_and_collapse_is_warned_of_once(tmp_path: Path, data: str, caplog: pytest.LogCaptureFixture) -> None:
    def kill(model: Any) -> None:
        wide(model)
        model.sampling_layer.mu.weight[1:].zero_()

    def kill_all(model: Any) -> None:
        model.sampling_layer.mu.weight.zero_()

    one = evaluate_run(saved_run(tmp_path / "one", change=kill), data)
    none = evaluate_run(saved_run(tmp_path / "none", change=kill_all), data)
    assert (one.active_units, one.warnings) == (1, ())
    assert none.active_units == 0
    assert "posterior collapse: 0 of 4" in none.warnings[0]
    assert "collapse" not in caplog.text, "who asked prints the warnings of the result"


def test_bernoulli_on_data_outside_zero_and_one_is_warned_of(tmp_path: Path, data: str) -> None:
    model = VAESpec(latent_dim=DIM, likelihood="bernoulli")
    inside = saved_run(tmp_path / "inside", model_config(model), change=wide)
    outside = saved_run(tmp_path / "outside", model_config(model, scale="symmetric"), change=wide)
    assert evaluate_run(inside, data).warnings == ()
    assert "values in [0, 1], 27 of 27 scaled samples hold others" in evaluate_run(outside, data).warnings[0]


def test_a_model_that_gives_nan_is_refused(tmp_path: Path, data: str) -> None:
    def break_decoder(model: Any) -> None:
        for parameter in model.decoder.parameters():
            parameter.fill_(float("nan"))

    broken = saved_run(tmp_path / "run", change=break_decoder)
    with pytest.raises(DataError, match="split 'test' has no finite mean of .*log_likelihood.*mse.*: every sample is finite, so the model"):
        evaluate_run(broken, data)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_data_that_hold_nan_are_refused(tmp_path: Path, value: float) -> None:
    for number in range(4):
        array = np.full((6,), number, np.float32)
        array[0] = value if number == 2 else 0.0
        path = tmp_path / f"arrays/test/{number}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, array)
    source = FolderSpec(url=str(tmp_path / "arrays"), extensions=("npy",))
    shard_dataset(source, str(tmp_path / "dataset"), SplitSpec(by="folders"), ShardSpec())
    run = saved_run(tmp_path / "run", model_config(shape=(6,)))
    with pytest.raises(DataError, match="split 'test' has no finite mean of .*mse.*: samples hold NaN or infinity"):
        evaluate_run(run, str(tmp_path / "dataset"), batch=2)


def test_a_split_that_is_not_there_and_data_that_do_not_fit_are_refused(tmp_path: Path, data: str, run: str) -> None:
    with pytest.raises(DataError, match="no split 'val'"):
        evaluate_run(run, data, "val")
    with pytest.raises(DataError, match="expects \\(1, 8, 8\\)"):
        evaluate_run(saved_run(tmp_path / "run", model_config(shape=(1, 8, 8))), data)
