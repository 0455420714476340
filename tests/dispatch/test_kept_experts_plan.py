"""A plan keeps single experts in high precision where their own error asks for it, and says so."""

import pytest
import torch

import loka
from loka.dispatch.deciding.plan import Plan
from loka.dispatch.running.convert import planned_sites
from tests.probes.made_fragile_experts import FRAGILE, TOKENS, Grouped, Looped, Stacked, rows, train_probed

SHARE = TOKENS[FRAGILE] / sum(TOKENS)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Databases of experts under tensorwise scales, which one loud row spoils for its whole expert."""
    torch.manual_seed(0)
    found = {}
    for kind in (Grouped, Looped, Stacked):
        model = kind()
        path = tmp_path_factory.mktemp("runs") / f"{kind.__name__}.db"
        train_probed(model, path, steps=90, recipes=["tensorwise"])
        found[kind] = model, path
    return found


def planned(path, bound, speedup=1.5):
    return loka.plan(path, loka.Bound(row_error=bound), device="cpu", assume_speedup=speedup)


def test_a_layer_within_the_bound_runs_without_its_fragile_expert(runs):
    _, path = runs[Grouped]
    decision = planned(path, 0.075).decision("weight_of", "fprop")
    assert decision.recipe == "tensorwise"
    assert decision.kept_experts == (FRAGILE,)
    assert f"expert {FRAGILE} ({100 * SHARE:.3g} % of the tokens)" in decision.why
    # What the baseline computes once more is charged.
    apart = planned(path, 1.0).decision("weight_of", "fprop")
    assert apart.kept_experts == ()
    assert decision.time_us / apart.time_us == pytest.approx(1 + SHARE * 1.5, rel=0.05)


def test_a_layer_above_the_bound_is_rescued_by_its_other_experts(runs):
    _, path = runs[Grouped]
    report_bound = 0.056  # between the experts' own errors and that of the layer
    decision = planned(path, report_bound).decision("weight_of", "fprop")
    assert decision.error_upper > report_bound
    assert decision.kept_experts == (FRAGILE,)
    assert "every other one is within it by itself" in decision.why


def test_nothing_is_kept_where_all_experts_are_above_the_bound_or_nothing_is_gained(runs):
    _, path = runs[Grouped]
    strict = planned(path, 0.01).decision("weight_of", "fprop")
    assert strict.recipe is None
    assert strict.kept_experts == ()
    slow = planned(path, 0.075, speedup=1.1).decision("weight_of", "fprop")
    assert slow.recipe is None
    assert {each.code for each in slow.rejected if each.recipe == "tensorwise"} <= {"no_gain", "unavailable", "cannot"}


def test_a_bound_on_something_else_keeps_none(runs):
    _, path = runs[Grouped]
    plan = loka.plan(path, loka.Bound(sqnr_db=15), device="cpu", assume_speedup=1.5)
    assert plan.decision("weight_of", "fprop").kept_experts == ()


@pytest.mark.parametrize("kind", [Grouped, Looped, Stacked])
def test_the_plan_runs_as_it_says(runs, kind, tmp_path):
    model, path = runs[kind]
    plan = planned(path, 0.075)
    plan.save(tmp_path / "plan.json")
    kept = plan.decision(kind.site, "fprop").kept_experts
    assert kept == (FRAGILE,)
    x = rows(200)
    exact = model(x, TOKENS)
    loka.convert(model, Plan.load(tmp_path / "plan.json"))
    try:
        assert planned_sites(model)[kind.site].kept[0] == kept
        out = model(x, TOKENS)
    finally:
        loka.revert(model)
    start = sum(TOKENS[:FRAGILE])
    own = slice(start, start + TOKENS[FRAGILE])
    others = torch.ones(len(x), dtype=torch.bool)
    others[own] = False
    torch.testing.assert_close(out[own], exact[own])
    assert not torch.equal(out[others], exact[others])
