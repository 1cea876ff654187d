"""What the tests of encode, table and evaluate share: small real datasets, small real checkpoints, fan-outs of several workers."""

import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from aecore.artifact.fanout import MakeWorker, Outcome, make_part
from aecore.checkpoint.config import ModelConfig
from aecore.checkpoint.files import publish_model
from aecore.checkpoint.weights import write_checkpoint
from aecore.data.format.transform import TransformSpec
from aecore.data.sources.folder import FolderSpec
from aecore.data.sources.sprites import SpritesSource, SpritesSpec
from aecore.data.write.job import shard_dataset
from aecore.data.write.plan import SplitSpec
from aecore.data.write.spec import ShardSpec
from aecore.encoding.job import EncodeSpec, encode_dataset
from aecore.nn.mlp import MLPSpec
from aecore.store import open_store
from aecore.table.manifest import TableManifest
from aecore.table.table import LatentTable, open_table
from aecore.vanilla import AESpec
from aecore.variational import VAESpec

SIZE = 12
SHAPE = (1, SIZE, SIZE)
DIM = 4


def image_folder(folder: Path, split: str, numbers: range) -> Path:
    """Write sprites as PNG files `<folder>/<split>/<shape>/<name>.png`."""
    source = SpritesSource(SpritesSpec(size=SIZE))
    keys = source.listing().keys
    for number in numbers:
        path = folder / split / f"{keys[number * 37 % len(keys)]}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source.read(keys[number * 37 % len(keys)])[1])
    return folder


def undecodable_png() -> bytes:
    """Return a PNG that passes every structural check (headers, checksums) and whose pixels do not inflate."""
    header = struct.pack(">IIBBBBB", SIZE, SIZE, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", b"these are no deflated pixels"), (b"IEND", b"")]
    packed = [struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def folder_dataset(folder: Path, out: Path, max_samples: int = 32) -> str:
    """Shard (or append) a folder with split folders."""
    shard_dataset(FolderSpec(url=str(folder)), str(out), SplitSpec(by="folders"), ShardSpec(max_samples=max_samples))
    return str(out)


def sprites_dataset(out: Path, num_samples: int = 120, max_samples: int = 32) -> str:
    """Shard generated sprites in the splits train and test."""
    sprites = SpritesSpec(size=SIZE, num_samples=num_samples)
    shard_dataset(sprites, str(out), SplitSpec(by="hash", test=0.25), ShardSpec(max_samples=max_samples))
    return str(out)


def model_config(model: Any = None, shape: tuple[int, ...] = SHAPE, scale: Any = "unit") -> ModelConfig:
    """Return the config of a small VAE, or of `model`."""
    return ModelConfig(model or VAESpec(latent_dim=DIM), MLPSpec(hidden=(16,)), TransformSpec(scale=scale), shape)


def saved_run(out: Path, config: ModelConfig | None = None, change: Callable[[Any], None] | None = None, seed: int = 0) -> str:
    """Write a run with random weights (after `change(model)`) and publish its model, as training does."""
    config = config or model_config()
    torch.manual_seed(seed)
    model = config.build()
    with torch.no_grad():
        if change is not None:
            change(model)
    store = open_store(str(out))
    checkpoint = write_checkpoint(store, f"checkpoints/step-{seed:08d}-aa", model, config, step=seed, state={}, info={"seed": seed})
    publish_model(store, checkpoint)
    return str(out)


def ae_config(**changes: Any) -> ModelConfig:
    """Return the config of a small plain autoencoder."""
    return model_config(AESpec(latent_dim=DIM), **changes)


def encode(run: str, data: str, out: Path | str, spec: EncodeSpec | None = None, **options: Any) -> LatentTable:
    """Encode and open the table."""
    manifest = encode_dataset(run, data, str(out), spec or EncodeSpec(batch=16), **options)
    assert isinstance(manifest, TableManifest)
    table = open_table(str(out))
    assert table.manifest == manifest
    return table


def three_workers(make_worker: MakeWorker, tasks: Sequence[Any]) -> Iterator[Outcome]:
    """Fan out over three workers, last task first."""
    workers = [make_worker() for _ in range(3)]
    for number, task in enumerate(reversed(tasks)):
        yield make_part(workers[number % 3], task)


def tree(folder: Path | str, *, without: tuple[str, ...] = (".tmp",)) -> dict[str, bytes]:
    """Return all files below a folder by relative name; folders in `without` are left out."""
    root = Path(folder)
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {name: path.read_bytes() for path in files if (name := path.relative_to(root).as_posix()).split("/")[0] not in without}
