"""Sequences of many lengths through fit, evaluate and encode: any number of ranks, any batch, and what is refused before the run begins."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aecore._base import Batch
from aecore.checkpoint.config import ModelConfig
from aecore.checkpoint.weights import load_model
from aecore.data.format.transform import TransformSpec
from aecore.encoding.job import EncodeSpec
from aecore.errors import ConfigError, DataError
from aecore.evaluate import evaluate_run
from aecore.nn.hybrid import HybridSpec
from aecore.nn.recurrent import RecurrentSpec
from aecore.table.verify import verify_table
from aecore.training.loop import TrainJob, fit
from aecore.training.optimizer import OptimSpec
from aecore.variational import RecurrentVAESpec, VAESpec
from tests.aecore.data.sequences import VOCAB, dataset_of, sentence, wave
from tests.aecore.encoding import encode, saved_run
from tests.aecore.training import fit_on, losses, small_job

TERMS = ("loss", "elbo", "log_likelihood", "kl_divergence", "samples")
IDS = TransformSpec(scale="none")


def rvae_job(data: str, out: Path, **changes: Any) -> TrainJob:
    options = {"model": RecurrentVAESpec(latent_dim=3, beta=0.01), "backbone": RecurrentSpec(width=16), "optim": OptimSpec(lr=1e-2)}
    return small_job(data, out, **{**options, "lanes": 4, "global_batch": 16, **changes})


def tokens(num_levels: int) -> RecurrentVAESpec:
    return RecurrentVAESpec(latent_dim=3, beta=0.01, likelihood="categorical", num_levels=num_levels)


def token_job(data: str, out: Path, **changes: Any) -> TrainJob:
    return rvae_job(data, out, **{"model": tokens(VOCAB), "transform": IDS, **changes})


@pytest.fixture(scope="module")
def waves(tmp_path_factory: pytest.TempPathFactory) -> str:
    return dataset_of(tmp_path_factory.mktemp("waves"), [wave(number) for number in range(70)], max_samples=30, val=0.2).url


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> str:
    return dataset_of(tmp_path_factory.mktemp("sentences"), [sentence(number) for number in range(70)], max_samples=30, val=0.2).url


@pytest.fixture(scope="module")
def trained(waves: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("run") / "run"
    fit(rvae_job(waves, out, epochs=15, val_split="val"))
    return str(out)


def test_any_number_of_ranks_gives_the_losses_of_one(waves: str, tmp_path: Path) -> None:
    for world_size in (1, 2):
        fit_on(rvae_job(waves, tmp_path / str(world_size), epochs=2, val_split="val"), world_size)
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    for name in TERMS:
        np.testing.assert_allclose([row[name] for row in two], [row[name] for row in one], rtol=1e-5, err_msg=name)
    for name, value in one[-1]["validation"].items():
        assert two[-1]["validation"][name] == pytest.approx(value, rel=1e-5)


def test_training_lowers_the_loss_and_evaluation_does_not_see_the_batches(waves: str, trained: str) -> None:
    validation = [row["validation"]["mse"] for row in losses(trained) if "validation" in row]
    assert validation[-1] < 0.6 * validation[0]
    found = [evaluate_run(trained, waves, "val", batch=batch) for batch in (1, 5, 64)]
    assert found[1].mse == pytest.approx(found[0].mse, rel=1e-5)
    assert found[2].mse == pytest.approx(found[0].mse, rel=1e-5)
    assert found[2].kl == pytest.approx(found[0].kl, rel=1e-5)


def test_the_table_has_the_latents_that_each_sequence_has_alone(waves: str, trained: str, tmp_path: Path) -> None:
    table = encode(trained, waves, tmp_path / "table", EncodeSpec(batch=7, reconstruction=True, kl=True))
    rows = table.dataset().to_table().to_pylist()
    assert len(rows) == 70
    model = load_model(trained).model
    for row in rows:
        number = int(row["key"].rpartition("/")[2])
        x = torch.from_numpy(wave(number)).unsqueeze(0)
        one = torch.zeros(1, dtype=torch.int64)
        alone = Batch(x, one, one, 1)
        assert row["length"] == x.shape[1]
        np.testing.assert_allclose(row["mu"], model.latents(alone)["mu"][0].numpy(), atol=1e-5)
        assert row["recon_error"] == pytest.approx((model.reconstruct(alone) - x).square().mean().item(), rel=1e-3)


@pytest.mark.parametrize("where", ["length > 6", "length = 3", "label_name = 'train/1'", "length < 10 and label_name = 'train/2'"])
def test_the_bits_of_a_sequence_depend_on_no_other_sequence(waves: str, trained: str, tmp_path: Path, where: str) -> None:
    spec = EncodeSpec(batch=16, reconstruction=True, kl=True, sample=True)
    chosen = dataclasses.replace(spec, where=where)
    tables = [encode(trained, waves, tmp_path / "whole", spec), encode(trained, waves, tmp_path / "some", chosen)]
    whole, some = ({row["key"]: row for row in table.dataset().to_table().to_pylist()} for table in tables)
    assert 0 < len(some) < len(whole) == 70 and some == {key: whole[key] for key in some}
    for table in tables:  # rows are in the order of the index
        verify_table(table, read_data=True, dataset_url=waves)


def frames(number: int) -> Any:
    """A video `[T, 1, 8, 8]` of 1 to 12 frames."""
    return np.repeat(wave(number)[:, :1, None, None], 64, 2).reshape(-1, 1, 8, 8)


@pytest.mark.parametrize(
    ("make", "model", "backbone"),
    [
        (wave, RecurrentVAESpec(latent_dim=3), RecurrentSpec(width=16, cell="lstm", layers=2, norm="layer")),
        (sentence, RecurrentVAESpec(latent_dim=3, likelihood="categorical", num_levels=VOCAB), RecurrentSpec(width=16)),
        (frames, RecurrentVAESpec(latent_dim=3), HybridSpec(channels=(4,), width=16)),
    ],
    ids=["lstm", "tokens", "video"],
)
def test_the_bits_of_every_kind_of_sequence_depend_on_no_other(tmp_path: Path, make: Any, model: Any, backbone: Any) -> None:
    samples = [make(number) for number in range(50)]
    data = dataset_of(tmp_path, samples, max_samples=40)
    shape = (0, *samples[0].shape[1:])
    run = saved_run(tmp_path / "run", ModelConfig(model, backbone, IDS, shape))
    spec = EncodeSpec(batch=16, reconstruction=True)
    found = [
        encode(run, data.url, tmp_path / name, dataclasses.replace(spec, where=where))
        for name, where in (("a", ""), ("b", "length in (3, 4, 9)"))
    ]
    whole, some = ({row["key"]: row for row in table.dataset().to_table().to_pylist()} for table in found)
    assert 0 < len(some) < len(whole) == 50 and some == {key: whole[key] for key in some}


def test_a_sequence_has_the_bits_that_it_has_in_a_dataset_of_one_length(trained: str, tmp_path: Path) -> None:
    """What a dataset holds besides decides whether batches have lengths, and how long they are."""
    samples, spec = [wave(number) for number in range(40)], EncodeSpec(batch=16, reconstruction=True)
    whole = encode(trained, dataset_of(tmp_path / "all", samples).url, tmp_path / "whole", spec)
    known = {row["key"]: row for row in whole.dataset().to_table().to_pylist()}
    of_five = [number for number, sample in enumerate(samples) if len(sample) == 5]
    same = dataset_of(tmp_path / "five", [samples[number] for number in of_five])
    assert len(of_five) > 1 and same.input_shape() == (5, 2)
    for row in encode(trained, same.url, tmp_path / "table", spec).dataset().to_table().to_pylist():
        number = of_five[int(row["key"].rpartition("/")[2])]
        other = known[f"train/{number % 3}/{number:04d}"]
        assert (row["mu"], row["recon_error"]) == (other["mu"], other["recon_error"])


def test_a_model_of_many_lengths_encodes_sequences_of_one(trained: str, tmp_path: Path) -> None:
    data = dataset_of(tmp_path, [wave(number)[:1].repeat(5, 0) for number in range(12)])
    assert data.input_shape() == (5, 2)
    assert len(encode(trained, data.url, tmp_path / "table")) == 12
    other = dataset_of(tmp_path / "other", [wave(number, features=3) for number in range(12)])
    with pytest.raises(DataError, match=r"shape \(0, 3\); checkpoint .* expects \(0, 2\)"):
        encode(trained, other.url, tmp_path / "other table")


def test_token_ids_are_learned_and_come_back(sentences: str, tmp_path: Path) -> None:
    fit(token_job(sentences, tmp_path / "run", epochs=18, val_split="val"))
    validation = [row["validation"]["log_likelihood"] for row in losses(tmp_path / "run") if "validation" in row]
    assert validation[-1] > 0.8 * validation[0]
    model = load_model(str(tmp_path / "run")).model
    made = model.decode_latents(torch.randn(5, 3), likelihood="categorical", num_steps=4)
    assert set(made.unique().tolist()) <= set(range(VOCAB))
    assert len(encode(str(tmp_path / "run"), sentences, tmp_path / "table")) == 70


def test_videos_of_many_lengths_are_trained_on(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    videos = [rng.integers(0, 256, (1 + number % 4, 2, 9, 6), dtype=np.uint8) for number in range(20)]
    data = dataset_of(tmp_path / "in", videos)
    net = HybridSpec(channels=(4,), width=8)
    fit(rvae_job(data.url, tmp_path / "run", model=RecurrentVAESpec(latent_dim=3, likelihood="bernoulli"), backbone=net))
    assert load_model(str(tmp_path / "run")).config.input_shape == (0, 2, 9, 6)
    assert len(encode(str(tmp_path / "run"), data.url, tmp_path / "table")) == 20


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": VAESpec()}, DataError, r"sequences of different lengths, for a model that takes lengths, such as model.kind=rvae"),
        ({"transform": TransformSpec()}, ConfigError, "categorical scores class ids, and transform.scale=unit would change them"),
        ({"backbone": HybridSpec()}, ConfigError, r"videos \(T, C, H, W\) or \(T, H, W\), these samples have the shape \(0,\)"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_run_begins(
    sentences: str, tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fit(token_job(sentences, tmp_path / "run", **change))
    assert not (tmp_path / "run/run.000001.json").exists()


def test_an_id_outside_the_vocabulary_stops_training_evaluation_and_encoding(sentences: str, tmp_path: Path) -> None:
    small = tokens(VOCAB - 1)
    with pytest.raises(DataError, match=rf"holds token ids from .* to {VOCAB - 1}, the vocabulary has 0 to {VOCAB - 2}: set model"):
        fit(token_job(sentences, tmp_path / "run", model=small))
    known = dataset_of(tmp_path / "known", [sentence(number) % (VOCAB - 1) for number in range(20)])
    fit(token_job(known.url, tmp_path / "good", model=small))
    with pytest.raises(DataError, match="the vocabulary has"):
        evaluate_run(str(tmp_path / "good"), sentences, "val")
    with pytest.raises(DataError, match="the vocabulary has"):
        encode(str(tmp_path / "good"), sentences, tmp_path / "table")
