"""The commonest mistakes on the command line: each ends with its exit code and a message that says what to do."""

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from aecore.store import open_store, resolve_url
from pipelines.cli.main import main
from tests.documents import content, rewrite

HERE = "cluster.num_workers=0"
SPRITES = ("source.num_samples=60", "splits.by=hash", "splits.test=0.2", HERE)
TINY = ("model.latent_dim=2", "backbone.hidden=[8]", "train.epochs=1", "train.global_batch=16", HERE)


def refused(capsys: pytest.CaptureFixture[str], *argv: str, code: int) -> str:
    """Run a verb that has to fail; return what it says."""
    capsys.readouterr()
    got = main(argv)
    error = capsys.readouterr().err
    assert got == code, error
    assert "Traceback" not in error
    assert len([line for line in error.splitlines() if line.startswith("aepipe: ")]) == 1
    return error


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a root with dataset, run and table."""
    root = tmp_path_factory.mktemp("root")
    data, run, table = (str(root / name) for name in ("dataset", "run", "table"))
    assert main(["shard", "sprites", data, *SPRITES]) == 0
    assert main(["train", f"data={data}", f"out={run}", *TINY]) == 0
    assert main(["encode", run, data, table, HERE]) == 0
    return root


def test_an_unknown_recipe_names_the_nearest_one_and_all_shipped_ones(capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, "run", "sprite_vae", "out=./x", code=2)
    assert "no recipe 'sprite_vae': neither a file nor a shipped recipe (did you mean 'sprites_vae'? known: " in error
    assert all(name in error for name in ("cifar_ae", "demo", "mnist_vae", "sprites_vae"))


def test_a_misspelled_key_names_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown key 'optim.learning_rate'" in refused(capsys, "train", "demo", "data=x", "out=y", "optim.learning_rate=1", code=2)
    assert "unknown key 'epochs': did you mean train.epochs?" in refused(capsys, "train", "demo", "data=x", "out=y", "epochs=1", code=2)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        (
            "s3:/bucket/x",
            "'s3:/bucket/x' is neither a URL nor a likely path: did you mean s3://bucket/x? (a folder of that name is written ./",
        ),
        ("s3//bucket/x", "did you mean s3://bucket/x?"),
        ("s3:bucket/x", "did you mean s3://bucket/x?"),
        ("s3:///bucket/x", "did you mean s3://bucket/x?"),
        ("file//data/x", "did you mean file:///data/x?"),
        ("FILE:///data/x", "did you mean file:///data/x?"),
        ("File:/data/x", "did you mean file:///data/x?"),
        ("file:data/x", "did you mean ./data/x?"),
        ("gs://bucket/x", "AWS_ENDPOINT_URL=https://storage.googleapis.com with an HMAC key, write s3://bucket/x"),
        ("gs:/bucket/x", "did you mean gs://bucket/x?"),
        ("https://minio.example:9000/bucket/x", "set AWS_ENDPOINT_URL=https://minio.example:9000 and write s3://bucket/prefix"),
        ("S3://bucket/x", "has the scheme 'S3'"),
        ("s4://bucket/x", "write file:///path or s3://bucket/prefix (did you mean 's3'? known: file, s3)"),
        ("s3a://bucket/x", "write s3://bucket/x"),
    ],
)
def test_an_address_with_a_slip_is_refused_and_makes_no_folder(
    url: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for argv in (["shard", "sprites", url, *SPRITES], ["show", url], ["gc", url], ["train", "demo", "data=./x", f"out={url}", HERE]):
        assert expected in refused(capsys, *argv, code=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["http://host/x", "gs://bucket/x", "file:///%00", "s3://bucket/../x"])
def test_an_address_in_an_artefact_that_no_store_opens_is_damage_and_no_mistake_of_the_caller(
    url: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tars, adopted = tmp_path / "tars", str(tmp_path / "adopted")
    shutil.copytree(root / "dataset" / "shards", tars, ignore=shutil.ignore_patterns("*.parquet"))
    assert main(["adopt", str(tars), adopted, HERE]) == 0
    manifest = tmp_path / "adopted/dataset.000001.json"
    rewrite(manifest, shards=[{**shard, "home": url} for shard in content(manifest)["shards"]])
    for argv in (["show", adopted], ["verify", adopted], ["verify", adopted, "--read-data"]):
        assert f"`home` in the manifest of {adopted}" in refused(capsys, *argv, code=3)
    table = shutil.copytree(root / "table", tmp_path / "table")
    for name in ("dataset", "checkpoint"):
        lineage = content(root / "table/table.000001.json")["lineage"]
        rewrite(table / "table.000001.json", lineage={**lineage, name: {**lineage[name], "url": url}})
        assert f"the {name} in the lineage of {table}" in refused(capsys, "verify", str(table), code=3)


@pytest.mark.parametrize("verb", [["list", "models"], ["shard", "sprites", "./x"], ["doctor"], ["show", "./x"]])
@pytest.mark.parametrize(("name", "text"), [("AECORE_FAULT", "bogus"), ("AECORE_NATIVE", "maybe"), ("AECORE_CACHE_BYTES", "banana")])
def test_a_wrong_value_of_an_environment_variable_is_refused_by_every_verb(
    name: str, text: str, verb: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, text)
    assert f"{name} is {text!r}, expected " in refused(capsys, *verb, code=2)


def test_the_folders_below_the_root_of_the_disk_are_named_with_one_slash(tmp_path: Path) -> None:
    assert open_store("//run").url == "/run"
    assert [resolve_url("/", name) for name in (".", "/x")] == ["/", "/x"]


def test_a_secret_in_a_wrong_address_is_not_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    for url in ("s3:/key:hunter2@bucket/x", "https://key:hunter2@host/x", "gs://key:hunter2@bucket/x"):
        assert "hunter2" not in refused(capsys, "show", url, code=2)


def test_a_folder_with_a_strange_name_is_still_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["shard", "sprites", "./s3:/x", *SPRITES]) == 0
    assert (tmp_path / "s3:/x/dataset.000001.json").exists()


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (
            ["train", "data={root}/table", "out={tmp}/r", *TINY],
            "{root}/table is a latent table, expected a dataset: give another address; look at it with `aepipe show",
        ),
        (
            ["train", "data={root}/run", "out={tmp}/r", *TINY],
            "{root}/run is a training run, expected a dataset: give another address; it is RUN of `aepipe encode",
        ),
        (["train", "data={root}", "out={tmp}/r", *TINY], "{root} is the root of a pipeline, expected a dataset: give {root}/dataset"),
        (
            ["encode", "{root}/dataset", "{root}/dataset", "{tmp}/t", HERE],
            "{root}/dataset is a dataset, expected a training run: give another address; train on it",
        ),
        (
            ["encode", "{root}/dataset", "{root}/run", "{tmp}/t", HERE],
            "{root}/run is a training run, expected a dataset: give another address; it is RUN of",
        ),
        (
            ["encode", "{root}", "{root}/dataset", "{tmp}/t", HERE],
            "{root} is the root of a pipeline, expected a training run: give {root}/run",
        ),
        (["evaluate", "{root}/table", "{root}/dataset", HERE], "{root}/table is a latent table, expected a training run"),
        (["verify", "{root}/table", "--dataset", "{root}/run"], "{root}/run is a training run, expected a dataset"),
        (["encode", "{root}/run", "{root}/run/model", "{tmp}/t", HERE], "model is the checkpoint of a model, expected a dataset"),
    ],
)
def test_another_kind_of_artefact_is_named_with_the_verb_to_use(
    argv: list[str], expected: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def filled(text: str) -> str:
        return text.replace("{root}", str(root)).replace("{tmp}", str(tmp_path))

    assert filled(expected) in refused(capsys, *map(filled, argv), code=3)


def test_an_output_that_holds_another_kind_is_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["encode", str(root / "run"), str(root / "dataset"), str(root / "dataset"), HERE]
    assert "holds a dataset, not a table: write the table to another URL" in refused(capsys, *argv, code=2)


def test_gpus_where_there_are_none(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    error = "cluster.use_gpu=true, and torch sees no GPU here: set cluster.use_gpu=false, or install the CUDA build of torch"
    data, run = str(root / "dataset"), str(root / "run")
    for argv in (
        ["train", f"data={data}", f"out={tmp_path}/run", *TINY, "cluster.use_gpu=true"],
        ["encode", run, data, str(tmp_path / "table"), HERE, "cluster.use_gpu=true"],
        ["evaluate", run, data, HERE, "cluster.use_gpu=true"],
    ):
        assert error in refused(capsys, *argv, code=2)


@pytest.fixture
def silent_server() -> Iterator[int]:
    """A port that takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(8)
        yield server.getsockname()[1]


def test_a_prefect_server_that_never_answers_ends_in_bounded_time(
    silent_server: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{silent_server}/api")
    assert "no Prefect server answers at PREFECT_API_URL" in refused(capsys, "shard", "sprites", str(tmp_path / "out"), *SPRITES, code=5)


def test_a_ray_cluster_that_is_not_there_ends_in_bounded_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray

    if ray.is_initialized():
        pytest.skip("this process is connected to a Ray already, which is used then")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    error = refused(capsys, "shard", "sprites", str(tmp_path / "out"), *SPRITES[:-1], "cluster.num_workers=1", code=5)
    assert "cannot reach the Ray cluster at RAY_ADDRESS=127.0.0.1:1: nothing answers at 127.0.0.1:1" in error
    assert "unset RAY_ADDRESS to start one here, or set cluster.num_workers=0" in error


@pytest.mark.parametrize(
    ("nodes", "need", "room", "expected"),
    [
        ([{"CPU": 2.0}], {"CPU": 1.0, "GPU": 1.0}, 0, "no node has a GPU: set cluster.use_gpu=false, or connect to a cluster with GPUs"),
        ([{"CPU": 2.0}], {"CPU": 1.0, "TPU": 1.0}, 0, "no node has TPU: correct cluster.resources_per_worker"),
        ([{"CPU": 2.0}], {"CPU": 1.0}, 2, "set cluster.num_workers=2 or less, or fewer resources"),
        ([{"CPU": 2.0}], {"CPU": 4.0}, 0, "ask for fewer resources for each"),
        ([{"CPU": 2.0, "GPU": 1.0}], {"CPU": 1.0, "GPU": 1.0}, 1, "set cluster.num_workers=1 or less, .* or cluster.use_gpu=false"),
    ],
)
def test_a_cluster_that_is_too_small_says_what_would_fit(nodes, need, room, expected) -> None:  # type: ignore[no-untyped-def]
    import re

    from pipelines.cluster.session import _suggest_fit

    assert re.search(expected, _suggest_fit(nodes, need, room))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 300 kB, where this user may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(place)], capture_output=True).returncode
    ):
        pytest.skip("mounting a small disk needs the right to mount")
    try:
        yield place
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(place)], check=False)
        subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_says_so_and_the_same_command_finishes_when_there_is_space(
    small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["shard", "sprites", str(small_disk / "out"), "source.num_samples=600", "shards.max_samples=60", *SPRITES[1:]]
    error = refused(capsys, *argv, code=4)
    assert "No space left on device" in error
    assert "what is finished is kept: free space there, then run the same command again" in error
    assert "; `aepipe gc URL` finds what killed runs left" in error
    subprocess.run(["mount", "-o", "remount,size=30m", str(small_disk)], check=True)
    assert main(argv) == 0
    assert main(["verify", str(small_disk / "out"), "--read-data"]) == 0


def test_a_read_only_disk_says_so(small_disk: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    out = str(small_disk / "out")
    for argv in (
        ["shard", "sprites", out, *SPRITES],
        ["train", f"data={root}/dataset", f"out={out}", *TINY],
        ["encode", str(root / "run"), str(root / "dataset"), out, HERE],
    ):
        assert "Read-only file system; it is mounted read-only: write to another URL" in refused(capsys, *argv, code=4)
