"""Tars as people have them: every sample is stored with its pixels and label, or is in the quarantine with a reason.

Tars are written by `tarfile`, `tar` and compressors; what is right comes from `tarfile`, webdataset or the formula of `image`.
"""

import bz2
import contextlib
import gzip
import io
import json
import logging
import lzma
import os
import random
import struct
import tarfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aecore.data.dataset import open_dataset
from aecore.data.format.index import read_table
from aecore.data.manifest import DatasetManifest
from aecore.data.read.stream import open_stream
from aecore.data.read.verify import verify_dataset
from aecore.data.sources._external_tars import ExternalTars
from aecore.data.sources._skipped import Skipped
from aecore.data.sources._tar_file import SPARSE as SPARSE_KIND
from aecore.data.sources._tar_file import Member, TarFile
from aecore.data.sources._tar_samples import AGAIN, DOCUMENTS, TarReading, data_extension, tar_samples
from aecore.data.sources.webdataset import WebdatasetSource, WebdatasetSpec, parse_source
from aecore.data.write.job import adopt_shards, shard_dataset
from aecore.data.write.spec import ShardSpec
from aecore.errors import ConfigError, DataError
from aecore.store import LocalFiles
from tests.aecore.data.test_external_tars import EXPECTED, Files, listing, pixels, reason, samples, unusable, write_tar
from tests.aecore.data.test_stream import batches as streamed
from tests.aecore.data.tiny import encoded, image
from tests.processes import run
from tests.s3 import S3


def shard(url: Path | str, out: Path, max_bad: float = 0.01, adopt: bool = False, **options: Any) -> DatasetManifest:
    write = adopt_shards if adopt else shard_dataset
    made = write(WebdatasetSpec(url=str(url), **options), str(out), shards=ShardSpec(max_bad=max_bad))
    assert isinstance(made, DatasetManifest)
    assert verify_dataset(open_dataset(str(out)), read_data=True).problems == ()
    return made


def quarantine(out: Path) -> dict[str, tuple[str, str]]:
    """Return reason and message of every row of the quarantine, by source."""
    rows = [row for path in sorted(out.glob("quarantine/*.parquet")) for row in read_table(path.read_bytes(), str(path)).to_pylist()]
    return {row["source"]: (row["reason"], row["message"]) for row in rows}


def png(number: int) -> bytes:
    return encoded(image(number))


def tar_bytes(files: Files, format: int = tarfile.USTAR_FORMAT, closed: bool = True) -> bytes:
    out = io.BytesIO()
    tar = tarfile.open(fileobj=out, mode="w", format=format)  # noqa: SIM115  # closing it writes the end blocks
    for name, data in files:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    if closed:
        tar.close()
    return out.getvalue()


def add_link(path: Path, name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> None:
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, target
        tar.addfile(info)


def stored(out: Path) -> dict[str, tuple[int, int]]:
    """Return which image and label each key has; `image(n)` begins with the digits of n."""
    return {key: (x[0] + 256 * x[1], label) for key, (x, label) in pixels(out).items()}


class TestNames:
    @pytest.mark.parametrize("adopt", [False, True])
    def test_a_dot_in_a_name_belongs_to_it(self, tmp_path: Path, adopt: bool) -> None:
        files = [(f"track 2.{n} (clean).{ext}", data) for n in range(6) for ext, data in (("png", png(n)), ("cls", b"%d" % (n % 3)))]
        write_tar(tmp_path / "in/a.tar", files)
        shard(tmp_path / "in", tmp_path / "ds", adopt=adopt)
        assert stored(tmp_path / "ds") == {f"track%202%2E{n}%20%28clean%29": (n, n % 3) for n in range(6)}

    @pytest.mark.parametrize(
        "names",
        [
            ["22.05-0", "p1", "p2", "22.05-3"],
            ["2023.01.15_10.30", "2023.01.16_10.30", "2023.02.15_10.30"],
            ["Dr. Smith", "Dr. Jones", "St. John"],
            ["v1.0_000", "v1.0_001", "v2.0_000"],
            ["photo", "photo.1", "photo.2"],
            ["a/b.c/x.y", "a/b.c/x.z", "a.b/x"],
            ["img.final", "img", "other.final", "other"],
            ["a..b", "a...b"],
        ],
    )
    def test_each_full_name_is_a_sample(self, tmp_path: Path, names: list[str]) -> None:
        files = [(f"{name}.{ext}", data) for n, name in enumerate(names) for ext, data in (("png", png(n)), ("cls", b"%d" % n))]
        write_tar(tmp_path / "in/a.tar", files)
        shard(tmp_path / "in", tmp_path / "ds")
        assert sorted(stored(tmp_path / "ds").values()) == [(n, n) for n in range(len(names))]

    @pytest.mark.parametrize("adopt", [False, True])
    def test_the_case_of_letters_belongs_to_the_name_and_not_to_the_extension(self, tmp_path: Path, adopt: bool) -> None:
        names = {"x.B1.png": "x%2EB1", "x.b1.PNG": "x%2Eb1", "y.V2.A.png": "y%2EV2%2EA", "Z.png": "Z", "z.pNg": "z", "S/T.u.Png": "S/T%2Eu"}
        labels = [(name[: name.rindex(".")] + ".CLS", b"%d" % n) for n, name in enumerate(names)]
        write_tar(tmp_path / "in/a.tar", [*((name, png(n)) for n, name in enumerate(names)), *labels])
        shard(tmp_path / "in", tmp_path / "ds", adopt=adopt)
        assert stored(tmp_path / "ds") == {key: (n, n) for n, key in enumerate(names.values())}

    def test_bands_by_capitals_and_a_member_asked_for_in_another_case(self, tmp_path: Path) -> None:
        bands = [(f"S2A.{year}.{band}.png", png(n)) for n, (year, band) in enumerate([(2021, "B01"), (2021, "b01"), (2022, "B01")])]
        write_tar(tmp_path / "bands/a.tar", bands)
        found = listing(tmp_path / "bands")
        assert (found.keys, found.unusable) == (["S2A%2E2021%2EB01", "S2A%2E2021%2Eb01", "S2A%2E2022%2EB01"], None)
        pairs = [(f"{n}.{word}.png", png(n)) for n, words in enumerate([("Left", "Right"), ("left", "right")]) for word in words]
        write_tar(tmp_path / "pairs/a.tar", pairs)
        found = listing(tmp_path / "pairs", member="left.png")
        assert (found.keys, found.unusable, found.paths) == (["0", "1"], None, ["0.Left.png", "1.left.png"])
        write_tar(tmp_path / "both/a.tar", [(f"0.{word}.png", png(0)) for word in ("LEFT", "Left")])
        assert "has the images LEFT.png, Left.png" in str(unusable(listing(tmp_path / "both", member="left.png"))[0])

    def test_the_rules_of_version_1_keep_names_as_they_were(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "a.tar", [("X.SEG.PNG", png(0)), ("X.JPG", png(1)), ("y.seg.png", png(2)), ("y.Seg.png", png(3))])
        found = listing(tmp_path, member="seg.png", tars=1)
        assert (found.keys, found.paths) == (["X", "y"], ["X.SEG.PNG", "y.Seg.png"])
        with pytest.raises(DataError, match="holds no sample"):
            listing(tmp_path, member="Seg.png", tars=1)

    def test_without_labels_too(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "a.tar", [(f"{name}.png", png(n)) for n, name in enumerate(["1.5", "1.6", "2.5", "a.b.c"])])
        found = listing(tmp_path)
        assert (found.keys, found.unusable) == (["1%2E5", "1%2E6", "2%2E5", "a%2Eb%2Ec"], None)

    def test_members_of_one_sample_stay_members(self, tmp_path: Path) -> None:
        """webdataset's convention: `0.left.png` and `0.right.png` are two members of sample 0."""
        files = [(f"{n}.{ext}", data) for n in range(4) for ext, data in (("left.png", png(n)), ("right.png", png(n + 100)), ("cls", b"1"))]
        write_tar(tmp_path / "in/a.tar", files)
        with pytest.raises(
            DataError, match=r"(?s)ambiguous 4.*sample '0' has the images left.png, right.png: choose one with source.member"
        ):
            shard(tmp_path / "in", tmp_path / "ds")
        shard(tmp_path / "in", tmp_path / "ds", member="right.png")
        assert stored(tmp_path / "ds") == {str(n): (n + 100, 0) for n in range(4)}
        write_tar(tmp_path / "without/a.tar", [file for file in files if not file[0].endswith("cls")])
        assert {reason(why) for why in unusable(listing(tmp_path / "without"))} == {"ambiguous"}

    def test_pairs_with_a_description_of_both(self, tmp_path: Path) -> None:
        members = [("input.png", png(0)), ("target.png", png(1)), ("meta.json", b"{}"), ("1.txt", b"a")]
        write_tar(tmp_path / "a.tar", [("README.md", b"#"), *((f"{n}.{ext}", data) for n in range(3) for ext, data in members)])
        found = listing(tmp_path, member="target.png")
        assert (found.keys, found.unusable) == (["0", "1", "2"], None)
        assert "skipped 1 document ('README')" in found.notes

    def test_labels_whose_images_are_missing_count_one_by_one(self, tmp_path: Path) -> None:
        images = [(f"22.{n}-x.png", png(n)) for n in range(2)]
        write_tar(tmp_path / "a.tar", [*images, *((f"22.{n}-x.cls", b"1") for n in range(4))])
        assert list(map(reason, unusable(listing(tmp_path)))) == ["", "", "no_data", "no_data"]

    def test_masks_and_descriptions_beside_images_are_no_samples(self, tmp_path: Path) -> None:
        files = [
            (f"{n}.{ext}", data) for n in range(4) for ext, data in (("png", png(n)), ("mask.png", png(9)), ("1.txt", b"a"), ("cls", b"1"))
        ]
        write_tar(tmp_path / "in/a.tar", [*files, *((f"video.{n:04d}.png", png(n)) for n in range(3)), ("video.json", b"{}")])
        found = listing(tmp_path / "in")
        assert (sorted(found.keys), found.unusable) == (["0", "1", "2", "3", *(f"video%2E{n:04d}" for n in range(3))], None)
        skipped, unlabelled = found.notes
        assert skipped == "skipped 9 unread members (for example '0.mask.png', '0.1.txt', '1.mask.png')"
        assert unlabelled.startswith("3 samples have no .cls, as others have, and no label: 'video.0000' for example")

    def test_the_only_image_of_a_sample_may_have_a_longer_extension(self, tmp_path: Path) -> None:
        write_tar(
            tmp_path / "in/a.tar", [(f"{n}.{ext}", data) for n in range(3) for ext, data in (("rgb.png", png(n)), ("cls", b"%d" % n))]
        )
        shard(tmp_path / "in", tmp_path / "ds")
        assert stored(tmp_path / "ds") == {str(n): (n, n) for n in range(3)}

    def test_ten_thousand_odd_names_are_one_line(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        odd = [(f"0.x{n}.bin", b"") for n in range(5_000)] + [(f"no-extension-{n}", b"") for n in range(5_000)]
        write_tar(tmp_path / "in/a.tar", [*samples(0, 2), *odd])
        with caplog.at_level(logging.INFO):
            shard_dataset(WebdatasetSpec(url=str(tmp_path / "in")), str(tmp_path / "ds"), shards=ShardSpec(max_bad=1))
        skipped = [line for line in caplog.text.splitlines() if "skipped" in line or "to the quarantine" in line]
        assert [line.partition(": ")[2] for line in skipped] == [
            "1 sample goes to the quarantine (no_data), 'a.tar#4608+0#0.x0.bin'",
            "skipped 5000 files without a key and an extension (for example 'no-extension-0', 'no-extension-1', 'no-extension-2')",
            "skipped 5000 unread members (for example '0.x0.bin', '0.x1.bin', '0.x2.bin')",
        ]
        assert len(caplog.text) < 5_000


class TestLinks:
    @pytest.mark.parametrize("adopt", [False, True])
    def test_hard_links_of_gnu_tar(self, tmp_path: Path, adopt: bool) -> None:
        (tmp_path / "files/b").mkdir(parents=True)
        (tmp_path / "files/0.png").write_bytes(png(5))
        (tmp_path / "files/0.cls").write_bytes(b"7")
        for name in ("1", "b/2"):
            for ext in ("png", "cls"):
                os.link(tmp_path / f"files/0.{ext}", tmp_path / f"files/{name}.{ext}")
        with tarfile.open(tmp_path / "a.tar", "w") as tar:  # as GNU tar does, it stores the first name and links the others to it
            tar.add(tmp_path / "files", ".")
            kinds = [info.type for info in tar.getmembers()]
        assert kinds.count(tarfile.LNKTYPE) == 4
        shard(tmp_path / "a.tar", tmp_path / "ds", adopt=adopt)
        assert stored(tmp_path / "ds") == {"0": (5, 0), "1": (5, 0), "b/2": (5, 0)}
        assert open_dataset(str(tmp_path / "ds")).manifest.classes == ("7",)

    @pytest.mark.parametrize("adopt", [False, True])
    def test_links_to_files_and_folders_of_the_tar(self, tmp_path: Path, adopt: bool) -> None:
        path = write_tar(
            tmp_path / "in/a.tar", [("pool/bird/0.png", png(0)), ("pool/bird/1.png", png(1)), ("blobs/abc", png(2)), ("x/3.png", png(3))]
        )
        for name, target in (
            ("bird", "pool/bird"),
            ("cat/0.png", "../blobs/abc"),
            ("y", "x"),
            ("z/9.png", "../y/3.png"),
            ("one", "./two"),
            ("two", "x"),
        ):
            add_link(path, name, target)
        with tarfile.open(path) as tar:
            theirs = {name: tar.extractfile(name).read() for name in ("cat/0.png", "x/3.png")}  # type: ignore[union-attr]
        source = WebdatasetSource(WebdatasetSpec(url=str(path)))
        found = source.listing()
        read = {key: source.read(name)[1] for key, name in zip(found.keys, found.sources, strict=True)}
        assert found.unusable is None
        assert read == {
            **{f"{folder}/{n}": png(n) for folder in ("bird", "pool/bird") for n in (0, 1)},
            "cat/0": theirs["cat/0.png"],
            **dict.fromkeys(("x/3", "y/3", "z/9", "one/3", "two/3"), theirs["x/3.png"]),
        }
        made = shard(path, tmp_path / "ds", adopt=adopt)
        assert made.num_samples() == 10

    @pytest.mark.parametrize("format", ["gnu", "posix", "ustar", "v7", "oldgnu"])
    def test_links_as_tar_packs_them(self, tmp_path: Path, format: str) -> None:
        """A linked folder holds the links in it too: the same samples as from the folder that `tar` unpacks."""
        folder = tmp_path / "files"
        (folder / "cat").mkdir(parents=True)
        for number in range(3):
            (folder / f"cat/{number}.png").write_bytes(png(number))
            (folder / f"cat/{number}.cls").write_bytes(b"%d" % number)
        os.link(folder / "cat/0.png", folder / "cat/4.png")
        os.symlink("1.png", folder / "cat/5.png")
        os.symlink("cat", folder / "kitty")
        run(["tar", f"--format={format}", "-cf", tmp_path / "a.tar", "-C", folder, "."], check=True)
        source = WebdatasetSource(WebdatasetSpec(url=str(tmp_path / "a.tar")))
        found = source.listing()
        assert found.unusable is None
        read = {key: source.read(name)[1] for key, name in zip(found.keys, found.sources, strict=True)}
        assert read == {f"{top}/{n}": (folder / f"{top}/{n}.png").read_bytes() for top in ("cat", "kitty") for n in (0, 1, 2, 4, 5)}

    def test_a_hard_link_is_the_file_that_has_the_name_at_its_place(self, tmp_path: Path) -> None:
        """As `tar` unpacks it: whatever takes the name later, and however links lead to links; those to later members fail there too."""
        rng, path = random.Random(0), tmp_path / "a.tar"
        with tarfile.open(path, "w") as tar:
            for number in range(120):
                kind = rng.choice([tarfile.REGTYPE, tarfile.REGTYPE, tarfile.LNKTYPE, tarfile.LNKTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE])
                is_sample = kind != tarfile.REGTYPE and rng.random() < 0.7
                info = tarfile.TarInfo(f"{number}.png" if is_sample else rng.choice("abcdef"))
                data = png(number) if kind == tarfile.REGTYPE else b""
                info.type, info.size, info.linkname = kind, len(data), rng.choice("abcdef")
                tar.addfile(info, io.BytesIO(data))
        (tmp_path / "out").mkdir()
        run(["tar", "-xf", path, "-C", tmp_path / "out"])  # it returns 2 for links that lead nowhere
        theirs = {file.stem: file.read_bytes() for file in (tmp_path / "out").glob("*.png") if file.exists()}
        source = WebdatasetSource(WebdatasetSpec(url=str(path)))
        found = source.listing()
        rows = list(zip(found.keys, found.sources, unusable(found), strict=True))
        assert {key: source.read(name)[1] for key, name, bad in rows if bad is None} == theirs
        assert len(theirs) > 20 and {reason(bad) for _, _, bad in rows} == {"", "link"}

    def test_links_that_lead_nowhere_are_in_the_quarantine(self, tmp_path: Path) -> None:
        path = write_tar(tmp_path / "in/a.tar", [("cat/0.png", png(0))])
        links = {
            "dog/0.png": "../../blobs/0.png",
            "dog/1.png": "/etc/passwd",
            "bird": "../pool/bird",
            "a.png": "b.png",
            "b.png": "a.png",
            "cat/up": "..",
            "self": "self",
        }
        for name, target in links.items():
            add_link(path, name, target)
        add_link(path, "hard.png", "missing.png", tarfile.LNKTYPE)
        with pytest.raises(DataError, match=r"8 of 9 samples cannot be used.*Their reasons: link 8"):
            shard(path, tmp_path / "ds")
        assert not (tmp_path / "ds").exists()
        made = shard(path, tmp_path / "ds", max_bad=0.9)
        assert (made.num_samples(), made.quarantined, made.reasons) == (1, 8, {"link": 8})
        assert {source.partition("+0#")[2] for source in quarantine(tmp_path / "ds")} == {*links, "hard.png"}

    def test_links_that_multiply_are_bounded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("aecore.data.sources._tar_samples.MAX_LINKED", 10)
        path = write_tar(tmp_path / "in/a.tar", [(f"x/{n}.png", png(n)) for n in range(4)])
        for n in range(5):
            add_link(path, f"l{n}", "x")
        assert [reason(why) for why in unusable(listing(path))].count("link") == 3

    def test_names_without_end_are_rows_and_take_linear_time(self, tmp_path: Path) -> None:
        path = tmp_path / "a.tar"
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
            for name in ("x/0.png", f"a{'/b' * 40_000}.png", "c" * 4093 + ".png", "d" * 4092 + ".png", f"e{'/f' * 127}.png"):
                info = tarfile.TarInfo(name)
                info.size = len(png(0))
                tar.addfile(info, io.BytesIO(png(0)))
            for name, target in (("l", "x"), (f"a{'/b' * 40_000}", "x"), ("m.png", "a/" * 40_000), ("n.png", f"l{'/b' * 200}")):
                info = tarfile.TarInfo(name)
                info.type, info.linkname = tarfile.SYMTYPE, target
                tar.addfile(info)
            info = tarfile.TarInfo("x/9.png")
            info.size, info.pax_headers = len(png(0)), {f"{number}": "" for number in range(90_000)}
            tar.addfile(info, io.BytesIO(png(0)))
        tracemalloc.start()
        started = time.process_time()
        found = listing(path)
        took, (_, peak) = time.process_time() - started, tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 100 << 20 and took < 20, f"{peak} bytes, {took} s"  # 1.6 GB and 54 s before
        reasons = [reason(why) for why in unusable(found)]
        assert {key: why for key, why in zip(found.keys, reasons, strict=True) if len(key) < 10} == {
            **dict.fromkeys(("x/0", "x/9", "l/0", "l/9"), ""),
            **dict.fromkeys("mn", "link"),
        }
        assert sorted(reasons) == [""] * 6 + ["link"] * 2 + ["name"] * 3
        assert shard(path, tmp_path / "ds", max_bad=0.9).reasons == {"link": 2, "name": 3}

    @pytest.mark.parametrize("options", [{"label": "path"}, {"label": "leaf"}, {"group": r"regex:(\d)"}, {"label": r"regex:(\d)"}, {}])
    def test_a_name_that_is_not_utf_8_is_one_row(self, tmp_path: Path, options: dict[str, str]) -> None:
        bad = os.fsdecode(b"caf\xe9")
        path = tmp_path / "a.tar"
        with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as tar:
            for name in ("cat/0.png", "dog/1.png", f"cat/{bad}2.png", f"{bad}/3.png"):
                info = tarfile.TarInfo(name)
                data = png(int(name[-5]))
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            info = tarfile.TarInfo(f"cat/{bad}4.png")  # unusable for another reason
            info.type, info.linkname = tarfile.SYMTYPE, "nothing"
            tar.addfile(info)
        made = shard(path, tmp_path / "ds", max_bad=0.9, **options)
        is_class = options.get("label") in ("path", "leaf")
        assert made.reasons == ({"link": 1, "label": 1} if is_class else {"link": 1}) and made.num_samples() == (3 if is_class else 4)
        if is_class:
            assert made.classes == ("cat", "dog")
            assert any(r"caf\xe9' is not UTF-8" in why for _, why in quarantine(tmp_path / "ds").values())

    def test_folders_of_tars_that_are_links(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "blobs/0", samples(0, 3))
        write_tar(tmp_path / "disk/b.tar", samples(3, 3))
        (tmp_path / "in").mkdir()
        os.symlink("../blobs/0", tmp_path / "in/a.tar")
        os.symlink("../disk", tmp_path / "in/more")
        shard(tmp_path / "in", tmp_path / "ds")
        assert pixels(tmp_path / "ds") == dict(list(EXPECTED.items())[:6])
        os.symlink("..", tmp_path / "disk/up")
        with pytest.raises(DataError, match=r"more/up/disk leads back to .*remove the link, or give the folder that it leads to"):
            listing(tmp_path / "in")

    def test_links_beside_what_they_lead_to_store_nothing_twice(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "in/b/1.tar", samples(0, 3))
        write_tar(tmp_path / "in/b/2.tar", samples(3, 3))
        os.symlink("b", tmp_path / "in/a")
        os.symlink("1.tar", tmp_path / "in/b/0.tar")
        for url in ("in", "in/**/*.tar", "in/*/*.tar"):
            assert ExternalTars.at(str(tmp_path / url)).names == ("b/1.tar", "b/2.tar")
            assert open_stream(str(tmp_path / url), "train").tars.keys() == {"b/1.tar", "b/2.tar"}
        shard(tmp_path / "in", tmp_path / "ds")
        assert pixels(tmp_path / "ds") == dict(list(EXPECTED.items())[:6])
        assert ExternalTars.at(str(tmp_path / "in/a*/[12].tar")).names == ("a/1.tar", "a/2.tar")
        named = ExternalTars.at(str(tmp_path / "in/a/0.tar"))  # a link that was asked for by its name
        assert named.sizes() == {"0.tar": (tmp_path / "in/b/1.tar").stat().st_size}

    @pytest.mark.parametrize("links", [1, 2])
    def test_links_to_each_other_are_refused(self, tmp_path: Path, links: int) -> None:
        for folder, other in ("ab", "ba"):
            write_tar(tmp_path / folder / "0.tar", samples(0 if folder == "a" else 3, 3))
            for number in range(links):  # 2^40 paths of two
                os.symlink(f"../{other}", tmp_path / folder / f"l{number}")
        for open_tars in (lambda: listing(tmp_path), lambda: open_stream(str(tmp_path), "train")):
            with pytest.raises(DataError, match=r"a/l0/l0 leads back to .*links that go round in a circle are refused"):
                open_tars()

    def test_links_to_tars_that_fork_at_every_level_end(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("aecore.store._links.MOST_PATHS", 50)
        write_tar(tmp_path / "40/0.tar", samples(0, 3))
        for level in range(40):
            (tmp_path / f"{level}").mkdir()
            for name in "xy":
                os.symlink(f"../{level + 1}", tmp_path / f"{level}/{name}")
        with pytest.raises(DataError, match="more than 50 paths of links lead to one folder"):
            ExternalTars.at(str(tmp_path / "0"))


class TestArchives:
    def test_tars_joined_by_cat(self, tmp_path: Path) -> None:
        parts = [
            tar_bytes(samples(5 * n, 5), format=form)
            for n, form in enumerate((tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))
        ]
        (tmp_path / "in").mkdir()
        (tmp_path / "in/a.tar").write_bytes(b"".join(parts))
        shard(tmp_path / "in", tmp_path / "ds", adopt=True)
        assert pixels(tmp_path / "ds") == dict(list(EXPECTED.items())[:15])
        with tarfile.open(tmp_path / "in/a.tar", ignore_zeros=True) as tar:
            assert len(tar.getnames()) == 30

    def test_equal_keys_in_joined_tars(self, tmp_path: Path) -> None:
        (tmp_path / "a.tar").write_bytes(tar_bytes(samples(0, 2)) + tar_bytes(samples(0, 2)))
        with pytest.raises(DataError, match=r"two of the tars that were joined to .*a.tar have the key '000000': use source.keys=shard"):
            listing(tmp_path)
        assert listing(tmp_path, keys="shard").keys == ["a/000000", "a/000001", "a%2B1/000000", "a%2B1/000001"]

    @pytest.mark.parametrize("adopt", [False, True])
    def test_a_tar_without_its_end_blocks_is_read_and_named(self, tmp_path: Path, adopt: bool, caplog: pytest.LogCaptureFixture) -> None:
        write_tar(tmp_path / "in/a.tar", samples(0, 5))
        (tmp_path / "in/b.tar").write_bytes(tar_bytes(samples(5, 5), closed=False))
        with caplog.at_level(logging.INFO):
            shard(tmp_path / "in", tmp_path / "ds", adopt=adopt)
        assert pixels(tmp_path / "ds") == dict(list(EXPECTED.items())[:10])
        assert "1 tar without end blocks, whose writer was not closed or was stopped" in caplog.text
        assert "b.tar" in caplog.text

    COMPRESSORS: ClassVar[dict[str, Callable[[bytes], bytes]]] = {
        "gz": gzip.compress,
        "bz2": bz2.compress,
        "xz": lzma.compress,
        "zst": lambda data: pa.Codec("zstd").compress(data, asbytes=True),
    }

    @pytest.mark.parametrize("kind", list(COMPRESSORS))
    def test_compressed_tars_by_content(self, tmp_path: Path, kind: str) -> None:
        compress, data = self.COMPRESSORS[kind], tar_bytes(samples(0, 6))
        (tmp_path / "in").mkdir()
        for name in (f"a.tar.{kind}", "b.tar", f"B.TAR.{kind.upper()}", "d.tgz"):
            (tmp_path / "in" / name).write_bytes(compress(data))
        (tmp_path / "in/e.tar.gz").write_bytes(data)  # not compressed at all
        (tmp_path / "in/f.tar").write_bytes(compress(data[:5000]) + compress(data[5000:]))  # joined streams are one
        shard(tmp_path / "in", tmp_path / "ds", keys="shard")
        found = pixels(tmp_path / "ds")
        assert len(found) == 36
        assert {(key.rpartition("/")[2], *value) for key, value in found.items()} == {
            (key, *value) for key, value in list(EXPECTED.items())[:6]
        }
        with pytest.raises(DataError, match=r"is compressed .*unpack it, or shard it"):
            adopt_shards(WebdatasetSpec(url=str(tmp_path / "in/b.tar")), str(tmp_path / "adopted"))
        assert not (tmp_path / "adopted").exists()

    @pytest.mark.parametrize("kind", list(COMPRESSORS))
    def test_compressed_tars_stay_bounded(self, tmp_path: Path, kind: str) -> None:
        (tmp_path / "a.tar").write_bytes(self.COMPRESSORS[kind](bytes(30_000_000)))
        with pytest.raises(DataError, match=r"inflates to more than source.max_inflated_bytes=1000000"):
            listing(tmp_path, max_inflated_bytes=1_000_000)

    @pytest.mark.parametrize("kind", list(COMPRESSORS))
    def test_damaged_compressed_tars(self, tmp_path: Path, kind: str) -> None:
        whole = self.COMPRESSORS[kind](tar_bytes(samples(0, 40)))
        for data in (whole[: len(whole) // 2], whole[:-3], whole[:7]):
            (tmp_path / f"a.tar.{kind}").write_bytes(data)
            with pytest.raises(DataError, match=r"a.tar.\w+ is damaged or truncated: its \w+ data cannot be inflated: .*bad_tars=skip"):
                listing(tmp_path)
            bad = unusable(listing(tmp_path, bad_tars="skip"))
            assert bad
            assert {reason(why) for why in bad} == {"broken_tar"}

    def test_xz_that_asks_for_gigabytes_of_memory(self, tmp_path: Path) -> None:
        filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 20}]
        data = bytearray(lzma.compress(tar_bytes(samples(0, 1)), filters=filters))
        at = 12  # the block header: its size, flags, filter, size of properties, the dictionary's size; then a CRC
        assert data[at + 2] == 0x21
        data[at + 4] = 40  # 4 GiB - 1
        data[at + 8 : at + 12] = struct.pack("<I", __import__("zlib").crc32(data[at : at + 8]))
        (tmp_path / "a.tar").write_bytes(data)
        with pytest.raises(DataError, match=r"cannot be inflated: .*[Mm]emory"):
            listing(tmp_path)

    def test_a_broken_tar_is_refused_or_quarantined_as_a_whole(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "in/a.tar", samples(0, 5))
        data = tar_bytes(samples(5, 5))
        (tmp_path / "in/b.tar").write_bytes(data[: data.index(png(8)) + 20])
        (tmp_path / "in/c.tar").write_bytes(b"<html>not found</html>" * 100)
        (tmp_path / "in/d.tar").write_bytes(b"")
        with pytest.raises(DataError, match=r"b.tar is truncated: .*restore it; or set source.bad_tars=skip"):
            shard(tmp_path / "in", tmp_path / "ds")
        with pytest.raises(DataError, match=r"(?s)6 of 11 samples cannot be used.*broken_tar 6.*shards.max_bad=0.546"):
            shard(tmp_path / "in", tmp_path / "ds", bad_tars="skip")
        for name, adopt in (("ds", False), ("adopted", True)):
            made = shard(tmp_path / "in", tmp_path / name, bad_tars="skip", max_bad=0.546, adopt=adopt)
            assert (made.num_samples(), made.quarantined, made.reasons) == (5, 6, {"broken_tar": 6})
            assert pixels(tmp_path / name) == dict(list(EXPECTED.items())[:5])
            rows = quarantine(tmp_path / name)
            assert sorted(source for source in rows if source.endswith("#")) == [
                f"b.tar#0+{(tmp_path / 'in/b.tar').stat().st_size}#",
                "c.tar#0+2200#",
                "d.tar#0+0#",
            ]
            assert {source.partition("#")[0] for source in rows} == {"b.tar", "c.tar", "d.tar"}
        assert shard(tmp_path / "in", tmp_path / "ds", bad_tars="skip", max_bad=0.546).number == 1

    def test_a_hole_of_zeros_is_no_end(self, tmp_path: Path) -> None:
        data = bytearray(tar_bytes(samples(0, 6)))
        data[2048:4096] = bytes(2048)  # two members; what follows is in place
        data[4096:4100] = b"oops"
        (tmp_path / "a.tar").write_bytes(data)
        with pytest.raises(DataError, match=r"a.tar is damaged at byte 4096: .*another member at byte"):
            listing(tmp_path)

    def test_equal_keys_are_never_advised_what_was_done(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "in/a.tar", [("0.png", png(0))])
        write_tar(tmp_path / "in/a.tar.gz", [("0.png", png(1))], "w:gz")
        with pytest.raises(DataError, match="both have the key '0': use source.keys=shard"):
            listing(tmp_path / "in")
        with pytest.raises(DataError, match="both have the key 'a/0': rename one of these tars"):
            listing(tmp_path / "in", keys="shard")

    def test_a_tar_named_like_a_sample_is_to_be_renamed(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "a.tar#0+5#x.tar", [("0.png", png(0))])
        with pytest.raises(DataError, match="'a.tar#0.5#x.tar' has a name like that of a sample in a tar: rename it"):
            listing(tmp_path)

    def test_fields_of_pax_headers_that_are_empty_or_no_numbers(self, tmp_path: Path) -> None:
        def tar(**fields: str) -> Path:
            with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
                info = tarfile.TarInfo("0.png")
                info.size, info.pax_headers = len(png(0)), fields
                tar.addfile(info, io.BytesIO(png(0)))
            return tmp_path / "a.tar"

        assert listing(tar(path="", size="")).sizes.tolist() == [len(png(0))]
        for size in ("-5", "\u0663", "1_0", " 7", "0x9"):
            with pytest.raises(DataError, match="damaged PAX header at byte .* a size of "):
                listing(tar(size=size))

    def test_bytes_after_the_end_are_named(self, tmp_path: Path) -> None:
        for name in ("a", "b", "c", "d"):
            (tmp_path / f"{name}.tar").write_bytes(tar_bytes(samples(ord(name), 1)) + b"a signature")
        found = listing(tmp_path)
        assert len(found) == 4
        assert [note.partition(" (")[0] for note in found.notes] == ["skipped 4 tars with bytes after their end"]

    def test_headers_of_old_programs(self, tmp_path: Path) -> None:
        """Checksums over signed bytes, which `tarfile` takes too, and headers without `ustar`."""
        data = bytearray(tar_bytes([("\u00fc.png", png(3))]))
        data[257:265] = bytes(8)
        signed = [byte - 256 * (byte > 127) for byte in data[:148] + b" " * 8 + data[156:512]]
        data[148:156] = b"%06o\0 " % sum(signed)
        (tmp_path / "a.tar").write_bytes(data)
        with tarfile.open(tmp_path / "a.tar") as tar:
            assert tar.getnames() == ["\u00fc.png"]
        assert listing(tmp_path).keys == ["%C3%BC"]

    def test_damaged_sparse_members_are_in_the_quarantine_with_what_to_do(self, tmp_path: Path) -> None:
        header = bytearray(tarfile.TarInfo("a.png").tobuf(tarfile.GNU_FORMAT))
        header[156:157], header[482] = b"S", 1  # its map goes on in another block
        header[386:410], header[483:495] = b"%011o\0%011o\0" % (512, 99999), b"%011o\0" % 99999  # more bytes than the tar has of it
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        (tmp_path / "a.tar").write_bytes(bytes(header) + bytes(512) + tar_bytes(samples(0, 2)))
        found = listing(tmp_path)
        assert dict(zip(found.keys, map(reason, unusable(found)), strict=True)) == {"a": "member", "000000": "", "000001": ""}
        assert "its map of holes is damaged): pack it without --sparse (-S)" in str(unusable(found)[0])

    @pytest.mark.parametrize("kind", [b"L", b"K", b"x", b"g"])
    @pytest.mark.parametrize("number", [33, 2000])
    def test_a_sparse_member_after_too_many_headers_is_in_the_quarantine(self, tmp_path: Path, kind: bytes, number: int) -> None:
        """`tarfile` recurses for each header."""
        info = tarfile.TarInfo("long")
        info.type, info.size = kind, 512
        chain = info.tobuf(tarfile.GNU_FORMAT) + (b"a.png".ljust(512, b"\0") if kind in b"LK" else b"16 comment=xxxx\n" * 32)
        header = bytearray(tarfile.TarInfo("a.png").tobuf(tarfile.GNU_FORMAT))
        header[156:157], header[483:495] = b"S", b"%011o\0" % 512
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        (tmp_path / "a.tar").write_bytes(chain * number + bytes(header) + tar_bytes(samples(0, 2)))
        found = listing(tmp_path)
        assert dict(zip(found.keys, map(reason, unusable(found)), strict=True)) == {"a": "member", "000000": "", "000001": ""}
        assert f"{number} headers set its name and size, at most 32 are read" in str(unusable(found)[0])


SPARSE = ["--format=gnu", *(f"--format=posix --sparse-version={version}" for version in ("0.0", "0.1", "1.0"))]


class TestSparse:
    """Sparse members as GNU tar writes them in each of its formats; what is right is the file that was packed."""

    def packed(self, root: Path, options: str, compress: Callable[[bytes], bytes] = bytes) -> dict[str, bytes]:
        arrays = {name: np.zeros((4000, 64), np.float32) for name in ("holes.npy", "holes-everywhere.npy", "full.npy")}
        arrays["holes.npy"][90:95] = 7
        arrays["holes-everywhere.npy"][::400] = np.arange(10)[:, None] + 1  # more pieces than fit into one block of a map
        arrays["full.npy"][:] = 3
        (root / "files" / "a folder").mkdir(parents=True)
        for name, array in arrays.items():
            with (root / "files" / "a folder" / name).open("wb+") as file:
                np.save(file, array)
                data = (file.seek(0), file.read())[1]
                file.truncate(0)  # now with holes
                for at in range(0, len(data), 4096):
                    if any(data[at : at + 4096]):
                        file.seek(at)
                        file.write(data[at : at + 4096])
                file.truncate(len(data))
        (root / "in").mkdir()
        arguments = ["--sparse", "--hole-detection=raw", "--sort=name", "-C", str(root / "files")]
        run(["tar", "-cf", str(root / "in/a.tar"), *options.split(), *arguments, "."], check=True)
        (root / "in/a.tar").write_bytes(compress((root / "in/a.tar").read_bytes()))
        return {f"a folder/{name[:-4]}": (root / "files" / "a folder" / name).read_bytes() for name in arrays}

    @pytest.mark.parametrize("options", SPARSE)
    def test_are_read_with_zeros_in_their_holes(self, tmp_path: Path, options: str) -> None:
        expected = self.packed(tmp_path, options)
        source = WebdatasetSource(WebdatasetSpec(url=str(tmp_path / "in")))
        found = source.listing()
        assert found.unusable is None and found.sizes.tolist() == [len(data) for data in expected.values()]
        assert sum("s#" in name for name in found.sources) == 2, "the full one is read by its offset"
        made = shard(tmp_path / "in", tmp_path / "ds")
        (part,) = made.shards
        reader = open_dataset(str(tmp_path / "ds")).reader(part)
        assert dict(zip(reader.keys, reader.read_rows(list(range(3))), strict=True)) == {
            key.replace(" ", "%20"): data for key, data in expected.items()
        }

    def test_in_compressed_and_joined_tars(self, tmp_path: Path) -> None:
        expected = self.packed(tmp_path, SPARSE[3], lambda tar: gzip.compress(tar_bytes(samples(0, 1)) + tar))
        source = WebdatasetSource(WebdatasetSpec(url=str(tmp_path / "in"), include="*.npy"))
        assert sorted(source.read(name)[1] for name in source.listing().sources) == sorted(expected.values())

    def test_a_stream_gives_their_values(self, tmp_path: Path) -> None:
        expected = {np.load(io.BytesIO(data)).tobytes() for data in self.packed(tmp_path, SPARSE[3]).values()}
        (batch,) = streamed(tmp_path / "in", steps=1)
        assert {np.asarray(x).tobytes() for x in batch.x} == expected

    @pytest.mark.parametrize("options", SPARSE)
    def test_threads_that_share_a_tar_read_the_right_bytes(self, tmp_path: Path, options: str) -> None:
        expected = self.packed(tmp_path, options)
        source = WebdatasetSource(WebdatasetSpec(url=str(tmp_path / "in")))
        found, tar = source.listing(), TarFile(source.tars.files, "a.tar")
        members = {member.name.removesuffix(".npy"): member for member in (parse_source(name)[1] for name in found.sources)}
        with ThreadPoolExecutor(4) as threads:
            read = threads.map(lambda key: (key, tar.read(members[key])), [*members] * 40)
            assert all(data == expected[key] for key, data in read)
        tar.close()

    def test_are_read_and_listed_again_where_the_descriptor_went_stale(self, tmp_path: Path) -> None:
        data = self.packed(tmp_path, SPARSE[0])["a folder/holes"]
        tar = TarFile(LocalFiles(tmp_path / "in"), "a.tar")

        def make_stale() -> None:  # reading a folder is an OSError, as reading a file whose server lost it is
            folder = os.open(tmp_path, os.O_RDONLY)
            os.dup2(folder, tar.descriptor)
            os.close(folder)

        entries = {}
        for entry in tar.entries(Skipped()):
            entries[entry.name] = entry
            make_stale()
        entry = entries["a folder/holes.npy"]
        assert (entry.kind, entry.size) == (SPARSE_KIND, len(data))
        make_stale()
        assert tar.read(Member(entry.name, entry.offset, entry.size, sparse=True)) == data
        tar.close()

    def test_are_read_from_a_copy_where_tars_of_a_bucket_do_not_fit_into_the_cache(self, s3: S3, tmp_path: Path, monkeypatch) -> None:
        expected = self.packed(tmp_path, SPARSE[0])
        s3.upload(tmp_path / "in", "in")
        monkeypatch.setenv("AECORE_CACHE_BYTES", "1000")
        source = WebdatasetSource(WebdatasetSpec(url=f"{s3.url}/in"))
        names = source.listing().sources
        read = source.prefetch(names)
        assert sorted(read(name)[1] for name in names) == sorted(expected.values())

    def test_cannot_be_adopted_and_the_message_says_what_to_do(self, tmp_path: Path) -> None:
        self.packed(tmp_path, SPARSE[0])
        with pytest.raises(DataError, match=r"a.tar holds '.*holes.*', a sparse file, whose bytes are not in one place: pack it without"):
            adopt_shards(WebdatasetSpec(url=str(tmp_path / "in")), str(tmp_path / "ds"))

    def test_holes_of_terabytes_are_refused_before_they_are_read(self, tmp_path: Path) -> None:
        (tmp_path / "files").mkdir()
        with (tmp_path / "files/a.npy").open("wb") as file:
            file.truncate(1 << 40)
        (tmp_path / "in").mkdir()
        run(["tar", "-cf", str(tmp_path / "in/a.tar"), "--sparse", "-C", str(tmp_path / "files"), "."])
        found = listing(tmp_path / "in")
        assert (found.sizes.tolist(), reason(unusable(found)[0])) == ([0], "member")
        assert "with its holes it has 1099511627776 bytes, more than 1073741824 bytes" in str(unusable(found)[0])

    def test_all_holes_and_links_of_a_tar_are_bounded_together(self, tmp_path: Path) -> None:
        (tmp_path / "files").mkdir()
        for number in range(3):
            with (tmp_path / f"files/{number}.npy").open("wb") as file:
                file.truncate(900 << 20)
        os.link(tmp_path / "files/0.npy", tmp_path / "files/3.npy")
        (tmp_path / "in").mkdir()
        run(["tar", "-cf", str(tmp_path / "in/a.tar"), "--sparse", "-C", str(tmp_path / "files"), "."], check=True)
        whys = [why for why in unusable(listing(tmp_path / "in")) if why is not None]
        assert list(map(reason, whys)) == ["member"] * 3
        assert "would become 1887436800 bytes, more than 1073741824 bytes" in str(whys[0])
        assert "set source.max_inflated_bytes" in str(whys[0])
        assert listing(tmp_path / "in", max_inflated_bytes=4 << 30).unusable is None
        source = WebdatasetSource(WebdatasetSpec(url=str(tmp_path / "in")))
        tracemalloc.start()
        length = len(source.read(source.listing().sources[0])[1])
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert length == 900 << 20 and peak < 1000 << 20, "not twice"
        some = unusable(listing(tmp_path / "in", max_inflated_bytes=2 << 30))
        assert sorted(map(reason, some)) == ["", "", "member", "member"]

    def test_datasets_of_version_1_leave_them_out_as_they_did(self, tmp_path: Path) -> None:
        self.packed(tmp_path, SPARSE[0])
        found = listing(tmp_path / "in", tars=1)
        assert found.keys == ["a%20folder/full"] and any("sparse files" in note for note in found.notes)


class TestDeepJson:
    def test_datasets_of_version_1_keep_the_fields_that_they_gave(self, tmp_path: Path) -> None:
        """JSON of 600 levels, which others have in the quarantine."""
        deep = b'{"name": "x", "deep": ' + b"[" * 600 + b"]" * 600 + b"}"
        write_tar(tmp_path / "a.tar", [("0.png", png(0)), ("0.json", deep)])
        options: dict[str, Any] = {"label": "json:name", "columns": ("name",)}
        found = listing(tmp_path, tars=1, **options)
        assert found.label_names == ["x"] and found.columns["name"].tolist() == ["x"] and found.unusable is None
        assert "more than 500 levels deep" in str(unusable(listing(tmp_path, **options))[0])


class TestAddresses:
    @pytest.fixture
    def tars(self, tmp_path: Path) -> Path:
        for number, name in enumerate(("train/0.tar", "train/1.tar", "val/0.tar", "other/deep/2.tar", "x.txt")):
            write_tar(tmp_path / "in" / name, samples(number, 1))
        return tmp_path / "in"

    @pytest.mark.parametrize(
        ("pattern", "names"),
        [
            ("train/*.tar", ["train/0.tar", "train/1.tar"]),
            ("*/0.tar", ["train/0.tar", "val/0.tar"]),
            ("**/*.tar", ["other/deep/2.tar", "train/0.tar", "train/1.tar", "val/0.tar"]),
            ("{train,val}/?.tar", ["train/0.tar", "train/1.tar", "val/0.tar"]),
            ("train/[!0].tar", ["train/1.tar"]),
            ("train/*", ["train/0.tar", "train/1.tar"]),
        ],
    )
    def test_patterns(self, tars: Path, pattern: str, names: list[str]) -> None:
        found = ExternalTars.at(f"{tars}/{pattern}")
        assert sorted(f"{found.files.url}/{name}" for name in found.names) == [f"{tars}/{name}" for name in names]

    def test_joined_addresses(self, tars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tars)
        for url in ("train/{0..1}.tar::val/0.tar", f"{tars}/train/*.tar::./val/0.tar", "train/0.tar::train/1.tar::val/0.tar::train/0.tar"):
            assert listing(url).keys == ["000000", "000001", "000002"]
        with pytest.raises(DataError, match=r"no tar matches .*train/9\*.tar: check the address, 4 tars are below"):
            listing("train/9*.tar::val/0.tar")

    def test_workers_elsewhere_get_absolute_addresses(self, tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from aecore.store import absolute_url

        monkeypatch.chdir(tars)
        assert absolute_url("train/0.tar::val/0.tar") == f"{tars}/train/0.tar::{tars}/val/0.tar"
        assert absolute_url("a::b") == f"{tars}/a::b", "no tars: a name like any other"
        shard("train/0.tar::val/0.tar", tmp_path / "ds", adopt=True)
        monkeypatch.chdir("/")
        assert open_dataset(str(tmp_path / "ds")).manifest.num_samples("val") == 1

    def test_names_with_stars_and_braces_are_names_first(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "in [x]{1}/a*.tar", samples(0, 2))
        write_tar(tmp_path / "in [x]{1}/ab.tar", samples(2, 2))
        assert len(listing(tmp_path / "in [x]{1}/a*.tar")) == 2
        assert len(listing(tmp_path / "in [x]{1}")) == 4

    def test_buckets_cannot_be_joined(self) -> None:
        with pytest.raises(ConfigError, match=r"joins tars of different buckets"):
            ExternalTars.at("s3://one/a.tar::s3://two/b.tar")


class TestMetadata:
    def test_texts_stay_what_they_are_or_are_refused(self, tmp_path: Path) -> None:
        texts = [b"caf\xe9", b"caf\xe8", b"\xef\xbb\xbfcaf\xc3\xa9", b"a\0b", None]
        fields = ["xy", "x\0y", "\ud800", "xz", "q"]
        files = [(f"{n}.png", png(n)) for n in range(5)] + [(f"{n}.txt", text) for n, text in enumerate(texts) if text is not None]
        path = write_tar(
            tmp_path / "a.tar", files + [(f"{n}.json", json.dumps({"txt": "no", "t": t}).encode()) for n, t in enumerate(fields)]
        )
        found = listing(path, columns=["txt"])
        assert (list(map(reason, unusable(found))), found.columns["txt"].tolist()[2:]) == (
            ["metadata"] * 2 + [""] * 3,
            ["café", "a\0b", None],
        )
        found = listing(path, columns=["t"])
        assert (list(map(reason, unusable(found))), found.columns["t"].tolist()[:2]) == (["", "", "json", "", ""], ["xy", "x\0y"])
        old = listing(path, columns=["t", "txt"], tars=1).columns
        assert (old["t"].tolist()[1], old["txt"].tolist()[::4]) == ("xy", ["caf\ufffd", "no"]), "datasets that exist keep their columns"
        shard(path, tmp_path / "ds", max_bad=0.9, columns=["t", "txt"])
        index = pa.concat_tables(read_table(file.read_bytes(), str(file)) for file in (tmp_path / "ds/shards").glob("*.parquet"))
        assert {*zip(index["t"].to_pylist(), index["txt"].to_pylist(), strict=True)} == {("xz", "a\0b"), ("q", None)}

    def test_fields_that_would_be_one_column_are_refused(self) -> None:
        with pytest.raises(ConfigError, match="source.columns has 'label' and 'json_label', and both would be the column 'json_label'"):
            WebdatasetSpec(columns=("label", "t", "json_label"))
        WebdatasetSpec(columns=("label", "t", "t", "json_t"))

    def test_lists_and_objects_are_json_text(self, tmp_path: Path) -> None:
        fields = [
            {"tags": ["a", "é"], "ann": {"class": n, "box": [1, 2.5]}, "ok": True, "w": 16 + n, "mixed": [1] if n else "b"}
            for n in range(4)
        ]
        files = samples(0, 4, json=lambda n: json.dumps(fields[n]).encode())
        write_tar(tmp_path / "in/a.tar", files)
        made = shard(tmp_path / "in", tmp_path / "ds", columns=("tags", "ann", "ok", "w", "mixed"))
        index = open_dataset(str(tmp_path / "ds")).reader(made.shards[0]).index
        rows = {row["key"]: row for row in index.to_pylist()}
        assert {key: [json.loads(row[name]) for name in ("tags", "ann")] for key, row in rows.items()} == {
            f"{n:06d}": [fields[n]["tags"], fields[n]["ann"]] for n in range(4)
        }
        assert [rows[f"{n:06d}"][name] for n in range(2) for name in ("ok", "w", "mixed")] == [True, 16, "b", True, 17, "[1]"]

    def test_whole_numbers_of_64_bits_stay_what_they_are(self, tmp_path: Path) -> None:
        ids = [2**63 - 1, None, 2**53 + 1]
        write_tar(tmp_path / "a.tar", samples(0, 3, json=lambda n: json.dumps({"id": ids[n]}).encode()))
        assert listing(tmp_path, columns=("id",)).columns["id"].tolist() == ["9223372036854775807", None, "9007199254740993"]

    @pytest.mark.parametrize("text", [b"{not json", b"\xff\xfe", b"[" * 100_000, b'["a"]', b"3"])
    def test_a_sample_whose_json_cannot_be_read_is_in_the_quarantine(self, tmp_path: Path, text: bytes) -> None:
        write_tar(tmp_path / "in/a.tar", samples(0, 3, json=lambda n: text if n == 1 else b'{"w": %d}' % n))
        made = shard(tmp_path / "in", tmp_path / "ds", columns=("w",), max_bad=0.4)
        index = open_dataset(str(tmp_path / "ds")).reader(made.shards[0]).index
        assert dict(zip(index["key"].to_pylist(), index["w"].to_pylist(), strict=True)) == {"000000": 0, "000002": 2}
        assert str(index.schema.field("w").type) == "int64", "the sample in the quarantine decides no type"
        assert [found[0] for found in quarantine(tmp_path / "ds").values()] == ["json"]
        assert listing(tmp_path / "in").unusable is None, "nobody asked for its fields"

    def test_samples_without_an_image_count(self, tmp_path: Path) -> None:
        files = [*samples(0, 3), ("9.cls", b"1"), ("8.json", b"{}"), ("7.wav", b"x"), ("7.txt", b"x"), ("6.pth", b"x")]
        write_tar(tmp_path / "in/a.tar", files)
        with pytest.raises(
            DataError,
            match=r"(?s)4 of 7 samples cannot be used.*no_data 4.*'7' has no image or array that is read, only txt, wav \(audio files",
        ):
            shard(tmp_path / "in", tmp_path / "ds")
        made = shard(tmp_path / "in", tmp_path / "ds", max_bad=0.6)
        assert (made.num_samples(), made.reasons) == (3, {"no_data": 4})


def npz(**arrays: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.savez_compressed(out, **arrays)
    return out.getvalue()


class TestArchivedArrays:
    def test_an_npz_member_is_the_array_in_it(self, tmp_path: Path) -> None:
        arrays = [np.arange(12, dtype=dtype).reshape(3, 4) * 1.5 for dtype in ("f4", "f8", ">f4")] + [np.asfortranarray(np.eye(3, 4))]
        made = [npz(x=arrays[0]), npz(arr_0=arrays[1]), npz(image=arrays[2], label=np.array(3)), npz(x=arrays[3], y=np.zeros(2))]
        write_tar(tmp_path / "a.tar", [(f"{n}.npz", data) for n, data in enumerate(made)])
        source = WebdatasetSource(WebdatasetSpec(url=str(tmp_path)))
        found = source.listing()
        for array, name in zip(arrays, found.sources, strict=True):
            ext, data = source.read(name)
            read = np.load(io.BytesIO(data), allow_pickle=False)
            assert (ext, read.dtype) == ("npy", array.dtype)
            np.testing.assert_array_equal(read, array)

    def test_what_is_no_sample_is_in_the_quarantine_and_nothing_is_executed(self, tmp_path: Path) -> None:
        class Evil:
            def __reduce__(self) -> tuple[object, tuple[str, str]]:
                return open, (str(tmp_path / "executed"), "w")

        good, objects = npz(x=np.zeros((2, 2), "f4")), np.array([Evil()], object)
        bad = {
            "unsupported": npz(x=objects),
            "ambiguous": npz(a=np.zeros(2), b=np.zeros(2)),
            "no_data": npz(),
            "format": good[:-30],
            "too_large": npz(x=np.zeros(50_000_000, "u1")),
        }
        write_tar(tmp_path / "in/a.tar", [("good.npz", good), *((f"{name}.npz", data) for name, data in bad.items())])
        spec = {"max_bad": 0.9, "max_inflated_bytes": 40_000_000}
        made = shard(tmp_path / "in", tmp_path / "ds", **spec)
        assert (made.num_samples(), made.reasons) == (1, dict.fromkeys(sorted(bad), 1))
        assert not (tmp_path / "executed").exists()
        with pytest.raises(DataError, match=r"a.tar holds 'good.npz', an archive, .*write .npy members, or shard it"):
            shard(tmp_path / "in", tmp_path / "adopted", adopt=True, **spec)


class TestOlderDatasets:
    """A dataset that was begun by the rules of version 1 goes on by them: what it left out stays left out."""

    def odd(self, path: Path, first: int) -> Path:
        files = [*samples(first, 4), (f"only-{first}.cls", b"1"), (f"dotted {first}.5.png", png(1)), (f"{first}.npz", npz(x=np.zeros(3)))]
        write_tar(path, files)
        add_link(path, f"link-{first}.png", f"{first:06d}.png", tarfile.LNKTYPE)
        path.write_bytes(path.read_bytes() + tar_bytes(samples(first + 100, 2)))
        return path

    def test_the_next_generation(self, tmp_path: Path) -> None:
        self.odd(tmp_path / "in/a.tar", 0)
        first = shard(tmp_path / "in", tmp_path / "ds", tars=1)
        assert "tars" not in first.identity["source"]
        assert (first.num_samples(), first.quarantined) == (4, 0)
        assert shard(tmp_path / "in", tmp_path / "ds") == first, "nothing is new by its rules"
        self.odd(tmp_path / "in/b.tar", 4)
        second = shard(tmp_path / "in", tmp_path / "ds")
        assert (second.number, second.num_samples(), second.quarantined, second.identity) == (2, 8, 0, first.identity)
        new = shard(tmp_path / "in", tmp_path / "new", max_bad=0.9)
        assert (new.identity["source"]["tars"], new.num_samples(), new.quarantined) == (2, 18, 2)

    def test_an_unfinished_first_generation(self, tmp_path: Path) -> None:
        self.odd(tmp_path / "in/a.tar", 0)
        whole = shard(tmp_path / "in", tmp_path / "whole", tars=1)
        with pytest.raises(ZeroDivisionError):
            shard_dataset(WebdatasetSpec(url=str(tmp_path / "in"), tars=1), str(tmp_path / "ds"), on_part=lambda *_: 1 / 0)
        assert shard(tmp_path / "in", tmp_path / "ds") == whole


NAMES = st.text(st.sampled_from("ab01-_ .é/"), min_size=1, max_size=12).filter(
    lambda name: not any(part.startswith(".") or not part for part in name.split("/")) and not name.endswith(" ")
)


ODD_NAMES = st.builds(
    "{}{}{}".format,
    st.sampled_from(["", "", "./", "a/", "A/", "../", "/", "a.b/", "__MACOSX/", ".git/"]),
    st.lists(st.sampled_from(["x", "X", "b1", "B1", "1", "README", "left", "Left", "", "__x__", "._x", "é"]), min_size=1, max_size=3).map(
        ".".join
    ),
    st.sampled_from([".png", ".PNG", ".Png", ".cls", ".CLS", ".json", ".npz", ".bin", ".", ""]),
)
KINDS = [tarfile.REGTYPE] * 6 + [tarfile.DIRTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE]
WANTED = ["", "", "left.png", "B1.png"]


class _Names(Skipped):
    """Names of all that was counted, also beyond the examples."""

    def __init__(self) -> None:
        super().__init__()
        self.names, self.again, self.documents = list[str](), list[str](), list[str]()

    def add(self, what: str, example: str = "", remedy: str = "", *, count: int = 1, kept: bool = False, ext: str = "") -> None:
        super().add(what, example, remedy, count=count, kept=kept, ext=ext)
        {DOCUMENTS: self.documents, AGAIN: self.again}.get(what, self.names).append(example)


class TestAgainstOthers:
    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        names=st.lists(NAMES, min_size=1, max_size=8, unique_by=str.lower),
        order=st.randoms(use_true_random=False),
        parts=st.integers(1, 3),
        formats=st.lists(st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]), min_size=3, max_size=3),
        closed=st.booleans(),
        compress=st.sampled_from([None, *TestArchives.COMPRESSORS]),
        sides=st.lists(st.sampled_from(["cls", "json", "txt"]), unique=True, min_size=1),
    )
    def test_every_sample_of_any_names_orders_and_formats_is_found_with_its_bytes(
        self, tmp_path: Path, names: list, order: Any, parts: int, formats: list, closed: bool, compress: str | None, sides: list
    ) -> None:
        """One image and its labels for each full name, in any order of members: each is one sample, and nothing else is."""
        files: list[Files] = [[] for _ in range(parts)]
        for number, name in enumerate(names):
            files[number % parts] += [(f"{name}.png", b"image %d" % number), *((f"{name}.{side}", b"%d" % number) for side in sides)]
        for part in files:
            order.shuffle(part)
        data = b"".join(tar_bytes(part, form, closed or n + 1 < parts) for n, (part, form) in enumerate(zip(files, formats, strict=False)))
        (tmp_path / "a.tar").write_bytes(data if compress is None else TestArchives.COMPRESSORS[compress](data))
        source = WebdatasetSource(WebdatasetSpec(url=str(tmp_path / "a.tar")))
        found = source.listing()
        assert found.unusable is None
        read = sorted(source.read(name)[1] for name in found.sources)
        assert read == sorted(b"image %d" % number for number in range(len(names)))
        if "cls" in sides:
            assert found.label_names == [source.read(name)[1].split()[1].decode() for name in found.sources]
        with tarfile.open(fileobj=io.BytesIO(data), ignore_zeros=True) as tar:
            theirs = {info.name: tar.extractfile(info).read() for info in tar if info.name.endswith(".png")}  # type: ignore[union-attr]
        assert {name.partition("#")[2].partition("#")[2]: source.read(name)[1] for name in found.sources} == theirs

    @settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        members=st.lists(st.tuples(ODD_NAMES, st.sampled_from(KINDS), ODD_NAMES), min_size=1, max_size=9), wanted=st.sampled_from(WANTED)
    )
    def test_every_member_is_stored_or_quarantined_or_counted(self, tmp_path: Path, members: list, wanted: str) -> None:
        with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
            for name, kind, target in members:
                info = tarfile.TarInfo(name)
                info.type, info.linkname = kind, target
                tar.addfile(info)
        counted = _Names()
        file = TarFile(ExternalTars.at(str(tmp_path)).files, "a.tar")
        found, broken = tar_samples(file, TarReading(wanted), counted)
        entries = [entry.name for entry in file.entries(Skipped())]
        file.close()
        assert broken is None
        usable, bad = [sample for sample in found if sample.bad is None], [sample for sample in found if sample.bad is not None]
        assert len({sample.key for sample in usable}) == len(usable) == len({sample.data.name for sample in usable})
        assert all(data_extension(sample.data.name.lower()) for sample in usable)
        inside = [member.name for sample in found for member in ({"": sample.data} | dict(sample.members)).values()]
        known = Counter({name: inside.count(name) > 0 for name in inside})  # the data of a sample is a member of it too
        known.update(name for name in counted.names if name not in inside)
        known.update(counted.again)
        documents = tuple(f"{key}." for key in counted.documents)
        for name, count in Counter(entries).items():
            into = any(other.startswith(f"{name}/") for other in inside)  # a link to a folder: what it leads to
            assert known[name] >= count or name in {sample.key for sample in bad} or name.startswith(documents) or into, (name, count)

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        keys=st.lists(st.text("abc01-_/", min_size=1, max_size=8), min_size=1, max_size=6, unique=True),
        extensions=st.lists(st.sampled_from(["png", "jpg", "cls", "json", "txt", "bin", "wav"]), min_size=1, max_size=4, unique=True),
    )
    def test_names_with_one_dot_are_grouped_as_webdataset_does(self, tmp_path: Path, keys: list, extensions: list) -> None:
        from webdataset.tariterators import group_by_keys, tar_file_iterator

        keys = [key for key in keys if not key.endswith("/") and not key.startswith(("/", "__")) and "//" not in key]
        files = [(f"{key}.{ext}", f"{key} {ext}".encode()) for key in keys for ext in extensions]
        path = write_tar(tmp_path / "a.tar", files)
        with path.open("rb") as stream:
            members = ({**member, "__url__": "a.tar"} for member in tar_file_iterator(stream))
            theirs = {sample["__key__"]: {k: v for k, v in sample.items() if k[:2] != "__"} for sample in group_by_keys(members)}
        tar = TarFile(ExternalTars.at(str(path)).files, "a.tar")
        samples, broken = tar_samples(tar, TarReading(), Skipped())
        ours = {sample.key: {ext: tar.read(member) for ext, member in sample.members.items()} for sample in samples}
        tar.close()
        assert (ours, broken) == (theirs, None)
        images = {"png", "jpg"} & set(extensions)
        assert {reason(sample.bad) for sample in samples} == ({["no_data", "", "ambiguous"][len(images)]} if keys else set())

    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_a_damaged_tar_gives_samples_or_a_typed_error(self, tmp_path: Path, data: Any) -> None:
        whole = bytearray(tar_bytes(samples(0, 3), data.draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))))
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.integers(0, len(whole) - 1))
            whole[at] = data.draw(st.integers(0, 255))
        cut = data.draw(st.integers(0, len(whole)))
        (tmp_path / "a.tar").write_bytes(whole[: data.draw(st.sampled_from([cut, len(whole)]))])
        try:
            found = listing(tmp_path / "a.tar", bad_tars="skip")
        except DataError as error:
            assert "holds no sample in 1 tar" in str(error)  # noqa: PT017  # a few zeros are an empty tar
        else:
            assert len(found) >= 1


def sparse_tar(path: Path, size: int, header: bytes, format: int = tarfile.GNU_FORMAT) -> Path:
    """Write a tar of one `.npy` member of `size` bytes, of zeros after its header, as a sparse file, and of one image after it."""
    info = tarfile.TarInfo("big.npy")
    info.size = size
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(info.tobuf(format) + header)
        file.seek(len(info.tobuf(format)) + size + -size % 512)
        file.write(tar_bytes(samples(0, 1)))
    assert path.stat().st_blocks * 512 < 1 << 20
    return path


def npy_header(shape: tuple[int, ...], dtype: str = "f4") -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape})
    return out.getvalue()


class TestLargeMembers:
    @pytest.mark.parametrize("size", [(1 << 31) + 5, (1 << 32) + 5, (1 << 33) + 5])
    @pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    def test_what_comes_after_is_found(self, tmp_path: Path, size: int, format: int) -> None:
        path = sparse_tar(tmp_path / "a.tar", size, b"", format)
        source = WebdatasetSource(WebdatasetSpec(url=str(path)))
        found = source.listing()
        with tarfile.open(path) as tar:
            theirs = [(info.name, info.offset_data, info.size) for info in tar if not info.name.endswith("cls")]
        assert [tuple(name.split("#")[1:]) for name in found.sources] == [(f"{at}+{num}", name) for name, at, num in theirs]
        assert source.read(found.sources[1]) == ("png", png(0))

    def test_a_member_that_fits_no_shard_is_in_the_quarantine_unread(self, tmp_path: Path) -> None:
        sparse_tar(tmp_path / "in/a.tar", 1 << 33, npy_header((1 << 31,)))
        made = shard(tmp_path / "in", tmp_path / "ds", max_bad=0.5)
        assert (made.num_samples(), made.reasons) == (1, {"too_large": 1})
        assert stored(tmp_path / "ds") == {"000000": (0, 0)}

    def test_reads_that_return_less_are_continued(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Linux returns at most 2 GiB - 4 KiB at once; here 1,000 bytes."""
        path = write_tar(tmp_path / "a.tar", [("a.npy", data := bytes(range(256)) * 100)])
        pread, preadv = os.pread, os.preadv
        monkeypatch.setattr(os, "pread", lambda descriptor, size, at: pread(descriptor, min(size, 1000), at))
        monkeypatch.setattr(os, "preadv", lambda descriptor, views, at: preadv(descriptor, [memoryview(views[0])[:1000]], at))
        source = WebdatasetSource(WebdatasetSpec(url=str(path)))
        assert source.read(source.listing().sources[0]) == ("npy", data)

    @pytest.mark.long
    @pytest.mark.parametrize("adopt", [False, True])
    def test_over_two_gibibytes_are_read_as_they_are(self, tmp_path: Path, adopt: bool) -> None:
        """The values compare with `np.memmap` of the tar; about two copies are in memory at once."""
        shape = ((1 << 29) + 3,)
        header = npy_header(shape)
        size = len(header) + 4 * shape[0]
        path = sparse_tar(tmp_path / "in/a.tar", size, header)
        with path.open("r+b") as file:
            for at in (0, size // 2 & -4, size - 4):
                file.seek(512 + max(at, len(header)))
                file.write(np.float32(at).tobytes())
        made = shard(path, tmp_path / "ds", adopt=adopt)
        readers = map(open_dataset(str(tmp_path / "ds")).reader, made.shards)
        reader = next(reader for reader in readers if "big" in reader.keys)
        data = reader.read_rows([reader.keys.index("big")])[0]
        values = np.memmap(path, np.float32, "r", 512 + len(header), shape)
        assert len(data) == size
        assert np.array_equal(np.frombuffer(data, np.float32, offset=len(header)), values)


class TestLabelsInTexts:
    @pytest.mark.parametrize("label", ["cls", "txt", "json:a"])
    def test_two_classes_never_become_one(self, tmp_path: Path, label: str) -> None:
        """What is no text is quarantined; what programs write before a text belongs to no class."""
        if label.startswith("json"):
            texts = [json.dumps({"a": text}).encode() for text in ("1", "\ufeff1", "a\0b", "ab", "\ud800", "\ud801", "caf\xe9")]
            texts += [b'\xef\xbb\xbf{"a": "1"}', b'{"a": "caf\xe9"}']
        else:
            texts = [b"1", b"\xef\xbb\xbf1\r\n", b"a\0b", b"ab", b"\xed\xa0\x80", b"\xff\xfe1\0", "caf\xe9".encode(), b"1", b"caf\xe9"]
        ext = label.partition(":")[0]
        path = write_tar(tmp_path / "in/a.tar", [file for n, t in enumerate(texts) for file in ((f"{n}.png", png(n)), (f"{n}.{ext}", t))])
        found = listing(path, label=label)
        expected = ["1", "1", "", "ab", "", "", "caf\xe9", "1", ""]
        assert (found.label_names, [reason(bad) == "" for bad in unusable(found)]) == (expected, [text != "" for text in expected])
        old = listing(path, label=label, tars=1).label_names
        assert old is not None and old[2:4] == ["ab", "ab"], "datasets that exist keep their classes"
        if label == "cls":
            assert {int(x[0, 0, 0]) for batch in streamed(tmp_path / "in", steps=4, max_bad=1) for x in batch.x} == {0, 1, 3, 6, 7}

    def test_the_remedy_for_labels_in_txt_members_works(self, tmp_path: Path) -> None:
        files = [(f"{n}.{ext}", data) for n in range(6) for ext, data in (("png", png(n)), ("txt", [b"cat", b" dog\n"][n % 2]))]
        write_tar(tmp_path / "in/a.tar", files)
        (note,) = listing(tmp_path / "in").notes
        assert note.startswith("no sample has a label, since none has a .cls: set source.label=txt (the .txt members")
        shard(tmp_path / "in", tmp_path / "ds", label="txt")
        assert open_dataset(str(tmp_path / "ds")).manifest.classes == ("cat", "dog")
        assert stored(tmp_path / "ds") == {str(n): (n, n % 2) for n in range(6)}

    def test_samples_without_one_are_quarantined_and_other_tars_get_no_such_advice(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "a.tar", [("0.png", png(0)), ("0.txt", b"cat"), ("1.png", png(1)), ("2.png", png(2)), ("2.txt", b"x" * 2000)])
        found = listing(tmp_path, label="txt")
        assert (list(map(reason, unusable(found))), found.label_names) == (["", "no_label", "metadata"], ["cat", "", ""])
        write_tar(tmp_path / "b/b.tar", [("0.png", png(0))])
        assert "txt" not in "".join(listing(tmp_path / "b").notes)

    def test_labels_that_are_no_names(self, tmp_path: Path) -> None:
        """Numbers that are none would be one class, and long texts fill the manifest."""
        texts = ["Infinity", "1e400", "NaN", '"' + "z" * 1025 + '"', '"' + "é" * 513 + '"', '"' + "é" * 512 + '"', "2.0"]
        files = [file for n, text in enumerate(texts) for file in ((f"{n}.png", png(n)), (f"{n}.json", b'{"a": %s}' % text.encode()))]
        found = listing(write_tar(tmp_path / "a.tar", files), label="json:a")
        assert (list(map(reason, unusable(found))), found.label_names) == (["label"] * 5 + [""] * 2, [""] * 5 + ["é" * 512, "2"])

    def test_folders_that_are_one_when_unpacked_are_one_class(self, tmp_path: Path) -> None:
        names = ["cat/0.png", "cat//1.png", "./cat/2.png", "x/../cat/9.png", "cat/./3.png", "././cat/4.png", "dog/5.png"]
        path = write_tar(tmp_path / "a.tar", [(name, png(n)) for n, name in enumerate(names)])
        for rule in ("path", "leaf"):
            made = shard(path, tmp_path / rule, label=rule, max_bad=0.2)
            assert made.classes == ("cat", "dog") and made.statistics["train"].classes == {"cat": 5, "dog": 1}


class TestWorkIsBounded:
    """Small tars that asked for minutes or gigabytes."""

    def header(self, name: str, kind: bytes = tarfile.REGTYPE, target: str = "", size: int = 0, above: str = "") -> bytes:
        info = tarfile.TarInfo(name)
        info.type, info.linkname, info.size = kind, target, size
        data = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
        data[345 : 345 + len(above)] = above.encode()
        data[148:156] = b" " * 8
        data[148:156] = b"%06o\0 " % sum(data)
        return bytes(data)

    def extended(self, kind: bytes, data: bytes) -> bytes:
        return self.header("x", kind, size=len(data)) + data + bytes(-len(data) % 512)

    def record(self, key: str, value: str) -> bytes:
        text = f" {key}={value}\n".encode()
        size = len(text) + len(str(len(text)))
        return b"%d" % (size + (len(str(size)) > len(str(len(text))))) + text

    def found(self, path: Path, data: bytes) -> dict[str, int]:
        """Return how many samples have each reason, "" for those that can be used."""
        path.write_bytes(tar_bytes([("0.png", png(0))])[:1024] + data + bytes(1024))
        with contextlib.closing(TarFile(LocalFiles(path.parent), path.name)) as tar:
            made = tar_samples(tar, TarReading(), Skipped())
        assert made.broken is None
        return dict(Counter(reason(sample.bad) for sample in made.samples))

    def found_in_memory(self, path: Path, data: bytes) -> dict[str, int]:
        tracemalloc.start()
        found, (_, peak) = self.found(path, data), tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak - len(data) < 24 << 20, f"{peak} bytes"
        return found

    def found_in_seconds(self, path: Path, data: bytes, most: float = 3) -> dict[str, int]:
        started = time.process_time()
        found, took = self.found(path, data), time.process_time() - started
        assert took < most, f"{took} s"
        return found

    def test_long_headers_are_not_kept(self, tmp_path: Path) -> None:
        """Of a thousand of 1 MB, 4 MB as text, a compressed tar of 1 MB needed 4 GB."""
        wide = "\U0001f600" + "a" * 1_000_000
        fields = b"".join(self.extended(b"x", self.record(f"k{n}", wide)) for n in range(8))
        assert self.found_in_memory(tmp_path / "a.tar", fields + self.header("1.png")) == {"": 2}
        names = [self.extended(b"L", f"{n}{wide}.png".encode()) + self.header("a") for n in range(8)]
        assert self.found_in_memory(tmp_path / "b.tar", b"".join(names)) == {"": 1, "name": 8}
        links = [self.extended(b"K", wide.encode()) + self.header(f"{n}.png", tarfile.SYMTYPE) for n in range(1, 9)]
        assert self.found_in_memory(tmp_path / "c.tar", b"".join(links)) == {"": 1, "link": 8}

    @pytest.mark.parametrize("kind", [b"x", b"g"])
    def test_a_long_number_in_a_header_of_a_sparse_member(self, tmp_path: Path, kind: bytes) -> None:
        """The standard library of some versions of Python looks for it in the square of its digits."""
        number = self.extended(kind, self.record("comment", "1" * 100_000))
        of_sparse = [("major", "1"), ("minor", "0"), ("name", "s.png"), ("realsize", "512")]
        fields = self.extended(b"x", b"".join(self.record(f"GNU.sparse.{key}", value) for key, value in of_sparse))
        member = self.header("s", size=1024) + b"1\n0\n512\n".ljust(512, b"\0") + bytes(512)
        assert self.found_in_seconds(tmp_path / "a.tar", number + fields + member) == {"": 1, "member": 1}
        assert self.found(tmp_path / "b.tar", number + self.header("1.png") + fields + member) == {"": 3}

    def test_a_map_of_holes_is_bounded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A list of all numbers of a map of 300 MB is some gigabytes, and takes minutes."""
        monkeypatch.setattr("aecore.data.sources._tar_file.MAX_MAP_BYTES", 1 << 16)
        of_sparse = [("major", "1"), ("minor", "0"), ("name", "s.png"), ("realsize", "512")]
        fields = self.extended(b"x", b"".join(self.record(f"GNU.sparse.{key}", value) for key, value in of_sparse))
        for number, reasons in ((10_000, {"": 2}), (40_000, {"": 1, "member": 1})):
            data = b"%d\n" % number + b"0\n" * 2 * number
            data += bytes(-len(data) % 512)
            assert self.found(tmp_path / "a.tar", fields + self.header("s", size=len(data)) + data) == reasons

    def test_links_over_many_links(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """20,000 of them in a tar of 10 MB took a minute."""
        chain = [self.header(f"c{n}", tarfile.SYMTYPE, f"c{n + 1}") for n in range(29)]
        ends = self.header("c29", size=512) + bytes(512)
        links = [self.header(f"l{n}.png", tarfile.SYMTYPE, "c0") for n in range(600)]
        assert self.found(tmp_path / "a.tar", b"".join([*chain, *links, ends])) == {"": 601}
        links = [self.header(f"l{n}.png", tarfile.SYMTYPE, "c27") for n in range(600)]
        monkeypatch.setattr("aecore.data.sources._tar_samples.MAX_DETOURS", 1000)
        assert self.found(tmp_path / "b.tar", b"".join([*chain, *links, ends])) == {"": 601}, "the first two do not count"
        links = [self.header(f"l{n}.png", tarfile.SYMTYPE, "c0") for n in range(600)]
        found = self.found(tmp_path / "c.tar", b"".join([*chain, *links, ends]))
        assert found.keys() == {"", "link"} and found["link"] > 550

    def test_thousands_of_joined_tars(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        read = list[int]()
        pread = os.pread
        monkeypatch.setattr(os, "pread", lambda descriptor, size, at: (data := pread(descriptor, size, at), read.append(len(data)))[0])
        parts = b"".join(self.header(f"{n}.png") + bytes(512) for n in range(1, 3000))
        assert self.found(tmp_path / "a.tar", bytes(1024) + parts) == {"": 3000}
        assert sum(read) < 40 * len(parts), "1 MiB for each before"

    def test_thousands_of_labels_of_one_key(self, tmp_path: Path) -> None:
        names = ["x.txt", *(f"x.w{n}.cls" for n in range(4000)), *(f"x.{n}.cls" for n in range(4000))]
        assert self.found_in_seconds(tmp_path / "a.tar", b"".join(map(self.header, names)), 1.5) == {"": 1, "no_data": 4000}
