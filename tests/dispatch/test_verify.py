"""Faults that a mean over N(0, 1) does not show are found on values like those of a run; right kernels pass."""

import math
from io import StringIO

import pytest
import torch
from rich.console import Console

from loka.dispatch.measuring.bench import suite_shapes
from loka.dispatch.measuring.draws import Source, draw_operands
from loka.dispatch.measuring.shapes import Shape
from loka.dispatch.measuring.verify import Verification, allowed_share, compare, parts_of, verify
from loka.hardware import DeviceInfo, device_info
from loka.kernel_registry.builtin import KERNELS
from loka.kernel_registry.grouped import native
from loka.kernel_registry.registry import Registry
from loka.kernel_registry.spec import GemmRequest, KernelSpec
from loka.probes.sampling.learning import Learner
from loka.probes.sampling.measure import Sampled
from loka.reports.verification import verification_table
from loka.workloads.suites import SUITES
from tests.dispatch import faulty_kernels
from tests.dispatch.made_evidence import built_in

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


# Experts, tokens (the first expert has one more than 16 times ten), features of the result.
EXPERTS, TOKENS, FEATURES = 8, 1281, 48
# A fault, the pass it is in, and whether a mean over N(0, 1) misses it.
GROUPED_FAULTS = {
    "scale_of_the_next_expert": "fprop",
    "last_tokens_dropped": "fprop",
    "last_tokens_not_summed": "wgrad",
    "padding_inside_the_scale": "wgrad",
}


def grouped_request(product):
    m, n, k = {"fprop": (TOKENS, FEATURES, K), "wgrad": (FEATURES, K, TOKENS)}[product]
    return GemmRequest(
        site="experts", product=product, op="grouped_linear", m=m, n=n, k=k, dtype="float32", batch=EXPERTS
    )


def grouped_registry(name, op="grouped_linear"):
    registry = registry_with()
    implementation = f"tests.dispatch.faulty_kernels:{name}"
    spec = KernelSpec(name=f"planted.{op}.{name}", op=op, recipe="rowwise", implementation=implementation)
    registry.add(spec, owner="test")
    return registry


def planted(found):
    return {one.values: one for one in found if one.kernel.startswith("planted.")}


@pytest.mark.parametrize(("fault", "product"), GROUPED_FAULTS.items())
def test_a_fault_between_experts_that_a_mean_over_normal_values_hides_is_found(fault, product, source):
    request = grouped_request(product)
    drawn = draw_operands(request, torch.float32, torch.device("cpu"))
    (a, b), offsets = drawn.pairs[0], drawn.offsets
    assert offsets.tolist()[:2] == [161, 321]
    exact = native(a, b, offsets, product=product, out_dtype=torch.float32)
    error, usual = (
        float((run(a, b, offsets, product=product, out_dtype=torch.float32) - exact).square().mean())
        / float(exact.square().mean())
        for run in (getattr(faulty_kernels, fault), faulty_kernels.grouped_right)
    )
    assert error < 2 * usual < 5e-3  # nothing to see: FP8 itself costs as much
    found = planted(verify([Shape(request=request, products=(), source=source)], grouped_registry(fault), "cpu"))
    learned = found["learned" if product == "fprop" else "partly learned"]
    assert not learned.holds
    assert learned.worst > 5 * learned.allowed
    assert "rows compared differ" in learned.reason


@pytest.mark.parametrize("product", ["fprop", "wgrad"])
def test_a_right_grouped_kernel_passes(product, source):
    shape = Shape(request=grouped_request(product), products=(), source=source)
    found = planted(verify([shape], grouped_registry("grouped_right"), "cpu"))
    assert len(found) == 2
    assert all(one.holds for one in found.values())


def test_rows_of_no_expert_have_to_be_zero():
    request = grouped_request("fprop")
    drawn = draw_operands(request, torch.float32, torch.device("cpu"), Source(tokens=(100,) * EXPERTS))
    assert drawn.values == "normal, uneven"
    (a, b), offsets = drawn.pairs[0], drawn.offsets
    parts = parts_of(request, drawn)
    blank = Verification(
        kernel="", recipe="rowwise", request=request, values="", worst=math.nan, allowed=1e-4, row=-1, column=-1
    )
    out = faulty_kernels.grouped_right(a, b, offsets, product="fprop", out_dtype=torch.float32)
    assert compare(blank, out, parts).holds
    out[-1, 5] = 1e-30
    found = compare(blank, out, parts)
    assert (found.worst, found.row, found.column) == (math.inf, TOKENS - 1, 5)


@pytest.mark.parametrize(("fault", "found"), [("right_batch", False), ("transposed_batch", True)])
def test_every_matrix_of_a_batch_is_compared(fault, found):
    request = GemmRequest(site="s", product="fprop", op="bmm", m=9, n=12, k=40, dtype="float32", batch=5)
    shape = Shape(request=request, products=(), source=Source())
    (one,) = planted(verify([shape], grouped_registry(fault, "bmm"), "cpu")).values()
    assert one.holds is not found
    assert (one.row // 9 in (3, 4)) is found


@pytest.mark.parametrize(("fault", "found"), [("right_norm_act", False), ("norm_over_the_whole_row", True)])
def test_norm_and_activation_are_compared_behind_the_product(fault, found):
    request = GemmRequest(site="s", product="fprop", op="linear_norm_act", m=40, n=600, k=70, dtype="float32")
    shape = Shape(request=request, products=(), source=Source())
    (one,) = planted(verify([shape], grouped_registry(fault, "linear_norm_act"), "cpu")).values()
    assert one.holds is not found
    assert one.worst > 0


def test_products_of_all_suites_are_drawn_and_their_kernels_found():
    device = torch.device("cpu")
    for name in SUITES:
        for shape in suite_shapes(name, device):
            request = shape.request
            assert built_in().baseline(request).op == request.op
            if name.startswith("lrm27"):
                continue
            drawn = draw_operands(request, torch.float32, device, shape.source)
            out = drawn.call(built_in().baseline(request), request.product, torch.float32)(0)
            assert out.shape[-2:] == (request.m, request.n)
            if drawn.offsets is not None:
                tokens = request.k if request.product == "wgrad" else request.m
                assert (len(drawn.offsets), int(drawn.offsets[-1])) == (request.batch, tokens)


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
