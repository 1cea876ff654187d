"""The command line on a dataset whose newest generation was withdrawn: nothing is made of it, step by step or as a pipeline."""

import os
from pathlib import Path

import pytest

from pipelines.cli.main import main
from pipelines.flows.server import temporary_server
from tests.pipelines.conftest import SMALL
from tests.processes import AEPIPE, run

HERE = "cluster.num_workers=0"
TRAINED = ("train.max_steps=2", "model.latent_dim=4", "backbone.hidden=[16]", "train.global_batch=32", HERE)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dataset, run and table as a pipeline has them; the dataset's only generation is withdrawn then."""
    root = tmp_path_factory.mktemp("withdrawn")
    assert main(["shard", "sprites", f"{root}/dataset", *SMALL, HERE]) == 0
    assert main(["train", "demo", f"data={root}/dataset", f"out={root}/run", *TRAINED]) == 0
    assert main(["encode", f"{root}/run", f"{root}/dataset", f"{root}/table", "--recipe", "demo", HERE]) == 0
    (root / "dataset/withdrawn.000001.json").write_bytes(b"{}")
    return root


def files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def test_no_step_reads_a_withdrawn_generation_or_makes_anything_of_it(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(root)
    for argv in (
        ["shard", "sprites", f"{root}/dataset", *SMALL, HERE],
        ["shard", "sprites", f"{root}/dataset", "--dry-run", *SMALL, HERE],
        ["train", "demo", f"data={root}/dataset", f"out={tmp_path}/run", *TRAINED],
        ["encode", f"{root}/run", f"{root}/dataset", f"{tmp_path}/table", HERE],
        ["encode", f"{root}/run", f"{root}/dataset", f"{root}/table", "--recipe", "demo", HERE],
        ["evaluate", f"{root}/run", f"{root}/dataset", HERE],
    ):
        assert main(argv) == 3, argv
        error = capsys.readouterr().err
        assert f"generation 1 of {root}/dataset was withdrawn (withdrawn.000001.json is there)" in error, argv
        assert ("write the source to another URL" in error) is (argv[0] == "shard")
    assert files(root) == before and not files(tmp_path)


@pytest.mark.prefect
@pytest.mark.slow
def test_a_pipeline_stops_at_a_withdrawn_generation_and_does_not_try_again(root: Path) -> None:
    before = files(root)
    with temporary_server() as server:
        done = run([*AEPIPE, "run", "demo", f"out={root}", *SMALL, *TRAINED], env=os.environ | server.settings)
    assert done.returncode == 3
    assert f"aepipe: generation 1 of {root}/dataset was withdrawn" in done.stderr and "write the source to another URL" in done.stderr
    assert "AwaitingRetry" not in done.stderr and "Traceback" not in done.stderr
    assert files(root) == before
