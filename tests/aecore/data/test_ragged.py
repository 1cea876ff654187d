"""Sequences of different lengths: what the index says, what a batch holds, what is refused."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch

from aecore.data.format.decode import DecodeError
from aecore.data.format.ragged import SequenceDecoder
from aecore.data.format.sample_format import SampleFormat, sequence_shape
from aecore.data.format.transform import Transform, TransformSpec
from aecore.data.read.loader import InputSpec, Loader
from aecore.data.read.order import TrainingOrder
from aecore.errors import DataError
from tests.aecore.data.sequences import dataset_of, sentence, wave
from tests.aecore.data.tiny import write

ORDER = TrainingOrder(seed=0, lanes=2, block=8, global_batch=6)


def npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def rows_of(batch):
    """Each row of a batch without what fills it up."""
    return [batch.x[row, :length].numpy() for row, length in enumerate(batch.lengths.tolist())]


@pytest.mark.parametrize("cache", ["ram", "none"])
@pytest.mark.parametrize("make", [wave, sentence])
def test_batches_hold_the_sequences_filled_with_zeros_to_the_longest_of_each(tmp_path: Path, cache, make) -> None:
    samples = [make(number) for number in range(20)]
    dataset = dataset_of(tmp_path, samples)
    known = {sample.tobytes() for sample in samples}
    with Loader(dataset, "train", spec=InputSpec(cache=cache), order=ORDER) as loader:
        for _ in range(2):
            seen = set()
            for batch in loader.batches(0, loader.steps_per_epoch):
                assert batch.x.shape[1] == batch.lengths.max() and batch.lengths.dtype == torch.int64
                assert batch.x.dtype == torch.from_numpy(samples[0]).dtype
                seen |= {row.tobytes() for row in rows_of(batch)}
                assert all(not batch.x[row, length:].any() for row, length in enumerate(batch.lengths.tolist()))
            assert seen == known


def test_index_and_manifest_know_the_lengths(tmp_path: Path) -> None:
    samples = [wave(number) for number in range(10)]
    dataset = dataset_of(tmp_path, samples)
    found = {}
    for shard in dataset.manifest.shards:
        index = dataset.reader(shard).index
        found |= dict(zip(index["source"].to_pylist(), index["length"].to_pylist(), strict=True))
    assert [found[f"train/{number % 3}/{number:04d}.npy"] for number in range(10)] == [len(sample) for sample in samples]
    assert dataset.input_shape(sequences=True) == (0, 2)


def test_a_shard_is_read_with_lengths_and_damaged_rows_are_left_out(tmp_path: Path) -> None:
    members = [npy(wave(3)), npy(np.zeros((0, 2), np.float32)), npy(wave(4)), npy(np.zeros((4, 3), np.float32))]
    decoder = SequenceDecoder(SampleFormat((12, 2), np.dtype("f4"), image=False, varying=True))
    bad: list[DecodeError] = []
    pixels, lengths = decoder.batch(members, bad.append)
    assert [(error.row, error.reason) for error in bad] == [(1, "empty"), (3, "shape")]
    for row, number in ((0, 3), (2, 4)):
        assert np.array_equal(pixels[row, : lengths[row]], wave(number))
    with pytest.raises(DecodeError, match="no step"):
        decoder.batch(members)
    with pytest.raises(DecodeError, match="at most 12 steps"):
        decoder.batch([npy(np.zeros((13, 2), np.float32))])
    with pytest.raises(DecodeError, match="not a .npy file"):
        decoder.batch([b"no array"])


def test_an_empty_sequence_is_quarantined_when_it_is_sharded(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, [wave(0), np.zeros((0, 2), np.float32), wave(2)], max_bad=0.5)
    assert dataset.manifest.num_samples() == 2
    assert dict(dataset.manifest.reasons) == {"empty": 1}


def test_samples_of_one_shape_are_read_as_before(tmp_path: Path) -> None:
    samples = [np.full((5, 2), number, np.float32) for number in range(8)]
    dataset = write(tmp_path, [[npy(sample) for sample in samples]], ext="npy")
    with Loader(dataset, "train") as loader:
        (batch,) = loader.range_batches(0, 8, 8)
    assert batch.lengths is None
    assert np.array_equal(batch.x.numpy(), np.stack(samples))
    assert dataset.input_shape(sequences=True) == dataset.input_shape() == (5, 2)


def test_a_model_that_takes_no_lengths_is_told_which_does(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, [wave(number) for number in range(6)])
    with pytest.raises(DataError, match=r"different shapes .*sequences of different lengths.*model.kind=rvae"):
        dataset.input_shape()


@pytest.mark.parametrize(
    ("forms", "shape"),
    [
        (["5x2/float32", "7x2/float32"], (0, 2)),
        (["5/int64", "7/int64"], (0,)),
        (["5x3x8x9/uint8", "7x3x8x9/uint8"], (0, 3, 8, 9)),
        (["5x2/float32", "7x3/float32"], None),
        (["5x2/float32", "7x2/float64"], None),
        (["5x2/float32", "7/float32"], None),
        (["/float32", "7/float32"], None),
        (["28x28x1/L", "32x28x1/L"], None),
        (["28x28x1/L", "28x28x3/RGB"], None),
    ],
)
def test_sequences_differ_in_their_first_axis_alone(forms: list[str], shape: tuple[int, ...] | None) -> None:
    assert sequence_shape(set(map(SampleFormat.parse, forms))) == shape
    if shape is None:
        with pytest.raises(DataError, match="different formats"):
            SampleFormat.from_shapes(dict.fromkeys(forms, 1), sequences=True)


def test_float_sequences_are_scaled_to_contiguous_batches(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, [wave(number) for number in range(6)])
    with Loader(dataset, "train") as loader:
        (batch,) = loader.range_batches(0, 6, 6)
    ready = Transform(TransformSpec())(batch)
    assert ready.x.is_contiguous()
    assert torch.equal(ready.lengths, batch.lengths)
    assert torch.equal(ready.x, batch.x)


def test_every_rank_pads_its_own_rows_and_all_see_every_sequence_once(tmp_path: Path) -> None:
    samples = [wave(number) for number in range(20)]
    dataset = dataset_of(tmp_path, samples)
    seen: list[bytes] = []
    for rank in range(2):
        order = TrainingOrder(seed=0, lanes=2, block=8, global_batch=6, rank=rank, world_size=2)
        with Loader(dataset, "train", order=order) as loader:
            for batch in loader.batches(0, loader.steps_per_epoch):
                seen += [row.tobytes() for row in rows_of(batch)[: len(batch.positions)]]
    assert sorted(seen) == sorted(sample.tobytes() for sample in samples)
