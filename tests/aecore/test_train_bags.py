"""Training on bags: the same run on any number of ranks and after a kill; validation, encoding and evaluation by instance."""

import dataclasses
import logging
import os
import signal

import numpy as np
import pytest

from aecore.encoding.job import EncodeSpec
from aecore.evaluate import evaluate_run
from aecore.mil import MilVAESpec
from aecore.nn.mlp import MLPSpec
from aecore.training.job import total_steps, trains_on_bags
from aecore.training.loop import fit
from tests.aecore.data.bag_data import bag_dataset, bag_sizes
from tests.aecore.encoding import encode
from tests.aecore.training import fit_on, losses, published_weights, small_job

NUM_BAGS = 90
TERMS = ("loss", "elbo", "log_likelihood", "kl_divergence", "samples")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return bag_dataset(tmp_path_factory.mktemp("bags"), NUM_BAGS, val=0.2)


def bag_job(data, out, **changes):
    """Batches of 16 bags in 8 lanes; 90 bags do not divide by either."""
    options = {"model": MilVAESpec(latent_dim=3, covar_mode="diagonal"), "backbone": MLPSpec(hidden=(16,)), "epochs": 3, "block": 4}
    return small_job(data.url, out, **{**options, "global_batch": 16, "lanes": 8, **changes})


def test_a_step_takes_whole_bags_and_its_samples_are_instances(data, tmp_path):
    job = bag_job(data, tmp_path / "run")
    num_bags = data.manifest.num_groups("train")
    assert trains_on_bags(job, data)
    assert total_steps(job, data) == 3 * -(-num_bags // 16)
    fit(job)
    rows = losses(job.out)
    assert len(rows) == total_steps(job, data)
    assert sum(row["samples"] for row in rows) == 3 * data.manifest.num_samples("train")
    assert len({row["samples"] for row in rows}) > 5, "bags differ in size"


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_ranks_gives_the_losses_of_one(data, tmp_path, world_size):
    for number in (1, world_size):
        fit_on(bag_job(data, tmp_path / str(number), val_split="val"), number)
    one, many = losses(tmp_path / "1"), losses(tmp_path / str(world_size))
    for name in TERMS:
        np.testing.assert_allclose([row[name] for row in many], [row[name] for row in one], rtol=1e-5, atol=1e-6, err_msg=name)
    for name, value in one[-1]["validation"].items():
        assert many[-1]["validation"][name] == pytest.approx(value, rel=1e-5)


def test_a_run_resumed_in_the_middle_of_an_epoch_ends_as_if_it_had_not_been_killed(data, tmp_path):
    options = {"every_steps": 4, "epochs": 3, "log_every_s": 0.05}
    fit(bag_job(data, tmp_path / "whole", **options))
    job = bag_job(data, tmp_path / "run", **options)
    pid = os.fork()
    if pid == 0:
        os.environ["AECORE_FAULT"] = "checkpoint.linked:2"
        logging.disable(logging.CRITICAL)
        try:
            fit(job)
        finally:
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    fit(job)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert published_weights(tmp_path / "run") == published_weights(tmp_path / "whole")


def test_a_run_learns_and_is_encoded_one_row_per_instance_with_its_bag(data, tmp_path):
    job = bag_job(data, tmp_path / "run", epochs=30, val_split="val", optim=dataclasses.replace(bag_job(data, "x").optim, lr=1e-2))
    validation = fit(job).metrics["validation"]
    rows = losses(job.out)
    assert rows[-1]["loss"] < rows[0]["loss"] - 3
    evaluation = evaluate_run(job.out, data.url, "val")
    assert evaluation.num_samples == data.manifest.num_samples("val")
    assert evaluation.mse == pytest.approx(validation["mse"], rel=1e-5)
    table = encode(job.out, data.url, tmp_path / "table", EncodeSpec(batch=16, reconstruction=True, kl=True, sample=True))
    assert set(table.manifest.columns) == {"mu", "log_var", "z", "kl", "recon_error"}
    assert len(set(table.keys.to_pylist())) == len(table.keys) == bag_sizes(NUM_BAGS).sum()
    groups = table.arrow("group").to_pylist()
    sizes = sorted(groups.count(group) for group in set(groups))
    assert sizes == sorted(bag_sizes(NUM_BAGS).tolist())


def test_samples_without_bags_are_trained_on_one_by_one(tmp_path, data):
    from aecore.data.dataset import open_dataset
    from aecore.data.sources.arrays import ArraysSpec
    from aecore.data.write.job import shard_dataset

    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32))
    shard_dataset(ArraysSpec(url=str(tmp_path / "x.npy")), str(tmp_path / "data"))
    plain = open_dataset(str(tmp_path / "data"))
    job = bag_job(plain, tmp_path / "run")
    assert not trains_on_bags(job, plain)
    assert total_steps(job, plain) == 3 * 4
    assert fit(job).metrics["loss"] > 0
    assert trains_on_bags(bag_job(data, "x"), data)
    assert not trains_on_bags(small_job(data.url, "x"), data), "the VAE takes no mask: its batches are of single samples"


def test_the_log_says_that_steps_take_whole_bags(data, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "aecore.training.session"):
        fit(bag_job(data, tmp_path / "run", max_steps=1))
    assert any(message.startswith("a step takes whole bags: ") for message in caplog.messages)
