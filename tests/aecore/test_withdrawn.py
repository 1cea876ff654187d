"""A withdrawn generation: no reader opens it, and what is committed of it while it is withdrawn says so, whichever comes first."""

import dataclasses
import re
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from aecore.data import as_webdataset
from aecore.data.dataset import open_dataset
from aecore.data.read.verify import verify_dataset
from aecore.data.sources.folder import FolderSpec
from aecore.data.write.job import shard_dataset
from aecore.data.write.report import ensure_report
from aecore.data.write.spec import ShardSpec
from aecore.data.write.splits import SplitSpec
from aecore.encoding.job import encode_dataset
from aecore.errors import DataError
from aecore.evaluate import EvaluateSpec, evaluate
from aecore.maintenance.compare import compare
from aecore.report.figures import write_figures
from aecore.store import LocalStore, open_store
from aecore.table.table import open_table
from aecore.table.verify import verify_table
from aecore.training.loop import fit
from aecore.training.session import Session
from aecore.training.verify import verify_run
from tests.aecore.data.removals import live_keys, remove
from tests.aecore.encoding import folder_dataset, image_folder, saved_run
from tests.aecore.training import small_job


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Two generations of a split of 20 samples; the second removed one."""
    url = folder_dataset(image_folder(tmp_path / "images", "train", range(20)), tmp_path / "data", max_samples=8)
    remove(url, live_keys(open_dataset(url))[:1])
    return url


def withdraw(url: str, number: int, content: bytes = b"{}") -> None:
    (Path(url) / f"withdrawn.{number:06d}.json").write_bytes(content)


@pytest.mark.parametrize("content", [b"{}", b"", b"no JSON"])
def test_every_reader_refuses_a_withdrawn_generation_by_name_and_reads_the_others(data: str, tmp_path: Path, content: bytes) -> None:
    run = saved_run(tmp_path / "run")
    withdraw(data, 1, content)
    with pytest.raises(DataError, match=r"generation 1 of .*/data was withdrawn \(withdrawn\.000001\.json is there\)"):
        open_dataset(data, 1)
    with pytest.raises(DataError, match="generation 1 of .* was withdrawn"):
        as_webdataset(data, number=1)
    assert len(list(as_webdataset(data))) == open_dataset(data).num_samples("train") == 19
    assert verify_dataset(open_dataset(data), read_data=True).problems == ()
    withdraw(data, 2, content)
    readers: dict[str, Callable[[], Any]] = {
        "open": lambda: open_dataset(data),
        "stream": lambda: as_webdataset(data),
        "encode": lambda: encode_dataset(run, data, str(tmp_path / "table")),
        "evaluate": lambda: evaluate(run, data, EvaluateSpec(split="train")),
        "figures": lambda: write_figures(run, data, str(tmp_path / "figures"), EvaluateSpec(split="train")),
        "train": lambda: fit(small_job(data, tmp_path / "other")),
        "compare": lambda: compare(data, data),
    }
    for read in readers.values():
        with pytest.raises(DataError, match="generation 2 of .* was withdrawn"):
            read()
    assert not (tmp_path / "table").exists() and not (tmp_path / "other").exists()


def images_of(data: str) -> FolderSpec:
    """The source of `data`, with one more image."""
    return FolderSpec(url=str(image_folder(Path(data).parent / "images", "train", range(20, 21))))


def test_no_generation_is_made_of_a_withdrawn_one(data: str) -> None:
    source, splits, shards = images_of(data), SplitSpec(by="folders"), ShardSpec(max_samples=8)
    withdraw(data, 2)
    before = sorted(Path(data).rglob("*"))
    for dry_run in (True, False):
        with pytest.raises(DataError, match="generation 2 of .*/data was withdrawn .*write the source to another URL"):
            shard_dataset(source, data, splits, shards, dry_run=dry_run)
    assert sorted(Path(data).rglob("*")) == before
    withdraw(data, 1)
    (Path(data) / "withdrawn.000002.json").unlink()  # of an older one nothing is made
    assert shard_dataset(source, data, splits, shards).number == 3


@pytest.mark.parametrize("before", [True, False])
def test_a_generation_whose_parent_is_withdrawn_while_it_is_committed_says_what_has_to_go(
    data: str, withdraw_at: Callable[[str, bool], None], before: bool
) -> None:
    withdraw_at("records/train-g000003-000000.json" if before else "dataset.000003.json", before)
    what = "was withdrawn .* nothing may be" if before else r"was withdrawn .* while .*/dataset\.000003\.json was committed.*: remove "
    with pytest.raises(DataError, match=f"generation 2 of .*/data {what}"):
        shard_dataset(images_of(data), data, SplitSpec(by="folders"), ShardSpec(max_samples=8))
    assert (Path(data) / "dataset.000003.json").exists() is not before


def test_verify_does_not_miss_a_parent_that_was_withdrawn_and_is_gone(data: str) -> None:
    (Path(data) / "dataset.000001.json").unlink()
    assert any("dataset.000001.json" in problem for problem in verify_dataset(open_dataset(data)).problems)
    withdraw(data, 1)
    assert verify_dataset(open_dataset(data), read_data=True).problems == ()


def test_what_was_made_of_a_withdrawn_generation_is_a_problem_of_its_verify(data: str, tmp_path: Path) -> None:
    fit(small_job(data, tmp_path / "run", max_steps=2))
    encode_dataset(str(tmp_path / "run"), data, str(tmp_path / "table"))
    withdraw(data, 2)
    with pytest.raises(DataError, match="generation 2 of .* was withdrawn"):
        verify_table(open_table(str(tmp_path / "table")), read_data=True)
    assert any("generation 2 of" in problem for problem in verify_run(open_store(str(tmp_path / "run")), read_data=True).problems)


@pytest.fixture
def withdraw_at(data: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, bool], None]:
    """Return a function that has generation 2 withdrawn right before, or right after, a file with this end is put."""

    def at(name: str, before: bool) -> None:
        put = LocalStore.put

        def putting(self: LocalStore, file: str, content: bytes, *, role: str) -> Any:
            if not file.endswith(name):
                return put(self, file, content, role=role)
            if before:
                withdraw(data, 2)
            ref = put(self, file, content, role=role)
            withdraw(data, 2)
            return ref

        monkeypatch.setattr(LocalStore, "put", putting)

    return at


@pytest.mark.parametrize("before", [True, False])
def test_a_commit_during_which_its_generation_is_withdrawn_says_what_has_to_go(
    data: str, tmp_path: Path, withdraw_at: Callable[[str, bool], None], before: bool
) -> None:
    run = saved_run(tmp_path / "run")
    withdraw_at("table.000001.json", before)
    with pytest.raises(DataError, match=r"while .*/table\.000001\.json was committed, which was made of it: remove .*/table\.000001\.json"):
        encode_dataset(run, data, str(tmp_path / "table"))


@pytest.mark.parametrize("name", ["model/checkpoint.json", "checkpoint.json"])
def test_a_run_whose_generation_is_withdrawn_ends_at_its_next_commit(
    data: str, tmp_path: Path, withdraw_at: Callable[[str, bool], None], name: str
) -> None:
    job = small_job(data, tmp_path / "run", epochs=3, global_batch=16)
    withdraw_at(name, False)
    with pytest.raises(DataError, match=f"while .*/run/{'model' if 'model' in name else 'checkpoints/step-00000002'}.* was committed"):
        fit(job)
    with pytest.raises(DataError, match="generation 2 of .* was withdrawn"):
        fit(job)
    assert len(list((tmp_path / "run/checkpoints").iterdir())) == (1 if name == "checkpoint.json" else 2)


def test_what_is_withdrawn_before_a_commit_is_not_committed(data: str, tmp_path: Path, withdraw_at: Callable[[str, bool], None]) -> None:
    run = saved_run(tmp_path / "run")
    withdraw_at("records/train-000001.json", True)
    with pytest.raises(DataError, match="generation 2 of .* was withdrawn"):
        encode_dataset(run, data, str(tmp_path / "table"))
    assert not list((tmp_path / "table").glob("table.*"))


@pytest.mark.parametrize("before", [True, False])
def test_figures_of_a_withdrawn_generation_are_not_finished(
    data: str, tmp_path: Path, withdraw_at: Callable[[str, bool], None], before: bool
) -> None:
    run = saved_run(tmp_path / "run")
    withdraw_at("reconstructions.png" if before else "figures.json", True)
    with pytest.raises(DataError, match="generation 2 of .* was withdrawn"):
        write_figures(run, data, str(tmp_path / "figures"), EvaluateSpec(split="train"))
    assert (tmp_path / "figures/figures.json").exists() is not before


@pytest.mark.parametrize("before", [True, False])
def test_the_report_of_a_generation_that_is_withdrawn_says_what_has_to_go(
    data: str, withdraw_at: Callable[[str, bool], None], before: bool, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = open_dataset(data)
    assert dataset.number == 2 and not (Path(data) / "report/000002.json").exists()
    withdraw_at("report/000002.json" if before else "report/000002.sha256", before)
    assert ensure_report(dataset, {}) is None
    assert re.search(
        r"generation 2 of .* was withdrawn .* while .*/report/000002\.json was committed, .* remove .*/report/000002", caplog.text
    )
    caplog.clear()
    shutil.rmtree(Path(data) / "report")
    assert ensure_report(dataset, {}) is None and "was withdrawn" in caplog.text and not (Path(data) / "report").exists()


def test_a_run_stays_on_its_generation_by_number_and_hash(data: str, tmp_path: Path) -> None:
    whole = fit(small_job(data, tmp_path / "whole", epochs=3, global_batch=16))
    job = small_job(data, tmp_path / "run", epochs=3, global_batch=16)
    stops = iter([False, True])
    with pytest.raises(Exception, match="interrupted at step"):
        fit(job, stop=lambda: next(stops, True))
    remove(data, live_keys(open_dataset(data))[3:9])
    assert fit(job).checkpoint_sha256 is not None
    assert (tmp_path / "run/model/model.safetensors").read_bytes() == (tmp_path / "whole/model/model.safetensors").read_bytes()
    assert whole.step == fit(job).step
    assert verify_run(open_store(str(tmp_path / "run")), read_data=True).problems == ()
    other = fit(dataclasses.replace(job, out=str(tmp_path / "newer")))
    assert other.step < whole.step, "a new run takes the newest generation, which has fewer samples"


def test_another_dataset_with_the_same_splits_does_not_take_the_place_of_the_one_that_a_run_began_with(tmp_path: Path) -> None:
    images = image_folder(tmp_path / "images", "train", range(20))
    data = folder_dataset(image_folder(images, "test", range(20, 24)), tmp_path / "data", max_samples=8)
    job = small_job(data, tmp_path / "run", epochs=3, global_batch=16)
    stops = iter([False, True])
    with pytest.raises(Exception, match="interrupted at step"):
        fit(job, stop=lambda: next(stops, True))
    (tmp_path / "data").rename(tmp_path / "kept")
    folder_dataset(image_folder(images, "test", range(24, 28)), tmp_path / "data", max_samples=8)
    before, now = open_dataset(str(tmp_path / "kept")), open_dataset(data)
    assert before.training_key("train") == now.training_key("train") and before.dataset_sha256 != now.dataset_sha256
    with pytest.raises(DataError, match=f"generation 1 of .* has the dataset_sha256 {now.dataset_sha256[:12]}, the run .* began with"):
        fit(job)
    with pytest.raises(DataError, match="another dataset is in its place"), closing(Session(job)) as session:
        session.plan()
    moved = dataclasses.replace(job, data=str(tmp_path / "kept"))
    result = fit(moved)
    assert fit(job) == result, "a finished run reads no data"
