"""What a plan means here: names of kernels that can run, or a refusal that says why."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from loka.dispatch.deciding.plan import Plan
from loka.dispatch.running import linear as op
from loka.dispatch.running import routing
from loka.dispatch.running.routing import SiteKernels, device_of, site_kernels
from loka.errors import KernelError, PlanError
from loka.formats import PASSES
from loka.kernel_registry.builtin import KERNELS
from loka.kernel_registry.registry import Registry
from loka.kernel_registry.spec import KernelSpec
from tests.dispatch.made_conversion import decision, emulated, plan_for

CPU = torch.device("cpu")
GPU_ONLY = KernelSpec(
    name="gpu.linear.rowwise",
    op="linear",
    recipe="rowwise",
    implementation="loka.kernel_registry.emulated:rowwise",
    device_types=("cuda",),
)
FORWARD_ONLY = KernelSpec(
    name="forward.linear.rowwise",
    op="linear",
    recipe="rowwise",
    implementation="loka.kernel_registry.emulated:rowwise",
    passes=("fprop",),
)
BROKEN = KernelSpec(name="broken.linear.rowwise", op="linear", recipe="rowwise", implementation="no_such_module:kernel")


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """The built-in kernels and three that cannot serve everything here."""
    made = Registry()
    for spec in (*KERNELS, GPU_ONLY, FORWARD_ONLY, BROKEN):
        made.add(spec, owner="test")
    for module in (routing, op):
        monkeypatch.setattr(module, "default_registry", lambda: made)
    monkeypatch.setattr(op, "_loaded", {})
    return made


def plan_of(*decisions) -> Plan:
    return plan_for(nn.Linear(8, 8), {}, decisions=decisions)


def test_each_site_gets_the_kernels_of_its_passes() -> None:
    plan = plan_for(nn.Linear(8, 8), {"up": {"fprop": "rowwise", "wgrad": "mxfp8"}, "down": {"dgrad": "tensorwise"}})
    routes = site_kernels(plan, CPU)
    assert routes == {
        "down": SiteKernels(dgrad=emulated("tensorwise")),
        "up": SiteKernels(fprop=emulated("rowwise"), wgrad=emulated("mxfp8")),
    }
    assert routes["up"].as_tuple() == (emulated("rowwise"), "", emulated("mxfp8"))
    assert routes["up"].planned
    assert not SiteKernels().planned


def test_a_site_in_high_precision_is_not_routed() -> None:
    assert site_kernels(plan_for(nn.Linear(8, 8), {"up": {}}), CPU) == {}


@pytest.mark.parametrize(
    ("kernel", "product", "reason"),
    [
        ("emulated.linear.rowwize", "fprop", "not among the known kernels.*Nearest: .*emulated.linear.rowwise"),
        ("gpu.linear.rowwise", "fprop", "needs cuda, this device is cpu"),
        ("forward.linear.rowwise", "wgrad", "serves fprop, not wgrad"),
        ("emulated.linear.mxfp8", "fprop", "its recipe here is mxfp8, not rowwise"),
        ("torch.mm.fp32", "fprop", "its recipe here is None, not rowwise"),
    ],
)
def test_a_kernel_that_cannot_serve_is_refused_unless_emulation_is_asked_for(
    registry: Registry, kernel: str, product: str, reason: str
) -> None:
    plan = plan_of(decision("up", product, "rowwise", kernel=kernel))
    with pytest.raises(PlanError, match=f"{kernel} on up.{product}.*{reason}.*emulate=True"):
        site_kernels(plan, CPU)
    assert site_kernels(plan, CPU, emulate=True) == {"up": SiteKernels(**{product: emulated("rowwise")})}


def test_there_is_no_stand_in_for_a_recipe_that_is_unknown(registry: Registry) -> None:
    with pytest.raises(PlanError, match=r"fourbit.linear.x.*known kernels"):
        site_kernels(plan_of(decision("up", "fprop", "x", kernel="fourbit.linear.x")), CPU, emulate=True)


@pytest.mark.parametrize(
    ("recipe", "stand_in"),
    [
        ("tensorwise", "emulated.linear_layer.tensorwise"),
        ("blockwise", "emulated.linear_layer.blockwise"),
        ("rowwise", "emulated.linear.rowwise"),  # of which no two products read the same codes
    ],
)
def test_what_stands_in_for_a_kernel_that_shares_casts_shares_them(recipe: str, stand_in: str) -> None:
    kernel = f"triton.linear_layer.{recipe}"
    plan = plan_of(*(decision("up", product, recipe, kernel=kernel) for product in PASSES))
    assert site_kernels(plan, CPU, emulate=True) == {"up": SiteKernels(**dict.fromkeys(PASSES, stand_in))}


def test_a_kernel_that_cannot_be_imported_is_refused_before_anything_runs(registry: Registry) -> None:
    with pytest.raises(KernelError, match=r"broken.linear.rowwise could not be loaded"):
        site_kernels(plan_of(decision("up", "fprop", "rowwise", kernel="broken.linear.rowwise")), CPU)


def test_decisions_and_stand_ins_are_logged(registry: Registry, caplog: pytest.LogCaptureFixture) -> None:
    plan = plan_of(decision("up", "fprop", "mxfp8"), decision("up", "dgrad", "rowwise", kernel="gpu.linear.rowwise"))
    with caplog.at_level(logging.INFO, logger="loka.dispatch"):
        site_kernels(plan, CPU, emulate=True)
    text = caplog.text
    assert "up fprop: emulated.linear.mxfp8 (made by hand)" in text
    assert "gpu.linear.rowwise cannot run on cpu" in text
    assert "up dgrad: emulated.linear.rowwise (made by hand)" in text


def test_a_models_device_is_that_of_its_parameters() -> None:
    assert device_of(nn.Linear(2, 2, device="meta")).type == "meta"
    assert device_of(nn.ReLU()) == CPU


LOGGED = """
import sys
from torch import nn
import loka
for _ in range(2):
    loka.convert(nn.Sequential(nn.Linear(8, 8)), loka.Plan.load(sys.argv[1]))
"""


def test_torch_logs_prints_every_decision_once(tmp_path: Path) -> None:
    """The switch that users of torch.compile know."""
    plan = plan_for(nn.Sequential(nn.Linear(8, 8)), ["0"])
    plan.save(tmp_path / "plan.json")
    ran = subprocess.run(
        [sys.executable, "-c", LOGGED, str(tmp_path / "plan.json")],
        env={**os.environ, "TORCH_LOGS": "+loka.dispatch"},
        capture_output=True,
        text=True,
        check=True,
    )
    for product, recipe in (("fprop", "rowwise"), ("dgrad", "tensorwise"), ("wgrad", "blockwise")):
        assert ran.stderr.count(f"0 {product}: emulated.linear.{recipe} (made by hand)") == 1
