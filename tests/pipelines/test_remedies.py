"""What a new user met: messages of the command line that say what is there, and the value or the verb that works."""

import io
import json
import logging
import os
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aecore.data.dataset import open_dataset
from aecore.store import absolute_url
from pipelines.cli.main import main

HERE = "cluster.num_workers=0"
TINY = ("model.latent_dim=2", "backbone.hidden=[8]", "train.max_steps=1", "train.global_batch=16", HERE)


def png(number: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((8, 8), number, np.uint8)).save(out, "PNG")
    return out.getvalue()


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def labelled(start: int, count: int = 4) -> dict[str, bytes]:
    numbers = range(start, start + count)
    fields = {f"{number:03}.json": json.dumps({"ann": {"class": "cat", "box": [1]}, "id": number}).encode() for number in numbers}
    return {f"{number:03}.png": png(number) for number in numbers} | fields


def error_of(capsys: pytest.CaptureFixture[str], *argv: str, code: int) -> str:
    capsys.readouterr()
    assert main(argv) == code
    return capsys.readouterr().err.partition("aepipe: ")[2]


@pytest.mark.parametrize(
    ("bad", "known", "share"), [(["a"], 7, 0.125), (["a", "b"], 1, 0.667), ([*"abc"], 0, None)], ids=["one", "most", "all"]
)
def test_too_many_bad_samples_name_the_share_that_accepts_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: list[str], known: int, share: float | None
) -> None:
    (tmp_path / "in").mkdir()
    for name in bad:
        (tmp_path / f"in/{name}.png").write_bytes(png(1)[:40])
    for number in range(known):
        (tmp_path / f"in/{number}.png").write_bytes(png(number))
    argv = ["shard", str(tmp_path / "in"), str(tmp_path / "out"), HERE]
    error = error_of(capsys, *argv, code=3)
    assert (f"shards.max_bad={share:g} or more" if share else "put them right") in error
    if share is None:
        (tmp_path / "in/good.png").write_bytes(png(9))
        assert main([*argv, "shards.max_bad=1"]) == 0
        (tmp_path / "in/z.png").write_bytes(png(1)[:40])
        named = re.search(r"shards.max_bad=([\d.]+) or more", error_of(capsys, *argv, code=3))
        share = float(named[1]) if named else 0.0  # of the whole source, which the dataset follows
    assert main([*argv, f"shards.max_bad={share:g}"]) == 0


def test_a_misspelt_path_in_json_names_the_paths_that_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tar_of(tmp_path / "in/a.tar", labelled(0))
    argv = ["shard", str(tmp_path / "in"), str(tmp_path / "out"), HERE]
    error = error_of(capsys, *argv, "source.label=json:ann.klass", code=3)
    assert "has the field 'ann.klass' (did you mean 'ann.class'? known: ann.box.0, ann.class, id)" in error
    assert main([*argv, "source.label=json:ann.class"]) == 0
    assert open_dataset(str(tmp_path / "out")).manifest.classes == ("cat",)


def test_the_message_of_a_broken_tar_is_printed_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = tar_of(tmp_path / "in/a.tar", labelled(0, 8)).read_bytes()
    (tmp_path / "in/a.tar").write_bytes(whole[: len(whole) // 2 + 100])
    argv = ["shard", str(tmp_path / "in"), str(tmp_path / "out"), HERE]
    for options in ([], ["source.bad_tars=skip"]):
        error = error_of(capsys, *argv, *options, code=3)
        assert error.count("is truncated: it ends at byte") == 1
    assert " more: broken_tar: " in error


def test_the_log_says_that_names_of_tars_are_the_splits_and_an_index_leaves_no_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    tars = tar_of(tmp_path / "in/train-00000.tar", labelled(0)).parent
    assert main(["adopt", str(tars), str(tars), HERE]) == 0
    assert "splits.by=auto chose folders: the names of the files say the split" in caplog.text
    assert not (tars / ".tmp").exists()
    tar_of(tars / "train-00001.tar", labelled(4))
    assert main(["adopt", str(tars), str(tars), HERE]) == 0
    assert not (tars / ".tmp").exists()
    assert main(["verify", str(tars), "--read-data"]) == 0


def test_a_link_to_nothing_is_no_small_file(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(3):
        (tmp_path / f"in/{number}.png").write_bytes(png(number))
    (tmp_path / "in/empty.png").write_bytes(b"")
    os.symlink("gone.png", tmp_path / "in/dead.png")
    argv = ["shard", str(tmp_path / "in"), str(tmp_path / "out"), "source.follow_links=true", "source.min_size=20", "shards.max_bad=0.5"]
    assert main([*argv, HERE]) == 0
    manifest = open_dataset(str(tmp_path / "out")).manifest
    assert dict(manifest.reasons) == {"broken_link": 1} and manifest.num_samples("train") == 3


@pytest.mark.parametrize(
    "argv",
    [
        ["train", "demo", "data={none}", "out={new}", HERE],
        ["encode", "{none}", "{data}", "{new}", HERE],
        ["decode", "{none}", "{none}", "{new}", HERE],
        ["adopt", "{tars}", "{new}", "shards.resize=4", HERE],
        ["train", "demo", "data={tars}", "out={new}", "input.reader=webdataset", "train.max_steps=1", "train.val_split=val", HERE],
    ],
)
def test_what_is_missing_names_verbs_and_no_function(tmp_path: Path, argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    tars = tar_of(tmp_path / "tars/a.tar", labelled(0)).parent
    assert main(["shard", str(tars), str(tmp_path / "data"), HERE]) == 0
    places = {"none": tmp_path / "none", "new": tmp_path / "new", "data": tmp_path / "data", "tars": tars}
    capsys.readouterr()
    assert main([word.format_map(places) for word in argv]) in (2, 3)
    error = capsys.readouterr().err
    assert "; " in error and "`aepipe " in error
    assert "aecore." not in error and "shard_dataset" not in error and "adopt_shards" not in error


@pytest.mark.parametrize(("argv", "near"), [(["shrad", "x", "y"], "shard"), (["encod"], "encode"), (["list", "modls"], "models")])
def test_a_misspelt_verb_names_the_nearest(argv: list[str], near: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"did you mean {near}?" in error_of(capsys, *argv, code=2)


def test_addresses_are_printed_without_the_dots_of_a_relative_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    assert absolute_url(f"{tmp_path}/a/../none") == f"{tmp_path}/none"
    assert absolute_url(f"{tmp_path}/a/b/../..") == str(tmp_path)
    assert f"{tmp_path}/none holds no dataset" in error_of(capsys, "show", f"{tmp_path}/a/../none", code=3)
    os.symlink(tmp_path / "a/b", tmp_path / "link")
    assert absolute_url(f"{tmp_path}/link/../x") == f"{tmp_path}/link/../x", "which is a/x, and no x"


def test_signed_numbers_say_what_works_and_a_large_loss_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    values = np.random.default_rng(0).integers(-30_000, 30_000, (16, 8, 8, 1)).astype(np.int16)
    for name, saved in (("int16", values), ("float", values.astype("float32") / 32768), ("small", values % 2)):
        np.save(tmp_path / f"{name}.npy", saved)
        assert main(["shard", str(tmp_path / f"{name}.npy"), str(tmp_path / name), HERE]) == 0
    train = {
        name: ["train", f"data={tmp_path / name}", f"out={tmp_path}/{name}-run", "model.likelihood=gaussian", *TINY]
        for name in ("int16", "float", "small")
    }
    error = error_of(capsys, *train["int16"], code=3)
    assert "int16 samples have no known range for transform.scale=unit: use transform.scale=none" in error
    assert "array.astype('float32') / largest" in error
    for name, scale, is_large in (("int16", "none", True), ("float", "unit", False), ("small", "none", False)):
        caplog.clear()
        assert main([*train[name], f"transform.scale={scale}"]) == 0
        assert ("the loss begins at" in caplog.text) == is_large
