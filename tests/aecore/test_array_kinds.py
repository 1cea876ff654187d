"""Every dtype, layout and number of channels of arrays that `shard` takes can be trained on and encoded, with numpy's values."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aecore.data.dataset import open_dataset
from aecore.data.format.transform import TransformSpec
from aecore.data.read.loader import Loader
from aecore.data.read.verify import verify_dataset
from aecore.data.sources.arrays import ArraysSpec
from aecore.data.sources.folder import FolderSpec
from aecore.data.write.job import shard_dataset
from aecore.encoding.job import encode_dataset
from aecore.errors import DataError
from aecore.training.loop import fit
from aecore.variational import VAESpec
from tests.aecore.training import small_job

RNG = np.random.default_rng(0)
DTYPES = ["?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", ">i2", ">u2", ">f4"]
SHAPES = {
    "grey": (9, 11),
    "one channel": (9, 11, 1),
    "two channels": (9, 11, 2),
    "colours": (9, 11, 3),
    "four channels": (9, 11, 4),
    "bands": (9, 11, 5),
    "channel first": (1, 9, 11),
    "colours first": (3, 9, 11),
    "a column": (9, 1, 1),
    "one pixel": (1, 1, 1),
    "a vector": (9,),
    "a sequence": (9, 1),
    "a volume": (5, 6, 7, 1),
}


def values(dtype: str, shape: tuple[int, ...]) -> Any:  # any: its dtype
    return RNG.integers(0, 100, shape).astype(dtype)


def as_network(sample: Any, shape: tuple[int, ...]) -> Any:  # any: arrays
    """Return a sample as networks take it: images with their channels first."""
    is_uint8 = sample.dtype == np.uint8
    last = len(shape) == 3 and (shape[2] < min(shape[:2]) or (is_uint8 and shape[2] in (1, 3, 4)))
    return np.moveaxis(sample, 2, 0) if last else sample[None] if len(shape) == 2 and is_uint8 else sample


def check(spec: Any, data: Any, shape: tuple[int, ...], root: Path) -> None:  # any: a source's spec, an array
    """Shard, verify, read, train one step on, and encode these samples."""
    url = str(root / "dataset")
    shard_dataset(spec, url)
    dataset = open_dataset(url)
    assert not verify_dataset(dataset, read_data=True).problems
    transform = TransformSpec(scale="none")
    with Loader(dataset, "train", transform=transform) as loader:
        found = [part.batch.x for shard in dataset.manifest.shards for part in loader.shard_batches(shard, 4)]
    expected = [as_network(sample, shape) for sample in data]
    assert sorted(map(known_by, torch.cat(found).numpy())) == sorted(map(known_by, expected))
    fit(small_job(url, root / "run", model=VAESpec(latent_dim=2), transform=transform, global_batch=16, max_steps=1))
    assert encode_dataset(str(root / "run"), url, str(root / "table")).num_rows == len(data)


def known_by(sample: Any) -> tuple[tuple[int, ...], list[float]]:  # any: an array
    return sample.shape, sample.astype(np.float64).ravel().tolist()


KINDS = [("one channel", dtype) for dtype in DTYPES] + [(what, dtype) for what in SHAPES for dtype in ("u1", "i2", "f4")]


@pytest.mark.parametrize(("what", "dtype"), dict.fromkeys(KINDS))
def test_rows_of_an_array(tmp_path: Path, what: str, dtype: str) -> None:
    data = values(dtype, (16, *SHAPES[what]))
    np.save(tmp_path / "digits.npy", data)
    check(ArraysSpec(url=str(tmp_path / "digits.npy")), data, SHAPES[what], tmp_path)


@pytest.mark.parametrize("dtype", ["i2", "u2", ">f4"])
@pytest.mark.parametrize("what", ["one channel", "a column", "a vector"])
def test_files_that_are_samples(tmp_path: Path, what: str, dtype: str) -> None:
    data = values(dtype, (16, *SHAPES[what]))
    (tmp_path / "files").mkdir()
    for number, sample in enumerate(data):
        np.save(tmp_path / f"files/{number:02}.npy", sample if number % 2 else np.asfortranarray(sample))
    check(FolderSpec(url=str(tmp_path / "files"), extensions=("npy",)), data, SHAPES[what], tmp_path)


def test_numbers_that_no_network_takes_are_refused_with_what_to_save(tmp_path: Path) -> None:
    np.save(tmp_path / "digits.npy", values("g", (16, 9, 11)))
    with pytest.raises(DataError, match=r"longdouble|float128") as raised:
        shard_dataset(ArraysSpec(url=str(tmp_path / "digits.npy")), str(tmp_path / "dataset"))
    assert "save array.astype('float64')" in str(raised.value)
