"""The trend of an error: the slope is SciPy's, its interval covers, the crossing is where line and bound meet."""

import math
import time

import numpy as np
import pytest
from scipy import stats

from loka.probes.judging.drift import REACH, TREND_SAMPLES, Drift, fit_trends
from loka.probes.judging.evidence import load_evidence
from tests.made_times import seconds_since
from tests.probes.made_records import NAN, made_product, made_progress, made_step, write_run


def fitted(logs, steps=None):
    logs = np.atleast_2d(np.asarray(logs, dtype=np.float64))
    num_series, n = logs.shape
    steps = 100 * np.arange(n) if steps is None else np.asarray(steps)
    return fit_trends(np.repeat(np.arange(num_series), n), np.tile(steps, num_series), logs.ravel(), num_series)


def test_the_slope_is_that_of_theil_and_sen():
    rng = np.random.default_rng(0)
    steps = np.sort(rng.choice(5000, 15, replace=False))
    logs = rng.normal(size=(6, 15))
    found = fitted(logs, steps)
    expected = [stats.theilslopes(row, steps).slope for row in logs]
    np.testing.assert_allclose(found.slope, expected, rtol=1e-10)
    assert set(found.step.tolist()) == {steps[-1]}


def test_series_of_different_length_do_not_mix():
    of, step = np.array([0] * 4 + [2] * 5 + [3] * 2), np.array([0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1])
    found = fit_trends(of, step, np.where(of == 0, 2.0, -1.0) * step, 4)
    np.testing.assert_allclose(found.slope, [2.0, NAN, -1.0, NAN])
    assert found.samples.tolist() == [4, 0, 5, 2]
    drifts = found.drifts(np.zeros(4), np.array([True, True, False, True]))
    assert [each is None for each in drifts] == [False, True, True, True]


@pytest.mark.parametrize("samples", [8, 20])
def test_the_interval_of_the_slope_covers_it_as_often_as_it_says(samples):
    rng = np.random.default_rng(1)
    slope = 3e-4
    found = fitted(slope * 100 * np.arange(samples) + 0.01 * rng.normal(size=(4000, samples)))
    covered = np.abs(found.slope - slope) <= found.half_width(0.05)
    assert 0.94 <= covered.mean() <= 0.99


def test_one_wild_step_does_not_turn_the_line():
    logs = 1e-4 * 100 * np.arange(15)
    logs[-1] += 3.0
    assert fitted(logs).slope[0] == pytest.approx(1e-4, rel=1e-6)


def test_only_the_newest_samples_make_the_trend():
    logs = np.concatenate([-0.5 * np.arange(30), np.linspace(0.0, 1.9, TREND_SAMPLES)])
    assert fitted(logs).slope[0] == pytest.approx(0.1 / 100)


def drift(**changes):
    values = {"per_100_steps": 0.10, "low": 0.05, "high": 0.15, "significant": True, "step": 1000, "error": 0.03}
    return Drift(**(values | {"span": 900} | changes))


def test_the_trend_crosses_where_the_line_meets_the_bound():
    step = drift().crosses_at(0.05)
    assert 0.03 * 1.1 ** ((step - 1000) / 100) >= 0.05 > 0.03 * 1.1 ** ((step - 1001) / 100)


@pytest.mark.parametrize(
    ("changes", "limit"),
    [
        ({"significant": False}, 0.05),
        ({"per_100_steps": -0.1}, 0.05),
        ({}, 0.02),  # above it already
        ({"per_100_steps": 1e-6}, 0.05),  # further ahead than the line reaches
        ({"error": 0.0}, 0.05),
    ],
)
def test_what_does_not_reach_the_bound_has_no_crossing(changes, limit):
    assert drift(**changes).crosses_at(limit) is None


def test_the_line_reaches_so_many_times_its_span():
    ahead = math.log(0.05 / 0.03) * 100 / math.log(1.1)
    assert drift(span=math.ceil(ahead / REACH)).crosses_at(0.05) is not None
    assert drift(span=math.floor(ahead / REACH)).crosses_at(0.05) is None


def evidence_of(path, values, *, frozen=False):
    steps = [made_step(100 * (index + 1), made_product(value=value)) for index, value in enumerate(values)]
    progress = made_progress(len(steps), weights_changed=not frozen, status="complete")
    write_run(path / "run.db", steps, progress=progress)
    return load_evidence(path / "run.db").products[0].recipes[0]


def test_evidence_of_training_carries_its_drift(tmp_path):
    noise = np.random.default_rng(2).normal(0, 0.002, 12)
    found = evidence_of(tmp_path, [0.02 * 1.05**index * math.exp(noise[index]) for index in range(12)])
    assert found.drift.per_100_steps == pytest.approx(0.05, abs=0.003)
    assert found.drift.low < 0.05 < found.drift.high
    assert found.drift.significant
    assert found.drift.crosses_at(0.05) == pytest.approx(100 + 100 * math.log(2.5) / math.log(1.05), abs=60)


def test_frozen_weights_and_few_samples_have_no_drift(tmp_path):
    rising = [0.02 * 1.05**index for index in range(12)]
    assert evidence_of(tmp_path, rising, frozen=True).drift is None
    (tmp_path / "few").mkdir()
    assert evidence_of(tmp_path / "few", rising[:7]).drift is None
    (tmp_path / "nan").mkdir()
    assert evidence_of(tmp_path / "nan", rising[:7] + [NAN] * 5).drift is None


def test_two_thousand_products_with_four_recipes_are_fitted_in_two_seconds():
    logs = np.random.default_rng(3).normal(size=(8000, 50))
    began = time.process_time()
    fitted(logs)
    assert seconds_since(began) < 2.0
