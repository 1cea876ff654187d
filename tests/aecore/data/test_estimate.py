"""What sharding would take is what it takes: an estimate from some samples is compared with the run of all of them."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from aecore.data.dataset import open_dataset
from aecore.data.sources.folder import FolderSpec
from aecore.data.write import estimate
from aecore.data.write.job import shard_dataset
from aecore.data.write.plan import Estimate, PlanSummary
from aecore.data.write.spec import ShardSpec
from aecore.errors import ConfigError
from pipelines.cli.main import main
from tests.aecore.data.tiny import encoded, image

SHARDS = ShardSpec(max_samples=60)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> FolderSpec:
    root = tmp_path_factory.mktemp("source")
    for number in range(600):
        path = root / f"class-{number % 3}/{number:04d}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(image(number)))
    return FolderSpec(url=str(root))


def asked(source: Any, out: Path, samples: int, **shards: Any) -> Estimate:
    summary = shard_dataset(source, str(out), shards=dataclasses.replace(SHARDS, **shards), dry_run=True, samples=samples)
    assert isinstance(summary, PlanSummary) and summary.estimate is not None
    return summary.estimate


def test_an_estimate_is_what_a_run_takes(source: FolderSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "MOST_SAMPLES", 50)  # of 600
    found = asked(source, tmp_path / "out", 600)
    assert not (tmp_path / "out").exists(), "a dry run writes nothing"
    shard_dataset(source, str(tmp_path / "out"), shards=SHARDS)
    manifest = open_dataset(str(tmp_path / "out")).manifest
    taken = {
        "shards": len(manifest.shards),
        "tar_bytes": sum(shard.tar.bytes for shard in manifest.shards),
        "index_bytes": sum(shard.index.bytes for shard in manifest.shards),
        "listing_bytes": manifest.listings[0].bytes,
        "manifest_bytes": (tmp_path / "out/dataset.000001.json").stat().st_size,
    }
    asked_for = {name: getattr(found, name) for name in taken}
    assert asked_for["shards"] == taken["shards"]
    for name, value in taken.items():
        assert asked_for[name] == pytest.approx(value, rel=0.25), (name, asked_for, taken)
    assert asked_for["tar_bytes"] == pytest.approx(taken["tar_bytes"], rel=0.12), "a tar is filled up to 10,240 bytes"
    assert found.hours > 0 and found.requests == found.source_requests == 0


def test_an_estimate_grows_with_the_number_asked_for(source: FolderSpec, tmp_path: Path) -> None:
    one, other = (asked(source, tmp_path / "out", samples) for samples in (10**6, 10**9))
    assert other.shards == pytest.approx(1000 * one.shards, rel=1e-3)
    assert other.tar_bytes == pytest.approx(1000 * one.tar_bytes, rel=0.05)
    by_bytes = asked(source, tmp_path / "out", 10**6, max_bytes=10 * int(one.measured["source_bytes"]))
    assert by_bytes.shards > 4 * one.shards, "shards of fewer bytes are more"


def test_where_nothing_is_new_nothing_can_be_measured(source: FolderSpec, tmp_path: Path) -> None:
    shard_dataset(source, str(tmp_path / "out"), shards=SHARDS)
    with pytest.raises(ConfigError, match="no sample is new"):
        asked(source, tmp_path / "out", 1000)


def test_samples_are_a_whole_number_of_a_dry_run(source: FolderSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["--samples", "1e9"], "add --dry-run"),
        (["--dry-run", "--samples", "many"], "expected a whole number of samples"),
        (["--dry-run", "--samples", "1.5"], "expected a whole number of samples"),
        (["--dry-run", "--samples", "0"], "expected a whole number of samples"),
    ):
        assert main(["shard", source.url, str(tmp_path / "out"), *words, "cluster.num_workers=0"]) == 2
        assert message in capsys.readouterr().err
    assert main(["shard", source.url, str(tmp_path / "out"), "--dry-run", "--samples", "1e9", "cluster.num_workers=0"]) == 0
    assert "samples: 1000000000" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
