"""Arrays and external tars in a bucket: the same datasets as from a folder, adopted in place or not."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from aecore.data.dataset import open_dataset
from aecore.data.read.stream import open_stream
from aecore.data.read.verify import verify_dataset
from aecore.data.sources.arrays import ArraysSpec
from aecore.data.sources.dataset import DatasetSpec
from aecore.data.sources.webdataset import WebdatasetSpec
from aecore.data.write.compact import compact_dataset
from aecore.data.write.job import adopt_shards, shard_dataset
from aecore.data.write.spec import ShardSpec
from aecore.errors import DataError
from tests.aecore.data.removals import live_keys, remove
from tests.aecore.data.test_external_tars import EXPECTED, pixels, two_tars
from tests.aecore.data.test_stream import batches, numbers
from tests.aecore.data.tiny import image


def test_arrays_in_a_bucket_give_the_shards_of_a_folder(s3, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    np.savez(tmp_path / "in/digits.npz", images=np.stack([image(number) for number in range(9)]), labels=np.arange(9) % 3)
    s3.upload(tmp_path / "in", "in")
    here = shard_dataset(ArraysSpec(url=str(tmp_path / "in/digits.npz")), str(tmp_path / "ds"))
    for url in ("in", "in/digits.npz"):
        there = shard_dataset(ArraysSpec(url=f"{s3.url}/{url}"), f"{s3.url}/ds-{len(url)}")
        assert there.dataset_sha256 == here.dataset_sha256


def test_tars_in_a_bucket_are_adopted_where_they_are(s3, tmp_path: Path, monkeypatch) -> None:
    s3.upload(two_tars(tmp_path / "theirs"), "theirs")
    here = adopt_shards(WebdatasetSpec(url=str(tmp_path / "theirs")), str(tmp_path / "ds"))
    for out in (f"{s3.url}/ds", str(tmp_path / "index-here"), f"{s3.url}/theirs"):
        there = adopt_shards(WebdatasetSpec(url=f"{s3.url}/theirs"), out)
        assert there.dataset_sha256 == here.dataset_sha256
        if out.startswith("/"):
            with pytest.raises(DataError, match=f"AECORE_TAR_PREFIXES={s3.url}/theirs"):
                pixels(out)
            monkeypatch.setenv("AECORE_TAR_PREFIXES", s3.url)
        assert pixels(out) == EXPECTED
        assert verify_dataset(open_dataset(out), read_data=True).problems == ()
    assert not [name for name in s3.objects("ds/") if name.endswith(".tar")], "no tar is copied"
    changed = bytearray((tmp_path / "theirs/00001.tar").read_bytes())
    changed[110] ^= 1
    s3.raw.put_object(Bucket=s3.bucket, Key="theirs/00001.tar", Body=bytes(changed))
    assert any("00001.tar is damaged" in problem for problem in verify_dataset(open_dataset(f"{s3.url}/ds"), read_data=True).problems)


def test_tars_in_a_bucket_are_streamed(s3, tmp_path: Path) -> None:
    s3.upload(two_tars(tmp_path / "theirs"), "theirs")
    assert numbers(batches(f"{s3.url}/theirs", 5)) == numbers(batches(f"{s3.url}/theirs/{{00000..00001}}.tar", 5))
    assert list(open_stream(f"{s3.url}/theirs", "train").tars) == ["00000.tar", "00001.tar"]


def test_patterns_and_joined_addresses_in_a_bucket(s3, tmp_path: Path) -> None:
    two_tars(tmp_path / "theirs")
    (tmp_path / "theirs/00001.tar").write_bytes(gzip.compress((tmp_path / "theirs/00001.tar").read_bytes()))
    (tmp_path / "theirs/00000.tar").rename(tmp_path / "theirs/shard+0 [a].tar")
    s3.upload(tmp_path / "theirs", "theirs")
    s3.upload(tmp_path / "theirs", "other/deep")
    for url in (f"{s3.url}/theirs/*.tar", f"{s3.url}/theirs/shard*.tar::{s3.url}/other/**/00001.tar", f"{s3.url}/theirs"):
        made = shard_dataset(WebdatasetSpec(url=url), str(tmp_path / f"ds-{len(url)}"))
        assert pixels(tmp_path / f"ds-{len(url)}") == EXPECTED
        assert made.num_samples() == 50
    with pytest.raises(DataError, match=r"no tar matches s3://.*/theirs/x\*.tar: check the address, 2 tars are below"):
        adopt_shards(WebdatasetSpec(url=f"{s3.url}/theirs/x*.tar"), str(tmp_path / "none"))


@pytest.mark.parametrize("kind", [ArraysSpec, WebdatasetSpec])
def test_a_missing_object_is_named(s3, kind) -> None:
    from aecore.registry import SOURCES

    ending = "npz" if kind is ArraysSpec else "tar"
    with pytest.raises(DataError, match=rf"a.{ending} cannot be read"):
        SOURCES.build(kind(url=f"{s3.url}/a.{ending}")).listing()


def test_datasets_in_a_bucket_become_one_there_and_here(s3, tmp_path: Path) -> None:
    for name, first in (("a", 0), ("b", 20)):
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / f"{name}.npz", images=np.stack([image(first + number) for number in range(9)]), labels=np.arange(9) % 3)
        shard_dataset(ArraysSpec(url=str(tmp_path / name)), f"{s3.url}/{name}", shards=ShardSpec(max_samples=4))
    spec = DatasetSpec(url=f"{s3.url}/a::{s3.url}/b")
    made = [shard_dataset(spec, out, shards=ShardSpec(max_samples=5)) for out in (f"{s3.url}/out", str(tmp_path / "out"))]
    assert made[0].dataset_sha256 == made[1].dataset_sha256 and made[0].num_samples() == 18
    remove(f"{s3.url}/b", live_keys(open_dataset(f"{s3.url}/b"))[:3])
    compact_dataset(f"{s3.url}/b", 0)
    assert open_dataset(f"{s3.url}/b").manifest.retired and not open_dataset(f"{s3.url}/b").manifest.has_removed
    for out in (f"{s3.url}/out", str(tmp_path / "out")):
        assert shard_dataset(spec, out, shards=ShardSpec(max_samples=5, max_removed=0.5)).num_samples() == 15
        assert verify_dataset(open_dataset(out), read_data=True).problems == ()
    assert verify_dataset(open_dataset(f"{s3.url}/b"), read_data=True).problems == ()
