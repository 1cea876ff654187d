"""Jobs on a dataset from which samples were removed give what they give on a fresh dataset of the samples that are left."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from aecore.checkpoint.weights import load_model
from aecore.data.dataset import open_dataset
from aecore.encoding.job import EncodeSpec, plan_encoding
from aecore.evaluate import EvaluateSpec, evaluate
from aecore.maintenance.compare import compare
from aecore.report._view import View
from aecore.table.table import open_table
from aecore.table.verify import verify_table
from aecore.training.loop import fit
from tests.aecore.data.removals import live_keys, remove
from tests.aecore.encoding import encode, folder_dataset, image_folder, saved_run, three_workers
from tests.aecore.training import fit_on, losses, small_job

NUM = 44


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`data`: two generations, then two that removed samples, all of a shard among them; `fresh`: a new dataset of what is left."""
    root = tmp_path_factory.mktemp("jobs")
    images = image_folder(root / "images", "train", range(0, 2 * NUM, 2))
    data = folder_dataset(image_folder(images, "test", range(1, 31, 2)), root / "data", max_samples=8)
    folder_dataset(image_folder(images, "train", range(2 * NUM, 2 * NUM + 30, 2)), root / "data", max_samples=8)
    dataset = open_dataset(data)
    emptied = dataset.index(dataset.manifest.split("train")[2])["key"].to_pylist()
    remove(data, [*emptied, *live_keys(dataset)[:3]])
    remove(data, [*live_keys(open_dataset(data))[4:20:3], *live_keys(dataset, "test")[::4]])
    left = {split: live_keys(open_dataset(data), split) for split in ("train", "test")}
    for split, keys in left.items():
        for path in (images / split).rglob("*.png"):
            if path.relative_to(images).with_suffix("").as_posix() not in keys:
                path.unlink()
    fresh = folder_dataset(images, root / "fresh", max_samples=8)
    assert {split: sorted(live_keys(open_dataset(fresh), split)) for split in left} == {split: sorted(keys) for split, keys in left.items()}
    saved_run(root / "run")
    return root


@pytest.mark.parametrize("rows_per_part", [0, 4])
def test_a_table_has_the_rows_of_a_table_of_the_fresh_dataset(places: Path, tmp_path: Path, rows_per_part: int) -> None:
    run, data, spec = str(places / "run"), str(places / "data"), EncodeSpec(batch=4, rows_per_part=rows_per_part)
    dataset = open_dataset(data)
    plan = plan_encoding(run, data, str(tmp_path / "table"), spec)
    assert sum(task.row_stop - task.row_start for task in plan.tasks) == dataset.manifest.num_samples()
    table = encode(run, data, tmp_path / "table", spec, fan_out=three_workers)
    fresh = encode(run, str(places / "fresh"), tmp_path / "fresh", spec)
    assert table.keys.to_pylist() == [key for split in ("train", "test") for key in live_keys(dataset, split)]
    at = {key: row for row, key in enumerate(fresh.keys.to_pylist())}
    order = [at[key] for key in table.keys.to_pylist()]
    assert len(at) == len(order) == table.num_rows
    np.testing.assert_allclose(table.numpy("mu"), fresh.numpy("mu")[order], rtol=1e-5, atol=1e-6)
    assert verify_table(open_table(str(tmp_path / "table")), read_data=True).num_rows == table.num_rows
    found = compare(str(tmp_path / "table"), str(tmp_path / "fresh"))
    assert found["keys"]["in_both"] == table.num_rows and found["keys"]["only_in_a"] == found["keys"]["only_in_b"] == 0


def test_an_evaluation_and_its_scores_count_live_samples_only(places: Path) -> None:
    run, dataset = str(places / "run"), open_dataset(str(places / "data"))
    spec = EvaluateSpec(split="test", batch=7, probe=True)
    found, fresh = (evaluate(run, str(places / name), spec) for name in ("data", "fresh"))
    assert found.num_samples == fresh.num_samples == len(live_keys(dataset, "test")) < 15
    assert found.mse == pytest.approx(fresh.mse, rel=1e-5), "means over the same samples, in another order"


def test_what_is_drawn_of_a_split_is_drawn_of_live_samples(places: Path) -> None:
    dataset = open_dataset(str(places / "data"))
    with View(load_model(str(places / "run")), dataset, EvaluateSpec(split="train"), "cpu") as view:
        assert view.chosen.max() < dataset.num_samples("train")
        assert len(view.chosen) == len(set(view.chosen.tolist())) == dataset.num_samples("train")


def test_training_takes_live_samples_on_any_number_of_ranks(places: Path, tmp_path: Path) -> None:
    data = str(places / "data")
    live = open_dataset(data).num_samples("train")
    job = small_job(data, tmp_path / "one", epochs=2, global_batch=16, val_split="test")
    result = fit(job)
    assert result.metrics["samples"] == live
    assert result.step == 2 * -(-live // 16)
    fit_on(dataclasses.replace(job, out=str(tmp_path / "two")), 2)
    one, two = ([row["loss"] for row in losses(tmp_path / name)] for name in ("one", "two"))
    np.testing.assert_allclose(one, two, rtol=1e-5)


def test_two_datasets_are_compared_by_their_live_samples(places: Path) -> None:
    data = str(places / "data")
    dataset, before = open_dataset(data), open_dataset(data, 2)
    found = compare(data, str(places / "fresh"))
    assert found["same_content"] is True
    assert found["keys"]["in_both"] == dataset.manifest.num_samples()
    assert found["splits"] == {split: [dataset.num_samples(split)] * 2 for split in ("train", "test")}
    assert compare(data, data)["same_content"] is True
    assert compare(data, data)["keys"]["in_both"] == dataset.manifest.num_samples()
    assert before.manifest.num_samples() > dataset.manifest.num_samples()


def test_a_dataset_and_its_copy_of_before_differ_in_what_was_removed(places: Path, tmp_path: Path) -> None:
    old = Path(shutil.copytree(places / "data", tmp_path / "old"))
    for number in (3, 4):
        (old / f"dataset.{number:06d}.json").unlink()
    found = compare(str(old), str(places / "data"))
    gone = open_dataset(str(old)).manifest.num_samples() - open_dataset(str(places / "data")).manifest.num_samples()
    assert (found["keys"]["only_in_a"], found["keys"]["only_in_b"]) == (gone, 0)
    assert found["same_content"] is False
