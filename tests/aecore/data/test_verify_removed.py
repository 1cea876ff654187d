"""verify of a dataset whose generations removed samples: what is there has no problems, what is lost or left over is named."""

import logging
import random
import shutil
from pathlib import Path

import pytest

from aecore.artifact.commit import claim_of
from aecore.artifact.subset import VerifySubset
from aecore.data.dataset import open_dataset
from aecore.data.read.verify import verify_dataset
from aecore.data.sources.sprites import SpritesSpec
from aecore.data.write.job import shard_dataset
from aecore.data.write.spec import ShardSpec
from aecore.data.write.splits import SplitSpec
from aecore.errors import DataError
from tests.aecore.data.bag_data import bag_dataset
from tests.aecore.data.removals import live_keys, put_removal, remove
from tests.aecore.data.sequences import dataset_of, wave
from tests.aecore.data.test_removal import key_of, made
from tests.documents import content, rewrite


@pytest.fixture(scope="module")
def two_removals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two generations, and two more that removed samples, among them all of the second shard and a part that is all quarantine."""
    url = made(tmp_path_factory.mktemp("removals"))
    keys = live_keys(open_dataset(str(url)))
    remove(url, [*keys[1:9], key_of(12), key_of(13)])
    remove(url, [*keys[9:12], *live_keys(open_dataset(str(url)), "test")[:2], key_of(15)])
    return url


@pytest.fixture
def url(two_removals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(two_removals, tmp_path / "data"))


def problems(url: Path, **options: object) -> str:
    return "\n".join(verify_dataset(open_dataset(str(url)), **options).problems)  # type: ignore[arg-type]


def test_generations_that_removed_samples_have_no_problems_and_their_counts_are_of_live_ones(url: Path) -> None:
    dataset = open_dataset(str(url))
    found = verify_dataset(dataset, read_data=True)
    assert found.problems == ()
    assert found.samples == dataset.manifest.num_samples() == sum(len(live_keys(dataset, split)) for split in ("train", "test"))
    assert found.quarantined == 1
    files = {
        path.relative_to(url).as_posix() for folder in ("shards", "quarantine", "listings", "removed") for path in (url / folder).iterdir()
    }
    assert found.files == len(files), "files that only generations before name are looked at too"
    for number in (1, 2, 3):
        assert verify_dataset(open_dataset(str(url), number), read_data=True).problems == ()
    for number in range(1, 4):
        part = verify_dataset(dataset, only=VerifySubset(number, 3))
        assert part.problems == ()


@pytest.mark.parametrize("share", [0.1, 0.6, 1.0])
@pytest.mark.parametrize("kind", ["bags", "sprites", "sequences"])
def test_other_kinds_of_samples_have_no_problems_either(tmp_path: Path, kind: str, share: float) -> None:
    url = tmp_path / "data"
    if kind == "bags":
        bag_dataset(tmp_path, 20, max_samples=12)
    elif kind == "sprites":
        shard_dataset(SpritesSpec(positions=2), str(url), SplitSpec(by="hash", val=0.3), ShardSpec(max_samples=20))
    else:
        url = Path(dataset_of(tmp_path, [wave(number) for number in range(30)]).url)
    rng = random.Random(share)
    for _ in range(2):
        keys = live_keys(open_dataset(str(url)))
        if keys:
            remove(url, [key for key in keys if rng.random() < share])
        assert problems(url, read_data=True) == ""


@pytest.mark.parametrize("number", [3, 4])
def test_a_removal_file_that_is_missing_cut_or_flipped_is_named_also_of_a_generation_before(url: Path, number: int) -> None:
    path = url / f"removed/train-000000-g{number:06d}.parquet"
    if not path.exists():
        path = next((url / "removed").glob(f"*-g{number:06d}.parquet"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert path.name in problems(url)
    path.unlink()
    assert f"{path.name} is missing" in problems(url)
    data = bytearray(whole)
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    assert problems(url) == ""
    assert path.name in problems(url, read_data=True)
    path.write_bytes(whole)
    assert problems(url, read_data=True) == ""


def test_files_in_removed_that_no_manifest_names_are_a_problem_or_of_an_attempt(url: Path, caplog: pytest.LogCaptureFixture) -> None:
    known = next((url / "removed").iterdir())
    stray = known.with_name("train-000000-g000001.parquet")  # of a claim that is committed
    shutil.copy(known, stray)
    assert f"no manifest names removed/{stray.name}" in problems(url)
    stray.unlink()
    shutil.copy(known, known.with_name("holiday.parquet"))
    assert "no manifest names removed/holiday.parquet" in problems(url)
    known.with_name("holiday.parquet").unlink()
    dataset = open_dataset(str(url))
    identity = {"dataset": dataset.manifest.identity, "listing": "x", "parent": 4}
    shutil.copy(url / "run.000004.json", url / "run.000005.json")
    rewrite(url / "run.000005.json", claim=5, identity=identity)
    part, row = dataset.manifest.parts[0], dataset.index(dataset.manifest.shards[0]).select(["ordinal", "key"]).to_pylist()[0]
    put_removal(dataset, part, 5, [{**row, "reason": "gone"}])
    with caplog.at_level(logging.WARNING):
        assert problems(url, read_data=True) == ""
    assert "are of an attempt that was not committed" in caplog.text


def test_the_claim_of_a_removal_is_in_its_name() -> None:
    assert [claim_of(stem) for stem in ("train-000000", "train-g000002-000000", "train-000000-g000003", "a-g000002-000001-g000007")] == [
        1,
        2,
        3,
        7,
    ]


def test_a_manifest_of_a_removal_that_belongs_to_another_dataset_is_named_without_its_claim(url: Path) -> None:
    (url / "run.000004.json").unlink()
    assert problems(url) == ""
    data = content(url / "dataset.000004.json")
    for part in data["shards"]:
        if "removed" in part and part["removed"]["file"]["name"].endswith("g000004.parquet"):
            part["removed"]["file"]["sha256"] = "0" * 64
    rewrite(url / "dataset.000004.json", shards=data["shards"])
    assert "belongs to another dataset than records/" in problems(url)


def test_a_removed_sample_does_not_come_back(url: Path) -> None:
    """A generation that names an older removal file again is not what follows from its parent."""
    manifest = open_dataset(str(url)).manifest
    data = content(url / "dataset.000004.json")
    part = next(part for part in data["shards"] if part["split"] == "train" and "removed" in part and not part["removed"]["quarantined"])
    samples = part.pop("removed")["samples"]
    data["statistics"]["train"]["samples"] += samples
    data["sample"] = {name: {text: count + samples for text, count in counts.items()} for name, counts in data["sample"].items()}
    rewrite(url / "dataset.000004.json", **{name: data[name] for name in ("shards", "statistics", "sample")})
    assert open_dataset(str(url)).manifest.num_samples() > manifest.num_samples()
    found = problems(url, read_data=True)
    assert "does not follow from its parts and its parent" in found


def test_damaged_manifests_of_before_are_named_and_do_not_end_the_check(url: Path) -> None:
    (url / "dataset.000002.json").write_bytes(b"{}")
    assert "dataset.000002.json" in problems(url, read_data=True)
    with pytest.raises(DataError):
        open_dataset(str(url), 2)
