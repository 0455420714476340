"""A range of bounds from one set of evidence and times: its corners, its sums, and what it says of them."""

import math
from inspect import signature
from itertools import pairwise

import pytest
import torch

from loka.bounds import Bound
from loka.dispatch.deciding.options import PlanArguments
from loka.dispatch.deciding.planner import PlanOptions, decide_all, plan
from loka.dispatch.deciding.sweep import sweep, sweep_evidence
from loka.errors import ArgumentError, EvidenceError
from loka.hardware import device_info
from tests.dispatch.made_evidence import built_in, product, recipe, run, timings
from tests.dispatch.test_site_bounds import felt

BASE, ROW, TENSOR = "torch.mm.bf16", "emulated.linear.rowwise", "emulated.linear.tensorwise"
TIMES = {BASE: 30.0, ROW: 15.0, TENSOR: 10.0}
OPTIONS = PlanOptions(device=torch.device("cpu"), measure=False)
# Two sites of different size: the second runs twice per step and has four times the work.
SMALL = product("small", flops=1e9, flop_share=0.2, recipes=(recipe("rowwise", 0.02), recipe("tensorwise", 0.04)))
LARGE = product(
    "large", flops=4e9, flop_share=0.8, calls=2.0, recipes=(recipe("rowwise", 0.03), recipe("tensorwise", 0.08))
)


def swept(*products, bound=None, times=None, options=OPTIONS, **arguments):
    measured = [each for one in products for each in timings(times or TIMES, of=one, device=device_info("cpu"))]
    return sweep_evidence(run(*products), bound or Bound(row_error=0.05), built_in(), measured, options, **arguments)


def test_every_tolerance_is_a_corner_and_the_first_point_is_below_all():
    found = swept(SMALL, LARGE)
    values = [point.bound.row_error for point in found.points]
    assert values == sorted(values)
    assert values[0] < 0.02
    assert values[1:] == [0.02, 0.03, 0.04, 0.05, 0.08]
    assert [point.asked for point in found.points] == [False, False, False, False, True, False]


def test_time_is_that_of_a_step_and_errors_are_those_of_what_runs_in_fp8():
    found = swept(SMALL, LARGE)
    assert found.baseline_us == 30.0 + 2 * 30.0
    by_bound = {point.bound.row_error: point for point in found.points}
    nothing, some, most = found.points[0], by_bound[0.03], by_bound[0.08]
    assert (nothing.time_us, nothing.speedup, nothing.fp8_share, nothing.products) == (90.0, 1.0, 0.0, 0)
    assert (nothing.error_max, nothing.error_mean) == (None, None)
    assert some.time_us == pytest.approx(15.0 + 2 * 15.0)
    assert (some.error_max, some.error_mean) == (0.03, pytest.approx((1e9 * 0.02 + 4e9 * 0.03) / 5e9))
    assert most.time_us == pytest.approx(3 * 10.0)
    assert (most.speedup, most.fp8_share, most.sites) == (pytest.approx(3.0), pytest.approx(1.0), 2)


def test_a_point_is_the_plan_under_its_bound():
    found = swept(SMALL, LARGE)
    measured = [each for one in (SMALL, LARGE) for each in timings(TIMES, of=one, device=device_info("cpu"))]
    for point in found.points:
        plan = decide_all(run(SMALL, LARGE), point.bound, built_in(), measured, OPTIONS)
        assert point.products == sum(each.recipe is not None for each in plan.decisions)


def test_points_that_no_other_beats_are_marked():
    assert [point.best for point in swept(SMALL, LARGE).points] == [True, True, True, True, False, True]


def test_nothing_to_gain_is_said():
    found = swept(SMALL, LARGE, times={BASE: 5.0, ROW: 15.0, TENSOR: 10.0})
    assert not found.gains
    assert "Nothing to gain here" in found.headline
    assert all(point.time_us == found.baseline_us for point in found.points)
    gain = swept(SMALL, LARGE)
    assert gain.gains
    assert "the first gain needs row_error <= 0.02 and the largest gain, 3x, row_error <= 0.08" in gain.headline


def test_many_corners_are_thinned_over_the_whole_range():
    products = [product(f"s{at}", recipes=(recipe("rowwise", 1e-3 * 1.05**at),)) for at in range(120)]
    found = swept(*products, points=20)
    values = [point.bound.row_error for point in found.points]
    assert 18 <= len(values) <= 22
    assert values[0] < 1e-3
    assert values[-1] >= 1e-3 * 1.05**119
    assert [point.products for point in found.points] == sorted(point.products for point in found.points)
    assert (found.points[0].products, found.points[-1].products) == (0, 120)
    steps = [math.log(high / low) for low, high in pairwise(values)]
    assert max(steps) < 3 * math.log(1.05**119) / 20


def test_a_bound_in_decibels_is_swept_from_the_highest_ratio_down():
    one = product(recipes=(felt("rowwise", 1.0, whole=0.01), felt("tensorwise", 1.0, whole=0.02)))
    found = swept(one, bound=Bound(sqnr_db=35))
    values = [point.bound.sqnr_db for point in found.points]
    assert values == sorted(values, reverse=True)
    assert values[1:] == [40.0, 35.0, 33.97]
    assert [point.products for point in found.points] == [0, 1, 1, 1]
    assert [point.error_max for point in found.points] == [None, 0.01, 0.01, 0.02]


def test_a_budget_of_loss_is_swept_from_one_product_to_all():
    products = [product(f"s{at}", recipes=(felt("rowwise", 0.1, cost=1e-5),)) for at in range(5)]
    found = swept(*products, bound=Bound(loss=2.5e-5))
    assert [point.products for point in found.points] == sorted(point.products for point in found.points)
    assert (found.points[0].products, found.points[-1].products) == (0, 5)
    for point in found.points:
        assert (point.loss_cost or 0.0) <= point.bound.loss
        if point.asked:
            assert (point.products, point.loss_cost) == (2, pytest.approx(2e-5))
        if point.products:
            assert point.loss_kl == pytest.approx(0.8 * point.loss_cost)


def test_bounds_per_site_stay_at_every_point():
    bound = Bound(row_error=0.05, per_site={"small": Bound(row_error=0.001)})
    found = swept(SMALL, LARGE, bound=bound)
    assert all(point.bound.per_site == bound.per_site for point in found.points)
    assert max(point.sites for point in found.points) == 1
    assert 0.02 not in [point.bound.row_error for point in found.points]
    assert any("row_error <= 0.001 on 'small'" in note for note in found.notes)


def test_assumed_times_count_products_by_their_operations_and_give_no_microseconds():
    options = PlanOptions(device=torch.device("cpu"), assume_speedup=1.5)
    small, large = (
        product(name, recipes=(recipe("rowwise", upper),), **shape)
        for name, upper, shape in (
            ("small", 0.02, {"m": 100, "m_min": 100, "m_max": 100}),
            ("large", 0.03, {"m": 300, "m_min": 300, "m_max": 300}),
        )
    )
    found = sweep_evidence(run(small, large), Bound(row_error=0.05), built_in(), (), options)
    assert found.baseline_us is None
    assert all(point.time_us is None for point in found.points)
    by_bound = {point.bound.row_error: point.speedup for point in found.points}
    assert by_bound[0.02] == pytest.approx(4 / (1 / 1.5 + 3))
    assert by_bound[0.03] == pytest.approx(1.5)
    assert found.time_source == "assumed 1.5x"


def test_products_that_were_never_timed_are_in_no_sum_and_said():
    measured = timings(TIMES, of=SMALL, device=device_info("cpu"))
    odd = product("odd", m=7, m_min=7, m_max=7)
    found = sweep_evidence(run(SMALL, odd), Bound(row_error=0.05), built_in(), measured, OPTIONS)
    assert (found.timed, found.products, found.baseline_us) == (1, 2, 30.0)
    assert any("Never timed, and in no sum: 1 of 2" in note for note in found.notes)


def test_a_sweep_of_nothing_is_refused():
    with pytest.raises(ArgumentError, match="compares nothing"):
        swept(SMALL, points=1)
    with pytest.raises(EvidenceError, match="no product"):
        swept()


def test_a_sweep_takes_the_arguments_of_a_plan_with_the_same_defaults():
    takes = signature(plan).parameters
    of_options = signature(PlanOptions.of).parameters
    assert set(PlanArguments.__annotations__) == set(of_options)
    defaults = {name: each.default for name, each in of_options.items()}
    assert {name: takes[name].default for name in of_options} == defaults
    with pytest.raises(TypeError, match="devise"):
        sweep("run.db", devise="cpu")
