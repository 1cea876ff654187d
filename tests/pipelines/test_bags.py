"""Bags through the command line: generated bags and the shipped recipe, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from aecore.table.table import open_table
from pipelines.cli.main import main

BAGS = ("source.kind=arrays", "source.group=bags", "splits.by=hash", "splits.test=0.2", "cluster.num_workers=0")
SMALL = ("model.latent_dim=4", "backbone.hidden=[16]", "train.epochs=2", "cluster.num_workers=0")


@pytest.fixture(scope="module")
def bags(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give an .npz of 60 bags of 3 to 9 small images."""
    path, rng = tmp_path_factory.mktemp("bags") / "bags.npz", np.random.default_rng(0)
    of = np.repeat(np.arange(60), rng.integers(3, 10, 60))
    np.savez(path, images=rng.integers(0, 256, (len(of), 5, 6), dtype=np.uint8), labels=of % 2, bags=of)
    return path


def printed(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> str:
    capsys.readouterr()
    got = main(argv)
    output = capsys.readouterr()
    assert got == code, output.err
    return output.err if code else output.out


def test_the_recipe_shards_trains_encodes_and_evaluates_bags(bags: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, run, table = (str(tmp_path / name) for name in ("dataset", "run", "table"))
    made = json.loads(printed(capsys, "shard", str(bags), data, *BAGS, "--json"))
    assert sum(made["bags"].values()) == 60
    assert made["bags"]["train"] > made["bags"]["test"] > 0
    assert "in 60 bags" in printed(capsys, "shard", str(bags), data, *BAGS)
    trained = json.loads(printed(capsys, "train", "mnist_bags", f"data={data}", f"out={run}", *SMALL, "--json"))
    assert trained["steps"] == 2 * -(-made["bags"]["train"] // 16), "a step is 16 bags"
    encoded = json.loads(printed(capsys, "encode", run, data, table, "cluster.num_workers=0", "--json"))
    scores = json.loads(printed(capsys, "evaluate", run, data, "cluster.num_workers=0", "--json"))
    assert (encoded["rows"], scores["num_samples"]) == (sum(made["samples"].values()), made["samples"]["test"])
    assert scores["elbo"] == pytest.approx(scores["log_likelihood"] - scores["kl"])
    groups = open_table(table).arrow("group").to_pylist()
    with np.load(bags) as arrays:
        assert sorted(groups) == sorted(f"bags/{bag}" for bag in arrays["bags"])
    assert printed(capsys, "verify", table, "--read-data").startswith("ok")
    assert printed(capsys, "verify", data, "--read-data").startswith("ok")


def test_what_cannot_be_done_with_bags_is_refused(bags: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, here = str(tmp_path / "dataset"), "cluster.num_workers=0"
    message = printed(capsys, "shard", str(bags), data, "source.kind=arrays", "source.group=bag", here, code=3)
    assert "has no array 'bag' (did you mean 'bags'" in message
    message = printed(capsys, "shard", str(tmp_path), data, "source.kind=folder", "source.group=parents", here, code=2)
    assert "source.group" in message
    assert "parent" in message
    printed(capsys, "shard", str(bags), data, *BAGS)
    message = printed(capsys, "train", "mnist_bags", f"data={data}", f"out={tmp_path}/run", "backbone={kind: conv}", here, code=2)
    assert "model.kind=mil_vae consists of MLPs, backbone.kind is conv" in message
    assert not (tmp_path / "run/run.000001.json").exists()
