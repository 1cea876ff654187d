"""External WebDataset shards: read, sharded again, adopted in place. Written here by webdataset itself and by tarfile."""

import gzip
import hashlib
import io
import itertools
import json
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from aecore.data import as_webdataset
from aecore.data.dataset import open_dataset
from aecore.data.format.bad_sample import BadSample
from aecore.data.format.index import MEMBERS
from aecore.data.manifest import DatasetManifest
from aecore.data.read.loader import InputSpec, Loader
from aecore.data.read.verify import verify_dataset
from aecore.data.sources import Listing
from aecore.data.sources._external_tars import ExternalTars
from aecore.data.sources._names import expand_braces, split_of
from aecore.data.sources._skipped import Skipped
from aecore.data.sources._tar_file import TarFile
from aecore.data.sources.folder import FolderSpec
from aecore.data.sources.webdataset import WebdatasetSource, WebdatasetSpec
from aecore.data.write.job import adopt_shards, shard_dataset
from aecore.data.write.spec import ShardSpec
from aecore.data.write.splits import SplitSpec
from aecore.errors import ConfigError, DataError, StoreError
from tests.aecore.data.before import grows_only
from tests.aecore.data.tiny import encoded, image

Files = list[tuple[str, bytes]]


def samples(first: int, count: int, **extra: Callable[[int], bytes]) -> Files:
    """Return members of images `image(n)` with key `n` and label n % 3."""
    files: Files = []
    for number in range(first, first + count):
        members = {"png": encoded(image(number)), "cls": b"%d" % (number % 3)} | {ext: make(number) for ext, make in extra.items()}
        files += [(f"{number:06d}.{ext}", data) for ext, data in members.items()]
    return files


def write_tar(path: Path, files: Files, mode: str = "w", format: int = tarfile.USTAR_FORMAT, mtime: float = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, format=format) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), mtime
            tar.addfile(info, io.BytesIO(data))
    return path


def two_tars(root: Path) -> Path:
    write_tar(root / "00000.tar", samples(0, 30))
    write_tar(root / "00001.tar", samples(30, 20))
    return root


def listing(url: Path | str, **options: Any) -> Listing:
    return WebdatasetSource(WebdatasetSpec(url=str(url), **options)).listing()


def unusable(found: Listing) -> list[BadSample | None]:
    return found.unusable or [None] * len(found)


def reason(why: BadSample | None) -> str:
    return "" if why is None else why.reason


def adopt(url: Path, out: Path, **options: Any) -> DatasetManifest:
    made = adopt_shards(WebdatasetSpec(url=str(url)), str(out), **options)
    assert isinstance(made, DatasetManifest)
    return made


def pixels(url: Path, split: str = "train") -> dict[str, tuple[bytes, int]]:
    """Return pixels and label by key, as training reads them."""
    dataset, found = open_dataset(str(url)), {}
    with Loader(dataset, split, spec=InputSpec(prefetch=0, cache="none")) as loader:
        batches = list(loader.range_batches(0, loader.num_samples, 16))
        keys = [key for shard in dataset.manifest.split(split) for key in loader.index(shard)["key"].to_pylist()]
    rows = [row for batch in batches for row in zip(batch.x, batch.label, strict=True)]
    for key, (x, label) in zip(keys, rows, strict=True):
        found[key] = x.numpy().tobytes(), int(label)
    return found


def hashes(folder: Path) -> dict[str, tuple[str, int, int]]:
    """Return content, inode and time of change of every tar."""
    return {
        str(path): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_ino, path.stat().st_mtime_ns)
        for path in folder.rglob("*.tar")
    }


EXPECTED = {f"{number:06d}": (image(number).tobytes(), number % 3) for number in range(50)}


class TestSource:
    @pytest.mark.parametrize("options", [{}, {"mtime": 0}])  # by default the time is a float, which takes PAX headers
    def test_what_webdataset_writes(self, tmp_path: Path, options: dict) -> None:
        from webdataset import ShardWriter

        with ShardWriter(str(tmp_path / "in-%05d.tar"), maxcount=20, verbose=0, **options) as writer:
            for number in range(50):
                fields = {"caption": f"number {number}"}
                writer.write({"__key__": f"{number:06d}", "png": encoded(image(number)), "cls": number % 3, "json": fields, "txt": "a b"})
        found = listing(tmp_path, columns=("caption", "txt"))
        assert found.keys == list(EXPECTED)
        assert found.columns["caption"].tolist() == [f"number {number}" for number in range(50)]
        assert set(found.columns["txt"].tolist()) == {"a b"}
        shard_dataset(WebdatasetSpec(url=str(tmp_path)), str(tmp_path / "ds"), shards=ShardSpec(max_samples=17))
        assert pixels(tmp_path / "ds") == EXPECTED

    def test_what_img2dataset_writes(self, tmp_path: Path) -> None:
        """Keys of nine digits, a caption, and a .json with fields that have the names of our own columns."""
        for shard in range(2):
            files: Files = []
            for row in range(5):
                key = f"{shard:05d}{row:04d}"
                fields = {"caption": f"c{row}", "url": "http://x", "key": key, "width": 4, "score": None if row else 0.5, "exif": {"a": 1}}
                files += [(f"{key}.jpg", encoded(image(row, 16), "JPEG")), (f"{key}.json", json.dumps(fields).encode())]
                files += [(f"{key}.txt", fields["caption"].encode())]
            write_tar(tmp_path / f"in/{shard:05d}.tar", files, format=tarfile.GNU_FORMAT, mtime=1.5)
            (tmp_path / f"in/{shard:05d}_stats.json").write_text("{}")
        found = listing(tmp_path / "in", columns=("caption", "width", "score"), label="json:caption")
        assert found.keys[5] == "000010000"
        assert found.label_names == [f"c{row}" for row in range(5)] * 2
        assert found.columns["json_width"].tolist() == [4] * 10
        assert np.isnan(found.columns["score"]).sum() == 8
        made = shard_dataset(WebdatasetSpec(url=str(tmp_path / "in"), columns=("caption", "width")), str(tmp_path / "ds"))
        index = open_dataset(str(tmp_path / "ds")).reader(made.shards[0]).index
        assert index["width"].to_pylist() == [16] * 10, "the image's own width, not the field"
        with pytest.raises(DataError, match=r"has the field 'captoin' .did you mean 'caption'"):
            listing(tmp_path / "in", columns=("captoin",))

    def test_gzip_tars_folders_and_long_names(self, tmp_path: Path) -> None:
        long = [(f"{'d' * 80}/{'e' * 70}/{name}", data) for name, data in samples(0, 3)]
        for name, mode, form in (
            ("a.tar.gz", "w:gz", tarfile.PAX_FORMAT),
            ("b.tgz", "w:gz", tarfile.GNU_FORMAT),
            ("c.tar", "w", tarfile.USTAR_FORMAT),
        ):
            write_tar(tmp_path / name, [(f"{name[0]}/{key}", data) for key, data in long], mode, form)
        shard_dataset(WebdatasetSpec(url=str(tmp_path)), str(tmp_path / "ds"))
        assert sorted(pixels(tmp_path / "ds").values()) == sorted(list(EXPECTED.values())[:3] * 3)

    def test_members_that_do_not_stand_together_are_one_sample(self, tmp_path: Path) -> None:
        files = samples(0, 4)
        write_tar(tmp_path / "a.tar", files[1::2] + files[::2][::-1])  # all labels, then all images backwards
        adopt(tmp_path / "a.tar", tmp_path / "ds")
        assert pixels(tmp_path / "ds") == dict(list(EXPECTED.items())[:4])

    def test_splits_come_from_names(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "train/00000.tar", samples(0, 5))
        write_tar(tmp_path / "test/00000.tar", samples(5, 3))
        made = shard_dataset(WebdatasetSpec(url=str(tmp_path)), str(tmp_path / "ds"))
        assert {split: made.num_samples(split) for split in made.splits} == {"train": 5, "test": 3}
        names = ["imagenet-train-000000.tar", "val_{0..3}.tar", "t10k/x.tar", "latest.tar", "train-test/a.tar", "training.tar"]
        assert [split_of(name) for name in names] == ["train", "val", "test", "", "", "train"]
        names = ["dev-0.tar", "DEV/a.tar", "Testing-1.tgz", "VALID.tar", "device.tar", "dev-test.tar", "dev/train/0.tar"]
        assert [split_of(name) for name in names] == ["val", "val", "test", "val", "", "test", "train"]  # the last two as ever

    def test_a_tar_beside_those_of_splits_goes_to_train_and_is_named(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        for number, name in enumerate(("train-0", "dev-0", "extra")):
            write_tar(tmp_path / f"{name}.tar", samples(5 * number, 5))
        made = shard_dataset(WebdatasetSpec(url=str(tmp_path)), str(tmp_path / "ds"))
        assert {split: made.num_samples(split) for split in made.splits} == {"train": 10, "val": 5}
        assert "5 samples are in files whose names say no split and go to train (extra.tar): name the files by their split" in caplog.text

    def test_split_folders_inside_a_tar_are_warned_of(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        files = [(f"{folder}/{name}", data) for folder in ("train", "valid") for name, data in samples(0, 2)]
        write_tar(tmp_path / "all.tar", files)
        made = shard_dataset(WebdatasetSpec(url=str(tmp_path / "all.tar")), str(tmp_path / "ds"))
        assert list(made.splits) == ["train"]
        assert "named like splits (train, valid) and splits.by=none was chosen" in caplog.text

    def test_a_pattern_names_tars(self, tmp_path: Path) -> None:
        two_tars(tmp_path)
        assert len(listing(f"{tmp_path}/{{00000..00001}}.tar")) == 50
        assert len(listing(f"{tmp_path}/0000{{1,0}}.tar")) == 50
        with pytest.raises(DataError, match=r"00002.tar cannot be read: No such file"):
            listing(f"{tmp_path}/{{00000..00002}}.tar")
        assert expand_braces("a{08..11}{x,y}") == [f"a{n}{c}" for n in ("08", "09", "10", "11") for c in "xy"]
        for wrong in ("a{1..2", "{9..1}", "{0..99999999}", "{{1,2},3}"):
            with pytest.raises(ConfigError, match=r"(braces|range)"):
                expand_braces(wrong)

    def test_one_key_in_two_tars(self, tmp_path: Path) -> None:
        for name in ("a.tar", "b.tar"):
            write_tar(tmp_path / name, samples(0, 2))
        with pytest.raises(DataError, match=r"a.tar and b.tar .*both have the key '000000': use source.keys=shard"):
            listing(tmp_path)
        assert listing(tmp_path, keys="shard").keys == ["a/000000", "a/000001", "b/000000", "b/000001"]

    def test_several_images_in_a_sample(self, tmp_path: Path) -> None:
        mask = {"seg.png": lambda number: encoded(image(number + 100)), "jpg": lambda number: encoded(image(number, 8), "JPEG")}
        write_tar(tmp_path / "a.tar", samples(0, 3, **mask))
        with pytest.raises(DataError, match=r"(?s)ambiguous 3.*'000000' has the images png, jpg: choose one with source.member"):
            shard_dataset(WebdatasetSpec(url=str(tmp_path)), str(tmp_path / "ds"))
        assert not (tmp_path / "ds").exists()
        found = listing(tmp_path, member="seg.png")
        ext, data = WebdatasetSource(WebdatasetSpec(url=str(tmp_path), member="seg.png")).read(found.sources[1])
        assert (ext, data) == ("png", encoded(image(101)))
        with pytest.raises(ConfigError, match=r"ends in 'pth', which is not read"):
            WebdatasetSpec(url="x", member="pth")
        with pytest.raises(ConfigError, match=r"expected auto, cls, txt, json:<field>, tar, path, leaf, none or regex:<expression>"):
            WebdatasetSpec(url="x", label="json")


class TestHostile:
    def test_nothing_is_executed_or_written(self, tmp_path: Path) -> None:
        class Evil:
            def __reduce__(self) -> tuple[object, tuple[str, str]]:
                return open, (str(tmp_path / "executed"), "w")

        files = samples(0, 3, pyd=lambda _: pickle.dumps(Evil()), pickle=lambda _: pickle.dumps(Evil()), pth=lambda _: pickle.dumps(Evil()))
        write_tar(tmp_path / "in/a.tar", [*files, ("../outside.png", b"x"), ("/tmp/absolute.png", b"x"), ("a/../../b.png", b"x")])
        with tarfile.open(tmp_path / "in/a.tar", "a") as tar:
            for kind, name in ((tarfile.SYMTYPE, "link.png"), (tarfile.LNKTYPE, "hard.png"), (tarfile.FIFOTYPE, "pipe.png")):
                info = tarfile.TarInfo(name)
                info.type, info.linkname = kind, "/etc/passwd"
                tar.addfile(info)
            folder = tarfile.TarInfo("folder")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
        found = listing(tmp_path / "in")
        assert {key: reason(why) for key, why in zip(found.keys, unusable(found), strict=True)} == {
            **dict.fromkeys(("000000", "000001", "000002"), ""),
            **dict.fromkeys(("%2E%2E/outside", "%/tmp/absolute", "a/%2E%2E/%2E%2E/b"), "name"),
            **dict.fromkeys(("link", "hard"), "link"),
            "pipe": "member",
        }
        assert found.notes == ("skipped 9 unread members (for example '000000.pyd', '000000.pickle', '000000.pth')",)
        adopt(tmp_path / "in", tmp_path / "ds", shards=ShardSpec(max_bad=0.7))
        assert len(list(as_webdataset(str(tmp_path / "ds")))) == 3
        assert not (tmp_path / "executed").exists()
        assert {path.name for path in tmp_path.iterdir()} == {"in", "ds"}

    def test_every_cut_inside_a_member_is_found(self, tmp_path: Path) -> None:
        """A cut between two members is a tar whose writer was not closed, which `tarfile` reads too."""
        data = write_tar(tmp_path / "a.tar", samples(0, 3), format=tarfile.PAX_FORMAT, mtime=1.5).read_bytes()
        with tarfile.open(tmp_path / "a.tar") as tar:
            whole = {info.offset_data + info.size + -info.size % 512: info.name for info in tar}
            padding = {at for info in tar for at in range(info.offset_data + info.size, info.offset_data + info.size + -info.size % 512)}
        end = max(whole)
        for cut in [0, 100, *range(512, end + 1, 512), 700, end - 100]:
            (tmp_path / "a.tar").write_bytes(data[:cut])
            if cut in whole or cut in padding:
                assert len(listing(tmp_path / "a.tar")) == (list(whole).index(min(at for at in whole if at >= cut)) + 2) // 2
                continue
            with pytest.raises(DataError, match=r"(truncated|is not a tar|damaged).*source.bad_tars=skip"):
                listing(tmp_path / "a.tar")

    def test_a_damaged_header_is_no_end(self, tmp_path: Path) -> None:
        data = bytearray(write_tar(tmp_path / "a.tar", samples(0, 3)).read_bytes())
        data[1024 + 3] ^= 1  # in the name of the second member
        (tmp_path / "a.tar").write_bytes(data)
        with pytest.raises(DataError, match=r"damaged at byte 1024"):
            listing(tmp_path)

    @pytest.mark.parametrize("kind", [b"0", b"x", b"V"])
    @pytest.mark.parametrize("name", ["a.png", "without"])
    def test_a_negative_size_leads_nowhere(self, tmp_path: Path, name: str, kind: bytes) -> None:
        header = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
        header[124:136], header[156:157], header[148:156] = b"-1000".ljust(12, b"\0"), kind, b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        (tmp_path / "a.tar").write_bytes(bytes(header) + bytes(1024))
        tar = TarFile(ExternalTars.at(str(tmp_path)).files, "a.tar", 1)
        with pytest.raises(DataError, match="restore it"):
            list(itertools.islice(tar.entries(Skipped()), 9))
        tar.close()

    def test_one_name_twice(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "a.tar", [("a.png", b"1"), ("a.PNG", b"2")])
        found = listing(tmp_path)
        assert (found.keys, reason(unusable(found)[0])) == (["a"], "twice")
        assert "has both 'a.png' and 'a.PNG'" in str(unusable(found)[0])
        assert found.notes[0] == "skipped 1 member whose name comes again ('a.png')"
        write_tar(tmp_path / "a.tar", [("a.png", b"1"), ("a.png", b"2")])
        assert "has 'a.png' twice" in str(unusable(listing(tmp_path))[0])

    def test_bombs(self, tmp_path: Path) -> None:
        (tmp_path / "a.tar.gz").write_bytes(gzip.compress(bytes(30_000_000)))
        with pytest.raises(DataError, match=r"inflates to more than source.max_inflated_bytes=1000000"):
            listing(tmp_path, max_inflated_bytes=1_000_000)
        (tmp_path / "a.tar.gz").write_bytes(gzip.compress(bytes(3000))[:-5])
        with pytest.raises(DataError, match=r"a.tar.gz is damaged or truncated"):
            listing(tmp_path)
        os.remove(tmp_path / "a.tar.gz")
        write_tar(tmp_path / "a.tar", samples(0, 1, json=lambda _: b" " * 2_000_000))
        assert "'000000.json' has 2000000 bytes, at most 1048576" in str(unusable(listing(tmp_path, columns=("a",)))[0])

    def test_a_full_disk_under_an_inflated_tar_is_not_blamed_on_the_source(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "a.tar.gz").write_bytes(gzip.compress(bytes(3000)))
        made = list[int]()

        def full(buffering: int) -> io.FileIO:
            made.append(buffering)
            return open("/dev/full", "wb", buffering=0)  # the caller closes it

        monkeypatch.setattr("tempfile.TemporaryFile", full)
        with pytest.raises(StoreError, match=r"cannot inflate .*a.tar.gz in .*TMPDIR.*: No space left on device; .*free space") as raised:
            listing(tmp_path)
        assert made == [0], "it is not tried again"
        assert raised.value.hint is not None and raised.value.hint.name == "disk-full"

    @pytest.mark.parametrize("record", [b"999 path=x\n", b"9 path=x", b"x", b"-1 a=b\n", b"11 path\n", b"5011 size=" + b"9" * 5000 + b"\n"])
    def test_damaged_pax_headers(self, tmp_path: Path, record: bytes) -> None:
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            info = tarfile.TarInfo("h")
            info.type, info.size = b"x", len(record)
            tar.addfile(info, io.BytesIO(record))
            tar.addfile(tarfile.TarInfo("a.png"))
        with pytest.raises(DataError, match=r"damaged PAX header"):
            listing(tmp_path)

    def test_one_name_for_all_members_is_refused(self, tmp_path: Path) -> None:
        with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT, pax_headers={"path": "a.png"}) as tar:
            tar.addfile(tarfile.TarInfo("b.png"))
        with pytest.raises(DataError, match=r"gives all its members one name"):
            listing(tmp_path)

    def test_the_walk_agrees_with_tarfile(self, tmp_path: Path) -> None:
        for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
            files = [(f"{'x' * length}/{length}ü.png", bytes(length)) for length in (1, 80, 90)] + [("y" * 95 + ".png", b"1")]
            files += [("z" * 200 + "/a.png", b"2")] if form != tarfile.USTAR_FORMAT else []
            path = write_tar(tmp_path / "a.tar", files, format=form, mtime=0.25)
            tar = TarFile(ExternalTars.at(str(path)).files, "a.tar", 0)
            with tarfile.open(path) as theirs:
                expected = [(info.name, info.offset_data, info.size) for info in theirs]
            assert [(entry.name, entry.offset, entry.size) for entry in tar.entries(Skipped())] == expected
            tar.close()


class TestAdopt:
    def test_an_adopted_dataset_is_trained_on_shown_and_verified_like_any_other(self, tmp_path: Path) -> None:
        tars = two_tars(tmp_path / "theirs")
        before = hashes(tars)
        made = adopt(tars, tmp_path / "ds")
        assert hashes(tars) == before, "not a byte of theirs is touched"
        assert not list((tmp_path / "ds").rglob("*.tar")), "nor copied"
        assert [(shard.samples, shard.tar.name, shard.tar_base_url) for shard in made.shards] == [
            (30, "00000.tar", str(tars)),
            (20, "00001.tar", str(tars)),
        ]
        assert made.classes == ("0", "1", "2")
        assert pixels(tmp_path / "ds") == EXPECTED
        checked = verify_dataset(open_dataset(str(tmp_path / "ds")), read_data=True)
        assert (checked.problems, checked.samples, checked.files) == ((), 50, 5)
        assert [sample["cls"] for sample in as_webdataset(str(tmp_path / "ds"))] == [number % 3 for number in range(50)]
        assert adopt(tars, tmp_path / "ds") == made, "again: nothing is new"

    @pytest.mark.parametrize("options", [{}, {"mtime": 0}])
    def test_shards_of_webdataset_are_adopted(self, tmp_path: Path, options: dict) -> None:
        from webdataset import ShardWriter

        with ShardWriter(str(tmp_path / "in-%05d.tar"), maxcount=20, verbose=0, **options) as writer:
            for number in range(50):
                writer.write({"__key__": f"{number:06d}", "png": encoded(image(number)), "cls": number % 3, "json": {"a": 1}})
        adopt(tmp_path, tmp_path / "ds")
        assert pixels(tmp_path / "ds") == EXPECTED
        assert verify_dataset(open_dataset(str(tmp_path / "ds")), read_data=True).ok

    def test_a_dataset_in_the_folder_of_its_tars_moves_with_them(self, tmp_path: Path) -> None:
        root = two_tars(tmp_path / "a")
        assert {shard.tar_base_url for shard in adopt(root, root).shards} == {"."}
        root.rename(tmp_path / "b")
        assert pixels(tmp_path / "b") == EXPECTED
        above = tmp_path / "c"
        two_tars(above / "tars/x")
        assert {shard.tar_base_url for shard in adopt(above / "tars", above).shards} == {"tars"}
        above.rename(tmp_path / "d")
        assert pixels(tmp_path / "d") == EXPECTED

    @pytest.mark.parametrize("where", ["image", "label", "header"])
    def test_a_changed_tar_is_found(self, tmp_path: Path, where: str) -> None:
        tars = two_tars(tmp_path / "theirs")
        adopt(tars, tmp_path / "ds")
        data = bytearray((tars / "00001.tar").read_bytes())
        at = {"image": 560, "label": data.index(b"ustar", 600) + 512 - 257, "header": 110}[where]
        data[at] ^= 1
        (tars / "00001.tar").write_bytes(data)
        problems = verify_dataset(open_dataset(str(tmp_path / "ds")), read_data=True).problems
        assert any("00001.tar is damaged" in problem for problem in problems), problems
        if where == "image":
            with pytest.raises(DataError, match=r"damaged at sample '000030'"):
                pixels(tmp_path / "ds")
        (tars / "00001.tar").write_bytes(data[:-512])
        with pytest.raises(DataError, match=r"00001.tar has \d+ bytes, the manifest says"):
            pixels(tmp_path / "ds")
        os.remove(tars / "00001.tar")
        assert "is missing" in verify_dataset(open_dataset(str(tmp_path / "ds"))).problems[0]

    def test_new_tars_are_a_new_generation_and_bad_images_go_to_quarantine(self, tmp_path: Path) -> None:
        tars = write_tar(tmp_path / "theirs/0.tar", samples(0, 5)).parent
        first = adopt(tars, tmp_path / "ds")
        bad = samples(5, 5)
        bad[2] = (bad[2][0], bad[2][1][:-20])
        write_tar(tars / "1.tar", bad)
        with pytest.raises(DataError, match=r"1 of 10 samples are bad"):
            adopt(tars, tmp_path / "ds")
        made = adopt(tars, tmp_path / "ds", shards=ShardSpec(max_bad=0.5))
        assert (made.number, made.num_samples(), made.quarantined) == (2, 9, 1)
        assert made.shards[0] == first.shards[0]
        assert pixels(tmp_path / "ds") == {key: value for key, value in list(EXPECTED.items())[:10] if key != "000006"}
        assert verify_dataset(open_dataset(str(tmp_path / "ds")), read_data=True).problems == ()

    def test_a_split_by_hash_cuts_tars_and_copies_nothing(self, tmp_path: Path) -> None:
        tars = two_tars(tmp_path / "theirs")
        made = adopt(tars, tmp_path / "ds", splits=SplitSpec(by="hash", test=0.3))
        assert set(made.splits) == {"train", "test"}
        assert pixels(tmp_path / "ds", "train") | pixels(tmp_path / "ds", "test") == EXPECTED
        assert verify_dataset(open_dataset(str(tmp_path / "ds")), read_data=True).ok

    @pytest.mark.parametrize("same_size", [False, True])
    def test_a_tar_that_changed_is_not_adopted_again_by_a_dataset_that_only_grows(self, tmp_path: Path, same_size: bool) -> None:
        """Its index would fit no longer: nothing of the dataset could be read."""
        tars, out = tmp_path / "theirs", tmp_path / "ds"
        write_tar(tars / "a.tar", samples(0, 2))
        write_tar(tars / "b.tar", samples(100, 2))
        adopt(tars, out)
        first = grows_only(out)
        there = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        old = (tars / "a.tar").read_bytes()
        write_tar(tars / "a.tar", samples(4, 2) if same_size else samples(0, 60))
        what = "'a.tar' has other bytes" if same_size else f"'a.tar' has [0-9]+ bytes, {len(old)} when"
        with pytest.raises(DataError, match=f"1 tar of .*theirs changed since .*ds indexed .*: {what}.* into new tars .* a new URL"):
            adopt(tars, out)
        assert there == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        (tars / "a.tar").write_bytes(old)
        assert adopt(tars, out) == first
        write_tar(tars / "c.tar", samples(200, 2))
        assert adopt(tars, out).num_samples() == 6
        assert verify_dataset(open_dataset(str(out)), read_data=True).problems == ()

    @pytest.mark.parametrize("how", ["swapped", "gone", "renamed", "swapped, by a link"])
    def test_samples_that_moved_in_a_tar_of_equal_size_are_noticed(self, tmp_path: Path, how: str) -> None:
        tars, out = tmp_path / "theirs", tmp_path / "ds"
        again = tmp_path / "link_to_theirs" if "link" in how else tars
        how = how.partition(",")[0]
        (tmp_path / "link_to_theirs").symlink_to(tars)
        files = {name: encoded(np.full((4, 4), number, np.uint8)) for number, name in enumerate("abcd")}
        write_tar(tars / "0.tar", [(f"{name}.png", data) for name, data in files.items()])
        adopt(tars, out)
        grows_only(out)
        there = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        size = (tars / "0.tar").stat().st_size
        if how == "renamed":
            (tars / "0.tar").rename(tars / "1.tar")
        else:
            order = "dbca" if how == "swapped" else "abc"
            write_tar(tars / "0.tar", [(f"{name}.png", files[name]) for name in order])
            os.truncate(tars / "0.tar", size)
        what = {
            "swapped": "'0.tar' has 2 other samples, for example '[ad]' at 0.tar byte",
            "gone": "no 'd', which was at",
            "renamed": "1.tar",
        }
        with pytest.raises(DataError, match=f"[12] tars? of .*theirs changed since .*{what[how]}.*nothing was written"):
            adopt(again, out)
        assert there == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def test_a_tar_that_changed_is_known_by_another_address_and_one_that_is_gone_is_missed(self, tmp_path: Path) -> None:
        tars, out = tmp_path / "theirs", tmp_path / "ds"
        write_tar(tars / "a.tar", samples(0, 2))
        write_tar(tars / "b.tar", samples(100, 2))
        adopt(tars, out)
        grows_only(out)
        (tmp_path / "link").symlink_to(tars)
        write_tar(tars / "a.tar", samples(0, 60))
        with pytest.raises(DataError, match="1 tar of .*link changed since .*'a.tar' has [0-9]+ bytes, [0-9]+ when"):
            adopt(tmp_path / "link", out)
        (tars / "a.tar").rename(tars / "z.tar")
        write_tar(tars / "z.tar", samples(0, 2))
        with pytest.raises(
            DataError, match="2 tars of .*theirs changed since .*: 'z.tar' has 2 .* 'a.tar' is not there any more. .*restore these"
        ):
            adopt(tars, out)

    def test_what_cannot_be_adopted_says_what_to_do(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "in/a.tar.gz", samples(0, 2), "w:gz")
        with pytest.raises(DataError, match=r"a.tar.gz is compressed.*unpack it, or shard it"):
            adopt(tmp_path / "in", tmp_path / "ds")
        with pytest.raises(ConfigError, match=r"adopting leaves them as they are"):
            adopt(tmp_path / "in", tmp_path / "ds", shards=ShardSpec(resize=8))
        with pytest.raises(ConfigError, match=r"only tars are adopted"):
            adopt_shards(FolderSpec(url=str(tmp_path)), str(tmp_path / "ds"))
        assert not (tmp_path / "ds").exists()

    def test_a_forged_index_is_refused(self, tmp_path: Path) -> None:
        """Members that overlap or lie beyond the tar are no layout, whatever the hashes say."""
        from aecore.data.read.layout import Layout

        made = adopt(two_tars(tmp_path / "theirs"), tmp_path / "ds")
        index = open_dataset(str(tmp_path / "ds")).reader(made.shards[0]).index
        Layout(index, "x", packed=False)
        with pytest.raises(DataError, match="do not follow each other without gaps"):
            Layout(index, "x")
        with pytest.raises(DataError, match="overlap or are out of order"):
            Layout(index.take(list(range(29, -1, -1))), "x", packed=False)
        for place in (
            {"ext": "png", "offset": 1536, "size": -700},
            {"ext": "png", "offset": -5, "size": 10},
            {"ext": "png", "offset": 0, "size": 9},
        ):
            forged = index.set_column(index.column_names.index("members"), "members", pa.array([[place]] * index.num_rows, MEMBERS))
            for packed in (True, False):
                with pytest.raises(DataError, match="impossible offsets"):
                    Layout(forged, "x", packed=packed)

    def test_killed_and_run_again(self, tmp_path: Path) -> None:
        tars = two_tars(tmp_path / "theirs")
        whole = adopt(tars, tmp_path / "whole")
        with pytest.raises(ZeroDivisionError):
            adopt(tars, tmp_path / "ds", on_part=lambda *_: 1 / 0)
        assert len(list((tmp_path / "ds/records").iterdir())) >= 1
        assert adopt(tars, tmp_path / "ds") == whole

    def test_adopted_and_sharded_hold_the_same(self, tmp_path: Path) -> None:
        tars = two_tars(tmp_path / "theirs")
        adopt(tars, tmp_path / "adopted")
        shard_dataset(WebdatasetSpec(url=str(tars)), str(tmp_path / "sharded"), shards=ShardSpec(max_samples=7))
        assert pixels(tmp_path / "adopted") == pixels(tmp_path / "sharded") == EXPECTED
        with pytest.raises(ConfigError, match=r"holds another dataset"):
            shard_dataset(WebdatasetSpec(url=str(tars)), str(tmp_path / "adopted"))

    def test_only_adopted_shards_have_a_home_in_the_manifest(self, tmp_path: Path) -> None:
        made = shard_dataset(WebdatasetSpec(url=str(two_tars(tmp_path / "theirs"))), str(tmp_path / "ds"))
        assert isinstance(made, DatasetManifest)
        assert all("home" not in shard for shard in made.to_json()["shards"])
        adopted = adopt(tmp_path / "theirs", tmp_path / "ad").to_json()["shards"][0]
        assert adopted["home"] == str(tmp_path / "theirs")
