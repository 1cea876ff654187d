"""Partners share the label, or all factors but k; they are drawn uniformly, and are the same for any ranks, batches and start."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from aecore.data.dataset import Dataset, open_dataset
from aecore.data.read.loader import InputSpec, Loader
from aecore.data.read.order import TrainingOrder
from aecore.data.read.pairs import Draws, FactorPartners, LabelPartners, PairSpec
from aecore.data.sources.sprites import SpritesSpec
from aecore.data.write.job import shard_dataset
from aecore.data.write.plan import SplitSpec
from aecore.data.write.spec import ShardSpec
from aecore.errors import ConfigError, DataError
from tests.aecore.data import tiny

LEVELS = (3, 4, 2, 5)
GRID = np.array(list(itertools.product(*map(range, LEVELS))))  # 120 samples


def by_label(labels: list[int], key: str = "key") -> LabelPartners:
    return LabelPartners("here", np.array(labels), Draws(key, np.arange(len(labels))))


def by_factors(grid: np.ndarray, k: object = "random", key: str = "key") -> FactorPartners:
    levels = {f"f{column}": grid[:, column] for column in range(grid.shape[1])}
    return FactorPartners("here", levels, k, Draws(key, np.arange(len(grid))))  # type: ignore[arg-type]


def require_uniform(counts: np.ndarray) -> None:
    """Chi-square within six standard deviations of its mean: a fair draw fails once in 10^9."""
    expected = counts.sum() / len(counts)
    freedom = len(counts) - 1
    assert expected > 20, "too few draws to tell"
    assert abs(((counts - expected) ** 2 / expected).sum() - freedom) < 6 * (2 * freedom) ** 0.5, counts


def test_partners_share_the_label_and_every_other_sample_is_as_likely() -> None:
    labels = np.array([0, 1, 0, 2, 1, 0, 2, 0])
    partners = by_label(labels.tolist())
    drawn = np.stack([partners.partners_of(np.arange(8), epoch) for epoch in range(3000)])
    assert (labels[drawn] == labels).all()
    assert (drawn != np.arange(8)).all()
    require_uniform(np.bincount(drawn[:, 2], minlength=8)[[0, 5, 7]])
    pairs = np.bincount(drawn[:, 0] * 8 + drawn[:, 5], minlength=64).reshape(8, 8)[[2, 5, 7]][:, [0, 2, 7]]
    require_uniform(pairs.ravel())  # the draws of two samples do not follow each other
    turns = np.bincount(drawn[:-1, 0] * 8 + drawn[1:, 0], minlength=64).reshape(8, 8)[[2, 5, 7]][:, [2, 5, 7]]
    require_uniform(turns.ravel())  # nor do those of two epochs


def test_a_sample_alone_in_its_class_is_its_own_partner_and_a_note_says_so() -> None:
    partners = by_label([0, 1, 0, 2])
    assert partners.partners_of(np.array([1, 3, 0]), 0).tolist() == [1, 3, 2]
    assert partners.notes[-1] == "2 of 3 classes in here have one sample, which is paired with itself"
    assert len(by_label([0, 0, 1, 1]).notes) == 1
    with pytest.raises(DataError, match="every class in here has one sample"):
        by_label([0, 1, 2])
    with pytest.raises(DataError, match="1 of 3 samples in here have no label"):
        by_label([0, -1, 0])


@pytest.mark.parametrize("k", [1, 2, 3])
def test_partners_differ_in_exactly_k_factors_every_set_alike(k: int) -> None:
    partners = by_factors(GRID, k)
    rows = np.arange(len(GRID))
    drawn = np.concatenate([partners.partners_of(rows, epoch) for epoch in range(40)])
    changed = GRID[drawn] != np.tile(GRID, (40, 1))
    assert (changed.sum(1) == k).all()
    sets = [list(chosen) for chosen in itertools.combinations(range(4), k)]
    codes = changed @ (1 << np.arange(4))
    require_uniform(np.array([(codes == sum(1 << column for column in chosen)).sum() for chosen in sets]))
    new_levels = GRID[drawn][changed[:, 3], 3]
    require_uniform(np.bincount(new_levels))


def test_a_random_k_is_drawn_per_pair_from_one_to_one_less_than_all() -> None:
    partners = by_factors(GRID)
    drawn = np.concatenate([partners.partners_of(np.arange(len(GRID)), epoch) for epoch in range(20)])
    differing = (GRID[drawn] != np.tile(GRID, (20, 1))).sum(1)
    require_uniform(np.bincount(differing, minlength=5)[1:4])
    assert set(differing) == {1, 2, 3}


@pytest.mark.parametrize("k", [1, 2, "random"])
def test_in_a_grid_with_holes_partners_still_differ_in_k_factors(k: object) -> None:
    present = GRID[np.random.default_rng(0).random(len(GRID)) < 0.3]
    partners = by_factors(present, k)
    found = np.concatenate([partners.partners_of(np.arange(len(present)), epoch) for epoch in range(30)])
    differing = (present[found] != np.tile(present, (30, 1))).sum(1).reshape(30, -1)
    possible = np.array([[((present != row).sum(1) == number).any() for number in range(5)] for row in present])
    if k == "random":
        assert ((differing >= 1) & (differing <= 3)).all()
    else:
        assert (differing[:, possible[:, k]] == k).all()
        assert (differing[:, ~possible[:, k]] == 0).all(), "paired with themselves"


def test_samples_of_the_same_factors_are_as_likely_as_each_other() -> None:
    twice = np.repeat(np.array([[0, 0], [0, 1], [1, 1]]), [1, 3, 2], axis=0)
    partners = by_factors(twice, 1)
    drawn = np.array([partners.partners_of(np.array([0]), epoch)[0] for epoch in range(300)])
    require_uniform(np.bincount(drawn, minlength=6)[1:4])


def test_factors_without_partners_are_noted_or_refused() -> None:
    some = by_factors(np.array([[0, 0, 0], [0, 0, 1], [1, 1, 0], [2, 2, 2]]), 1)
    assert some.partners_of(np.arange(4), 0).tolist() == [1, 0, 2, 3]
    assert "2 of 4 sampled rows of here have no partner that differs in 1 of 3 factors: paired with themselves" in some.notes[-1]
    with pytest.raises(DataError, match="no two samples of here differ in 1 of 3 factors \\(f0, f1, f2\\): use another pairs.k"):
        by_factors(np.array([[0, 0, 0], [1, 1, 1], [2, 2, 2]]), 1)
    with pytest.raises(DataError, match="at least 2 factor_\\* columns that vary in here, found f1: use pairs.by=label"):
        by_factors(np.array([[0, 0], [0, 1]]))
    with pytest.raises(ConfigError, match="pairs.k is 4, expected 1 to 3: .* of the 4 factors that vary in here \\(f0, f1, f2, f3\\)"):
        by_factors(GRID, 4)
    with pytest.raises(DataError, match="over 2\\^62 combinations"):
        by_factors(np.stack([np.arange(100_000)] * 4, axis=1))


def test_partners_depend_on_split_seed_epoch_and_ordinal_only() -> None:
    rows = np.arange(len(GRID))
    partners = by_factors(GRID)
    together = partners.partners_of(rows, 3)
    alone = np.concatenate([partners.partners_of(rows[start : start + 7], 3) for start in range(0, len(rows), 7)])
    assert (together == alone).all()
    for other in (by_factors(GRID, key="other").partners_of(rows, 3), partners.partners_of(rows, 4)):
        assert (together != other).mean() > 0.8
    pinned = by_label([0] * 1000).partners_of(np.array([0, 1, 2, 3, 999]), 7)
    assert pinned.tolist() == [964, 23, 395, 779, 171], "runs in progress would draw other pairs"


def loader(dataset: Dataset, pairs: PairSpec, rank: int = 0, world_size: int = 1, **spec: object) -> Loader:
    order = TrainingOrder(lanes=4, block=4, global_batch=8, seed=5, rank=rank, world_size=world_size)
    return Loader(dataset, "train", order=order, pairs=pairs, spec=InputSpec(**spec))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tiny.write_images(tmp_path_factory.mktemp("pairs"), [7, 3, 9, 1, 12])


@pytest.fixture(scope="module")
def sprites(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("sprites")
    spec = SpritesSpec(size=8, scales=2, positions=3)
    shard_dataset(spec, str(folder), SplitSpec(by="hash", test=0.1), ShardSpec(max_samples=20))
    return open_dataset(str(folder))


def number_of(image: torch.Tensor) -> int:
    return int(image[0, 0, 0]) + 256 * int(image[0, 0, 1])


@pytest.mark.parametrize("cache", ["ram", "none"])
def test_batches_hold_the_pixels_of_the_partners(labelled: Dataset, cache: str) -> None:
    with loader(labelled, PairSpec(), cache=cache) as source:
        seen = 0
        for batch in source.batches(0, 2 * source.steps_per_epoch):
            assert batch.x_pair is not None
            assert batch.x_pair.shape == batch.x.shape
            for x, x_pair, ordinal in zip(batch.x, batch.x_pair, batch.ordinals.tolist(), strict=True):
                assert number_of(x) == ordinal
                assert number_of(x_pair) % 3 == ordinal % 3
                assert number_of(x_pair) != ordinal
                np.testing.assert_array_equal(x_pair[0].numpy(), tiny.image(number_of(x_pair)))
                seen += 1
        assert seen == 2 * 32
        assert next(source.range_batches(0, 4, 4)).x_pair is None


def pairs_by_sample(batches: list) -> dict[tuple[int, int], bytes]:
    """(step, ordinal) -> pixels of the partner."""
    found = {}
    for step, batch in enumerate(batches):
        for ordinal, x_pair in zip(batch.ordinals.tolist(), batch.x_pair, strict=False):
            found[step, ordinal] = x_pair.numpy().tobytes()
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_draw_the_pairs_of_one_rank(labelled: Dataset, sprites: Dataset, world_size: int) -> None:
    for dataset in (labelled, sprites):
        with loader(dataset, PairSpec()) as alone:
            expected = pairs_by_sample(list(alone.batches(0, 8)))
        found: dict = {}
        for rank in range(world_size):
            with loader(dataset, PairSpec(), rank, world_size, cache="none") as part:
                mine = pairs_by_sample(list(part.batches(0, 8)))
                assert not set(mine) & set(found)
                found |= mine
        assert found == expected


def test_a_resumed_order_goes_on_with_the_same_pairs(sprites: Dataset) -> None:
    with loader(sprites, PairSpec(k=1)) as source:
        whole = list(source.batches(0, 12))
    with loader(sprites, PairSpec(k=1)) as source:
        rest = list(source.batches(5, 12))
    for one, two in zip(whole[5:], rest, strict=True):
        assert torch.equal(one.x, two.x)
        assert one.x_pair is not None
        assert two.x_pair is not None
        assert torch.equal(one.x_pair, two.x_pair)


def test_a_rank_without_a_sample_still_has_a_pair_to_run(tmp_path: Path) -> None:
    dataset = tiny.write_images(tmp_path / "data", [9])  # the second step of 8 has one sample for four ranks
    with loader(dataset, PairSpec(), 0, 4) as source:
        last = list(source.batches(0, 2))[1]
    assert len(last.positions) == 0
    assert last.x_pair is not None
    assert last.x_pair.shape == last.x.shape == (1, 1, 4, 4)


def test_auto_takes_factors_where_there_are_some(labelled: Dataset, sprites: Dataset) -> None:
    for dataset, kind in ((labelled, LabelPartners), (sprites, FactorPartners)):
        with loader(dataset, PairSpec()) as source:
            assert isinstance(source.partners, kind)
    with loader(sprites, PairSpec(by="label")) as source:
        assert isinstance(source.partners, LabelPartners)
    with loader(sprites, PairSpec(k=1)) as source:
        assert source.partners is not None
        assert source.partners.notes[0] == "pairs differ in 1 of 4 factors (shape, scale, x, y)"


def test_what_the_data_do_not_have_is_an_error_that_says_so(tmp_path: Path, labelled: Dataset) -> None:
    bare = tiny.write_images(tmp_path / "bare", [8], labels=False)
    for dataset, spec, error, message in (
        (bare, PairSpec(by="label"), DataError, "has no labels, which pairs.by=label needs"),
        (bare, PairSpec(), DataError, r"has neither labels nor factor_\* columns to draw pairs by"),
        (labelled, PairSpec(by="factors"), DataError, r"needs at least 2 factor_\* columns that vary in split 'train' of .*, found none"),
        (labelled, PairSpec(k=1), ConfigError, r"pairs.k is 1, but split 'train' of .* has no factor_\* columns"),
    ):
        with loader(dataset, spec) as source, pytest.raises(error, match=message):
            next(source.batches(0, 1))


def test_a_spec_refuses_what_cannot_be() -> None:
    with pytest.raises(ConfigError, match="PairSpec.k is 'rnd', expected a number from 1 or 'random'"):
        PairSpec(k="rnd")
    with pytest.raises(ConfigError, match="PairSpec.k is 2, which PairSpec.by=label does not use"):
        PairSpec(by="label", k=2)
    with pytest.raises(ConfigError, match="PairSpec.k is 0, expected >= 1"):
        PairSpec(k=0)
