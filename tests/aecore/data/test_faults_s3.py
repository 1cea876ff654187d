"""Bodies from a bucket that are changed, cut or late on their way: read again, or the shard fails and nothing is recorded."""

import base64
import functools
import io
import logging
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aecore.data.sources.arrays import ArraysSpec
from aecore.data.sources.folder import FolderSpec
from aecore.data.sources.webdataset import WebdatasetSpec
from aecore.data.write.job import adopt_shards, shard_dataset
from aecore.data.write.spec import ShardSpec
from aecore.errors import StoreError
from aecore.store import _s3_client as client_module
from aecore.store import canonical_json, open_files, open_store, unchecked_bodies
from tests.aecore.data.test_external_tars import two_tars
from tests.documents import content
from tests.s3 import S3
from tests.s3.proxy import FaultProxy

IMAGES = r"^GET /\S+\.(bmp|jpe?g|png)"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "FIRST_PAUSE_S", 0.001)


def pictures(folder: Path) -> Path:
    """21 BMPs and 22 JPEGs of several modes and sizes, and a PNG whose bytes are damaged."""
    random = np.random.default_rng(0)
    for number in range(43):
        is_bmp, mode = number < 21, ("L", "RGB", "P" if number < 21 else "CMYK")[number % 3]
        pixels = random.integers(0, 256, (5 + number % 7, 9, 3), np.uint8)
        path = folder / f"{number % 2}/{number:02d}.{'bmp' if is_bmp else ('jpg', 'jpeg')[number % 2]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).convert(mode).save(
            path, "BMP" if is_bmp else "JPEG", **({} if is_bmp else {"progressive": number % 4 == 0})
        )
    file = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(file, "PNG")
    (folder / "0/damaged.png").write_bytes(file.getvalue()[:-9])
    return folder


def written(out: Path) -> dict[str, bytes]:
    """Return the files of a dataset but those that hold times, without claims and listings: they hold address and states of the source."""
    left_out = {"claim_sha256": None, "listings": None}
    return {
        name: canonical_json({**content(path), **left_out}) if name.startswith("dataset.") else path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and not (name := path.relative_to(out).as_posix()).startswith(("records/", "report/", "listings/", "run."))
    }


def shard(url: str, out: Path, **options: str) -> dict[str, bytes]:
    shard_dataset(FolderSpec(url=url), str(out), shards=ShardSpec(max_bad=0.1, max_samples=30, **options))  # type: ignore[arg-type]
    return written(out)


@pytest.fixture
def bucket(bad_s3: S3, tmp_path: Path) -> S3:
    bad_s3.upload(pictures(tmp_path / "in"), "in")
    return bad_s3


MOMENTS = {"flip once": "header", "flip each first read": "decode", "flip every other read": "header", "cut": "decode", "reset": "header"}


@pytest.mark.parametrize(("how", "check"), MOMENTS.items())
def test_a_fault_of_the_moment_leaves_the_dataset_of_a_clean_transfer(
    bucket: S3, s3_proxy: FaultProxy, tmp_path: Path, how: str, check: str
) -> None:
    clean = shard(str(tmp_path / "in"), tmp_path / "clean", check=check)
    assert any(name.startswith("quarantine/") for name in clean), "a damaged file is one still"
    if how == "flip each first read":
        for path in (tmp_path / "in").rglob("*.*"):
            s3_proxy.add(rf"^GET /\S+/{path.name}", "flip")
    elif how == "flip every other read":
        for path in (tmp_path / "in").rglob("*.*"):
            s3_proxy.add(rf"^GET /\S+/{path.name}", "flip", times=None, alternate=True)
    else:
        s3_proxy.add(IMAGES, how.split()[0], times=1 if how == "flip once" else 9, after=40)
    assert shard(f"{bucket.url}/in", tmp_path / "ds", check=check) == clean
    assert sum(1 for _, done in s3_proxy.log if done) >= {"flip once": 1, "cut": 9, "reset": 9}.get(how, 44)


@pytest.mark.parametrize("how", ["flip", "cut", "reset"])
def test_a_fault_that_stays_fails_the_shard_and_a_rerun_stores_the_sample(
    bucket: S3, s3_proxy: FaultProxy, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = shard(str(tmp_path / "in"), tmp_path / "clean")
    monkeypatch.setattr(client_module, "ATTEMPTS", 2)
    s3_proxy.add(r"^GET /\S+/07\.bmp", how, times=None, after=40)
    with pytest.raises(StoreError, match=r"07\.bmp") as raised:
        shard(f"{bucket.url}/in", tmp_path / "ds")
    assert raised.value.exit_code == 4
    kept = {path.stem for path in (tmp_path / "ds/records").iterdir()} if (tmp_path / "ds/records").exists() else set()
    assert len(kept) == 1, "the other shard is kept, of this one there is no record"
    assert not list((tmp_path / "ds").glob("dataset.*"))
    s3_proxy.clear()
    assert shard(f"{bucket.url}/in", tmp_path / "ds") == clean


def test_a_body_that_does_not_come_in_time_is_asked_for_again_and_then_fails_the_shard(
    bad_s3: S3, s3_proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "in/0.bmp")
    bad_s3.upload(tmp_path / "in", "in")
    monkeypatch.setattr(client_module, "ATTEMPTS", 2)
    monkeypatch.setattr(client_module, "READ_TIMEOUT_S", 3)
    s3_proxy.add(IMAGES, "delay", seconds=60.0, times=3)
    with pytest.raises(StoreError, match=r"0\.bmp \(tried 2 times"):
        shard(f"{bad_s3.url}/in", tmp_path / "ds")
    assert not list((tmp_path / "ds").glob("records/*"))
    assert shard(f"{bad_s3.url}/in", tmp_path / "ds") == shard(str(tmp_path / "in"), tmp_path / "clean")
    assert s3_proxy.seen(IMAGES) == 4


@pytest.mark.parametrize("kind", ["npz", "tar", "adopt"])
def test_flipped_files_of_many_samples_are_fetched_again(bad_s3: S3, s3_proxy: FaultProxy, tmp_path: Path, kind: str) -> None:
    if kind == "npz":
        (tmp_path / "in").mkdir()
        np.savez(tmp_path / "in/a.npz", images=np.random.default_rng(0).integers(0, 256, (90, 40, 40), np.uint8), labels=np.arange(90) % 3)
    else:
        two_tars(tmp_path / "in")
    bad_s3.upload(tmp_path / "in", "in")
    spec = ArraysSpec if kind == "npz" else WebdatasetSpec
    make = adopt_shards if kind == "adopt" else shard_dataset
    clean = make(spec(url=str(tmp_path / "in")), str(tmp_path / "clean"))
    s3_proxy.add(r"^GET /\S+\.(npz|tar)", "flip", times=2)
    assert make(spec(url=f"{bad_s3.url}/in"), str(tmp_path / "ds")).dataset_sha256 == clean.dataset_sha256  # type: ignore[union-attr]
    assert sum(1 for _, done in s3_proxy.log if done) == 2


class TestChecksums:
    """Which checksum a body is compared with, and what follows where it differs."""

    data = np.random.default_rng(1).bytes(300_000)

    @pytest.fixture
    def read(self, bad_s3: S3):
        bad_s3.raw.put_object(Bucket=bad_s3.bucket, Key="in/a.bin", Body=self.data)
        return functools.partial(open_files(f"{bad_s3.url}/in").read, "a.bin")

    def test_the_etag_is_compared_where_it_is_the_md5(self, read, s3_proxy: FaultProxy) -> None:
        s3_proxy.add("^GET", "flip", times=2)
        assert read() == self.data
        assert s3_proxy.seen("^GET") == 3

    def test_three_different_reads_are_given_up(self, read, s3_proxy: FaultProxy) -> None:
        s3_proxy.add("^GET", "flip", times=None)
        with pytest.raises(StoreError, match=r"in/a.bin: none of 3 reads matched its ETag"):
            read()
        assert s3_proxy.seen("^GET") == 3

    @pytest.mark.parametrize("name", ["crc32", "sha256"])
    def test_a_checksum_of_the_service_is_compared_first(self, read, s3_proxy: FaultProxy, name: str) -> None:
        import hashlib

        digest = zlib.crc32(self.data).to_bytes(4, "big") if name == "crc32" else hashlib.sha256(self.data).digest()
        s3_proxy.headers = {f"x-amz-checksum-{name}": base64.b64encode(digest).decode(), "ETag": '"not-an-md5"'}
        s3_proxy.add("^GET", "flip", bit=800)
        assert read() == self.data
        s3_proxy.add("^GET", "flip", bit=800, times=None)  # the same each time: no excuse where the checksum is no ETag
        with pytest.raises(StoreError, match="none of 3 reads matched its Checksum"):
            read()

    def test_a_checksum_of_parts_is_skipped(self, read, s3_proxy: FaultProxy) -> None:
        s3_proxy.headers = {"x-amz-checksum-crc32": "AAAAAA==-3"}
        s3_proxy.add("^GET", "flip")
        assert read() == self.data
        assert s3_proxy.seen("^GET") == 2

    def test_the_sha256_that_was_written_along_is_compared(self, bad_s3: S3, s3_proxy: FaultProxy) -> None:
        open_store(f"{bad_s3.url}/in").put("b.bin", self.data, role="part")
        s3_proxy.headers = {"ETag": '"0-2"'}
        s3_proxy.add(r"^GET", "flip")
        read = open_files(f"{bad_s3.url}/in").read
        assert read("b.bin") == self.data
        s3_proxy.add(r"^GET", "flip", bit=9, times=None)
        with pytest.raises(StoreError, match="two reads gave the same bytes, which do not match its sha256: the object is damaged"):
            read("b.bin")

    def test_two_equal_reads_say_that_an_etag_is_no_md5_which_is_noted_once(
        self, read, s3_proxy: FaultProxy, caplog: pytest.LogCaptureFixture
    ) -> None:
        s3_proxy.headers = {"ETag": f'"{"0123456789abcdef" * 2}"'}
        assert [read() for _ in range(3)] == [self.data] * 3
        assert s3_proxy.seen("^GET") == 4
        assert sum("ETags are no MD5 here" in message for message in caplog.messages) == 1

    @pytest.mark.parametrize(
        "header",
        [
            {"x-amz-server-side-encryption": "aws:kms"},
            {"x-amz-server-side-encryption": "aws:kms:dsse"},
            {"x-amz-server-side-encryption-aws-kms-key-id": "arn:x"},
            {"x-amz-server-side-encryption-customer-algorithm": "AES256"},
            {"ETag": '"d41d8cd98f00b204e9800998ecf8427e-3"'},
        ],
    )
    def test_what_has_no_checksum_is_read_once_and_counted(self, read, s3_proxy: FaultProxy, header: dict[str, str]) -> None:
        s3_proxy.headers = {"ETag": f'"{"0123456789abcdef" * 2}"', **header}
        before = unchecked_bodies()
        assert read() == self.data
        assert (s3_proxy.seen("^GET"), unchecked_bodies() - before) == (1, 1)

    def test_the_log_of_a_shard_says_how_many_bodies_had_no_checksum(
        self, bad_s3: S3, s3_proxy: FaultProxy, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "in").mkdir()
        for number in range(2):
            Image.fromarray(np.full((4, 4), number, np.uint8)).save(tmp_path / f"in/{number}.bmp")
        bad_s3.upload(tmp_path / "in", "in")
        s3_proxy.headers = {"ETag": '"0-2"'}
        caplog.set_level(logging.INFO)
        shard_dataset(FolderSpec(url=f"{bad_s3.url}/in"), str(tmp_path / "ds"))
        assert any("the bucket gave no checksum with 2 of the downloads" in message for message in caplog.messages)

    def test_a_service_that_knows_no_checksum_mode_is_asked_without(self, read, s3_proxy: FaultProxy) -> None:
        s3_proxy.headers = {"x-amz-checksum-crc32": base64.b64encode(zlib.crc32(self.data).to_bytes(4, "big")).decode()}
        s3_proxy.add("^GET", "status", status=501, code="NotImplemented")
        assert [read(), read()] == [self.data] * 2
        assert s3_proxy.seen("^GET") == 3
        s3_proxy.add("^GET", "flip")  # a checksum that was not requested is not compared: the ETag is
        assert read() == self.data

    def test_our_own_files_are_compared_with_what_the_manifest_says(self, bad_s3: S3, s3_proxy: FaultProxy) -> None:
        store = open_store(f"{bad_s3.url}/ds")
        ref = store.put("a.bin", self.data, role="part")
        s3_proxy.add("^GET", "flip")
        assert store.read("a.bin", ref=ref) == self.data
