"""What conversion refuses, with the model untouched, and what it leaves as it is."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import loka
from loka.dispatch.freezing.freeze import freeze
from loka.dispatch.running.convert import convert, planned_sites, revert
from loka.errors import ArgumentError, ModError, PlanError
from tests.dispatch.made_conversion import MIXED, emulated, plan_for
from tests.dispatch.made_converted import Mlp, state_of

# --- refusals ---


def test_a_plan_for_another_model_or_shape_is_refused() -> None:
    wider = Mlp()
    wider.up = nn.Linear(16, 64)
    for other, difference in ((nn.Sequential(nn.Linear(16, 4)), "is missing"), (wider, r"up.weight is \[")):
        model = Mlp()
        state = state_of(model)
        with pytest.raises(PlanError, match=difference):
            convert(model, plan_for(other, ["up"] if other is wider else ["0"]))
        assert state_of(model) == state


def test_a_plan_may_be_given_by_its_path_and_anything_else_is_refused(tmp_path: Path) -> None:
    model = Mlp()
    plan_for(model, ["up"]).save(tmp_path / "plan.json")
    for path in (tmp_path / "plan.json", str(tmp_path / "plan.json")):
        assert set(planned_sites(convert(Mlp(), path))) == {"up"}
    with pytest.raises(PlanError, match="could not be read"):
        convert(model, tmp_path / "none.json")
    with pytest.raises(ArgumentError, match=r"not dict: loka\.plan"):
        convert(model, {"plan": "plan.json"})  # type: ignore[arg-type]
    assert not planned_sites(model)


def test_a_site_that_the_model_does_not_have_is_refused_before_anything_changes() -> None:
    model = Mlp()
    state = state_of(model)
    with pytest.raises(PlanError, match="has the site 'upp'"):
        convert(model, plan_for(model, ["down", "up", "upp"]))
    assert state_of(model) == state


def test_a_kernel_that_cannot_run_is_refused_before_anything_changes(caplog: pytest.LogCaptureFixture) -> None:
    model = Mlp()
    plan = plan_for(model, ["up", "down"])
    last = replace(plan.decisions[-1], kernel="hopper.linear.blockwise")
    plan = replace(plan, decisions=(*plan.decisions[:-1], last))
    state = state_of(model)
    with pytest.raises(PlanError, match=r"hopper.linear.blockwise on up.wgrad.*emulate=True"):
        convert(model, plan)
    assert state_of(model) == state
    with caplog.at_level(logging.INFO, logger="loka.dispatch"):
        convert(model, plan, emulate=True)
    assert planned_sites(model)["up"].wgrad == emulated("blockwise")
    assert "stands in" in caplog.text


def test_a_converted_model_is_not_converted_again() -> None:
    model = convert(model := Mlp(), plan_for(model, ["up"]))
    state = state_of(model)
    with pytest.raises(PlanError, match="Mlp is converted already \\(see 'up'\\)"):
        convert(model, plan_for(model, ["down"]))
    assert state_of(model) == state


@pytest.mark.parametrize("how", ["wrapped", "in place", "a part"])
def test_a_compiled_model_is_not_converted(how: str) -> None:
    model: nn.Module = Mlp()
    plan = plan_for(model, ["up"])
    if how == "wrapped":
        target = torch.compile(model, backend="eager")
    else:
        target = model
        (model if how == "in place" else model.up).compile(backend="eager")
    state = state_of(model)
    with pytest.raises(PlanError, match=r"is compiled.*Convert first"):
        convert(target, plan)
    assert state_of(model) == state


def test_a_plan_in_which_nothing_gains_changes_nothing() -> None:
    model = Mlp()
    state = state_of(model)
    convert(model, plan_for(model, {"up": {}, "down": {}}))
    assert state_of(model) == state
    assert planned_sites(model) == {}


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_a_converted_bf16_model_compiles_in_one_graph(recipe: str) -> None:
    model = Mlp().bfloat16()
    convert(model, plan_for(model, {"up": dict.fromkeys(MIXED, recipe)}))
    x = torch.randn(5, 16, dtype=torch.bfloat16)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x))


def test_the_front_door_leads_here() -> None:
    assert loka.convert is convert


def test_a_model_that_is_watched_is_left_until_its_block_ends(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, plain = Mlp(), Mlp()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(8, 16)
    plan = plan_for(model, ["up"])
    with loka.probe(model, tmp_path / "run.db", every=1):
        before = model(x)
        for change in (convert, freeze):
            with pytest.raises(
                PlanError, match=r"'The model' is watched by a probe or a monitor.* Leave the block first"
            ):
                change(model, plan)
        with pytest.raises(ModError, match="is watched by a probe or a monitor"):
            loka.mods.apply(model, [loka.mods.NoBias()])
        assert torch.equal(model(x), before)
    convert(model, plan)
    with loka.monitor(model, plan):
        model(x)
        with pytest.raises(PlanError, match="is watched by a probe or a monitor"):
            revert(model)
    revert(model)
    assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize("given", [None, nn.Linear, torch.zeros(2), "model"], ids=repr)
def test_what_is_no_module_is_refused_in_words(given: object) -> None:
    plan = plan_for(Mlp(), ["up"])
    named = "the class Linear" if isinstance(given, type) else type(given).__name__
    for name, change in (("convert", convert), ("freeze", freeze), ("revert", lambda model, _: revert(model))):
        with pytest.raises(ArgumentError, match=f"loka.{name} takes the torch.nn.Module .*, not {named}"):
            change(given, plan)  # type: ignore[arg-type]
