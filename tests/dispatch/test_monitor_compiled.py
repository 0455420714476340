"""The monitor over compiled code: a demotion takes effect there, and costs one compilation."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import loka
from loka.dispatch.monitoring import effect
from loka.dispatch.running.executions import kernel_executions, reset_kernel_executions
from tests.dispatch.made_conversion import needs_a_compiler, plan_for
from tests.dispatch.made_monitor import TENSORWISE, Model, batches, kinds, train

pytestmark = needs_a_compiler
TENSORWISE_KERNEL = "emulated.linear.tensorwise"


def graphs():
    return int(counters["stats"]["unique_graphs"])


@pytest.fixture(autouse=True)
def _nothing_kept():
    yield
    effect._changed.clear()
    effect._graphs.clear()


def in_backend(model, plan):
    return torch.compile(model, backend="loka", options={"plan": plan}, fullgraph=True)


def converted_then_compiled(model, plan):
    return torch.compile(loka.convert(model, plan), backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("make", [in_backend, converted_then_compiled])
def test_a_demotion_costs_one_compilation_and_a_promotion_another(make):
    model = Model()
    plan = plan_for(model, TENSORWISE)
    compiled = make(model, plan)
    train(model, batches(3), call=compiled)
    reset_kernel_executions()
    with loka.monitor(compiled, plan, every=5, overhead=100.0, clean_steps=4) as monitor:
        before = graphs()
        train(model, batches(50), call=compiled)
        assert graphs() == before
        assert kinds(monitor) == []
        train(model, batches(50, grows_at=0), call=compiled)
        assert set(monitor.changed) == {"up.fprop", "up.wgrad"}
        steps = {event.step for event in monitor.events if event.kind == "demoted"}
        assert graphs() == before + len(steps)
        demoted = graphs()
        train(model, batches(50), call=compiled)
        promoted = {event.step for event in monitor.events if event.kind == "promoted"}
        assert monitor.changed == {}
        assert graphs() <= demoted + len(promoted)
    after = graphs()
    train(model, batches(5), call=compiled)
    assert graphs() <= after + 1


def test_what_was_demoted_is_not_in_the_graph_any_more():
    model = Model()
    plan = plan_for(model, TENSORWISE)
    compiled = in_backend(model, plan)
    with loka.monitor(compiled, plan, every=2, overhead=100.0) as monitor:
        train(model, batches(30, grows_at=15), call=compiled)
    assert set(monitor.changed) == {"up.fprop", "up.wgrad"}
    reset_kernel_executions()
    train(model, batches(4), call=compiled)
    counts = kernel_executions()
    reset_kernel_executions()
    assert TENSORWISE_KERNEL not in counts


def test_other_compiled_models_are_left_alone():
    model, other, stranger = Model(), Model(), nn.Sequential(nn.Linear(32, 8))
    plan = plan_for(model, TENSORWISE)
    other_plan = plan_for(other, {"up": {"fprop": "rowwise"}})
    compiled, compiled_other = in_backend(model, plan), in_backend(other, other_plan)
    compiled_stranger = torch.compile(stranger, backend="eager")
    x = next(batches(1))
    for each in (compiled, compiled_other, compiled_stranger):
        each(x).sum().backward()
    before = graphs()
    effect.put_into_effect(model, plan, {("up", "fprop"): ""})
    for each in (compiled_other, compiled_stranger):
        each(x).sum().backward()
    assert graphs() == before
    compiled(x).sum().backward()
    assert graphs() == before + 1


def test_many_changes_do_not_run_into_the_limit_of_recompilations():
    model = Model()
    plan = plan_for(model, TENSORWISE)
    compiled = torch.compile(loka.convert(model, plan), backend="eager", fullgraph=True)
    x = next(batches(1))
    names = ["emulated.linear.rowwise", "emulated.linear.tensorwise", "emulated.linear.blockwise", ""]
    for fprop in names:
        for wgrad in names[:3]:
            effect.put_into_effect(model, plan, {("up", "fprop"): fprop, ("up", "wgrad"): wgrad})
            compiled(x).sum().backward()  # fullgraph=True raises at the limit


def test_a_kernel_that_is_out_of_use_is_not_asked_for_when_compiling_again():
    model = Model()
    plan = plan_for(model, TENSORWISE)
    compiled = in_backend(model, plan)
    x = next(batches(1))
    compiled(x)
    effect.put_into_effect(model, plan, {("up", "fprop"): "", ("up", "wgrad"): ""})
    reset_kernel_executions()
    compiled(x).sum().backward()
    counts = kernel_executions()
    reset_kernel_executions()
    assert TENSORWISE_KERNEL not in counts
