"""All commands agree on what is located at a URL: every kind of artefact, finished or not, with every verb that reads one."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aecore.artifact.kinds import KINDS, detect_artifact
from aecore.checkpoint.weights import load_model
from aecore.data.dataset import open_dataset
from aecore.errors import AecoreError, DataError
from aecore.store import open_store
from aecore.table.table import open_table
from pipelines.cli.main import main
from tests.documents import rewrite

HERE = "cluster.num_workers=0"
TINY = ("model.latent_dim=2", "backbone.hidden=[8]", "train.max_steps=2", "train.global_batch=16", HERE)
# what is located there -> its kind
PLACES = {
    "root": "root",
    "root/dataset": "dataset",
    "root/table": "table",
    "root/run": "run",
    "root/run/model": "checkpoint",
    "checkpoint of a step": "checkpoint",
    "damaged checkpoint": "checkpoint",
    "unfinished dataset": "dataset",
    "unfinished table": "table",
    "unfinished run": "run",
    "second claim": "dataset",
    "samples": "samples",
    "decoded": "decoded",
    "figures": "figures",
}
DAMAGED = {"damaged checkpoint"}
UNFINISHED = {place for place in PLACES if place.startswith("unfinished")} | {"second claim"}
OPEN: dict[str, Callable[[str], Any]] = {"dataset": open_dataset, "table": open_table, "run": load_model}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give one folder with an artefact of each kind; tests only read them."""
    top = tmp_path_factory.mktemp("places")
    data, run, table = (str(top / "root" / name) for name in ("dataset", "run", "table"))
    assert main(["shard", "sprites", data, "source.num_samples=60", "splits.by=hash", "splits.test=0.2", HERE]) == 0
    assert main(["train", f"data={data}", f"out={run}", *TINY]) == 0
    assert main(["encode", run, data, table, HERE]) == 0
    assert main(["sample", run, str(top / "samples"), "num=2"]) == 0
    assert main(["decode", run, table, str(top / "decoded")]) == 0
    (top / "figures").mkdir()
    (top / "figures/figures.json").write_text('{"files":[],"identity":{},"left_out":{}}')
    (step,) = (top / "root/run/checkpoints").iterdir()
    shutil.copytree(step, top / "checkpoint of a step")
    shutil.copytree(step, top / "damaged checkpoint", ignore=shutil.ignore_patterns("model.safetensors"))
    for kind in ("dataset", "table", "run"):
        shutil.copytree(top / "root" / kind, top / f"unfinished {kind}", ignore=shutil.ignore_patterns("model", "dataset.*", "table.*"))
    shutil.copytree(top / "unfinished dataset", top / "second claim")
    (top / "second claim/run.000001.json").rename(top / "second claim/run.000002.json")
    rewrite(top / "second claim/run.000002.json", claim=2)
    return top


def run_verb(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = main([*argv, "--json"])
    output = capsys.readouterr()
    return code, json.loads(output.out or output.err)


def test_every_kind_is_tried_here() -> None:
    assert set(PLACES.values()) == set(KINDS)


@pytest.mark.parametrize("place", PLACES)
def test_the_detector_knows_every_kind_finished_or_not(places: Path, place: str) -> None:
    found = detect_artifact(open_store(places / place))
    assert found is not None
    assert found.kind == PLACES[place]
    assert found.is_unfinished == (place in UNFINISHED and found.kind != "run")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("verb", ["show", "verify", "gc", "compare"])
def test_every_verb_works_on_the_kind_that_the_detector_found_or_names_it(
    places: Path, place: str, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    url, kind = str(places / place), PLACES[place]
    found = detect_artifact(open_store(url))
    assert found is not None
    code, answer = run_verb(capsys, verb, url, *([url] if verb == "compare" else ["--dry-run"] if verb == "gc" else []))
    if code == 0:
        shown = answer.get("of") if verb == "show" and found.is_unfinished else answer["kind"]
        assert (shown, answer["url"] if verb != "compare" else answer["a"]) == (kind, url)
        return
    assert code == 3
    message = str(answer["message"])
    assert url in message and "holds no" not in message
    if place in DAMAGED:
        assert "missing" in message or found.name in message
    elif place in UNFINISHED:
        assert "unfinished" in message or "not finished" in message
    else:
        assert found.name in message


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("wanted", OPEN)
def test_what_another_kind_was_asked_for_is_named(places: Path, place: str, wanted: str) -> None:
    url, kind = str(places / place), PLACES[place]
    if kind == wanted or (wanted == "run" and kind == "checkpoint"):
        return
    if (kind, wanted) == ("root", "table"):
        assert open_table(url).url == f"{url}/table"
        return
    with pytest.raises(DataError) as refusal:
        OPEN[wanted](url)
    found = detect_artifact(open_store(url))
    assert found is not None and f"{url} is {found.name}, expected" in str(refusal.value)


@pytest.mark.parametrize("place", ["root/run/model", "checkpoint of a step"])
def test_show_and_verify_of_a_checkpoint_say_its_step_hash_and_model(places: Path, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    url = str(places / place)
    _, shown = run_verb(capsys, "show", url)
    assert (shown["kind"], shown["step"], shown["config"]["model"]["latent_dim"]) == ("checkpoint", 2, 2)
    assert shown["checkpoint_sha256"] == load_model(url).sha256
    code, verified = run_verb(capsys, "verify", url)
    assert (code, verified["files"]) == (0, len(shown["files"]))


def test_verify_of_a_checkpoint_finds_a_flipped_bit(places: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = shutil.copytree(places / "root/run/model", tmp_path / "model")
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    code, answer = run_verb(capsys, "verify", str(copy))
    assert code == 3 and "model.safetensors is damaged" in answer["message"]


@pytest.mark.parametrize("verb", ["show", "verify", "gc", "compare"])
def test_a_damaged_claim_is_named_by_every_verb(places: Path, tmp_path: Path, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    copy = shutil.copytree(places / "unfinished dataset", tmp_path / "copy")
    (copy / "run.000001.json").write_text("{")
    code, answer = run_verb(capsys, verb, str(copy), *([str(copy)] if verb == "compare" else []))
    assert code == 3 and f"{copy}/run.000001.json is damaged" in answer["message"]


def test_a_root_with_a_json_file_of_its_user_is_still_collected(places: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = shutil.copytree(places / "root", tmp_path / "root")
    (copy / "notes.json").write_text("{}")
    code, answer = run_verb(capsys, "gc", str(copy), "--dry-run")
    assert (code, answer["kind"], answer["not_ours"]) == (0, "root", ["notes.json"])


def test_nothing_of_ours_is_nothing(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"x")
    assert detect_artifact(open_store(tmp_path)) is None
    assert detect_artifact(open_store(tmp_path / "missing")) is None
    with pytest.raises(AecoreError, match="holds no dataset"):
        open_dataset(str(tmp_path))
