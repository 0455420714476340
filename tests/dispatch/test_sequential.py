"""The sequential test: its false alarms, counted on simulated steps, and how many steps it takes to find a change."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loka.dispatch.monitoring.sequential import ALARM, FALSE_ALARMS, JUMP, Jumps, LimitTest, advance

SITES, STEPS = 1000, 1500
REFERENCE, LEAST = 8, 4


def gaussian(rho, rng):
    """Standard normal steps [STEPS, SITES] with this lag-1 autocorrelation."""
    noise = rng.standard_normal((STEPS, SITES))
    for step in range(1, STEPS):
        noise[step] = rho * noise[step - 1] + math.sqrt(1 - rho**2) * noise[step]
    return noise


def alarms(excess):
    """Alarms of the test, which starts again after each, on log(error / limit) [steps, sites]."""
    total, found = np.zeros(excess.shape[1]), 0
    for step in excess:
        total = advance(total, step)
        found += int((total >= ALARM).sum())
        total[total >= ALARM] = 0
    return found


def jumps(log_values):
    """Jumps that `Jumps` tells of on the logarithms of values [steps, sites], all sites at once."""
    recent, filled = log_values[:LEAST].copy(), np.full(log_values.shape[1], LEAST)
    recent = np.concatenate([np.full((REFERENCE - LEAST, log_values.shape[1]), np.nan), recent])
    total, found = np.zeros(log_values.shape[1]), 0
    for step in log_values[LEAST:]:
        ready = filled >= LEAST
        median = np.nanmedian(recent, axis=0)
        moved = advance(total, step - median - math.log(JUMP))
        total = np.where(ready, moved, total)
        hit = total >= ALARM
        found += int(hit.sum())
        recent[:, hit], filled[hit], total[hit] = np.nan, 0, 0.0
        takes = (total == 0) | hit
        recent[:, takes] = np.roll(recent[:, takes], -1, axis=0)
        recent[-1, takes] = step[takes]
        filled[takes] += 1
    return found


# (standard deviation of the logarithm, lag-1 autocorrelation): measured in training, and the limits of the promise.
NOISE = [(0.008, 0.96), (0.33, 0.08), (1 / 3, 0.0), (1 / 3, 0.5), (1 / 3, 0.8), (0.05, 0.98)]


@pytest.mark.parametrize(("deviation", "rho"), NOISE)
def test_steps_of_which_one_in_a_hundred_is_beyond_the_limit_give_no_more_false_alarms_than_stated(
    deviation, rho, record_property
):
    steps = gaussian(rho, np.random.default_rng(0)) * deviation
    found = alarms(steps - 2.3263 * deviation)
    record_property(f"false alarms in {steps.size} steps, deviation {deviation:.3g}, autocorrelation {rho}", found)
    assert found <= FALSE_ALARMS * steps.size


@pytest.mark.parametrize("degrees", [2, 3, 5])
def test_heavy_tails_do_not_either(degrees, record_property):
    steps = np.random.default_rng(0).standard_t(degrees, (STEPS, SITES))
    steps = (steps - np.quantile(steps, 0.99)) / np.quantile(steps, 0.99) * 0.77  # its 99 % as far as that of 0.33
    found = alarms(steps)
    record_property(f"false alarms in {steps.size} steps, Student's t of {degrees}", found)
    assert found <= FALSE_ALARMS * steps.size


@pytest.mark.parametrize(("deviation", "rho"), [*NOISE[:4], (0.2, 0.9)])
def test_stationary_values_hardly_ever_jump(deviation, rho, record_property):
    steps = gaussian(rho, np.random.default_rng(1))[: STEPS // 3] * deviation
    found = jumps(steps)
    record_property(f"jumps in {steps.size} steps, deviation {deviation:.3g}, autocorrelation {rho}", found)
    assert found <= FALSE_ALARMS * steps.size


def test_a_drift_below_the_limit_is_no_alarm_however_fast():
    test = LimitTest()
    assert not any(test.saw(0.01 * 1.2**step, 0.05) for step in range(8))  # 20 % per monitored step, up to 0.036
    assert test.total == 0


@pytest.mark.parametrize(("times", "steps"), [(10, 3), (3.2, 3), (2, 5), (1.5, 9), (1.2, 19)])
def test_an_error_beyond_its_limit_is_found_after_the_stated_number_of_steps(times, steps):
    test = LimitTest()
    found = [test.saw(0.05 * times, 0.05) for _ in range(steps)]
    assert found == [False] * (steps - 1) + [True]


@pytest.mark.parametrize("deviation", [0.01, 0.05, 0.1])
def test_a_tenfold_error_is_found_within_three_steps_under_noise(deviation):
    rng = np.random.default_rng(2)
    late = 0
    for _ in range(500):
        test = LimitTest()
        for _ in range(5):
            assert not test.saw(0.9 * math.exp(deviation * (rng.standard_normal() - 2.33)), 1.0)
        late += not any(test.saw(9 * math.exp(deviation * (rng.standard_normal() - 2.33)), 1.0) for _ in range(3))
    assert late == 0


@pytest.mark.parametrize("deviation", [0.0, 0.05, 0.1])
def test_a_tenfold_growth_is_a_jump_within_three_steps(deviation):
    rng = np.random.default_rng(3)
    late = 0
    for _ in range(300):
        watched = Jumps()
        before = [watched.saw(math.exp(deviation * rng.standard_normal())) for _ in range(20)]
        after = [watched.saw(10 * math.exp(deviation * rng.standard_normal())) for _ in range(3)]
        assert before == [None] * 20
        late += after[:2] != [None, None] or after[2] is None
    assert late <= 3


def test_what_comes_after_a_jump_is_the_new_reference_and_is_told_once():
    watched = Jumps()
    told = [watched.saw(value) for value in [1.0] * 10 + [10.0] * 20 + [100.0] * 20]
    assert [step for step, times in enumerate(told) if times is not None] == [12, 32]
    assert [times for times in told if times is not None] == pytest.approx([10.0, 10.0])
    assert watched.usual == pytest.approx(100.0)


def test_a_slow_growth_is_no_jump():
    watched = Jumps()
    assert all(watched.saw(1.1**step) is None for step in range(200))


def test_one_outlier_however_large_is_no_alarm_and_two_are_not():
    test = LimitTest()
    assert not test.saw(math.inf, 1.0)
    assert not test.saw(1e300, 1.0)
    assert test.suspects
    assert not test.saw(0.0, 1.0)
    assert not test.suspects


def test_nothing_measured_changes_nothing():
    test = LimitTest()
    test.saw(2.0, 1.0)
    before = test.total
    assert not test.saw(math.nan, 1.0)
    assert test.total == before


@given(st.lists(st.floats(-3, 3), max_size=60))
def test_the_test_is_the_simulated_one(excess):
    simulated, total = [], np.zeros(1)
    for value in excess:
        total = advance(total, np.array([value]))
        simulated.append(bool(total[0] >= ALARM))
        total[total >= ALARM] = 0
    test, found = LimitTest(), []
    for value in excess:
        found.append(test.saw(math.exp(value), 1.0))
        if found[-1]:
            test.clear()
    assert found == simulated


def test_the_jumps_are_the_simulated_ones():
    steps = np.random.default_rng(4).standard_normal((120, 20)) * 0.7
    told = 0
    for site in range(20):
        watched = Jumps()
        told += sum(watched.saw(math.exp(value)) is not None for value in steps[:, site])
    assert told == jumps(steps) > 0
