"""How fast encoding is, everything included, against what one writes first and against floors of the same work.

The naive job: webdataset, Pillow, one float tensor per image, the same forward pass, `tolist`, one Parquet file; no checksums, no
lineage, nothing that survives a kill. The floors do one thing each on data in RAM: the decode loop of the best library, the
forward pass, `np.save` of the latents; the slowest of them counts. Our side opens the model, verifies every sample's hash, writes
parts, records and manifest, fsyncs. Every forward pass has one torch thread; "one process" has as many of them at a time as there are
CPUs, the naive job and the floors have one. "Two processes" are workers that stay, as those of a cluster do, with one each. Each side
lives in a process of its own: ours keeps freed memory as the command does, and so do the floors; the naive job does not know of it.
"""

import functools
import io
import itertools
import tempfile
import timeit
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from aecore._base.batch import Batch
from aecore.artifact.fanout import serial
from aecore.checkpoint.config import ModelConfig
from aecore.checkpoint.files import publish_model
from aecore.checkpoint.weights import load_model, write_checkpoint
from aecore.data.dataset import Dataset, open_dataset
from aecore.data.format.transform import Transform, TransformSpec
from aecore.data.sources.folder import FolderSpec
from aecore.data.write.job import shard_dataset
from aecore.data.write.spec import ShardSpec
from aecore.encoding.job import EncodeSpec, encode_dataset
from aecore.nn.conv import ConvSpec
from aecore.nn.mlp import MLPSpec
from aecore.store import open_store
from aecore.variational import VAESpec
from pipelines.cluster.memory import disable_malloc_trim
from tests.benchmarks.bench_input import make_folder
from tests.benchmarks.pairs import HEADER, Home, Side, compare, two_processes

PAIRS = 5
CASES = (("mnist", 60_000, "mlp", 512), ("mnist", 60_000, "conv", 512), ("jpeg256", 400, "conv", 64))


@dataclass(frozen=True)
class Case:
    """One dataset with one random model."""

    name: str
    root: Path
    dataset: Dataset
    run: str
    batch: int

    @property
    def samples(self) -> int:
        return self.dataset.manifest.num_samples()


def make_case(kind: str, net: str, batch: int, root: Path) -> Case:
    data = open_dataset(str(root / f"{kind}-dataset"))
    small = data.input_shape()[1] < 256
    backbone: Any = MLPSpec() if net == "mlp" else ConvSpec(channels=(32, 64) if small else (16, 32, 64, 64))
    config = ModelConfig(VAESpec(latent_dim=20), backbone, TransformSpec(), data.input_shape())
    torch.manual_seed(0)
    store = open_store(str(root / f"{kind}-{net}-run"))
    publish_model(store, write_checkpoint(store, "checkpoints/step-00000001-aa", config.build(), config, step=1, state={}, info={}))
    side = data.input_shape()[1]
    return Case(f"{side}x{side} images, {net} net", root, data, store.url, batch)


def begin() -> None:
    torch.set_num_threads(1)


def begin_ours() -> None:
    begin()
    disable_malloc_trim()


def ours(case: Case, fan_out: Any = serial) -> None:
    out = f"{case.root}/table-{uuid.uuid4().hex}"
    manifest: Any = encode_dataset(case.run, case.dataset.url, out, EncodeSpec(batch=case.batch), fan_out=fan_out)
    assert manifest.num_rows == case.samples


def to_tensor(data: bytes) -> Tensor:
    pixels = np.array(Image.open(io.BytesIO(data)), dtype=np.float32) / 255
    return torch.from_numpy(pixels if pixels.ndim == 3 else pixels[..., None]).permute(2, 0, 1).contiguous()


def naive(case: Case) -> None:
    import webdataset as wds

    model: Any = load_model(case.run).model
    ext = next(iter(case.dataset.manifest.sample.extensions))
    tars = [f"{case.dataset.url}/{shard.tar.name}" for shard in case.dataset.manifest.shards]
    rows: dict[str, list[Any]] = {"key": [], "mu": [], "log_var": []}
    source = wds.WebDataset(tars, shardshuffle=False).to_tuple("__key__", ext).map_tuple(None, to_tensor)
    for batch in source.batched(case.batch, collation_fn=None):
        latent = model.encode(torch.stack([x for _, x in batch]), sample=False)
        rows["key"] += [key for key, _ in batch]
        rows["mu"] += latent.mu.tolist()
        rows["log_var"] += latent.log_var.tolist()
    assert len(rows["key"]) == case.samples
    pq.write_table(pa.table(rows), case.root / f"naive-{uuid.uuid4().hex}.parquet")


def floors(case: Case) -> dict[str, Side]:
    """Return the bare loops: decode, forward, save."""
    import imagecodecs

    readers = [case.dataset.reader(shard) for shard in case.dataset.manifest.shards]
    members = [member for reader in readers for member in reader.read_rows(np.arange(len(reader)))]
    decode = imagecodecs.png_decode if members[0].startswith(b"\x89PNG") else imagecodecs.jpeg8_decode
    stacked = np.stack([decode(member) for member in members])
    pixels = torch.from_numpy(stacked.reshape(*stacked.shape[:3], -1)).permute(0, 3, 1, 2)  # the loader's memory layout: convolutions care
    loaded = load_model(case.run)
    transform, one = Transform(loaded.config.transform), torch.zeros(1, dtype=torch.int64)

    @torch.inference_mode()
    def forward() -> np.ndarray:
        latents = [loaded.model.latents(transform(Batch(rows, one, one, 1))) for rows in pixels.split(case.batch)]
        return torch.cat([torch.cat([part["mu"], part["log_var"]], 1) for part in latents]).numpy()

    values = forward()
    return {
        "bare decode loop": lambda: [decode(member) for member in members],
        "forward on data in RAM": forward,
        "np.save": lambda: np.save(case.root / "floor.npy", values),
    }


_made: dict[str, dict[str, Side]] = {}  # by run: the data are decoded once


def run_floor(case: Case, name: str) -> None:
    if case.run not in _made:
        _made.clear()
        _made[case.run] = floors(case)
    _made[case.run][name]()


def slowest_floor(case: Case, home: Home) -> str:
    """Return the name of the floor that takes longest, the best of three runs each."""
    names = ("bare decode loop", "forward on data in RAM", "np.save")
    seconds = {name: min(timeit.repeat(home(functools.partial(run_floor, case, name)), number=1, repeat=4)[1:]) for name in names}
    return max(names, key=seconds.__getitem__)


def main() -> None:
    begin()
    print(HEADER, flush=True)
    with (
        tempfile.TemporaryDirectory(prefix="bench-encode-") as scratch,
        Home(begin_ours) as one,
        Home(begin_ours) as two,
        Home(begin_ours) as bare,
        Home(begin) as usual,
    ):
        root = Path(scratch)
        for kind, images in dict.fromkeys(case[:2] for case in CASES):
            folder = make_folder(kind, images, root / "images")
            shard_dataset(FolderSpec(url=str(folder)), str(root / f"{kind}-dataset"), shards=ShardSpec(max_samples=images // 4))
        for kind, _, net, batch in CASES:
            case = make_case(kind, net, batch, root)
            sides = {"one process": one(functools.partial(ours, case)), "two processes": two(functools.partial(ours, case, two_processes))}
            floor = slowest_floor(case, bare)
            others = {
                "naive job": usual(functools.partial(naive, case)),
                f"floor: {floor}": bare(functools.partial(run_floor, case, floor)),
            }
            for (other, their_side), (way, side) in itertools.product(others.items(), sides.items()):
                asked = ">= 4" if other == "naive job" else ">= 0.8"
                pairs = compare(f"{case.name}, {way}; {other}", side, their_side, units=case.samples, pairs=PAIRS)
                print(pairs.row(asked), flush=True)


if __name__ == "__main__":
    main()
