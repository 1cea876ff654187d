"""Equal content: duplicates, leaks, contradicting labels. What a dataset leaves out depends on the samples alone, not on their history."""

import io
import logging
import os
import random
import shutil
import signal
import tarfile
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings

from aecore.data.dataset import open_dataset
from aecore.data.read.verify import verify_dataset
from aecore.data.sources import Listing
from aecore.data.sources.folder import FolderSpec
from aecore.data.sources.webdataset import WebdatasetSpec
from aecore.data.write import job
from aecore.data.write.equal import CONTENT, Policy, dropped, equal_content
from aecore.data.write.job import adopt_shards
from aecore.data.write.ledger import MOST_LISTINGS, read_known
from aecore.data.write.plan import PlanSummary
from aecore.data.write.report import read_report
from aecore.data.write.spec import ShardSpec
from aecore.data.write.splits import SplitSpec
from aecore.errors import ConfigError, DataError
from tests.aecore.data.rows_source import ROWS, RowsSpec
from tests.aecore.data.test_living import V1, committed, pictures, put, reasons, require_fresh, rows_of, shard
from tests.aecore.data.tiny import encoded, image

SAMPLES = st.lists(
    st.tuples(st.sampled_from(["train", "val", "test", "extra"]), st.sampled_from(["", "cat", "dog"]), st.sampled_from("abcd")), max_size=14
)
POLICIES = st.builds(Policy, st.sampled_from(["keep", "drop"]), st.sampled_from(["warn", "drop"]))


def table(samples: list[tuple[str, str, str]]) -> pa.Table:
    rows = [(split, f"k{number:02d}", label, letter * 64) for number, (split, label, letter) in enumerate(samples)]
    return pa.table(
        dict(zip(CONTENT, zip(*rows, strict=True) if rows else [[]] * 4, strict=True)), pa.schema([(name, pa.string()) for name in CONTENT])
    )


def chosen(samples: list[tuple[str, str, str]], policy: Policy) -> list[str]:
    """The rule once more, sample by sample."""
    by_content, out = defaultdict(list), [""] * len(samples)
    for number, (split, _, letter) in enumerate(samples):
        by_content[letter].append((number, split))
    for members in by_content.values():
        held = [number for number, split in members if split in ("val", "test")]
        leaks = [number for number, split in members if split == "train"] if held and policy.leaks == "drop" else []
        first = (held or [number for number, _ in members])[0] if policy.leaks == "drop" else members[0][0]
        for number, _ in members:
            if number in leaks:
                out[number] = "leak"
            elif policy.duplicates == "drop" and number != first:
                out[number] = "duplicate"
    return out


@given(SAMPLES, POLICIES, st.randoms())
def test_what_is_left_out_is_a_function_of_the_set_of_samples(samples, policy, order):
    rows, numbers = table(samples), list(range(len(samples)))
    order.shuffle(numbers)
    assert dropped(rows, policy).tolist() == chosen(samples, policy)
    shuffled = rows.take(pa.array(numbers, pa.int64()))
    assert dropped(shuffled, policy)[np.argsort(numbers)].tolist() == chosen(samples, policy)
    assert equal_content(shuffled) == equal_content(rows)


@given(SAMPLES, SAMPLES, POLICIES)
def test_more_samples_bring_none_back(samples, more, policy):
    out, with_more = dropped(table(samples), policy), dropped(table([*samples, *more]), policy)
    assert not ((out != "") & (with_more[: len(samples)] == "")).any()


@given(SAMPLES)
def test_counts_are_those_of_a_plain_loop(samples):
    found, by_content = equal_content(table(samples)), defaultdict(list)
    for number, (split, label, letter) in enumerate(samples):
        by_content[letter].append((f"k{number:02d}", split, label))
    several = [members for members in by_content.values() if len(members) > 1]
    across = [members for members in several if len({split for _, split, _ in members}) > 1]
    named = [[each for each in members if each[2]] for members in several]
    against = [members for members in named if len({label for _, _, label in members}) > 1]
    for name, groups in (("duplicates", several), ("leaks", across), ("contradicting_labels", against)):
        assert (found[name]["samples"], found[name]["contents"]) == (sum(map(len, groups)), len(groups))
    assert found["duplicates"]["examples"] == sorted([key for key, _, _ in members][:5] for members in several)[:5]


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "copy", "copy", "copy", "delete", "delete", "move", "change", "policy"]),
        st.integers(0, 999),
        st.integers(0, 999),
    ),
    min_size=1,
    max_size=9,
)
FOLDERS = ("train/cat", "train/dog", "val/cat", "test/dog", "train/ant")


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_after_any_history_the_dataset_is_that_of_a_fresh_run(data):
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "src", Path(folder) / "out"
        pick, count = random.Random(data.draw(st.integers(0, 10_000))), 3
        spec = put(source, pictures([f"{each}/{number}.png" for number, each in enumerate(FOLDERS)]))
        policy: dict[str, Any] = {"duplicates": "drop"}
        splits = SplitSpec(by="folders", leaks="drop")
        for operations in data.draw(st.lists(OPERATIONS, min_size=1, max_size=4)):
            for name, a, b in operations:
                files = sorted(path for path in source.rglob("*.png"))
                target = source / FOLDERS[a % len(FOLDERS)] / f"{'zab'[b % 3]}{count}.png"
                count += 1
                if name == "add":
                    target.write_bytes(encoded(image(b % 7)))
                elif name == "copy":
                    shutil.copyfile(files[b % len(files)], target)
                elif name == "change":
                    files[b % len(files)].write_bytes(encoded(image(a % 7)))
                elif name == "policy":
                    policy = {"duplicates": pick.choice(["keep", "drop"])}
                    splits = SplitSpec(by="folders", leaks=pick.choice(["warn", "drop"]))
                elif len(files) > 2 and len(list(files[b % len(files)].parent.iterdir())) > 1:
                    if name == "move":
                        files[b % len(files)].rename(target)
                    else:
                        files[b % len(files)].unlink()
            require_fresh(spec, out, splits, max_removed=1.0, max_samples=4, **policy)
            dataset = open_dataset(str(out))
            assert verify_dataset(dataset, read_data=True).problems == ()
            ledger, left = read_known(dataset.store, dataset.manifest)
            there = sorted(path.relative_to(source).as_posix() for path in source.rglob("*.png"))
            assert sorted([*ledger["source"].to_pylist(), *left["source"].to_pylist()]) == there


def test_of_equal_samples_the_smallest_key_stays_and_when_it_goes_the_next_one_is_written(tmp_path):
    source = put(tmp_path / "src", dict.fromkeys(["c.png", "b.png", "d.png"], encoded(image(1))) | {"a.png": encoded(image(2))})
    made = require_fresh(source, tmp_path / "out", duplicates="drop")
    assert sorted(rows_of(open_dataset(str(tmp_path / "out")))) == ["a", "b"]
    assert reasons(made, tmp_path / "out") == {"duplicate": 2}
    before = committed(tmp_path / "out")
    assert shard(source, tmp_path / "out").number == 1, "the dataset keeps the choice of a run before"
    assert {name: each for name, each in committed(tmp_path / "out").items() if not name.startswith("report/")} == {
        name: each for name, each in before.items() if not name.startswith("report/")
    }
    (tmp_path / "src/b.png").unlink()
    made = require_fresh(source, tmp_path / "out", duplicates="drop")
    assert sorted(rows_of(open_dataset(str(tmp_path / "out")))) == ["a", "c"]
    assert reasons(made, tmp_path / "out") == {"duplicate": 2, "gone": 1}, "the removed ordinal of c does not come back"
    (tmp_path / "src/a2.png").write_bytes(encoded(image(1)))
    require_fresh(source, tmp_path / "out", duplicates="drop")
    assert sorted(rows_of(open_dataset(str(tmp_path / "out")))) == ["a", "a2"], "one that comes later and has a smaller key"
    assert verify_dataset(open_dataset(str(tmp_path / "out")), read_data=True).problems == ()


def test_samples_that_are_left_out_are_not_read_again(tmp_path, monkeypatch):
    source = put(tmp_path / "src", dict.fromkeys([f"{number}.png" for number in range(6)], encoded(image(1))))
    monkeypatch.setattr("aecore.store._states.YOUNG_NS", 0)
    shard(source, tmp_path / "out", duplicates="drop")
    read, real = list[int](), job.read_again

    def counting(listing: Any, *given: Any, **options: Any) -> Any:
        read.append(len(listing))
        return real(listing, *given, **options)

    monkeypatch.setattr(job, "read_again", counting)
    put(tmp_path / "src", {"new.png": encoded(image(4))})
    shard(source, tmp_path / "out")
    assert sum(read) == 0


def test_what_is_said_of_samples_that_are_left_out_follows_the_source(tmp_path):
    def run(keys: str, labels: str) -> tuple[int, int, int, int]:
        sources, count = ["t" if key == "z" else "s" for key in keys], len(keys)
        ROWS["left out"] = Listing([*keys], sources, np.full(count, 144), label_names=[*labels], states=["1"] * count)
        made = shard(RowsSpec(rows="left out"), tmp_path / "out", duplicates="drop")
        report = read_report(open_dataset(str(tmp_path / "out")))
        assert report is not None and made.num_samples() == 2
        return made.number, report["left_out"], report["duplicates"]["samples"], report["contradicting_labels"]["samples"]

    assert run("abcz", "xyxx") == (1, 2, 3, 3)
    assert run("abcz", "xyxx") == (1, 2, 3, 3)
    assert run("abcz", "xxxx") == (2, 2, 3, 0), "the label was put right"
    assert run("abz", "xxx") == (3, 1, 2, 0), "one is gone"
    assert run("abz", "xxx") == (3, 1, 2, 0)
    assert run("az", "xx") == (4, 0, 0, 0)
    assert verify_dataset(open_dataset(str(tmp_path / "out")), read_data=True).problems == ()


def test_a_leak_leaves_train_and_comes_back_when_the_held_out_one_goes(tmp_path):
    twice = encoded(image(5))
    source = put(tmp_path / "src", pictures(["train/x/1.png", "val/x/2.png"]) | {"train/x/a.png": twice, "test/x/z.png": twice})
    made = require_fresh(source, tmp_path / "out", SplitSpec(leaks="drop"))
    assert reasons(made, tmp_path / "out") == {"leak": 1}
    assert sorted(rows_of(open_dataset(str(tmp_path / "out")))) == ["test/x/z", "train/x/1", "val/x/2"]
    (tmp_path / "src/test/x/z.png").write_bytes(encoded(image(6)))
    made = require_fresh(source, tmp_path / "out", SplitSpec(leaks="drop"))
    assert sorted(rows_of(open_dataset(str(tmp_path / "out")))) == ["test/x/z", "train/x/1", "train/x/a", "val/x/2"]


@pytest.mark.parametrize(
    ("splits", "shards", "key"),
    [(SplitSpec(), {"duplicates": "refuse"}, "shards.duplicates"), (SplitSpec(leaks="refuse"), {}, "splits.leaks")],
)
def test_what_is_refused_is_named_and_nothing_is_committed(tmp_path, splits, shards, key):
    source = put(tmp_path / "src", pictures(["train/x/1.png", "val/x/2.png"]))
    shard(source, tmp_path / "out", splits, **shards)
    shutil.copyfile(tmp_path / "src/train/x/1.png", tmp_path / "src/val/x/9.png")
    for _ in range(2):
        with pytest.raises(DataError, match=rf"{key}=refuse: train/x/1.* = val/x/9.*No generation was committed"):
            shard(source, tmp_path / "out", splits, **shards)
    assert open_dataset(str(tmp_path / "out")).number == 1
    with pytest.raises(DataError, match=f"{key}=refuse"):
        shard(source, tmp_path / "new", splits, **shards)
    (tmp_path / "src/val/x/9.png").unlink()
    assert shard(source, tmp_path / "out", splits, **shards).number == 1
    shard(source, tmp_path / "new", splits, **shards)
    assert verify_dataset(open_dataset(str(tmp_path / "new")), read_data=True).problems == ()


def test_a_dataset_that_has_duplicates_already_is_refused_or_cleaned(tmp_path):
    source = put(tmp_path / "src", dict.fromkeys(["a.png", "b.png"], encoded(image(1))))
    assert shard(source, tmp_path / "out").identity["shards"].get("duplicates") is None, "absent: as before"
    with pytest.raises(DataError, match=r"shards\.duplicates=refuse: a = b"):
        shard(source, tmp_path / "out", duplicates="refuse")
    made = require_fresh(source, tmp_path / "out", duplicates="drop")
    assert (made.number, made.num_samples(), made.identity["shards"]["duplicates"]) == (2, 1, "drop")
    made = require_fresh(source, tmp_path / "out", duplicates="keep")
    assert (made.number, made.num_samples(), made.identity["shards"].get("duplicates")) == (3, 2, None)
    assert verify_dataset(open_dataset(str(tmp_path / "out")), read_data=True).problems == ()


def test_a_dataset_that_only_grows_drops_nothing(tmp_path):
    shutil.copytree(V1, tmp_path / "v1")
    source = FolderSpec(url=str(tmp_path / "v1/images"))
    with pytest.raises(ConfigError, match=r"shards\.removed=drop"):
        shard(source, tmp_path / "v1/dataset", max_samples=8, duplicates="drop")


def test_bags_lose_and_regain_members(tmp_path):
    files = pictures(["one/1.png", "one/2.png", "two/3.png"]) | {"two/1.png": encoded(image(0)), "two/4.png": encoded(image(9))}
    put(tmp_path / "src", files)
    source = FolderSpec(url=str(tmp_path / "src"), group="parent")
    made = require_fresh(source, tmp_path / "out", duplicates="drop")
    assert reasons(made, tmp_path / "out") == {"duplicate": 1}
    (tmp_path / "src/one/1.png").unlink()
    require_fresh(source, tmp_path / "out", duplicates="drop")
    assert "two/1" in rows_of(open_dataset(str(tmp_path / "out")))


def test_after_listings_are_merged_what_is_left_out_is_known(tmp_path):
    source = put(tmp_path / "src", dict.fromkeys(["a.png", "b.png"], encoded(image(1))))
    for number in range(MOST_LISTINGS + 2):
        put(tmp_path / "src", {f"n{number}.png": encoded(image(100 + number))})
        made = shard(source, tmp_path / "out", duplicates="drop")
    assert len(made.listings) < MOST_LISTINGS
    dataset = open_dataset(str(tmp_path / "out"))
    assert read_known(dataset.store, dataset.manifest)[1]["key"].to_pylist() == ["b"]
    (tmp_path / "src/a.png").unlink()
    require_fresh(source, tmp_path / "out", duplicates="drop")


def test_adopted_tars_leave_duplicates_out_in_place(tmp_path):
    (tmp_path / "tars").mkdir()

    def pack(name: str, files: dict[str, bytes]) -> None:
        with tarfile.open(tmp_path / "tars" / name, "w") as tar:
            for each, data in files.items():
                info = tarfile.TarInfo(each)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))

    pack("a.tar", {"1.png": encoded(image(1)), "2.png": encoded(image(2))})
    pack("b.tar", {"3.png": encoded(image(1)), "4.png": encoded(image(4))})
    source, out = WebdatasetSpec(url=str(tmp_path / "tars")), str(tmp_path / "out")
    made = adopt_shards(source, out, SplitSpec(), ShardSpec(duplicates="drop"))
    assert made.num_samples() == 3
    (tmp_path / "tars/a.tar").unlink()
    made = adopt_shards(source, out, SplitSpec(), ShardSpec(max_removed=1.0))
    assert sorted(rows_of(open_dataset(out))) == sorted(key for key in rows_of(open_dataset(out)) if key.endswith(("3", "4")))
    assert made.num_samples() == 2
    assert verify_dataset(open_dataset(out), read_data=True).problems == ()


class TestSplitsByContent:
    SPLITS = SplitSpec(by="content", val=0.3, test=0.2)

    def test_equal_content_is_in_one_split_whatever_its_key(self, tmp_path):
        files = pictures([f"a/{number}.png" for number in range(40)])
        source = put(tmp_path / "src", files | {f"b/{Path(name).name}": data for name, data in files.items()})
        made = require_fresh(source, tmp_path / "out", self.SPLITS)
        assert set(made.splits) == {"train", "val", "test"}
        rows = rows_of(open_dataset(str(tmp_path / "out")))
        assert all(rows[f"a/{number}"][0] == rows[f"b/{number}"][0] for number in range(40))
        assert verify_dataset(open_dataset(str(tmp_path / "out")), read_data=True).problems == ()

    def test_it_follows_its_source(self, tmp_path):
        source = put(tmp_path / "src", pictures([f"{number}.png" for number in range(30)]) | {"bad.png": b"nothing"})
        require_fresh(source, tmp_path / "out", self.SPLITS)
        put(
            tmp_path / "src",
            pictures([f"{number}.png" for number in range(5)], 50) | pictures(["x.png"], 29) | {"bad.png": encoded(image(77))},
        )
        (tmp_path / "src/7.png").rename(tmp_path / "src/7b.png")
        require_fresh(source, tmp_path / "out", self.SPLITS, max_removed=1.0)
        require_fresh(source, tmp_path / "out", self.SPLITS, checksum=True)
        assert verify_dataset(open_dataset(str(tmp_path / "out")), read_data=True).problems == ()

    def test_stratified_equal_content_stays_together(self, tmp_path):
        files = pictures([f"{'xy'[number % 2]}/{number}.png" for number in range(20)])
        copies = {name.replace(".png", "c.png"): data for name, data in files.items()}
        splits = SplitSpec(by="content", val=0.5, stratify=True)
        shard(put(tmp_path / "src", files | copies), tmp_path / "out", splits)
        rows = rows_of(open_dataset(str(tmp_path / "out")))
        assert all(rows[key][0] == rows[f"{key}c"][0] for key in rows if not key.endswith("c"))
        source = put(tmp_path / "src", {"x/99.png": encoded(image(0))})
        shard(source, tmp_path / "out", splits)
        after = rows_of(open_dataset(str(tmp_path / "out")))
        assert {key: after[key] for key in rows} == rows
        assert after["x/99"][0] == rows["x/0"][0]

    def test_groups_and_whole_files_are_refused(self, tmp_path):
        put(tmp_path / "src", pictures(["one/1.png", "two/2.png"]))
        with pytest.raises(ConfigError, match=r"source\.group.*splits\.by=hash"):
            shard(FolderSpec(url=str(tmp_path / "src"), group="parent"), tmp_path / "out", self.SPLITS)
        with pytest.raises(ConfigError, match=r"splits\.files=whole"):
            SplitSpec(by="content", val=0.5, files="whole")
        with pytest.raises(ConfigError, match=r"splits\.by=content needs"):
            SplitSpec(by="content")


@pytest.mark.parametrize("begun", [False, True])
def test_killed_anywhere_the_same_command_leaves_out_the_same(tmp_path, monkeypatch, begun):
    monkeypatch.setattr("aecore.store._states.YOUNG_NS", 0)
    twice = encoded(image(1))
    files = {"train/a.png": twice, "train/b.png": twice, "val/c.png": encoded(image(3)), "train/d.png": encoded(image(3))}
    source, splits = put(tmp_path / "src", files), SplitSpec(leaks="drop")
    if begun:
        shard(source, tmp_path / "first", splits, duplicates="drop")
        put(tmp_path / "src", {"train/e.png": twice, "test/f.png": encoded(image(5)), "train/g.png": encoded(image(5))})
        (tmp_path / "src/train/a.png").unlink()
    else:
        (tmp_path / "first").mkdir()
    shutil.copytree(tmp_path / "first", tmp_path / "whole")
    expected = shard(source, tmp_path / "whole", splits, duplicates="drop")
    names = {name: data for name, (data, _) in committed(tmp_path / "whole").items() if not name.startswith(("records/", "report/"))}
    for fault in [
        "record.linked",
        "removal.synced",
        "removal.linked",
        "listing.linked",
        "manifest.linked",
        "report.synced",
        "report.linked",
    ]:
        out = tmp_path / fault
        shutil.copytree(tmp_path / "first", out)
        child = os.fork()
        if child == 0:
            os.environ["AECORE_FAULT"] = fault
            shard(source, out, splits, duplicates="drop")
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, fault
        assert shard(source, out, splits, duplicates="drop") == expected, fault
        assert {name: data for name, (data, _) in committed(out).items() if name in names} == names, fault
        assert verify_dataset(open_dataset(str(out)), read_data=True).report == "ok", fault


def would(source: FolderSpec, out: Path, splits: SplitSpec | None = None, **shards: Any) -> PlanSummary:
    plan = job.shard_dataset(source, str(out), splits or SplitSpec(), ShardSpec(**shards), dry_run=True)
    assert isinstance(plan, PlanSummary)
    return plan


@pytest.mark.parametrize(("splits", "shards"), [(SplitSpec(leaks="drop"), {}), (SplitSpec(), {"duplicates": "drop"})])
def test_a_dry_run_says_what_another_policy_leaves_out(tmp_path, splits, shards):
    source = put(tmp_path / "src", dict.fromkeys(["train/x/1.png", "val/x/2.png"], encoded(image(1))))
    assert not any("are left out" in note for note in would(source, tmp_path / "out").notes)
    assert any("left out" in note and "after they are read" in note for note in would(source, tmp_path / "out", splits, **shards).notes)
    shard(source, tmp_path / "out")
    assert "nothing new" in would(source, tmp_path / "out").notes
    plan = would(source, tmp_path / "out", splits, **shards)
    assert plan.changes["left_out"]["samples"] == 1 and len(plan.changes["left_out"]["examples"]) == 1
    assert "nothing new" not in plan.notes and any(note.endswith(" becomes drop") for note in plan.notes)
    assert shard(source, tmp_path / "out", splits, **shards).num_samples() == 1
    assert "nothing new" in would(source, tmp_path / "out", splits, **shards).notes
    plan = would(source, tmp_path / "out", SplitSpec(leaks="warn"), duplicates="keep")
    assert sum(plan.samples.values()) == 1 and any("drop becomes" in note for note in plan.notes)


def test_the_report_says_what_of_it_is_still_in_the_dataset(tmp_path, caplog):
    files = dict.fromkeys(["train/x/1.png", "val/x/2.png"], encoded(image(1))) | dict.fromkeys(
        ["train/x/3.png", "train/y/4.png"], encoded(image(2))
    )
    source = put(tmp_path / "src", files)

    def remaining(**leaks: Any) -> tuple[int, int, int, set[str]]:
        caplog.clear()
        with caplog.at_level(logging.INFO):
            shard(source, tmp_path / "out", SplitSpec(**leaks))
        report = read_report(open_dataset(str(tmp_path / "out")))
        assert report is not None
        counts = [report[name]["remaining"] for name in ("duplicates", "leaks", "contradicting_labels")]
        return *counts, {record.getMessage() for record in caplog.records if record.levelno == logging.WARNING}

    *counts, warned = remaining()
    assert counts == [2, 1, 1] and any("in another split (1 content, for" in line for line in warned)
    for _ in range(2):  # by the run that makes the generation, and by one that makes none
        *counts, warned = remaining(leaks="drop")
        assert counts == [1, 0, 1] and not any("in another split" in line for line in warned)
        assert (
            "2 samples of the source have the content of one in another split (1 content, still so in the dataset: none, for" in caplog.text
        )
        assert any("of another class (1 content, for" in line for line in warned)
