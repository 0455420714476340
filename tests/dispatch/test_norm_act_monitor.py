"""The monitor over layers with norm and activation in one kernel: where they go when something is wrong."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import loka
from loka.dispatch.monitoring import kernel_check, plan_watch
from loka.dispatch.running import linear as dispatch_linear
from loka.dispatch.running import routing
from loka.dispatch.running.convert import planned_sites
from loka.dispatch.running.executions import kernel_executions, reset_kernel_executions
from loka.kernel_registry.builtin import KERNELS
from loka.kernel_registry.norm_act import Defined, tensorwise_layer
from loka.kernel_registry.registry import Registry
from loka.kernel_registry.spec import KernelSpec
from loka.mods import BlockNorm, FuseEpilogue, HardSwish
from tests.dispatch.made_fused import FUSED, fused_decision
from tests.dispatch.made_monitor import batches, kinds, of_kind, train, with_next
from tests.probes.made_probe import places


class FusedModel(nn.Module):
    """The model of `made_monitor`, its first layer with norm and activation."""

    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(32, 48), nn.LayerNorm(48), nn.Linear(48, 16)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.down(self.act(self.norm(self.up(x))))


def fused_up():
    torch.manual_seed(0)
    model = FusedModel()
    loka.mods.apply(model, [BlockNorm(256), HardSwish(), FuseEpilogue()])
    return model


def plan_of(model, *others, kernel=FUSED["tensorwise"]):
    """The forward product on a fused kernel, and others that lost by their time alone."""
    plan = with_next(model, "up", "fprop", "tensorwise", *others)
    decisions = [fused_decision(each, kernel) if each.recipe else each for each in plan.decisions]
    return replace(plan, decisions=tuple(decisions))


def test_outliers_move_it_to_the_next_kernel_which_may_be_one_of_the_product_alone():
    model = fused_up()
    plan = plan_of(model, "rowwise")
    loka.convert(model, plan)
    with loka.monitor(model, plan, every=5, overhead=100.0) as monitor:
        train(model, batches(60, grows_at=20))
        reset_kernel_executions()
        train(model, batches(4, grows_at=0))
    assert "demoted" in kinds(monitor)
    assert monitor.changed == {"up.fprop": "emulated.linear.rowwise"}
    assert kernel_executions()["emulated.linear.rowwise"] >= 3
    assert FUSED["tensorwise"] not in kernel_executions()


def test_a_quiet_training_stays_as_planned():
    model = fused_up()
    plan = plan_of(model, "rowwise")
    loka.convert(model, plan)
    with loka.monitor(model, plan, every=5, overhead=100.0) as monitor:
        train(model, batches(40))
    assert kinds(monitor) == []
    assert monitor.changed == {}


class Late(Defined):
    """A fused kernel that works for a while."""

    fault = ""

    def forward(self, x, weight, bias, **options):
        out, y = super().forward(x, weight, bias, **options)
        if Late.fault == "nan":
            out = out.index_fill(0, torch.tensor([0]), math.nan)
        if Late.fault == "raises":
            raise RuntimeError("an illegal memory access was encountered")
        return out * (1.5 if Late.fault == "wrong" else 1.0), y


late_layer = Late(tensorwise_layer.recipe)


def late(a, b, *, product, out_dtype):
    return late_layer.forward(a, b, None, eps=None, out_dtype=out_dtype, save=False)[0]


@pytest.fixture
def registry(monkeypatch):
    made = Registry()
    here = "tests.dispatch.test_norm_act_monitor"
    name = "late.linear_norm_act.tensorwise"
    spec = KernelSpec(
        name=name,
        op="linear_norm_act",
        recipe="tensorwise",
        implementation=f"{here}:late",
        fused=f"{here}:late_layer",
        passes=("fprop",),
    )
    for each in (*KERNELS, spec):
        made.add(each, owner="loka")
    for module in (dispatch_linear, routing, kernel_check, plan_watch):
        monkeypatch.setattr(module, "default_registry", lambda: made)
    monkeypatch.setattr(dispatch_linear, "_loaded", {name: late})
    monkeypatch.setattr(dispatch_linear, "_fused", {"": None, name: late_layer})
    yield name
    Late.fault = ""


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("nan", "elements that are not finite, from finite operands"),
        ("wrong", "does not compute what tensorwise defines"),
        ("raises", "an illegal memory access"),
    ],
)
def test_a_fused_kernel_that_breaks_is_found_and_the_training_goes_on(registry, fault, words):
    model = fused_up()
    plan = plan_of(model, kernel=registry)
    loka.convert(model, plan)
    with loka.monitor(model, plan, every=1 if fault == "wrong" else 5, overhead=100.0) as monitor:
        train(model, batches(places(5, 25)[-1], loud=1.0))  # up to the next monitored step
        assert kinds(monitor) == []
        Late.fault = fault
        train(model, batches(20, loud=1.0))
    assert kinds(monitor) == ["kernel_fault", "demoted"]
    assert words in of_kind(monitor, "kernel_fault")[0].message
    assert monitor.changed == {"up.fprop": "high precision"}
    assert not planned_sites(model)["up"].planned
