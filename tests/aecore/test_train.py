import dataclasses
import hashlib
import io
import json
import logging
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aecore.checkpoint.files import committed_checkpoints, verify_checkpoint
from aecore.checkpoint.weights import load_model
from aecore.data.dataset import open_dataset
from aecore.data.format.transform import TransformSpec
from aecore.data.sources.arrays import ArraysSpec
from aecore.data.write.job import shard_dataset
from aecore.data.write.spec import ShardSpec
from aecore.data.write.splits import SplitSpec
from aecore.errors import ConfigError, DataError, RunFailed
from aecore.nn.mlp import MLPSpec
from aecore.store import open_store
from aecore.training import loop
from aecore.training.loop import fit
from aecore.training.metrics import last_epoch
from aecore.training.optimizer import OptimSpec, lr_at
from aecore.vanilla import AESpec
from aecore.variational import VAESpec
from tests.aecore.training import fit_on, losses, published_weights, small_job, sprites_dataset
from tests.documents import content, rewrite


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return sprites_dataset(tmp_path_factory.mktemp("train") / "sprites", val=0.1)


def test_a_run_learns_and_publishes_a_loadable_model(data, tmp_path):
    result = fit(small_job(data, tmp_path / "run", epochs=4, val_split="val"))
    rows = losses(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, result.step + 1))
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"]
    assert result.metrics["validation"]["loss"] < 0.6 * rows[0]["loss"]
    loaded = load_model(str(tmp_path / "run"))
    assert loaded.sha256 == result.checkpoint_sha256
    assert not loaded.model.training


def test_every_epoch_counts_every_sample_once(data, tmp_path):
    fit(small_job(data, tmp_path / "run", epochs=2))
    rows = losses(tmp_path / "run")
    counts = [sum(row["samples"] for row in rows if row["epoch"] == epoch) for epoch in (0, 1)]
    assert counts == [open_dataset(data).manifest.num_samples("train")] * 2


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_ranks_gives_the_losses_of_one(data, tmp_path, world_size):
    for number in (1, world_size):
        fit_on(small_job(data, tmp_path / str(number), epochs=2, val_split="val"), number)
    one, many = losses(tmp_path / "1"), losses(tmp_path / str(world_size))
    for name in ("loss", "log_likelihood", "kl_divergence", "samples"):
        np.testing.assert_allclose([row[name] for row in many], [row[name] for row in one], rtol=1e-5, err_msg=name)
    for name, value in one[-1]["validation"].items():
        assert many[-1]["validation"][name] == pytest.approx(value, rel=1e-5)


def test_a_finished_run_returns_at_once_and_changes_nothing(data, tmp_path):
    job = small_job(data, tmp_path / "run")
    first = fit(job)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert fit(job) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def _files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (out / "model").iterdir()}


@pytest.mark.parametrize("role", ["run", "metrics", "weights", "config", "state", "checkpoint", "model"])
@pytest.mark.parametrize("stage", ["staged", "synced", "linked"])
def test_a_run_killed_at_any_fault_point_ends_like_an_uninterrupted_one(data, tmp_path, tmp_path_factory, role, stage):
    whole = tmp_path_factory.getbasetemp() / "whole-run"
    options = {"every_steps": 15, "epochs": 2, "max_steps": 50, "log_every_s": 0.05}
    if not (whole / "model/checkpoint.json").exists():
        fit(small_job(data, whole, **options))
    job = small_job(data, tmp_path / "run", **options)
    occurrences = {"run": (1,), "model": (1, 2)}.get(role, (1, 2, 4))
    for number in occurrences:
        assert _killed(job, f"{role}.{stage}:{number}") in (True, None)
    fit(job)
    assert losses(tmp_path / "run") == losses(whole)
    assert _files(tmp_path / "run") == _files(whole)
    assert [step for step, _ in committed_checkpoints(open_store(tmp_path / "run"))][0] == 50


def _killed(job, fault: str) -> bool | None:
    """Run `fit` in a child that dies at `fault`: True if it died there, None if it finished before."""
    pid = os.fork()
    if pid == 0:
        os.environ["AECORE_FAULT"] = fault
        logging.disable(logging.CRITICAL)
        try:
            fit(job)
        except BaseException:  # the child must never return into pytest
            os._exit(9)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status) == signal.SIGKILL
    assert os.WEXITSTATUS(status) == 0, f"the run failed instead of being killed at {fault}"
    return None


def test_a_run_resumes_in_the_middle_of_an_epoch_on_another_number_of_ranks(data, tmp_path):
    options = {"every_steps": 20, "epochs": 2, "log_every_s": 0.05}
    fit(small_job(data, tmp_path / "whole", **options))
    job = small_job(data, tmp_path / "run", **options)
    assert _killed(job, "checkpoint.linked:2") is True
    fit_on(job, 3)
    whole, resumed = losses(tmp_path / "whole"), losses(tmp_path / "run")
    np.testing.assert_allclose([row["loss"] for row in resumed], [row["loss"] for row in whole], rtol=1e-5)


def test_a_damaged_checkpoint_is_skipped_with_a_warning(data, tmp_path, caplog):
    options = {"every_steps": 10, "max_steps": 30}
    fit(small_job(data, tmp_path / "whole", **options))
    job = small_job(data, tmp_path / "run", **options)
    assert _killed(job, "checkpoint.linked:2") is True
    newest = tmp_path / "run" / committed_checkpoints(open_store(tmp_path / "run"))[0][1] / "model.safetensors"
    flipped = bytearray(newest.read_bytes())
    flipped[-1] ^= 1
    newest.write_bytes(flipped)
    fit(job)
    assert "skipping a damaged checkpoint" in caplog.text
    assert published_weights(tmp_path / "run") == published_weights(tmp_path / "whole")


def test_a_publication_that_another_attempt_began_is_finished_with_its_weights(data, tmp_path):
    job = small_job(data, tmp_path / "run", max_steps=10)
    assert _killed(job, "checkpoint.linked:1") is True  # the last step of a first attempt is committed, nothing is published
    store = open_store(tmp_path / "run")
    name = committed_checkpoints(store)[0][1]
    other = tmp_path / "run/checkpoints/step-00000010-zzzzzzzz"
    shutil.copytree(tmp_path / "run" / name, other)  # a second attempt, whose weights differ in the last bits
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    first, *rest = content(other / "checkpoint.json")["files"]
    rewrite(other / "checkpoint.json", files=[{**first, "sha256": hashlib.sha256(weights).hexdigest()}, *rest])
    store.put("model/model.safetensors", bytes(weights), role="model")  # ... and which was killed while it published
    fit(job)
    assert published_weights(tmp_path / "run") == bytes(weights)


def test_retention_keeps_the_newest_and_the_best(data, tmp_path):
    fit(small_job(data, tmp_path / "run", epochs=4, val_split="val", keep=1, best=True))
    rows = [row for row in losses(tmp_path / "run") if "validation" in row]
    best = min(rows, key=lambda row: row["validation"]["loss"])["step"]
    steps = {step for step, _ in committed_checkpoints(open_store(tmp_path / "run"))}
    assert steps == {best, rows[-1]["step"]}
    assert load_model(str(tmp_path / "run")).checkpoint.step == best


def test_the_best_checkpoint_of_a_concurrent_attempt_is_kept(data, tmp_path, monkeypatch):
    """A cut-off node may train on: it would publish its best checkpoint, or its next one would name it."""
    job, folder = small_job(data, tmp_path / "run", epochs=4, val_split="val", keep=1, best=True), tmp_path / "run/checkpoints"
    validate, others = loop._Training._validate, []

    def worse_and_worse(self: loop._Training) -> dict[str, float]:
        if self.kept and not others:  # after the first epoch the other attempt has the first one's bytes as well
            mine = Path(self.kept[0]).name
            others.append(mine.rpartition("-")[0] + "-beside00")
            shutil.copytree(folder / mine, folder / others[0])
            manifest = folder / others[0] / "checkpoint.json"
            manifest.write_bytes(manifest.read_bytes().replace(mine.encode(), others[0].encode()))
        return {**validate(self), "loss": 100.0 + self.step}

    monkeypatch.setattr(loop._Training, "_validate", worse_and_worse)
    fit(job)
    names = [Path(name).name for _, name in committed_checkpoints(open_store(job.out))]
    assert len(names) == 3  # the last one, the best one, the other's best one
    assert others[0] in names
    assert load_model(job.out).checkpoint.step == int(others[0].split("-")[1])


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(data, tmp_path):
    job = small_job(data, tmp_path / "run", every_steps=1, epochs=20, optim=OptimSpec(lr=1e18))
    with pytest.raises(RunFailed, match=r"not finite|the loss is (nan|inf).* \(epoch [1-9]"):
        fit(job)
    assert not (tmp_path / "run/model").exists()
    for _, name in committed_checkpoints(open_store(tmp_path / "run")):
        model = load_model(str(tmp_path / "run" / name)).model
        assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


def _arrays_with_a_bad_value(folder: Path, split: str, value: float) -> str:
    arrays = {f"x_{name}": np.random.default_rng(0).normal(size=(40, 6)).astype("float32") for name in ("train", "val")}
    arrays[f"x_{split}"][17, 2] = value
    folder.mkdir()
    np.savez(folder / "arrays.npz", **arrays)
    shard_dataset(ArraysSpec(url=str(folder / "arrays.npz")), str(folder / "dataset"), SplitSpec(by="folders"), ShardSpec(max_samples=15))
    return str(folder / "dataset")


@pytest.mark.parametrize(("split", "value"), [("train", np.nan), ("train", np.inf), ("val", np.nan)])
def test_a_sample_that_is_not_finite_is_named_instead_of_the_learning_rate(tmp_path, split, value):
    data = _arrays_with_a_bad_value(tmp_path / "data", split, value)
    vae, plain = VAESpec(latent_dim=2), TransformSpec(scale="none")
    job = small_job(data, tmp_path / "run", model=vae, transform=plain, val_split="val", global_batch=16, epochs=3)
    with pytest.raises(DataError, match=rf"17' \(ordinal \d+ of split '{split}'\) holds NaN or infinity in 1 of 6 values, as 1 of"):
        fit(job)
    with pytest.raises(AssertionError, match=f"split '{split}'.*holds NaN or infinity"):
        fit_on(dataclasses.replace(job, out=str(tmp_path / "ranks")), 2)


def test_an_output_of_another_job_is_refused_with_the_differing_fields(data, tmp_path):
    job = small_job(data, tmp_path / "run")
    fit(job)
    other = dataclasses.replace(job, optim=OptimSpec(lr=5e-4), backbone=MLPSpec(hidden=(16,)))
    with pytest.raises(ConfigError, match=r"optim.lr: there 0.001, asked 0.0005"):
        fit(other)
    with pytest.raises(ConfigError, match=r"backbone.hidden: there \[32\], asked \[16\]"):
        fit(other)


def test_fields_outside_the_identity_may_change_between_attempts(data, tmp_path):
    job = small_job(data, tmp_path / "run")
    assert fit(job) == fit(dataclasses.replace(job, checkpoint=dataclasses.replace(job.checkpoint, keep=5)))


def test_a_new_run_can_start_from_another_runs_weights(data, tmp_path):
    first = fit(small_job(data, tmp_path / "first", epochs=3))
    fit(small_job(data, tmp_path / "second", init_from=first.url))
    assert losses(tmp_path / "second")[0]["loss"] < 0.7 * losses(tmp_path / "first")[0]["loss"]


def test_an_autoencoder_trains_through_the_same_loop(data, tmp_path):
    fit(small_job(data, tmp_path / "run", epochs=4, model=AESpec(latent_dim=4, likelihood="bernoulli")))
    rows = losses(tmp_path / "run")
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"]
    assert "kl_divergence" not in rows[0]


def test_bf16_trains_to_about_the_same_loss(data, tmp_path):
    for precision in ("fp32", "bf16"):
        fit(small_job(data, tmp_path / precision, epochs=2, precision=precision))
    assert losses(tmp_path / "bf16")[-1]["loss"] == pytest.approx(losses(tmp_path / "fp32")[-1]["loss"], rel=0.05)


def test_beta_warms_up_linearly_and_the_learning_rate_follows_one_cycle(data, tmp_path):
    job = small_job(
        data,
        tmp_path / "run",
        max_steps=40,
        model=VAESpec(latent_dim=4, beta=2.0, beta_warmup_steps=20, likelihood="bernoulli"),
        optim=OptimSpec(lr=1e-3, schedule="one_cycle", clip=5.0),
    )
    fit(job)
    rows = losses(tmp_path / "run")
    assert [row["beta"] for row in rows[:20]] == pytest.approx([0.1 * step for step in range(1, 21)])
    assert rows[-1]["beta"] == 2.0
    reference = torch.optim.lr_scheduler.OneCycleLR(torch.optim.SGD([torch.zeros(1)]), max_lr=1e-3, total_steps=40)
    expected = []
    for _ in range(40):
        expected.append(reference.get_last_lr()[0])
        reference.optimizer.step()
        reference.step() if len(expected) < 40 else None
    assert [row["lr"] for row in rows] == pytest.approx(expected, rel=1e-9)
    assert lr_at(OptimSpec(lr=3e-3), 17, 40) == 3e-3


def test_one_cycle_takes_runs_of_any_length():
    for total in range(1, 8):
        rates = [lr_at(OptimSpec(lr=1.0, schedule="one_cycle"), step, total) for step in range(1, total + 1)]
        assert all(0 < rate <= 1.0 for rate in rates)


def test_an_unknown_split_names_the_known_ones(data, tmp_path):
    with pytest.raises((ConfigError, DataError), match="train"):
        fit(small_job(data, tmp_path / "run", split="trian"))


def test_a_run_cannot_be_written_over_its_dataset(data):
    with pytest.raises(ConfigError, match="holds a dataset, not a run"):
        fit(small_job(data, data))


def test_best_without_validation_is_refused(data, tmp_path):
    with pytest.raises(ConfigError, match=r"train\.val_split"):
        fit(small_job(data, tmp_path / "run", best=True))


def test_an_unfinished_run_cannot_be_loaded_as_a_model(data, tmp_path):
    job = small_job(data, tmp_path / "run")
    assert _killed(job, "checkpoint.linked:1") is True
    with pytest.raises(DataError, match="has not finished"):
        load_model(job.out)
    with pytest.raises(DataError, match=r"root of a pipeline, expected a training run: give .*/run"):
        load_model(str(tmp_path))
    with pytest.raises(DataError, match="holds no trained model"):
        load_model(str(tmp_path / "nothing"))


def test_a_checkpoint_is_never_a_pickle_that_runs(data, tmp_path):
    job = small_job(data, tmp_path / "run", max_steps=3)
    fit(job)
    folder = tmp_path / "run" / committed_checkpoints(open_store(tmp_path / "run"))[0][1]

    class Evil:
        def __reduce__(self):
            return (sys.exit, (3,))

    torch.save({"optimizer": Evil()}, folder / "state.pt")
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(io.BytesIO((folder / "state.pt").read_bytes()), weights_only=True)


def _damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("victim", ["model.safetensors", "checkpoint.json"])
def test_a_damaged_newest_checkpoint_costs_no_progress_with_keep_1(data, tmp_path, victim):
    options = {"every_steps": 5, "max_steps": 30, "keep": 1}
    fit(small_job(data, tmp_path / "whole", **options))
    job = small_job(data, tmp_path / "run", **{**options, "keep": 2})
    assert _killed(job, "checkpoint.linked:3") is True
    _damage(tmp_path / "run" / committed_checkpoints(open_store(tmp_path / "run"))[0][1] / victim)
    fit(small_job(data, tmp_path / "run", **options))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert _files(tmp_path / "run") == _files(tmp_path / "whole")


def test_two_attempts_at_once_end_with_one_result(data, tmp_path):
    options = {"every_steps": 1, "max_steps": 40, "keep": 1}
    fit(small_job(data, tmp_path / "whole", **options))
    job = small_job(data, tmp_path / "run", **options)
    children = []
    for _ in range(2):
        pid = os.fork()
        if pid == 0:
            logging.disable(logging.CRITICAL)
            try:
                fit(job)
            except BaseException:
                os._exit(9)
            os._exit(0)
        children.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0, 0]
    assert _files(tmp_path / "run") == _files(tmp_path / "whole")


def test_a_checkpoint_that_goes_away_while_it_is_read_makes_room_for_another(data, tmp_path, monkeypatch):
    """Another attempt at the run removes old checkpoints as it goes on."""
    options = {"every_steps": 2, "max_steps": 12, "keep": 3}
    fit(small_job(data, tmp_path / "whole", **options))
    job = small_job(data, tmp_path / "run", **options)
    assert _killed(job, "checkpoint.linked:4")
    real, read = loop.load_state, list[str]()

    def removed_first(store, checkpoint):
        read.append(checkpoint.name)
        if len(read) == 1:
            shutil.rmtree(tmp_path / "run" / checkpoint.name)
        return real(store, checkpoint)

    monkeypatch.setattr(loop, "load_state", removed_first)
    fit(job)
    assert len(read) == 2
    assert read[0] > read[1]  # one step older
    assert published_weights(tmp_path / "run") == published_weights(tmp_path / "whole")


def test_a_checkpoint_that_cannot_be_read_is_an_error(data, tmp_path, monkeypatch):
    job = small_job(data, tmp_path / "run", every_steps=2, max_steps=12)
    assert _killed(job, "checkpoint.linked:4")

    def fails(store, checkpoint):
        raise DataError("state.pt is missing")

    monkeypatch.setattr(loop, "load_state", fails)
    with pytest.raises(DataError, match=r"state\.pt is missing"):
        fit(job)


def test_a_checkpoint_of_another_run_is_not_resumed(data, tmp_path, caplog):
    fit(small_job(data, tmp_path / "other", max_steps=40, seed=5))
    job = small_job(data, tmp_path / "run", max_steps=20)
    shutil.copytree(tmp_path / "other/checkpoints", tmp_path / "run/checkpoints")
    fit(job)
    assert "it belongs to another run" in caplog.text
    fit(small_job(data, tmp_path / "alone", max_steps=20))
    assert published_weights(tmp_path / "run") == published_weights(tmp_path / "alone")


def test_damaged_metrics_are_found(data, tmp_path):
    fit(small_job(data, tmp_path / "run", max_steps=5))
    store = open_store(tmp_path / "run")
    name = committed_checkpoints(store)[0][1]
    verify_checkpoint(store, name)
    _damage(next((tmp_path / "run/metrics").iterdir()))
    with pytest.raises(DataError, match="is damaged"):
        verify_checkpoint(store, name)


def _mean(rows: list[dict[str, Any]], name: str, epoch: int) -> float:
    rows = [row for row in rows if row["epoch"] == epoch]
    return float(np.average([row[name] for row in rows], weights=[row["samples"] for row in rows]))


def test_the_result_tells_of_the_published_step_and_its_epoch(data, tmp_path):
    result = fit(small_job(data, tmp_path / "run", epochs=3, val_split="val", best=True, optim=OptimSpec(lr=0.05)))
    rows = losses(tmp_path / "run")
    row = rows[result.step - 1]
    assert {name: result.metrics[name] for name in ("step", "lr", "validation")} == {
        name: row[name] for name in ("step", "lr", "validation")
    }
    assert result.metrics["epoch"] == row["epoch"] + 1
    assert result.metrics["samples"] == open_dataset(data).manifest.num_samples("train")
    for name in ("loss", "kl_divergence"):
        assert result.metrics[name] == pytest.approx(_mean(rows, name, row["epoch"]), rel=1e-12)


def test_the_line_of_an_epoch_says_its_mean_also_after_a_kill_in_the_middle(data, tmp_path, caplog):
    caplog.set_level(logging.INFO, "aecore.training.loop")
    job = small_job(data, tmp_path / "run", epochs=2, every_steps=5, log_every_s=0.0)

    def killed_at_20(ref: Any, metrics: Any) -> None:
        if metrics["step"] == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(job, on_checkpoint=killed_at_20)
    assert not caplog.records
    halfway = last_epoch(open_store(job.out))
    assert (halfway["step"], halfway["epoch"], halfway["samples"]) == (20, 1, 20 * 64)
    fit(job)
    rows = losses(tmp_path / "run")
    assert halfway["loss"] == pytest.approx(_mean(rows[:20], "loss", 0), rel=1e-12)
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("epoch")]
    expected = [f"epoch {epoch + 1}: step .*, mean loss {_mean(rows, 'loss', epoch):.4f}, " for epoch in (0, 1)]
    assert len(lines) == 2
    assert all(re.match(pattern, line) for pattern, line in zip(expected, lines, strict=True)), lines


def test_weights_that_do_not_fit_are_refused_before_the_claim(data, tmp_path):
    first = fit(small_job(data, tmp_path / "first", max_steps=3))
    job = small_job(data, tmp_path / "second", init_from=first.url, model=VAESpec(latent_dim=3, likelihood="bernoulli"))
    with pytest.raises(ConfigError, match="does not fit this model"):
        fit(job)
    assert not (tmp_path / "second").exists()


def test_a_run_goes_on_when_the_weights_it_started_from_are_gone(data, tmp_path):
    first = fit(small_job(data, tmp_path / "first", max_steps=3))
    job = small_job(data, tmp_path / "second", init_from=first.url, every_steps=5, max_steps=20)
    assert _killed(job, "checkpoint.linked:2") is True
    shutil.rmtree(tmp_path / "first")
    assert fit(job).step == 20


def test_runs_that_start_from_different_weights_are_different_runs(data, tmp_path):
    for seed in (1, 2):
        shutil.rmtree(tmp_path / "first", ignore_errors=True)
        fit(small_job(data, tmp_path / "first", max_steps=3, seed=seed))
        fit(small_job(data, tmp_path / str(seed), max_steps=3, init_from=str(tmp_path / "first")))
    one, two = (json.loads((tmp_path / name / "run.000001.json").read_text())["identity"] for name in ("1", "2"))
    assert one["init_sha256"] != two["init_sha256"]


@pytest.mark.parametrize("what", ["document", "weights", "newest", "all"])
def test_a_finished_run_needs_no_checkpoint(data, tmp_path, what, caplog):
    """`model/` is the result: checkpoints may be removed by hand, and a damaged one is reported by whoever verifies."""
    job = small_job(data, tmp_path / "run", every_steps=10, max_steps=30)
    done = fit(job)
    newest = max((tmp_path / "run/checkpoints").iterdir())
    if what in ("document", "weights"):
        path = newest / {"document": "checkpoint.json", "weights": "model.safetensors"}[what]
        path.write_bytes(path.read_bytes()[:-20] + b"!" + path.read_bytes()[-19:])
    else:
        shutil.rmtree(newest if what == "newest" else newest.parent)
    found = fit(job)
    assert dataclasses.replace(found, metrics={}) == dataclasses.replace(done, metrics={})
    assert found.metrics == (done.metrics if what == "weights" else {}), "none rather than those of another step"
    fit(job)
    assert caplog.text.count("no checkpoint that names the metrics of step 30") == (what != "weights")
