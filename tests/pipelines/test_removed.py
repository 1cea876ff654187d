"""The command line on a dataset from which samples were removed: counts of live ones, and what was removed by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from aecore.data.dataset import open_dataset
from pipelines.cli.main import main
from tests.aecore.data.removals import live_content, live_keys, remove
from tests.aecore.data.test_removal import key_of, made


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Path:
    url = made(tmp_path_factory.mktemp("shown"))
    remove(url, [*live_keys(open_dataset(str(url)))[:6], key_of(12)])
    return url


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> Any:
    capsys.readouterr()
    assert main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_show_counts_live_samples_and_names_what_was_removed(url: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset, shown = open_dataset(str(url)), printed(capsys, "show", str(url))
    live = {split: len(live_keys(dataset, split)) for split in ("train", "test")}
    assert shown["samples"] == live
    assert shown["removed"] == {"train": 6, "test": 0} and shown["removed_quarantined"] == 1
    assert shown["quarantined"] == sum(shown["reasons"].values()) == 3
    assert (shown["removal"], shown["content_sha256"]) == ("drop", live_content(dataset))
    assert sum(shown["shapes"].values()) == sum(live.values())
    assert main(["show", str(url)]) == 0
    assert "removed:\n  train: 6\n" in capsys.readouterr().out


def test_show_of_a_dataset_that_only_grew_is_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    shown = printed(capsys, "show", str(Path(__file__).parents[1] / "fixtures/v1/dataset"))
    assert not shown.keys() & {"removed", "removed_quarantined", "removal", "content_sha256"}


def test_verify_counts_live_samples_and_gc_finds_nothing(url: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checked = printed(capsys, "verify", str(url), "--read-data")
    assert (checked["samples"], checked["quarantined"]) == (open_dataset(str(url)).manifest.num_samples(), 3)
    assert printed(capsys, "gc", str(url), "--older-than", "0s")["files"] == 0


def test_a_damaged_removal_file_is_exit_3_with_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = made(tmp_path)
    remove(url, live_keys(open_dataset(str(url)))[:1])
    path = next((url / "removed").iterdir())
    path.write_bytes(path.read_bytes()[:-1])
    assert main(["verify", str(url)]) == 3
    assert path.name in capsys.readouterr().err


def test_a_withdrawn_generation_is_exit_3_with_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = made(tmp_path)
    (url / "withdrawn.000002.json").write_bytes(b"{}")
    for argv in (["show", str(url)], ["verify", str(url)], ["compare", str(url), str(url)]):
        assert main(argv) == 3
        assert "generation 2 of" in (error := capsys.readouterr().err) and "withdrawn.000002.json" in error
