"""`aepipe shard` on a dataset that exists: what a dry run prints, and the flags that say what a run may do."""

import json
from pathlib import Path

import pytest

from aecore.data.dataset import open_dataset
from pipelines.cli.main import main
from tests.aecore.data.tiny import encoded, image

HERE = ("cluster.num_workers=0", "shards.max_bad=1")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of 40 pictures in two classes, stored in `dataset`."""
    for number in range(40):
        path = tmp_path / "in" / "ab"[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(image(number)))
    assert main(["shard", str(tmp_path / "in"), str(tmp_path / "dataset"), *HERE]) == 0
    return tmp_path / "in"


def test_a_dry_run_prints_counts_and_examples_of_all_that_would_happen(folder, tmp_path, capsys):
    command = ["shard", str(folder), str(tmp_path / "dataset"), "--dry-run", *HERE]
    for number in range(7):
        (folder / f"a/new{number}.png").write_bytes(encoded(image(100 + number)))
    (folder / "a/00.png").write_bytes(encoded(image(90)))
    (folder / "b/01.png").unlink()
    capsys.readouterr()
    assert main([*command, "--json"]) == 0
    changes = json.loads(capsys.readouterr().out)["changes"]
    assert {name: found["samples"] for name, found in changes.items()} == {
        "added": 7,
        "changed": 1,
        "relabelled": 0,
        "removed": 1,
        "retried": 0,
    }
    assert changes["added"]["examples"] == [f"a/new{number}.png" for number in range(5)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "    removed:\n      samples: 1\n      examples: [b/01.png]\n" in printed
    assert open_dataset(str(tmp_path / "dataset")).number == 1


def test_a_narrower_filter_needs_a_flag(folder, tmp_path, capsys):
    command = ["shard", str(folder), str(tmp_path / "dataset"), "source.include=a/*", *HERE]
    assert main(command) == 0
    assert open_dataset(str(tmp_path / "dataset")).number == 1
    assert "20 samples are there that the filter of the source leaves out" in capsys.readouterr().err
    assert main([*command, "--accept-filter"]) == 0
    assert open_dataset(str(tmp_path / "dataset")).manifest.num_samples() == 20


def test_checksum_and_a_contradiction_of_it(folder, tmp_path, capsys):
    command = ["shard", str(folder), str(tmp_path / "dataset"), "--checksum", *HERE]
    assert main(command) == 0
    assert main([*command, "shards.checksum=false"]) == 2
    assert "shards.checksum is given twice" in capsys.readouterr().err


def test_a_lost_folder_is_exit_code_3_with_its_name_and_the_knob(folder, tmp_path, capsys):
    for path in (folder / "b").iterdir():
        path.unlink()
    assert main(["shard", str(folder), str(tmp_path / "dataset"), *HERE]) == 3
    error = capsys.readouterr().err
    assert "all samples of the class 'b'" in error and "shards.max_removed=1" in error
    assert main(["shard", str(folder), str(tmp_path / "dataset"), "shards.max_removed=1", *HERE]) == 0


def test_datasets_are_merged_and_followed_on_the_command_line(folder, tmp_path, capsys, monkeypatch):
    for number in range(6):
        path = tmp_path / "more/c" / f"c{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(image(50 + number)))
    assert main(["shard", str(tmp_path / "more"), str(tmp_path / "other"), *HERE]) == 0
    monkeypatch.chdir(tmp_path)
    command = ["shard", "dataset", "other", "both", "shards.max_samples=9", *HERE]
    assert main([*command, "--dry-run"]) == 0
    assert "46" in capsys.readouterr().out and not (tmp_path / "both").exists()
    assert main(command) == 0
    both = open_dataset(str(tmp_path / "both"))
    assert both.manifest.num_samples() == 46 and both.classes == ("a", "b", "c")
    assert max(shard.samples for shard in both.manifest.shards) == 9
    (folder / "a/00.png").unlink()
    assert main(["shard", str(folder), "dataset", *HERE]) == 0 == main(command)
    assert open_dataset(str(tmp_path / "both")).manifest.num_samples() == 45
    assert main(["verify", "both", "--read-data"]) == 0
    assert main(["shard", "./dataset", "./small", "shards.max_samples=3", *HERE]) == 0
    hashes = [open_dataset(str(tmp_path / name)).manifest.content_sha256 for name in ("dataset", "small")]
    assert hashes[0] == hashes[1] is not None
    capsys.readouterr()
    assert main(["shard", "dataset", "in", "wrong", *HERE]) == 2
    assert f"{tmp_path}/in holds no dataset: only datasets are merged" in capsys.readouterr().err
    assert main(["shard", "dataset", "dataset", *HERE]) == 2
    assert "would be written from itself" in capsys.readouterr().err
