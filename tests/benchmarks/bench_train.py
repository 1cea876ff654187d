"""Training on two Ray workers against the same `fit` under torchrun: what Ray Train costs once the workers run.

Start-up is not counted: the clock runs from the checkpoint of the first epoch to that of the last, as the files' times tell. One torch
thread a worker, gloo, 784-256-256-20 VAE, batches of 128 images of real MNIST.
"""

import functools
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from aecore.data.sources.folder import FolderSpec
from aecore.data.write.job import shard_dataset
from aecore.nn.mlp import MLPSpec
from aecore.training.job import CheckpointSpec, TrainJob, TrainSpec
from aecore.training.loop import fit
from aecore.training.ranks import Rank
from aecore.variational import VAESpec
from pipelines.cluster.memory import disable_malloc_trim
from pipelines.cluster.train import train
from pipelines.recipe.recipe import ClusterSpec
from tests.benchmarks.pairs import HEADER, Pairs, peak_mib_here
from tests.realdata import unpack

EPOCHS, PAIRS, IMAGES = 12, 9, 10_000


def job(data: str, out: Path) -> TrainJob:
    return TrainJob(
        data=data,
        out=str(out),
        model=VAESpec(latent_dim=20, likelihood="bernoulli"),
        backbone=MLPSpec(hidden=(256, 256)),
        train=TrainSpec(epochs=EPOCHS),
        checkpoint=CheckpointSpec(keep=EPOCHS),
    )


def seconds(out: Path) -> float:
    """Return the time from the first epoch's checkpoint to the last one's."""
    times = sorted(path.stat().st_mtime for path in out.glob("checkpoints/*/checkpoint.json"))
    assert len(times) == EPOCHS
    return times[-1] - times[0]


def with_ray(data: str, out: Path) -> float:
    train(job(data, out), ClusterSpec(num_workers=2))
    return seconds(out)


def with_torchrun(data: str, out: Path) -> float:
    pickled = out.with_suffix(".job")
    pickled.write_bytes(pickle.dumps(job(data, out)))
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "tests.benchmarks.bench_train", str(pickled)]
    subprocess.run([sys.executable, "-m", *command], check=True, capture_output=True)
    return seconds(out)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        shard_dataset(
            FolderSpec(url=str(unpack("mnist", base / "files", train_per_class=IMAGES // 10, test_per_class=0))), str(base / "data")
        )
        peaks = [
            peak_mib_here(functools.partial(side, str(base / "data"), base / f"{side.__name__}-first"))
            for side in (with_torchrun, with_ray)  # Ray stays once it is started
        ]
        ours, theirs = list[float](), list[float]()
        for number in range(PAIRS):
            for side, times in ((with_ray, ours), (with_torchrun, theirs))[:: 1 if number % 2 == 0 else -1]:
                times.append(side(str(base / "data"), base / f"{side.__name__}-{number}"))
    print(HEADER)
    pairs = Pairs("mnist: train, 2 Ray workers; torchrun", (EPOCHS - 1) * IMAGES, tuple(ours), tuple(theirs), peaks[1], peaks[0])
    print(pairs.row(">= 0.95"), flush=True)


def rank_main(pickled: str) -> None:
    """What torchrun starts: one rank of `fit`, with the settings of our workers."""
    torch.set_num_threads(1)
    disable_malloc_trim()
    dist.init_process_group("gloo")
    fit(pickle.loads(Path(pickled).read_bytes()), rank=Rank(dist.get_rank(), dist.get_world_size()))
    dist.destroy_process_group()


if __name__ == "__main__":
    rank_main(sys.argv[1])
