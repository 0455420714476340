"""Bounds per site and in decibels, from evidence to a plan and back: who is held to what, and that it is said."""

import math
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loka.bounds import Bound
from loka.dispatch.deciding.plan import Plan
from loka.dispatch.deciding.planner import PlanOptions, decide_all
from loka.errors import ArgumentError, PlanError
from loka.formats import PASSES
from loka.hardware import device_info
from loka.kernel_registry.builtin import KERNELS
from loka.probes.judging.evidence import ErrorInterval, GatedError
from loka.probes.judging.loss_evidence import LossEvidence
from tests.dispatch.made_evidence import built_in, decided, product, recipe, run, timings

BASE, ROW, TENSOR = "torch.mm.bf16", "emulated.linear.rowwise", "emulated.linear.tensorwise"
TIMES = {BASE: 30.0, ROW: 12.0, TENSOR: 14.0}
OPTIONS = PlanOptions(device=torch.device("cpu"), measure=False)


def felt(name, upper, *, whole=None, cost=None):
    """One recipe with a row error, an error of the whole tensor, and a cost in loss."""
    made = recipe(name, upper)
    if whole is not None:
        error = ErrorInterval(mean=0.9 * whole, low=0.8 * whole, high=whole, p99=whole, upper_tolerance=whole)
        made = replace(made, whole=GatedError(gate="relative_error", error=error))
    if cost is not None:
        loss = {"kl": 0.8 * cost, "kl_low": 0.6 * cost, "kl_high": cost, "first_order": 0.0, "first_order_low": -1.0}
        loss |= {"spread": 0.0, "low": 0.0, "high": cost, "samples": 12, "labels": "closed"}
        made = replace(made, loss=LossEvidence(**loss), bias=1e-4)
    return made


def planned(products, bound, times=None, registry=None):
    """Plan on this machine, each product timed as `times` says."""
    times = TIMES if times is None else times
    measured = [each for one in products for each in timings(times, of=one, device=device_info("cpu"))]
    return decide_all(run(*products), bound, registry or built_in(), measured, OPTIONS)


def test_a_bound_in_decibels_is_compared_with_the_error_of_the_whole_tensor():
    evidence = product(recipes=(felt("rowwise", 0.2, whole=0.01), felt("tensorwise", 0.001, whole=0.02)))
    plan = planned([evidence], Bound(sqnr_db=38))  # 0.0126
    (decision,) = plan.decisions
    assert (decision.kernel, decision.error_upper, decision.gate) == (ROW, 0.01, "relative_error")
    assert "relative_error up to 0.01 (40 dB) is within the bound 0.0126 (38 dB)" in decision.why
    (lost,) = (each for each in decision.rejected if each.kernel == TENSOR)
    assert (lost.code, lost.error_upper) == ("over_bound", 0.02)
    assert "relative_error up to 0.02 (34 dB)" in lost.reason
    assert "against the bound 0.0126 (38 dB)" in lost.reason
    assert "within sqnr_db >= 38 dB at 95 % confidence" in plan.notes[0]


def test_the_choice_changes_with_the_ratio():
    evidence = product(recipes=(felt("rowwise", 1.0, whole=0.01), felt("tensorwise", 1.0, whole=0.02)))
    times = {BASE: 30.0, ROW: 12.0, TENSOR: 10.0}
    assert [planned([evidence], Bound(sqnr_db=db), times).decisions[0].kernel for db in (50, 39, 30)] == [
        BASE,
        ROW,
        TENSOR,
    ]


def test_evidence_that_bounds_no_whole_tensor_is_undecided_under_a_ratio():
    decision = decided({BASE: 20.0, "torch.scaled_mm.rowwise": 1.0}, bound=Bound(sqnr_db=1))
    assert decision.kernel == BASE
    reasons = {each.kernel: (each.code, each.reason) for each in decision.rejected}
    code, reason = reasons["torch.scaled_mm.rowwise"]
    assert code == "undecided"
    assert "the error of its whole tensor was not bounded" in reason


def test_a_head_is_gated_by_its_own_relative_error_under_a_ratio():
    evidence = product(n=4, recipes=(recipe("rowwise", 0.01, gate="relative_error"),))
    assert planned([evidence], Bound(sqnr_db=38)).decisions[0].kernel == ROW


def test_sites_with_a_bound_of_their_own_are_held_to_it_and_the_plan_says_so():
    products = [product(site, recipes=(recipe("rowwise", 0.03),)) for site in ("body.0", "body.1", "head.out")]
    bound = Bound(row_error=0.05, per_site={"head": Bound(row_error=0.01)})
    plan = planned(products, bound)
    chosen = {each.request.site: each for each in plan.decisions}
    assert {site: each.recipe for site, each in chosen.items()} == {
        "body.0": "rowwise",
        "body.1": "rowwise",
        "head.out": None,
    }
    assert "against the bound 0.01 of 'head'" in chosen["head.out"].why
    assert "Held to a bound of their own: row_error <= 0.01 on 'head' (1 product)." in plan.notes


def test_a_looser_bound_of_its_own_admits_what_the_others_may_not_have():
    products = [product(site, recipes=(recipe("rowwise", 0.03),)) for site in ("body", "head")]
    plan = planned(products, Bound(row_error=0.01, per_site={"head": Bound(row_error=0.05)}))
    assert [each.recipe for each in plan.decisions] == [None, "rowwise"]
    assert "within the bound 0.05 of 'head'" in plan.decision("head", "fprop").why


def test_a_site_with_a_bound_of_its_own_leaves_the_budget_of_loss():
    products = [product(site, recipes=(felt("rowwise", 0.03, cost=0.9e-4),)) for site in ("a", "b", "c")]
    shared = planned(products, Bound(loss=1e-4))
    assert sum(each.recipe is not None for each in shared.decisions) == 1
    plan = planned(products, Bound(loss=1e-4, per_site={"a": Bound(row_error=0.05), "b": Bound(row_error=0.001)}))
    assert [each.recipe for each in plan.decisions] == ["rowwise", None, "rowwise"]
    assert "spends up to 9e-05 of the loss" in plan.decision("c", "fprop").why
    assert "row_error up to 0.03 is within the bound 0.05 of 'a'" in plan.decision("a", "fprop").why
    assert any("take no part in the budget of loss" in note for note in plan.notes)
    assert any("9e-05 (90 %) is spent, by 1 of the 1 fprop" in note for note in plan.notes)


def test_a_pattern_that_covers_no_site_is_refused_with_the_nearest():
    with pytest.raises(ArgumentError, match=r"'haed' matches no site.*'head'"):
        planned([product("head")], Bound(row_error=0.05, per_site={"haed": Bound(row_error=0.01)}))


def test_a_plan_with_bounds_per_site_comes_back_from_its_file(tmp_path):
    bound = Bound(sqnr_db=25, per_site={"re:u.*": Bound(row_error=0.05), "*": Bound(sqnr_db=40)})
    plan = planned([product("up"), product("down", recipes=(felt("rowwise", 0.1, whole=0.1),))], bound)
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan
    assert again.bound == bound
    assert again.hash == plan.hash


def test_a_plan_written_before_there_were_such_bounds_still_loads(tmp_path):
    plan = planned([product("up")], Bound(row_error=0.05))
    text = plan.text()
    old = text.replace(',"per_site":[]', "").replace('"gate":"row_error",', "")
    assert old != text
    assert "sqnr" not in old.partition('"fingerprint"')[0]
    (tmp_path / "old.json").write_text(old, encoding="utf-8")
    loaded = Plan.load(tmp_path / "old.json")
    assert loaded.bound == Bound(row_error=0.05)
    assert [each.kernel for each in loaded.decisions] == [each.kernel for each in plan.decisions]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ('{"pattern":"up"}', "exactly one thing"),
        ('{"pattern":"re:(","row_error":0.1}', "not a valid regular expression"),
        ('{"pattern":"up","row_error":0.1,"loss":1e-4}', "'loss' is unknown"),
        ('{"pattern":"up","row_error":0.1},{"pattern":"up","row_error":0.2}', "twice"),
    ],
)
def test_a_plan_with_a_bound_that_cannot_be_is_refused(entry, message, tmp_path):
    text = planned([product("up")], Bound(row_error=0.05)).text()
    (tmp_path / "bad.json").write_text(text.replace('"per_site":[]', f'"per_site":[{entry}]'), encoding="utf-8")
    with pytest.raises(PlanError, match=message):
        Plan.load(tmp_path / "bad.json")


# --- the same evidence makes the same plan, byte for byte ---

LIMITS = st.one_of(
    st.sampled_from([0.005, 0.02, 0.04, 0.2]).map(lambda value: Bound(row_error=value)),
    st.sampled_from([26.0, 34.0, 45.0]).map(lambda value: Bound(sqnr_db=value)),
)
BUDGETS = st.sampled_from([1e-6, 5e-5, 2e-4, 1.0]).map(lambda value: Bound(loss=value))
PATTERNS = st.dictionaries(st.sampled_from(["s0", "s*", "re:s[12]", "s[345]"]), LIMITS, max_size=3)
LINEAR = [spec for spec in KERNELS if spec.op == "linear" and spec.library in ("torch", "emulated")]


@settings(max_examples=30, deadline=None)
@given(
    general=LIMITS | BUDGETS,
    own=PATTERNS,
    numbers=st.lists(st.integers(0, 10**9), min_size=6, max_size=6),
    order=st.randoms(use_true_random=False),
)
def test_no_order_changes_a_byte_under_any_bound(general, own, numbers, order):
    bound = replace(general, per_site=own)
    products = [made(at, number) for at, number in enumerate(numbers)]
    times = [
        each
        for one, number in zip(products, numbers, strict=True)
        for each in timings(
            {spec.name: 8.0 + random.Random(number + at).random() * 9 for at, spec in enumerate(LINEAR)},
            of=one,
            device=device_info("cpu"),
        )
    ]
    straight = decide_all(run(*products), bound, built_in(), times, OPTIONS)
    shuffled = [replace(each, recipes=tuple(shuffle(each.recipes, order))) for each in shuffle(products, order)]
    kernels = shuffle(KERNELS, order)
    # What computes a product without LoKA is the first that can: baselines keep their order.
    kernels = [*(spec for spec in KERNELS if spec.is_baseline), *(spec for spec in kernels if not spec.is_baseline)]
    again = decide_all(run(*shuffled), bound, built_in(kernels), shuffle(times, order), OPTIONS)
    assert again.text() == straight.text()
    assert again.hash == straight.hash


def made(at, number):
    """One product whose recipes have errors and costs that a number says."""
    draw = random.Random(number)
    recipes = tuple(
        felt(
            name,
            draw.choice([0.003, 0.01, 0.03, 0.1]),
            whole=draw.choice([0.004, 0.02, 0.06]),
            cost=10 ** -draw.uniform(3, 7),
        )
        for name in ("tensorwise", "rowwise", "blockwise", "mxfp8")
    )
    return product(f"s{at}", product=PASSES[at % 2], recipes=recipes, m=64 * (1 + at % 3), m_min=0)


def shuffle(items, order):
    return order.sample(list(items), len(items))


def test_the_generated_plans_are_not_all_alike():
    """Else the test above would compare nothing."""
    plans = [planned([made(at, number) for at in range(3)], Bound(row_error=0.02)) for number in range(6)]
    assert len({tuple(each.kernel for each in plan.decisions) for plan in plans}) > 1
    assert math.prod(len(plan.decisions) for plan in plans) == 3**6
