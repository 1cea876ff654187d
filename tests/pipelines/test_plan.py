"""`--dry-run` of a pipeline refuses what the pipeline would refuse, and a pipeline says what it did not evaluate."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.cli.main import main
from pipelines.cli.text import of_pipeline
from pipelines.recipe.recipe import Recipe, load_recipe
from pipelines.steps.pipeline import run_stages
from pipelines.steps.steps import STEPS

HERE = "cluster.num_workers=0"
SPRITES = ("source.kind=sprites", "source.num_samples=120", "shards.max_samples=60")
HASHED = (*SPRITES, "splits.by=hash", "splits.test=0.2")
TINY = ("model.latent_dim=3", "backbone.hidden=[8]", "train.epochs=1", "train.global_batch=32", HERE)


def piped(out: Path, *words: str) -> dict[str, Any]:
    """Run all stages in this process and return their summaries."""
    return run_stages(load_recipe(None, [f"out={out}", *words]), lambda name, part: STEPS[name](part))


def planned(capsys: pytest.CaptureFixture[str], out: Path, *words: str, code: int = 0) -> Any:
    """Return what `aepipe run --dry-run --json` says; the recipe is an empty file."""
    recipe = out.parent / "empty.yaml"
    recipe.write_text("")
    capsys.readouterr()
    assert main(["run", str(recipe), f"out={out}", *words, "--dry-run", "--json"]) == code
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a finished pipeline with a test split; tests only read it."""
    out = tmp_path_factory.mktemp("pipeline") / "out"
    assert piped(out, *HASHED, *TINY)["evaluate"]["num_samples"] > 0
    return out


def test_a_plan_of_nothing_yet_has_the_shards_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, tmp_path / "out", *HASHED, *TINY)
    assert list(plan) == ["stages", "shard", "recipe"]
    assert sum(plan["shard"]["samples"].values()) == 120
    assert not (tmp_path / "out").exists()


def test_a_plan_of_a_finished_pipeline_checks_training_and_encoding_too(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    plan = planned(capsys, root, *HASHED, *TINY)
    assert (plan["shard"]["known"], plan["shard"]["notes"]) == (120, ["nothing new"])
    assert plan["train"]["finished"] and plan["encode"]["new_rows"] == 0
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


@pytest.mark.parametrize(
    ("word", "code", "message"),
    [
        ("train.epochs=5", 2, "train.epochs: there 1, asked 5"),
        ("encode.dtype=float16", 2, "\n  encode.dtype: there 'float32', asked 'float16'"),
        ("evaluate.split=tset", 3, "has no split 'tset' (it has: train, test): set evaluate.split to another one"),
        ("train.val_split=val", 3, "has no split 'val' (it has: train, test): set train.val_split to another one"),
    ],
)
def test_a_plan_refuses_what_the_run_would_refuse(
    word: str, code: int, message: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in planned(capsys, root, *HASHED, *TINY, word, code=code)["message"]


def test_a_misspelt_split_stops_plan_and_run_before_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    refused = planned(capsys, out, *HASHED, *TINY, "evaluate.split=tset", code=3)
    assert f"{out}/dataset has no split 'tset' (it has: train, test)" in refused["message"]
    ran: list[str] = []

    def run(name: str, part: Recipe) -> Any:
        ran.append(name)
        return STEPS[name](part)

    with pytest.raises(Exception, match=r"has no split 'tset' \(it has: train, test\)"):
        run_stages(load_recipe(None, [f"out={out}", *HASHED, *TINY, "evaluate.split=tset"]), run)
    assert ran == ["shard"]


def test_only_the_default_split_may_be_missing_and_then_the_summary_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert planned(capsys, out, *SPRITES, *TINY)["not_evaluated"] == "no split 'test'"
    summaries = piped(out, *SPRITES, *TINY)
    assert summaries["evaluate"]["not_evaluated"] == "no split 'test'"
    assert f"{out}/dataset: not evaluated: no split 'test'" in of_pipeline(summaries)


def test_another_dataset_and_another_run_are_named_by_their_addresses(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    piped(other, *HASHED, *TINY, "source.num_samples=100")
    capsys.readouterr()
    assert main(["train", f"data={other}/dataset", f"out={root}/run", *TINY]) == 2
    error = capsys.readouterr().err
    assert f"data.train: there {root}/dataset (" in error and f"asked {other}/dataset (" in error
    assert main(["encode", f"{other}/run", f"{root}/dataset", f"{root}/table", HERE]) == 2
    error = capsys.readouterr().err
    assert f"checkpoint_sha256: there {root}/run/model (" in error and f"asked {other}/run/model (" in error


def test_the_demo_has_a_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["stages"]["encode"] == f"{tmp_path}/demo/table"
    assert sum(plan["shard"]["samples"].values()) == 3072
    assert list(tmp_path.iterdir()) == []
