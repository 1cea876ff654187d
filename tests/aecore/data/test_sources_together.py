"""What several rules of a source make of one sample: unusable ones under rules of labels, groups and splits; frames, links and buckets."""

import gzip
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest

from aecore.data.format.index import read_table
from aecore.data.manifest import DatasetManifest
from aecore.data.sources.folder import FolderSpec
from aecore.data.sources.webdataset import WebdatasetSource, WebdatasetSpec
from aecore.data.write.job import shard_dataset
from aecore.data.write.spec import ShardSpec
from aecore.data.write.splits import SplitSpec
from aecore.errors import DataError
from tests.aecore.data.forms import tiff
from tests.aecore.data.test_external_tars import write_tar
from tests.aecore.data.test_labels import pictures, stored
from tests.aecore.data.tiny import encoded, image
from tests.s3 import S3

HALF = ShardSpec(max_bad=0.5)


def png(number: int) -> bytes:
    return encoded(image(number))


def quarantined(out: Path) -> dict[str, str]:
    """Return the reason of every row of the quarantine, by key."""
    rows = [row for path in sorted(out.glob("quarantine/*.parquet")) for row in read_table(path.read_bytes(), str(path)).to_pylist()]
    return {row["key"]: row["reason"] for row in rows}


class TestUnusable:
    """A member that cannot be used decides nothing: no rule is asked of it, and it is in the quarantine."""

    @pytest.fixture
    def source(self, tmp_path: Path) -> str:
        files = [(f"{split}/{name}_{n}.png", png(n)) for n, split in enumerate(["train", "val"]) for name in ("cat", "dog")]
        write_tar(tmp_path / "in/a.tar", [*files, ("train/cat_9.txt", b"no image"), ("INDEX.txt", b"no sample"), ("train/eel/x.txt", b"")])
        return str(tmp_path / "in")

    @pytest.mark.parametrize("label", [r"regex:^([a-z]+)_\d+\.", r"regex:([a-z]+)_\d", "path", "leaf"])
    def test_labels_and_split_folders_are_those_of_the_others(self, source: str, tmp_path: Path, label: str) -> None:
        made = shard_dataset(WebdatasetSpec(url=source, label=label), str(tmp_path / "out"), shards=HALF)
        assert isinstance(made, DatasetManifest)
        assert quarantined(tmp_path / "out") == {"train/cat_9": "no_data", "INDEX": "no_data", "train/eel/x": "no_data"}
        names = stored(tmp_path / "out")
        by_name = label.startswith("regex")
        assert {key.partition("/")[0] for key in names} == {"train", "val"}
        assert set(names.values()) == ({"cat", "dog"} if by_name else {None}), "eel is the class of no sample"

    def test_groups_too(self, source: str, tmp_path: Path) -> None:
        made = shard_dataset(
            WebdatasetSpec(url=source, group=r"regex:(cat|dog)_\d"), str(tmp_path / "out"), SplitSpec(by="hash", val=0.5), HALF
        )
        assert isinstance(made, DatasetManifest)
        assert (made.num_samples(), made.reasons) == (4, {"no_data": 3})

    def test_a_sample_without_a_value_makes_no_split(self, tmp_path: Path) -> None:
        rows = [(f"{n}.png", png(n)) for n in range(3)]
        rows += [(f"{n}.json", json.dumps({"part": "val" if n else "train"}).encode()) for n in range(2)] + [("2.json", b"{")]
        write_tar(tmp_path / "in/a.tar", rows)
        spec, splits = WebdatasetSpec(url=str(tmp_path / "in"), columns=("part",)), SplitSpec(by="column", column="part")
        made = shard_dataset(spec, str(tmp_path / "out"), splits, HALF)
        assert isinstance(made, DatasetManifest)
        assert (tuple(made.splits), made.reasons) == (("train", "val"), {"json": 1})

    def test_a_broken_tar_hides_no_split_folders(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "in/a.tar", [(f"{split}/x/{n}.png", png(n)) for n, split in enumerate(["train", "val"])])
        (tmp_path / "in/b.tar").write_bytes(png(5) * 9)
        spec = WebdatasetSpec(url=str(tmp_path / "in"), label="path", bad_tars="skip")
        made = shard_dataset(spec, str(tmp_path / "out"), shards=HALF)
        assert isinstance(made, DatasetManifest)
        assert (tuple(made.splits), made.classes, made.reasons) == (("train", "val"), ("x",), {"broken_tar": 1})

    def test_all_unusable_is_refused_whatever_share_is_accepted(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "in/a.tar", [("0.txt", b"a"), ("1.txt", b"b")])
        with pytest.raises(DataError, match="2 of 2 samples cannot be used; nothing was written"):
            shard_dataset(WebdatasetSpec(url=str(tmp_path / "in")), str(tmp_path / "out"), shards=ShardSpec(max_bad=1.0))
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").rglob("*.json"))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 99\n", "a Git LFS pointer: .*git lfs pull"),
        (b"<!DOCTYPE html><html><body>log in</body></html>" * 40, "an HTML page .*download it again"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "an error message in XML .*download it again"),
    ],
)
def test_what_is_in_the_place_of_a_tar_is_named(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(DataError, match=f"a.tar is .*; it is {words}"):
        shard_dataset(WebdatasetSpec(url=str(tmp_path)), str(tmp_path / "out"))


def test_a_link_that_leads_nowhere_is_one_sample_where_frames_are_samples(tmp_path: Path) -> None:
    pictures(tmp_path / "in", "a/1.png")
    (tmp_path / "in/a/2.tif").write_bytes(tiff(np.zeros((3, 8, 8), np.uint8), photometric="minisblack"))
    os.symlink("nowhere.png", tmp_path / "in/a/3.png")
    source = FolderSpec(url=str(tmp_path / "in"), frames="all", follow_links=True)
    made = shard_dataset(source, str(tmp_path / "out"), shards=HALF)
    assert isinstance(made, DatasetManifest)
    assert (made.num_samples(), made.reasons) == (4, {"broken_link": 1})


def test_a_huge_file_is_one_sample_unread_where_frames_are_samples(tmp_path: Path) -> None:
    root = pictures(tmp_path / "in", "a/1.png")
    (root / "a/huge.png").touch()
    os.truncate(root / "a/huge.png", 50 << 30)
    made = shard_dataset(FolderSpec(url=str(root), frames="all"), str(tmp_path / "out"), shards=HALF)
    assert isinstance(made, DatasetManifest)
    assert (made.num_samples(), made.reasons) == (1, {"too_large": 1})


def test_a_limit_keeps_groups_whole(tmp_path: Path) -> None:
    pictures(tmp_path / "in", *(f"p{n // 3}_{n}.png" for n in range(12)))
    source = FolderSpec(url=str(tmp_path / "in"), limit=7, group=r"regex:^(p\d)_")
    made = shard_dataset(source, str(tmp_path / "out"))
    assert isinstance(made, DatasetManifest)
    assert made.num_samples() == 6, "two groups of three"


class TestTarsThatDoNotFitIntoTheCache:
    def put(self, s3: S3) -> dict[str, bytes]:
        """Put a tar, a compressed one under the same ending, and one of `.npz`; return the bytes of each sample by its key."""
        noise, found = np.random.default_rng(0), dict[str, bytes]()
        for name in ("plain", "packed", "arrays"):
            files = []
            for n in range(4):
                file = io.BytesIO()
                np.save(file, noise.normal(size=(20, 20)))
                found[f"{name}{n}"] = file.getvalue()
                if name == "arrays":
                    file = io.BytesIO()
                    np.savez(file, x=np.load(io.BytesIO(found[f"{name}{n}"])))
                files.append((f"{name}{n}.{'npz' if name == 'arrays' else 'npy'}", file.getvalue()))
            data = write_tar(Path(os.environ["TMPDIR"]) / f"{name}.tar", files).read_bytes()
            s3.raw.put_object(Bucket=s3.bucket, Key=f"tars/{name}.tar", Body=gzip.compress(data) if name == "packed" else data)
        return found

    def test_every_kind_of_member_is_read(self, s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        found = self.put(s3)
        monkeypatch.setenv("AECORE_CACHE_BYTES", "20000")
        listing = WebdatasetSource(WebdatasetSpec(url=f"{s3.url}/tars")).listing()
        read = WebdatasetSource(WebdatasetSpec(url=f"{s3.url}/tars")).prefetch(listing.sources)
        assert {key: read(name) for key, name in zip(listing.keys, listing.sources, strict=True)} == {
            key: ("npy", data) for key, data in found.items()
        }

    def test_frames_too(self, s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pages = np.random.default_rng(1).integers(0, 256, (3, 40, 40), dtype=np.uint8)
        for number in range(2):
            data = write_tar(tmp_path / f"{number}.tar", [(f"{number}.tif", tiff(pages, photometric="minisblack"))]).read_bytes()
            s3.raw.put_object(Bucket=s3.bucket, Key=f"tars/{number}.tar", Body=data)
        monkeypatch.setenv("AECORE_CACHE_BYTES", "12000")
        made = shard_dataset(WebdatasetSpec(url=f"{s3.url}/tars", frames="all"), str(tmp_path / "out"))
        assert isinstance(made, DatasetManifest)
        assert (made.num_samples(), made.quarantined) == (6, 0)
