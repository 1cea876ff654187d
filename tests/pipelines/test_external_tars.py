"""Other people's data through the command line: SRC says its kind, adopted tars go all the way, tars without an index are trained on."""

import copy
import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from aecore.data.read.loader import InputSpec
from aecore.data.sources.folder import FolderSpec
from aecore.errors import ConfigError
from aecore.registry import SOURCES
from aecore.training.job import TrainSpec, require_streamable
from pipelines.cli.main import main
from pipelines.recipe.recipe import load_recipe
from pipelines.steps.pipeline import stage
from pipelines.steps.steps import train_job_of
from tests.aecore.data.test_external_tars import samples, two_tars, write_tar
from tests.aecore.data.tiny import encoded, image
from tests.pipelines.test_cli import HERE, printed

SMALL = ("model.latent_dim=2", "backbone.hidden=[8]", "train.global_batch=16")


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    return two_tars(tmp_path / "theirs")


def test_the_kind_of_a_source_is_found_by_names(tmp_path: Path, tars: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "a.npz", images=np.stack([image(number) for number in range(6)]), labels=np.arange(6) % 2)
    (tmp_path / "arrays/train").mkdir(parents=True)
    np.save(tmp_path / "arrays/train/x.npy", np.stack([image(number) for number in range(6)]))
    kinds = {
        "a.npz": "arrays",
        "arrays": "arrays",
        "theirs": "webdataset",
        "theirs/00000.tar": "webdataset",
        "theirs/{00000..00001}.tar": "webdataset",
        "theirs/*.tar": "webdataset",
        f"theirs/00000.tar::{tars}/00001.tar": "webdataset",
    }
    for name, kind in kinds.items():
        shown = json.loads(printed(capsys, "shard", str(tmp_path / name), str(tmp_path / "out"), "--dry-run", "--json", HERE))
        assert shown["recipe"]["source"]["kind"] == kind
        explicit = json.loads(
            printed(capsys, "shard", str(tmp_path / name), str(tmp_path / "out"), f"source.kind={kind}", "--dry-run", "--json", HERE)
        )
        assert explicit["samples"] == shown["samples"]
    (tmp_path / "arrays/train/photo.png").write_bytes(encoded(image(0)))
    shown = json.loads(printed(capsys, "shard", str(tmp_path / "arrays"), str(tmp_path / "out"), "--dry-run", "--json", HERE))
    assert shown["recipe"]["source"]["kind"] == "folder"


def test_a_kind_may_be_said_twice_and_an_unknown_one_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed(capsys, "shard", "sprites", str(tmp_path / "out"), "source.kind=sprites", "--dry-run", HERE)
    printed(capsys, "shard", "arrays", str(tmp_path / "out"), f"source.url={tmp_path / 'a.npz'}", "--dry-run", HERE, code=3)
    assert "did you mean 'arrays'" in printed(
        capsys, "shard", str(tmp_path / "a.npz"), str(tmp_path / "out"), "source.kind=array", HERE, code=2
    )


def test_list_sources_shows_both(capsys: pytest.CaptureFixture[str]) -> None:
    parts = json.loads(printed(capsys, "list", "sources", "--json"))
    assert {"arrays", "webdataset"} <= parts.keys()
    assert "source.label" not in parts["webdataset"]["knobs"]
    assert "label" in parts["webdataset"]["knobs"]


def test_adopted_tars_are_trained_on_encoded_verified_and_shown(tmp_path: Path, tars: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tars / "test-00000.tar", samples(50, 10))
    (tars / "00000.tar").rename(tars / "train-00000.tar")
    (tars / "00001.tar").rename(tars / "train-00001.tar")
    data, run, table = (str(tmp_path / name) for name in ("dataset", "run", "table"))
    planned = json.loads(printed(capsys, "adopt", str(tars), data, "--dry-run", "--json", HERE))
    assert (planned["samples"], Path(data).exists()) == ({"train": 50, "test": 10}, False)
    assert "dataset " in printed(capsys, "adopt", str(tars), data, HERE)
    assert main(["train", f"data={data}", f"out={run}", *SMALL, "train.epochs=1", HERE]) == 0
    assert main(["encode", run, data, table, HERE]) == 0
    assert main(["evaluate", run, data]) == 0
    shown = json.loads(printed(capsys, "show", data, "--json"))
    assert (shown["samples"], shown["adopted_from"]) == ({"train": 50, "test": 10}, [str(tars)])
    for name in (data, run, table):
        assert printed(capsys, "verify", name, "--read-data").startswith("ok\n")
    assert json.loads(printed(capsys, "show", table, "--json"))["rows"] == 60
    whole = bytearray((tars / "train-00000.tar").read_bytes())
    whole[110] ^= 1
    (tars / "train-00000.tar").write_bytes(whole)
    assert "train-00000.tar is damaged" in printed(capsys, "verify", data, "--read-data", code=3)


def test_tars_without_an_index_are_trained_on(tmp_path: Path, tars: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("train", f"data={tars}", f"out={tmp_path / 'run'}", *SMALL, HERE)
    assert "aepipe adopt" in printed(capsys, *asked, code=3)
    assert "set train.max_steps" in printed(capsys, *asked, "input.reader=webdataset", code=2)
    streamed = (*asked, "input.reader=webdataset", "input.resampled=true", "train.max_steps=5")
    planned = json.loads(printed(capsys, *streamed, "--dry-run", "--json"))
    assert (planned["steps"], planned["input_shape"], planned["samples"]) == (5, [1, 4, 4], None)
    assert json.loads(printed(capsys, *streamed, "--json"))["steps"] == 5
    assert main(["adopt", str(tars), str(tmp_path / "data"), HERE]) == 0
    assert main(["encode", str(tmp_path / "run"), str(tmp_path / "data"), str(tmp_path / "table"), HERE]) == 0


def test_what_a_stream_advises_about_bad_samples_is_accepted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command that follows the message is run as it is, and its dataset is trained on."""
    grey, colour = (encoded(np.full(shape, 9, np.uint8), "JPEG") for shape in ((4, 4), (4, 4, 3)))
    files = [(f"{number:04d}.jpg", {7: grey, 33: colour[:200]}.get(number, colour)) for number in range(40)]
    tars, run = write_tar(tmp_path / "in/train-0.tar", files).parent, ("model.latent_dim=2", "backbone.hidden=[8]", HERE)
    streamed = ("train", f"data={tars}", *run, "input.reader=webdataset", "input.shuffle=0", "train.max_steps=8", "train.global_batch=16")
    said = printed(capsys, *streamed, f"out={tmp_path / 'stopped'}", code=3)
    share = re.search(r"Set input.max_bad=([\d.]+) to leave them out", said)
    command = re.search(r"`aepipe (shard SRC DATASET [^`]*)`", said)
    assert share is not None
    assert command is not None
    printed(capsys, *streamed, f"out={tmp_path / 'run'}", f"input.max_bad={share[1]}")
    places = {"SRC": str(tars), "DATASET": str(tmp_path / "data")}
    printed(capsys, *(places.get(word, word) for word in command[1].split()), "shards.mode=RGB", HERE)
    assert json.loads(printed(capsys, "show", str(tmp_path / "data"), "--json"))["samples"] == {"train": 39}
    printed(capsys, "train", f"data={tmp_path / 'data'}", f"out={tmp_path / 'indexed'}", *run, "train.epochs=1", "train.global_batch=16")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["source.include=x"], "source.include would have no effect: input.reader=webdataset reads every sample of data"),
        (["source.limit=3", "source.exclude=y"], "source.exclude, source.limit would have no effect"),
        (["source.kind=webdataset", "source.bad_tars=skip"], "source.bad_tars would have no effect"),
        (["source.kind=webdataset", "source.label=tar", "source.tars=1"], "source.label, source.tars would have no effect"),
        (["source.classes=[a,b]", "source.follow_links=true"], "source.classes, source.follow_links would have no effect"),
        (["source.extensions=[png]"], "(its own options are input.member, input.max_bad and input.max_pixels)"),
        (
            ["source.kind=webdataset", "source.max_inflated_bytes=9", "source.columns=[a]"],
            "source.columns, source.max_inflated_bytes would",
        ),
        (["source.kind=webdataset", "source.member=seg.png", "source.keys=shard"], "source.member, source.keys would have no effect"),
        (["source.kind=webdataset", "source.member=seg.png", "input.member=png"], "source.member would have no effect"),
        (["source.kind=arrays", "source.images=x"], "source.images would have no effect"),
        (["source.kind=sprites", "source.size=16"], "source.size would have no effect"),
        (
            ["source.bad_tars=skip"],
            "unknown key 'source.bad_tars' of source.kind=folder: it belongs to source.kind=webdataset; leave it out",
        ),
    ],
)
def test_what_a_stream_does_not_obey_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides, message) -> None:
    write_tar(tmp_path / "in/a.tar", samples(0, 40))
    options = ("input.reader=webdataset", "train.max_steps=2", "train.global_batch=16")
    assert main(["train", f"data={tmp_path / 'in'}", f"out={tmp_path / 'run'}", *SMALL, *options, *overrides]) == 2
    error = capsys.readouterr().err
    assert message in error and not (tmp_path / "run").exists()
    assert "unknown" in error or "`aepipe adopt SRC DATASET` makes an index" in error


@pytest.mark.parametrize(
    "overrides",
    [
        ["source.frames=first"],
        ["source.kind=webdataset", "source.bad_tars=refuse", "source.tars=2", "source.include=[]", "source.limit=null"],
        ["source.kind=webdataset", "source.url=/in", "source.label=cls", "source.member=seg.png", "input.member=seg.png"],
        [f"source.extensions={json.dumps(sorted(FolderSpec().extensions))}", "source.follow_links=false", "source.label=path"],
    ],
)
def test_what_a_stream_does_anyway_is_not_refused(overrides) -> None:
    train_job_of(load_recipe(None, ["data=/in", "out=/out", "input.reader=webdataset", "train.max_steps=2", *overrides]))


@pytest.mark.parametrize("kind", SOURCES.kinds())
def test_every_option_of_every_source_is_obeyed_by_a_stream_or_refused_by_name(kind: str) -> None:
    spec, stream = SOURCES.spec_type(kind)(), (TrainSpec(max_steps=2), InputSpec(reader="webdataset"))
    require_streamable(*stream, spec)
    for field in dataclasses.fields(spec):
        changed = copy.copy(spec)
        object.__setattr__(changed, field.name, "another value")
        if field.name in ("kind", "url"):
            require_streamable(*stream, changed)
        else:
            with pytest.raises(ConfigError, match=f"^source.{field.name} would have no effect"):
                require_streamable(*stream, changed)


def test_a_pipeline_applies_the_source_before_it_streams() -> None:
    recipe = load_recipe(None, ["source.url=/in", "source.limit=3", "out=/out", "input.reader=webdataset", "train.max_steps=2"])
    assert stage(recipe, "shard").tree["source"]["limit"] == 3
    train_job_of(stage(recipe, "train"))
