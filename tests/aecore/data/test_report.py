"""The report of a generation: its numbers against plain ones, over generations; missing or damaged it is no fault of the dataset."""

import hashlib
import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aecore.data.about import AboutSpec
from aecore.data.dataset import open_dataset
from aecore.data.read.verify import verify_dataset
from aecore.data.sources.arrays import ArraysSpec
from aecore.data.sources.folder import FolderSpec
from aecore.data.sources.webdataset import WebdatasetSpec
from aecore.data.write import report as reports
from aecore.data.write.job import adopt_shards, shard_dataset
from aecore.data.write.report import read_report, report_name
from aecore.data.write.spec import ShardSpec
from aecore.errors import ConfigError, DataError
from aecore.maintenance.gc import collect_garbage
from aecore.store import open_store
from tests.aecore.data.test_living import V1, pictures, put, shard
from tests.aecore.data.tiny import encoded, image
from tests.documents import rewrite


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def report_of(url: Path) -> dict[str, Any]:
    found = read_report(open_dataset(str(url)))
    assert found is not None
    return found


def the_same(report: dict[str, Any]) -> dict[str, Any]:
    """What a report says apart from its generation and its times."""
    return {name: value for name, value in report.items() if name not in ("number", "manifest_sha256", "seconds")}


def test_counts_means_and_constant_images_are_those_of_numpy(tmp_path):
    images = [image(number, 9) for number in range(30)] + [np.full((9, 9), 7, np.uint8)]
    source = put(tmp_path / "src", {f"train/c{number % 2}/{number}.png": encoded(each) for number, each in enumerate(images)})
    put(tmp_path / "src", {"test/c0/x.png": encoded(image(99, 9))})
    shard(source, tmp_path / "out")
    report = report_of(tmp_path / "out")
    assert report["counts"]["splits"] == {"train": 31, "test": 1}
    assert report["counts"]["classes"] == {"train": {"c0": 16, "c1": 15}, "test": {"c0": 1}}
    assert (report["counts"]["sizes"], report["counts"]["modes"]) == ({"9x9": 32}, {"L": 32})
    (values,) = report["pixels"]["formats"]
    assert values["mean"] == pytest.approx([np.mean(images)])
    assert values["std"] == pytest.approx([np.std(images)])
    assert report["pixels"]["constant"] == {"samples": 1, "examples": ["train/c0/30"]}
    assert (report["pixels"]["samples"], report["pixels"]["of"], report["pixels"]["exact"]) == (31, 31, True)
    assert report["seconds"].keys() == {"list and compare", "shards", "commit", "report"}


@pytest.mark.parametrize("kind", ["rgb", "jpeg", "float", "uint16", "volume"])
def test_every_kind_of_sample_has_means(tmp_path, kind):
    rng = np.random.default_rng(0)
    shape = {"rgb": (6, 12, 12, 3), "jpeg": (6, 12, 12, 3), "volume": (6, 5, 5, 5)}.get(kind, (6, 12, 12))
    dtype = {"float": np.float32, "uint16": np.uint16}.get(kind, np.uint8)
    values = (rng.random(shape) * 200).astype(dtype)
    if kind == "jpeg":
        source: Any = put(tmp_path / "src", {f"{number}.jpg": encoded(each, "JPEG") for number, each in enumerate(values)})
    else:
        np.savez(tmp_path / "data.npz", x=values)
        source = ArraysSpec(url=str(tmp_path / "data.npz"))
    shard(source, tmp_path / "out")
    (found,) = report_of(tmp_path / "out")["pixels"]["formats"]
    axes = (0, 1, 2) if kind in ("rgb", "jpeg") else None
    assert found["mean"] == pytest.approx(np.atleast_1d(values.mean(axis=axes, dtype=np.float64)), rel=0.02 if kind == "jpeg" else 1e-6)
    if kind != "jpeg":
        assert found["std"] == pytest.approx(np.atleast_1d(values.std(axis=axes, dtype=np.float64)), rel=1e-4)
    assert found["dtype"] == np.dtype(dtype).name


def test_few_samples_are_looked_at_by_the_hash_of_their_key_and_the_report_says_how_many(tmp_path, monkeypatch):
    monkeypatch.setattr(reports, "MOST_SAMPLES", 10)
    source = put(tmp_path / "src", pictures([f"{number}.png" for number in range(40)]))
    for name, shuffle in (("one", True), ("two", False)):
        shard(source, tmp_path / name, max_samples=16, shuffle=shuffle)
    one, two = report_of(tmp_path / "one"), report_of(tmp_path / "two")
    assert (one["pixels"]["samples"], one["pixels"]["of"], one["pixels"]["exact"]) == (10, 40, False)
    assert one["pixels"] == two["pixels"], "whatever order they are stored in"
    shard(source, tmp_path / "all", check="decode")
    assert report_of(tmp_path / "all")["pixels"]["exact"]


@pytest.mark.parametrize("most", [8, 4096])
def test_a_generation_has_the_numbers_of_a_fresh_dataset_and_decodes_what_changed(tmp_path, monkeypatch, most):
    monkeypatch.setattr(reports, "MOST_SAMPLES", most)
    decoded: list[int] = []
    real = reports._measured
    monkeypatch.setattr(reports, "_measured", lambda dataset, ordinals: decoded.append(len(ordinals)) or real(dataset, ordinals))
    names = [f"train/{number:03d}.png" for number in range(60)]
    source = put(tmp_path / "src", pictures(names) | {"train/flat.png": encoded(np.zeros((4, 4), np.uint8))} | pictures(["val/y.png"], 90))
    shard(source, tmp_path / "out", max_samples=16)
    put(tmp_path / "src", pictures(["train/new.png", "train/003.png", "val/x.png"], 200))
    for name in ("007", "flat"):
        (tmp_path / f"src/train/{name}.png").unlink()
    decoded.clear()
    shard(source, tmp_path / "out", max_samples=16)
    assert sum(decoded) <= 6, "those that came and those that went"
    shard(source, tmp_path / "fresh", max_samples=16)
    mine, fresh = (the_same(report_of(tmp_path / name)) for name in ("out", "fresh"))
    for report in (mine, fresh):
        report["tiny"].pop("examples")  # some, of whatever shard
    assert mine == fresh


def test_a_tar_that_was_changed_in_place_makes_the_report_of_what_is_there(tmp_path, caplog):
    for number, name in enumerate(("a", "b")):
        write_tar(tmp_path / f"tars/{name}.tar", {f"{name}{row}.png": encoded(image(10 * number + row)) for row in range(6)})
    source = WebdatasetSpec(url=str(tmp_path / "tars"))
    adopt_shards(source, str(tmp_path / "out"))
    write_tar(tmp_path / "tars/a.tar", {f"a{row}.png": encoded(image(50 + row)) for row in range(4)})
    adopt_shards(source, str(tmp_path / "out"), shards=ShardSpec(max_removed=1))
    assert "cannot be made" not in caplog.text
    adopt_shards(source, str(tmp_path / "fresh"))
    mine, fresh = (the_same(report_of(tmp_path / name)) for name in ("out", "fresh"))
    assert {**mine, "tiny": {}} == {**fresh, "tiny": {}}, "whose examples are some, of whatever shard"


def test_values_that_are_no_numbers_make_no_report_unreadable(tmp_path):
    (tmp_path / "src").mkdir()
    for number, value in enumerate((0.5, np.nan, np.inf, 1e200)):
        np.save(tmp_path / f"src/{number}.npy", np.full((9, 12, 3), value))
    np.save(tmp_path / "src/big.npy", np.arange(400 * 400 * 12, dtype=np.int16).reshape(400, 400, 12))
    shard(FolderSpec(url=str(tmp_path / "src"), extensions=("npy",)), tmp_path / "out")
    pixels = report_of(tmp_path / "out")["pixels"]
    assert pixels["unreadable"] == 3
    assert {(each["dtype"], each["samples"]) for each in pixels["formats"]} == {("float64", 1), ("int16", 1)}
    big = next(each for each in pixels["formats"] if each["dtype"] == "int16")
    values = np.arange(400 * 400 * 12, dtype=np.int16).reshape(-1, 12).astype(np.int64)
    assert (big["sum"], big["squares"]) == (values.sum(axis=0).tolist(), (values**2).sum(axis=0).tolist())


def test_tiny_and_odd_images_are_found_in_headers_with_examples(tmp_path):
    files = {f"{number}.png": encoded(image(number, 40)) for number in range(120)}
    files |= {"dot.png": encoded(image(200, 2)), "banner.png": encoded(np.arange(20 * 200, dtype=np.uint8).reshape(20, 200))}
    files |= {"colour.png": encoded(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))}
    shard(put(tmp_path / "src", files), tmp_path / "out")
    report = report_of(tmp_path / "out")
    assert report["tiny"] == {"samples": 1, "formats": {"2x2x1/L": 1}, "examples": ["dot"]}
    assert (report["odd"]["samples"], sorted(report["odd"]["examples"])) == (2, ["banner", "colour"])


def test_it_is_hashed_beside_it_and_belongs_to_its_generation(tmp_path):
    shard(put(tmp_path / "src", pictures(["a.png"])), tmp_path / "out")
    folder = tmp_path / "out/report"
    assert (folder / "000001.sha256").read_text() == f"{hashlib.sha256((folder / '000001.json').read_bytes()).hexdigest()}  000001.json\n"
    shard(put(tmp_path / "other", pictures(["b.png"])), tmp_path / "new")
    for name in ("000001.json", "000001.sha256"):
        (folder / name).write_bytes((tmp_path / "new/report" / name).read_bytes())
    assert "another generation" in verify_dataset(open_dataset(str(tmp_path / "out"))).report


@pytest.mark.parametrize("how", ["gone", "no hash", "flipped", "empty", "rewritten", "strange", "folder"])
def test_missing_or_damaged_it_is_named_made_again_and_no_fault(tmp_path, how, caplog):
    source = put(tmp_path / "src", dict.fromkeys(["a.png", "b.png"], encoded(image(1))))
    shard(source, tmp_path / "out")
    folder, before = tmp_path / "out/report", the_same(report_of(tmp_path / "out"))
    path = folder / "000001.json"
    if how in ("gone", "folder"):
        path.unlink()
        (folder / "000001.sha256").unlink()
        if how == "folder":
            folder.rmdir()
    elif how == "no hash":
        (folder / "000001.sha256").unlink()
    elif how == "rewritten":
        rewrite(path, left_out=77)
    elif how == "strange":
        rewrite(path, pixels={"mean": "high"})
        (folder / "000001.sha256").write_text(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  000001.json\n")
    else:
        data = bytearray(path.read_bytes()) if how == "flipped" else bytearray()
        data[20:21] = bytes([data[20] ^ 1]) if data else b""
        path.write_bytes(data)
    checked = verify_dataset(open_dataset(str(tmp_path / "out")), read_data=True)
    assert checked.ok
    assert checked.report == "missing" if how in ("gone", "no hash", "folder") else checked.report.startswith("damaged: ")
    assert shard(source, tmp_path / "out").number == 1
    assert the_same(report_of(tmp_path / "out")) == before
    assert how in ("gone", "no hash", "folder") or "it is made again" in caplog.text


@pytest.mark.parametrize("name", ["000001.json", "000001.sha256"])
def test_verify_names_a_changed_report_of_an_earlier_generation(tmp_path, name):
    shard(put(tmp_path / "src", {"a.png": encoded(image(1))}), tmp_path / "out")
    shard(put(tmp_path / "src", {"b.png": encoded(image(2))}), tmp_path / "out")
    assert verify_dataset(open_dataset(str(tmp_path / "out"))).report == "ok"
    path = tmp_path / "out/report" / name
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.write_bytes(data)
    checked = verify_dataset(open_dataset(str(tmp_path / "out")))
    assert checked.ok and "report/000001.json is not what" in checked.report and "remove both" in checked.report


def test_a_report_that_cannot_be_made_fails_no_run(tmp_path, monkeypatch, caplog):
    def fail(*_: Any) -> Any:
        raise OSError("no space left")

    monkeypatch.setattr(reports, "_made", fail)
    made = shard(put(tmp_path / "src", pictures(["a.png"])), tmp_path / "out")
    assert made.number == open_dataset(str(tmp_path / "out")).number == 1
    assert "no space left" in caplog.text


def test_gc_keeps_reports_of_generations_that_are_there(tmp_path):
    shard(put(tmp_path / "src", pictures(["a.png"])), tmp_path / "out")
    folder = tmp_path / "out/report"
    (folder / "000009.json").write_bytes((folder / "000001.json").read_bytes())
    (folder / "notes.txt").write_text("mine")
    found = collect_garbage(str(tmp_path / "out"), older_than_s=-60)
    assert [item.name for item in found.garbage] == ["report/000009.json"]
    assert found.not_ours == ("report/notes.txt",)
    assert sorted(path.name for path in folder.iterdir()) == ["000001.json", "000001.sha256", "notes.txt"]


class TestAbout:
    def say(self, source: Any, out: Path, **about: Any) -> Any:
        return shard_dataset(source, str(out), None, ShardSpec(), about=AboutSpec(**about))

    def test_it_is_in_the_manifest_and_in_no_identity(self, tmp_path):
        source = put(tmp_path / "src", pictures(["a.png", "b.png"]))
        plain = shard_dataset(source, str(tmp_path / "plain"), None, ShardSpec())
        made = self.say(source, tmp_path / "out", license="cc-by-4.0", personal_data=False)
        assert made.about == {"license": "cc-by-4.0", "personal_data": False}
        assert plain.about is None and "about" not in plain.to_json()
        hashes = [(each.dataset_sha256, each.content_sha256, each.claim_sha256) for each in (plain, made)]
        assert hashes[0] == hashes[1]

    @pytest.mark.parametrize("grows_only", [False, True])
    def test_a_later_run_changes_it_without_new_parts(self, tmp_path, grows_only):
        if grows_only:
            shutil.copytree(V1, tmp_path / "v1")
            source, out, shards = FolderSpec(url=str(tmp_path / "v1/images")), tmp_path / "v1/dataset", ShardSpec(max_samples=8)
        else:
            source, out, shards = put(tmp_path / "src", pictures(["a.png", "b.png"])), tmp_path / "out", ShardSpec()
        first = shard_dataset(source, str(out), None, shards)
        again = shard_dataset(source, str(out), None, shards, about=AboutSpec(owner="The lab", description="Letters."))
        assert (again.number, again.about) == (first.number + 1, {"owner": "The lab", "description": "Letters."})
        assert (again.parts, again.dataset_sha256) == (first.parts, first.dataset_sha256)
        assert shard_dataset(source, str(out), None, shards).number == again.number, "a run that says nothing changes nothing"
        last = shard_dataset(source, str(out), None, shards, about=AboutSpec(owner="", personal_data=True))
        assert last.about == {"description": "Letters.", "personal_data": True}
        assert verify_dataset(open_dataset(str(out)), read_data=True).problems == ()

    def test_strange_values_are_refused(self, tmp_path):
        with pytest.raises(ConfigError, match=r"about\.owner is 'a\\nb', expected one line"):
            AboutSpec(owner="a\nb")
        with pytest.raises(ConfigError, match=r"about\.description .* is no text here"):
            AboutSpec(description="of a name that is no UTF-8: \udcff")
        made = self.say(put(tmp_path / "src", pictures(["a.png"])), tmp_path / "out", owner="me")
        rewrite(tmp_path / "out/dataset.000001.json", about={"owner": 3})
        with pytest.raises(DataError, match="about says owner 3"):
            open_dataset(str(tmp_path / "out"))
        assert made.number == 1
        assert json.loads(open_store(str(tmp_path / "out")).read(report_name(1)))["number"] == 1
