"""A run that is refused: exit 3, the reasons counted, and what it leaves does not change what the next run makes."""

import io
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aecore.artifact.kinds import detect_artifact
from aecore.data.dataset import open_dataset
from aecore.data.read.verify import verify_dataset
from aecore.data.sources.arrays import ArraysSpec
from aecore.data.sources.folder import FolderSpec
from aecore.data.write.job import shard_dataset
from aecore.data.write.spec import ShardSpec
from aecore.errors import ConfigError, DataError
from aecore.store import open_store
from pipelines.cli.main import main
from tests.aecore.data.test_external_tars import write_tar
from tests.aecore.data.tiny import encoded, image


def folder(root: Path, good: int, bad: int, first: int = 0) -> FolderSpec:
    (root / "a").mkdir(parents=True, exist_ok=True)
    for number in range(good):
        (root / f"a/{first + number:03d}.png").write_bytes(encoded(image(first + number)))
    for number in range(bad):
        (root / f"a/bad{first + number:03d}.jpg").write_bytes(b"version https://git-lfs.github.com/spec/v1\n" + b"x" * number)
    return FolderSpec(url=str(root))


def files(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


@pytest.mark.parametrize("max_bad", [0.01, 1.0])
@pytest.mark.parametrize("count", [1, 7])
def test_a_source_in_which_everything_is_bad_is_refused_and_leaves_nothing(tmp_path: Path, capsys, max_bad: float, count: int) -> None:
    source, out = folder(tmp_path / "in", 0, count), tmp_path / "out"
    command = ["shard", source.url, str(out), "cluster.num_workers=0", f"shards.max_bad={max_bad}", "shards.max_samples=3"]
    assert main(command) == 3
    said = capsys.readouterr().err
    assert f"all {count} samples are bad (lfs_pointer {count}): nothing was kept. First of them:" in said
    assert said.count("a Git LFS pointer") <= 5
    assert files(out) == [] and detect_artifact(open_store(str(out))) is None
    for path in (tmp_path / "in/a").iterdir():
        path.unlink()
    made = shard_dataset(folder(tmp_path / "in", 4, 0), str(out))
    assert [shard.stem for shard in made.shards] == ["train-000000"] and made.number == 1
    assert verify_dataset(open_dataset(str(out)), read_data=True).ok


@pytest.mark.parametrize("max_bad", [0.01, 1.0])
def test_tars_in_which_everything_is_bad_are_not_adopted(tmp_path: Path, capsys: pytest.CaptureFixture[str], max_bad: float) -> None:
    out = tmp_path / "out"
    command = ["adopt", str(tmp_path / "in"), str(out), "cluster.num_workers=0", f"shards.max_bad={max_bad}"]
    write_tar(tmp_path / "in/x.tar", [(f"{number}.png", b"no") for number in range(3)])
    assert main(command) == 3
    assert "all 3 samples are bad" in capsys.readouterr().err
    assert files(out) == [] and detect_artifact(open_store(str(out))) is None
    write_tar(tmp_path / "in/x.tar", [(f"{number}.png", encoded(image(number))) for number in range(3)])
    assert main(command) == 0
    made = open_dataset(str(out))
    assert (made.manifest.number, made.manifest.num_samples(), verify_dataset(made, read_data=True).ok) == (1, 3, True)


def test_an_append_of_nothing_but_bad_samples_is_a_question_of_max_bad(tmp_path: Path) -> None:
    shard_dataset(folder(tmp_path / "in", 4, 0), str(tmp_path / "out"))
    source = folder(tmp_path / "in", 0, 2)
    with pytest.raises(DataError, match=r"all 2 samples are bad"):
        shard_dataset(source, str(tmp_path / "out"))
    before = files(tmp_path / "out")
    assert not [name for name in before if "g00000" in name]
    made = shard_dataset(source, str(tmp_path / "out"), shards=ShardSpec(max_bad=1.0))
    assert (made.number, made.num_samples(), made.quarantined) == (2, 4, 2)


def test_a_refusal_of_the_settings_leaves_nothing(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.zeros((5, 3, 3), np.float32))
    source, out = ArraysSpec(url=str(tmp_path / "rows.npy")), tmp_path / "out"
    with pytest.raises(ConfigError, match=r"shards.resize, shards.mode and shards.value_range work on images"):
        shard_dataset(source, str(out), shards=ShardSpec(resize=8))
    assert files(out) == []
    assert [shard.stem for shard in shard_dataset(source, str(out)).shards] == ["train-000000"]


def test_bad_files_that_are_removed_leave_a_first_generation(tmp_path: Path) -> None:
    source, out = folder(tmp_path / "in", 9, 1), tmp_path / "out"
    with pytest.raises(DataError, match=r"1 of 10 samples are bad, more than shards.max_bad=0.01 allows \(lfs_pointer 1\)"):
        shard_dataset(source, str(out), shards=ShardSpec(max_samples=4))
    kept = files(out)
    assert len([name for name in kept if name.endswith(".tar")]) == 3, "for a run that accepts them"
    (tmp_path / "in/a/bad000.jpg").unlink()
    made = shard_dataset(source, str(out), shards=ShardSpec(max_samples=4))
    assert (made.number, [shard.stem for shard in made.shards]) == (1, ["train-000000", "train-000001", "train-000002"])
    fresh = shard_dataset(source, str(tmp_path / "fresh"), shards=ShardSpec(max_samples=4))
    assert made == fresh and files(out) == files(tmp_path / "fresh")


@pytest.mark.parametrize("lost", ["listings/000001.refused", "dataset.000001.json"])
def test_what_was_not_refused_is_left_alone(tmp_path: Path, lost: str) -> None:
    """It may still be written, by another process; or its manifest was lost."""
    source, out = folder(tmp_path / "in", 9, 1), tmp_path / "out"
    with pytest.raises(DataError):
        shard_dataset(source, str(out), shards=ShardSpec(max_samples=4))
    if lost.startswith("dataset"):
        shard_dataset(source, str(out), shards=ShardSpec(max_samples=4, max_bad=0.5))
    (out / lost).unlink()
    before = set(files(out))
    made = shard_dataset(source, str(out), shards=ShardSpec(max_samples=5, max_bad=0.5))
    assert before < set(files(out)) and made.shards[0].stem == "train-g000002-000000"


def picture(path: Path, mode: str, size: tuple[int, int] = (16, 16)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = io.BytesIO()
    Image.new(mode, size).save(file, "JPEG")
    path.write_bytes(file.getvalue())


@pytest.mark.parametrize(
    ("others", "remedy", "not_said"),
    [
        ([("L", (16, 16))], "shards.mode=L or RGB", "resize"),
        ([("RGB", (16, 24))], "shards.resize=<side>", "shards.mode"),
        ([("L", (9, 9)), ("RGB", (8, 8))], "shards.resize=<side> and shards.mode=L or RGB", "numpy"),
    ],
)
def test_samples_of_several_formats_are_reported_with_the_remedy_which_works(tmp_path: Path, caplog, others, remedy, not_said) -> None:
    for number in range(5):
        picture(tmp_path / f"in/a/{number}.jpg", "RGB")
    for number, (mode, size) in enumerate(others):
        picture(tmp_path / f"in/a/other{number}.jpg", mode, size)
    source = FolderSpec(url=str(tmp_path / "in"))
    with caplog.at_level(logging.WARNING):
        shard_dataset(source, str(tmp_path / "out"))
    (line,) = [record.getMessage() for record in caplog.records]
    assert "16x16x3/RGB (5)" in line and line.endswith(f"shard again with {remedy}") and not_said not in line
    caplog.clear()
    options = {"resize": 16} if "resize" in remedy else {}
    options |= {"mode": "RGB"} if "mode" in remedy else {}
    made = shard_dataset(source, str(tmp_path / "again"), shards=ShardSpec(**options))
    assert len(made.sample.shapes) == 1 and not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_arrays_of_several_shapes_are_told_what_arrays_can_do(tmp_path: Path, caplog) -> None:
    (tmp_path / "in").mkdir()
    for number, shape in enumerate(((4, 6), (4, 6), (4, 7))):
        np.save(tmp_path / f"in/{number}.npy", np.zeros(shape, np.float32))
    source = FolderSpec(url=str(tmp_path / "in"), extensions=("npy",))
    with caplog.at_level(logging.INFO):
        shard_dataset(source, str(tmp_path / "out"))
        (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        assert "4x6/float32 (2), 4x7/float32 (1)" in line and "numpy.pad" in line and "resize" not in line
        caplog.clear()
        np.save(tmp_path / "in/2.npy", np.zeros((9, 6), np.float32))
        shard_dataset(source, str(tmp_path / "sequences"))
    assert "the samples are sequences of up to 9 steps (2 lengths), which models of sequences read (model.kind=rvae)" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_images_in_arrays_are_told_what_arrays_can_do(tmp_path: Path, caplog) -> None:
    (tmp_path / "in").mkdir()
    for number, side in enumerate((8, 8, 9)):
        np.save(tmp_path / f"in/{number}.npy", np.zeros((side, side, 3), np.uint8))
    source = FolderSpec(url=str(tmp_path / "in"), extensions=("npy",))
    shard_dataset(source, str(tmp_path / "out"))
    (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "numpy.pad" in line and "shards." not in line, "shards.resize refuses arrays"
