"""Laws of the epoch order: every sample once, the same batches for any number of ranks, resumable at any step."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aecore.data.order import EpochOrder, check_lanes, locate
from aecore.errors import ConfigError


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[int], int, int, int]:
    counts = draw(st.lists(st.integers(0, 60), min_size=1, max_size=8).filter(sum))
    lanes = draw(st.integers(1, 12))
    return counts, lanes, draw(st.integers(1, 20)), lanes * draw(st.integers(1, 4))


def batches(order: EpochOrder, world: int, global_batch: int) -> list[list[int]]:
    """All global batches as lists, put together from the ranks' parts by position (checks that positions are 0..n-1)."""
    out = []
    for step in range(order.num_steps(global_batch)):
        parts = [order.step(step, rank, world, global_batch) for rank in range(world)]
        positions = np.concatenate([part.positions for part in parts])
        indices = np.concatenate([part.indices for part in parts])
        assert {part.num_global for part in parts} == {len(indices)}
        assert sorted(positions.tolist()) == list(range(len(indices)))
        assert all(np.all(np.diff(part.positions) > 0) for part in parts)
        out.append(indices[np.argsort(positions)].tolist())
    return out


@settings(max_examples=25, deadline=None)
@given(cases())
def test_every_sample_comes_exactly_once_for_any_number_of_ranks(case: tuple[list[int], int, int, int]) -> None:
    counts, lanes, block, global_batch = case
    reference = batches(EpochOrder(counts, "k", 1, 0, lanes, block), 1, global_batch)
    assert sorted(sum(reference, [])) == list(range(sum(counts)))
    for world in range(2, lanes + 1):
        assert batches(EpochOrder(counts, "k", 1, 0, lanes, block), world, global_batch) == reference


@settings(max_examples=60, deadline=None)
@given(cases())
def test_only_the_last_step_is_short_and_none_is_empty(case: tuple[list[int], int, int, int]) -> None:
    counts, lanes, block, global_batch = case
    sizes = [len(batch) for batch in batches(EpochOrder(counts, "k", 1, 0, lanes, block), 1, global_batch)]
    assert all(size == global_batch for size in sizes[:-1])
    assert 0 < sizes[-1] <= global_batch


@settings(max_examples=40, deadline=None)
@given(cases(), st.data())
def test_any_step_is_found_without_walking_to_it(case: tuple[list[int], int, int, int], data: st.DataObject) -> None:
    counts, lanes, block, global_batch = case
    walked = EpochOrder(counts, "k", 1, 3, lanes, block)
    world = data.draw(st.integers(1, lanes))
    start = data.draw(st.integers(0, walked.num_steps(global_batch) - 1))
    steps = [walked.step(step, world - 1, world, global_batch) for step in range(start + 1)]
    fresh = EpochOrder(counts, "k", 1, 3, lanes, block).step(start, world - 1, world, global_batch)
    np.testing.assert_array_equal(fresh.indices, steps[-1].indices)
    np.testing.assert_array_equal(fresh.positions, steps[-1].positions)


@settings(max_examples=40, deadline=None)
@given(cases())
def test_lanes_are_equal_ranges_of_the_permuted_stream(case: tuple[list[int], int, int, int]) -> None:
    counts, lanes, block, _ = case
    order = EpochOrder(counts, "k", 1, 0, lanes, block)
    columns = [[order.step(row, lane, lanes, lanes).indices for row in range(order.num_rows)] for lane in range(lanes)]
    drawn = [np.concatenate(column) for column in columns]
    sizes = [len(lane) for lane in drawn]
    assert max(sizes) - min(sizes) <= 1
    shard_of = np.repeat(np.arange(len(counts)), counts)
    # every lane holds whole runs of shards, each cut at most by a lane's end
    assert sum(len(np.unique(shard_of[lane])) for lane in drawn) <= np.count_nonzero(counts) + lanes - 1
    for lane in drawn:  # a block holds one range of the stream: samples move only inside their block
        for start in range(0, len(lane), block):
            for shard in np.unique(shard_of[lane[start : start + block]]):
                inside = lane[start : start + block][shard_of[lane[start : start + block]] == shard]
                assert inside.max() - inside.min() == len(inside) - 1


def test_epochs_seeds_and_data_give_other_orders() -> None:
    def order(key: str = "k", seed: int = 0, epoch: int = 0) -> list[list[int]]:
        return batches(EpochOrder([40, 30, 30], key, seed, epoch, 4, 16), 1, 8)

    orders = [order(), order(epoch=1), order(seed=1), order(key="other")]
    assert order() == orders[0]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_shards_are_permuted() -> None:
    counts, firsts = [10] * 20, set()
    for epoch in range(10):
        order = EpochOrder(counts, "k", 0, epoch, 1, 5)
        firsts.add(int(order.step(0, 0, 1, 1).indices[0]) // 10)
    assert len(firsts) > 4


def test_the_order_is_frozen_for_all_versions() -> None:
    """A run resumed with another numpy or a later aecore sees the batches it would have seen; changing this breaks runs on disk."""
    order = EpochOrder([5, 0, 9, 3], "key", 7, 2, 3, 4)
    assert batches(order, 1, 6) == FROZEN


FROZEN = [[2, 8, 14, 1, 5, 11], [3, 7, 12, 0, 6, 13], [4, 10, 15, 9, 16]]


def test_an_epoch_of_imagenet_size_costs_seconds_not_minutes() -> None:
    began = time.perf_counter()
    order = EpochOrder([10_000] * 1281, "k", 0, 0, 64, 8192)
    seen = sum(len(order.step(step, 3, 8, 4096).indices) for step in range(order.num_steps(4096)))
    assert seen == pytest.approx(12_810_000 / 8, abs=16)
    assert time.perf_counter() - began < 5


def test_an_epoch_without_samples_has_no_steps() -> None:
    assert EpochOrder([0, 0], "k", 0, 0, 4, 8).num_steps(8) == 0
    assert EpochOrder([], "k", 0, 0, 4, 8).num_steps(8) == 0


def test_a_batch_that_the_lanes_do_not_divide_names_values_that_work() -> None:
    with pytest.raises(ConfigError, match=r"train.global_batch=96 or 112, or train.lanes=10"):
        check_lanes(100, 16)
    with pytest.raises(ConfigError, match=r"train.global_batch=16, or train.lanes=10"):
        check_lanes(10, 16)


def test_more_ranks_than_lanes_is_refused() -> None:
    check_lanes(128, 16, 16)
    with pytest.raises(ConfigError, match="17 ranks.*train.lanes>=17"):
        check_lanes(16, 16, 17)


def test_a_step_is_an_epoch_and_a_step_in_it() -> None:
    assert [locate(step, 3) for step in (0, 2, 3, 7)] == [(0, 0), (0, 2), (1, 0), (2, 1)]
