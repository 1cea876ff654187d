"""`source.label`, `source.group` and `source.classes`: what makes the labels and the bags of a source."""

import dataclasses
import json
import os
import re
import tarfile
import time
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aecore.data.dataset import open_dataset
from aecore.data.manifest import DatasetManifest
from aecore.data.read.verify import verify_dataset
from aecore.data.sources import Listing
from aecore.data.sources._labels import Expression, found_in, json_field, label_names
from aecore.data.sources.arrays import ArraysSpec
from aecore.data.sources.folder import FolderSpec
from aecore.data.sources.webdataset import WebdatasetSpec
from aecore.data.write.job import adopt_shards, shard_dataset
from aecore.data.write.plan import plan_dataset
from aecore.data.write.spec import ShardSpec
from aecore.data.write.splits import SplitSpec
from aecore.errors import ConfigError, DataError
from tests.aecore.data.test_external_tars import write_tar
from tests.aecore.data.tiny import encoded, image
from tests.documents import content

CAFE = {form: unicodedata.normalize(form, "café") for form in ("NFC", "NFD")}


def pictures(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(encoded(image(len(path))))
    return root


def tar_of(path: Path, *members: str, json_of: Mapping[str, Any] | None = None) -> Path:
    files = [(name, encoded(image(len(name)))) for name in members]
    files += [(f"{key}.json", json.dumps(data).encode()) for key, data in (json_of or {}).items()]
    return write_tar(path, files, format=tarfile.PAX_FORMAT)


def labels(source: Any, out: Path, splits: SplitSpec | None = None, **options: Any) -> dict[str, str | None]:
    """Shard, verify, and return the class of each sample by `<split>/<key>`."""
    made = shard_dataset(source, str(out), splits, **options)
    assert isinstance(made, DatasetManifest)
    return stored(out)


def stored(out: Path) -> dict[str, str | None]:
    dataset = open_dataset(str(out))
    assert not verify_dataset(dataset, read_data=True).problems
    found: dict[str, str | None] = {}
    for shard in dataset.manifest.shards:
        index = dataset.reader(shard).index
        for key, label, name in zip(*(index[column].to_pylist() for column in ("key", "label", "label_name")), strict=True):
            assert (dataset.classes[label] if label is not None else None) == name
            found[f"{shard.split}/{key}"] = name
    return found


class TestFolders:
    @pytest.mark.parametrize(
        ("rule", "expected"),
        [
            ("path", ["Greek/alpha", "Latin/alpha"]),
            ("leaf", ["alpha", "alpha"]),
            ("none", [None, None]),
            (r"regex:^(\w+)/", ["Greek", "Latin"]),
            (r"regex:(\d)$", ["1", "2"]),
            (r"regex:^\w+/(\w+)/", ["alpha", "alpha"]),
            (r"regex:^\w+/(\w+)/\w+/", ["Greek", "Latin"]),  # which only the path with the split has
        ],
    )
    def test_a_label_is_made_of_the_path_below_the_split(self, tmp_path: Path, rule: str, expected: list[str | None]) -> None:
        root = pictures(tmp_path / "in", "train/Greek/alpha/1.png", "test/Latin/alpha/2.png")
        found = labels(FolderSpec(url=str(root), label=rule), tmp_path / "out")
        assert found == {"train/train/Greek/alpha/1": expected[0], "test/test/Latin/alpha/2": expected[1]}

    @pytest.mark.parametrize("folder", ["", "train/", "a folder/b.c/"])
    @pytest.mark.parametrize(
        ("rule", "names"),
        [
            (r"regex:^(\w+)\.", {"cat": "cat.0.png", "dog": "dog.12.png"}),  # dogs vs. cats
            (r"regex:(.+)_\d+.png$", {"great_pyrenees": "great_pyrenees_3.png", "Abyssinian": "Abyssinian_100.png"}),  # pets
            (r"regex:^(n\d+)_", {"n01440764": "n01440764_10026.png", "n01443537": "n01443537_1.png"}),  # ImageNet
            (r"regex:^[^-]+-([^-]+)-", {"happy": "s1-happy-3.png", "sad": "s1-sad-3.png"}),
            (r"regex:(?:cat|dog)", {"cat": "a cat.png", "dog": "a dog.png"}),
            (r"regex:^(?P<kind>\pL+)", {"Übung": "Übung1.png", "Ξ": "Ξ2.png"}),
            (r"regex:^([\w-]+)\.", {"Ü-b": "Ü-b.1.png", "x": "x.2.png"}),
        ],
    )
    def test_an_expression_finds_it_in_the_name_of_the_file_in_any_folder(
        self, tmp_path: Path, folder: str, rule: str, names: dict[str, str]
    ) -> None:
        root = pictures(tmp_path / "in", *(folder + name for name in names.values()))
        found = labels(FolderSpec(url=str(root), label=rule), tmp_path / "out")
        assert sorted(map(str, found.values())) == sorted(names)

    @pytest.mark.parametrize("option", ["label", "group"])
    @pytest.mark.parametrize("tar", [False, True])
    def test_a_sample_in_which_an_expression_finds_nothing_is_quarantined(self, tmp_path: Path, option: str, tar: bool) -> None:
        """One name without a label or a group, text or not, refused the whole source."""
        names = "cat.0.png", "dog.1.png", "IMG_7.png", os.fsdecode(b"\xff_7.png")
        if tar:
            tar_of(tmp_path / "in/a.tar", *names)
        else:
            pictures(tmp_path / "in", *names)
        spec = (WebdatasetSpec if tar else FolderSpec)(url=str(tmp_path / "in"), **{option: r"regex:^([a-z]+)\."})
        for limit in (None, 4):
            limited = dataclasses.replace(spec, limit=limit)
            made = shard_dataset(limited, str(tmp_path / f"out{limit}"), SplitSpec(by="none"), shards=ShardSpec(max_bad=0.5))
            assert isinstance(made, DatasetManifest)
            assert (made.num_samples(), made.reasons) == (2, {f"no_{option}": 2})
            files = (tmp_path / f"out{limit}/quarantine").glob("*.parquet")
            messages = [text for file in files for text in pq.read_table(file)["message"].to_pylist()]
            assert all(rf"source.{option}=regex:^([a-z]+)\. finds no {option} in " in text for text in messages)
            assert any("IMG_7" in text for text in messages)
        with pytest.raises(DataError, match=rf"no_{option} 2"):
            shard_dataset(spec, str(tmp_path / "few"), SplitSpec(by="none"), shards=ShardSpec(max_bad=0.1))

    @pytest.mark.parametrize("option", ["label", "group"])
    def test_an_expression_that_finds_nothing_anywhere_refuses_the_source(self, tmp_path: Path, option: str) -> None:
        root = pictures(tmp_path / "in", *(f"IMG_{number}.png" for number in range(7)))
        with pytest.raises(
            DataError,
            match=rf"source\.{option}=regex:.* finds nothing in any of 7 samples: ('IMG_\d.png', ){{4}}'IMG_\d.png' and 2 more",
        ):
            labels(FolderSpec(url=str(root), **{option: r"regex:^([a-z]+)\."}), tmp_path / "out")
        assert not list((tmp_path / "out").glob("*.json"))

    @pytest.mark.parametrize(
        "bad",
        [
            "regex:(a",
            r"regex:(a)\1",
            "regex:(?<!a)b",
            r"regex:((\pL{99}){99}){9}",
            "regex:\udcff",
            "regex:(?=a)",
            r"regex:(\w{1000}){1000}",
            "regex:",
            "leave",
            "json:a",
            "",
        ],
    )
    def test_what_is_no_rule_is_refused_before_anything_is_read(self, bad: str) -> None:
        with pytest.raises(ConfigError, match=r"source\.label.*(RE2|expected path, leaf, none or regex:<expression>)"):
            FolderSpec(url="/nowhere", label=bad)
        with pytest.raises(ConfigError, match=r"source\.group.*(RE2|expected parent or regex:<expression>)"):
            FolderSpec(url="/nowhere", group=bad)

    def test_the_leaf_of_a_bag_is_the_folder_above_it(self, tmp_path: Path) -> None:
        root = pictures(tmp_path / "in", "clinic/tumour/slide1/1.png", "clinic/normal/slide2/1.png")
        found = labels(FolderSpec(url=str(root), label="leaf", group="parent"), tmp_path / "out")
        assert set(found.values()) == {"tumour", "normal"}

    def test_a_name_in_two_normal_forms_is_one_class(self, tmp_path: Path) -> None:
        root = pictures(tmp_path / "in", *(f"{name}/{form}.png" for form, name in CAFE.items()), "tea/1.png")
        assert sorted(map(str, labels(FolderSpec(url=str(root)), tmp_path / "out").values())) == [CAFE["NFC"], CAFE["NFC"], "tea"]
        assert open_dataset(str(tmp_path / "out")).classes == (CAFE["NFC"], "tea")

    @pytest.mark.parametrize(("first", "then"), [("NFC", "NFD"), ("NFD", "NFC")])
    def test_a_later_generation_with_the_other_form_has_the_same_class(self, tmp_path: Path, first: str, then: str) -> None:
        source = FolderSpec(url=str(pictures(tmp_path / "in", f"{CAFE[first]}/1.png")))
        labels(source, tmp_path / "out")
        pictures(tmp_path / "in", f"{CAFE[then]}/2.png")
        assert set(labels(source, tmp_path / "out").values()) == {CAFE["NFC"]}

    def test_a_claim_of_names_in_another_form_is_none_of_an_older_version(self, tmp_path: Path) -> None:
        """That version made one class of each form, so its unfinished dataset must not be continued."""
        for form, name in CAFE.items():
            labels(FolderSpec(url=str(pictures(tmp_path / form, f"{name}/1.png"))), tmp_path / f"{form}-out")
        assert [content(tmp_path / f"{form}-out/run.000001.json")["identity"].get("names") for form in CAFE] == [None, "NFC"]


def test_a_dataset_of_an_older_version_keeps_the_form_of_its_names(tmp_path: Path) -> None:
    made = shard_dataset(FolderSpec(url=str(pictures(tmp_path / "in", "x/1.png"))), str(tmp_path / "out"))
    assert isinstance(made, DatasetManifest)
    parent = dataclasses.replace(made, classes=(CAFE["NFD"],))
    listing = Listing(["a", "b"], ["a", "b"], np.ones(2, np.int64), label_names=[*CAFE.values()])
    plan = plan_dataset(listing, SplitSpec(), ShardSpec(), parent, 2, FolderSpec())
    assert plan.classes == (CAFE["NFD"],)
    assert plan.tasks[0].label_names == [CAFE["NFD"]] * 2 and plan.tasks[0].labels is not None and not plan.tasks[0].labels.any()


class TestTars:
    def test_one_tar_for_each_class(self, tmp_path: Path) -> None:
        for name in ("n01440764", "n01443537"):
            tar_of(tmp_path / f"in/{name}.tar", *(f"{name}_{number}.png" for number in range(3)))
        source = WebdatasetSpec(url=str(tmp_path / "in"), label="tar")
        assert set(labels(source, tmp_path / "out").items()) >= {("train/n01440764_0", "n01440764"), ("train/n01443537_2", "n01443537")}
        adopt_shards(source, str(tmp_path / "adopted"))
        assert stored(tmp_path / "adopted") == stored(tmp_path / "out")

    def test_class_tars_with_the_same_names_need_the_names_of_the_tars_in_their_keys(self, tmp_path: Path) -> None:
        for name in ("cat", "dog"):
            tar_of(tmp_path / f"in/{name}.tar", "0.png")
        with pytest.raises(DataError, match="both have the key '0': use source.keys=shard"):
            labels(WebdatasetSpec(url=str(tmp_path / "in"), label="tar"), tmp_path / "out")
        found = labels(WebdatasetSpec(url=str(tmp_path / "in"), label="tar", keys="shard"), tmp_path / "out")
        assert found == {"train/cat/0": "cat", "train/dog/0": "dog"}

    def test_class_tars_in_split_folders(self, tmp_path: Path) -> None:
        for split in ("train", "val"):
            for name in ("cat", "dog"):
                tar_of(tmp_path / f"in/{split}/{name}.tar", f"{split}-{name}.png")
        found = labels(WebdatasetSpec(url=str(tmp_path / "in"), label="tar"), tmp_path / "out")
        assert found == {f"{split}/{split}-{name}": name for split in ("train", "val") for name in ("cat", "dog")}

    def test_the_name_of_a_class_tar_is_no_split(self, tmp_path: Path) -> None:
        for name in ("test_tube", "train", "valid-coin"):  # ImageNet has classes of such names
            tar_of(tmp_path / f"in/{name}.tar", *(f"{name}-{number}.png" for number in range(3)))
            tar_of(tmp_path / f"split/{'test' if name == 'train' else 'train'}/{name}.tar", f"{name}.png")
        found = labels(WebdatasetSpec(url=str(tmp_path / "in"), label="tar"), tmp_path / "out", SplitSpec(val=0.0, test=0.0))
        assert found == {f"train/{name}-{n}": name for name in ("test_tube", "train", "valid-coin") for n in range(3)}
        found = labels(WebdatasetSpec(url=str(tmp_path / "split"), label="tar"), tmp_path / "out2")
        assert found == {"train/test_tube": "test_tube", "test/train": "train", "train/valid-coin": "valid-coin"}

    @pytest.mark.parametrize("around", ["", "imagenette2/", "./"])
    def test_a_folder_tree_in_a_tar_has_the_splits_keys_and_classes_of_the_folder(self, tmp_path: Path, around: str) -> None:
        paths = [f"{split}/{name}/{number}.png" for split in ("train", "Validation") for name in ("cat", "wild/owl") for number in range(2)]
        tar_of(tmp_path / "all.tar", *(around + path for path in paths))
        tar = labels(WebdatasetSpec(url=str(tmp_path / "all.tar"), label="path"), tmp_path / "tar")
        folder = labels(FolderSpec(url=str(pictures(tmp_path / "in", *paths))), tmp_path / "folder")
        prefix = around.replace("./", "")
        assert {key.replace(prefix, "", 1): name for key, name in tar.items()} == folder
        assert open_dataset(str(tmp_path / "tar")).classes == ("cat", "wild/owl")

    @pytest.mark.parametrize(("rule", "name"), [("path", "wild/owl"), ("leaf", "owl"), (r"regex:^(\w+)/", "wild"), (r"regex:(\d+)$", "7")])
    def test_tars_named_by_their_split_hold_class_folders(self, tmp_path: Path, rule: str, name: str) -> None:
        tar_of(tmp_path / "in/train.tar", "wild/owl/7.png")
        tar_of(tmp_path / "in/test.tar", "test/wild/owl/17.png")  # with the split as its top folder once more
        found = labels(WebdatasetSpec(url=str(tmp_path / "in"), label=rule), tmp_path / "out")
        assert found == {"train/wild/owl/7": name, "test/test/wild/owl/17": "17" if name == "7" else name}

    def test_a_class_folder_named_like_a_split_among_others_is_a_class(self, tmp_path: Path) -> None:
        tar_of(tmp_path / "all.tar", "train/1.png", "plane/2.png")
        found = labels(WebdatasetSpec(url=str(tmp_path / "all.tar"), label="path"), tmp_path / "out")
        assert found == {"train/train/1": "train", "train/plane/2": "plane"}

    @pytest.mark.parametrize(
        ("path", "expected"),
        [("ann.class", "cat"), ("objects.1.id", "7"), ("ann.dotted.key", "x"), ("flat.key", "y"), ("ann.score", "2")],
    )
    def test_a_field_of_the_json_by_its_path(self, tmp_path: Path, path: str, expected: str) -> None:
        data = {"ann": {"class": "cat", "score": 2.0, "dotted.key": "x"}, "objects": [{"id": 3}, {"id": 7}], "flat.key": "y"}
        tar_of(tmp_path / "a.tar", "0.png", json_of={"0": data})
        source = WebdatasetSpec(url=str(tmp_path / "a.tar"), label=f"json:{path}")
        assert labels(source, tmp_path / "out") == {"train/0": expected}

    def test_a_field_that_is_a_list_or_nowhere_is_refused_by_name(self, tmp_path: Path) -> None:
        tar_of(tmp_path / "a.tar", "0.png", json_of={"0": {"ann": {"class": "cat"}}})
        for path, message in (
            ("ann", "(?s)json:ann is a dict.*source.label=json:ann.class"),
            ("ann.clas", "has the field 'ann.clas'"),
        ):
            with pytest.raises(DataError, match=message):
                labels(WebdatasetSpec(url=str(tmp_path / "a.tar"), label=f"json:{path}"), tmp_path / "out")

    def test_names_in_other_forms_are_one_class_wherever_they_stand(self, tmp_path: Path) -> None:
        files = [
            ("0.png", encoded(image(0))),
            ("0.cls", CAFE["NFD"].encode()),
            ("1.png", encoded(image(1))),
            ("1.cls", CAFE["NFC"].encode()),
        ]
        write_tar(tmp_path / "a.tar", files)
        assert set(labels(WebdatasetSpec(url=str(tmp_path / "a.tar")), tmp_path / "out").values()) == {CAFE["NFC"]}

    @pytest.mark.parametrize("rule", ["json:c", "cls"])
    def test_a_sample_without_the_label_that_was_asked_for_is_quarantined(self, tmp_path: Path, rule: str) -> None:
        members = [(f"{number}.png", encoded(image(number))) for number in range(3)]
        members += [(f"{number}.json", json.dumps({"c": "cat"} if number else {"d": 1}).encode()) for number in range(3)]
        write_tar(tmp_path / "a.tar", sorted([*members, ("1.cls", b"cat"), ("2.cls", b"cat")]))
        source = WebdatasetSpec(url=str(tmp_path / "a.tar"), label=rule)
        with pytest.raises(DataError, match=rf"(?s)no_label 1.*no_label: the sample has no {rule}, which source.label asks for"):
            labels(source, tmp_path / "refused")
        manifest = shard_dataset(source, str(tmp_path / "out"), shards=ShardSpec(max_bad=0.5))
        assert (manifest.num_samples(), manifest.quarantined) == (2, 1)
        assert set(stored(tmp_path / "out").values()) == {"cat"}

    def test_samples_without_a_class_among_others_are_counted_in_the_log(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        members = [(f"{number}.png", encoded(image(number))) for number in range(3)]
        write_tar(tmp_path / "a.tar", sorted([*members, ("2.cls", b"cat")]))
        with caplog.at_level("INFO"):
            assert shard_dataset(WebdatasetSpec(url=str(tmp_path / "a.tar")), str(tmp_path / "out")).num_samples() == 3
        assert "2 samples have no .cls, as others have, and no label: '0' for example; source.label=cls quarantines such" in caplog.text

    def test_tars_without_labels_say_where_else_they_may_be(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        tar_of(tmp_path / "in/cat.tar", "0.png")
        with caplog.at_level("INFO"):
            assert labels(WebdatasetSpec(url=str(tmp_path / "in")), tmp_path / "out") == {"train/0": None}
        assert "no sample has a label, since none has a .cls: set source.label=tar, path, leaf" in caplog.text


def test_the_fields_of_json_are_found_as_a_loop_over_the_parts_finds_them() -> None:
    data = {"a": [{"b": 1}, [2, 3]], "a.b": 4, "c": {"d.e": 5, "f": None}}
    cases = {
        "a.0.b": 1,
        "a.1.1": 3,
        "a.b": 4,
        "c.d.e": 5,
        "c.f": None,
        "a.9": None,
        "a.-1": None,
        "x.y": None,
        "a.b.c": None,
        "c": data["c"],
    }
    assert {path: json_field(data, path) for path in cases} == cases


def test_arrays_take_their_labels_from_the_names_of_their_files(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("cat", "full_bitmap_dog"):
        np.save(tmp_path / f"in/{name}.npy", np.arange(32, dtype=np.uint8).reshape(2, 4, 4))
    found = labels(ArraysSpec(url=str(tmp_path / "in"), labels=r"regex:^(?:full_bitmap_)?(\w+)/"), tmp_path / "out")
    assert {key.rpartition("/")[0]: name for key, name in found.items()} == {"train/cat": "cat", "train/full_bitmap_dog": "dog"}


class TestBytes:
    """A label that is no UTF-8 names no class, wherever it comes from: two of them could become one."""

    BAD: ClassVar[str] = os.fsdecode(b"caf\xe9")

    @pytest.mark.parametrize(
        ("options", "good"),
        [({}, 1), ({"label": "leaf"}, 1), ({"label": r"regex:^(.+)/\d"}, 1), ({"label": "none"}, 2), ({"label": r"regex:(\d)\.png"}, 2)],
    )
    def test_of_a_folder(self, tmp_path: Path, options: dict[str, str], good: int) -> None:
        pictures(tmp_path / "in", "cat/1.png", f"{self.BAD}/2.png")
        made = shard_dataset(FolderSpec(url=str(tmp_path / "in"), **options), str(tmp_path / "out"), shards=ShardSpec(max_bad=0.5))
        assert isinstance(made, DatasetManifest)
        assert (made.num_samples(), made.reasons) == (good, {"label": 1} if good == 1 else {})

    @pytest.mark.parametrize("rule", [r"(\w+)_", r"^(\w+)_", r"([^\W_]+)_", r"^(.+)_"])
    def test_found_in_a_name_is_no_word_of_escapes(self, tmp_path: Path, rule: str) -> None:
        """`(\\w+)_` found `udce9`, the end of an escape, in the names of both."""
        pictures(tmp_path / "in", "cat_1.png", f"{self.BAD}_1.png", os.fsdecode(b"th\xe9_1.png"))
        spec = FolderSpec(url=str(tmp_path / "in"), label=f"regex:{rule}")
        made = shard_dataset(spec, str(tmp_path / "out"), shards=ShardSpec(max_bad=0.7))
        assert isinstance(made, DatasetManifest)
        assert (made.classes, made.reasons) == (("cat",), {"label": 2})

    @pytest.mark.parametrize("rule", [r"^(\w+)/", r"^([^/]+)/"])
    @pytest.mark.parametrize("tar", [False, True])
    def test_found_below_the_folder_of_a_split(self, tmp_path: Path, rule: str, tar: bool) -> None:
        paths = "train/cat/1.png", f"train/{self.BAD}/2.png", "test/cat/3.png"
        (tmp_path / "in").mkdir()
        if tar:
            tar_of(tmp_path / "in/a.tar", *paths)
        else:
            pictures(tmp_path / "in", *paths)
        spec = (WebdatasetSpec if tar else FolderSpec)(url=str(tmp_path / "in"), label=f"regex:{rule}")
        made = shard_dataset(spec, str(tmp_path / "out"), SplitSpec(by="folders"), shards=ShardSpec(max_bad=0.5))
        assert isinstance(made, DatasetManifest)
        assert (made.classes, made.reasons) == (("cat",), {"label": 1})

    def test_found_by_an_expression_has_an_end_too(self, tmp_path: Path) -> None:
        pictures(tmp_path / "in", "cat/1.png", "/".join(["é" * 120] * 5) + "/2.png")
        spec = FolderSpec(url=str(tmp_path / "in"), label=r"regex:^(.+)/\d")
        made = shard_dataset(spec, str(tmp_path / "out"), shards=ShardSpec(max_bad=0.5))
        assert isinstance(made, DatasetManifest)
        assert (made.classes, made.reasons) == (("cat",), {"label": 1})

    def test_groups_of_names_that_differ_in_one_stay_apart(self) -> None:
        names = ["caf\udce9_1.png", "th\udce9_1.png"]
        assert found_in("source.group", r"regex:(\w+)_", names, names)[0] == [r"caf\udce9", r"th\udce9"]

    def test_of_the_name_of_a_tar(self, tmp_path: Path) -> None:
        tar_of(tmp_path / "in/cat.tar", "1.png")
        tar_of(tmp_path / f"in/{self.BAD}.tar", "2.png")
        spec = WebdatasetSpec(url=str(tmp_path / "in"), label="tar")
        made = shard_dataset(spec, str(tmp_path / "out"), shards=ShardSpec(max_bad=0.5))
        assert isinstance(made, DatasetManifest)
        assert (made.classes, made.reasons) == (("cat",), {"label": 1})

    @pytest.mark.parametrize("text", [b"caf\xe9", b"caf\xe8", b"a\0b"])
    def test_of_a_member(self, tmp_path: Path, text: bytes) -> None:
        write_tar(tmp_path / "in/a.tar", [("1.png", encoded(image(1))), ("1.cls", b"cat"), ("2.png", encoded(image(2))), ("2.cls", text)])
        made = shard_dataset(WebdatasetSpec(url=str(tmp_path / "in")), str(tmp_path / "out"), shards=ShardSpec(max_bad=0.5))
        assert isinstance(made, DatasetManifest)
        assert (made.classes, made.reasons) == (("cat",), {"label": 1})


class TestExpressions:
    @pytest.mark.parametrize(
        ("pattern", "wanted"),
        [
            (r"^([^\W_]+)", "chérie"),
            (r"^([^\W\d]+?)_", "chérie"),
            (r"^([^[:^word:]_]+)", "chérie"),
            (r"^([[:word:]]+)", "chérie_1"),
            (r"([\W]+)", "."),
            (r"^\Q(\E|<|^(\w)", "c"),
            (r"(?:<|)(?P<name>c(?:h))(é)", "ch"),
            (r"^(ch[\wx]+)\W", "chérie_1"),
            (unicodedata.normalize("NFD", "^(ch[é]r)"), "chér"),
        ],
    )
    def test_word_characters_are_those_of_every_script_also_in_brackets(self, pattern: str, wanted: str) -> None:
        for form in ("NFC", "NFD"):
            assert found_in("source.label", f"regex:{pattern}", [unicodedata.normalize(form, "chérie_1.jpg.jpg")], ["x"])[0] == [wanted]

    @given(st.text(st.characters(exclude_categories=["Cs", "Cn"]), min_size=1, max_size=30))
    def test_what_is_no_word_character_is_everything_else(self, text: str) -> None:
        word, other = (Expression("source.label", rf"regex:^([{name}]*)$") for name in (r"\w", r"\W"))
        for char in text:
            assert (word.search([char]) == [char]) != (other.search([char]) == [char])

    PATTERNS = (r"^(\w+)\.", r"(\d+)", r"^([a-c]+)_", r"/(\w)", r"x|(b)", r"[\w.]+$", r"(?:a|b)(c?)", r"^[^/]+/([^/]+)", r"\W(\w)")

    @given(texts=st.lists(st.text("abc_/.x1é-", max_size=12), max_size=5), pattern=st.sampled_from(PATTERNS))
    def test_find_what_pythons_find(self, texts: list[str], pattern: str) -> None:
        def expected(text: str) -> str:
            match = re.search(pattern, text)
            return "" if match is None else (match[1] or "") if match.re.groups else match[0]

        assert Expression("source.label", f"regex:{pattern}").search(texts) == [expected(text) for text in texts]

    @pytest.mark.parametrize("pattern", [r"^(a+)+$", r"(a|aa)+$", r"^(([a-z])+.)+[A-Z]([a-z])+$", r"(.*)*(.*)*(.*)*x$"])
    def test_take_time_in_proportion_to_the_text_whatever_they_are(self, pattern: str) -> None:
        started = time.process_time()
        for rule in (pattern, rf"\b{pattern}"):
            with pytest.raises(DataError, match="finds nothing"):
                found_in("source.label", f"regex:{rule}", ["a" * 4000 + "é!"] * 100, ["x"] * 100)
        assert time.process_time() - started < 20  # Python's take longer than the universe is old

    def test_boundaries_of_words_are_those_of_every_script(self) -> None:
        """RE2 finds `a` in both `éa` and `èa`."""
        names = ["ab_1.png", "éa_1.png", "Ü-größe_2.png", "кот мяу_3.png"]
        assert found_in("source.label", r"regex:\b(\w+?)_", names, names)[0] == ["ab", "éa", "größe", "мяу"]
        assert found_in("source.label", r"regex:\b(?<kind>\w)", names, names)[0] == ["a", "é", "Ü", "к"]
        assert found_in("source.label", r"regex:\w\B(\w)", names, names)[0] == ["b", "a", "r", "о"]
        with pytest.raises(ConfigError, match=r"has \\b or \\B, .* 'éa_1' has others, and Python does not read the expression"):
            found_in("source.label", r"regex:\b(\pL+?)_", names, names)

    BOUNDED = (
        r"\b(\w+)",
        r"(\w+?)\b",
        r"\b([\w-]+)\b",
        r"\B(\w)",
        r"_\b(.)",
        r"^\b(\D+)",
        r"(\d+)\b",
        r"\s(\S+)",
        r"[\d\s]+",
        r"(\d)",
        r"[^\W\d]+",
        r"[\D]+$",
    )

    @given(texts=st.lists(st.text("aé_/.-1٣ж \u2003日\x1c", max_size=10), max_size=5), pattern=st.sampled_from(BOUNDED))
    def test_boundaries_digits_and_white_space_are_pythons(self, texts: list[str], pattern: str) -> None:
        def expected(text: str) -> str:
            match = re.search(pattern, text)
            return "" if match is None else match[match.re.groups and 1] or ""

        assert Expression("source.label", f"regex:{pattern}").search(texts) == [expected(text) for text in texts]

    def test_names_that_are_no_utf8_are_searched_and_shown(self) -> None:
        assert found_in("source.label", r"regex:^(\w+)\.", ["cat.\udcff.png"], ["x"])[0] == ["cat"]

    @given(rows=st.permutations(range(6)))
    def test_do_not_depend_on_the_order_of_the_listing(self, rows: list[int]) -> None:
        paths = [f"train/{name}/{name}_{number}.png" for name in ("cat", "dog") for number in range(3)]
        listing = Listing(paths, paths, np.ones(6, np.int64), label_names=paths, splits=["train"] * 6, label_rule=r"regex:(\w+)_\d")
        taken = label_names(listing.take(np.array(rows)), below_split=True)
        assert taken == [paths[row].split("/")[1] for row in rows]


class TestClasses:
    def source(self, root: Path, **options: Any) -> FolderSpec:
        return FolderSpec(url=str(pictures(root / "in", "cat/1.png", "dog/1.png", f"{CAFE['NFD']}/1.png")), **options)

    @pytest.mark.parametrize(
        ("name", "data"),
        [
            ("classes.txt", f"dog\r\n\n  {CAFE['NFD']} \nzebra\ncat\n"),
            ("classes.json", json.dumps(["dog", CAFE["NFC"], "zebra", "cat"])),
            ("bom.txt", f"\ufeffdog\n{CAFE['NFC']}\nzebra\ncat"),
            (None, ("dog", CAFE["NFC"], "zebra", "cat")),
        ],
    )
    def test_a_list_or_a_file_fixes_order_and_membership(self, tmp_path: Path, name: str | None, data: Any) -> None:
        if name is not None:
            (tmp_path / name).write_text(data, encoding="utf-8")
        found = labels(self.source(tmp_path, classes=data if name is None else str(tmp_path / name)), tmp_path / "out")
        assert set(found.values()) == {"cat", "dog", CAFE["NFC"]}
        manifest = open_dataset(str(tmp_path / "out")).manifest
        assert manifest.classes == ("dog", CAFE["NFC"], "zebra", "cat")
        assert manifest.identity["source"]["classes"] == ["dog", CAFE["NFC"], "zebra", "cat"]

    def test_numbers_are_names(self, tmp_path: Path) -> None:
        files = [(f"{number}.{ext}", data) for number in (3, 1) for ext, data in (("png", encoded(image(number))), ("cls", b"%d" % number))]
        write_tar(tmp_path / "a.tar", files)
        source = WebdatasetSpec(url=str(tmp_path / "a.tar"), classes=(0, 1, 2, 3))
        assert labels(source, tmp_path / "out") == {"train/3": "3", "train/1": "1"}
        assert open_dataset(str(tmp_path / "out")).classes == ("0", "1", "2", "3")

    def test_a_sample_of_another_class_is_refused_by_its_name(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="has 1 sample of the class 'cat', which source.classes does not have") as refused:
            labels(self.source(tmp_path, classes=("dog", CAFE["NFC"])), tmp_path / "out")
        assert "add it to the end of source.classes" in str(refused.value)
        assert not list((tmp_path / "out").glob("*.json"))

    def test_classes_without_labels_are_refused(self, tmp_path: Path) -> None:
        root = pictures(tmp_path / "in", "1.png", "2.png")
        with pytest.raises(ConfigError, match="source.classes names 2 classes, and no sample has a label: see source.label"):
            labels(FolderSpec(url=str(root), classes=("cat", "dog")), tmp_path / "out")

    def test_the_list_may_grow_at_its_end_and_nowhere_else(self, tmp_path: Path) -> None:
        known = ("dog", CAFE["NFC"], "cat")
        labels(self.source(tmp_path, classes=known), tmp_path / "out")
        pictures(tmp_path / "in", "zebra/1.png")
        for wrong in (("zebra", *known), known[:2], ()):
            with pytest.raises(ConfigError, match=r"source\.classes"):
                labels(self.source(tmp_path, classes=wrong), tmp_path / "out")
        found = labels(self.source(tmp_path, classes=(*known, "zebra")), tmp_path / "out")
        assert found["train/zebra/1"] == "zebra" and len(found) == 4
        assert open_dataset(str(tmp_path / "out")).classes == (*known, "zebra")
        assert (
            shard_dataset(self.source(tmp_path, classes=(*known, "zebra")), str(tmp_path / "out"))
            == open_dataset(str(tmp_path / "out")).manifest
        )

    @pytest.mark.parametrize(
        ("classes", "message"),
        [
            (("a", "b", "a"), "has 'a' twice"),
            (tuple(CAFE.values()), "has 'café' twice"),
            (("a", ""), "has an empty name"),
            ("{tmp}/none.txt", "none.txt cannot be read: No such file"),
            ("{tmp}/bad.json", "bad.json is no list of names"),
            ("{tmp}/object.json", "object.json is no list of names: write one name a line, or a JSON list"),
            ("{tmp}/binary.txt", "binary.txt is no list of names"),
        ],
    )
    def test_a_list_that_is_none_is_refused(self, tmp_path: Path, classes: Any, message: str) -> None:
        for name, data in (("bad.json", b"[1,"), ("object.json", b'{"a": 1}'), ("binary.txt", b"\xff\xfe\x00")):
            (tmp_path / name).write_bytes(data)
        given = classes.format(tmp=tmp_path) if isinstance(classes, str) else classes
        with pytest.raises((ConfigError, DataError), match=message):
            labels(self.source(tmp_path, classes=given), tmp_path / "out")
