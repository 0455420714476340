"""Learned operands: draws have the marginals and correlations of what was learned, and predict errors of real ones."""

import math
from functools import reduce
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from loka.errors import ArgumentError
from loka.formats import DEFAULT_RECIPES, PASS_OPERANDS, RECIPES
from loka.numerics import product_error
from loka.probes.distributions.closed_form import ProductStatistics
from loka.probes.distributions.covariance import RANK
from loka.probes.distributions.gather import gather_bytes, packed, reduced, unpacked
from loka.probes.distributions.learned import Draw, OperandDistribution, predict, predictions
from loka.quantize import fake_quantize
from tests.made_processes import ranks

ROOT = Path(__file__).parents[2]


def generated(seed=0):
    return torch.Generator().manual_seed(seed)


MIX = torch.randn(6, 48, generator=generated(99))


def realistic(rows, seed=0, features=48):
    """Correlated, shifted, heavy-tailed in some features, rectified in others, one constant, one ten times as loud."""
    generator = generated(seed)
    mix = MIX.repeat(1, math.ceil(features / 48))[:, :features]
    x = torch.randn(rows, 6, generator=generator) @ mix + torch.randn(rows, features, generator=generator)
    x[:, : features // 3] = (x[:, : features // 3] / 2.5).sinh()
    x[:, features // 3 : features // 2].relu_()
    x[:, -1] *= 10
    x[:, 3] = 0.7
    return x


def learned(rows=2048, seed=0, features=48, rank=None):
    x = realistic(rows, seed, features)
    parts = [OperandDistribution.of(part, seed=number, rank=rank) for number, part in enumerate(x.split(512))]
    return reduce(lambda one, two: one.merge(two), parts)


def correlation(x):
    return torch.corrcoef(x.T.double()).nan_to_num()


# --- draws ---


@pytest.mark.parametrize("kind", ["copula", "gaussian", "normal"])
@pytest.mark.parametrize("rank", [None, 8])
def test_the_same_generator_state_gives_the_same_rows(kind, rank):
    state = learned(rank=rank)
    one, two = (state.sample(5000, generated(5), kind=kind) for _ in range(2))
    assert torch.equal(one, two)
    assert one.shape == (5000, 48)
    assert one.dtype == torch.float32
    assert not torch.equal(one, state.sample(5000, generated(6), kind=kind))
    generator = generated(5)
    assert not torch.equal(state.sample(8, generator, kind=kind), state.sample(8, generator, kind=kind))
    assert torch.equal(state.sampler(kind).draw(5000, generated(5)), one)


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    state = learned(64)
    state.sample(10, generated())
    assert torch.equal(torch.get_rng_state(), before)


def test_marginals_of_the_copula_are_those_of_the_data():
    state, later = learned(), realistic(8000, seed=1)
    drawn = state.sample(8000, generated())
    distance = [stats.ks_2samp(drawn[:, k].numpy(), later[:, k].numpy()).statistic for k in range(48)]
    rectified = slice(16, 24)
    # Learned from a sample of 256 rows, whose own distance is up to 1.95 / sqrt(256) = 0.122 at p = 0.001. Where half
    # of the rows is zero, the grid's step from there to its next point is drawn as a slope.
    assert max(np.delete(distance, rectified)) < 0.125
    assert max(distance[rectified]) < 0.15
    assert np.median(distance) < 0.055
    gaussian = state.sample(8000, generated(), kind="gaussian")
    assert (drawn[:, rectified] < 0).sum() == 0
    assert (gaussian[:, rectified] < 0).float().mean() > 0.1


def test_draws_stay_between_minimum_and_maximum():
    state = learned()
    drawn = state.sample(20_000, generated())
    assert (drawn.amin(0) >= torch.from_numpy(state.quantiles.low)).all()
    assert (drawn.amax(0) <= torch.from_numpy(state.quantiles.high)).all()


@pytest.mark.parametrize("rank", [None, 16])
def test_scores_of_draws_are_correlated_as_those_of_the_data(rank):
    state, later = learned(rank=rank), realistic(8000, seed=1)
    drawn = state.sample(8000, generated())
    one, two = (correlation(torch.from_numpy(stats.rankdata(x, axis=0))) for x in (drawn, later))
    off = ~torch.eye(48, dtype=torch.bool)
    assert (one - two)[off].abs().max() < (0.13 if rank is None else 0.25)
    assert (one - two)[off].abs().mean() < 0.04
    assert two[off].abs().mean() > 0.2


@pytest.mark.parametrize("rank", [None, 16])
def test_the_gaussian_has_mean_and_covariance_of_the_data(rank):
    state = learned(rank=rank)
    drawn = state.sample(40_000, generated(), kind="gaussian").double()
    spread = state.raw.variance.sqrt()
    assert ((drawn.mean(0) - state.raw.mean).abs() < 0.03 * spread + 1e-6).all()
    torch.testing.assert_close(drawn.var(0), state.raw.variance, rtol=0.05, atol=1e-9)
    data = realistic(2048)
    difference = (correlation(drawn) - correlation(data)).abs()
    assert difference.max() < (0.04 if rank is None else 0.2)
    assert difference.mean() < (0.01 if rank is None else 0.04)


def test_the_normal_kind_is_standard_normal():
    drawn = learned(64).sample(20_000, generated(), kind="normal")
    assert stats.kstest(drawn.flatten()[:20_000].numpy(), "norm").statistic < 0.015
    assert correlation(drawn).fill_diagonal_(0).abs().max() < 0.04


@pytest.mark.parametrize("kind", ["copula", "gaussian"])
@pytest.mark.parametrize("rank", [None, 8])
def test_constant_features_stay_constant(kind, rank):
    drawn = learned(rank=rank).sample(500, generated(), kind=kind)
    assert (drawn[:, 3] == torch.tensor(0.7)).all()


@pytest.mark.parametrize("kind", ["copula", "gaussian"])
def test_of_no_rows_zeros_are_drawn(kind):
    for state in (OperandDistribution.empty(5), OperandDistribution.of(torch.empty(0, 5), seed=0)):
        assert (state.count, state.features) == (0, 5)
        assert torch.equal(state.sample(3, generated(), kind=kind), torch.zeros(3, 5))
    assert OperandDistribution.empty(5).sample(0, generated()).shape == (0, 5)


@pytest.mark.parametrize("kind", ["copula", "gaussian"])
def test_of_one_row_that_row_is_drawn(kind):
    state = OperandDistribution.of(torch.tensor([[1.0, -2.0, 0.0]]), seed=0)
    assert torch.equal(state.sample(2, generated(), kind=kind), torch.tensor([[1.0, -2.0, 0.0]] * 2))


def test_wide_operands_are_drawn_in_low_rank_and_in_blocks():
    generator = generated()
    factor = torch.randn(4, 3000, generator=generator)
    rows = torch.randn(400, 4, generator=generator) @ factor + 0.3 * torch.randn(400, 3000, generator=generator)
    state = OperandDistribution.of(rows, seed=0)
    assert (state.scores.rank, state.raw.rank) == (RANK, RANK)
    drawn = state.sample(400, generated(1))
    first = slice(0, 40)
    assert (correlation(drawn[:, first]) - correlation(rows[:, first])).abs().mean() < 0.06
    assert correlation(rows[:, first]).abs().mean() > 0.3


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_that_are_not_finite_are_left_out(bad):
    rows = realistic(100)
    rows[5, 5] = bad
    state = OperandDistribution.of(rows, seed=0)
    assert (state.count, state.quantiles.skipped, state.raw.skipped) == (99, 1, 1)
    assert state.sample(50, generated()).isfinite().all()


@pytest.mark.gpu
def test_rows_on_a_gpu_are_learned_and_drawn_on_the_cpu():
    x = realistic(300)
    on_cpu, on_gpu = (OperandDistribution.of(rows, seed=0) for rows in (x, x.cuda()))
    assert torch.equal(on_gpu.quantiles.grid(), on_cpu.quantiles.grid())
    for kind in ("copula", "gaussian"):
        one, two = (state.sample(50, generated(), kind=kind) for state in (on_cpu, on_gpu.merge(on_cpu)))
        assert two.device.type == "cpu"
        assert one.shape == two.shape


# --- parts and storage ---


def test_merging_does_not_depend_on_order():
    parts = [OperandDistribution.of(realistic(300, seed), seed=seed) for seed in range(3)]
    one = parts[0].merge(parts[1]).merge(parts[2])
    two = parts[2].merge(parts[0].merge(parts[1]).merge(OperandDistribution.empty(48)))
    assert one.count == two.count == 900
    assert torch.equal(one.quantiles.grid(), two.quantiles.grid())
    torch.testing.assert_close(one.scores.matrix, two.scores.matrix, rtol=0, atol=1e-6)
    torch.testing.assert_close(one.raw.matrix, two.raw.matrix, rtol=0, atol=1e-6)


def test_other_features_or_ranks_are_refused():
    with pytest.raises(ArgumentError, match="cannot be merged"):
        OperandDistribution.empty(3).merge(OperandDistribution.empty(4))
    with pytest.raises(ArgumentError, match="rank"):
        OperandDistribution.empty(3, rank=8).merge(OperandDistribution.empty(3))


@pytest.mark.parametrize("rank", [None, 8])
def test_what_is_stored_draws_the_same(rank):
    state = learned(rank=rank)
    arrays = state.arrays()
    assert not any("rows" in name for name in arrays)
    again = OperandDistribution.from_arrays(unpacked(packed(arrays)))
    for kind in ("copula", "gaussian"):
        assert torch.equal(again.sample(100, generated(), kind=kind), state.sample(100, generated(), kind=kind))
    empty = OperandDistribution.empty(48, rank=rank)
    assert OperandDistribution.from_arrays(empty.arrays()).merge(state).count == state.count


def test_restored_parts_merge():
    whole = learned(4096)
    halves = [OperandDistribution.of(half, seed=number) for number, half in enumerate(realistic(4096).split(2048))]
    stored = [OperandDistribution.from_arrays(half.arrays()) for half in halves]
    mixed = stored[0].merge(stored[1])
    assert mixed.count == 4096
    drawn, expected = (state.sample(4000, generated()) for state in (mixed, whole))
    for feature in (0, 20, 40, 47):
        assert stats.ks_2samp(drawn[:, feature].numpy(), expected[:, feature].numpy()).statistic < 0.11


def test_the_bytes_of_a_state_are_told():
    state = learned(512, rank=8)
    assert state.nbytes == state.quantiles.nbytes + state.scores.nbytes + state.raw.nbytes
    stored = OperandDistribution.from_arrays(state.arrays())
    assert sum(array.nbytes for array in stored.arrays().values()) == pytest.approx(stored.nbytes, rel=0.01)


def test_a_very_wide_operand_stays_small():
    state = OperandDistribution.of(torch.randn(30, 123_200, generator=generated()), seed=0, rank=16)
    assert state.nbytes <= 40 * 2**20
    assert state.sample(3, generated()).isfinite().all()


@pytest.mark.parametrize(
    "changes",
    [
        {"quantiles.grid": None},
        {"quantiles.counts": np.array((11, 0))},
        {"quantiles.counts": np.array((-10, 0))},
        {"scores.matrix": None},
        {"scores.matrix": np.zeros((3, 2), np.float32)},
        {"scores.matrix": np.full((3, 3), np.nan, np.float32)},
        {"scores.m2": np.array((1.0, -1.0, 1.0))},
        {"raw.mean": np.array((1.0, np.inf, 1.0))},
        {"raw.mean": np.zeros(4)},
        {"raw.mean": np.array(("a", "b", "c"))},
        {"raw.count": np.array(-10)},
        {"raw.count": np.array((10, 10))},
        {"raw.rank": np.array(-1)},
        {"raw.skipped": np.array(0.5)},
    ],
)
def test_damaged_states_are_refused(changes):
    arrays = {**OperandDistribution.of(torch.randn(10, 3), seed=0).arrays(), **changes}
    with pytest.raises(ArgumentError, match=r"restored|instead of"):
        OperandDistribution.from_arrays({name: array for name, array in arrays.items() if array is not None})


def test_states_of_other_features_are_no_whole():
    one, two = (OperandDistribution.of(torch.randn(10, features), seed=0).arrays() for features in (3, 4))
    mixed = {**one, **{name: array for name, array in two.items() if name.startswith("scores.")}}
    with pytest.raises(ArgumentError, match="other features"):
        OperandDistribution.from_arrays(mixed)


# --- predictions ---


def measured(a, b, recipe, product, rows):
    one, two = (recipe.operand(role) for role in PASS_OPERANDS[product])
    actual = fake_quantize(a, one)[:rows] @ fake_quantize(b, two).T
    return product_error(actual, a[:rows] @ b.T).row_error


def weight(columns=64, features=192):
    return 0.05 * torch.randn(columns, features, generator=generated(7))


@pytest.mark.parametrize("product", ["fprop", "dgrad"])
def test_draws_predict_the_error_of_later_rows(product, record_property):
    features = 192
    b, early, later = weight(features=features), realistic(2048, 0, features), realistic(2048, 1, features)
    state = learned(2048, 0, features)
    statistics = ProductStatistics.of(early[:512], b, product, a_amax=early.abs().max())
    found = predictions(state, None, statistics, [RECIPES[name] for name in DEFAULT_RECIPES], Draw(weight=b))
    assert list(found) == list(DEFAULT_RECIPES)
    for name, value in found.items():
        actual = measured(later, b, RECIPES[name], product, 2048)
        record_property(f"{product} {name}, draw against direct", f"{value / actual - 1:+.4f}")
        assert value == pytest.approx(actual, rel=0.06)
    assert predict(state, None, statistics, RECIPES["rowwise"], Draw(weight=b)) == found["rowwise"]


def test_the_drawn_weight_may_come_from_a_distribution():
    b, early = weight(), realistic(1024, 0, 192)
    statistics = ProductStatistics.of(early[:256], b, "fprop")
    state, of_weight = learned(1024, 0, 192), OperandDistribution.of(b, seed=0)
    found = predict(state, of_weight, statistics, RECIPES["rowwise"])
    assert found == pytest.approx(measured(early, b, RECIPES["rowwise"], "fprop", 256), rel=0.1)


def test_wgrad_is_predicted_from_operands_drawn_independently(record_property):
    tokens = 1024
    x, gradient = realistic(tokens, 0, 96), 1e-3 * realistic(tokens, 1, 72)
    x[:, -1] /= 10  # a column that is the whole row of a result leaves a single random number for its error
    a, b = gradient.T.contiguous(), x.T.contiguous()
    statistics = ProductStatistics.of(a, b, "wgrad")
    assert statistics.reduction == tokens
    first, second = OperandDistribution.of(gradient, seed=0), OperandDistribution.of(x, seed=1)
    for name in DEFAULT_RECIPES:
        actual = measured(a, b, RECIPES[name], "wgrad", len(a))
        value = predict(first, second, statistics, RECIPES[name])
        record_property(f"wgrad {name}, draw against direct", f"{value / actual - 1:+.4f}")
        assert value == pytest.approx(actual, rel=0.12)


def test_operands_of_wgrad_have_nothing_to_do_with_each_other():
    """Learned from one and the same tensor, the drawn pair still has cross terms of zero mean."""
    x = torch.randn(2048, 40, generator=generated())
    state = OperandDistribution.of(x, seed=0)
    generator = generated(3)
    one, two = state.sample(2048, generator), state.sample(2048, generator)
    cross = (one.T @ two / 2048).diagonal()
    assert cross.abs().max() < 0.1


@pytest.mark.parametrize(("name", "plain"), [("mxfp8_floor", "mxfp8"), ("rowwise_fast_accum", "rowwise")])
def test_recipes_without_a_closed_form_are_predicted_by_draws(name, plain):
    b, early = weight(16, 1536), realistic(512, 0, 1536)
    state, statistics = learned(512, 0, 1536), ProductStatistics.of(early[:64], b, "fprop")
    found = predictions(state, None, statistics, [RECIPES[name], RECIPES[plain]], Draw(weight=b, rows=32))
    assert found[name] > (1.01 if name == "mxfp8_floor" else 1.0) * found[plain]


def test_the_alignment_corrects_a_gaussian_draw():
    b, early = weight() + 0.02, realistic(1024, 0, 192)
    statistics = ProductStatistics.of(early[:512], b, "fprop")
    found = predict(learned(1024, 0, 192), None, statistics, RECIPES["rowwise"], Draw(weight=b, kind="gaussian"))
    actual = measured(early, b, RECIPES["rowwise"], "fprop", 512)
    assert found == pytest.approx(actual, rel=0.2)
    plain = predict(learned(1024, 0, 192), None, statistics, RECIPES["rowwise"], Draw(weight=b, kind="normal"))
    assert plain == pytest.approx(actual, rel=0.5)


def test_autocast_around_a_prediction_changes_nothing():
    b, early = weight(16, 48), realistic(64)
    state, statistics = learned(64), ProductStatistics.of(early, b, "fprop")
    found = predict(state, None, statistics, RECIPES["rowwise"], Draw(weight=b))
    with torch.autocast("cpu", torch.bfloat16):
        assert ProductStatistics.of(early, b, "fprop").alignment == statistics.alignment
        assert predict(state, None, statistics, RECIPES["rowwise"], Draw(weight=b)) == found


def test_a_prediction_needs_a_second_operand():
    statistics = ProductStatistics.of(realistic(8), weight(4, 48), "fprop")
    with pytest.raises(ArgumentError, match="neither"):
        predict(learned(64), None, statistics, RECIPES["rowwise"])


def test_of_nothing_nothing_is_predicted():
    b = weight(8, 48)
    nothing = ProductStatistics.empty("fprop", 8)
    assert math.isnan(predict(learned(64), None, nothing, RECIPES["rowwise"], Draw(weight=b)))
    known = ProductStatistics.of(realistic(8), b, "fprop")
    assert math.isnan(predict(OperandDistribution.empty(48), None, known, RECIPES["rowwise"], Draw(weight=b)))


# --- several processes ---

COUNTS = [(300, 40), (0, 90), (0, 0)]


def shards(counts):
    return realistic(sum(counts), seed=len(counts)).split(list(counts))


def statistics_of(rows, b):
    return ProductStatistics.of(rows, b, "fprop", a_amax=100.0) if len(rows) else ProductStatistics.empty("fprop", 16)


def check(rank, counts):
    b = weight(16, 48)
    parts = shards(counts)
    alone = reduce(lambda one, two: one.merge(two), [statistics_of(part, b) for part in parts])
    together = reduced(statistics_of(parts[rank], b))
    assert together.alignment.count == alone.alignment.count == sum(counts)
    for name in DEFAULT_RECIPES:
        one, two = (state.row_error(RECIPES[name]) for state in (together, alone))
        assert one == two or (math.isnan(one) and math.isnan(two))
    states = [OperandDistribution.of(part, seed=number, rank=8) for number, part in enumerate(parts)]
    alone = states[0].merge(states[1])
    together = reduced(states[rank], arrays=lambda state: state.arrays(keep_rows=True))
    np.testing.assert_array_equal(together.quantiles.rows, alone.quantiles.rows)
    np.testing.assert_array_equal(together.quantiles.priority, alone.quantiles.priority)
    np.testing.assert_array_equal(together.quantiles.grid(), alone.quantiles.grid())
    together = reduced(states[rank])
    assert together.count == alone.count
    torch.testing.assert_close(together.raw.matrix, alone.raw.matrix, rtol=0, atol=1e-6)
    torch.testing.assert_close(together.scores.matrix, alone.scores.matrix, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(together.quantiles.low, alone.quantiles.low if sum(counts) else np.inf)
    if sum(counts):
        drawn, expected = (state.sample(4000, generated()) for state in (together, alone))
        distance = [stats.ks_2samp(drawn[:, k].numpy(), expected[:, k].numpy()).statistic for k in range(48)]
        assert np.median(distance) < 0.05  # grids are mixed where rows are not sent
    copies = gather_bytes(packed(together.arrays()))
    assert copies[0] == copies[1]


def work(folder, rank, group):
    """The body of one process."""
    for counts in COUNTS:
        check(rank, counts)


def test_ranks_hold_together_what_one_process_would(tmp_path):
    ranks(2, work, tmp_path)
