"""Kernels that stop working in the middle of a training: found on monitored steps, and taken out of use."""

import logging
import math

import pytest
import torch

import loka
from loka.dispatch.monitoring import kernel_check, plan_watch
from loka.dispatch.running import linear as dispatch_linear
from loka.dispatch.running import routing
from loka.dispatch.running.convert import planned_sites
from loka.hardware import device_info
from loka.kernel_registry.builtin import KERNELS
from loka.kernel_registry.registry import Registry
from loka.kernel_registry.spec import KernelSpec
from tests.dispatch.kernels_that_fail_late import Faults
from tests.dispatch.made_conversion import decision, plan_for
from tests.dispatch.made_monitor import Model, batches, kinds, of_kind, train, with_next
from tests.probes.made_probe import places

KINDS = ("gives_nan", "raises", "is_off", "is_wrong")


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """A default registry that has the failing kernels, too; nothing is loaded, and no fault is on."""
    made = Registry()
    for spec in KERNELS:
        made.add(spec, owner="loka")
    for name in KINDS:
        where = f"tests.dispatch.kernels_that_fail_late:{name}"
        made.add(
            KernelSpec(name=f"late.linear.{name}", op="linear", recipe="tensorwise", implementation=where), owner="x"
        )
    for module in (dispatch_linear, routing, kernel_check, plan_watch):
        monkeypatch.setattr(module, "default_registry", lambda: made)
    monkeypatch.setattr(dispatch_linear, "_loaded", {})
    monkeypatch.setattr(Faults, "on", False)
    return made


def planned(model, name):
    """A plan with one failing kernel in fprop of both layers."""
    decisions = [
        decision(site, product, "tensorwise" if product == "fprop" else None, kernel=kernel)
        for site in ("up", "down")
        for product in ("fprop", "dgrad", "wgrad")
        for kernel in [f"late.linear.{name}" if product == "fprop" else None]
    ]
    return plan_for(model, {}, decisions=tuple(decisions))


def breaking(model, plan, *, steps=20, every=5):
    """Train some steps, break the kernel, train on; return the monitor and the losses since."""
    loka.convert(model, plan)
    with loka.monitor(model, plan, every=every, overhead=100.0) as monitor:
        train(model, batches(steps, loud=1.0))
        assert kinds(monitor) == []
        Faults.on = True
        losses = train(model, batches(40, loud=1.0))
    return monitor, losses


def test_a_kernel_that_gives_nan_is_found_at_the_next_monitored_step_and_out_of_use_everywhere(registry, caplog):
    model, due = Model(), places(5, 25)[-1]
    plan = planned(model, "gives_nan")
    loka.convert(model, plan)
    with (
        caplog.at_level(logging.WARNING, "loka.monitor"),
        loka.monitor(model, plan, every=5, overhead=100.0) as monitor,
    ):
        train(model, batches(due, loud=1.0))
        Faults.on = True
        losses = train(model, batches(40, loud=1.0))
    assert kinds(monitor) == ["kernel_fault", "demoted", "demoted"]
    fault = of_kind(monitor, "kernel_fault")[0]
    assert fault.step == due
    assert fault.message.startswith("late.linear.gives_nan gave 1 of 3072 elements that are not finite, from finite")
    assert monitor.changed == {"up.fprop": "high precision", "down.fprop": "high precision"}
    assert "quarantined" in registry.unavailable(registry.get("late.linear.gives_nan"), device_info())
    assert all(map(math.isfinite, losses))
    assert "late.linear.gives_nan" in caplog.text


def test_a_kernel_that_raises_is_replaced_in_the_step_and_its_products_move_on():
    model = Model()
    plan = planned(model, "raises")
    monitor, losses = breaking(model, plan, steps=18)
    assert kinds(monitor) == ["kernel_fault", "demoted", "demoted"]
    assert "an illegal memory access" in of_kind(monitor, "kernel_fault")[0].message
    assert set(monitor.changed) == {"up.fprop", "down.fprop"}
    assert not planned_sites(model)["up"].planned
    assert all(map(math.isfinite, losses))


def test_a_faulty_kernel_gives_way_to_the_next_one_and_does_not_come_back():
    model = Model()
    first = with_next(model, "up", "fprop", "tensorwise", "rowwise")
    plan = plan_for(
        model,
        {},
        decisions=tuple(
            decision("up", each.request.product, each.recipe, kernel="late.linear.gives_nan", rejected=each.rejected)
            if each.recipe
            else each
            for each in first.decisions
        ),
    )
    loka.convert(model, plan)
    with loka.monitor(model, plan, every=2, overhead=100.0, clean_steps=1) as monitor:
        Faults.on = True
        train(model, batches(1, loud=1.0))
        Faults.on = False
        train(model, batches(40, loud=1.0))
    assert kinds(monitor) == ["kernel_fault", "demoted"]
    assert monitor.changed == {"up.fprop": "emulated.linear.rowwise"}


def test_a_kernel_that_differs_from_its_definition_within_the_limit_is_told_once_and_stays():
    model = Model()
    monitor, _ = breaking(model, planned(model, "is_off"), every=1)
    assert kinds(monitor) == ["kernel_differs"]
    assert "does not compute what tensorwise defines" in monitor.events[0].message
    assert monitor.changed == {}


def test_a_kernel_that_is_far_from_its_definition_is_out_of_use():
    model = Model()
    monitor, _ = breaking(model, planned(model, "is_wrong"), every=1)
    assert kinds(monitor) == ["kernel_fault", "demoted", "demoted"]
    assert of_kind(monitor, "kernel_fault")[0].step <= 20 + 8  # compared in one check of eight


def test_operands_that_are_not_finite_are_no_fault_of_a_kernel(registry):
    model = Model()
    plan = planned(model, "gives_nan")
    loka.convert(model, plan)
    with loka.monitor(model, plan, every=1, overhead=100.0) as monitor:
        for x in batches(6, loud=math.inf):
            model(x).sum().backward()
    assert "kernel_fault" not in kinds(monitor)
    assert registry.unavailable(registry.get("late.linear.gives_nan"), device_info()) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", ["torch.scaled_mm.tensorwise", "torch.linear_layer.tensorwise"])
def test_a_sound_kernel_of_a_library_is_not_complained_of(registry, kernel, dtype):
    assert registry.unavailable(registry.get(kernel), device_info()) is None
    model = Model().to(dtype)
    decisions = [
        decision(site, each, "tensorwise", kernel=kernel, dtype=str(dtype).removeprefix("torch."))
        for site in ("up", "down")
        for each in ("fprop", "dgrad", "wgrad")
    ]
    plan = plan_for(model, {}, decisions=tuple(decisions), bound=loka.Bound(row_error=0.2))
    loka.convert(model, plan)
    with loka.monitor(model, plan, every=1, overhead=100.0) as monitor:
        train(model, (x.to(dtype) for x in batches(30, loud=1.0)))
    assert kinds(monitor) == []


def test_one_pass_of_a_kernel_of_all_passes_leaves_it_alone():
    model = Model()
    kernel = "emulated.linear_layer.tensorwise"
    decisions = [decision("up", each, "tensorwise", kernel=kernel) for each in ("fprop", "dgrad", "wgrad")]
    plan = plan_for(model, {}, decisions=tuple(decisions))
    loka.convert(model, plan)
    with loka.monitor(model, plan, every=5, overhead=100.0) as monitor:
        losses = train(model, batches(60, grows_at=30))
    assert set(monitor.changed) == {"up.fprop", "up.wgrad"}
    assert planned_sites(model)["up"].as_tuple() == ("", kernel, "")
    assert all(map(math.isfinite, losses))
