"""Buckets as others have them: odd keys, no credentials, requesters who pay, more bytes of tars than the cache may hold."""

import io
import os
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from aecore.data.dataset import open_dataset
from aecore.data.format.decode import Reading
from aecore.data.read.rows import SplitRows
from aecore.data.sources.arrays import ArraysSpec
from aecore.data.sources.folder import BucketSource, FolderSpec
from aecore.data.sources.webdataset import WebdatasetSource, WebdatasetSpec
from aecore.data.write.job import adopt_shards, shard_dataset
from aecore.data.write.spec import ShardSpec
from aecore.errors import ConfigError, DataError, StoreError
from aecore.store import open_files
from aecore.store._cache import ObjectCache
from aecore.store._s3_client import close_clients
from tests.aecore.data.tiny import encoded, image
from tests.s3 import S3
from tests.s3.proxy import FaultProxy
from tests.s3.public import bucket_of_others


def put(s3: S3, *keys: str) -> dict[str, bytes]:
    """Put a picture of its own under each key."""
    found = {key: encoded(image(number)) for number, key in enumerate(keys)}
    for key, data in found.items():
        s3.raw.put_object(Bucket=s3.bucket, Key=key, Body=data)
    return found


class TestKeys:
    KEYS = ("in//cat/1.png", "in/cat//2.png", "in/cat/3.png", "in/cat///4.png", "in//5.png", "in/dog/%2F.png", "in/dog/a b+c.png")

    def test_keys_with_empty_names_are_samples_of_the_class_around_them(self, s3: S3, tmp_path: Path) -> None:
        objects = put(s3, *self.KEYS)
        source = BucketSource(FolderSpec(url=f"{s3.url}/in"))
        listing = source.listing()
        assert sorted(listing.sources) == sorted(key.removeprefix("in/") for key in self.KEYS)
        assert len(set(listing.keys)) == len(self.KEYS)
        labels = dict(zip(listing.sources, listing.label_names or [], strict=True))
        expected = {"/cat/1.png": "cat", "cat//2.png": "cat", "cat/3.png": "cat", "cat///4.png": "cat", "/5.png": ""}
        assert labels == {**expected, "dog/%2F.png": "dog", "dog/a b+c.png": "dog"}
        for read in (source.read, source.prefetch(listing.sources)):
            assert {f"in/{name}": read(name)[1] for name in listing.sources} == objects
        made = shard_dataset(FolderSpec(url=f"{s3.url}/in"), str(tmp_path / "out"))
        assert (made.num_samples(), made.classes) == (7, ("cat", "dog"))

    def test_characters_of_urls_shells_and_patterns_are_parts_of_keys(self, s3: S3, tmp_path: Path) -> None:
        names = (
            "q?x=1&y=2.png",
            "h#1.png",
            "[1]{2}.png",
            "tilde~'\".png",
            "UPPER.PNG",
            "semi;colon:,$@=.png",
            "*?.png",
            "50%.png",
            "é ü.png",
        )
        objects = put(s3, *(f"in/{'cat' if number % 2 else 'd#g?'}/{name}" for number, name in enumerate(names)))
        source = BucketSource(FolderSpec(url=f"{s3.url}/in"))
        listing = source.listing()
        assert {f"in/{name}" for name in listing.sources} == objects.keys()
        for read in (source.read, source.prefetch(listing.sources)):
            assert {f"in/{name}": read(name)[1] for name in listing.sources} == objects
        made = shard_dataset(FolderSpec(url=f"{s3.url}/in"), str(tmp_path / "out"))
        assert (made.num_samples(), made.quarantined, made.classes) == (len(names), 0, ("cat", "d#g?"))

    @pytest.mark.parametrize("max_bad", [0.01, 1.0])
    def test_nothing_but_bad_objects_leave_nothing(self, s3: S3, tmp_path: Path, max_bad: float) -> None:
        for number in range(3):
            s3.raw.put_object(Bucket=s3.bucket, Key=f"in/a/{number}.png", Body=b"no")
        for out in (str(tmp_path / "out"), f"{s3.url}/out"):
            with pytest.raises(DataError, match=r"all 3 samples are bad \(.* 3\): nothing was kept") as refused:
                shard_dataset(FolderSpec(url=f"{s3.url}/in"), out, shards=ShardSpec(max_bad=max_bad))
            assert refused.value.exit_code == 3
        assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []
        assert "Contents" not in s3.raw.list_objects_v2(Bucket=s3.bucket, Prefix="out/")

    def test_markers_of_folders_and_hidden_objects_are_no_samples(self, s3: S3) -> None:
        put(s3, "in/cat/1.png", "in/.hidden/1.png", "in/cat/.2.png")
        for key in ("in/", "in/cat/", "in/cat//"):
            s3.raw.put_object(Bucket=s3.bucket, Key=key, Body=b"")
        assert BucketSource(FolderSpec(url=f"{s3.url}/in")).listing().sources == ["cat/1.png"]

    def test_an_address_with_an_empty_name_says_which_folder_to_give(self, s3: S3) -> None:
        put(s3, "in//cat/1.png")
        with pytest.raises(ConfigError, match="objects with // in their keys are read from the folder before it"):
            BucketSource(FolderSpec(url=f"{s3.url}/in//cat"))
        assert BucketSource(FolderSpec(url=f"{s3.url}/in", include=("cat",))).listing().sources == ["/cat/1.png"]

    def test_an_address_that_is_one_object_is_told_so(self, s3: S3) -> None:
        put(s3, "in/1.png")
        with pytest.raises(DataError, match="is one object of .* bytes, expected a folder"):
            BucketSource(FolderSpec(url=f"{s3.url}/in/1.png")).listing()

    def test_objects_whose_names_end_in_a_slash_are_counted_once(self, s3: S3, caplog: pytest.LogCaptureFixture) -> None:
        put(s3, "in/a/1.png", "in/a/", "in/b.png/", "in/")
        source = BucketSource(FolderSpec(url=f"{s3.url}/in"))
        with caplog.at_level("INFO"):
            assert source.listing().sources == source.listing().sources == ["a/1.png"]
        assert caplog.text.count("skipped 2 objects whose names end in / (for example 'a/')") == 1

    def test_filters_choose_as_in_a_folder(self, s3: S3) -> None:
        put(s3, "in/a/1.png", "in/a/1_mask.png", "in/b/2.png", "in/b/x.csv")
        source = BucketSource(FolderSpec(url=f"{s3.url}/in", exclude=("*_mask.png",)))
        listing = source.listing()
        assert listing.sources == ["a/1.png", "b/2.png"]
        assert any("skipped 1 file that source.exclude matches ('a/1_mask.png')" in note for note in listing.notes)
        assert any("table or text" in note and "('b/x.csv')" in note for note in listing.notes)

    def test_arrays_below_an_empty_name_are_read(self, s3: S3, tmp_path: Path) -> None:
        file = io.BytesIO()
        np.save(file, np.arange(12, dtype=np.float32).reshape(3, 4))
        s3.raw.put_object(Bucket=s3.bucket, Key="in//x.npy", Body=file.getvalue())
        assert shard_dataset(ArraysSpec(url=f"{s3.url}/in"), str(tmp_path / "out")).num_samples() == 3


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The environment of somebody without credentials; clients of other environments are forgotten before and after."""
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    close_clients()
    yield monkeypatch
    close_clients()


class TestBucketsOfOthers:
    def test_a_public_bucket_is_read_without_credentials(self, s3: S3, elsewhere: pytest.MonkeyPatch, tmp_path: Path) -> None:
        put(s3, "in/cat/1.png", "in/dog/2.png")
        with bucket_of_others(s3.server) as (port, answered):
            elsewhere.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
            elsewhere.delenv("AWS_ACCESS_KEY_ID")
            elsewhere.delenv("AWS_SECRET_ACCESS_KEY")
            made = shard_dataset(FolderSpec(url=f"{s3.url}/in"), str(tmp_path / "out"))
        assert made.num_samples() == 2 and len(answered) == 3

    def test_credentials_for_something_else_are_not_sent_if_that_is_asked(
        self, s3: S3, elsewhere: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        put(s3, "in/cat/1.png")
        with bucket_of_others(s3.server) as (port, _):
            elsewhere.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
            with pytest.raises(StoreError, match="does not know the access key"):
                shard_dataset(FolderSpec(url=f"{s3.url}/in"), str(tmp_path / "out"))
            elsewhere.setenv("AWS_NO_SIGN_REQUEST", "YES")
            assert shard_dataset(FolderSpec(url=f"{s3.url}/in"), str(tmp_path / "out")).num_samples() == 1

    def test_whoever_pays_reads_and_whoever_does_not_is_told_how(self, s3: S3, elsewhere: pytest.MonkeyPatch, tmp_path: Path) -> None:
        put(s3, "in/cat/1.png")
        tars(s3, 2, 2)
        with bucket_of_others(s3.server, requester_pays=True) as (port, _):
            elsewhere.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
            with pytest.raises(StoreError, match="AWS_REQUEST_PAYER=requester"):
                shard_dataset(FolderSpec(url=f"{s3.url}/in"), str(tmp_path / "out"))
            close_clients()
            elsewhere.setenv("AWS_REQUEST_PAYER", "requester")
            assert shard_dataset(FolderSpec(url=f"{s3.url}/in"), str(tmp_path / "out")).num_samples() == 1
            assert shard_dataset(WebdatasetSpec(url=f"{s3.url}/tars"), str(tmp_path / "tars")).num_samples() == 4


def tars(s3: S3, count: int, samples: int, side: int = 8) -> dict[str, bytes]:
    """Put tars of random pictures; return the bytes of each sample by its key."""
    rng, found = np.random.default_rng(0), dict[str, bytes]()
    for number in range(count):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as tar:
            for row in range(samples):
                picture = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(picture, "PNG")
                found[f"{number}_{row:04d}"] = picture.getvalue()
                info = tarfile.TarInfo(f"{number}_{row:04d}.png")
                info.size = len(picture.getvalue())
                tar.addfile(info, io.BytesIO(picture.getvalue()))
        s3.raw.put_object(Bucket=s3.bucket, Key=f"tars/shard+{number} a.tar", Body=file.getvalue())
    return found


class Held:
    """The most bytes that a folder held while this ran."""

    def __init__(self, folder: Path) -> None:
        self.most, self._folder, self._stop = 0, folder, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.is_set():
            sizes = []
            for name in os.listdir(self._folder) if self._folder.exists() else ():
                try:
                    sizes.append((self._folder / name).stat().st_size)
                except FileNotFoundError:
                    continue
            self.most = max(self.most, sum(sizes))
            time.sleep(0.002)

    def __enter__(self) -> "Held":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join(60)


class TestTars:
    def test_the_cache_keeps_its_bound_and_no_tar_is_fetched_again_and_again(self, bad_s3, s3_proxy, monkeypatch, tmp_path) -> None:
        s3: S3 = bad_s3
        samples = tars(s3, 6, 10, 60)
        size = s3.raw.head_object(Bucket=s3.bucket, Key="tars/shard+0 a.tar")["ContentLength"]
        limit = size * 4 // 3  # one of them fits
        monkeypatch.setenv("AECORE_CACHE_BYTES", str(limit))
        with Held(Path(os.environ["AECORE_CACHE"])) as held:
            source = WebdatasetSource(WebdatasetSpec(url=f"{s3.url}/tars"))
            listing = source.listing()
            assert s3_proxy.seen(r"GET .*\.tar") == 6, "each is read once to list it"
            order = np.random.default_rng(1).permutation(len(listing)).tolist()
            names = [listing.sources[row] for row in order]
            read = WebdatasetSource(WebdatasetSpec(url=f"{s3.url}/tars")).prefetch(names)
            assert [read(name)[1] for name in names] == [samples[listing.keys[row]] for row in order]
            assert s3_proxy.seen(r"GET .*\.tar") == 6 + 6 + len(samples), "one request for each sample, and for the start of each tar"
            assert shard_dataset(WebdatasetSpec(url=f"{s3.url}/tars"), str(tmp_path / "out")).num_samples() == 60
        assert 0 < held.most <= limit

    @pytest.mark.parametrize("fit", [1, 2])
    def test_adopting_keeps_the_bound_of_the_cache_whatever_its_threads_do(self, s3: S3, monkeypatch, tmp_path: Path, fit: int) -> None:
        """Parts are committed four at a time: only as many of them as fit hold a tar open."""
        tars(s3, 6, 10, 60)
        size = s3.raw.head_object(Bucket=s3.bucket, Key="tars/shard+0 a.tar")["ContentLength"]
        monkeypatch.setenv("AECORE_CACHE_BYTES", str(limit := size * fit + size // 3))
        with Held(Path(os.environ["AECORE_CACHE"])) as held:
            assert adopt_shards(WebdatasetSpec(url=f"{s3.url}/tars"), str(tmp_path / "adopted")).num_samples() == 60
        assert 0 < held.most <= limit

    def test_turns_are_taken_by_as_many_as_fit(self, s3: S3) -> None:
        cache, waits = ObjectCache(limit=100), threading.Event()

        def third() -> None:
            with cache.turn(40):
                waits.set()

        with cache.turn(40):
            with cache.turn(40):
                thread = threading.Thread(target=third)
                thread.start()
                assert not waits.wait(0.3)
            assert waits.wait(60)
        thread.join()
        with cache.turn(1000):  # what does not fit is read alone
            pass

    def test_adopted_tars_keep_the_bound_in_training(self, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
        samples = tars(s3, 6, 10, 60)
        limit = s3.raw.head_object(Bucket=s3.bucket, Key="tars/shard+0 a.tar")["ContentLength"] * 4 // 3  # one of them fits
        monkeypatch.setenv("AECORE_CACHE_BYTES", str(limit))
        cache = Path(os.environ["AECORE_CACHE"])

        def held() -> int:
            return sum(path.stat().st_size for path in cache.iterdir())

        adopt_shards(WebdatasetSpec(url=f"{s3.url}/tars"), f"{s3.url}/ds")
        assert 0 < held() <= limit
        dataset = open_dataset(f"{s3.url}/ds")
        rows = SplitRows(dataset, "train", Reading(), "none")
        order = np.random.default_rng(0).permutation(rows.num_samples)
        with Held(cache) as seen:
            for batch in np.array_split(order, 5):  # of all tars
                rows.prefetch(np.arange(len(rows.shards)))
                pixels = rows.read(batch).pixels
                keys = [(n, k) for n in range(len(rows.shards)) for k in rows.index(n)["key"].to_pylist()]
                for index, found in zip(batch.tolist(), pixels, strict=True):
                    wanted = np.asarray(Image.open(io.BytesIO(samples[unquote(keys[index][1])])))
                    np.testing.assert_array_equal(found, wanted if wanted.ndim == 3 else wanted[..., None])
        assert seen.most <= limit and held() <= limit

    def test_tars_of_a_pattern_keep_the_bound_while_they_are_listed(self, bad_s3: S3, s3_proxy: FaultProxy, monkeypatch) -> None:
        samples = tars(bad_s3, 5, 10, 60)
        for number in range(5):
            bad_s3.raw.copy_object(Bucket=bad_s3.bucket, Key=f"p/{number}.tar", CopySource=f"{bad_s3.bucket}/tars/shard+{number} a.tar")
        size = bad_s3.raw.head_object(Bucket=bad_s3.bucket, Key="p/0.tar")["ContentLength"]
        monkeypatch.setenv("AECORE_CACHE_BYTES", str(2 * size + size // 2))
        with Held(Path(os.environ["AECORE_CACHE"])) as held:
            listing = WebdatasetSource(WebdatasetSpec(url=f"{bad_s3.url}/p/{{0..4}}.tar")).listing()
        assert sorted(listing.keys) == sorted(samples) and s3_proxy.seen(r"GET .*\.tar") == 5
        assert 0 < held.most <= 2 * size + size // 2

    def test_arrays_keep_the_bound_too(self, s3: S3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        rows = [np.random.default_rng(number).normal(size=(20, 30, 30)) for number in range(6)]
        for number, array in enumerate(rows):
            file = io.BytesIO()
            np.savez(file, images=array, labels=np.arange(20))
            s3.raw.put_object(Bucket=s3.bucket, Key=f"in/{number}.npz", Body=file.getvalue())
        limit = 3 * len(file.getvalue())
        monkeypatch.setenv("AECORE_CACHE_BYTES", str(limit))
        with Held(Path(os.environ["AECORE_CACHE"])) as held:
            assert shard_dataset(ArraysSpec(url=f"{s3.url}/in"), str(tmp_path / "out")).num_samples() == 120
        assert 0 < held.most <= limit + 4096  # notes of the store

    def test_tars_that_fit_are_fetched_once_and_several_at_a_time(self, bad_s3, s3_proxy: FaultProxy, monkeypatch, tmp_path) -> None:
        s3: S3 = bad_s3
        samples = tars(s3, 6, 3)
        s3_proxy.add(r"GET .*\.tar", "delay", seconds=2.0, times=None)
        source = WebdatasetSource(WebdatasetSpec(url=f"{s3.url}/tars"))
        listing = source.listing()
        assert s3_proxy.most_delayed > 1, "one after the other"
        assert {key: source.read(name)[1] for key, name in zip(listing.keys, listing.sources, strict=True)} == samples
        assert source.tars.files.pieces([("shard+0 a.tar", 0, 1)]) is None
        assert shard_dataset(WebdatasetSpec(url=f"{s3.url}/tars"), str(tmp_path / "out")).num_samples() == 18
        assert s3_proxy.seen(r"GET .*\.tar") == 6

    def test_a_tar_that_is_replaced_between_listing_and_reading_is_an_error(self, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
        tars(s3, 2, 3, 60)
        monkeypatch.setenv("AECORE_CACHE_BYTES", "100")
        files = open_files(f"{s3.url}/tars")
        sizes = files.sizes()
        s3.raw.put_object(Bucket=s3.bucket, Key="tars/shard+0 a.tar", Body=bytes(sizes["shard+0 a.tar"]))
        read = files.pieces([("shard+0 a.tar", 0, 10), ("shard+1 a.tar", 0, 10)])
        assert read is not None
        with pytest.raises(DataError, match="was replaced while it was read"):
            read(0)
        assert len(read(1)) == 10

    def test_a_piece_that_ends_early_is_asked_for_again(self, bad_s3, s3_proxy: FaultProxy, monkeypatch) -> None:
        s3: S3 = bad_s3
        samples = tars(s3, 1, 3, 60)
        listing = WebdatasetSource(WebdatasetSpec(url=f"{s3.url}/tars")).listing()
        monkeypatch.setenv("AECORE_CACHE_BYTES", "100")
        s3_proxy.add(r"GET .*\.tar", "cut", after=7, times=1)
        read = WebdatasetSource(WebdatasetSpec(url=f"{s3.url}/tars")).prefetch(listing.sources)
        assert [read(name)[1] for name in listing.sources] == [samples[key] for key in listing.keys]
