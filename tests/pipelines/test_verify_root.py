"""`aepipe verify` of a whole root and of its parts: what belongs together, what is damaged and what to do, what nobody looked at."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aecore.data.dataset import open_dataset
from aecore.data.read.verify import verify_dataset
from aecore.data.sources.folder import FolderSpec
from aecore.data.write.job import shard_dataset
from aecore.data.write.plan import SplitSpec
from aecore.data.write.spec import ShardSpec
from aecore.encoding.job import EncodeSpec, encode_dataset
from aecore.store import open_store
from aecore.training.loop import fit
from pipelines.cli.main import main as aepipe
from pipelines.steps.show import show
from tests.aecore.encoding import image_folder
from tests.aecore.training import small_job
from tests.s3 import S3

Verify = Callable[..., str]
At = Callable[[Path], str]


def shard(root: Path, images: Path, **options: Any) -> None:  # any: of shard_dataset
    source = FolderSpec(url=str(images), name="images")  # wherever they are
    shard_dataset(source, str(root / "dataset"), SplitSpec(by="folders"), ShardSpec(max_samples=12), **options)


def make(root: Path, seed: int = 0) -> Path:
    """Write a dataset, a run and a table below `root`."""
    images, data, run = root.parent / f"images-{seed}", str(root / "dataset"), root / "run"
    image_folder(image_folder(images, "train", range(40 * seed, 40 * seed + 34)), "test", range(40 * seed + 34, 40 * seed + 40))
    shard(root, images)
    fit(small_job(data, run, every_steps=2, max_steps=4, global_batch=16, epochs=4, seed=seed))
    encode_dataset(str(run), data, str(root / "table"), EncodeSpec(batch=16))
    return root


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two roots, `one` and `two`, that were moved: nothing is where it was written."""
    top = tmp_path_factory.mktemp("roots")
    for seed, name in enumerate(("one", "two")):
        make(top / "written", seed).rename(top / name)
    return top


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """A copy of `one` that may be changed."""
    return Path(shutil.copytree(made / "one", tmp_path / "root"))


@pytest.fixture
def verify(capsys: pytest.CaptureFixture[str]) -> Verify:
    """Return a function that returns what `aepipe verify` prints, and requires its exit code."""

    def run(place: Path | str, *options: str, code: int = 3) -> str:
        capsys.readouterr()
        got = aepipe(["verify", str(place), *options])
        printed = capsys.readouterr()
        assert got == code, printed
        return printed.err if code else printed.out

    return run


@pytest.fixture(params=["disk", "bucket"])
def at(request: pytest.FixtureRequest) -> At:
    """Return a function that returns the address of a folder: where it is, or that of a copy in a bucket."""
    if request.param == "disk":
        return str
    s3: S3 = request.getfixturevalue("s3")
    numbers = itertools.count()

    def upload(folder: Path) -> str:
        prefix = f"{folder.name}-{next(numbers)}"
        s3.upload(folder, prefix)
        return f"{s3.url}/{prefix}"

    return upload


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def replace(root: Path, stage: str, other: Path) -> None:
    shutil.rmtree(root / stage)
    shutil.copytree(other / stage, root / stage)


@pytest.mark.parametrize("old", ["in place", "gone"])
def test_the_table_of_a_root_has_to_belong_to_its_run(made: Path, root: Path, old: str, verify: Verify) -> None:
    assert verify(root, code=0).startswith("ok")
    if old == "in place":
        shutil.copytree(made / "one", made / "written")
    try:
        replace(root, "run", made / "two")
        printed = verify(root)
    finally:
        shutil.rmtree(made / "written", ignore_errors=True)
    assert "the table was made by another run (run_sha256" in printed and f"than {root}/run is" in printed
    assert f"{root}/run/model is another checkpoint" in printed


def test_the_run_of_a_root_has_to_belong_to_its_dataset(made: Path, root: Path, verify: Verify) -> None:
    replace(root, "dataset", made / "two")
    assert f"{root}/run/run.000001.json names dataset_sha256" in verify(root, "--read-data")


def test_the_checkpoint_of_a_moved_root_is_that_of_its_own_run(root: Path, verify: Verify) -> None:
    report = json.loads(verify(root, "--read-data", "--json", code=0))
    assert report["table"]["checkpoint"] == f"{root}/run/model" and report["table"]["dataset"] == f"{root}/dataset"


def test_all_problems_of_all_artefacts_of_a_root_are_listed(root: Path, verify: Verify) -> None:
    broken = [
        next(root.glob("dataset/shards/test-*.tar")),
        min(root.glob("run/checkpoints/*/state.pt")),
        next(root.glob("table/data/split=test/*.parquet")),
    ]
    for path in broken:
        flip(path)
    printed = verify(root, "--read-data")
    assert [path.name for path in broken if str(path) not in printed] == []


@pytest.mark.parametrize("stage", ["dataset", "run", "table"])
def test_an_artefact_of_a_root_whose_manifest_is_damaged_hides_no_problem_of_the_others(root: Path, stage: str, verify: Verify) -> None:
    document = root / stage / ("run" if stage == "run" else stage)
    flip(Path(f"{document}.000001.json"))
    others = {"dataset": root / "dataset/shards/train-000000.tar", "run": root / "run/model/config.json"}
    others["table"] = root / "table/data/split=train/train-000000.parquet"
    del others[stage]
    for path in others.values():
        path.unlink()
    printed = verify(root)
    assert f"{document}.000001.json is damaged" in printed
    assert [name for name, path in others.items() if f"{path} is missing" not in printed] == [], printed


@pytest.mark.parametrize("options", [["--read-data"], ["--read-data-subset", "1/1"]])
@pytest.mark.parametrize("stage", ["table", "."])
def test_a_damaged_model_is_seen_by_the_check_of_the_table(root: Path, options: list[str], stage: str, verify: Verify) -> None:
    flip(root / "run/model/model.safetensors")
    if stage == "table":
        return_to = Path(json.loads((root / "table/table.000001.json").read_text())["lineage"]["run"])
        shutil.copytree(root / "run", return_to)
        try:
            printed = verify(root / "table", "--dataset", str(root / "dataset"), *options)
        finally:
            shutil.rmtree(return_to.parent)
    else:
        printed = verify(root, *options)
    assert "model/model.safetensors is damaged: sha256" in printed


def test_a_damaged_checkpoint_json_is_not_called_another_checkpoint(root: Path, verify: Verify) -> None:
    flip(root / "run/model/checkpoint.json")
    printed = verify(root)
    assert f"{root}/run/model/checkpoint.json is damaged" in printed and "another checkpoint" not in printed
    assert "nothing is wrong with the table's own files" in printed and "encode to a new URL" not in printed


def test_a_checkpoint_that_was_not_found_is_said_not_to_be_checked(root: Path, verify: Verify, caplog: pytest.LogCaptureFixture) -> None:
    assert "checkpoint: -" in verify(root / "table", "--dataset", str(root / "dataset"), code=0)
    assert "written/run/model: it was not checked" in caplog.text


@pytest.mark.parametrize("victim", ["checkpoint.json", "model.safetensors", "config.json", "state.pt"])
def test_damage_in_a_checkpoint_of_a_finished_run_comes_with_a_remedy(root: Path, victim: str, verify: Verify) -> None:
    newest = max((root / "run/checkpoints").iterdir())
    flip(newest / victim)
    printed = verify(root / "run")
    assert f"{newest}/{victim} is damaged" in printed and f"or remove {newest}: model/ does not need it" in printed
    assert printed.count("is damaged") == 1, "nothing else is wrong"
    shutil.rmtree(newest)
    assert verify(root / "run", code=0).startswith("ok")
    assert aepipe(["show", str(root / "run")]) == 0


def test_metrics_that_checkpoints_name_are_reported_once_with_what_may_be_removed(root: Path, verify: Verify) -> None:
    metrics = min((root / "run/metrics").iterdir())
    flip(metrics)
    printed = verify(root / "run")
    assert printed.count(f"{metrics} is damaged") == 1 and "metrics may be removed only with all of checkpoints/" in printed
    shutil.rmtree(root / "run/checkpoints")
    shutil.rmtree(root / "run/metrics")
    assert verify(root / "run", code=0).startswith("ok")


@pytest.mark.parametrize("stage", ["dataset", "table"])
def test_a_manifest_under_another_number_is_to_be_removed(root: Path, stage: str, verify: Verify) -> None:
    copy = root / stage / f"{stage}.000002.json"
    shutil.copy(root / stage / f"{stage}.000001.json", copy)
    assert f"{copy} is not in its place: it states number 1, which its name does not; it is a copy of {stage}.000001.json" in verify(
        copy.parent
    )
    copy.unlink()
    assert verify(root, code=0).startswith("ok")


@pytest.mark.parametrize("stage", ["dataset", "table"])
def test_the_manifest_of_another_artefact_is_named_before_all_that_it_makes_seem_wrong(
    made: Path, root: Path, stage: str, verify: Verify
) -> None:
    name = f"{stage}/{stage}.000001.json"
    shutil.copy(made / "two" / name, root / name)
    lines = verify(root / stage, "--read-data").partition("aepipe: ")[2].splitlines()
    first = lines[0] if stage == "dataset" else lines[1]
    assert f"{root / name}: claim_sha256 is" in first and ("of another dataset" in first or "belongs to another table" in first)
    assert len([line for line in lines if "claim_sha256 is" in line]) <= 2


@pytest.mark.parametrize(
    ("name", "copy"),
    [
        ("table/data/split=train/train-000000.parquet", "table/data/split=train/train-000000 (copy).parquet"),
        ("table/data/split=train/train-000000.parquet", "table/data/split=train/train-000009.parquet"),
        ("table/data/split=train/train-000000.parquet", "table/data/split=train/old/x.parquet"),
        ("table/data/split=train/train-000000.parquet", "table/data/x.parquet"),
        ("table/data/split=train/train-000000.parquet", "table/data/split=val/train-000000.parquet"),
        ("dataset/shards/train-000000.tar", "dataset/shards/train-000009.tar"),
        ("dataset/shards/train-000000.tar", "dataset/shards/train-g000002-000000.tar"),
        ("dataset/shards/train-000000.tar", "dataset/shards/copy.tar"),
        ("dataset/shards/train-000000.parquet", "dataset/shards/copy.parquet"),
    ],
)
@pytest.mark.parametrize(("options", "at"), [([], "disk"), (["--read-data"], "disk"), ([], "bucket")], indirect=["at"])
def test_a_file_that_a_pattern_would_read_and_no_manifest_names_is_a_problem(
    root: Path, name: str, copy: str, options: list[str], verify: Verify, at: At
) -> None:
    (root / copy).parent.mkdir(exist_ok=True)
    shutil.copy(root / name, root / copy)
    stage, _, below = copy.partition("/")
    printed = verify(at(root / stage), *options)
    assert f"no manifest names {below}, and whoever reads all files of a pattern reads it as well: remove it" in printed
    (root / copy).unlink()
    assert verify(at(root / stage), *options, code=0).startswith("ok")


def test_parts_of_an_append_that_goes_on_are_no_problem_and_are_mentioned(
    made: Path, root: Path, verify: Verify, caplog: pytest.LogCaptureFixture
) -> None:
    data, said = str(root / "dataset"), []

    def fan_out(make_worker: Any, tasks: Any) -> Any:  # any: as aecore.artifact.fanout.FanOut
        worker = make_worker()
        for task in tasks:
            yield worker(task)()
            said.append(verify(root / "dataset", code=0))

    images = shutil.copytree(made / "images-0", root.parent / "images")
    shard(root, image_folder(images, "train", range(90, 120)), fan_out=fan_out)
    assert len(said) > 1 and "are of an attempt that was not committed (shards/train-g000002-000000" in caplog.text
    assert verify(root / "dataset", "--read-data", code=0).startswith("ok")
    caplog.clear()
    assert verify_dataset(open_dataset(data, 1)).ok and caplog.text == "", "files of newer generations are named"


@pytest.mark.parametrize("stage", ["run", "table", "dataset"])
def test_what_is_unfinished_is_not_complete(root: Path, stage: str, verify: Verify, at: At) -> None:
    shutil.rmtree(root / stage / "model", ignore_errors=True)
    for path in (root / stage).glob(f"{stage}.*"):
        if stage != "run":
            path.unlink()
    place = at(root)
    text = f"{place}/{stage} is an unfinished {stage}: run the command that wrote it again to finish it"
    assert text in verify(f"{place}/{stage}") and text in verify(place)
    assert show(f"{place}/{stage}")["kind"] == "unfinished" or stage == "run"


def strays(root: Path) -> list[str]:
    """Write files of somebody else beside and inside the artefacts of a root; return those inside the dataset."""
    inside = ["notes.txt", "shards/photos-000000.tar", "records/train-000000.json.bak", ".tmp/work"]
    for name in ("ds/x", "notes.txt", *(f"dataset/{name}" for name in inside)):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("mine")
    return inside


def test_what_stands_beside_the_artefacts_of_a_root_is_named(root: Path, verify: Verify, at: At) -> None:
    strays(root)
    for name in ("shards/photos-000000.tar", "records/train-000000.json.bak"):
        (root / "dataset" / name).unlink()
    assert "not_looked_at: [ds, notes.txt]" in verify(at(root), code=0)
    for stage in ("dataset", "run", "table"):
        shutil.rmtree(root / stage)
    assert "holds no dataset, run or table (it has: ds, notes.txt)" in verify(at(root))


def test_files_of_others_in_a_root_are_listed_and_stay(root: Path, at: At, capsys: pytest.CaptureFixture[str]) -> None:
    inside = strays(root)
    place = at(root)
    before = shown_without_urls(place, capsys)
    assert before == shown_without_urls(str(root), capsys), "show says the same everywhere"
    capsys.readouterr()
    assert aepipe(["gc", place, "--older-than", "0s", "--unfinished", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["files"], report["not_ours"]) == (0, ["ds", "notes.txt"])
    assert set(report["stages"]["dataset"]["not_ours"]) == set(inside)
    store = open_store(place)
    assert all(store.read(f"dataset/{name}") == b"mine" for name in inside)
    assert shown_without_urls(place, capsys) == before


def shown_without_urls(place: str, capsys: pytest.CaptureFixture[str]) -> object:
    capsys.readouterr()
    assert aepipe(["show", place, "--json"]) == 0
    return json.loads(capsys.readouterr().out.replace(place, "ROOT"))


def test_what_a_root_lacks_is_seen_wherever_it_is(root: Path, made: Path, verify: Verify, at: At) -> None:
    replace(root, "run", made / "two")
    assert "the table was made by another run (run_sha256" in verify(at(root))
    (next((root / "dataset/shards").glob("*.tar"))).unlink()
    assert "is missing" in verify(at(root / "dataset"))


def test_a_slice_that_was_read_is_not_said_to_be_unread(root: Path, verify: Verify) -> None:
    for stage in ("dataset", "table"):
        report = json.loads(verify(root / stage, "--read-data-subset", "1/1", "--json", code=0))
        assert "read_data" not in report and report["slice"] == "1/1" and report["parts_read"] == report["parts"]
