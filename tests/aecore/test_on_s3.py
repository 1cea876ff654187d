"""The whole chain in a bucket: the same bytes as in a folder, killed anywhere, cache bounded, first batch without a queue."""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from aecore.data.dataset import open_dataset
from aecore.data.read.loader import InputSpec, Loader
from aecore.data.read.order import TrainingOrder
from aecore.data.read.verify import verify_dataset
from aecore.data.sources.folder import FolderSpec
from aecore.data.write.job import shard_dataset
from aecore.data.write.spec import ShardSpec
from aecore.data.write.splits import SplitSpec
from aecore.encoding.encoder import EncodeSpec
from aecore.encoding.job import encode_dataset
from aecore.store import canonical_json
from aecore.table.table import open_table
from aecore.table.verify import verify_table
from aecore.training.loop import fit
from tests.aecore.encoding import image_folder
from tests.aecore.training import losses, small_job
from tests.processes import WARM, run, wait_until

SHARDS = ShardSpec(max_samples=20)
PER_PLACE = ("records/", "report/", "run.", "checkpoints/", "metrics/", ".tmp/")  # they hold times, addresses, names of attempts


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """110 images in the splits train and test, one of them truncated."""
    folder = image_folder(image_folder(tmp_path_factory.mktemp("images"), "train", range(85)), "test", range(85, 110))
    bad = sorted(folder.rglob("*.png"))[7]
    bad.write_bytes(bad.read_bytes()[:-20])
    return folder


def chain(source: str, out: str) -> None:
    """Shard, train and encode below `out`."""
    shard_dataset(FolderSpec(url=source), f"{out}/dataset", SplitSpec(by="folders"), SHARDS)
    fit(small_job(f"{out}/dataset", f"{out}/run", epochs=3, every_steps=6))
    encode_dataset(f"{out}/run", f"{out}/dataset", f"{out}/table", EncodeSpec(batch=16))


def content(objects: dict[str, bytes]) -> dict[str, str]:
    """Return name -> sha256 of everything but what belongs to the place; of a table's manifest only parts count (it names addresses).

    Listings, and the hash of a claim in a dataset's manifest, are left out: they cover the address and the states of the source's files.
    """
    kept = {name: data for name, data in objects.items() if not name.partition("/")[2].startswith((*PER_PLACE, "listings/"))}
    kept.pop("table/table.000001.json")
    name = "dataset/dataset.000001.json"
    kept[name] = canonical_json({**json.loads(kept[name]), "claim_sha256": None, "listings": None, "sha256": None})
    return {name: hashlib.sha256(data).hexdigest() for name, data in kept.items()}


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def local(images, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("local")
    chain(str(images), str(out))
    return out


def test_the_chain_in_a_bucket_gives_the_bytes_of_the_chain_in_a_folder(s3, images, local):
    s3.upload(images, "images")
    chain(f"{s3.url}/images", f"{s3.url}/out")
    found = content(s3.objects("out/"))
    assert found == content(files(local))
    assert "dataset/quarantine/train-000000.parquet" in found or any("quarantine" in name for name in found)
    assert losses(f"{s3.url}/out/run") == losses(local / "run")
    table, there = open_table(f"{s3.url}/out/table"), open_table(str(local / "table"))
    assert table.keys.equals(there.keys)
    assert table.dataset().count_rows() == there.dataset().count_rows() == 109
    rows = table.dataset()
    for copy in Path(os.environ["AECORE_CACHE"]).iterdir():
        copy.unlink()  # a full cache evicts what is not open: what is read is fetched again
    assert set(rows.to_table(columns=["split"])["split"].to_pylist()) == {"train", "test"}
    batches = rows.scanner(batch_size=10, batch_readahead=0, fragment_readahead=0).to_batches()
    first = next(batches)
    for copy in Path(os.environ["AECORE_CACHE"]).iterdir():
        copy.unlink()
    assert first.num_rows + sum(batch.num_rows for batch in batches) == 109
    assert table.lineage(table.keys[5].as_py())["shard"] == there.lineage(there.keys[5].as_py())["shard"]
    assert not verify_dataset(open_dataset(f"{s3.url}/out/dataset"), read_data=True).problems
    verify_table(table, read_data=True, dataset_url=f"{s3.url}/out/dataset")


def test_an_append_in_a_bucket_writes_only_what_is_new(s3, images, tmp_path):
    folder = shutil.copytree(images, tmp_path / "images")
    source, out = FolderSpec(url=str(folder)), f"{s3.url}/dataset"
    shard_dataset(source, out, SplitSpec(by="folders"), SHARDS)
    before = s3.objects("dataset/")
    image_folder(folder, "train", range(200, 210))
    manifest = shard_dataset(source, out, SplitSpec(by="folders"), SHARDS)
    assert manifest.number == 2 and manifest.num_samples() == 119
    after = s3.objects("dataset/")
    assert {name: after[name] for name in before} == before
    assert [name for name in sorted(set(after) - set(before)) if name.endswith(".tar")] == ["shards/train-g000002-000000.tar"]


KILLED = """
import sys
from tests.aecore.test_on_s3 import chain
chain(sys.argv[1], sys.argv[2])
"""


@pytest.mark.parametrize("fault", ["tar.linked:3", "checkpoint.synced:2", "part.linked:3"])  # `make accept` has all of them
def test_killed_and_run_again_gives_the_same_bytes(s3, images, local, fault):
    command = [*WARM, "-c", KILLED, images, f"{s3.url}/out"]
    assert run(command, env=os.environ | {"AECORE_FAULT": fault}).returncode == -signal.SIGKILL
    chain(str(images), f"{s3.url}/out")
    assert content(s3.objects("out/")) == content(files(local))
    assert losses(f"{s3.url}/out/run") == losses(local / "run")


def test_a_damaged_shard_in_a_bucket_is_found_also_when_a_good_copy_is_cached(s3, images):
    shard_dataset(FolderSpec(url=str(images)), f"{s3.url}/dataset", SplitSpec(by="folders"), SHARDS)
    assert not verify_dataset(open_dataset(f"{s3.url}/dataset"), read_data=True).problems
    name = "dataset/shards/train-000001.tar"
    data = bytearray(s3.objects(name)[""])
    data[1000] ^= 1
    s3.raw.put_object(Bucket=s3.bucket, Key=name, Body=bytes(data))
    (problem,) = verify_dataset(open_dataset(f"{s3.url}/dataset"), read_data=True).problems
    assert "train-000001.tar is damaged" in problem


def flipped(data: bytes) -> bytes:
    changed = bytearray(data)
    changed[len(data) // 2] ^= 1
    return bytes(changed)


def test_a_damaged_copy_on_this_machine_is_fetched_again_and_nobody_blames_the_bucket(s3, images):
    chain(str(images), s3.url)
    dataset, table = open_dataset(f"{s3.url}/dataset"), open_table(f"{s3.url}/table")
    cache = Path(os.environ["AECORE_CACHE"])
    shard, part = dataset.manifest.shards[0], table.parts[0]
    expected = [sample.members for sample in dataset.reader(shard).iterate()], table.numpy("mu")
    for sha256, change in itertools.product((shard.tar.sha256, part.file.sha256), (flipped, lambda data: bytes(len(data)))):

        def damage(copy: Path = cache / sha256, change: Callable[[bytes], bytes] = change) -> None:
            data = copy.read_bytes()
            copy.unlink()  # who has it open keeps what it has
            copy.write_bytes(change(data))

        damage()
        assert [sample.members for sample in open_dataset(dataset.url).reader(shard).iterate()] == expected[0]
        damage()
        rows = open_dataset(dataset.url).reader(shard).read_rows(list(range(shard.samples)))
        assert rows == [next(data for ext, data in members.items() if ext != "cls") for members in expected[0]]
        damage()
        assert np.array_equal(open_table(table.url).numpy("mu"), expected[1])
        damage()
        assert verify_table(open_table(table.url), read_data=True).num_rows == len(expected[1])
    assert not verify_dataset(open_dataset(dataset.url), read_data=True).problems


def wait_until_held(cache: Path, limit: int) -> None:
    """Wait until a cache is within its bound: shards that were read ahead may still come and go."""

    def held() -> int:
        total = 0
        for path in cache.iterdir():
            with contextlib.suppress(FileNotFoundError):
                total += path.stat().st_size
        return total

    wait_until(lambda: held() <= limit, "the cache is within its bound")


def test_an_epoch_through_a_small_cache_reads_everything_once_per_stay(bad_s3, s3_proxy, images, monkeypatch, tmp_path):
    out = f"{bad_s3.url}/dataset"
    shard_dataset(FolderSpec(url=str(images)), out, SplitSpec(by="folders"), SHARDS)
    dataset = open_dataset(out)
    stored = sum(shard.tar.bytes + shard.index.bytes for shard in dataset.manifest.split("train"))
    batches = {}
    for name, limit in (("large", stored * 4), ("small", stored // 2)):
        monkeypatch.setenv("AECORE_CACHE", str(tmp_path / name))
        monkeypatch.setenv("AECORE_CACHE_BYTES", str(limit))
        s3_proxy.clear()
        order = TrainingOrder(global_batch=16, lanes=2, block=8)
        with Loader(open_dataset(out), "train", order=order, spec=InputSpec(cache="none")) as loader:
            batches[name] = [batch.ordinals.tolist() for batch in loader.batches(0, loader.steps_per_epoch)]
        wait_until_held(tmp_path / name, limit)
        if name == "large":
            assert s3_proxy.seen(r"GET .*\.tar") == len(dataset.manifest.split("train")), "each shard is fetched once"
    assert batches["small"] == batches["large"]
