"""Kernels that begin to give NaN between two monitored steps: the weights do not meet it."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

import loka
from loka.dispatch.monitoring import held_steps
from loka.hardware import device_info
from loka.probes.sampling.budget import Budget
from tests.dispatch.kernels_that_fail_late import Faults
from tests.dispatch.made_conversion import decision, needs_a_compiler, plan_for
from tests.dispatch.made_held import (
    BREAKS_AT,
    NAME,
    PASSES,
    STEPS,
    converted,
    in_a_closure,
    in_high_precision,
    is_finite,
    plain_step,
    planned,
    trained,
)
from tests.dispatch.made_monitor import Model, batches, kinds, of_kind
from tests.probes.made_probe import places

pytestmark = pytest.mark.usefixtures("late_registry")


@pytest.mark.parametrize("step", [plain_step, in_a_closure])
@pytest.mark.parametrize("which", PASSES)
def test_one_step_is_left_out_and_the_kernel_is_found_in_the_next(which, step, late_registry):
    model, monitor, losses = trained([which], step=step)
    assert kinds(monitor) == ["step_held", "kernel_fault", "demoted", "demoted"]
    held, fault = monitor.events[0], of_kind(monitor, "kernel_fault")[0]
    assert (held.step, fault.step) == (BREAKS_AT, BREAKS_AT + 1)
    assert "are not finite: the optimizer's step is left out" in held.message
    assert fault.message.startswith(f"{NAME} gave 1 of")
    assert "quarantined" in late_registry.unavailable(late_registry.get(NAME), device_info())
    assert is_finite(model)
    assert [at for at, loss in enumerate(losses) if not math.isfinite(loss)] in ([], [BREAKS_AT])
    exact = in_high_precision()
    assert sum(losses[-10:]) == pytest.approx(sum(exact[-10:]), rel=0.05)
    assert "1 steps of the optimizer left out" not in monitor.events[-1].message
    assert "1 step of the optimizer left out" in monitor.events[-1].message


def test_gradients_that_are_not_finite_in_high_precision_pass():
    model, plan = converted("fprop")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with loka.monitor(model, plan, every=1000, overhead=1e-9) as monitor:
        for at, x in enumerate(batches(12, loud=1.0)):
            x[3, 0] = math.inf if at >= 4 else 1.0
            plain_step(model, optimizer, x)
            assert is_finite(model) == (at < 5)  # held at 4, looked at and let through at 5
    told = [event for event in monitor.events if event.kind in ("step_held", "nonfinite_gradients")]
    assert [(event.kind, event.step) for event in told] == [("step_held", 4), ("nonfinite_gradients", 5)]


def test_one_bad_batch_costs_one_step_and_no_kernel(late_registry):
    model, plan = converted("fprop")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with loka.monitor(model, plan, every=1000, overhead=1e-9) as monitor:
        for at, x in enumerate(batches(12, loud=1.0)):
            x[3, 0] = math.nan if at == 4 else 1.0
            plain_step(model, optimizer, x)
    assert kinds(monitor) == ["step_held"]
    assert is_finite(model)
    assert late_registry.unavailable(late_registry.get(NAME), device_info()) is None


def test_a_sampled_micro_batch_does_not_excuse_those_before_it():
    """Of three micro-batches the last is monitored; NaN of the first is no doing of the training's own."""
    (model, plan), last = converted("fprop"), places(8, 40)[-1]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with loka.monitor(model, plan, every=8, overhead=100.0) as monitor:
        for at, x in enumerate(batches(last + 1, loud=1.0)):
            Faults.on = at == last - 2
            (model(x)[1:] - x[1:, :16]).square().mean().backward()
            if (last - at) % 3 == 0:
                assert (monitor._steps.sampler is not None) == (at in places(8, 40))
                optimizer.step()
                optimizer.zero_grad()
    assert kinds(monitor) == ["step_held"]
    assert monitor.events[0].step == last
    assert is_finite(model)


@pytest.mark.parametrize(("fused", "told_at"), [(False, BREAKS_AT + 1), (True, BREAKS_AT)])
def test_under_loss_scaling_the_kernel_is_found_before_the_scale_is_lost(fused, told_at):
    """The scaler leaves steps out without asking the optimizer, and only that none comes can be seen; or tells it."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)

    def step(model, optimizer, x):
        optimizer.zero_grad()
        loss = (model(x)[1:] - x[1:, :16]).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.item()

    make = partial(torch.optim.Adam, fused=fused)
    model, monitor, losses = trained(["fprop", "dgrad"], step=step, make=make)
    assert kinds(monitor) == ["no_step", "kernel_fault", *["demoted"] * 4]
    assert monitor.events[0].step == told_at
    assert of_kind(monitor, "kernel_fault")[0].step == told_at + 1
    assert scaler.get_scale() == 1024.0 / 2 ** (told_at + 1 - BREAKS_AT)
    assert is_finite(model)
    assert sum(losses[-10:]) == pytest.approx(sum(in_high_precision()[-10:]), rel=0.1)


def test_accumulation_and_evaluations_are_no_halt():
    model, plan = converted("fprop")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with loka.monitor(model, plan, every=1000, overhead=1e-9) as monitor:
        for at, x in enumerate(batches(40, loud=1.0)):
            model(x).square().mean().backward()
            if at % 4 == 3:
                optimizer.step()
                optimizer.zero_grad()
            if at == 19:
                with torch.no_grad():
                    for _ in range(10):
                        model(x)
    assert kinds(monitor) == []
    assert monitor.progress.sampled_steps == 1


def test_buffers_that_it_has_reached_are_named():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16), nn.BatchNorm1d(16))
    model.register_buffer("mask", torch.full((3, 3), -math.inf).triu())
    decisions = [decision("0", each, "tensorwise" if each == "fprop" else None, kernel=NAME) for each in PASSES[:1]]
    plan = plan_for(model, {}, decisions=tuple(decisions))
    loka.convert(model, plan)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with loka.monitor(model, plan, every=1000, overhead=1e-9) as monitor:
        for at, x in enumerate(batches(6, loud=1.0)):
            Faults.on = at == 3
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    (held,) = of_kind(monitor, "step_held")
    assert held.message.endswith("they have reached 1.running_mean, 1.running_var, which need a new start")


@pytest.mark.parametrize(("kernel", "looks"), [("emulated.linear.tensorwise", 0), (NAME, 3)])
def test_nothing_is_looked_at_where_every_kernel_is_the_definition(kernel, looks, monkeypatch):
    seen = []
    monkeypatch.setattr(held_steps, "are_finite", lambda gradients: seen.append(len(gradients)) or True)
    model, plan = converted("fprop", kernel=kernel)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with loka.monitor(model, plan, every=1000):
        for x in batches(3, loud=1.0):
            plain_step(model, optimizer, x)
    assert seen == [4] * looks


def test_other_models_and_what_comes_behind_the_block_are_left_alone():
    model, other = Model(), nn.Linear(32, 16)
    plan = planned(model, "fprop")
    loka.convert(model, plan)
    optimizer = torch.optim.SGD(other.parameters(), lr=1e-2)

    def spoil():
        other.zero_grad()
        other(torch.full((4, 32), math.inf)).sum().backward()
        optimizer.step()
        return is_finite(other)

    with loka.monitor(model, plan, every=1000):
        model(next(iter(batches(1, loud=1.0)))).sum().backward()
        assert not spoil()
    torch.nn.init.ones_(other.weight)
    torch.nn.init.ones_(other.bias)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    model(torch.full((4, 32), math.inf)).sum().backward()
    optimizer.step()
    assert not is_finite(model)


@needs_a_compiler
def test_compiled_code_is_recovered_alike():
    def compiled(model, plan):
        return torch.compile(model, backend="loka", options={"plan": plan}, fullgraph=True)

    # The first step is monitored, in eager code; with the next the graph is made, the broken kernel in it.
    model, monitor, losses = trained(["fprop"], call=compiled, breaks_at=1)
    assert kinds(monitor) == ["step_held", "kernel_fault", "demoted", "demoted"]
    assert [event.step for event in monitor.events[:2]] == [1, 2]
    assert is_finite(model)
    assert [at for at, loss in enumerate(losses) if not math.isfinite(loss)] == [1]


def test_no_step_is_held_where_none_is_to_be():
    model, monitor, _ = trained(["fprop"], hold_steps=False)
    assert not is_finite(model)
    assert "step_held" not in kinds(monitor)


def test_what_a_look_takes_is_told_and_takes_no_sample_away():
    budget = Budget(every=10, overhead=0.01, scheduled=1, aside_s=1e6)
    assert budget.begin_sample(0.0)
    budget.end_sample(0.5)  # 50 s of the run earn it, 50 s more the next one
    assert not replace(budget).begin_sample(99.0)
    assert replace(budget).begin_sample(101.0)
    assert replace(budget).begin_sample(1.0, urgent=True)
    _, monitor, _ = trained(["fprop"], breaks_at=STEPS)
    assert monitor.progress.probe_s > monitor._steps.budget.aside_s > 0
