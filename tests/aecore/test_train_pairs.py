"""fit() on pairs: any number of ranks, resuming, validation on single samples, and what is refused before the run is claimed."""

import dataclasses
import json
import logging
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from aecore.checkpoint.files import publish_model
from aecore.checkpoint.weights import load_model, weights_of, write_checkpoint
from aecore.data.read.pairs import PairSpec
from aecore.data.sources.folder import FolderSpec
from aecore.data.write.job import shard_dataset
from aecore.data.write.plan import SplitSpec
from aecore.data.write.spec import ShardSpec
from aecore.encoding.job import EncodeSpec
from aecore.errors import ConfigError, DataError
from aecore.evaluate import evaluate_run
from aecore.store import open_store
from aecore.table.table import open_table
from aecore.training.loop import fit
from aecore.variational import AdaGVAESpec, VAESpec
from tests.aecore.encoding import encode
from tests.aecore.training import fit_on, losses, small_job, sprites_dataset

TERMS = ("loss", "elbo", "log_likelihood_x1", "log_likelihood_x2", "kl_divergence_x1", "kl_divergence_x2", "samples")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return sprites_dataset(tmp_path_factory.mktemp("pairs") / "sprites", val=0.1)


def ada_job(data: str, out: Path, **changes):
    return small_job(data, out, **{"model": AdaGVAESpec(latent_dim=4, likelihood="bernoulli"), **changes})


@pytest.mark.parametrize(("world_size", "pairs"), [(2, PairSpec(k=1)), (3, PairSpec(by="label"))])
def test_any_number_of_ranks_gives_the_losses_of_one(data, tmp_path, world_size, pairs):
    for number in (1, world_size):
        fit_on(ada_job(data, tmp_path / str(number), epochs=2, val_split="val", pairs=pairs), number)
    one, many = losses(tmp_path / "1"), losses(tmp_path / str(world_size))
    for name in TERMS:
        np.testing.assert_allclose([row[name] for row in many], [row[name] for row in one], rtol=1e-5, err_msg=name)
    for name, value in one[-1]["validation"].items():
        assert many[-1]["validation"][name] == pytest.approx(value, rel=1e-5)


def test_a_run_resumed_in_the_middle_of_an_epoch_sees_the_pairs_it_would_have_seen(data, tmp_path):
    options = {"every_steps": 20, "epochs": 2, "max_steps": 60, "log_every_s": 0.05}
    fit(ada_job(data, tmp_path / "whole", **options))
    job = ada_job(data, tmp_path / "run", **options)
    pid = os.fork()
    if pid == 0:
        os.environ["AECORE_FAULT"] = "checkpoint.linked:1"
        logging.disable(logging.CRITICAL)
        try:
            fit(job)
        finally:
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    fit(job)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    published = [(tmp_path / name / "model/model.safetensors").read_bytes() for name in ("run", "whole")]
    assert published[0] == published[1]


def test_a_run_learns_and_is_validated_encoded_and_evaluated_as_its_vae(data, tmp_path):
    job = ada_job(data, tmp_path / "run", epochs=4, val_split="val")
    result = fit(job)
    rows = losses(job.out)
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"]
    validation = result.metrics["validation"]
    assert set(validation) == {"loss", "elbo", "log_likelihood", "kl_divergence", "mse"}
    assert validation["loss"] == pytest.approx(rows[-1]["loss"] / 2, rel=0.2), "one input of about two"

    loaded, inner = load_model(job.out), tmp_path / "inner"
    vae = dataclasses.replace(loaded.config, model=VAESpec(latent_dim=4, likelihood="bernoulli"))
    store = open_store(inner)
    publish_model(store, write_checkpoint(store, "checkpoints/step-00000001-aa", loaded.model.vae, vae, step=1, state={}, info={}))
    ours, expected = evaluate_run(job.out, data, "val"), evaluate_run(str(inner), data, "val")
    for name in ("elbo", "kl", "log_likelihood", "mse", "kl_per_dimension", "active_units"):
        assert getattr(ours, name) == getattr(expected, name), name

    spec = EncodeSpec(batch=512, reconstruction=True, kl=True, sample=True)
    table, other = (encode(run, data, tmp_path / f"table-{run[-3:]}", spec) for run in (job.out, str(inner)))
    assert set(table.manifest.columns) >= {"mu", "log_var", "z", "kl", "recon_error"}
    for name in ("mu", "log_var", "z", "kl"):
        assert torch.equal(torch.as_tensor(table.torch(name)), torch.as_tensor(other.torch(name))), name
    assert len(open_table(str(tmp_path / "table-run")).keys) == 3072


def test_weights_carry_the_prefix_of_the_vae(data, tmp_path):
    fit(ada_job(data, tmp_path / "run", max_steps=2))
    names = weights_of(load_model(str(tmp_path / "run")).model)
    assert names
    assert all(name.startswith("vae.") for name in names)


def test_pairs_are_part_of_what_a_run_is(data, tmp_path):
    fit(ada_job(data, tmp_path / "run", max_steps=2, pairs=PairSpec(k=1)))
    with pytest.raises(ConfigError, match="pairs.k: there 1, asked 2"):
        fit(ada_job(data, tmp_path / "run", max_steps=2, pairs=PairSpec(k=2)))
    fit(ada_job(data, tmp_path / "default", max_steps=2))
    with pytest.raises(ConfigError, match="pairs.by: there None, asked 'label'"):
        fit(ada_job(data, tmp_path / "default", max_steps=2, pairs=PairSpec(by="label")))


def test_runs_of_models_without_pairs_are_what_they_were_before_there_were_pairs(data, tmp_path):
    fit(small_job(data, tmp_path / "run", max_steps=2))
    assert "pairs" not in json.loads((tmp_path / "run/run.000001.json").read_text())["identity"]


def test_what_cannot_be_paired_is_refused_before_the_claim(data, tmp_path, caplog):
    job = ada_job(data, tmp_path / "run", max_steps=2)
    with pytest.raises(
        ConfigError, match="pairs.by=label, pairs.k=random draws pairs, but model.kind=vae trains on single samples: remove"
    ):
        fit(small_job(data, tmp_path / "run", pairs=PairSpec(by="label")))
    with pytest.raises(ConfigError, match="pairs.k is 4, expected 1 to 3"):
        fit(ada_job(data, tmp_path / "run", pairs=PairSpec(k=4)))
    source = tmp_path / "raw"
    source.mkdir()
    for number in range(3):
        np.save(source / f"{number}.npy", np.full((6,), number, np.float32))
    shard_dataset(FolderSpec(url=str(source), extensions=("npy",)), str(tmp_path / "bare"), SplitSpec(by="none"), ShardSpec())
    with pytest.raises(DataError, match=r"has neither labels nor factor_\* columns"):
        fit(ada_job(str(tmp_path / "bare"), tmp_path / "run"))
    assert not (tmp_path / "run/run.000001.json").exists()
    with caplog.at_level(logging.INFO, "aecore.training.session"):
        fit(job)
    assert "pairs differ in 1 to 3 of 4 factors (shape, scale, x, y)" in caplog.messages
