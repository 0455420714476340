"""Faults that a mean over N(0, 1) does not show are found on values like those of a run; right kernels pass."""

import math
from io import StringIO

import pytest
import torch
from rich.console import Console

from loka.dispatch.draws import Source, draw_operands
from loka.dispatch.shapes import Shape
from loka.dispatch.verify import allowed_share, verify
from loka.hardware import DeviceInfo, device_info
from loka.kernel_registry.builtin import KERNELS
from loka.kernel_registry.registry import Registry
from loka.kernel_registry.spec import GemmRequest, KernelSpec
from loka.probes.learning import Learner
from loka.probes.measure import Sampled
from loka.reports.verification import verification_table
from tests.dispatch import faulty_kernels

M, N, K = 320, 48, 2049
REQUEST = GemmRequest(site="layer", product="fprop", op="linear", m=M, n=N, k=K, dtype="float32")
FAULTS = ("scale_of_the_wrong_row", "last_block_dropped", "half_accumulator")


def registry_with(*names):
    registry = Registry()
    for spec in KERNELS:
        registry.add(spec, owner="loka")
    for name in names:
        implementation = f"tests.dispatch.faulty_kernels:{name}"
        spec = KernelSpec(name=f"planted.linear.{name}", op="linear", recipe="rowwise", implementation=implementation)
        registry.add(spec, owner="test")
    return registry


@pytest.fixture(scope="module")
def source():
    """What a run has learned of an activation as recommendation models have them: counts, a constant, loud rows."""
    learner = Learner(limit_bytes=100 << 20)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(N, K, generator=generator) / 45
    for step in range(4):
        x = torch.randn(64, K, generator=generator).abs()
        x[:, : K // 2] *= torch.randn(64, 1, generator=generator).mul(1.5).exp()
        x[:, -1] = 30.0
        learner.learn("s", "fprop", Sampled(a=x, b=weight, y=x @ weight.T, a_amax=float(x.max())), step)
    (record,) = (one for one in learner.records({"s": "layer"}) if one.kind == "input")
    return Source(learned={"input": record}, rms={"weight": 1 / 45})


def verified(name, source):
    shape = Shape(request=REQUEST, products=(), source=source)
    found = verify([shape], registry_with(name), "cpu")
    return {one.values: one for one in found if one.kernel == f"planted.linear.{name}"}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_the_mean_over_normal_values_hides_is_found(fault, source):
    a, b = draw_operands(REQUEST, torch.float32, torch.device("cpu")).pairs[0]
    exact = a @ b.T
    kernel, right = getattr(faulty_kernels, fault), faulty_kernels.right
    error, usual = (
        float((run(a, b, product="fprop", out_dtype=torch.float32) - exact).square().mean() / exact.square().mean())
        for run in (kernel, right)
    )
    assert error < 2 * usual < 5e-3  # nothing to see: FP8 itself costs as much
    found = verified(fault, source)
    assert set(found) == {"learned", "normal"}
    learned = found["learned"]
    assert not learned.holds
    assert learned.worst > 5 * learned.allowed
    assert "rows compared differ" in learned.reason


def test_a_right_kernel_passes_whatever_the_order_of_its_sum(source):
    found = verified("right", source)
    assert all(one.holds for one in found.values())
    assert 0 < found["learned"].worst < found["learned"].allowed


def test_the_place_of_the_worst_element_is_named(source):
    found = verified("scale_of_the_wrong_row", source)["learned"]
    assert found.row % 64 == 63
    assert f"the most at row {found.row}, column {found.column}" in found.reason


def test_a_kernel_that_fails_is_a_row_with_its_reason(source):
    found = verified("fails_when_called", source)["normal"]
    assert not found.holds
    assert math.isnan(found.worst)
    assert found.reason == "RuntimeError: no kernel image is available for execution on the device"


def test_the_definition_is_not_verified_against_itself():
    shape = Shape(request=REQUEST, products=(), source=Source())
    compared = {one.kernel for one in verify([shape], registry_with("right"), "cpu")}
    assert "planted.linear.right" in compared
    assert not [name for name in compared if name.startswith("emulated")]


def test_tensor_cores_are_allowed_their_fourteen_bits():
    cpu, hopper = device_info("cpu"), DeviceInfo(type="cuda", name="H", capability=(9, 0))
    assert allowed_share(4096, cpu) < 2.0**-11 < allowed_share(4096, hopper) < 2.0**-8


def test_the_table_says_what_fails_and_why(source):
    shape = Shape(request=REQUEST, products=(), source=source)
    found = verify([shape], registry_with("right", *FAULTS), "cpu")
    console = Console(width=100, record=True, file=StringIO())
    console.print(verification_table(found))
    text = console.export_text()
    assert "planted.linear.last_block_dropped" in text
    assert "fails" in text
    assert f"of {len(found)} comparisons fail" in text
    console.print(verification_table([]))
    assert "Nothing to verify" in console.export_text()
