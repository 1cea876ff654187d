"""What the counts of a run say before its first step; batch normalisation over ranks."""

import dataclasses
import logging
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from aecore.data.dataset import open_dataset
from aecore.data.read.order import EpochOrder, TrainingOrder
from aecore.data.sources.arrays import ArraysSpec
from aecore.data.write.job import shard_dataset
from aecore.data.write.spec import ShardSpec
from aecore.data.write.splits import SplitSpec
from aecore.errors import ConfigError, RunFailed
from aecore.evaluate import EvaluateSpec, evaluate
from aecore.nn.conv import ConvSpec
from aecore.nn.mlp import MLPSpec
from aecore.registry import MODELS
from aecore.training.job import build_model, require_trainable
from aecore.training.loop import fit
from aecore.training.preflight import require_batch_statistics, schedule_warnings, shares
from aecore.training.ranks import Rank, buffers_from_rank_zero, require_equal_parameters
from aecore.vanilla import AE
from aecore.variational import VAE, AdaGVAE, AdaGVAESpec, ConditionalVAE, VAESpec
from pipelines.recipe.recipe import load_recipe
from pipelines.steps import steps
from tests.aecore.training import fit_on, losses, on_ranks, small_job

KINDS = sorted(set(MODELS.kinds()) - {"mil_vae", "rvae", "cvae", "adagvae"})  # the first two have none of it, the others need labels
BATCH_NORM = MLPSpec(hidden=(16,), norm="batch")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Seventeen images to train on, 16 + 1, and some to validate on."""
    folder, random = tmp_path_factory.mktemp("seventeen"), np.random.default_rng(0)
    np.savez(folder / "arrays.npz", x_train=random.random((17, 1, 8, 8), np.float32), x_val=random.random((40, 1, 8, 8), np.float32))
    shard_dataset(ArraysSpec(url=f"{folder}/arrays.npz"), f"{folder}/dataset", SplitSpec(by="folders"), ShardSpec(max_samples=9))
    return f"{folder}/dataset"


def job(data: str, out: Any, **changes: Any) -> Any:
    return small_job(data, out, **{"model": VAESpec(latent_dim=2), "backbone": BATCH_NORM, "global_batch": 16, "epochs": 2, **changes})


@given(st.integers(1, 300), st.integers(1, 9), st.integers(1, 4), st.data())
def test_the_shares_of_ranks_are_those_of_the_order(num_samples: int, lanes: int, rows: int, draw: st.DataObject) -> None:
    world_size = draw.draw(st.integers(1, lanes))
    order = TrainingOrder(lanes=lanes, global_batch=lanes * rows, world_size=world_size)
    step = draw.draw(st.integers(0, order.num_steps(num_samples) - 1))
    dealt = [EpochOrder([num_samples], "", dataclasses.replace(order, rank=rank), 3).step(step).indices for rank in range(world_size)]
    assert shares(order, num_samples, step) == [len(indices) for indices in dealt]


def test_a_last_batch_of_one_is_refused_before_the_first_step_with_a_batch_size_that_works(data, tmp_path) -> None:
    with pytest.raises(
        ConfigError, match=r"17 samples of split 'train'.*global_batch=16 over 16 lanes leave 1 sample in step 2 of"
    ) as refused:
        fit(job(data, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    assert "use train.global_batch=32, or another normalisation" in str(refused.value)
    assert fit(job(data, tmp_path / "run", global_batch=32)).step == 2


def test_a_dry_run_refuses_it_too_for_the_workers_of_the_recipe(data, tmp_path) -> None:
    keys = [f"data={data}", f"out={tmp_path}/run", "backbone={kind: mlp, hidden: [16], norm: batch}", "train.global_batch=16"]
    with pytest.raises(ConfigError, match="leave 1 sample in step 2"):
        steps.train(load_recipe(None, [*keys, "cluster.num_workers=0"]), dry_run=True)
    long = ["train.max_steps=1", "train.val_split=val"]
    assert steps.train(load_recipe(None, [*keys, *long, "cluster.num_workers=0"]), dry_run=True)["steps"] == 1
    with pytest.raises(ConfigError, match=r"leave 1 sample on rank 0 of 16 in step 1 of an epoch: use fewer ranks, or another"):
        steps.train(load_recipe(None, [*keys, *long, "cluster.num_workers=16"]), dry_run=True)


def test_a_rank_without_a_sample_is_no_better_and_fewer_ranks_are_fine(data, tmp_path) -> None:
    few = job(data, tmp_path / "run", global_batch=12, lanes=4)  # 12 + 5: the four lanes have 2, 1, 1, 1 left
    dataset = open_dataset(data)
    for world_size in (1, 2):
        require_trainable(few, dataset, build_model(few, dataset), world_size=world_size)
    with pytest.raises(ConfigError, match=r"leave 1 sample on rank 0 of 4 in step 2"):
        require_trainable(few, dataset, build_model(few, dataset), world_size=4)


def test_a_convolution_normalises_many_values_of_one_sample_and_trains(data, tmp_path) -> None:
    assert fit(job(data, tmp_path / "run", backbone=ConvSpec(channels=(4,), norm="batch"))).step == 4


def normalised(code: int = 2) -> tuple[nn.Module, nn.Module]:
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.BatchNorm1d(6))
    return encoder, nn.Sequential(nn.Linear(code, 12), nn.Unflatten(1, (3, 4)))


MODELS_OF_A_USER = {
    "ae": lambda: AE(nn.Sequential(normalised()[0], nn.Linear(6, 2)), normalised()[1]),
    "vae": lambda: VAE(*normalised(), 2),
    "adagvae": lambda: AdaGVAE(VAE(*normalised(), 2)),
    "cvae": lambda: ConditionalVAE(*normalised(5), 2, num_classes=3),
}


@pytest.mark.parametrize("kind", MODELS_OF_A_USER)
def test_layers_of_a_users_net_are_found_and_left_as_they_were(kind: str) -> None:
    model = MODELS_OF_A_USER[kind]()
    model.build(torch.zeros(1, 3, 4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    noise = torch.get_rng_state()
    with pytest.raises(ConfigError, match=r"first layer of it: .*encoder\.(0\.)?2\) needs at least 2"):
        require_batch_statistics(model.train(), (3, 4), TrainingOrder(global_batch=16), 17, 99, "train")
    require_batch_statistics(model, (3, 4), TrainingOrder(global_batch=16), 18, 99, "train")
    require_batch_statistics(model, (3, 4), TrainingOrder(global_batch=16), 0, 99, "train")  # tars: every step is whole
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), noise)


@pytest.mark.parametrize(
    "kind", sorted(set(MODELS.kinds()) - {"mil_vae", "rvae", "cvae", "adagvae"})
)  # the first two have none of it, the data no labels
def test_every_kind_with_batch_normalisation_is_refused_alike(kind: str, data: str, tmp_path) -> None:
    model = MODELS.spec_type(kind)(latent_dim=2)
    asked = job(data, tmp_path / "run", model=model)
    with pytest.raises(ConfigError, match="batch normalisation"):
        require_trainable(asked, open_dataset(data), build_model(asked, open_dataset(data)))


def test_the_validation_of_two_ranks_is_that_of_the_model_that_they_save(data, tmp_path) -> None:
    fit_on(job(data, tmp_path / "run", global_batch=10, lanes=2, epochs=5, val_split="val"), 2)
    validation = losses(tmp_path / "run")[-1]["validation"]
    assert validation["mse"] == pytest.approx(evaluate(str(tmp_path / "run"), data, EvaluateSpec(split="val", batch=10)).mse, rel=1e-6)


def _with_statistics_of_its_own(rank: Rank) -> str:
    model = nn.BatchNorm1d(3)
    assert model.running_mean is not None
    model.running_mean += rank.rank
    try:
        require_equal_parameters(rank, model, 5)
    except RunFailed as error:
        failed = str(error)
    buffers_from_rank_zero(rank, model)
    require_equal_parameters(rank, model, 5)
    assert not model.running_mean.any()
    return failed


def test_buffers_that_differ_between_ranks_are_noticed_like_parameters() -> None:
    assert all("different weights or buffers after step 5" in failed for failed in on_ranks(_with_statistics_of_its_own, 2))


def test_schedules_that_are_longer_than_the_run_are_said_with_where_they_end() -> None:
    assert schedule_warnings(VAESpec(beta_warmup_steps=5000), 2345) == [
        "beta warm-up of 5,000 steps is longer than the run of 2,345: beta ends at 0.47 (model.beta is 1)"
    ]
    assert schedule_warnings(VAESpec(beta=4.0, capacity=20.0, capacity_steps=100), 50) == [
        "capacity rise of 100 steps is longer than the run of 50: it ends at 10 (model.capacity is 20)"
    ]
    cyclic = VAESpec(beta_schedule="cyclic", beta_cycle_steps=400)
    assert schedule_warnings(cyclic, 100) == ["beta cycle of 400 steps is longer than the run of 100: beta ends at 0.5 (model.beta is 1)"]
    assert schedule_warnings(AdaGVAESpec(beta_warmup_steps=50), 50) == []


@pytest.mark.parametrize("kind", MODELS.kinds())
def test_every_kind_can_be_asked_for_them(kind: str) -> None:
    assert schedule_warnings(MODELS.spec_type(kind)(), 1) == []


def test_a_run_and_its_dry_run_warn_of_them(data, tmp_path, caplog) -> None:
    caplog.set_level(logging.WARNING)
    expected = "beta warm-up of 100 steps is longer than the run of 4: beta ends at 0.04 (model.beta is 1)"
    fit_on(job(data, tmp_path / "run", backbone=MLPSpec(hidden=(16,)), model=VAESpec(latent_dim=2, beta_warmup_steps=100)), 1)
    assert caplog.messages == [expected]
    keys = [f"data={data}", f"out={tmp_path}/other", "model.beta_warmup_steps=100", "train.global_batch=16", "train.epochs=2"]
    assert steps.train(load_recipe(None, [*keys, "cluster.num_workers=0"]), dry_run=True)["warnings"] == [expected]
