"""The same files in a folder, in a bucket and in a tar are judged by the same rules: the kind of source, files of operating systems."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aecore.data.dataset import open_dataset
from aecore.data.read.verify import verify_dataset
from aecore.data.sources import Listing
from aecore.data.sources._detect import Detected, detect_source
from aecore.data.sources.arrays import ArraysSource, ArraysSpec
from aecore.data.sources.folder import BucketSource, FolderSource, FolderSpec
from aecore.data.sources.webdataset import WebdatasetSource, WebdatasetSpec
from aecore.data.write.job import adopt_shards, shard_dataset
from aecore.errors import ConfigError, DataError
from aecore.registry import to_dict
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
    "a dataset of aecore": ({"shards/train-000000.tar": TAR, "dataset.000001.json": b"{}"}, Detected("dataset")),
    "a folder with one below it": ({"0.tar": TAR, "root/dataset/dataset.000001.json": b"{}"}, Detected("folder")),
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
    assert len(found) == 3 and any("file of the operating system ('__MACOSX/a.npy')" in note for note in found.notes)
    tree(tmp_path / "tars", {"0.tar": TAR, "__MACOSX/0.tar": b"x"})
    for url in (tmp_path / "tars", tmp_path / "tars/**/*.tar"):
        assert len(WebdatasetSource(WebdatasetSpec(url=str(url))).listing()) == 3  # TAR holds three


def numbered(root: Path) -> Path:
    """Two tars: each of 4 pictures in folders cat and dog, with masks of other samples, labels, and what cannot be used."""
    for tar in range(2):
        files = [
            (f"{kind}/{tar}{n}.{ext}", data) for n in range(2) for kind in ("cat", "dog") for ext, data in (("png", PNG), ("cls", b"1"))
        ]
        bad = [("cat/bad.cls", b"1"), ("dog/x.y_mask.png", PNG)]
        write_tar(root / f"{tar}.tar", [*files, *bad])
    return root


class TestFilters:
    @pytest.mark.parametrize(
        ("options", "expected", "line"),
        [
            ({"include": "cat"}, {"cat/00", "cat/01", "cat/10", "cat/11", "cat/bad"}, "6 samples that source.include does not match"),
            ({"include": ("cat/*1.png",)}, {"cat/01", "cat/11"}, "10 samples that source.include does not match"),
            ({"include": "1.tar/dog/*.png"}, {"dog/10", "dog/11", "dog/x%2Ey_mask"}, "3 samples that source.include does not match"),
            (
                {"exclude": ("0.tar", "bad.*")},
                {"cat/10", "cat/11", "dog/10", "dog/11", "dog/x%2Ey_mask"},
                "skipped 1 tar that source.exclude",
            ),
            ({"exclude": "*.{cls,y_mask.png}"}, {f"{k}/{t}{n}" for k in ("cat", "dog") for t in "01" for n in "01"}, "4 samples that"),
            ({"min_size": 10_000}, {"cat/bad"}, "10 samples of less than source.min_size=10000 bytes"),
        ],
    )
    def test_tars_here_and_in_a_bucket(self, s3: S3, tmp_path: Path, options: dict, expected: set[str], line: str) -> None:
        s3.upload(numbered(tmp_path / "in"), "in")
        for url in (str(tmp_path / "in"), f"{s3.url}/in"):
            found = WebdatasetSource(WebdatasetSpec(url=url, keys="shard", **options)).listing()
            assert {key.partition("/")[2] for key in found.keys} == expected
            assert any(line in note for note in found.notes), found.notes

    @pytest.mark.parametrize(
        ("include", "opened"),
        [
            ("1.tar", "1"),
            (("./1.tar/dog",), "1"),
            ("{1,2}.tar/dog/*.png", "12"),
            ("a/*.tar", "3"),
            (("a/?.tar/**", "[12].tar"), "123"),
            ("**/4.tar.gz/*.png", ""),
            (("1.tar", "*.png"), None),
            ("a", None),
            ("dog/*.png", None),
        ],
    )
    def test_a_tar_that_include_cannot_match_is_not_opened(
        self, tmp_path: Path, include: tuple[str, ...] | str, opened: str | None
    ) -> None:
        tars = {"0": "0.tar", "1": "1.tar", "2": "2.tar", "3": "a/3.tar"}
        numbered(tmp_path / "one")
        for name in tars.values():
            (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "in" / name).write_bytes((tmp_path / "one/1.tar").read_bytes())
        spec = WebdatasetSpec(url=str(tmp_path / "in"), keys="shard", include=include)
        whole = WebdatasetSource(spec).listing() if opened != "" else None
        for number, name in tars.items():
            path = tmp_path / "in" / name
            good = path.read_bytes()
            path.write_bytes(b"damaged" * 200)
            if opened is None or number in opened:
                with pytest.raises(DataError, match=f"{name} is not a tar"):
                    WebdatasetSource(spec).listing()
            elif whole is None:
                with pytest.raises(
                    DataError, match=r"holds no sample in 4 tars \(4 tars that source.include does not match, .*matches no file"
                ):
                    WebdatasetSource(spec).listing()
            else:
                found = WebdatasetSource(spec).listing()
                assert (found.keys, found.sources, found.notes) == (whole.keys, whole.sources, whole.notes)
            path.write_bytes(good)

    def test_a_limit_is_the_same_anywhere_and_spread_over_all_tars(self, s3: S3, tmp_path: Path) -> None:
        for tar in range(4):
            write_tar(tmp_path / f"in/{tar}.tar", samples(100 * tar, 50))
        s3.upload(tmp_path / "in", "in")
        here, there = (WebdatasetSource(WebdatasetSpec(url=url, limit=40)).listing() for url in (str(tmp_path / "in"), f"{s3.url}/in"))
        assert here.without_states().sha256() == there.without_states().sha256() and len(here) == 40
        assert {source.partition("#")[0] for source in here.sources} == {f"{tar}.tar" for tar in range(4)}
        assert any("160 of 200 samples left out by source.limit=40" in note for note in here.notes)
        grouped = WebdatasetSource(WebdatasetSpec(url=str(tmp_path / "in"), limit=40, group="regex:(\\d{5})\\d$")).listing()
        assert len(grouped) == 40 and len({key[:5] for key in grouped.keys}) == 4, "whole groups of ten"

    def test_what_is_chosen_is_stored_and_adopted(self, tmp_path: Path) -> None:
        numbered(tmp_path / "in")
        for write in (shard_dataset, adopt_shards):
            made = write(WebdatasetSpec(url=str(tmp_path / "in"), include="*.png", exclude="*_mask.png"), str(tmp_path / write.__name__))
            assert made.num_samples() == 8 and made.quarantined == 0
            assert verify_dataset(open_dataset(str(tmp_path / write.__name__)), read_data=True).problems == ()

    def test_nothing_left_names_the_patterns(self, tmp_path: Path) -> None:
        numbered(tmp_path / "in")
        with pytest.raises(
            DataError, match=r"holds no sample in 2 tars \(12 samples that source.include does not match, .*'cta', which matches"
        ):
            WebdatasetSource(WebdatasetSpec(url=str(tmp_path / "in"), include="cta")).listing()
        with pytest.raises(ConfigError, match=r"source.exclude has the pattern ''"):
            WebdatasetSpec(exclude=("",))

    def test_arrays_here_and_in_a_bucket(self, s3: S3, tmp_path: Path) -> None:
        files = {"x_train.npy": npy(30, 4), "x_test.npy": npy(20, 4), "old/x_train.npy": npy(5, 4), "b/tiny.npy": npy(1, 1)}
        labels = saved(lambda out: np.save(out, np.arange(30)))
        s3.upload(tree(tmp_path / "in", {**files, "y_train.npy": labels}), "in")
        for url in (str(tmp_path / "in"), f"{s3.url}/in"):
            found = ArraysSource(ArraysSpec(url=url, include=("x_*",), exclude="old", min_size=200)).listing()
            assert len(found) == 50 and any("file that source.exclude matches ('old/x_train.npy')" in note for note in found.notes)
            assert found.label_names is not None and set(found.label_names) == {"", *map(str, range(30))}, "labels are no samples"
            few = ArraysSource(ArraysSpec(url=url, include="x_train.npy", exclude="old", limit=7)).listing()
            assert len(few) == 7 and len(set(few.label_names or ())) == 7
        with pytest.raises(DataError, match=r"(?s)holds no .npy.*file of less than source.min_size=9999 bytes"):
            ArraysSource(ArraysSpec(url=str(tmp_path / "in/x_train.npy"), min_size=9999)).listing()

    @pytest.mark.parametrize("single", [False, True])
    def test_labels_of_arrays_stay_and_are_no_data(self, tmp_path: Path, single: bool) -> None:
        labels = saved(lambda out: np.save(out, np.arange(30)))
        old = {"old/b-images.npy": npy(3, 4), "old/b-labels.npy": labels}
        root = tree(tmp_path / "in", {"a-images.npy": npy(30, 4), "a-labels.npy": labels, **old})
        url = str(root / "a-images.npy" if single else root)

        def listed(**options: Any) -> Listing:
            return ArraysSource(ArraysSpec(url=url, **options)).listing()

        for options, why in (
            ({"exclude": "*-images.npy"}, r"files? that source.exclude matches \('a-images.npy'"),
            ({"min_size": 1 << 20}, r"files? of less than source.min_size=1048576 bytes"),
            ({"include": "*-labels.npy"}, r"files? that source.include does not match"),
        ):
            with pytest.raises(DataError, match=rf"(?s)holds no .npy.* that is taken as samples:\n  skipped \d {why}") as raised:
                listed(**options)
            assert "matches no file" not in str(raised.value)
        found = listed(exclude=("*-labels.npy", "old"))
        assert len(found) == 30 and found.label_names == [str(number) for number in range(30)]
        notes = [note for note in found.notes if "labels" in note or "no file" in note]
        kept = "1 file of labels that source.exclude matches, which stay with their arrays ('a-labels.npy'): move them away"
        assert notes[0].startswith(kept)
        assert notes[1:] == (["source.exclude has 'old', which matches no file: check it"] if single else [])

    def test_labels_alone_are_named(self, tmp_path: Path) -> None:
        tree(tmp_path / "in", {"a-labels.npy": npy(3, 4)})
        for options in ({}, {"min_size": 1 << 20}):
            with pytest.raises(DataError, match=r"holds labels and no samples \(a-labels.npy\): add the file of the images"):
                ArraysSource(ArraysSpec(url=str(tmp_path / "in"), **options)).listing()

    @pytest.mark.parametrize("spec", [WebdatasetSpec, ArraysSpec, FolderSpec])
    def test_what_is_not_set_is_not_in_the_identity(self, spec: type) -> None:
        assert not {"include", "exclude", "min_size", "limit"} & to_dict(spec(url="x"), identity_only=True).keys()
        assert {"limit", "exclude"} <= to_dict(spec(url="x", limit=3, exclude="a"), identity_only=True).keys()
