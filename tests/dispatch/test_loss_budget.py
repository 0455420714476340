"""One budget of loss for a whole plan: spent where it saves the most time, and never exceeded."""

import math
import random
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loka.bounds import Bound
from loka.dispatch.deciding.plan import Plan
from loka.dispatch.deciding.planner import PlanOptions, decide_all
from loka.hardware import device_info
from loka.kernel_registry.builtin import KERNELS
from loka.probes.judging.loss_evidence import LossEvidence
from tests.dispatch.made_evidence import built_in, decided, product, recipe, run, timings
from tests.made_times import seconds_since

BASE, ROW, TENSOR = "torch.mm.bf16", "torch.scaled_mm.rowwise", "torch.scaled_mm.tensorwise"
BOUND = Bound(loss=1e-4)


def loss(cost, **changes):
    values = {"kl": 0.9 * cost, "kl_low": 0.8 * cost, "kl_high": cost, "first_order": 0.0, "first_order_low": -1e-3}
    values |= {"spread": 3e-4, "low": -1e-3, "high": 1e-3, "samples": 6, "labels": "closed"}
    return LossEvidence(**(values | changes))


def costing(**costs):
    """Recipes of a forward product: what each costs the loss, None where nothing is known; any error is huge."""
    return tuple(
        replace(
            recipe(name, 0.9), loss=None if cost is None else cost if isinstance(cost, LossEvidence) else loss(cost)
        )
        for name, cost in costs.items()
    )


def planned(*products, times=(), bound=BOUND, **changes):
    options = PlanOptions(**{"device": torch.device("cpu"), **changes})
    return decide_all(run(*products), bound, built_in(), times, options)


def here(times, of):
    return timings(times, of=of, device=device_info("cpu"))


def chosen(plan):
    return {(each.request.site, each.request.product): each.recipe for each in plan.decisions}


def codes(decision):
    return {candidate.kernel: candidate.code for candidate in decision.rejected}


# --- decisions ---


def test_the_budget_goes_where_it_saves_the_most_time_and_the_rest_is_told_why():
    big = product("big", m=4096, m_max=4096, recipes=costing(rowwise=7e-5))
    small = product("small", recipes=costing(rowwise=6e-5))
    cheap = product("cheap", n=1024, recipes=costing(rowwise=2e-5))
    times = [
        *here({BASE: 100.0, ROW: 50.0}, big),
        *here({BASE: 30.0, ROW: 15.0}, small),
        *here({BASE: 20.0, ROW: 10.0}, cheap),
    ]
    plan = planned(small, big, cheap, times=times)
    assert chosen(plan) == {("big", "fprop"): "rowwise", ("small", "fprop"): None, ("cheap", "fprop"): "rowwise"}
    lost = plan.decision("small", "fprop")
    assert codes(lost)[ROW] == "budget_spent"
    (reason,) = (each.reason for each in lost.rejected if each.kernel == ROW)
    assert "6e-05" in reason
    assert "budget of 0.0001, 9e-05 is spent" in reason
    assert "2 other products" in reason
    assert "does not reach" in lost.why
    won = plan.decision("big", "fprop")
    assert "spends up to 7e-05 of the loss (kl 6.3e-05, 5.6e-05 to 7e-05, 6 steps) of the budget of 0.0001" in won.why
    assert won.loss.cost == 7e-5
    text = " ".join(plan.notes)
    assert "loss budget of 0.0001, 9e-05 (90 %) is spent, by 2 of the 3 fprop products" in text
    assert f"+-{3e-4 * math.sqrt(2):.3g}" in text


def test_more_calls_weigh_more():
    once = product("once", recipes=costing(rowwise=9e-5))
    often = product("often", calls=3.0, recipes=costing(rowwise=9e-5))
    plan = planned(once, often, times=here({BASE: 30.0, ROW: 15.0}, once))
    assert chosen(plan) == {("once", "fprop"): None, ("often", "fprop"): "rowwise"}


def test_where_times_are_assumed_operations_weigh():
    wide = product("wide", n=4096, recipes=costing(rowwise=9e-5))
    narrow = product("narrow", recipes=costing(rowwise=9e-5))
    plan = planned(narrow, wide, assume_speedup=1.5)
    assert chosen(plan) == {("narrow", "fprop"): None, ("wide", "fprop"): "rowwise"}


def test_of_equally_fast_recipes_the_cheaper_is_bought_and_a_slower_one_where_only_that_fits():
    made = product(recipes=costing(rowwise=2e-5, tensorwise=1e-5))
    plan = planned(made, times=here({BASE: 30.0, ROW: 10.0, TENSOR: 10.05}, made))
    assert chosen(plan) == {("up", "fprop"): "tensorwise"}
    decision = plan.decision("up", "fprop")
    assert codes(decision)[ROW] == "tie"
    assert "costs the loss 1e-05 against 2e-05" in " ".join(each.reason for each in decision.rejected)
    pair = [product(site, recipes=costing(rowwise=8e-5, tensorwise=1e-5)) for site in ("a", "b")]
    plan = planned(*pair, times=here({BASE: 30.0, ROW: 10.0, TENSOR: 20.0}, pair[0]))
    assert sorted(chosen(plan).values()) == ["rowwise", "tensorwise"]
    (second,) = (each for each in plan.decisions if each.recipe == "tensorwise")
    assert codes(second)[ROW] == "budget_spent"
    assert codes(next(each for each in plan.decisions if each.recipe == "rowwise"))[TENSOR] == "slower"


@pytest.mark.parametrize(
    ("evidence", "code", "words"),
    [
        (None, "undecided", "does to the loss is unknown"),
        (loss(math.nan, kl=1e-6, samples=1), "undecided", "1 sampled step is too few"),
        (loss(3e-4), "over_bound", "against the budget of 0.0001"),
        (loss(1.1e-4), "undecided", "more samples may settle it"),
        (loss(5e-5, first_order_low=6e-5), "over_bound", "first-order increase of at least 6e-05"),
        (loss(5e-5, labels="empirical"), None, "may overstate"),
    ],
)
def test_only_a_bounded_cost_within_the_budget_is_admissible(evidence, code, words):
    decision = decided({BASE: 30.0, ROW: 10.0}, evidence=product(recipes=costing(rowwise=evidence)), bound=BOUND)
    if code is None:
        assert (decision.kernel, words in decision.why) == (ROW, True)
        return
    (found,) = (each for each in decision.rejected if each.kernel == ROW)
    assert found.code == code
    assert words in found.reason


@pytest.mark.parametrize(
    ("upper", "bias", "code"),
    [(0.04, 0.002, None), (0.04, -0.02, "over_bound"), (0.04, math.nan, "undecided"), (0.2, 0.002, "over_bound")],
)
def test_gradients_take_nothing_from_the_budget_and_are_held_to_error_and_bias(upper, bias, code):
    forward = product(recipes=costing(rowwise=1e-4))
    gradient = product(product="dgrad", recipes=(replace(recipe("rowwise", upper), bias=bias),))
    times = [*here({BASE: 30.0, ROW: 10.0}, forward), *here({BASE: 30.0, ROW: 10.0}, gradient)]
    plan = planned(forward, gradient, times=times)
    assert chosen(plan)["up", "fprop"] == "rowwise"
    decision = plan.decision("up", "dgrad")
    assert codes(decision).get(ROW) == code
    if code is None:
        assert decision.recipe == "rowwise"
        assert decision.loss is None
        assert "changes no loss in the same step" in decision.why
        assert "0.05" in decision.why
    assert any("row_error <= 0.05" in note and "<= 0.01" in note for note in plan.notes)


def test_a_plan_with_a_bound_on_the_loss_comes_back_from_its_file(tmp_path):
    pair = [product(site, recipes=costing(rowwise=8e-5, tensorwise=None)) for site in ("a", "b")]
    unbounded = product("c", recipes=costing(rowwise=loss(math.nan, kl=1e-6, samples=1)))
    plan = planned(*pair, unbounded, times=here({BASE: 30.0, ROW: 10.0}, pair[0]))
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert loaded.bound == BOUND
    assert loaded.hash == plan.hash
    assert sum(decision.loss.cost for decision in loaded.decisions if decision.loss) == 8e-5


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32))
def test_the_order_of_products_and_times_changes_no_byte(seed):
    generator = random.Random(seed)
    products = [product(f"s{at}", recipes=costing(rowwise=(3 + at % 2) * 1e-5, tensorwise=2e-5)) for at in range(8)]
    times = here({BASE: 30.0, ROW: 10.0, TENSOR: 14.0}, products[0])
    first = planned(*products, times=times)
    generator.shuffle(products)
    generator.shuffle(times)
    assert planned(*products, times=times).hash == first.hash


@pytest.mark.parametrize("same", [False, True], ids=["all different", "all alike"])
def test_two_thousand_sites_with_four_recipes_are_planned_in_five_seconds(same):
    generator = random.Random(0)
    names = ("tensorwise", "rowwise", "blockwise", "mxfp8")
    products = []
    for at in range(2000):
        scale = 1.0 if same else math.exp(generator.gauss(0, 2))
        costs = {name: scale * 1e-7 * (1 + index) for index, name in enumerate(names)}
        made = product(f"layers.{at}", m=64 * (1 + at % 16), m_max=2048, m_min=0, recipes=costing(**costs))
        products.append(made)
    kernels = [spec.name for spec in KERNELS if spec.recipe in names]
    times = []
    for made in products[:16]:
        speeds = {name: 10.0 * made.m / 64 / generator.uniform(1.1, 2.5) for name in kernels}
        times += here({BASE: 10.0 * made.m / 64, **speeds}, made)
    start = time.process_time()
    plan = planned(*products, times=times, bound=Bound(loss=1e-4))
    seconds = seconds_since(start)
    spent = math.fsum(decision.loss.cost for decision in plan.decisions if decision.loss)
    assert 0.95e-4 < spent <= 1e-4
    assert seconds < 5.0, f"{seconds:.1f} s"
