"""What a killed command left and a changed bit damaged is refused with its name and a remedy, and the remedy works."""

import fnmatch
import os
import re
import shlex
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.cli.main import main
from tests.aecore.encoding import image_folder, tree, undecodable_png
from tests.processes import AEPIPE, run
from tests.s3 import S3

RECIPE = """\
name: left
splits: {by: folders}
shards: {max_samples: 8, max_bad: 0.5}
model: {kind: vae, latent_dim: 4, likelihood: bernoulli}
backbone: {kind: mlp, hidden: [16]}
optim: {kind: adam, lr: 1e-3}
train: {epochs: 1, global_batch: 16}
encode: {batch: 8}
cluster: {num_workers: 0}
"""
TIMES = (".tmp", "records", "report")  # they hold seconds
GIVE_UP = re.compile("`(aepipe gc [^`]+)`")


class Place:
    """Images, of which one is found damaged by sharding and one by encoding, and the commands over them; training has others."""

    def __init__(self, base: Path) -> None:
        self.base, self.recipe = base, base / "recipe.yaml"
        self.recipe.write_text(RECIPE)
        image_folder(base / "clean", "train", range(20))
        self.images = image_folder(base / "images", "train", range(20))
        (self.images / "train/square/cut.png").write_bytes(b"no picture")
        (self.images / "train/square/bad.png").write_bytes(undecodable_png())

    def words(self, verb: str, out: Path | str) -> list[str]:
        last = [str(out), "--recipe", str(self.recipe)]
        if verb == "shard":
            return ["shard", str(self.images), *last]
        if verb == "train":
            return ["train", str(self.recipe), f"data={self.base}/learnt", f"out={out}"]
        return ["encode", f"{self.base}/run", f"{self.base}/dataset", *last]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    made = Place(tmp_path_factory.mktemp("left"))
    time.sleep(2.1)  # until files have states, which are the same whenever a command is run
    assert main(["shard", f"{made.base}/clean", f"{made.base}/learnt", "--recipe", str(made.recipe)]) == 0
    for verb, out in (("shard", "dataset"), ("train", "run"), ("encode", "table")):
        assert main(made.words(verb, made.base / out)) == 0
    return made


def content(verb: str, out: Path) -> dict[str, bytes]:
    """Return the files that are the same whenever and however often a command was run."""
    files = tree(out, without=TIMES)
    return {name: data for name, data in files.items() if name.startswith("model/")} if verb == "train" else files


def killed(place: Place, verb: str, point: str, out: Path | str) -> list[str]:
    """Run a command that is killed at a point; return its words."""
    words = place.words(verb, out)
    assert run([*AEPIPE, *words], env={**os.environ, "AECORE_FAULT": point}).returncode == -signal.SIGKILL, point
    return words


def flipped(data: bytes, where: Callable[[bytes], int]) -> bytes:
    changed = bytearray(data)
    changed[where(data)] ^= 4
    return bytes(changed)


def middle(data: bytes) -> int:
    return len(data) // 2


def page(data: bytes) -> int:
    """Return a place in the first page of a Parquet file, behind its header: each bit there is covered by a checksum."""
    return 64


def footer(data: bytes) -> int:
    """Return where a Parquet file states what it was made of."""
    return max(data.rfind(b"tar_sha256"), data.rfind(b"checkpoint_sha256"))


def stage(data: bytes) -> int:
    """Return where a quarantine says which stage refused a row."""
    return data.find(b"decode")


def end(data: bytes) -> int:
    return len(data) - 1


LEFT = [  # verb, where it is killed, the file, where its bit changes, exit status
    ("shard", "tar.linked", "shards/*.tar", middle, 4),
    ("shard", "index.linked", "shards/*.parquet", page, 4),
    ("shard", "index.linked", "shards/*.parquet", footer, 4),
    ("shard", "quarantine.linked", "quarantine/*.parquet", page, 4),
    ("shard", "listing.linked", "listings/000001.parquet", page, 4),
    ("shard", "record.linked", "records/*.json", middle, 3),
    ("shard", "run.linked", "run.000001.json", middle, 3),
    ("encode", "part.linked", "data/split=train/*.parquet", page, 4),
    ("encode", "part.linked", "data/split=train/*.parquet", footer, 4),
    ("encode", "quarantine.linked", "quarantine/*.parquet", stage, 4),
    ("train", "model.linked", "model/model.safetensors", middle, 4),
    ("train", "model.linked:2", "model/config.json", middle, 4),
    ("train", "checkpoint.linked", "run.000001.json", middle, 3),
]


@pytest.mark.parametrize(("verb", "point", "name", "where", "status"), LEFT)
def test_a_changed_file_that_a_killed_command_left_is_named_and_the_command_finishes_once_it_is_removed(
    place: Place,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    verb: str,
    point: str,
    name: str,
    where: Callable[[bytes], int],
    status: int,
) -> None:
    out = tmp_path / "out"
    words = killed(place, verb, point, out)
    changed = sorted(out.glob(name))[0]
    changed.write_bytes(flipped(changed.read_bytes(), where))
    before = tree(out)
    capsys.readouterr()
    assert main(words) == status
    said = capsys.readouterr().err
    assert str(changed) in said
    assert ("remove this file" if status == 4 else "it may also be removed: the same command writes it again") in said, said
    assert {file: tree(out)[file] for file in before} == before, "nothing was overwritten"
    changed.unlink()
    assert main(words) == 0
    assert content(verb, out) == content(verb, place.base / {"shard": "dataset", "encode": "table", "train": "run"}[verb])


@pytest.mark.parametrize(
    ("verb", "point", "name"),
    [("shard", "tar.linked", "shards/*.tar"), ("encode", "part.linked", "data/split=train/*.parquet")],
)
def test_the_command_that_gives_up_an_unfinished_attempt_helps_against_all_that_it_left(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str, point: str, name: str
) -> None:
    out = tmp_path / "out"
    words = killed(place, verb, point, out)
    changed = sorted(out.glob(name))[0]
    changed.write_bytes(flipped(changed.read_bytes(), page))
    capsys.readouterr()
    assert main(words) == 4
    (give_up,) = GIVE_UP.findall(capsys.readouterr().err)
    assert main(shlex.split(give_up)[1:]) == 0
    assert not changed.exists()
    assert main(words) == 0
    assert content(verb, out) == content(verb, place.base / {"shard": "dataset", "encode": "table"}[verb])


@pytest.mark.parametrize(("verb", "folder"), [("shard", "shards"), ("shard", "quarantine"), ("encode", "data"), ("encode", "quarantine")])
def test_a_recorded_part_that_was_damaged_before_the_end_is_made_again_when_it_and_its_record_are_removed(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str, folder: str
) -> None:
    out = tmp_path / "out"
    words = killed(place, verb, "manifest.synced", out)
    changed = sorted(out.glob(f"{folder}/**/*.parquet"))[0]
    changed.write_bytes(flipped(changed.read_bytes(), end))
    capsys.readouterr()
    assert main(words) == 3
    said = capsys.readouterr().err
    record = out / f"records/{changed.stem}.json"
    assert changed.name in said and f"remove that file and {record}" in said, said
    changed.unlink()
    record.unlink()
    assert main(words) == 0
    assert content(verb, out) == content(verb, place.base / {"shard": "dataset", "encode": "table"}[verb])


FEW = (0, 2, 5, 6, 8, 10)


@pytest.mark.parametrize(
    ("verb", "point", "name", "where", "status"),
    [pytest.param(*each, marks=() if number in FEW else pytest.mark.long) for number, each in enumerate(LEFT)],
)
def test_the_same_holds_in_a_bucket(
    place: Place,
    s3: S3,
    capsys: pytest.CaptureFixture[str],
    verb: str,
    point: str,
    name: str,
    where: Callable[[bytes], int],
    status: int,
) -> None:
    """The object is put there again by something that keeps no checksum of ours, such as a restored copy of the bucket."""
    out = f"{s3.url}/out"
    words = killed(place, verb, point, out)
    before = s3.objects("out/")
    changed = next(key for key in sorted(before) if fnmatch.fnmatch(key, name))
    before[changed] = flipped(before[changed], where)
    s3.raw.put_object(Bucket=s3.bucket, Key=f"out/{changed}", Body=before[changed])
    capsys.readouterr()
    assert main(words) == status
    said = capsys.readouterr().err
    assert f"{out}/{changed}" in said
    assert ("remove this file" if status == 4 else "it may also be removed: the same command writes it again") in said, said
    after = s3.objects("out/")
    assert {key: after[key] for key in before} == before, "nothing was overwritten"
    s3.raw.delete_object(Bucket=s3.bucket, Key=f"out/{changed}")
    assert main(words) == 0
    finished = {key: data for key, data in s3.objects("out/").items() if not key.startswith(TIMES)}
    right = content(verb, place.base / {"shard": "dataset", "encode": "table", "train": "run"}[verb])
    assert {key: data for key, data in finished.items() if verb != "train" or key.startswith("model/")} == right
