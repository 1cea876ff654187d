"""The same files in a folder, in a bucket and in a tar are judged by the same rules: the kind of source, files of operating systems."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from aecore.data.sources._detect import Detected, detect_source
from aecore.data.sources.arrays import ArraysSource, ArraysSpec
from aecore.data.sources.folder import BucketSource, FolderSource, FolderSpec
from aecore.data.sources.webdataset import WebdatasetSource, WebdatasetSpec
from aecore.errors import ConfigError
from pipelines.cli.main import main
from tests.aecore.data.test_external_tars import samples, write_tar
from tests.aecore.data.test_tar_kinds import tar_bytes
from tests.aecore.data.tiny import encoded, image
from tests.s3 import S3
from tests.s3.proxy import FaultProxy

OF_SYSTEMS = (
    "cat/.DS_Store",
    "cat/._1.png",
    "__MACOSX/cat/._1.png",
    "__MACOSX/2.png",
    "cat/Thumbs.db",
    "dog/desktop.ini",
    "dog/ehthumbs.db",
)


def saved(save: Callable[[io.BytesIO], None]) -> bytes:
    out = io.BytesIO()
    save(out)
    return out.getvalue()


def npy(*shape: int) -> bytes:
    return saved(lambda out: np.save(out, np.zeros(shape, np.float32)))


def tree(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


PNG, TAR = encoded(image(1)), tar_bytes(samples(0, 3))
KINDS: dict[str, tuple[dict[str, bytes], Detected]] = {
    "tars": ({"a/0.tar": TAR, "1.tar.gz": TAR, "stats.json": b"{}"}, Detected("webdataset")),
    "tars and what a Mac adds": ({"a/0.tar": TAR, "a/._0.jpg": b"x", "__MACOSX/._0.jpg": b"x", "Thumbs.db": b"x"}, Detected("webdataset")),
    "tars and pictures": ({"0.tar": TAR, "cat/1.png": PNG}, Detected("folder")),
    "pictures": ({"cat/1.png": PNG, "cat/2.JPG": PNG}, Detected("folder")),
    "a dataset of aecore": ({"shards/train-000000.tar": TAR, "dataset.000001.json": b"{}"}, Detected("folder")),
    "idx files": ({"train-images-idx3-ubyte.gz": b"x", "train-labels-idx1-ubyte.gz": b"x"}, Detected("arrays")),
    "rows in a .npy": ({"x/train.npy": npy(600, 4, 4), "x/test.npy": npy(100, 4, 4)}, Detected("arrays")),
    "a sample in each .npy": ({f"cat/{n}.npy": npy(9, 9, 3) for n in range(3)}, Detected("folder", ("npy",))),
    "rows in an .npz": (
        {f"part{n}.npz": saved(lambda out: np.savez_compressed(out, x=np.zeros((30, 4, 4)), y=np.zeros(30))) for n in range(2)},
        Detected("arrays"),
    ),
    "nothing that is known": ({"a.bin": b"x"}, Detected("folder")),
}


@pytest.mark.parametrize("what", KINDS)
def test_a_bucket_is_recognised_as_a_folder_is(s3: S3, tmp_path: Path, what: str) -> None:
    files, expected = KINDS[what]
    s3.upload(tree(tmp_path / "in", files), "in")
    assert detect_source(str(tmp_path / "in")) == expected
    assert detect_source(f"{s3.url}/in") == expected


def test_arrays_in_a_bucket_that_may_be_both_are_asked_about(s3: S3, tmp_path: Path) -> None:
    s3.upload(tree(tmp_path / "in", {f"{n}.npy": npy(1500, 8) for n in range(3)}), "in")
    for url in (str(tmp_path / "in"), f"{s3.url}/in"):
        with pytest.raises(
            ConfigError, match=rf"{url} holds 3 files of arrays such as .*: each may be one sample, or each of its 1500 rows"
        ):
            detect_source(url)


def test_an_image_ends_the_listing_and_arrays_are_not_downloaded(
    bad_s3: S3, s3_proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aecore.store._s3_prefix.PAGE", 2)
    for name in range(5):
        bad_s3.raw.put_object(Bucket=bad_s3.bucket, Key=f"pictures/{name}.png", Body=b"x")
    before = s3_proxy.seen("GET ")
    assert detect_source(f"{bad_s3.url}/pictures") == Detected("folder")
    assert s3_proxy.seen("GET ") - before == 1, "one page of the three"
    bad_s3.raw.put_object(Bucket=bad_s3.bucket, Key="arrays/a/0.npy", Body=npy(200, 200, 100))
    assert detect_source(f"{bad_s3.url}/arrays") == Detected("folder", ("npy",))
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.stat().st_size > 1 << 20]


def test_the_command_takes_tars_in_a_bucket_for_tars(s3: S3, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    s3.upload(tree(tmp_path / "in", {"train-0.tar": TAR}), "tars")
    assert main(["shard", f"{s3.url}/tars", str(tmp_path / "out"), "cluster.num_workers=0"]) == 0
    assert "train 3 samples" in capsys.readouterr().out


def test_files_of_operating_systems_are_no_samples_and_one_line_anywhere(s3: S3, tmp_path: Path) -> None:
    root = tree(tmp_path / "in", {"cat/1.png": PNG, "dog/2.png": PNG, ".git/3.png": PNG, **dict.fromkeys(OF_SYSTEMS, b"x")})
    s3.upload(root, "in")
    here = FolderSource(FolderSpec(url=str(root))).listing()
    there = BucketSource(FolderSpec(url=f"{s3.url}/in")).listing()
    assert here.sources == there.sources == ["cat/1.png", "dog/2.png"]
    assert sum("operating system" in note for note in here.notes) == sum("operating system" in note for note in there.notes) == 1
    assert sum("hidden" in note and "('.git')" in note for note in there.notes) == 1
    inside = [(name, b"x") for name in (*OF_SYSTEMS, "Thumbs.db", "__MACOSX/._cat", "__MACOSX/cat/3.cls")]
    write_tar(tmp_path / "tars/0.tar", [*samples(0, 2), *inside, ("cat/9.png", PNG)])
    found = WebdatasetSource(WebdatasetSpec(url=str(tmp_path / "tars"))).listing()
    assert (found.keys, found.unusable) == (["000000", "000001", "cat/9"], None)
    assert [note.partition(" (")[0] for note in found.notes if "operating system" in note] == ["skipped 10 files of the operating system"]


def test_arrays_and_tars_of_operating_systems_are_left_out(tmp_path: Path) -> None:
    tree(tmp_path / "arrays", {"a.npy": npy(3, 4), "__MACOSX/a.npy": b"x"})
    found = ArraysSource(ArraysSpec(url=str(tmp_path / "arrays"))).listing()
    assert len(found) == 3 and any("files of the operating system ('__MACOSX/a.npy')" in note for note in found.notes)
    tree(tmp_path / "tars", {"0.tar": TAR, "__MACOSX/0.tar": b"x"})
    for url in (tmp_path / "tars", tmp_path / "tars/**/*.tar"):
        assert len(WebdatasetSource(WebdatasetSpec(url=str(url))).listing()) == 3  # TAR holds three
