"""Settings that do nothing, or lose something, are told in one line of the log or refused with the reason."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.cli.main import main

HERE = "cluster.num_workers=0"
TINY = ("model.latent_dim=2", "backbone.hidden=[8]", "train.max_steps=1", "train.global_batch=16", HERE)
Run = Callable[..., list[str]]


@pytest.fixture
def run(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> Run:
    """Give a function that runs a verb and returns what it logs as a warning."""

    def call(*argv: str) -> list[str]:
        caplog.clear()
        assert main([*argv, HERE]) == 0, capsys.readouterr().err
        return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]

    caplog.set_level(logging.INFO)
    return call


def images(root: Path, mode: str, count: int = 16, values: int = 256) -> str:
    rng = np.random.default_rng(0)
    root.mkdir(parents=True)
    for number in range(count):
        shape = (8, 8) if mode in ("L", "I;16") else (8, 8, len(mode))
        Image.fromarray(rng.integers(0, values, shape).astype(np.uint16 if mode == "I;16" else np.uint8)).save(root / f"{number:02}.png")
    return str(root)


def test_a_background_that_no_image_is_composed_over_is_told(tmp_path: Path, run: Run) -> None:
    source = images(tmp_path / "in", "RGBA")
    told = run("shard", source, str(tmp_path / "kept"), "shards.background=#808080")
    assert [line for line in told if "shards.background=#808080 changes nothing: without shards.resize, shards.mode" in line]
    for options in (["shards.mode=RGB"], ["shards.resize=4"]):
        assert not run("shard", source, str(tmp_path / options[0]), "shards.background=#808080", *options)
    assert not run("shard", source, str(tmp_path / "default"))


def test_a_background_under_alpha_that_the_model_takes_is_told(tmp_path: Path, run: Run) -> None:
    for mode, options, is_told in (("RGBA", [], True), ("RGBA", ["shards.mode=RGB"], False), ("RGB", [], False)):
        root = tmp_path / f"{mode}{len(options)}"
        run("shard", images(root / "in", mode), str(root / "data"), *options)
        told = run("train", f"data={root}/data", f"out={root}/run", "transform.background=grey", *TINY)
        found = [line for line in told if line.startswith("transform.background=grey changes nothing: the model takes 4 channels")]
        assert len(found) == is_told and all("shards.mode=RGB (or L) and shards.background=grey" in line for line in found)


def test_what_a_run_fixes_is_refused_where_the_run_is_used_and_show_has_its_shape(
    tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = str(tmp_path / "data"), str(tmp_path / "run")
    run("shard", images(tmp_path / "in", "RGB"), data)
    run("train", f"data={data}", f"out={out}", *TINY)
    capsys.readouterr()
    assert main(["show", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["input_shape"] == [3, 8, 8]
    table = str(tmp_path / "table")
    for argv in (["encode", out, data, table], ["evaluate", out, data], ["sample", out, table], ["decode", out, table, table]):
        for option in ("transform.background=grey", "model.beta=2", "backbone={kind: mlp}"):
            assert main([*argv, option, HERE]) == 2
            text = capsys.readouterr().err
            assert f"takes model, backbone and transform of the run as it was trained, so '{option}' would change nothing" in text
    assert not (tmp_path / "table").exists()


@pytest.mark.parametrize(("largest", "share"), [(4096, None), (4100, None), (8192, 0.5)])
def test_values_outside_of_the_range_are_counted_and_told(tmp_path: Path, run: Run, largest: int, share: float | None) -> None:
    source = images(tmp_path / "in", "I;16", values=largest)
    stored = np.stack([np.asarray(Image.open(path)) for path in sorted((tmp_path / "in").glob("*.png"))])
    cut, is_lost = int((stored > 4095).sum()), (stored > 4095).mean() > 0.01
    assert is_lost == (share is not None)
    told = run("shard", source, str(tmp_path / "out"), "shards.value_range=[0, 4095]", "shards.max_samples=5")
    details = [json.loads(path.read_text())["detail"]["value_range"] for path in (tmp_path / "out/records").glob("*.json")]
    assert sum(detail["values"] for detail in details) == stored.size and sum(detail["images"] for detail in details) == 16
    assert sum(detail.get("cut", 0) for detail in details) == cut
    found = [line for line in told if f"cut off {cut / stored.size:.1%} of the values of 16 images" in line]
    assert len(found) == is_lost
    assert main(["verify", str(tmp_path / "out"), "--read-data"]) == 0


def test_a_range_of_images_that_have_one_is_told(tmp_path: Path, run: Run) -> None:
    told = run("shard", images(tmp_path / "in", "L"), str(tmp_path / "out"), "shards.value_range=[0, 4095]")
    assert [line for line in told if "shards.value_range=[0,4095] changed nothing: all images have 8 bits" in line]


def test_a_split_that_stays_empty_is_told(tmp_path: Path, run: Run) -> None:
    source = images(tmp_path / "in", "L", count=3)
    asked = ["splits.val=0.01", "splits.test=0.5"]
    told = run("shard", source, str(tmp_path / "out"), *asked, "--dry-run")
    assert told == run("shard", source, str(tmp_path / "out"), *asked)
    assert [line for line in told if "no sample is in the split val, which splits.val=0.01 asks for" in line]
    assert not [line for line in told if "in the split train" in line]
