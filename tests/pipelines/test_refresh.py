"""A pipeline whose source changes: what each policy trains and encodes, and that a killed tick goes on where it was."""

import dataclasses
import functools
import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aecore.artifact.documents import CLAIM, read_json
from aecore.checkpoint.weights import load_model
from aecore.data.dataset import open_dataset
from aecore.encoding.job import encode_dataset
from aecore.errors import ConfigError, DataError
from aecore.maintenance.gc import collect_garbage, superseded_folders
from aecore.store import open_store
from aecore.table.table import open_table
from aecore.training.loop import fit
from pipelines.cli import text
from pipelines.cli.main import main
from pipelines.recipe.recipe import Recipe, load_recipe
from pipelines.steps.pipeline import run_stages, stage
from pipelines.steps.steps import STEPS, train_job_of
from pipelines.steps.submit import identity
from tests.aecore.data.tiny import encoded, image
from tests.pipelines.changing import change_files, pictures, require_rows_of_files
from tests.processes import AEPIPE, run, started
from tests.s3 import S3
from tests.warm import WARM

WORDS = (
    "shards.max_samples=8",
    "shards.max_removed=1",
    "shards.max_bad=1",
    "model.latent_dim=2",
    "backbone.hidden=[8]",
    "train.epochs=2",
    "train.global_batch=16",
    "cluster.num_workers=0",
)
Change = Callable[[Path], None]


def picture(place: Path, number: int) -> None:
    """Write a picture whose file is old enough to have a state."""
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(encoded(image(number)))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder of 32 pictures to train on and 8 to test with, in two classes."""
    for number in range(40):
        split = "train" if number < 32 else "test"
        picture(tmp_path / "in" / split / "ab"[number % 2] / f"{number:02d}.png", number)
    return tmp_path / "in"


def recipe(root: Path, *words: str) -> Recipe:
    return load_recipe(None, [f"out={root}", f"source.url={root.parent}/in", *WORDS, *words])


def tick(root: Path, policy: str = "keep", *words: str, before: Callable[[str], None] = lambda name: None) -> dict[str, Any]:
    """Run the pipeline once in this process; `before(step)` is called before each step."""

    def step(name: str, part: Recipe) -> Any:
        before(name)
        return STEPS[name](part)

    return run_stages(recipe(root, f"refresh.policy={policy}", *words), step)


def files(root: Path) -> dict[str, str]:
    """Return the hash of every file of a root."""
    found = (path for path in sorted(root.rglob("*")) if path.is_file() and ".tmp" not in path.parts)
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def keep_identity(source: Path) -> None:
    """Change nothing."""


def add(source: Path) -> None:
    for number in range(100, 108):
        picture(source / "train" / "ab"[number % 2] / f"{number}.png", number)


def remove(source: Path) -> None:
    for path in sorted((source / "train/a").iterdir())[:4]:
        path.unlink()


def relabel(source: Path) -> None:
    for path in sorted((source / "train/a").iterdir())[:4]:
        path.rename(source / "train/b" / path.name)


def add_to_test(source: Path) -> None:
    picture(source / "test/a/200.png", 200)


CHANGES = {"nothing": keep_identity, "added": add, "removed": remove, "relabelled": relabel, "other split": add_to_test}


def folders(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def weights(run: Path | str) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in load_model(str(run)).model.state_dict().items()}


def rows(table: Path | str) -> dict[str, Any]:
    """Return key -> what the table says of a sample, without where its row and its class stand."""
    found = open_table(str(table))
    columns = {name: found.arrow(name).to_pylist() for name in found.columns if name not in ("shard", "ordinal", "label")}
    return {key: tuple(str(column[row]) for column in columns.values()) for row, key in enumerate(columns["key"])}


def claim(run: Path) -> dict[str, Any]:
    return read_json(open_store(str(run)), CLAIM)


def require_as_fresh(root: Path, tmp_path: Path, run: str, table: str, start: str | None) -> None:
    """The run has the weights of one trained alone on the generation of its claim, its table the rows of a fresh table."""
    data, scratch = root / "dataset", tmp_path / f"fresh-{run}"
    fresh = stage(recipe(root), "train").tree | {"out": str(scratch / "run")}
    fresh["train"] = fresh["train"] | ({} if start is None else {"init_from": f"{root}/{start}"})
    job = dataclasses.replace(
        train_job_of(Recipe(fresh)), data=str(at_generation(data, claim(root / run)["info"]["dataset_number"], scratch))
    )
    fit(job)
    assert weights(root / run) == weights(scratch / "run")
    encode_dataset(str(root / run), str(data), str(scratch / "table"))
    assert rows(root / table) == rows(scratch / "table")
    assert open_table(str(root / table)).manifest.lineage["dataset"]["number"] == open_dataset(str(data)).number


def at_generation(data: Path, number: int, scratch: Path) -> Path:
    """Return a copy of a dataset without the generations after this one."""
    copy = scratch / "dataset"
    shutil.copytree(data, copy)
    for path in copy.glob("dataset.*.json"):
        if int(path.name.split(".")[1]) > number:
            path.unlink()
    return copy


def test_the_thin_path_on_real_pictures(real_mnist_small: Path, tmp_path: Path) -> None:
    folder, root = Path(shutil.copytree(real_mnist_small, tmp_path / "in")), tmp_path / "root"
    damaged = {path: path.read_bytes() for path in pictures(folder, "train")[::1_000]}
    for path in damaged:
        path.write_bytes(b"no picture")
    words = ("shards.max_samples=1000", "train.global_batch=128", "encode.kl=true")
    first = tick(root, "continue", *words)
    assert (first["shard"]["quarantined"], first["encode"]["rows"]) == (3, 3_497)
    change_files(folder, relabelled=50, deleted=25, replaced=10, seed=16, spared={*damaged})
    for path, data in damaged.items():
        path.write_bytes(data)
    time.sleep(2.1)  # until files have states: else the second tick has a generation of its own, which only says them
    for policy, name in (("keep", "run"), ("continue", "run-g000002")):
        second = tick(root, policy, *words)
        assert second["train"]["run"] == f"{root}/{name}"
        assert len(require_rows_of_files(folder, open_table(str(root)))) == second["encode"]["rows"] == 3_475
    assert second["evaluate"]["elbo"] > first["evaluate"]["elbo"]
    assert main(["verify", str(root), "--read-data"]) == 0


class Killed(Exception):
    """What ends a tick between two of its steps."""


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("policy", ["keep", "continue", "retrain"])
def test_a_tick_follows_the_change_whatever_step_the_one_before_was_killed_at(
    policy: str, change: str, source: Path, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    tick(root, policy)
    first = {name: sha256 for name, sha256 in files(root).items() if not name.startswith("dataset/")}
    CHANGES[change](source)
    for victim in ("train", "encode", "evaluate"):
        with pytest.raises(Killed):
            tick(root, policy, before=functools.partial(killed_before, victim))
    last = tick(root, policy)
    trains = policy != "keep" and change not in ("nothing", "other split")
    run, table = ("run-g000002", "table-g000002") if trains else ("run", "table")
    assert folders(root) == sorted({"dataset", "run", "table", run, table})
    assert (last["train"]["run"], last["encode"]["table"]) == (f"{root}/{run}", f"{root}/{table}")
    assert last["evaluate"]["lineage"]["checkpoint"]["sha256"] == last["train"]["checkpoint_sha256"]
    assert not last["train"]["made"] and not last["encode"]["made"], "each killed tick left nothing but its next step"
    assert "\nnothing new: " in text.of_pipeline(last)
    now = files(root)
    assert {name: now[name] for name in first} == first, "nothing of before is changed or removed"
    if change == "nothing":
        assert {name for name in now if not name.startswith("dataset/")} == {*first}
    info = claim(root / run)["info"]
    assert info.get("init_from") == (f"{root}/run" if trains and policy == "continue" else None)
    assert info["dataset_number"] == (2 if trains else 1)
    require_as_fresh(root, tmp_path, run, table, "run" if trains and policy == "continue" else None)
    assert main(["verify", str(root), "--read-data"]) == 0
    tick(root, policy)
    assert files(root) == now, "and a tick without a change makes nothing"


def killed_before(victim: str, name: str) -> None:
    if name == victim:
        raise Killed


def test_each_generation_gets_its_run_and_every_reader_finds_the_newest(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "root"
    tick(root, "continue")
    for change in (add, relabel):
        change(source)
        tick(root, "continue")
    assert folders(root) == ["dataset", "run", "run-g000002", "run-g000003", "table", "table-g000002", "table-g000003"]
    assert [claim(root / f"run-g{n:06d}")["info"]["init_from"] for n in (2, 3)] == [f"{root}/run", f"{root}/run-g000002"]
    assert open_table(str(root)).url == f"{root}/table-g000003"
    assert len(open_table(str(root))) == 48 and open_table(str(root), 1).manifest.number == 1
    remove(source)
    tick(root, "keep")
    assert folders(root)[-1] == "table-g000003" and open_table(str(root)).manifest.number == 2
    capsys.readouterr()

    def answer(*words: str) -> Any:
        assert main([*words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    assert [path.split("/")[-4] for path in answer("show", str(root), "--files")["files"]] == ["table-g000003"] * len(
        open_table(str(root)).files()
    )
    shown = answer("show", str(root))
    assert [shown[name]["dataset_generation"] for name in ("run", "run-g000002", "run-g000003")] == [1, 2, 3]
    state = answer("status", str(root))
    assert (state["generation"], state["up_to_date"]) == (4, True)
    assert [(run["trained_on_generation"], run["table_of_generation"]) for run in state["runs"].values()] == [(1, 1), (2, 2), (3, 4)]
    assert set(answer("verify", str(root), "--read-data")) >= {"run-g000003", "table-g000003"}
    compared = answer("compare", str(root), str(root))
    assert compared["run"]["a"] == f"{root}/run-g000003" and compared["table"]["same_rows"]
    with pytest.raises(DataError, match=f"give {root}/run-g000003$"):
        load_model(str(root))


def test_another_run_of_the_root_is_not_that_of_a_table(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "root"
    tick(root, "retrain")
    add(source)
    tick(root, "retrain")
    shutil.rmtree(root / "run-g000002")
    shutil.copytree(root / "run", root / "run-g000002")
    assert main(["verify", str(root)]) == 3
    printed = capsys.readouterr().err
    assert f"{root}/table-g000002 does not match" in printed and f"{root}/run-g000002/model is another checkpoint" in printed


KILLS = {  # what is there when the tick of the second generation dies
    "the dataset": "manifest.linked:1",
    "the claim of the run": "run.linked:2",
    "half of the run": "checkpoint.linked:1",
    "the model": "model.linked:2",
    "a part of the table": "record.linked:3",
}


def process(root: Path, policy: str, fault: str | None = None) -> int:
    """Run a tick in a process of its own, as the main program of a job does; return its exit status."""
    tree = json.dumps(recipe(root, f"refresh.policy={policy}").tree)
    environment = {**os.environ, **({} if fault is None else {"AECORE_FAULT": fault})}
    return run([*WARM, "-m", "pipelines.steps.job_main", "pipeline", tree], env=environment).returncode


@pytest.mark.parametrize(("kill", "newer"), [*((kill, True) for kill in KILLS), ("half of the run", False)])
def test_a_killed_process_is_continued_by_another_one_first_on_its_own_generation(
    kill: str, newer: bool, source: Path, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    tick(root, "continue")
    add(source)
    assert process(root, "continue", KILLS[kill]) == -signal.SIGKILL
    claimed = (root / "run-g000002" / CLAIM).exists()
    assert claimed == (kill != "the dataset")
    if newer:
        relabel(source)
    assert process(root, "continue") == 0
    runs = {1, 2, 3} if newer and claimed else {1, 3} if newer else {1, 2}
    assert {claim(path)["info"]["dataset_number"] for path in root.glob("run*")} == runs
    before = 1
    for number in sorted(runs - {1}):
        name = f"run-g{number:06d}"
        assert claim(root / name)["info"]["init_from"] == (f"{root}/run" if before == 1 else f"{root}/run-g{before:06d}")
        require_as_fresh(root, tmp_path, name, f"table-g{number:06d}", "run" if before == 1 else f"run-g{before:06d}")
        before = number
    now = files(root)
    assert process(root, "continue") == 0
    assert files(root) == now


def test_two_ticks_at_once_make_one_run_and_one_table(source: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    tick(root, "retrain")
    add(source)
    tree = json.dumps(recipe(root, "refresh.policy=retrain").tree)
    command = [*WARM, "-m", "pipelines.steps.job_main", "pipeline", tree]
    with started(command) as one, started(command) as two:
        codes = sorted(each.finish().returncode for each in (one, two))
    assert codes in ([0, 0], [0, 1]), (one.tail(), two.tail())  # "another append was committed ...: run the same command again"
    assert process(root, "retrain") == 0
    assert folders(root) == ["dataset", "run", "run-g000002", "table", "table-g000002"]
    require_as_fresh(root, tmp_path, "run-g000002", "table-g000002", None)
    assert main(["verify", str(root), "--read-data"]) == 0


def test_a_root_that_was_moved_is_continued_where_it_is(source: Path, tmp_path: Path) -> None:
    tick(tmp_path / "root", "continue")
    add(source)
    assert process(tmp_path / "root", "continue", KILLS["the claim of the run"]) == -signal.SIGKILL
    moved = (tmp_path / "root").rename(tmp_path / "moved")
    assert tick(moved, "continue")["train"]["run"] == f"{moved}/run-g000002"
    assert weights(moved / "run-g000002") != weights(moved / "run")


def test_the_policy_of_today_is_not_that_of_a_run_that_exists(source: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    tick(root, "continue")
    add(source)
    assert process(root, "continue", KILLS["half of the run"]) == -signal.SIGKILL
    for policy in ("keep", "retrain"):
        assert tick(root, policy)["train"]["run"] == f"{root}/run-g000002"
    require_as_fresh(root, tmp_path, "run-g000002", "table-g000002", "run")
    with pytest.raises(ConfigError, match="train.epochs: there 2, asked 3"):
        tick(root, "retrain", "train.epochs=3")
    relabel(source)
    assert tick(root, "retrain", "train.epochs=3")["train"]["steps"] == 9, "a new run has the recipe of today"


def test_a_dry_run_says_what_would_be_trained(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "root"
    (tmp_path / "empty.yaml").write_text("")
    words = ["run", str(tmp_path / "empty.yaml"), f"out={root}", f"source.url={source}", *WORDS, "refresh.policy=continue", "--dry-run"]
    tick(root, "continue")

    def plan() -> Any:
        capsys.readouterr()
        before = files(root)
        assert main([*words, "--json"]) == 0
        assert files(root) == before
        return json.loads(capsys.readouterr().out)

    nothing = plan()
    assert "then" not in nothing["refresh"] and nothing["train"]["finished"]
    add(source)
    then = plan()["refresh"]["then"]
    assert "a new run if the new generation changes what run is trained on" in then
    assert then.endswith("(train and encode are checked here with the generation that is there)")
    with pytest.raises(Killed):
        tick(root, "continue", before=functools.partial(killed_before, "train"))
    wanted = plan()
    new = {"run": "run-g000002", "table": "table-g000002", "new_run": True, "starts_from": f"{root}/run"}
    assert [{name: value for name, value in each.items() if name != "why"} for each in wanted["refresh"]["runs"]] == [new]
    assert wanted["stages"]["train"] == f"{root}/run-g000002" and not wanted["train"]["finished"]


def test_a_root_in_a_bucket_is_a_root(source: Path, s3: S3, capsys: pytest.CaptureFixture[str]) -> None:
    words = (f"out={s3.url}/root", f"source.url={source}", *WORDS, "refresh.policy=continue")
    for change in (keep_identity, add, remove):
        change(source)
        run_stages(load_recipe(None, words), lambda name, part: STEPS[name](part))
    root = open_store(f"{s3.url}/root")
    assert root.list() == ["dataset", "run", "run-g000002", "run-g000003", "table", "table-g000002", "table-g000003"]
    assert open_table(root.url).url == f"{root.url}/table-g000003"
    assert main(["verify", root.url, "--read-data"]) == 0 and main(["status", root.url]) == 0
    assert "up_to_date: True" in capsys.readouterr().out
    assert main(["gc", root.url, "--retention", "0s", "--older-than", "0s"]) == 0
    assert root.list() == ["dataset", "run-g000002", "run-g000003", "table-g000002", "table-g000003"]


@pytest.mark.prefect
@pytest.mark.ray
@pytest.mark.slow
def test_a_flow_with_ray_workers_does_the_same(source: Path, tmp_path: Path) -> None:
    flow, alone = tmp_path / "flow", tmp_path / "alone"
    for root in (flow, alone):
        tick(root, "continue")
    add(source)
    tick(alone, "continue")
    (tmp_path / "empty.yaml").write_text("name: nightly")
    changes = ("refresh.policy=continue", "cluster.num_workers=2", "cluster.resources_per_worker={CPU: 0.5}")
    words = [tmp_path / "empty.yaml", f"out={flow}", f"source.url={source}", *WORDS, *changes]
    answer = json.loads(run([*AEPIPE, "run", *words, "--json"], check=True).stdout)
    assert list(answer) == ["shard", "train", "encode", "evaluate"]
    assert (answer["train"]["run"], answer["train"]["made"], answer["encode"]["made"]) == (f"{flow}/run-g000002", True, True)
    assert claim(flow / "run-g000002")["info"]["init_from"] == f"{flow}/run"
    one, two = (load_model(str(root / "run-g000002")).model.state_dict() for root in (flow, alone))
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-5
    assert rows(flow / "table-g000002").keys() == rows(alone / "table-g000002").keys()
    now = files(flow)
    assert not tick(flow, "continue")["encode"]["made"] and files(flow) == now


def test_the_job_of_a_pipeline_with_the_default_policy_is_that_of_before(tmp_path: Path) -> None:
    keys = [
        identity("pipeline", recipe(tmp_path / "root", *words)) for words in ((), ("refresh.policy=keep",), ("refresh.policy=retrain",))
    ]
    assert keys[0] == keys[1] and "refresh" not in keys[0] and keys[2]["refresh"] == {"policy": "retrain"}


DAY = 86400.0


def test_gc_removes_superseded_runs_and_their_tables_after_the_retention(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "root"
    tick(root, "retrain")
    for change in (add, relabel, remove):
        change(source)
        tick(root, "retrain")
    assert superseded_folders(str(root)) == ([], ["table", "run", "table-g000002", "run-g000002"])
    capsys.readouterr()
    assert main(["gc", str(root)]) == 0
    assert "superseded, kept for now (the retention is not over): table, run, table-g000002, run-g000002" in capsys.readouterr().out
    assert len(folders(root)) == 9
    (root / "run/notes.txt").write_text("mine")
    before = {name: sha256 for name, sha256 in files(root).items() if name.split("/")[0] in folders(root)[3:5] + folders(root)[7:]}
    assert main(["gc", str(root), "--retention", "0s", "--dry-run"]) == 0 and len(folders(root)) == 9
    assert main(["gc", str(root), "--retention", "0s"]) == 0, "young files stay"
    assert len(folders(root)) == 9
    assert main(["gc", str(root), "--retention", "0s", "--older-than", "0s"]) == 0
    assert folders(root) == ["dataset", "run", "run-g000003", "run-g000004", "table-g000003", "table-g000004"]
    assert [path.name for path in (root / "run").rglob("*")] == ["notes.txt"], "what others wrote stays"
    assert {name: files(root)[name] for name in before} == before
    assert main(["gc", str(root), "--retention", "0s", "--older-than", "0s"]) == 0, "and is no error later"
    shutil.rmtree(root / "run")
    assert main(["verify", str(root), "--read-data"]) == 0
    now = files(root)
    tick(root, "retrain")
    assert files(root) == now
    assert main(["gc", str(root), "--retention", "0s", "--older-than", "0s", "--keep-generations", "1"]) == 0
    assert folders(root) == ["dataset", "run-g000004", "table-g000004"]


def test_gc_keeps_what_is_newer_than_the_last_finished_runs_and_goes_on_where_it_was_killed(source: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    tick(root, "continue")
    for change in (add, relabel):
        change(source)
        tick(root, "continue")
    remove(source)
    assert process(root, "continue", KILLS["half of the run"]) == -signal.SIGKILL
    year = os.stat(root / "table").st_mtime + 365 * DAY
    assert superseded_folders(str(root), now=year) == (["table", "run"], []), "an unfinished run counts for nothing"
    for name in ("data/split=train/train-000000.parquet", "table.000001.json"):
        (root / "table" / name).unlink()
    assert superseded_folders(str(root), now=year) == (["table", "run"], []), "whatever is left of them"
    for name in ("table", "run"):
        collect_garbage(f"{root}/{name}", superseded=True, now=year)
        assert not [path for path in (root / name).rglob("*") if path.is_file()]
    assert process(root, "continue") == 0
    assert folders(root)[-1] == "table-g000004"
