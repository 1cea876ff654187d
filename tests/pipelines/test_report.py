"""What the command line says of a dataset's content: the report, equal samples, whose it is, and what another one has."""

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aecore.data.dataset import open_dataset
from pipelines.cli.main import main
from tests.aecore.data.tiny import encoded, image
from tests.filefaults import faults

HERE = ("cluster.num_workers=0", "shards.max_bad=1")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes in two splits, with one picture in both splits and under both labels."""
    for number, name in enumerate(["train/a/0", "train/a/1", "train/b/2", "train/b/3", "val/a/4", "val/b/0"]):
        path = tmp_path / "in" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(image(0 if name == "val/b/0" else number, 16)))
    return tmp_path / "in"


def summary(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_equal_samples_are_reported_by_every_run_and_by_show(folder, tmp_path, capsys):
    command = ["shard", str(folder), str(tmp_path / "dataset"), *HERE]
    for _ in range(2):
        found = summary(capsys, *command)
        assert found["leaks"] == {
            "samples": 2,
            "contents": 1,
            "remaining": 1,
            "examples": [{"train": ["train/a/0"], "val": ["val/b/0"]}],
            "splits": {"train, val": 1},
        }
        assert found["contradicting_labels"]["examples"] == [{"a": ["train/a/0"], "b": ["val/b/0"]}]
        assert found["duplicates"]["examples"] == [["train/a/0", "val/b/0"]]
    assert main(command) == 0
    assert "2 samples have the content of one in another split (1 content, for example train/a/0 (train) = val/b/0 (val))" in (
        capsys.readouterr().err
    )
    assert summary(capsys, "show", str(tmp_path / "dataset"))["report"]["leaks"] == found["leaks"]
    assert main(["show", str(tmp_path / "dataset")]) == 0
    printed = capsys.readouterr().out
    for line in (
        "  samples: train 4, val 2\n",
        "    train: a 2, b 2\n",
        "  sizes: 16x16 6\n",
        "  in two splits: 2 samples of 1 content, for example train: train/a/0 = val: val/b/0\n",
        "  of two classes: 2 samples of 1 content, for example a: train/a/0 = b: val/b/0\n",
        "    looked at: all\n",
    ):
        assert line in printed
    found = summary(capsys, *command, "splits.leaks=drop")
    assert (found["samples"], found["left_out"]) == ({"train": 3, "val": 2}, 1)
    assert (
        "  samples: train 3, val 2; 1 left out, whose content others have\n"
        in (main(["show", found["dataset"]]), capsys.readouterr().out)[1]
    )


def test_refused_equal_samples_are_exit_code_3(folder, tmp_path, capsys):
    assert main(["shard", str(folder), str(tmp_path / "dataset"), *HERE, "splits.leaks=refuse"]) == 3
    assert "splits.leaks=refuse: train/a/0 (train) = val/b/0 (val)" in capsys.readouterr().err


def test_a_missing_and_a_damaged_report_are_named(folder, tmp_path, capsys):
    command, url = ["shard", str(folder), str(tmp_path / "dataset"), *HERE], str(tmp_path / "dataset")
    assert main(command) == 0
    path = tmp_path / "dataset/report/000001.json"
    for data, said in (
        (None, "missing, the next run of aepipe shard makes it"),
        (b"{", "damaged, the next run of aepipe shard makes it again"),
    ):
        path.unlink() if data is None else path.write_bytes(data)
        assert summary(capsys, "show", url)["report"]["state"].startswith(said)
        assert main(["show", url]) == 0
        assert f"report: {said}" in capsys.readouterr().out
        assert main(["verify", url]) == 0
        assert f"report: {said.partition(',')[0]}" in capsys.readouterr().out
        assert main(command) == 0
        assert "samples" not in summary(capsys, "show", url)["report"] and "counts" in summary(capsys, "show", url)["report"]


def test_whose_a_dataset_is_is_shown_and_changed_by_a_later_run(folder, tmp_path, capsys):
    command = ["shard", str(folder), str(tmp_path / "dataset"), *HERE]
    assert main(command) == 0
    first = open_dataset(str(tmp_path / "dataset"))
    found = summary(capsys, *command, "about.license=cc-by-4.0", "about.owner=The lab", "about.personal_data=false")
    assert (found["generation"], found["dataset_sha256"]) == (2, first.dataset_sha256)
    assert found["about"] == {"license": "cc-by-4.0", "owner": "The lab", "personal_data": False}
    assert main(["show", str(tmp_path / "dataset")]) == 0
    assert "about:\n  license: cc-by-4.0\n  owner: The lab\n  personal_data: False\n" in capsys.readouterr().out
    assert summary(capsys, *command)["generation"] == 2


def test_datasets_are_compared_by_content_and_by_values(folder, tmp_path, capsys):
    images = np.stack([image(number) for number in range(4)])
    np.savez(tmp_path / "data.npz", x=images)
    (tmp_path / "png").mkdir()
    for number, each in enumerate(images):
        (tmp_path / f"png/{number}.png").write_bytes(encoded(each))
    for name in ("data.npz", "png"):
        assert main(["shard", str(tmp_path / name), str(tmp_path / f"{name}-out"), *HERE]) == 0
    pair = [str(tmp_path / "data.npz-out"), str(tmp_path / "png-out")]
    found = summary(capsys, "compare", *pair, "--values")
    assert (found["same_content"], found["same_values"], found["differences"]["added"]["samples"]) == (False, True, 4)
    assert "same_values" not in summary(capsys, "compare", *pair)


def test_a_report_that_the_disk_does_not_give_fails_no_run(folder, tmp_path, capsys):
    command = ["shard", str(folder), str(tmp_path / "dataset"), *HERE]
    first = summary(capsys, *command)
    with faults(tmp_path / "dataset/report", "open", errno.EIO) as found:
        again = summary(capsys, *command)
    assert found.raised and again["generation"] == first["generation"] and "leaks" in first and "leaks" not in again
