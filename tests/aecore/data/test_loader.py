"""Batches are the planned ones, for any number of ranks, from RAM or from disk; damage is found; nothing is left open."""

import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from aecore.data.dataset import Dataset
from aecore.data.read import rows as rows_module
from aecore.data.read.loader import InputSpec, Loader
from aecore.data.read.order import TrainingOrder
from aecore.errors import ConfigError, DataError
from tests.aecore.data import tiny

COUNTS = [7, 3, 9, 1, 12]  # 32 samples


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tiny.write_images(tmp_path_factory.mktemp("data"), COUNTS)


def loader(dataset: Dataset, **options: object) -> Loader:
    """A loader of the train split; `options` are `spec` and fields of the order."""
    spec = options.pop("spec", None)
    order = TrainingOrder(**{"lanes": 4, "block": 4, "global_batch": 8, "seed": 5, **options})  # type: ignore[arg-type]  # test
    return Loader(dataset, "train", spec=spec, order=order)  # type: ignore[arg-type]  # options of the test


@pytest.fixture(autouse=True, scope="module")
def nothing_left_behind() -> Iterator[None]:
    """After all tests of this file no thread and no descriptor is left."""
    gc.collect()
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    yield
    gc.collect()
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) <= files


SPECS = [InputSpec(cache=cache, prefetch=prefetch) for cache in ("auto", "none") for prefetch in (0, 2)]  # type: ignore[arg-type]


@pytest.mark.parametrize("spec", SPECS)
def test_a_batch_holds_the_pixels_ordinals_and_labels_of_its_samples(dataset: Dataset, spec: InputSpec) -> None:
    with loader(dataset, spec=spec) as source:
        seen = []
        for batch in source.batches(0, 2 * source.steps_per_epoch):
            assert batch.x.dtype == torch.uint8
            assert batch.x.shape[1:] == (1, 4, 4)
            assert batch.label is not None
            for x, ordinal, label in zip(batch.x, batch.ordinals.tolist(), batch.label.tolist(), strict=True):
                np.testing.assert_array_equal(x[0].numpy(), tiny.image(ordinal))
                assert label == ordinal % 3
            seen += batch.ordinals.tolist()
    assert sorted(seen) == sorted([*range(32), *range(32)])
    assert seen[:32] != seen[32:]


def test_batches_are_the_order_of_the_epoch(dataset: Dataset) -> None:
    with loader(dataset) as source:
        expected = source.epoch_order(1).step(2)
        batch = next(source.batches(source.steps_per_epoch + 2))
        np.testing.assert_array_equal(batch.ordinals, expected.indices)  # nothing was quarantined: ordinal = number
        np.testing.assert_array_equal(batch.positions, expected.positions)
        assert batch.num_global == expected.num_global


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_together_see_the_batches_of_one_rank(dataset: Dataset, world_size: int) -> None:
    with loader(dataset) as alone:
        whole = list(alone.batches(0, 8))
    parts = [list(loader(dataset, rank=rank, world_size=world_size).batches(0, 8)) for rank in range(world_size)]
    for step, batch in enumerate(whole):
        ranks = [part[step] for part in parts]
        places = torch.cat([part.positions for part in ranks])
        assert torch.equal(torch.cat([part.ordinals for part in ranks])[places.argsort()], batch.ordinals)
        assert {part.num_global for part in ranks} == {len(batch)}


def test_batches_continue_at_any_step(dataset: Dataset) -> None:
    with loader(dataset) as source:
        ordinals = [batch.ordinals.tolist() for batch in source.batches(0, 11)]
        for start in (0, 1, 3, 4, 5, 10, 11):
            assert [batch.ordinals.tolist() for batch in source.batches(start, 11)] == ordinals[start:]


def test_a_rank_without_samples_gets_one_row_of_no_weight(tmp_path: Path) -> None:
    dataset = tiny.write_images(tmp_path, [5])  # 4 lanes: two rows, the second with one sample
    ranks = [list(loader(dataset, global_batch=4, rank=rank, world_size=4).batches(0, 2)) for rank in range(4)]
    last = [rank[1] for rank in ranks]
    assert sorted(len(batch.positions) for batch in last) == [0, 0, 0, 1]
    assert all(len(batch) == 1 and batch.num_global == 1 and len(batch.ordinals) == len(batch.positions) for batch in last)
    assert sorted(torch.cat([batch.ordinals for rank in ranks for batch in rank]).tolist()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("spec", SPECS)
def test_ranges_are_contiguous_and_in_stored_order(dataset: Dataset, spec: InputSpec) -> None:
    with loader(dataset, spec=spec) as source:
        batches = list(source.range_batches(3, 25, 5))
        assert [len(batch) for batch in batches] == [5, 5, 5, 5, 2]
        assert torch.cat([batch.ordinals for batch in batches]).tolist() == list(range(3, 25))
        assert all(batch.positions.tolist() == list(range(len(batch))) and batch.num_global == len(batch) for batch in batches)
        assert list(source.range_batches(4, 4, 5)) == []
        with pytest.raises(DataError, match="32 samples"):
            source.range_batches(0, 33, 5)


def test_a_shard_is_read_in_cuts_of_its_own(dataset: Dataset) -> None:
    with loader(dataset) as source:
        shard = dataset.manifest.split("train")[2]
        cuts = list(source.shard_batches(shard, 4))
        assert [cut.rows.tolist() for cut in cuts] == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
        assert torch.cat([cut.batch.ordinals for cut in cuts]).tolist() == list(range(10, 19))
        assert not any(cut.bad for cut in cuts)


def broken_png() -> bytes:
    """A PNG that passes every header check (chunks and CRCs fit) and whose pixels end too early."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 4, 4, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0\0")) + chunk(b"IEND", b"")


def test_undecodable_samples_are_reported_when_encoding_and_end_training(tmp_path: Path) -> None:
    good = [tiny.encoded(tiny.image(number)) for number in range(6)]
    dataset = tiny.write(tmp_path, [[*good[:2], broken_png(), *good[3:5], broken_png()]])
    with loader(dataset, lanes=1, global_batch=2) as source:
        shard = dataset.manifest.split("train")[0]
        first, second = source.shard_batches(shard, 4)
        assert (first.rows.tolist(), first.batch.positions.tolist(), first.batch.num_global) == ([0, 1, 3], [0, 1, 3], 4)
        assert (second.rows.tolist(), second.batch.ordinals.tolist()) == ([4], [4])
        assert [(bad.row, bad.reason) for cut in (first, second) for bad in cut.bad] == [(2, "decode"), (5, "decode")]
        np.testing.assert_array_equal(first.batch.x[2, 0], tiny.image(3))
        with pytest.raises(DataError, match=r"'k2' of shard train-000000.*shards.check=decode"):
            list(source.range_batches(0, 4, 4))
        with pytest.raises(DataError, match="shards.check=decode"):
            list(source.batches(0, 3))
        (nothing,) = list(source.shard_batches(shard, 1))[2:3]
        assert (len(nothing.batch), nothing.rows.tolist(), len(nothing.bad)) == (0, [], 1)


def test_a_flipped_bit_is_found_and_named(tmp_path: Path) -> None:
    dataset = tiny.write_images(tmp_path, [4, 4])
    path = tmp_path / "shards" / "train-000001.tar"
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 10] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    with loader(dataset, global_batch=4) as source, pytest.raises(DataError, match=r"train-000001.*'k4'"):
        list(source.batches(0, 2))


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_missing_or_truncated_shard_is_found_and_named(tmp_path: Path, damage: str) -> None:
    dataset = tiny.write_images(tmp_path, [4, 4])
    path = tmp_path / "shards" / "train-000001.tar"
    data = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(data[:-1000])
    with loader(dataset, global_batch=4) as source, pytest.raises(DataError, match=r"train-000001\.tar"):
        list(source.batches(0, 2))


def test_once_all_is_in_ram_the_disk_is_not_read_any_more(tmp_path: Path) -> None:
    dataset = tiny.write_images(tmp_path, [4, 4])
    with loader(dataset, global_batch=4) as source:
        list(source.batches(0, 2))
        for path in (tmp_path / "shards").iterdir():
            path.unlink()
        assert sorted(torch.cat([batch.ordinals for batch in source.batches(2, 4)]).tolist()) == list(range(8))


def test_batches_from_ram_are_copies(dataset: Dataset) -> None:
    with loader(dataset) as source:
        for batch in source.range_batches(0, 4, 4):
            batch.x.zero_()
        again = next(source.range_batches(0, 4, 4))
        np.testing.assert_array_equal(again.x[1, 0], tiny.image(1))


def test_the_cache_takes_what_fits_its_limit(dataset: Dataset) -> None:
    nbytes = 32 * 16
    with pytest.raises(ConfigError, match=f"needs {nbytes} bytes.*input.cache_bytes is {nbytes - 1}"):
        loader(dataset, spec=InputSpec(cache="ram", cache_bytes=nbytes - 1))
    assert loader(dataset, spec=InputSpec(cache="ram", cache_bytes=nbytes)).rows.caching
    assert loader(dataset, spec=InputSpec(cache_bytes=nbytes)).rows.caching
    assert not loader(dataset, spec=InputSpec(cache_bytes=nbytes - 1)).rows.caching


def test_open_shards_are_bounded(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in ("MAX_OPEN", "MAX_INDEXED"):
        monkeypatch.setattr(rows_module, limit, 2 if limit == "MAX_OPEN" else 12)
        before = len(os.listdir("/proc/self/fd"))
        with loader(dataset, spec=InputSpec(cache="none", prefetch=0)) as source:
            seen = []
            for batch in source.batches(0, 4):
                seen += batch.ordinals.tolist()
                assert len(os.listdir("/proc/self/fd")) <= before + 3  # two, and the folder being listed
        assert sorted(seen) == list(range(32))


def test_a_quarantined_sample_leaves_a_hole_in_the_ordinals(tmp_path: Path) -> None:
    members = [tiny.encoded(tiny.image(0)), b"no image", tiny.encoded(tiny.image(2))]
    with loader(tiny.write(tmp_path, [members]), lanes=1, global_batch=2) as source:
        assert source.num_samples == 2
        (batch,) = source.range_batches(0, 2, 2)
        assert batch.ordinals.tolist() == [0, 2]


def test_data_without_labels_gives_batches_without_labels(tmp_path: Path) -> None:
    with loader(tiny.write_images(tmp_path, [8], labels=False)) as source:
        assert next(source.batches()).label is None


def test_jpeg_colour_images_come_as_channels_first(tmp_path: Path) -> None:
    pixels = np.full((6, 5, 3), (200, 100, 50), np.uint8)
    with loader(tiny.write(tmp_path, [[tiny.encoded(pixels, "JPEG")] * 4], ext="jpg"), global_batch=4) as source:
        x = next(source.batches()).x
    assert x.shape == (4, 3, 6, 5)
    assert (x.float().mean((0, 2, 3)) - torch.tensor([200.0, 100, 50])).abs().max() < 4


def test_an_unknown_split_an_unknown_shard_and_batches_without_an_order_are_refused(dataset: Dataset) -> None:
    with pytest.raises(DataError, match="no split 'validation'"):
        Loader(dataset, "validation")
    with pytest.raises(ConfigError, match="split 'train' has no training order: give it order="):
        next(Loader(dataset, "train").batches())
    with pytest.raises(DataError, match="no shard 'test-000000'"):
        other = dataset.manifest.split("train")[0]
        loader(dataset).shard_batches(type(other)(**{**{name: getattr(other, name) for name in other.__slots__}, "stem": "test-000000"}), 4)


@pytest.mark.parametrize("step", [1, 4, 6])
def test_any_rank_reads_the_whole_batch_of_a_step_again(dataset: Dataset, step: int) -> None:
    with loader(dataset) as alone, loader(dataset, rank=1, world_size=3) as one_of_three:
        (expected,) = alone.batches(step - 1, step)
        batch, rows = one_of_three.reread(step)
        assert rows is one_of_three.rows
        assert torch.equal(batch.x, expected.x)
        assert torch.equal(batch.ordinals, expected.ordinals)
        assert sum(map(len, (own.ordinals for own in one_of_three.batches(step - 1, step)))) < len(batch.ordinals), "it stays one of three"
