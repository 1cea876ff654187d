"""The product at full size, through its own command, on real MNIST: `make accept`. Numbers are printed (`-s` shows them live)."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from aecore.checkpoint.files import committed_checkpoints
from aecore.data.dataset import open_dataset
from aecore.data.read.loader import Loader
from aecore.data.read.order import TrainingOrder
from aecore.data.sources.folder import FolderSpec
from aecore.data.write.job import shard_dataset
from aecore.errors import DataError
from aecore.nn.mlp import MLPSpec
from aecore.store import open_store
from aecore.table.table import open_table
from aecore.training.loop import TrainJob, TrainSpec
from aecore.training.metrics import last_row
from aecore.training.optimizer import OptimSpec
from aecore.variational import VAESpec
from tests.aecore.training import fit_on, losses
from tests.processes import below, run, started
from tests.realdata import unpack_real

pytestmark = pytest.mark.accept
ROOT = Path(__file__).resolve().parent.parent.parent
RECIPE = ROOT / "pipelines/recipes/mnist_vae.yaml"
FULL_SIZE_S = 5000.0
BAR_NATS = 100.7  # test -ELBO of the 784-256-256-20 VAE after 30 epochs, sampled


def command(*arguments: object, fault: str | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `aepipe` to its end."""
    return run(_argv(arguments), env=_environment(fault), cwd=ROOT, timeout_s=FULL_SIZE_S, **options)


def aepipe(*arguments: object) -> dict[str, Any]:
    """Run `aepipe ... --json`, which must succeed, and return its answer."""
    done = command(*arguments, "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def _argv(arguments: tuple[object, ...]) -> list[str]:
    return [sys.executable, "-m", "pipelines.cli", *map(str, arguments)]


def _environment(fault: str | None = None) -> dict[str, str]:
    return {**os.environ, **({"AECORE_FAULT": fault} if fault else {})}


def hashes(folder: Path, *, only: str = "**/*") -> dict[str, str]:
    """Return name -> sha256 of the files of an artefact, without staging and without the timings of records."""
    found = {}
    for path in sorted(folder.glob(only)):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not name.startswith((".tmp/", "records/", "report/", "checkpoints/", "metrics/", "tensorboard/")):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.fixture(scope="module")
def whole(real_mnist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline on all of MNIST with two Ray workers."""
    out = tmp_path_factory.mktemp("whole") / "out"
    begun = time.monotonic()
    done = command("run", RECIPE, f"source.url={real_mnist}", f"out={out}", "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    print(f"\naepipe run mnist_vae, 2 Ray workers: {time.monotonic() - begun:.0f} s")
    return out


def test_every_image_of_mnist_is_one_row_with_its_lineage(whole):
    table, dataset = open_table(str(whole / "table")), open_dataset(str(whole / "dataset"))
    assert table.num_rows == 70_000 == dataset.manifest.num_samples()
    keys = [key for shard in dataset.manifest.shards for key in dataset.reader(shard).index["key"].to_pylist()]
    assert sorted(table.keys.to_pylist()) == sorted(keys)
    assert len(set(keys)) == 70_000
    assert np.isfinite(table.numpy("mu")).all()
    assert aepipe("verify", whole / "dataset", "--read-data")
    assert aepipe("verify", whole / "table", "--read-data")
    checkpoint = hashlib.sha256((whole / "run/model/checkpoint.json").read_bytes()).hexdigest()
    for key in keys[::997]:
        lineage = table.lineage(key)
        assert checkpoint in json.dumps(lineage, default=str)


def test_the_sampled_elbo_on_the_test_split_is_within_the_bar(whole):
    answer = aepipe("evaluate", whole / "run", whole / "dataset")
    print(f"\ntest -ELBO {-answer['elbo']:.2f} nats, KL {answer['kl']:.2f}, {answer['active_units']} active units, MSE {answer['mse']:.5f}")
    assert answer["num_samples"] == 10_000
    assert -answer["elbo"] <= BAR_NATS


def test_shards_are_the_same_bytes_for_any_number_of_workers(whole, real_mnist, tmp_path):
    expected = {name: digest for name, digest in hashes(whole / "dataset").items() if not name.startswith("run.")}
    assert len([name for name in expected if name.endswith(".tar")]) == 7
    for workers in (0, 1):
        aepipe(
            "shard", real_mnist, tmp_path / str(workers), "splits.by=folders", "shards.max_samples=10000", f"cluster.num_workers={workers}"
        )
        found = {name: digest for name, digest in hashes(tmp_path / str(workers)).items() if not name.startswith("run.")}
        assert found == expected


def _mnist_job(data: str, out: Path, steps: int) -> TrainJob:
    return TrainJob(
        data=data,
        out=str(out),
        model=VAESpec(latent_dim=20, likelihood="bernoulli"),
        backbone=MLPSpec(hidden=(256, 256)),  # silu: see aecore/training/loop.py on ReLU
        optim=OptimSpec(lr=1e-3),
        train=TrainSpec(epochs=2, max_steps=steps, global_batch=128),
    )


def test_1_2_and_3_ranks_see_the_same_batches_and_losses_over_500_steps(whole, tmp_path):
    data = str(whole / "dataset")
    reference: list[list[int]] = []
    for world_size in (1, 2, 3):
        steps: dict[int, dict[int, int]] = {}
        for rank in range(world_size):
            with Loader(open_dataset(data), "train", order=TrainingOrder(rank=rank, world_size=world_size)) as loader:
                for step, batch in enumerate(loader.batches(0, 500)):
                    steps.setdefault(step, {}).update(zip(batch.positions.tolist(), batch.ordinals.tolist(), strict=True))
        ordinals = [[steps[step][position] for position in sorted(steps[step])] for step in range(500)]
        reference = reference or ordinals
        assert ordinals == reference
    for world_size in (1, 2, 3):
        fit_on(_mnist_job(data, tmp_path / str(world_size), 500), world_size)
    one = np.array([row["loss"] for row in losses(tmp_path / "1")])
    for world_size in (2, 3):
        many = np.array([row["loss"] for row in losses(tmp_path / str(world_size))])
        print(f"\n{world_size} ranks: largest relative difference of 500 losses {np.abs(many / one - 1).max():.1e}")
        np.testing.assert_allclose(many, one, rtol=1e-5)


def test_a_train_worker_killed_in_the_middle_of_an_epoch_costs_nothing(whole, tmp_path):
    options = ["train.epochs=4", "checkpoint.every_steps=150", f"data={whole / 'dataset'}"]
    aepipe("train", RECIPE, *options, f"out={tmp_path / 'uninterrupted'}")
    store = open_store(tmp_path / "killed")
    command = _argv(("train", RECIPE, *options, f"out={tmp_path / 'killed'}"))
    with started(command, cwd=ROOT, env=_environment()) as driver:
        driver.wait_for(lambda: (row := last_row(store)) and row["step"] > 700, "step 700 is in the metrics", 600)
        victims = [pid for pid, name in below(driver.pid).items() if "RayTrainWorker" in name]
        assert len(victims) == 2
        os.kill(victims[0], signal.SIGKILL)
        assert driver.finish(600).returncode == 0, driver.tail()
    assert losses(tmp_path / "killed") == losses(tmp_path / "uninterrupted")
    assert hashes(tmp_path / "killed/model") == hashes(tmp_path / "uninterrupted/model")
    attempts = {name.rsplit("-", 1)[1] for _, name in committed_checkpoints(store)} | {
        path.stem.rsplit("-", 1)[1] for path in (tmp_path / "killed/metrics").iterdir()
    }
    assert len(attempts) == 2, "the kill came too late: nothing was resumed"


@contextmanager
def polling(out: Path, verb: str) -> Iterator[list[str]]:
    """Open the artefact again and again meanwhile; yields what went wrong: a manifest that names something that is not there."""
    wrong: list[str] = []
    stop = threading.Event()

    def poll() -> None:
        while not stop.is_set():
            if not any(out.glob("dataset.*.json" if verb == "shard" else "table.*.json")):
                continue
            try:
                if verb == "shard":
                    dataset = open_dataset(str(out))
                    for shard in dataset.manifest.shards:
                        dataset.store.check(shard.tar, verify=True)
                        dataset.store.check(shard.index, verify=True)
                else:
                    assert open_table(str(out)).num_rows == 1099
            except (DataError, AssertionError) as error:
                wrong.append(str(error))
            time.sleep(0.01)

    thread = threading.Thread(target=poll)
    thread.start()
    try:
        yield wrong
    finally:
        stop.set()
        thread.join()


FAULTS = {
    "shard": ["run", "listing", "tar", "index", "quarantine", "record", "manifest"],
    "train": ["run", "metrics", "weights", "config", "state", "checkpoint", "model"],
    "encode": ["part", "record", "run", "manifest"],
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """1,100 real images, one of them truncated, and the uninterrupted dataset, run and table of them."""
    base = tmp_path_factory.mktemp("small")
    source = unpack_real("mnist", base / "mnist", train_per_class=100, test_per_class=10)
    bad = sorted(source.glob("train/*/*.png"))[7]
    bad.write_bytes(bad.read_bytes()[:-20])
    arguments = {
        "shard": lambda out: ("shard", source, out, "shards.max_samples=300", "cluster.num_workers=0"),
        "train": lambda out: (
            *("train", RECIPE, f"data={base / 'shard'}", f"out={out}", "train.epochs=4", "checkpoint.every_steps=10"),
            *("train.log_every_s=0.05", "cluster.num_workers=0"),
        ),
        "encode": lambda out: ("encode", base / "train", base / "shard", out, "encode.batch=128", "cluster.num_workers=0"),
    }
    for verb, make in arguments.items():
        done = command(*make(base / verb))
        assert done.returncode == 0, done.stderr[-2000:]
    return {"base": base, "arguments": arguments}


@pytest.mark.parametrize(("verb", "role"), [(verb, role) for verb, roles in FAULTS.items() for role in roles])
def test_a_verb_killed_at_any_fault_point_ends_like_an_uninterrupted_one(small, tmp_path, verb, role):
    make, whole = small["arguments"][verb], small["base"] / verb
    for stage in ("staged", "synced", "linked"):
        out = tmp_path / stage
        with polling(out, verb) as wrong:
            killed = command(*make(out), fault=f"{role}.{stage}")
            assert killed.returncode == -signal.SIGKILL, (role, stage, killed.stderr[-2000:])
            done = command(*make(out))
            assert done.returncode == 0, done.stderr[-2000:]
        assert not wrong, wrong[:3]
        assert hashes(out) == hashes(whole)
        if verb == "train":
            assert losses(out) == losses(whole)
        if verb == "encode":
            keys = [
                key for part in sorted((out / "data").rglob("*.parquet")) for key in pq.read_table(part, columns=["key"])["key"].to_pylist()
            ]
            assert len(keys) == len(set(keys)) == 1099


def test_time_is_linear_and_memory_flat(real_mnist, tmp_path):
    """Sharding 1x and 2x the images: about twice the time (bounds are wide: shared machines), the same peak memory."""
    code = (
        "import resource, sys, time\n"
        "from aecore.data.write.job import shard_dataset\nfrom aecore.data.sources.folder import FolderSpec\n"
        "started = time.monotonic()\nshard_dataset(FolderSpec(url=sys.argv[1]), sys.argv[2])\n"
        "print(time.monotonic() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)\n"
    )
    numbers = {}
    for name, share in (("one", 3000), ("two", 6000)):
        source = unpack_real("mnist", tmp_path / name, train_per_class=share, test_per_class=0)
        done = subprocess.run([sys.executable, "-c", code, source, tmp_path / f"{name}-out"], capture_output=True, text=True, check=True)
        numbers[name] = [float(number) for number in done.stdout.split()]
    (seconds, peak), (seconds_two, peak_two) = numbers["one"], numbers["two"]
    print(f"\nshard 30,000 / 60,000 images: {seconds:.1f} / {seconds_two:.1f} s, peak {peak:.0f} / {peak_two:.0f} MiB")
    assert peak_two < 1.5 * peak


def test_sharding_again_finds_nothing_new_and_writes_nothing(real_mnist, tmp_path):
    shard_dataset(FolderSpec(url=str(real_mnist)), str(tmp_path / "out"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    shard_dataset(FolderSpec(url=str(real_mnist)), str(tmp_path / "out"))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
