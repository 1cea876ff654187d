"""What the version before wrote goes on in this one, without a flag, and what was there keeps its bytes (`tests/fixtures/make_v1.py`)."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import pytest

from aecore.data.dataset import open_dataset
from aecore.data.format.transform import TransformSpec
from aecore.data.read.verify import verify_dataset
from aecore.data.sources.folder import FolderSpec
from aecore.data.sources.webdataset import WebdatasetSpec
from aecore.data.write.job import adopt_shards, shard_dataset
from aecore.data.write.spec import ShardSpec
from aecore.encoding.job import EncodeSpec, encode_dataset
from aecore.maintenance.gc import collect_garbage
from aecore.sampling import SampleSpec, sample_run
from aecore.store import open_store
from aecore.table.table import open_table
from aecore.table.verify import verify_table
from aecore.training.loop import fit
from tests.documents import content
from tests.fixtures.make_v1 import job, picture, write_images, write_tar

V1 = Path(__file__).parents[1] / "fixtures/v1"
SHARDS = ShardSpec(max_samples=8)  # as all of its datasets


@pytest.fixture
def v1(tmp_path):
    """A copy of the fixture, so that the addresses in its claims lead nowhere."""
    return Path(shutil.copytree(V1, tmp_path / "v1"))


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def require_kept(before, folder):
    """Every file that was there is there with the same bytes."""
    now = files(folder)
    assert {name: now.get(name) for name in before} == before


def identity(path):
    return json.loads(path.read_bytes())["identity"]


def collect(folder):
    """Remove garbage as if a month had gone by; what is named stays."""
    return [item.name for item in collect_garbage(str(folder), older_than_s=-30 * 24 * 3600).garbage]


def test_the_fixture_is_small():
    assert sum(path.stat().st_size for path in V1.rglob("*") if path.is_file()) < 1_000_000


def test_a_dataset_of_two_generations_takes_a_third(v1):
    before, data = files(v1 / "dataset"), str(v1 / "dataset")
    assert verify_dataset(open_dataset(data), read_data=True).problems == ()
    assert shard_dataset(FolderSpec(url=str(v1 / "images")), data, shards=SHARDS).number == 2  # nothing new
    write_images(v1 / "images", "train", range(20, 22))
    manifest = shard_dataset(FolderSpec(url=str(v1 / "images")), data, shards=SHARDS)
    assert (manifest.number, manifest.num_samples("train"), manifest.num_samples("test")) == (3, 20, 4)
    assert manifest.identity == identity(v1 / "dataset/dataset.000002.json")
    assert manifest.classes == ("cat", "dog")
    assert verify_dataset(open_dataset(data), read_data=True).problems == ()
    assert collect(v1 / "dataset") == []
    require_kept(before, v1 / "dataset")


def test_an_unfinished_dataset_is_finished_under_its_claim(v1):
    before, data = files(v1 / "unfinished-dataset"), str(v1 / "unfinished-dataset")
    for name in ("6.png", "7.png"):  # came after the claim
        for animal in ("cat", "dog"):
            (v1 / "images/train" / animal / name).unlink()
    manifest = shard_dataset(FolderSpec(url=str(v1 / "images")), data, shards=SHARDS)
    assert [shard.stem for shard in manifest.shards] == ["train-000000", "train-000001", "test-000000"]
    assert manifest.dataset_sha256 == open_dataset(str(v1 / "dataset"), number=1).manifest.dataset_sha256
    assert verify_dataset(open_dataset(data), read_data=True).problems == ()
    require_kept(before, v1 / "unfinished-dataset")


def test_a_dataset_that_took_no_split_for_valid_keeps_doing_so_and_says_it(v1, caplog):
    before, data = files(v1 / "valid-dataset"), str(v1 / "valid-dataset")
    write_images(v1 / "valid-images", "valid", range(20, 21))
    with caplog.at_level(logging.WARNING):
        manifest = shard_dataset(FolderSpec(url=str(v1 / "valid-images")), data, shards=SHARDS)
    assert (manifest.number, list(manifest.splits), manifest.num_samples("train")) == (2, ["train"], 12)
    assert manifest.classes == ("train/cat", "train/dog", "valid/cat", "valid/dog")
    assert "named like splits (train, valid) and splits.by=none was chosen" in caplog.text
    require_kept(before, v1 / "valid-dataset")
    fresh = shard_dataset(FolderSpec(url=str(v1 / "valid-images")), str(v1 / "new"), shards=SHARDS)
    assert {split: fresh.num_samples(split) for split in fresh.splits} == {"train": 6, "val": 6}
    assert fresh.classes == ("cat", "dog")


def test_adopted_tars_take_another(v1):
    before, data = files(v1 / "adopted"), str(v1 / "adopted")
    assert verify_dataset(open_dataset(data), read_data=True).problems == ()
    write_tar(v1 / "adopted/tars/train-1.tar", range(30, 34))
    manifest = adopt_shards(WebdatasetSpec(url=str(v1 / "adopted/tars")), data)
    assert (manifest.number, manifest.num_samples("train"), manifest.num_samples("test")) == (2, 10, 3)
    assert verify_dataset(open_dataset(data), read_data=True).problems == ()
    assert collect(v1 / "adopted") == []
    require_kept(before, v1 / "adopted")


def test_a_finished_run_stays_and_an_unfinished_one_ends_as_if_never_stopped(v1):
    before, other = files(v1 / "run"), files(v1 / "unfinished-run")
    here = {name: v1 / name for name in ("run", "unfinished-run", "dataset")}
    assert fit(moved(job("run", epochs=2), here)).step == 6
    require_kept(before, v1 / "run")
    result = fit(moved(job("unfinished-run", epochs=3), here))
    assert result.step == 9
    require_kept(other, v1 / "unfinished-run")
    new = v1 / "new"
    as_then = dataclasses.replace(job("unfinished-run", epochs=3), transform=TransformSpec(pixels=1))
    fit(moved(as_then, here | {"unfinished-run": new}))
    weights = [(folder / "model/config.json").read_bytes() for folder in (new, v1 / "unfinished-run")]
    assert weights[0] == weights[1]  # the last bits of weights are those of a processor
    begun, now = (identity(folder / "run.000001.json") for folder in (v1 / "unfinished-run", new))
    assert {**begun, "data": now["data"]} == now  # which trains on generation 2
    for name in ("run", "unfinished-run"):
        assert collect(v1 / name) == []


def test_a_run_that_was_stopped_while_it_published_is_published(v1):
    for name in ("checkpoint.json", "model.safetensors"):
        (v1 / "run/model" / name).unlink()
    before = files(v1 / "run")
    assert fit(moved(job("run", epochs=2), {"run": v1 / "run", "dataset": v1 / "dataset"})).step == 6
    require_kept(before, v1 / "run")
    assert content(v1 / "run/model/checkpoint.json") == content(V1 / "run/model/checkpoint.json")


def test_tables_follow_their_dataset_and_unfinished_ones_are_finished(v1):
    run, data = str(v1 / "run"), str(v1 / "dataset")
    before, other = files(v1 / "table"), files(v1 / "unfinished-table")
    table = open_table(str(v1 / "table"))
    assert verify_table(table, read_data=True).num_rows == table.num_rows == 16
    manifest = encode_dataset(run, data, str(v1 / "table"), EncodeSpec(batch=4, kl=True))
    assert (manifest.number, manifest.num_rows) == (2, 20)  # generation 2 of the dataset
    manifest = encode_dataset(run, data, str(v1 / "unfinished-table"), EncodeSpec(batch=4, sample=True))
    assert (manifest.number, manifest.num_rows) == (1, 20)
    for name, known in (("table", before), ("unfinished-table", other)):
        require_kept(known, v1 / name)
        assert collect(v1 / name) == ([] if name == "table" else ["run.000001.json"])  # the claim on generation 1 of the dataset is dead
        report = verify_table(open_table(str(v1 / name)), read_data=True, dataset_url=data)
        assert (report.num_rows, report.quarantined) == (20, 0)


def test_samples_are_found_again(v1):
    before = files(v1 / "samples")
    assert sample_run(str(v1 / "run"), str(v1 / "samples"), SampleSpec(num=3, images=1))["made"] == 0
    require_kept(before, v1 / "samples")


def test_the_run_encodes_pictures_of_today(v1):
    (v1 / "more/train/cat").mkdir(parents=True)
    (v1 / "more/train/cat/a.png").write_bytes(picture(99))
    shard_dataset(FolderSpec(url=str(v1 / "more")), str(v1 / "more-dataset"))
    manifest = encode_dataset(str(v1 / "run"), str(v1 / "more-dataset"), str(v1 / "more-table"))
    assert manifest.num_rows == 1
    assert manifest.identity["preprocessing"] == identity(v1 / "table/table.000001.json")["preprocessing"]
    assert open_store(str(v1 / "more-table")).size("table.000001.json") is not None


def moved(asked, places):
    """Return a job of the fixture with the addresses that its folders have here."""
    changes = {key: str(places[getattr(asked, key).rpartition("/")[2]]) for key in ("data", "out")}
    return dataclasses.replace(asked, **changes)
