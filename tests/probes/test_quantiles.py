"""Quantile grids: the sample is the same in any order of merging, ties and constants stay exact, limits hold."""

from functools import reduce
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from loka.errors import ArgumentError, LokaError
from loka.probes.distributions.gather import packed, unpacked
from loka.probes.distributions.quantiles import EXTENT, MAX_ROWS, POINTS, Quantiles, capacity

SCORES = torch.linspace(-EXTENT, EXTENT, POINTS, dtype=torch.float64)
PROBABILITIES = torch.special.ndtr(SCORES).numpy()


def drawn(count, features, seed=0):
    return torch.randn(count, features, generator=torch.Generator().manual_seed(seed))


def merged(states):
    return reduce(lambda one, two: one.merge(two), states)


def assert_same(one, two):
    assert (one.count, one.skipped) == (two.count, two.skipped)
    for name in ("low", "high", "rows", "priority"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    torch.testing.assert_close(one.grid(), two.grid(), rtol=0, atol=0)


@pytest.mark.parametrize("count", [1, 2, 7, 200, MAX_ROWS])
@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30])
def test_the_grid_is_that_of_numpy(count, scale):
    rows = drawn(count, 5) * scale
    grid = Quantiles.of(rows, seed=1).grid().numpy()
    expected = np.quantile(rows.double().numpy(), PROBABILITIES, axis=0, method="hazen")
    expected[0], expected[-1] = rows.amin(0), rows.amax(0)
    np.testing.assert_allclose(grid, expected, rtol=1e-6, atol=1e-6 * scale)
    assert (np.diff(grid, axis=0) >= 0).all()


def test_of_more_rows_than_fit_the_sample_is_uniform_and_the_ends_are_exact():
    rows = torch.arange(100_000.0).unsqueeze(1)
    state = Quantiles.of(rows, seed=3)
    assert state.rows.shape == (MAX_ROWS, 1)
    assert (float(state.low[0]), float(state.high[0])) == (0.0, 99_999.0)
    # Kolmogorov-Smirnov at 1e-4: 2.2 / sqrt(n).
    ordered = np.sort(state.rows[:, 0]) / 1e5
    assert np.abs(ordered - (np.arange(MAX_ROWS) + 0.5) / MAX_ROWS).max() < 2.2 / np.sqrt(MAX_ROWS)


def test_the_sample_of_merged_parts_is_uniform_over_all_rows():
    parts = [torch.arange(1000.0 * part, 1000.0 * (part + 1)).unsqueeze(1) for part in range(20)]
    state = merged(Quantiles.of(rows, seed=part) for part, rows in enumerate(parts))
    ordered = np.sort(state.rows[:, 0]) / 2e4
    assert len(ordered) == MAX_ROWS
    assert np.abs(ordered - (np.arange(MAX_ROWS) + 0.5) / MAX_ROWS).max() < 2.2 / np.sqrt(MAX_ROWS)


@settings(max_examples=40)
@given(
    st.lists(st.integers(0, 300), min_size=2, max_size=4),
    st.sampled_from([1, 3]),
    st.integers(0, 10**6),
)
def test_merging_is_free_of_order_and_grouping(counts, features, seed):
    parts = [Quantiles.of(drawn(count, features, part), seed=seed + part) for part, count in enumerate(counts)]
    whole = merged(parts)
    for order in permutations(parts):
        assert_same(merged(order), whole)
    assert_same(parts[0].merge(merged(parts[1:])), whole)
    assert_same(whole.merge(Quantiles.empty(features)), whole)
    assert_same(Quantiles.empty(features).merge(whole), whole)


def test_rows_of_one_seed_merge_the_same_in_any_order_too():
    one, two = Quantiles.of(drawn(400, 2, 1), seed=5), Quantiles.of(drawn(400, 2, 2), seed=5)
    assert_same(one.merge(two), two.merge(one))


def test_a_constant_feature_stays_exact():
    rows = drawn(50, 3)
    rows[:, 1] = 0.1
    state = Quantiles.of(rows, seed=0)
    again = Quantiles.from_arrays(state.arrays())
    for grid in (state.grid(), again.grid(), again.merge(Quantiles.of(rows, seed=1)).grid()):
        assert (grid[:, 1] == torch.tensor(0.1)).all()
    assert (state.scores()[:, 1] == 0).all()


def test_ties_share_their_middle_score():
    rows = torch.tensor([[2.0], [1.0], [2.0], [5.0], [1.0], [2.0]])
    state = Quantiles.of(rows, seed=0)
    expected = {1.0: 1 / 6, 2.0: 3.5 / 6, 5.0: 5.5 / 6}  # middle ranks 0.5, 3, 5, plus a half, of 6
    for value, score in zip(state.rows[:, 0], state.scores()[:, 0], strict=True):
        assert float(score) == pytest.approx(float(torch.special.ndtri(torch.tensor(expected[float(value)]))), abs=1e-6)


def test_scores_are_the_ranks_of_scipy():
    rows = drawn(97, 40).round(decimals=1)
    state = Quantiles.of(rows, seed=0)
    expected = stats.norm.ppf((stats.rankdata(state.rows, axis=0) - 0.5) / 97)
    np.testing.assert_allclose(state.scores().numpy(), expected, atol=1e-6)


def test_features_with_ties_are_not_correlated_by_their_ties():
    rows = (drawn(512, 60) > 1.2).float()
    correlation = np.corrcoef(Quantiles.of(rows, seed=0).scores().numpy().T)
    off = correlation[~np.eye(60, dtype=bool)]
    assert abs(off.mean()) < 0.01


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_are_counted_and_left_out(bad):
    rows = drawn(20, 4)
    rows[3, 1] = rows[7, 0] = bad
    good = torch.cat([rows[:3], rows[4:7], rows[8:]])
    state = Quantiles.of(rows, seed=0)
    assert (state.count, state.skipped) == (18, 2)
    torch.testing.assert_close(state.grid(), Quantiles.of(good, seed=0).grid(), rtol=0, atol=0)
    nothing = Quantiles.of(torch.full((2, 4), bad), seed=0)
    assert (nothing.count, nothing.skipped) == (0, 2)
    assert nothing.merge(state).skipped == 4


def test_of_no_rows_everything_is_zero():
    state = Quantiles.of(torch.empty(0, 3), seed=0)
    assert state.count == 0
    assert (state.grid() == torch.zeros(POINTS, 3)).all()
    assert state.scores().shape == (0, 3)
    assert Quantiles.from_arrays(state.arrays()).merge(Quantiles.of(drawn(4, 3), seed=0)).stored is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_floating_dtype_is_taken(dtype):
    rows = drawn(30, 3).to(dtype)
    torch.testing.assert_close(Quantiles.of(rows, seed=0).grid(), Quantiles.of(rows.float(), seed=0).grid())


def test_a_very_wide_operand_stays_within_16_mib():
    features = 123_200
    states = [Quantiles.of(drawn(40, features, part), seed=part) for part in range(2)]
    for state in (states[0], states[0].merge(states[1])):
        assert len(state.rows) == capacity(features)
        assert state.nbytes <= 16 * 2**20
        assert state.scores().shape == (capacity(features), features)
    again = Quantiles.from_arrays(states[0].arrays())
    assert again.nbytes <= 16 * 2**20
    torch.testing.assert_close(again.grid(), states[0].grid(), rtol=0, atol=0)


def test_arrays_travel_without_the_raw_rows():
    state = Quantiles.of(drawn(100, 6), seed=0)
    arrays = state.arrays()
    assert set(arrays) == {"counts", "grid"}
    again = Quantiles.from_arrays(unpacked(packed(arrays)))
    assert (again.count, again.skipped, len(again.rows)) == (100, 0, 0)
    torch.testing.assert_close(again.grid(), state.grid(), rtol=0, atol=0)
    np.testing.assert_array_equal(again.low, state.low)
    np.testing.assert_array_equal(again.high, state.high)


def test_arrays_with_the_rows_restore_everything():
    rows = drawn(700, 6)
    rows[0, 0] = float("nan")
    state = Quantiles.of(rows, seed=0)
    again = Quantiles.from_arrays(unpacked(packed(state.arrays(keep_rows=True))))
    assert_same(again, state)
    other = Quantiles.of(drawn(700, 6, 1), seed=1)
    assert_same(again.merge(other), state.merge(other))
    assert_same(Quantiles.from_arrays(Quantiles.empty(2).arrays(keep_rows=True)), Quantiles.empty(2))


def test_restored_grids_mix_by_their_counts():
    near, far = drawn(MAX_ROWS, 3), 3 + 2 * drawn(MAX_ROWS // 2, 3, 1)
    both = torch.cat([near, far]).numpy()
    for left, right in ((True, True), (True, False), (False, True)):
        parts = [Quantiles.of(near, seed=0), Quantiles.of(far, seed=1)]
        stored = [
            Quantiles.from_arrays(part.arrays()) if restore else part
            for part, restore in zip(parts, (left, right), strict=True)
        ]
        mixed = stored[0].merge(stored[1])
        assert mixed.count == MAX_ROWS * 3 // 2
        assert len(mixed.rows) == 0
        grid = mixed.grid().numpy()
        assert (np.diff(grid, axis=0) >= 0).all()
        reached = (both[None] < grid[:, None]).mean(axis=1)  # [POINTS, 3]: the share of values below each point
        np.testing.assert_allclose(reached, np.repeat(PROBABILITIES[:, None], 3, axis=1), atol=0.015)
        np.testing.assert_array_equal(grid[[0, -1]], np.stack([mixed.low, mixed.high]))
        np.testing.assert_array_equal(mixed.low, torch.cat([near, far]).amin(0))
        reverse = stored[1].merge(stored[0])
        np.testing.assert_allclose(reverse.grid().numpy(), grid, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [lambda x: x, lambda x: x.relu(), lambda x: x.exp() * 1e20, torch.round])
def test_a_grid_mixed_with_itself_is_unchanged(shape):
    state = Quantiles.from_arrays(Quantiles.of(shape(drawn(300, 4)), seed=0).arrays())
    torch.testing.assert_close(state.merge(state).grid(), state.grid(), rtol=1e-5, atol=1e-5)


def test_many_restored_grids_mix_without_spreading():
    parts = [Quantiles.of(drawn(400, 20, part), seed=part) for part in range(60)]
    mixed = merged(Quantiles.from_arrays(part.arrays()) for part in parts)
    assert mixed.count == 24_000
    inside = np.abs(SCORES.numpy()) <= 2.5
    expected = SCORES.float().unsqueeze(1)[inside]
    torch.testing.assert_close(mixed.grid()[inside].mean(1, keepdim=True), expected, rtol=0, atol=0.02)


def test_parts_of_other_operands_are_refused():
    with pytest.raises(ArgumentError, match=r"3 features .* 4"):
        Quantiles.empty(3).merge(Quantiles.empty(4))
    with pytest.raises(LokaError, match="floating-point"):
        Quantiles.of(torch.ones(2, 2, dtype=torch.int64), seed=0)


def damaged(**changes):
    arrays = Quantiles.of(drawn(10, 3), seed=0).arrays(keep_rows="rows" in changes or "low" in changes)
    return {name: array for name, array in {**arrays, **changes}.items() if array is not None}


GRID = np.zeros((POINTS, 3), np.float32)


@pytest.mark.parametrize(
    "changes",
    [
        {"counts": None},
        {"counts": np.array((-1, 0))},
        {"counts": np.array((10, -2))},
        {"counts": np.array((10.0, 0.0))},
        {"counts": np.array(10)},
        {"grid": None},
        {"grid": GRID[1:]},
        {"grid": GRID[:, 0]},
        {"grid": GRID.astype(np.float64)},
        {"grid": GRID.astype(np.int32)},
        {"grid": GRID + np.float32(np.nan)},
        {"grid": GRID - np.arange(POINTS, dtype=np.float32)[:, None]},
        {"grid": np.full((POINTS, 3), "0")},
        {"rows": np.zeros((11, 3), np.float32)},
        {"rows": np.full((10, 3), np.inf, np.float32)},
        {"rows": np.full((10, 3), 1e6, np.float32)},
        {"rows": np.zeros((10, 4), np.float32)},
        {"low": np.zeros(2, np.float32)},
        {"low": np.zeros(3, np.float32), "priority": np.zeros(9, np.uint64)},
    ],
)
def test_damaged_states_are_refused(changes):
    with pytest.raises(ArgumentError, match="stored Quantiles"):
        Quantiles.from_arrays(damaged(**changes))
