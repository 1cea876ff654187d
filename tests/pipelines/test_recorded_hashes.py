"""A law over every hash that any document of an artefact records: verify compares it, and so does a command that goes on from it."""

import contextlib
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aecore.data.sources.folder import FolderSpec
from aecore.data.write.job import shard_dataset
from aecore.data.write.plan import SplitSpec
from aecore.data.write.spec import ShardSpec
from aecore.encoding.job import EncodeSpec, encode_dataset
from aecore.errors import AecoreError, ConfigError, DataError
from aecore.training.loop import fit
from pipelines.steps.show import verify
from tests.aecore.encoding import image_folder, undecodable_png
from tests.aecore.training import small_job
from tests.documents import content, rewrite

STAGES = ("dataset", "run", "table")
Steps = tuple[str | int, ...]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root whose dataset and table have two generations, with samples in quarantine, and whose run has several checkpoints."""
    root = tmp_path_factory.mktemp("recorded")
    image_folder(root / "images", "train", range(0, 60, 4))
    (image_folder(root / "images", "test", range(1, 60, 13)) / "train/square/broken.png").write_bytes(b"\x89PNG broken")
    shard(root)
    train(root)
    encode(root)
    (image_folder(root / "images", "train", range(2, 60, 14)) / "train/square/white.png").write_bytes(undecodable_png())
    shard(root)
    encode(root)
    return root


def shard(root: Path) -> None:
    splits, shards = SplitSpec(by="folders"), ShardSpec(max_samples=8, max_bad=0.5)
    shard_dataset(FolderSpec(url=str(root / "images")), str(root / "dataset"), splits, shards)


def train(root: Path, seed: int = 0) -> None:
    fit(small_job(str(root / "dataset"), root / "run", epochs=2, val_split="test", global_batch=16, seed=seed))


def encode(root: Path) -> None:
    encode_dataset(str(root / "run"), str(root / "dataset"), str(root / "table"), EncodeSpec(batch=16))


@pytest.fixture
def root(made: Path) -> Iterator[Path]:
    """The root, where a test may change what is there: all is put back, since the addresses of lineages lead there."""
    kept = made.with_name(f"{made.name}-kept")
    shutil.copytree(made, kept, ignore=shutil.ignore_patterns("images"))  # copies of images would have other states
    yield made
    for path in made.iterdir():
        if path.name != "images":
            shutil.rmtree(path)
    for path in kept.iterdir():
        path.rename(made / path.name)
    kept.rmdir()


def hashes(data: Any, steps: Steps = ()) -> Iterator[Steps]:
    """Yield where a document records a hash, or says that there is none."""
    for name, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        if str(name).endswith("sha256") and (value is None or re.fullmatch("[0-9a-f]{64}", str(value))):
            yield (*steps, name)
        yield from hashes(value, (*steps, name))


def changed(data: Any, steps: Steps) -> Any:
    """Return a document with another hash in this place."""
    if not steps:
        return "0" * 64 if data is None else ("0" if data[0] != "0" else "1") + data[1:]
    first, *rest = steps
    copy = dict(data) if isinstance(data, dict) else list(data)
    copy[first] = changed(data[first], tuple(rest))
    return copy


def documents(root: Path, stage: str) -> list[tuple[Path, Steps]]:
    """Return every recorded hash but those of reports, whose damage is no fault of the dataset."""
    paths = sorted(path for path in (root / stage).rglob("*.json") if path.parent.name != "report")
    return [(path, steps) for path in paths for steps in hashes(content(path))]


def shown(root: Path, path: Path, steps: Steps) -> str:
    return f"{path.relative_to(root)}: {'.'.join(map(str, steps))}"


@pytest.mark.parametrize("stage", STAGES)
def test_verify_notices_another_value_in_the_place_of_every_recorded_hash(root: Path, stage: str) -> None:
    verify(str(root / stage), read_data=True)
    cases, unseen = documents(root, stage), []
    for path, steps in cases:
        before = path.read_bytes()
        rewrite(path, **changed(content(path), steps))
        try:
            verify(str(root / stage), read_data=True)
        except DataError:
            pass
        else:
            unseen.append(shown(root, path, steps))
        path.write_bytes(before)
    assert not unseen
    assert {str(steps[-1]) for _, steps in cases} >= {
        "dataset": {"claim_sha256", "parent_sha256", "dataset_sha256", "index_content_sha256", "content_sha256", "sha256"},
        "run": {"run_sha256", "dataset_sha256", "init_sha256", "sha256"},
        "table": {"claim_sha256", "parent_sha256", "footer_sha256", "shard_sha256", "checkpoint_sha256", "run_sha256", "sha256"},
    }[stage]


@pytest.mark.parametrize(
    ("stage", "end", "go_on"), [("dataset", "dataset.000002.json", shard), ("table", "table.000002.json", encode), ("run", "model", train)]
)
def test_a_command_that_goes_on_from_another_hash_is_refused_or_ends_as_if_it_were_right(
    root: Path, stage: str, end: str, go_on: Callable[[Path], None]
) -> None:
    """Right is also what a command makes under a new claim, beside one that says something else: that one is garbage."""
    kept = {path: path.read_bytes() for path in (root / stage).rglob("*") if path.is_file()}
    final = next(path for path in (root / stage / end, root / stage / end / "checkpoint.json") if path.is_file())
    wrong = []
    for path, steps in documents(root, stage):
        if path in (final, root / stage / "model/config.json"):
            continue
        final.unlink()  # as if it had been killed just before
        rewrite(path, **changed(content(path), steps))
        with contextlib.suppress(AecoreError):
            go_on(root)
            verify(str(root / stage), read_data=True)
            if final.read_bytes() != kept[final]:
                wrong.append(shown(root, path, steps))
        shutil.rmtree(root / stage)
        for name, data in kept.items():
            name.parent.mkdir(parents=True, exist_ok=True)
            name.write_bytes(data)
    assert not wrong


def test_a_run_does_not_go_on_under_a_claim_that_its_checkpoints_do_not_vouch_for(root: Path) -> None:
    """Its checkpoints were skipped with a warning, and the run began anew."""
    (root / "run/model/checkpoint.json").unlink()  # as if it had been killed just before
    claim = root / "run/run.000001.json"
    identity = content(claim)["identity"]
    rewrite(claim, identity={**identity, "train": {**identity["train"], "seed": 5}})
    with pytest.raises(DataError, match=r"run\.000001\.json has the identity .* its checkpoints .* restore the claim"):
        train(root, seed=5)
    with pytest.raises(ConfigError, match=r"train\.seed: there 5, asked 0"):
        train(root)
    with pytest.raises(DataError, match=r"run_sha256 .* as run\.000001\.json has it"):
        verify(str(root / "run"))


def test_a_dataset_with_the_claim_of_another_one_is_noticed(root: Path, tmp_path: Path) -> None:
    image_folder(tmp_path / "images", "train", range(0, 60, 4))
    shard_dataset(FolderSpec(url=str(tmp_path / "images")), str(tmp_path / "other"), SplitSpec(by="folders"), ShardSpec(max_samples=5))
    shutil.copy(tmp_path / "other/run.000001.json", root / "dataset/run.000001.json")
    with pytest.raises(DataError, match=r"run\.000001\.json"):
        verify(str(root / "dataset"), read_data=True)
