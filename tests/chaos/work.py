"""The commands of a round, the data they work on, and the comparison of what they made with what they make without faults."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.dataset as pads

from aecore.artifact.commit import newest_number
from aecore.checkpoint.files import newest_checkpoint
from aecore.data.dataset import open_dataset
from aecore.data.sources.sprites import SpritesSource, SpritesSpec
from aecore.errors import DataError
from aecore.store import open_store
from aecore.table.table import open_table
from aecore.training.metrics import read_rows

Rows = list[tuple[str, str]]  # key, value: every key once
MANIFEST_ROW = "the manifest"  # key of the row that is the hash of a dataset's manifest
FILTERED = 16  # one key of so many is asked for by a filter
NUM_IMAGES = {"one": 96, "two": 140}  # of the source of the first generation, and of that of the second
GONE, CHANGED = 6, 4  # images of the first generation that the second source lacks, and that have other pixels there
RECIPE = """\
name: chaos
source: {{kind: folder, url: {images}, name: images}}
splits: {{by: hash, test: 0.2}}
shards: {{max_samples: 16}}
model: {{kind: vae, latent_dim: 4, likelihood: bernoulli}}
backbone: {{kind: mlp, hidden: [32]}}
optim: {{kind: adam, lr: 1e-3}}
train: {{epochs: 100, max_steps: 32, global_batch: 16, log_every_s: 0.05}}
checkpoint: {{every_steps: 8}}
encode: {{batch: 16}}
cluster: {{num_workers: 0}}
"""


@dataclass(frozen=True)
class Work:
    """A command: what it makes below its `out`, the state (`one`, `two`) that it starts from and the one that it ends with.

    `command` gets `url(name)` and the name of `out`; `points` are the kinds of files it commits, for AECORE_FAULT.
    """

    name: str
    makes: tuple[str, ...]
    begins: str | None
    ends: str
    points: tuple[str, ...]
    command: Callable[[Callable[[str], str], str], list[str]]


def _shard(images: str) -> Callable[[Callable[[str], str], str], list[str]]:
    return lambda url, out: ["shard", url(f"images-{images}"), url(f"{out}/dataset"), "--recipe", url("recipe")]


def _train(url: Callable[[str], str], out: str) -> list[str]:
    return ["train", url("recipe"), f"data={url('one/dataset')}", f"out={url(f'{out}/run')}"]


def _encode(data: str) -> Callable[[Callable[[str], str], str], list[str]]:
    return lambda url, out: ["encode", url("one/run"), url(f"{data}/dataset"), url(f"{out}/table"), "--recipe", url("recipe")]


_SHARD = ("run", "listing", "tar", "index", "record", "manifest")
_TRAIN = ("run", "metrics", "weights", "config", "state", "checkpoint", "model")
_ENCODE = ("run", "part", "record", "manifest")
WORKS = (  # in the order in which each finds what it needs
    Work("shard", ("dataset",), None, "one", _SHARD, _shard("one")),
    Work("train", ("run",), None, "one", _TRAIN, _train),
    Work("encode", ("table",), None, "one", _ENCODE, _encode("one")),
    Work("follow", ("dataset",), "one", "two", (*_SHARD, "removal"), _shard("two")),
    Work("encode-follow", ("table",), "one", "two", _ENCODE, _encode("two")),
)
PIPELINE = Work(
    "pipeline",
    ("dataset", "run", "table"),
    None,
    "one",
    tuple(dict.fromkeys((*_SHARD, *_TRAIN, *_ENCODE))),
    lambda url, out: ["run", url("recipe"), f"out={url(out)}"],
)


def write_images(folder: Path, count: int, *, later: bool = False) -> None:
    """Write the first `count` of an even choice of sprites; `later`, the first ones are gone, and some after these are other sprites."""
    source = SpritesSource(SpritesSpec())
    names = sorted(source.listing().keys, key=lambda name: hashlib.sha256(name.encode()).digest())
    pixels = dict(zip(names, names[GONE:] if later else names, strict=False))
    for number, name in enumerate(names[:count]):
        if later and number < GONE:
            continue
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source.read(pixels[name] if number < GONE + CHANGED else name)[1])


def rows_of(kind: str, url: str) -> Rows:
    """Return what an artefact holds: samples, steps and weights, or latents, each with a key, and the manifest of a dataset.

    DataError, or another error of aecore, if it cannot be read.
    """
    return {"dataset": _samples, "run": _steps, "table": _latents}[kind](url)


def _samples(url: str) -> Rows:
    dataset, rows = open_dataset(url), Rows()
    for shard in dataset.manifest.shards:
        index = dataset.index(shard)
        for key, ordinal, sha256 in zip(*(index[name].to_pylist() for name in ("key", "ordinal", "sha256")), strict=True):
            rows.append((key, f"{shard.split} {ordinal} {sha256}"))
    number = newest_number(dataset.store, "dataset")
    return [*rows, (MANIFEST_ROW, hashlib.sha256(dataset.store.read(f"dataset.{number:06d}.json")).hexdigest())]


def _steps(url: str) -> Rows:
    store = open_store(url)
    checkpoint = newest_checkpoint(store)
    if checkpoint is None:
        raise DataError(f"{url} has no checkpoint")
    steps = [(str(row["step"]), json.dumps(row, sort_keys=True)) for row in read_rows(store, checkpoint.metrics)]
    return [*steps, ("the weights", hashlib.sha256(store.read("model/model.safetensors")).hexdigest())]


def _latents(url: str) -> Rows:
    """Return the rows of a table as columns, as a scan returns them, and some of them as a filter by key does."""
    table = open_table(url)
    scan, keys = table.dataset(), table.keys.to_pylist()
    columns = [table.arrow("ordinal").to_pylist(), table.arrow("label").to_pylist(), table.numpy("mu")]
    rows = [(key, _shown(*values)) for key, *values in zip(keys, *columns, strict=True)]
    rows += [(f"scanned {row['key']}", _shown(row["ordinal"], row["label"], row["mu"])) for row in _scanned(scan, None)]
    for key in sorted(keys)[::FILTERED]:
        rows += [(f"filtered {key}", _shown(row["ordinal"], row["label"], row["mu"])) for row in _scanned(scan, pc.field("key") == key)]
    return rows


def _scanned(scan: pads.Dataset, where: pc.Expression | None) -> list[dict[str, Any]]:
    return scan.to_table(["key", "ordinal", "label", "mu"], filter=where).to_pylist()


def _shown(ordinal: int, label: int | None, mu: Any) -> str:
    return f"{ordinal} {label} {np.asarray(mu, np.float32).tobytes().hex()}"


@dataclass
class Difference:
    """Keys that are lost or there more than once, and rows that are other rows or that nobody expects."""

    lost: int = 0
    doubled: int = 0
    wrong: int = 0

    def __bool__(self) -> bool:
        return bool(self.lost or self.doubled or self.wrong)


def difference(expected: Rows, found: Rows) -> Difference:
    """Compare what was made with what should be there."""
    wanted, counts = dict(expected), Counter(key for key, _ in found)
    return Difference(
        lost=len(wanted.keys() - counts.keys()),
        doubled=sum(count > 1 for count in counts.values()),
        wrong=sum(wanted.get(key) != value for key, value in found),
    )


def total(differences: Iterable[Difference]) -> Difference:
    """Return the sum."""
    every: Sequence[Difference] = list(differences)
    return Difference(sum(one.lost for one in every), sum(one.doubled for one in every), sum(one.wrong for one in every))
