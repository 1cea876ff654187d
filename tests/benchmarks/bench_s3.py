"""From a bucket with 20 ms before every answer: sharding, training and encoding against the same work with boto3 and local files.

The floors fetch whole objects with boto3 in as many threads as we have requests in flight, do the same work on local files, and put
the results with boto3. They check no hash, commit nothing in order and survive nothing. Every round begins with an empty cache and
writes below a new prefix. The server is the one of the tests; it shares the machine with both sides and is the slowest part of all.
"""

import contextlib
import os
import shutil
import statistics
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from aecore.checkpoint.config import ModelConfig
from aecore.checkpoint.files import publish_model
from aecore.checkpoint.weights import write_checkpoint
from aecore.data.dataset import open_dataset
from aecore.data.format.transform import TransformSpec
from aecore.data.read.loader import InputSpec, Loader
from aecore.data.read.order import TrainingOrder
from aecore.data.sources.folder import FolderSpec
from aecore.data.write.job import shard_dataset
from aecore.data.write.spec import ShardSpec
from aecore.encoding.job import EncodeSpec, encode_dataset
from aecore.nn.mlp import MLPSpec
from aecore.store import open_store
from aecore.store._cache import FETCHERS
from aecore.store._s3_files import IN_FLIGHT
from aecore.training.loop import TrainJob, TrainSpec, fit
from aecore.training.optimizer import OptimSpec
from aecore.variational import VAESpec
from pipelines.cluster.memory import disable_malloc_trim
from tests.benchmarks.pairs import HEADER, compare
from tests.realdata import unpack
from tests.s3 import ACCESS_KEY, REGION, S3, SECRET_KEY, s3_environment, start_server

LATENCY_S, PAIRS = 0.02, 5
SHARDS = ShardSpec(max_samples=2500)
IMAGES = 2000
BLOCK = 2048


class Bench:
    """A bucket with images, shards and a run in it, a boto3 client, and fresh places for every round."""

    def __init__(self, port: int, folder: Path) -> None:
        import boto3
        from botocore.config import Config

        os.environ.update(s3_environment(port, folder / "cache"))
        keys = {"aws_access_key_id": ACCESS_KEY, "aws_secret_access_key": SECRET_KEY, "region_name": REGION}
        self.boto = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", config=Config(max_pool_connections=IN_FLIGHT), **keys)
        self.s3, self.folder = S3(port, port).with_bucket(), folder

    def fresh(self) -> tuple[str, Path]:
        """Empty our cache; return a new URL and a new local folder."""
        shutil.rmtree(self.folder / "cache", ignore_errors=True)
        name = f"round-{uuid.uuid4().hex}"
        (self.folder / name).mkdir()
        return f"{self.s3.url}/{name}", self.folder / name

    def fetch(self, prefix: str, target: Path, threads: int) -> None:
        """The floor's download: whole objects, straight to files."""
        pages = self.boto.get_paginator("list_objects_v2").paginate(Bucket=self.s3.bucket, Prefix=prefix)
        keys = [entry["Key"] for page in pages for entry in page.get("Contents", ())]

        def one(key: str) -> None:
            path = target / key.removeprefix(prefix)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.boto.get_object(Bucket=self.s3.bucket, Key=key)["Body"].read())

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(one, keys))

    def put(self, folder: Path, prefix: str) -> None:
        """The floor's upload."""
        paths = [path for path in folder.rglob("*") if path.is_file()]

        def one(path: Path) -> None:
            self.boto.put_object(Bucket=self.s3.bucket, Key=f"{prefix}/{path.relative_to(folder)}", Body=path.read_bytes())

        with ThreadPoolExecutor(FETCHERS) as pool:
            list(pool.map(one, paths))


def job(data: str, out: str) -> TrainJob:
    return TrainJob(
        data=data,
        out=out,
        model=VAESpec(latent_dim=16, likelihood="bernoulli"),
        backbone=MLPSpec(hidden=(256,)),
        optim=OptimSpec(),
        train=TrainSpec(global_batch=128, epochs=2, block=BLOCK),
    )


def saved_run(url: str, data: str) -> None:
    config = ModelConfig(VAESpec(latent_dim=20), MLPSpec(), TransformSpec(), open_dataset(data).input_shape())
    torch.manual_seed(0)
    store = open_store(url)
    publish_model(store, write_checkpoint(store, "checkpoints/step-00000001-aa", config.build(), config, step=1, state={}, info={}))


def first_batch_and_cache(bench: Bench, data: str, stored: int) -> None:
    """Print how long the first batch takes from an empty cache, and the most bytes that an epoch keeps in a cache of half the data."""
    seconds = []
    for _ in range(PAIRS):
        bench.fresh()
        begun = time.perf_counter()
        with Loader(open_dataset(data), "train", order=TrainingOrder(block=BLOCK)) as loader:
            next(loader.batches(0, 1))
        seconds.append(time.perf_counter() - begun)
    print(f"\ntime to the first batch, empty cache: {statistics.median(seconds):.2f} s (of {min(seconds):.2f}-{max(seconds):.2f})")
    bench.fresh()
    os.environ["AECORE_CACHE_BYTES"] = str(stored // 2)
    peak, cache = 0, bench.folder / "cache"
    order = TrainingOrder(block=64, lanes=2)
    with Loader(open_dataset(data), "train", order=order, spec=InputSpec(cache="none")) as loader:
        for _ in loader.batches(0, loader.steps_per_epoch):
            peak = max(peak, _bytes_in(cache))
    del os.environ["AECORE_CACHE_BYTES"]
    print(f"most bytes in the cache: {peak / 2**20:.1f} MiB, allowed {stored / 2**21:.1f} MiB, the shards have {stored / 2**20:.1f} MiB")


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # evicted, or complete and renamed, meanwhile
            total += path.stat().st_size
    return total


def main() -> None:
    torch.set_num_threads(1)
    disable_malloc_trim()
    with tempfile.TemporaryDirectory() as scratch, start_server(Path(scratch), LATENCY_S) as port:
        bench = Bench(port, Path(scratch))
        images = Path(scratch) / "images"
        unpack("mnist", images, train_per_class=5000, test_per_class=0)
        data, run, some = f"{bench.s3.url}/dataset", f"{bench.s3.url}/run", Path(scratch) / "some"
        manifest: Any = shard_dataset(FolderSpec(url=str(images)), data, shards=SHARDS)
        saved_run(run, data)
        unpack("mnist", some, train_per_class=IMAGES // 10, test_per_class=0)
        bench.put(some, "some")
        rounds(bench, data, run, manifest)


def rounds(bench: Bench, data: str, run: str, manifest: Any) -> None:
    def shard_ours() -> None:
        url, _ = bench.fresh()
        shard_dataset(FolderSpec(url=f"{bench.s3.url}/some"), url, shards=ShardSpec(max_samples=500))

    def shard_floor() -> None:
        _, folder = bench.fresh()
        bench.fetch("some/", folder / "in", IN_FLIGHT)
        shard_dataset(FolderSpec(url=str(folder / "in")), str(folder / "out"), shards=ShardSpec(max_samples=500))
        bench.put(folder / "out/shards", folder.name)

    def train_ours() -> None:
        url, _ = bench.fresh()
        fit(job(data, url))

    def train_floor() -> None:
        _, folder = bench.fresh()
        bench.fetch("dataset/", folder / "dataset", FETCHERS)
        fit(job(str(folder / "dataset"), str(folder / "run")))
        bench.put(folder / "run/model", folder.name)

    def encode_ours() -> None:
        url, _ = bench.fresh()
        encode_dataset(run, data, url, EncodeSpec(batch=512))

    def encode_floor() -> None:
        _, folder = bench.fresh()
        bench.fetch("dataset/", folder / "dataset", FETCHERS)
        bench.fetch("run/", folder / "run", FETCHERS)
        encode_dataset(str(folder / "run"), str(folder / "dataset"), str(folder / "table"), EncodeSpec(batch=512))
        bench.put(folder / "table/data", folder.name)

    print(HEADER)
    what = "20 ms of latency; boto3, local files"
    for name, ours, floor, units in (
        (f"shard {IMAGES} images of 300 bytes", shard_ours, shard_floor, IMAGES),
        ("train two epochs of 50,000 MNIST images, mlp net", train_ours, train_floor, 2 * manifest.num_samples()),
        ("encode 50,000 MNIST images, mlp net", encode_ours, encode_floor, manifest.num_samples()),
    ):
        print(compare(f"{name}, {what}", ours, floor, units=units, pairs=PAIRS).row(">= 0.8"), flush=True)
    first_batch_and_cache(bench, data, sum(shard.tar.bytes + shard.index.bytes for shard in manifest.shards))


if __name__ == "__main__":
    main()
