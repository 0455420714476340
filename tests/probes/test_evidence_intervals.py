"""The intervals hold what they promise, on simulated series whose truth is known, and agree with published factors."""

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from loka.probes.judging.intervals import (
    MARGIN,
    MIN_SAMPLES,
    RECENT_SAMPLES,
    WARMUP_MARGIN,
    WARMUP_STEPS,
    intervals,
    select_window,
    tolerance_factor,
)
from tests.made_times import seconds_since

Z99 = 2.3263478740408408


def judged(values, steps=None, *, frozen=True, confidence=0.95):
    """Intervals of series given as rows [num_series, n], sampled every 100 steps from step 100 on."""
    values = np.atleast_2d(np.asarray(values, dtype=np.float64))
    num_series, n = values.shape
    steps = np.arange(1, n + 1) * 100 if steps is None else np.asarray(steps)
    series, step = np.repeat(np.arange(num_series), n), np.tile(steps, num_series)
    window = select_window(series, step, values.ravel(), num_series, frozen=frozen)
    return window, intervals(window, step, values.ravel(), frozen=frozen, confidence=confidence)


@pytest.mark.parametrize(
    ("samples", "alpha", "factor"),
    [
        # One-sided 95 % confidence, 99 % content: NIST/SEMATECH e-Handbook, tolerance factors of the normal.
        *((8, 0.05, 4.354), (10, 0.05, 3.981), (20, 0.05, 3.295), (50, 0.05, 2.862), (100, 0.05, 2.684)),
        # The same over a family of 600 rows.
        *((10, 0.05 / 600, 9.32), (20, 0.05 / 600, 5.456), (50, 0.05 / 600, 3.799)),
    ],
)
def test_tolerance_factors_are_the_published_ones(samples, alpha, factor):
    assert tolerance_factor(samples, alpha) == pytest.approx(factor, rel=1e-3)


def test_an_interval_is_students_t_and_a_log_normal_tolerance_at_a_level_shared_by_the_family():
    values = np.exp(np.random.default_rng(0).normal(-3.5, 0.1, (7, 12)))
    _, found = judged(values)
    assert found.family == 7
    level = 0.05 / 7
    for index, series in enumerate(values):
        low, high = stats.t.interval(1 - level, 11, series.mean(), series.std(ddof=1) / math.sqrt(12))
        k = stats.nct.ppf(1 - level, 11, Z99 * math.sqrt(12)) / math.sqrt(12)
        upper = math.exp(np.log(series).mean() + k * np.log(series).std(ddof=1))
        np.testing.assert_allclose((found.low[index], found.high[index]), (low, high), rtol=1e-9)
        np.testing.assert_allclose((found.mean[index], found.upper[index]), (series.mean(), upper), rtol=1e-9)


@pytest.mark.parametrize("spread", [0.01, 0.2, 1.0])
def test_the_tolerance_of_a_whole_family_holds_at_its_confidence(spread):
    rng = np.random.default_rng(1)
    families, rows, n, confidence = 400, 25, 10, 0.9
    quantile = math.exp(-3.5 + Z99 * spread)
    covered = [
        bool((judged(np.exp(rng.normal(-3.5, spread, (rows, n))), confidence=confidence)[1].upper >= quantile).all())
        for _ in range(families)
    ]
    noise = math.sqrt(confidence * (1 - confidence) / families)
    assert np.mean(covered) >= confidence - 3 * noise


def test_the_mean_of_a_whole_family_lies_in_its_interval_at_its_confidence():
    rng = np.random.default_rng(2)
    families, rows, n, confidence, spread = 400, 25, 10, 0.9, 0.05
    truth = math.exp(-3.5 + spread**2 / 2)
    covered = []
    for _ in range(families):
        _, found = judged(np.exp(rng.normal(-3.5, spread, (rows, n))), confidence=confidence)
        covered.append(bool(((found.low <= truth) & (truth <= found.high)).all()))
    assert np.mean(covered) >= confidence - 3 * math.sqrt(confidence * (1 - confidence) / families)
    assert np.mean(covered) < 1.0  # it is an interval, not everything


def test_rows_whose_steps_exceed_the_bound_more_often_than_allowed_are_hardly_ever_safe():
    rng = np.random.default_rng(3)
    families, rows, n, spread = 400, 25, 10, 0.1
    limit = 0.05
    centre = math.log(limit) - Z99 * spread + 1e-3  # a little more than 1 % of steps exceed the limit
    wrong = [
        bool((judged(np.exp(rng.normal(centre, spread, (rows, n))))[1].upper <= limit).any()) for _ in range(families)
    ]
    assert np.mean(wrong) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / families)


def test_the_bound_is_tight_enough_to_be_of_use():
    # Step noise as measured in training, 0.8 %, 600 rows, 20 samples: within 12 % of the mean.
    values = np.exp(np.random.default_rng(4).normal(-3.5, 0.008, (600, 20)))
    _, found = judged(values)
    assert np.median(found.upper / found.mean) < 1.06
    assert np.max(found.upper / found.mean) < 1.12


positive = st.floats(1e-12, 1e6)


@settings(max_examples=200, deadline=None)
@given(st.lists(positive | st.just(0.0) | st.just(math.inf), min_size=1, max_size=MIN_SAMPLES - 1), st.booleans())
def test_fewer_samples_than_the_minimum_bound_nothing(values, frozen):
    window, found = judged(values, frozen=frozen)
    assert window.samples.tolist() == [len(values)]
    assert np.isnan([found.low, found.high, found.upper]).all()
    assert found.family == 0


@settings(max_examples=200, deadline=None)
@given(st.lists(positive | st.just(0.0) | st.just(math.inf), min_size=MIN_SAMPLES, max_size=30), st.booleans())
def test_bounds_are_ordered_and_never_below_what_was_seen(values, frozen):
    _, found = judged(values, frozen=frozen)
    assert found.upper[0] >= max(values)
    mean = found.mean[0]
    assert found.low[0] >= 0
    assert found.low[0] <= mean * (1 + 1e-9)
    assert found.high[0] >= mean * (1 - 1e-9)


@settings(max_examples=50, deadline=None)
@given(st.lists(positive | st.just(0.0), min_size=1, max_size=80), st.randoms(), st.booleans())
def test_the_order_in_which_samples_arrive_changes_nothing(values, random, frozen):
    steps = list(range(0, 10 * len(values), 10))
    order = list(range(len(values)))
    random.shuffle(order)
    _, straight = judged(values, steps, frozen=frozen)
    _, shuffled = judged([values[index] for index in order], [steps[index] for index in order], frozen=frozen)
    for name in ("mean", "low", "high", "upper", "horizon"):
        np.testing.assert_array_equal(getattr(straight, name), getattr(shuffled, name))


def test_a_constant_error_is_bounded_by_itself_and_exact_zero_by_zero():
    _, found = judged([[0.03] * 9, [0.0] * 9])
    assert found.low.tolist() == found.high.tolist() == found.upper.tolist() == [0.03, 0.0]
    _, found = judged([[0.03] * 9, [0.0] * 9], frozen=False)
    np.testing.assert_allclose(found.upper, [0.03 * MARGIN, 0.0], rtol=1e-12)


def test_zeros_among_positive_errors_do_not_hide_their_spread():
    values = [0.0] * 9 + [0.03]
    _, found = judged(values)
    assert found.upper[0] == pytest.approx(np.mean(values) + 3.981 * np.std(values, ddof=1), rel=1e-3)


def test_an_infinite_error_makes_the_bound_infinite_and_the_mean_surely_large_only_when_every_step_has_it():
    _, found = judged([[0.03] * 9 + [math.inf], [math.inf] * 10, [math.inf] * 9 + [0.03]])
    assert found.upper.tolist() == found.high.tolist() == found.mean.tolist() == [math.inf] * 3
    assert found.low[0] == pytest.approx(0.03)
    assert found.low[1] == math.inf
    assert found.low[2] == 0.0
    assert found.infinite.tolist() == [1, 10, 9]


def test_frozen_weights_use_every_step_without_margin():
    values = [0.03] * 120
    window, found = judged(values, range(120), frozen=True)
    assert window.samples.tolist() == [120]
    assert found.upper.tolist() == [0.03]
    assert not window.warmup[0]


def test_in_training_the_first_steps_do_not_count_once_there_are_later_ones():
    steps = [*range(0, WARMUP_STEPS, 10), *range(WARMUP_STEPS, WARMUP_STEPS + 10 * MIN_SAMPLES, 10)]
    values = [9.0] * 10 + [0.03] * MIN_SAMPLES
    window, found = judged(values, steps, frozen=False)
    assert window.samples.tolist() == [MIN_SAMPLES]
    assert found.mean[0] == pytest.approx(0.03)
    assert found.upper[0] == pytest.approx(0.03 * MARGIN)
    assert found.horizon.tolist() == [(10 * (MIN_SAMPLES - 1)) // 2]
    # One later sample fewer, and the newest half of all of them has to do, with the wider margin.
    window, found = judged(values[:-1], steps[:-1], frozen=False)
    assert window.warmup[0]
    assert window.samples.tolist() == [9]
    assert sorted(np.asarray(steps)[window.index].tolist()) == steps[8:-1]


@pytest.mark.parametrize(("taken", "expected"), [(5, 5), (8, 8), (12, 8), (17, 9), (40, 20)])
def test_a_run_of_first_steps_only_counts_its_newest_half_or_eight(taken, expected):
    window, found = judged([0.03] * taken, range(taken), frozen=False)
    assert window.samples.tolist() == [expected]
    assert window.index.tolist() == list(range(taken - expected, taken))
    if expected >= MIN_SAMPLES:
        assert found.upper[0] == pytest.approx(0.03 * WARMUP_MARGIN)


def test_in_training_only_the_newest_samples_count():
    values = [9.0] * 30 + [0.03] * RECENT_SAMPLES
    window, found = judged(values, frozen=False)
    assert window.samples.tolist() == [RECENT_SAMPLES]
    assert found.mean[0] == pytest.approx(0.03)
    assert found.horizon.tolist() == [100 * (RECENT_SAMPLES - 1) // 2]


def test_of_two_errors_of_one_step_the_larger_counts_once():
    series, step = np.zeros(18, dtype=np.int64), np.repeat(np.arange(9), 2) * 100
    value = np.tile([0.02, 0.03], 9)
    window = select_window(series, step, value, 1, frozen=True)
    assert window.samples.tolist() == [9]
    assert set(value[window.index]) == {0.03}


def test_a_drifting_series_stays_below_its_bound_within_the_horizon():
    # Drift and noise as measured for fprop after warm-up: 6 % in 100 steps, 0.7 % from step to step.
    rng = np.random.default_rng(5)
    num_series, n, every = 300, 20, 10
    steps = 100 + every * np.arange(2 * n)
    slope = rng.uniform(-0.06, 0.06, (num_series, 1)) / 100
    series = np.exp(-3.5 + slope * (steps - 100) + rng.normal(0, 0.007, (num_series, steps.size)))
    _, found = judged(series[:, :n], steps[:n], frozen=False)
    ahead = (steps > steps[n - 1]) & (steps <= steps[n - 1] + found.horizon[0])
    assert ahead.sum() == 9
    assert (series[:, ahead] > found.upper[:, None]).mean() <= 0.01


def test_two_thousand_sites_with_three_passes_and_four_recipes_take_well_under_a_second():
    tolerance_factor(9, 0.05)  # the import of scipy.stats is not what is timed
    values = np.exp(np.random.default_rng(6).normal(-3.5, 0.01, (24_000, 10)))
    began = time.process_time()
    _, found = judged(values, frozen=False)
    assert seconds_since(began) < 0.8
    assert found.family == 24_000


def test_frozen_families_with_a_false_safe_row_are_no_more_than_one_minus_confidence():
    # Spreads from step to step as measured: 0.7 % in fprop and dgrad, 4.4 % in wgrad. All families lie at the edge.
    rng = np.random.default_rng(7)
    families, rows, n, confidence, limit = 300, 40, 12, 0.95, 0.05
    spread = np.where(np.arange(rows) % 2, 0.007, 0.044)[:, None]
    centre = math.log(limit) - Z99 * spread + 1e-6  # truly more than 1 % of all later steps exceed the limit
    wrong = []
    for _ in range(families):
        _, found = judged(np.exp(centre + spread * rng.normal(size=(rows, n))), confidence=confidence)
        wrong.append(bool((found.upper <= limit).any()))
    assert np.mean(wrong) <= 1 - confidence + 3 * math.sqrt(0.05 * 0.95 / families)


# Drift per 100 steps (median, 90 %, largest) from step 100 and from step 300, then the step noise and the slowly
# changing part (correlated over tens of steps), as measured in two training runs with every step sampled.
TRAINING = {
    "fprop": ((0.056, 0.16, 0.21), (0.021, 0.046, 0.068), 0.007, 0.010),
    "dgrad": ((0.08, 0.22, 0.33), (0.075, 0.22, 0.33), 0.008, 0.015),
    "wgrad": ((0.016, 0.082, 0.38), (0.010, 0.061, 0.13), 0.044, 0.0),
}


def training_series(product, num_series, steps, seed):
    """Errors at steps 0, 1, ... after step 100: two trends, each up or down, AR(1) and step noise."""
    rng = np.random.default_rng(seed)
    early, late, noise, slow = TRAINING[product]
    quantiles = (0.0, 0.5, 0.9, 1.0)
    slopes = [
        np.interp(rng.random(num_series), quantiles, (0.0, *drift)) * rng.choice((-1, 1), num_series) / 100
        for drift in (early, late)
    ]
    at = np.arange(steps)
    trend = slopes[0][:, None] * np.minimum(at, 200) + slopes[1][:, None] * np.maximum(at - 200, 0)
    memory = 0.975  # a correlation of 0.78 over ten steps
    correlated = np.zeros((num_series, steps))
    correlated[:, 0] = slow * rng.normal(size=num_series)
    for step in range(1, steps):
        kick = slow * math.sqrt(1 - memory**2) * rng.normal(size=num_series)
        correlated[:, step] = memory * correlated[:, step - 1] + kick
    own = noise * np.ones((num_series, 1))
    if product == "wgrad":
        own = np.interp(rng.random((num_series, 1)), quantiles, (0.01, 0.044, 0.15, 0.33))
    return np.exp(-3.5 + trend + correlated + own * rng.normal(size=(num_series, steps)))


@pytest.mark.parametrize(
    ("product", "rows", "families", "allowed"),
    [
        *(("fprop", 72, 20, 0.01), ("dgrad", 72, 20, 0.10), ("wgrad", 72, 20, 0.01)),
        # A report of one row has no correction to lean on: only recency, trend and margin hold it.
        *(("fprop", 1, 400, 0.01), ("dgrad", 1, 400, 0.10), ("wgrad", 1, 400, 0.02)),
    ],
)
@pytest.mark.parametrize("begin", [0, 100, 200])
def test_training_rows_are_hardly_ever_falsely_safe_within_their_horizon(product, rows, families, allowed, begin):
    # The bound is put right at `upper`: every row is called safe, the hardest case.
    n, every = 20, 10
    series = training_series(product, rows * families, 600, seed=8)
    sampled = begin + every * np.arange(n)
    false = []
    for family in range(families):
        mine = series[rows * family : rows * (family + 1)]
        _, found = judged(mine[:, sampled], 100 + sampled, frozen=False)
        ahead = mine[:, sampled[-1] + 1 : sampled[-1] + 1 + int(found.horizon[0])]
        false.append((ahead > found.upper[:, None]).mean(axis=1) > 0.01)
    assert np.mean(false) <= allowed


def test_a_steep_rise_is_drawn_to_the_horizon():
    steps = 100 + 100 * np.arange(12)
    noise = np.random.default_rng(9).normal(0, 0.002, 12)
    window, found = judged(np.exp(-6 + 0.0022 * (steps - 100) + noise), steps, frozen=False)
    reached = math.exp(-6 + 0.0022 * (steps[-1] - 100 + found.horizon[0]))
    assert window.samples[0] == 12
    assert found.upper[0] >= reached


def test_a_series_that_is_not_log_normal_is_told_apart_from_one_that_is():
    rng = np.random.default_rng(10)
    normal = np.exp(-3.5 + 0.01 * rng.normal(size=(500, 30)))
    heavy = np.exp(-3.5 + 0.05 * rng.exponential(size=(500, 30)) ** 2)
    assert judged(normal)[1].irregular.mean() < 0.04
    assert judged(heavy)[1].irregular.mean() > 0.8
    trend = np.exp(np.log(normal) + 0.02 * np.arange(30))
    assert judged(trend, frozen=False)[1].irregular.mean() < 0.06  # a trend is not a lack of normality


def test_steps_without_logarithm_leave_no_log_mean():
    _, found = judged([[0.03] * 9 + [0.0], [0.03] * 9 + [math.inf], [0.03] * 10])
    assert np.isnan(found.log_mean[:2]).all()
    assert found.log_mean[2] == pytest.approx(math.log(0.03))
    assert found.log_deviation[2] == 0.0
