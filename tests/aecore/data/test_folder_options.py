"""What of a folder is a sample: links, globs, limit, least size, masks; the file system and the standard library say what is right."""

import fnmatch
import os
import re
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from aecore.data.dataset import open_dataset
from aecore.data.format import pixels
from aecore.data.format.index import read_table
from aecore.data.manifest import DatasetManifest
from aecore.data.read.verify import verify_dataset
from aecore.data.sources import _frames
from aecore.data.sources._filter import matcher
from aecore.data.sources._masks import mask_notes
from aecore.data.sources._other_files import kind_of_file
from aecore.data.sources.folder import FolderSource, FolderSpec
from aecore.data.sources.webdataset import WebdatasetSource, WebdatasetSpec
from aecore.data.write.job import shard_dataset
from aecore.data.write.ledger import read_ledger
from aecore.data.write.spec import ShardSpec
from aecore.errors import ConfigError, DataError
from aecore.registry import to_dict
from pipelines.cli.main import main
from tests.aecore.data.before import grows_only
from tests.aecore.data.test_sources import tree
from tests.aecore.data.tiny import encoded, image


def listed(root: Path, **options: object) -> list[str]:
    return FolderSource(FolderSpec(url=str(root), **options)).listing().sources  # type: ignore[arg-type]


def notes(root: Path, **options: object) -> str:
    return "\n".join(FolderSource(FolderSpec(url=str(root), **options)).listing().notes)  # type: ignore[arg-type]


def pictures(root: Path, *paths: str) -> Path:
    for number, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(encoded(image(number)))
    return root


class TestLinks:
    def curated(self, tmp_path: Path) -> Path:
        """A real class, one of links to files in a store of blobs, one that is a link to a folder, and links below that folder."""
        pictures(tmp_path, "in/cat/1.png", "blobs/1f", "blobs/2f", "pool/bird/1.png", "pool/bird/young/2.png", "far/3.png")
        (tmp_path / "in/dog").mkdir()
        for name in ("1", "2"):
            os.symlink(f"../../blobs/{name}f", tmp_path / f"in/dog/{name}.png")
        os.symlink("../pool/bird", tmp_path / "in/bird")
        os.symlink("../../far", tmp_path / "pool/bird/far")
        return tmp_path / "in"

    def test_links_out_of_the_folder_are_followed_when_asked(self, tmp_path: Path) -> None:
        root = self.curated(tmp_path)
        assert listed(root) == ["cat/1.png"]
        assert re.search(r"skipped 1 symbolic link to folders \('bird'\): set source.follow_links", notes(root))
        assert re.search(r"skipped 2 symbolic links .*\('dog/1.png', 'dog/2.png'\): set source.follow_links", notes(root))
        made = shard_dataset(FolderSpec(url=str(root), follow_links=True), str(tmp_path / "out"))
        assert made.classes == ("bird", "bird/far", "bird/young", "cat", "dog")
        found = listed(root, follow_links=True)
        # what the shell's own walk finds, links followed
        expected = [
            os.path.relpath(os.path.join(folder, name), root) for folder, _, names in os.walk(root, followlinks=True) for name in names
        ]
        assert found == sorted(expected) and len(found) == 6
        source = FolderSource(FolderSpec(url=str(root), follow_links=True))
        assert all(source.read(name)[1] == (root / name).resolve().read_bytes() for name in found)

    @pytest.mark.parametrize("target", [".", "..", "../..", "../../a"])
    def test_a_loop_is_refused_by_name(self, tmp_path: Path, target: str) -> None:
        root = pictures(tmp_path / "in", "a/b/1.png")
        os.symlink(target, root / "a/b/again")
        assert listed(root) == ["a/b/1.png"]
        with pytest.raises(DataError, match=r"leads back to .*links that go round in a circle are refused; remove the link"):
            listed(root, follow_links=True)
        assert listed(root, follow_links=True, exclude=("again",)) == ["a/b/1.png"]

    def test_two_links_that_lead_to_each_other_lead_nowhere(self, tmp_path: Path) -> None:
        root = pictures(tmp_path / "in", "a/1.png")
        os.symlink("y.png", root / "a/x.png")
        os.symlink("x.png", root / "a/y.png")
        assert listed(root) == ["a/1.png"]
        assert "skipped 2 symbolic links to nothing ('a/x.png', 'a/y.png')" in notes(root)

    def test_links_that_fork_at_every_level_end(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("aecore.store._links.MOST_PATHS", 50)
        for level in range(40):  # 2^40 paths
            (tmp_path / f"{level}").mkdir()
            for name in "xy":
                os.symlink(f"../{level + 1}", tmp_path / f"{level}/{name}")
        pictures(tmp_path, "40/1.png")
        started = time.process_time()
        with pytest.raises(DataError, match="more than 50 paths of links lead to one folder"):
            listed(tmp_path / "0", follow_links=True)
        assert time.process_time() - started < 60

    def test_a_link_that_leads_nowhere_is_a_row_of_the_quarantine(self, tmp_path: Path) -> None:
        root = pictures(tmp_path / "in", *(f"a/{number}.png" for number in range(9)))
        os.symlink("../../annex/gone.png", root / "a/9.png")
        os.symlink("nothing", root / "a/notes.txt")  # no sample anyway
        made = shard_dataset(FolderSpec(url=str(root), follow_links=True), str(tmp_path / "out"), shards=ShardSpec(max_bad=0.2))
        assert (made.num_samples(), made.quarantined, made.reasons) == (9, 1, {"broken_link": 1})
        (ref,) = [shard.quarantine for shard in made.shards if shard.quarantine]
        (row,) = read_table((tmp_path / "out" / ref.name).read_bytes(), "quarantine").to_pylist()
        assert verify_dataset(open_dataset(str(tmp_path / "out")), read_data=True).ok
        assert row["source"] == "a/9.png" and "annex/gone.png" in row["message"] and row["sha256"] is None

    def test_a_file_that_goes_after_listing_is_no_broken_link(self, tmp_path: Path) -> None:
        root = pictures(tmp_path / "in", "a/1.png")
        source = FolderSource(FolderSpec(url=str(root), follow_links=True))
        (root / "a/1.png").unlink()
        with pytest.raises(FileNotFoundError):
            source.read("a/1.png")


NAMES = st.text(st.sampled_from("ab.[]!-^\\*?é "), min_size=1, max_size=6).filter(lambda name: name not in (".", ".."))


class TestFilters:
    FILES = ("train/cat/1.png", "train/cat/1_mask.png", "train/dog/10.png", "test/cat/2.png", "thumbnails/1.png", "thumbnails/deep/2.png")

    @pytest.mark.parametrize(
        ("include", "exclude", "expected"),
        [
            ((), (), (0, 1, 2, 3, 4, 5)),
            (("train",), (), (0, 1, 2)),
            (("train/*/1*.png",), ("*_mask.png",), (0, 2)),
            (("**/cat/*",), (), (0, 1, 3)),
            ((), ("thumbnails",), (0, 1, 2, 3)),
            ((), ("thumbnails/*.png",), (0, 1, 2, 3, 5)),
            (("*.{png,jpg}",), ("{test,thumbnails}/**",), (0, 1, 2)),
            (("[12].png",), (), (0, 3, 4, 5)),
            (("?.png",), ("t*/deep",), (0, 3, 4)),
            (("./train/cat/",), (), (0, 1)),
        ],
    )
    def test_globs_choose_files_and_folders(self, tmp_path, include, exclude, expected) -> None:
        tree(tmp_path, *self.FILES)
        assert listed(tmp_path, include=include, exclude=exclude) == sorted(self.FILES[row] for row in expected)

    @given(NAMES, NAMES)
    @example("[!a]", "b")
    @example("a]", "a]")
    def test_a_pattern_of_one_name_means_what_fnmatch_says(self, pattern: str, name: str) -> None:
        try:
            matches = matcher([pattern], "source.include")
        except ConfigError:
            return
        if "[" in pattern or "^" in pattern:  # fnmatch knows no [^a], and takes a bad range for an empty one
            return
        wanted = pattern.removeprefix("./")
        assert matches(name) == fnmatch.fnmatchcase(name, wanted)
        assert matches(f"folder/{name}/x") >= fnmatch.fnmatchcase(name, wanted)

    def test_one_glob_needs_no_brackets(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """As a shell hands it over, without its quotes: in YAML `*` would begin an alias."""
        pictures(tmp_path / "in", "a/1.png", "a/1_mask.png")
        assert FolderSpec(url="x", exclude="*_mask.png") == FolderSpec(url="x", exclude=("*_mask.png",))
        command = ["shard", str(tmp_path / "in"), str(tmp_path / "out"), "--dry-run", "--json", "source.exclude=*_mask.png"]
        assert main(command) == 0
        assert '"train": 1' in capsys.readouterr().out

    @pytest.mark.parametrize("pattern", ["", "/", "{a", "a{b,{c}}", "[z-a]"])
    def test_a_pattern_that_cannot_be_one_is_refused(self, pattern: str) -> None:
        with pytest.raises(ConfigError):
            FolderSpec(url="x", exclude=(pattern,))

    def test_what_is_left_out_is_counted_and_a_misspelt_pattern_is_named(self, tmp_path: Path) -> None:
        tree(tmp_path, *self.FILES)
        said = notes(tmp_path, exclude=("*_mask.png", "tumbnails"), include=("train",))
        assert "skipped 1 file that source.exclude matches ('train/cat/1_mask.png')" in said
        assert "skipped 3 files that source.include does not match ('thumbnails/1.png', 'test/cat/2.png', 'thumbnails/deep/2.png')" in said
        assert "source.exclude has 'tumbnails', which matches no file" in said
        with pytest.raises(DataError, match=r"skipped 6 files that source.include does not match .*\n.*'trian', which matches no file"):
            listed(tmp_path, include=("trian",))

    def test_an_excluded_folder_is_not_opened(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        tree(tmp_path, "a/1.png", "secret/2.png")
        opened = os.open
        monkeypatch.setattr(os, "open", lambda path, *rest, **more: 1 / 0 if str(path).endswith("secret") else opened(path, *rest, **more))
        assert listed(tmp_path, exclude=("secret",)) == ["a/1.png"]

    def test_small_files_are_left_out(self, tmp_path: Path) -> None:
        for size in (0, 9, 10, 11):
            tree(tmp_path, f"a/{size}.png", data=bytes(size))
        assert listed(tmp_path, min_size=10) == ["a/10.png", "a/11.png"]
        assert "skipped 2 files of less than source.min_size=10 bytes ('a/0.png', 'a/9.png')" in notes(tmp_path, min_size=10)

    def test_a_limit_takes_some_of_every_folder_and_always_the_same(self, tmp_path: Path) -> None:
        tree(tmp_path, *(f"{name}/{number:03d}.png" for name in "abcd" for number in range(100)))
        some = listed(tmp_path, limit=100)
        assert len(some) == 100 and some == listed(tmp_path, limit=100) and set(some) <= set(listed(tmp_path, limit=200))
        assert all(10 <= sum(path.startswith(name) for path in some) <= 45 for name in "abcd")  # 25 +- 4.6
        assert len(listed(tmp_path, limit=1000)) == 400
        bags = FolderSource(FolderSpec(url=str(tmp_path), limit=250, group="parent")).listing()
        assert len(bags) == 200 and all(bags.groups.count(bag) == 100 for bag in set(bags.groups))

    def test_the_options_are_in_the_identity_only_when_they_are_used(self, tmp_path: Path) -> None:
        used = FolderSpec(url="x", follow_links=True, include=("a",), exclude=("b",), min_size=1, limit=5)
        assert set(to_dict(used, identity_only=True)) - set(to_dict(FolderSpec(url="x"), identity_only=True)) == {
            "follow_links",
            "include",
            "exclude",
            "min_size",
            "limit",
        }
        assert "limit" not in to_dict(FolderSpec(url="x"), identity_only=True)

    def test_without_options_no_file_is_looked_at(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        tree(tmp_path, *(f"a/{number}.png" for number in range(50)))
        looked: list[str] = []
        for call in ("stat", "lstat"):
            real = getattr(os, call)
            monkeypatch.setattr(os, call, lambda path, *rest, real=real, **more: (looked.append(str(path)), real(path, *rest, **more))[1])
        listed(tmp_path)
        assert not [path for path in looked if path.endswith(".png")]


class TestMasks:
    @pytest.mark.parametrize(
        ("paths", "pattern"),
        [
            (("a/1.jpg", "a/1_mask.png", "a/2.jpg", "a/2_mask.png"), "*_mask.png"),
            (("a/1.png", "a/1-seg.PNG"), "*-seg.PNG"),
            (("images/1.jpg", "masks/1.png", "images/2.jpg", "masks/2.png"), "masks"),
            (("train/images/1.jpg", "train/labels/1.png"), "labels"),
            (("a/1.jpg", "a/1.png", "a/2.jpeg", "a/2.png"), "*.png"),
        ],
    )
    def test_masks_next_to_images_are_named_and_the_advice_leaves_them_out(self, tmp_path: Path, paths, pattern: str) -> None:
        tree(tmp_path, *paths)
        assert re.search(
            rf"files? ha(?:ve|s) the name of another sample and may be masks .*source.exclude='{re.escape(pattern)}'", notes(tmp_path)
        )
        assert len(listed(tmp_path, exclude=(pattern,))) == len(paths) / 2
        assert "may be masks" not in notes(tmp_path, exclude=(pattern,))

    @pytest.mark.parametrize("paths", [("mask/1.png", "no_mask/2.png"), ("a/mask.png", "a/1.png"), ("a/1.png", "b/1.jpg"), ("gt/1.png",)])
    def test_classes_that_are_called_so_are_no_masks(self, tmp_path: Path, paths) -> None:
        tree(tmp_path, *paths)
        assert "may be masks" not in notes(tmp_path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    st.lists(
        st.lists(
            st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=12), min_size=1, max_size=3
        ),
        min_size=1,
        max_size=8,
    )
)
def test_whatever_files_are_called_each_is_one_sample_with_its_bytes(tmp_path_factory, names) -> None:
    """Round trip over names: the sources are the paths that were written, their keys differ, and each reads its own bytes."""
    root, written = tmp_path_factory.mktemp("names"), dict[str, bytes]()
    for number, parts in enumerate(names):
        path = "/".join(parts) + ".png"
        if any(part.startswith(".") or len(part.encode()) > 60 for part in path.split("/")):
            continue
        try:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(b"%d" % number)
        except (FileExistsError, NotADirectoryError, IsADirectoryError):
            continue
        written[path] = b"%d" % number
    written = {path: (root / path).read_bytes() for path in written}
    if not written:
        return
    source = FolderSource(FolderSpec(url=str(root)))
    listing = source.listing()
    assert {name: source.read(name)[1] for name in listing.sources} == written
    assert len(set(listing.keys)) == len(written)
    assert listing.label_names == [name.rpartition("/")[0] for name in listing.sources]


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("a.zip", "unpack"),
        ("a.tar.gz", "webdataset"),
        ("a.heic", "convert"),
        ("a.JP2", "convert"),
        ("a.CR2", "develop"),
        ("a.nii.gz", "voxels"),
        ("a.dcm", "voxels"),
        ("a.svs", "export"),
        ("a.h5", "save each sample as .npy"),
        ("a.mat", "save each sample as .npy"),
        ("a.parquet", "write their images"),
        ("a.pkl", "numpy.save"),
        ("a.mp4", "extract their frames"),
        ("a.wav", "sequence"),
        ("a.csv", "sequences"),
        ("a.svg", "render"),
        ("a.npy", "source.extensions="),
        ("train-images-idx3-ubyte.gz", "source.kind=arrays"),
        ("a.jfif", "rename"),
        ("README", "extension"),
        ("a.xyz", "convert"),
    ],
)
def test_every_kind_of_file_that_is_not_read_says_what_to_do(tmp_path: Path, name: str, word: str) -> None:
    assert word in kind_of_file(name)[1]
    tree(tmp_path, "a/1.png", *(f"a/{number}-{name}" for number in range(20)))
    lines = FolderSource(FolderSpec(url=str(tmp_path))).listing().notes
    assert len(lines) == 1 and "skipped 20 " in lines[0] and lines[0].count(f"-{name}") == 3 and word in lines[0]


def test_thousands_of_odd_files_are_one_line(tmp_path: Path) -> None:
    tree(tmp_path, "a/1.png", *(f"a/{number}.{number % 700}x" for number in range(2000)))
    (line,) = FolderSource(FolderSpec(url=str(tmp_path))).listing().notes
    assert line.startswith("skipped 2000 files of unknown extensions (") and len(line) < 300


def test_an_address_that_is_a_file_says_what_to_give(tmp_path: Path) -> None:
    tree(tmp_path, "a/1.png", "a/1.h5", "a/1.npy", data=b"x")
    for name, message in (("1.png", rf"is one image: give the folder that holds it, {tmp_path}/a"), ("1.h5", "save each sample as .npy")):
        with pytest.raises(DataError, match=message):
            listed(tmp_path / "a" / name)
    with pytest.raises(DataError, match="source.kind=arrays"):
        listed(tmp_path / "a/1.npy")


def test_the_advice_about_arrays_is_taken(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(3):
        np.save(tmp_path / f"in/{number}.npy", np.full((4, 4, 5), number, np.float32))
    with pytest.raises(DataError, match=r"source.extensions=\[npy\] takes each file as one sample") as raised:
        listed(tmp_path / "in")
    advised = re.search(r"source\.extensions=\[(\w+)\]", str(raised.value))
    assert advised is not None
    assert len(listed(tmp_path / "in", extensions=(advised[1],))) == 3


def test_masks_in_a_folder_of_each_patient_are_found_in_linear_time():
    def seconds(num_patients: int) -> float:
        folders = [f"{patient:05d}/{kind}" for patient in range(num_patients) for kind in ("image", "mask")]
        started = time.process_time()
        (note,) = mask_notes([f"{folder}/1.png" for folder in folders], folders)
        assert note.startswith(f"{num_patients} files have the name of another sample and may be masks of it (00000/mask/1.png")
        assert "source.exclude='mask'" in note
        return time.process_time() - started

    seconds(10)
    assert seconds(16_000) < 60 * max(seconds(1000), 0.002), "sixteen times as many; 256 times as long if each is compared with each"


def test_a_folder_of_masks_belongs_to_the_folders_around_the_same_names():
    paths = ["a/image/x/1.png", "a/Masks/x/1.png", "b/image/x/2.png", "b/masks/y/2.png", "c/masks/3.png", "c/gt/3.png", "masks/4.png"]
    (note,) = mask_notes(paths[:4], [path.rpartition("/")[0] for path in paths[:4]])
    assert note.startswith("1 file has") and "(a/Masks/x/1.png)" in note
    assert len(mask_notes(paths, [path.rpartition("/")[0] for path in paths])) == 3


@pytest.mark.parametrize("name", ["a/._0.jpg", "a/.DS_Store", "__MACOSX/a/0.jpg", "Thumbs.db"])
def test_metadata_of_operating_systems_is_named_as_that(name):
    assert kind_of_file(name) == ("files of the operating system", "")


def test_advice_about_masks_does_not_leave_out_the_samples() -> None:
    """A `.png` next to a `.jpg` of its name may be a mask of it; where most `.png` are pictures their pattern is no advice."""
    paths = sorted(["a/1.jpg", "a/1.png", *(f"a/{number}.png" for number in range(2, 9))])
    (note,) = mask_notes(paths, ["a"] * len(paths))
    assert "1 file has" in note and "exclude='" not in note and "name them in source.exclude" in note
    paths = sorted(["a/1.jpg", "a/1.png", "a/2.jpg", "a/2.png", "a/3.png"])
    (note,) = mask_notes(paths, ["a"] * len(paths))
    assert note.endswith("source.exclude='*.png' leaves them out, and 1 file with them")


def keys_of(root: Path) -> list[str]:
    dataset = open_dataset(str(root / "out"))
    return sorted(read_ledger(dataset.store, dataset.manifest)["key"].to_pylist())


class TestGrowth:
    """What another run adds to a dataset with `source.limit` or `source.frames`."""

    def shard(self, root: Path, **options: object) -> list[str]:
        spec = FolderSpec(url=str(root / "in"), extensions=("png", "gif"), **options)  # type: ignore[arg-type]
        shard_dataset(spec, str(root / "out"))
        return keys_of(root)

    def animated(self, path: Path, *numbers: int) -> None:
        frames = [Image.fromarray(np.full((4, 4), 9 * number, np.uint8)) for number in numbers]
        path.parent.mkdir(parents=True, exist_ok=True)
        frames[0].save(path, save_all=True, append_images=frames[1:])

    @pytest.mark.parametrize(("before", "after"), [((1,), (1, 2, 3)), ((1, 2, 3), (1,))])
    def test_a_file_with_another_number_of_frames_has_changed(self, tmp_path: Path, before, after) -> None:
        pictures(tmp_path, "in/x/b.png")
        self.animated(tmp_path / "in/x/a.gif", *before)
        first = self.shard(tmp_path, frames="all")
        grows_only(tmp_path / "out")
        self.animated(tmp_path / "in/x/a.gif", *after)
        with pytest.raises(DataError, match="another number of pages or frames .*'x/a.gif"):
            self.shard(tmp_path, frames="all")
        assert keys_of(tmp_path) == first
        self.animated(tmp_path / "in/x/a.gif", *before)
        self.animated(tmp_path / "in/x/c.gif", 4, 5)
        assert len(self.shard(tmp_path, frames="all")) == len(first) + 2

    @pytest.mark.parametrize(("before", "after"), [(3, 6), (6, 3)])
    def test_a_file_that_grew_by_frames_of_the_same_bytes_has_changed(self, tmp_path: Path, before: int, after: int) -> None:
        """The bytes of a frame, which are a share of the file's, stay the same: the number of its frames tells."""
        pictures(tmp_path, "in/x/b.png")
        for number in (before, after):
            self.animated(tmp_path / "in/x/a.gif", *range(number))
            with (tmp_path / "in/x/a.gif").open("ab") as file:
                file.truncate(1000 * number)
            if number == before:
                first = self.shard(tmp_path, frames="all")
                grows_only(tmp_path / "out")
        with pytest.raises(DataError, match="another number of pages or frames .*'x/a.gif"):
            self.shard(tmp_path, frames="all")
        assert keys_of(tmp_path) == first

    @pytest.mark.parametrize("name", ["a.gif", "a.tif", "large.gif"])
    def test_a_file_of_too_many_frames_is_one_row_of_the_quarantine(self, tmp_path: Path, name: str) -> None:
        pictures(tmp_path, *(f"in/x/{number}.png" for number in range(3)))
        side = 40 if name == "large.gif" else 8
        frames = [Image.fromarray(np.full((side, side), number % 256, np.uint8)) for number in range(9 if side == 40 else 300)]
        frames[0].save(tmp_path / "in/x" / name, save_all=True, append_images=frames[1:], compression="tiff_lzw")
        spec = FolderSpec(url=str(tmp_path / "in"), extensions=("png", "gif", "tif"), frames="all")
        shards = ShardSpec(max_bad=0.3, max_pixels=64)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pixels, "TOTAL_PER_BYTE", 0)
            made = shard_dataset(spec, str(tmp_path / "out"), shards=shards)
            assert isinstance(made, DatasetManifest)
            assert (made.num_samples(), made.reasons) == (3, {"too_large": 1})
            assert shard_dataset(spec, str(tmp_path / "out"), shards=shards) == made, "nothing is new"

    def test_a_dataset_with_a_row_for_each_refused_frame_goes_on(self, tmp_path: Path) -> None:
        """As they were written before a file of too many frames was one row."""
        pictures(tmp_path, "in/x/b.png")
        self.animated(tmp_path / "in/x/a.gif", *range(9))
        spec = FolderSpec(url=str(tmp_path / "in"), extensions=("png", "gif"), frames="all")
        shards = ShardSpec(max_bad=0.95, max_pixels=16)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pixels, "TOTAL_PER_BYTE", 0)
            with pytest.MonkeyPatch.context() as before:
                before.setattr(_frames, "require_frames", lambda *_: None)
                shard_dataset(spec, str(tmp_path / "out"), shards=shards)
            made = grows_only(tmp_path / "out")
            assert (made.num_samples(), made.reasons) == (1, {"too_large": 9})
            assert shard_dataset(spec, str(tmp_path / "out"), shards=shards) == made, "nothing is new"
            self.animated(tmp_path / "in/x/a.gif", *range(20))
            with pytest.raises(DataError, match="another number of pages or frames"):
                shard_dataset(spec, str(tmp_path / "out"), shards=shards)

    def test_a_limit_is_that_of_the_dataset(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        pictures(tmp_path, *(f"in/x/{number}.png" for number in range(3)))
        first = self.shard(tmp_path, limit=5)
        assert len(first) == 3
        grows_only(tmp_path / "out")
        pictures(tmp_path, *(f"in/x/{number}.png" for number in range(40)))
        with caplog.at_level("INFO"):
            grown = self.shard(tmp_path, limit=5)
        assert len(grown) == 5 and set(first) < set(grown)
        assert "left out, since source.limit=5 counts all samples of the dataset, and it has 3" in caplog.text
        assert self.shard(tmp_path, limit=5) == grown

    def test_a_limit_counts_frames(self, tmp_path: Path) -> None:
        for name in "ab":
            self.animated(tmp_path / f"in/x/{name}.gif", 1, 2, 3)
        assert len(self.shard(tmp_path, limit=2, frames="all")) == 2
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            tar.add(tmp_path / "in/x", "x")
        assert len(WebdatasetSource(WebdatasetSpec(url=str(tmp_path / "a.tar"), limit=2, frames="all")).listing()) == 2
        assert "0 files" not in notes(pictures(tmp_path / "single", "x/a.png"), frames="all")


@given(glob=st.text("ab*?/[]!", min_size=1, max_size=10), path=st.text("ab/", min_size=1, max_size=12))
def test_stars_match_as_they_would_with_all_ways_tried(glob: str, path: str) -> None:
    assume(glob.strip("/") and "[" not in glob.replace("[ab]", "").replace("[!a]", ""))

    def plain(token: str) -> str:
        meaning = {"**/": "(?:[^/]*/)*", "**": ".*", "*": "[^/]*", "?": "[^/]", "[ab]": "[ab]", "[!a]": "[^/a]"}
        return meaning.get(token, re.escape(token))

    text = glob.rstrip("/")
    one = "".join(map(plain, re.findall(r"\*\*/|\*\*|\*|\?|\[ab\]|\[!a\]|.", text.removeprefix("/"))))
    expected = re.fullmatch(f"(?:.*/)?{one}(?:/.*)?" if "/" not in text else f"{one}(?:/.*)?", path)
    assert matcher([glob], "x")(path) == (expected is not None)


@pytest.mark.parametrize("glob", ["*[+-9]*", "a[!b]c", "a[+-9]c"])
def test_a_range_that_has_the_slash_in_it_stays_within_a_name(glob: str) -> None:
    assert matcher([glob], "x")("a.c") and not matcher([f"x/{glob}"], "x")("x/a/c")


def test_a_glob_takes_linear_time() -> None:
    takes = matcher(["*_mask*_*_*.png"], "x")
    started = time.process_time()
    assert not takes("_mask" * 800) and takes("_mask" * 800 + "__x.png")
    assert time.process_time() - started < 1, "minutes before"
