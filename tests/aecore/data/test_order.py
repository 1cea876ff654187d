"""Laws of the epoch order: every sample once, the same batches for any number of ranks, resumable at any step."""

import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aecore.data.read.order import EpochOrder, TrainingOrder, locate
from aecore.errors import ConfigError


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[int], TrainingOrder]:
    counts = draw(st.lists(st.integers(0, 60), min_size=1, max_size=8).filter(sum))
    lanes = draw(st.integers(1, 12))
    return counts, TrainingOrder(seed=1, lanes=lanes, block=draw(st.integers(1, 20)), global_batch=lanes * draw(st.integers(1, 4)))


def batches(counts: list[int], order: TrainingOrder, world_size: int = 1, key: str = "k", epoch: int = 0) -> list[list[int]]:
    """All global batches as lists, put together from the ranks' parts by position (checks that positions are 0..n-1)."""
    out = []
    ranks = [EpochOrder(counts, key, replace(order, rank=rank, world_size=world_size), epoch) for rank in range(world_size)]
    for step in range(ranks[0].num_steps):
        parts = [rank.step(step) for rank in ranks]
        positions = np.concatenate([part.positions for part in parts])
        indices = np.concatenate([part.indices for part in parts])
        assert {part.num_global for part in parts} == {len(indices)}
        assert sorted(positions.tolist()) == list(range(len(indices)))
        assert all(np.all(np.diff(part.positions) > 0) for part in parts)
        out.append(indices[np.argsort(positions)].tolist())
    return out


@settings(max_examples=25, deadline=None)
@given(cases())
def test_every_sample_comes_exactly_once_for_any_number_of_ranks(case: tuple[list[int], TrainingOrder]) -> None:
    counts, order = case
    reference = batches(counts, order)
    assert sorted(sum(reference, [])) == list(range(sum(counts)))
    for world_size in range(2, order.lanes + 1):
        assert batches(counts, order, world_size) == reference


@settings(max_examples=60, deadline=None)
@given(cases())
def test_only_the_last_step_is_short_and_none_is_empty(case: tuple[list[int], TrainingOrder]) -> None:
    counts, order = case
    sizes = [len(batch) for batch in batches(counts, order)]
    assert all(size == order.global_batch for size in sizes[:-1])
    assert 0 < sizes[-1] <= order.global_batch


@settings(max_examples=40, deadline=None)
@given(cases(), st.data())
def test_any_step_is_found_without_walking_to_it(case: tuple[list[int], TrainingOrder], data: st.DataObject) -> None:
    counts, order = case
    world_size = data.draw(st.integers(1, order.lanes))
    last_rank = replace(order, rank=world_size - 1, world_size=world_size)
    walked = EpochOrder(counts, "k", last_rank, 3)
    start = data.draw(st.integers(0, walked.num_steps - 1))
    steps = [walked.step(step) for step in range(start + 1)]
    fresh = EpochOrder(counts, "k", last_rank, 3).step(start)
    np.testing.assert_array_equal(fresh.indices, steps[-1].indices)
    np.testing.assert_array_equal(fresh.positions, steps[-1].positions)


@settings(max_examples=40, deadline=None)
@given(cases())
def test_lanes_are_equal_ranges_of_the_permuted_stream(case: tuple[list[int], TrainingOrder]) -> None:
    counts, order = case
    lanes, block = order.lanes, order.block
    ranks = [EpochOrder(counts, "k", replace(order, rank=lane, world_size=lanes, global_batch=lanes), 0) for lane in range(lanes)]
    drawn = [np.concatenate([rank.step(row).indices for row in range(rank.num_steps)]) for rank in ranks]
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
        return batches([40, 30, 30], TrainingOrder(seed=seed, lanes=4, block=16, global_batch=8), key=key, epoch=epoch)

    orders = [order(), order(epoch=1), order(seed=1), order(key="other")]
    assert order() == orders[0]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_shards_are_permuted() -> None:
    counts, firsts = [10] * 20, set()
    for epoch in range(10):
        order = EpochOrder(counts, "k", TrainingOrder(lanes=1, block=5, global_batch=1), epoch)
        firsts.add(int(order.step(0).indices[0]) // 10)
    assert len(firsts) > 4


def test_the_order_is_frozen_for_all_versions() -> None:
    """A run resumed with another numpy or a later aecore sees the batches it would have seen; changing this breaks runs on disk."""
    order = TrainingOrder(seed=7, lanes=3, block=4, global_batch=6)
    assert batches([5, 0, 9, 3], order, key="key", epoch=2) == FROZEN


FROZEN = [[2, 8, 14, 1, 5, 11], [3, 7, 12, 0, 6, 13], [4, 10, 15, 9, 16]]


def test_an_epoch_of_imagenet_size_costs_seconds_not_minutes() -> None:
    began = time.process_time()
    order = EpochOrder([10_000] * 1281, "k", TrainingOrder(lanes=64, block=8192, global_batch=4096, rank=3, world_size=8), 0)
    seen = sum(len(order.step(step).indices) for step in range(order.num_steps))
    assert seen == pytest.approx(12_810_000 / 8, abs=16)
    assert time.process_time() - began < 5


def test_an_epoch_without_samples_has_no_steps() -> None:
    assert EpochOrder([0, 0], "k", TrainingOrder(), 0).num_steps == 0
    assert EpochOrder([], "k", TrainingOrder(), 0).num_steps == 0


def test_a_batch_that_the_lanes_do_not_divide_names_values_that_work() -> None:
    with pytest.raises(ConfigError, match=r"train.global_batch=96 or 112, or train.lanes=10"):
        TrainingOrder(global_batch=100, lanes=16)
    with pytest.raises(ConfigError, match=r"train.global_batch=16, or train.lanes=10"):
        TrainingOrder(global_batch=10, lanes=16)


def test_more_ranks_than_lanes_and_a_rank_that_is_not_there_are_refused() -> None:
    TrainingOrder(global_batch=128, lanes=16, world_size=16)
    with pytest.raises(ConfigError, match="17 ranks.*train.lanes>=17"):
        TrainingOrder(global_batch=16, lanes=16, world_size=17)
    with pytest.raises(ConfigError, match="rank 2 of 2 ranks"):
        TrainingOrder(rank=2, world_size=2)


def test_a_step_is_an_epoch_and_a_step_in_it() -> None:
    assert [locate(step, 3) for step in (0, 2, 3, 7)] == [(0, 0), (0, 2), (1, 0), (2, 1)]


@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any),
    lanes=st.sampled_from([1, 2, 4]),
    rows=st.integers(1, 3),
    block=st.integers(1, 20),
    data=st.data(),
)
def test_the_shards_to_come_are_those_that_the_rank_reads(counts, lanes, rows, block, data):
    world_size = data.draw(st.integers(1, lanes))
    order = TrainingOrder(
        lanes=lanes, block=block, global_batch=lanes * rows, rank=data.draw(st.integers(0, world_size - 1)), world_size=world_size
    )
    epoch, starts = EpochOrder(counts, "key", order, 0), np.cumsum(counts) - counts
    read = [set((np.searchsorted(starts, epoch.step(step).indices, side="right") - 1).tolist()) for step in range(epoch.num_steps)]
    for step in range(epoch.num_steps):
        now, later = ([shard for shard in shards.tolist() if counts[shard]] for shards in epoch.shards_from(step))
        assert len(now + later) == len({*now, *later})
        assert set().union(*read[step:]) <= {*now, *later}
        same_block = [other for other in range(step, epoch.num_steps) if epoch.block_of(other) == epoch.block_of(step)]
        assert set().union(*(read[other] for other in same_block[:-1])) <= set(now), "the last step may reach into the next block"
    assert set().union(*read) == {shard for shards in epoch.shards_from(0) for shard in shards.tolist() if counts[shard]}
