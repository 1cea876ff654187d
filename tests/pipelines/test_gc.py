"""aepipe gc on the command line: a root, a dry run, JSON, durations, and what it says."""

import json
import os
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from aecore.errors import ConfigError
from aecore.store import open_store
from pipelines.cli.main import main
from pipelines.steps.gc import seconds_of

HERE = "cluster.num_workers=0"


def printed(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> str:
    capsys.readouterr()
    got = main(argv)
    output = capsys.readouterr()
    assert got == code, output.err
    return output.err if code else output.out


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Give a root with a dataset that a killed process left a temporary file in, two days ago."""
    place = tmp_path / "root"
    assert main(["shard", "sprites", str(place / "dataset"), "source.num_samples=30", "splits.by=none", HERE]) == 0
    left = place / "dataset/.tmp/0123456789abcdef0123456789abcdef"
    left.write_bytes(b"x" * 5000)
    os.utime(left, (time.time() - 2 * 86400,) * 2)
    (place / "notes.txt").write_text("mine")
    return place


def test_a_root_is_collected_stage_by_stage(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dry = printed(capsys, "gc", str(root), "--dry-run")
    assert f"dataset {root}/dataset: would remove 1 file, 5.0 kB" in dry
    assert "1 file, 5.0 kB, temporary file of a process that was killed: .tmp/0123456789abcdef0123456789abcdef" in dry
    assert "left alone (not dataset/, run/ or table/ of this root): notes.txt" in dry
    kept = json.loads(printed(capsys, "gc", str(root), "--older-than", "3d", "--json"))
    assert (kept["files"], kept["bytes"]) == (0, 0)
    assert len(os.listdir(root / "dataset/.tmp")) == 1
    done = json.loads(printed(capsys, "gc", str(root), "--json"))
    assert (done["files"], done["bytes"], done["not_ours"]) == (1, 5000, ["notes.txt"])
    assert os.listdir(root / "dataset/.tmp") == []
    assert printed(capsys, "verify", str(root / "dataset"), "--read-data").startswith("ok")


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("2m", 120), ("1.5h", 5400), ("7d", 604800), ("2w", 1209600)])
def test_durations(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "7", "d", "7 days", "-1d", "1y"])
def test_what_is_no_duration_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match="--older-than .* is no duration: .* for example --older-than 7d"):
        seconds_of(text)


def test_a_place_that_is_not_ours_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"x")
    assert "holds no dataset, run or table: check the address; only what aecore wrote is collected" in printed(
        capsys, "gc", str(tmp_path), code=3
    )
    assert open_store(tmp_path).list() == ["photo.jpg"]


def test_what_was_made_from_a_model_is_told_and_never_called_somebody_elses(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run, out = str(root / "dataset"), str(root / "run"), str(tmp_path / "samples")
    assert main(["train", f"data={data}", f"out={run}", "model.latent_dim=2", "backbone.hidden=[8]", "train.max_steps=2", HERE]) == 0
    assert main(["sample", run, out, "num=2", "seed=5"]) == 0
    shown = json.loads(printed(capsys, "show", out, "--json"))
    assert (shown["kind"], shown["identity"]["spec"]["seed"], shown["files"]) == ("samples", 5, 4)
    what = f"{out} holds samples of a model's prior: "
    assert what + "no hashes" in printed(capsys, "verify", out, code=3)
    assert what + "all of it is one result" in printed(capsys, "gc", out, code=3)


def test_verify_reads_a_slice_and_says_how_much(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = [json.loads(printed(capsys, "verify", str(root), "--read-data-subset", f"{k}/2", "--json"))["dataset"] for k in (1, 2)]
    assert sum(part["parts_read"] for part in parts) == parts[0]["parts"] == 1
    assert sorted(part["bytes_read"] > 0 for part in parts) == [False, True]
    assert "--read-data-subset 3/2 is no slice" in printed(capsys, "verify", str(root), "--read-data-subset", "3/2", code=2)
    both = ("verify", str(root), "--read-data", "--read-data-subset", "1/2")
    assert "leave out one of them" in printed(capsys, *both, code=2)


def test_compare_prints_both_sides_and_refuses_two_kinds(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = str(root / "dataset")
    run = str(root / "run")
    assert main(["train", f"data={data}", f"out={run}", "model.latent_dim=2", "backbone.hidden=[8]", "train.max_steps=2", HERE]) == 0
    text = printed(capsys, "compare", run, run)
    assert "same_weights: True" in text
    assert "(+0)" in text
    assert json.loads(printed(capsys, "compare", run, run, "--json"))["weights"]["max_difference"] == 0.0
    assert "give two of one kind" in printed(capsys, "compare", run, data, code=2)


def test_compaction_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "root/dataset"
    for number in range(8):
        (tmp_path / "images/cat").mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), number).save(tmp_path / f"images/cat/{number}.png")
    run = ("shard", str(tmp_path / "images"), str(data), "shards.max_samples=4", HERE)
    printed(capsys, *run)
    first = json.loads((data / "dataset.000001.json").read_bytes())
    stored = pq.read_table(data / "shards/train-000000.parquet")["source"].to_pylist()
    for name in stored[:3]:
        (tmp_path / "images" / name).unlink()
    printed(capsys, *run)
    before = sorted(data.rglob("*"))
    dry = printed(capsys, "gc", str(data.parent), "--compact", "0.5", "--dry-run")
    assert f"dataset {data}: would write 1 part again, without 3 removed samples" in dry
    assert sorted(data.rglob("*")) == before
    told = json.loads(printed(capsys, "gc", str(data), "--compact", "0.5", "--json"))
    part = {"part": "train-000000", "by": "train-g000003-000000", "live": 1, "removed": 3, "bytes": told["compaction"]["parts"][0]["bytes"]}
    assert told["compaction"] == {
        "url": str(data), "generation": 3, "share": 0.5, "parts": [part], "adopted": [], "left_out": [], "dry_run": False
    }  # fmt: skip
    assert told["files"] == 0 and [item["what"] for item in told["waiting"]] == ["replaced parts"]
    assert "wrote 0 parts again, without 0 removed samples" in printed(capsys, "gc", str(data), "--compact", "0.5")
    shown = json.loads(printed(capsys, "show", str(data), "--json"))
    assert shown["generation"] == 3 and first["dataset_sha256"] != shown["dataset_sha256"]
    assert printed(capsys, "verify", str(data), "--read-data").startswith("ok")
    freed = json.loads(printed(capsys, "gc", str(data), "--retention", "0s", "--keep-generations", "1", "--json"))
    assert "shards/train-000000.tar" in [item["name"] for item in freed["garbage"]]
    assert printed(capsys, "verify", str(data), "--read-data").startswith("ok")
    assert "expected at least 0 and below 1" in printed(capsys, "gc", str(data), "--compact", "1.5", code=2)
    assert "give --compact SHARE with it" in printed(capsys, "gc", str(data), "--copy", code=2)
    assert "give a dataset" in printed(capsys, "gc", str(tmp_path), "--compact", "0.5", code=2)
