"""One contract for every kernel of a linear layer: whoever computes it, the result is what the recipe defines.

Every low-precision row of the registry that can run on a device of this machine is held to the definition, for each of
its passes, on the shapes, values and layouts of cases.py. What may differ is what the order of an fp32 sum explains.
"""

from dataclasses import replace

import pytest
import torch

from loka.dispatch.measuring.verify import allowed_share
from loka.errors import KernelError
from loka.formats import PASS_OPERANDS, PASSES, RECIPES
from loka.hardware import DeviceInfo, device_info
from loka.kernel_registry.registry import default_registry
from loka.kernel_registry.spec import GemmRequest
from loka.quantize import fake_quantize
from tests.cases import (
    ALL_SHAPES,
    BAD_VALUES,
    EMPTY_SHAPES,
    FEW_SHAPES,
    LAYOUTS,
    OUT_DTYPES,
    VALUES,
    WRONG_DTYPES,
    heavy_tailed,
    normal,
    operands,
)
from tests.kernel_registry.made_devices import FP8_GPU, interprets_triton

ROWS = {spec.name: spec for spec in default_registry().candidates("linear")}
HOPPER = DeviceInfo(type="cuda", name="H200", capability=(9, 0))
ADA = DeviceInfo(type="cuda", name="L40S", capability=(8, 9))
BLACKWELL = DeviceInfo(type="cuda", name="B200", capability=(10, 0))
# Below this fp32 has no full precision, and a GPU may flush to zero.
SMALLEST_NORMAL = 2.0**-126


def runs(spec, info):
    """Whether a row can run here; a Triton row on a CPU where the interpreter was chosen for the tests."""
    if info.type == "cpu" and spec.interpreter:
        spec = replace(spec, interpreter="", device_types=("cpu",) if interprets_triton() else ())
    return spec.unavailable(info) is None


def of_rows(passes=PASSES, definition=True):
    """Every (kernel, pass, device) that can run, with or without those that are the definition."""
    cases = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        marks = FP8_GPU.marks if device == "cuda" else ()
        for spec in ROWS.values():
            if runs(spec, device_info(device)) and (definition or spec.library != "emulated"):
                cases += [
                    pytest.param(spec, product, device, marks=marks, id=f"{spec.name}-{product}-{device}")
                    for product in spec.passes
                    if product in passes
                ]
    return pytest.mark.parametrize(("spec", "product", "device"), cases)


def interpreted(spec, device):
    return bool(spec.interpreter) and device == "cpu"


def definition(a, b, recipe, product):
    """The product in fp64 of what both operands stand for, and the magnitude of what is added up."""
    specs = (RECIPES[recipe].operand(role) for role in PASS_OPERANDS[product])
    exact_a, exact_b = (fake_quantize(x, spec).double() for x, spec in zip((a, b), specs, strict=True))
    return exact_a @ exact_b.t(), exact_a.abs() @ exact_b.abs().t()


def assert_defined(got, want, k, spec, out_dtype):
    """Compare with the definition: finite where it is, and as near as the order of an fp32 sum and rounding allow."""
    exact, magnitude = want
    assert got.shape == exact.shape
    assert got.dtype == out_dtype
    fits = exact.isfinite() & (magnitude < torch.finfo(out_dtype).max)
    assert not got[~exact.isfinite()].isfinite().any(), "a bad value is hidden"
    info = device_info(got.device)
    rounded = torch.bfloat16 if "bf16 output" in spec.layout and info.type == "cuda" else out_dtype
    sums = allowed_share(k, info) * magnitude
    # Half of the last place. Triton's interpreter cuts off what a GPU rounds; the definition may round to bf16 twice.
    whole = interpreted(spec, info.type) or (spec.library == "emulated" and out_dtype == torch.bfloat16)
    rounding = torch.finfo(rounded).eps / (1 if whole else 2)
    bound = sums + rounding * (exact.abs() + sums) + 2 * SMALLEST_NORMAL
    error = (got.double() - exact).abs()
    assert (error[fits] <= bound[fits]).all(), f"off by {float((error / bound)[fits].max()):.3g} of what is allowed"


def assert_product(spec, product, a, b, out_dtype=torch.float32):
    before = a.clone(), b.clone()
    got = spec.load()(a, b, product=product, out_dtype=out_dtype)
    assert_defined(got, definition(a, b, spec.recipe, product), a.shape[1], spec, out_dtype)
    for x, untouched in zip((a, b), before, strict=True):
        assert torch.equal(x.nan_to_num(7.0), untouched.nan_to_num(7.0)), "an operand was modified"
    return got


def on(device, pair):
    return tuple(x.to(device) for x in pair)


# --- the product ---


@of_rows()
def test_every_shape_and_every_value_gives_what_the_recipe_defines(spec, product, device):
    few = interpreted(spec, device)
    for shape in FEW_SHAPES if few else ALL_SHAPES:
        for name in ("heavy_tailed", "correlated_rows") if few else VALUES:
            assert_product(spec, product, *on(device, operands(VALUES[name], *shape)))


@of_rows(passes=("dgrad",))
def test_every_value_goes_through_every_kernel(spec, product, device):
    for name in VALUES:
        assert_product(spec, product, *on(device, operands(VALUES[name], 9, 5, 33)))


@of_rows()
def test_operands_and_results_have_any_dtype_that_a_row_names(spec, product, device):
    a, b = on(device, operands(heavy_tailed, 9, 24, 33))
    for dtype in spec.dtypes[1:]:
        cast_a, cast_b = (x.clamp(-1e4, 1e4).to(getattr(torch, dtype)) for x in (a, b))
        assert_product(spec, product, cast_a, cast_b, out_dtype=getattr(torch, dtype))
    assert_product(spec, product, a.bfloat16(), b, out_dtype=OUT_DTYPES[1])


@of_rows()
def test_any_layout_of_an_operand_gives_what_its_copy_gives(spec, product, device):
    for layout in LAYOUTS.values():
        a, b = on(device, operands(normal, 17, 13, 40))
        assert_product(spec, product, layout(a), b)
        assert_product(spec, product, a, layout(b))


@of_rows()
def test_a_bad_value_reaches_what_it_takes_part_in_and_nothing_else(spec, product, device):
    for bad in BAD_VALUES.values():
        for operand in (0, 1):
            pair = on(device, operands(normal, 9, 13, 40))
            pair[operand][3, 5] = bad
            got = assert_product(spec, product, *pair)
            spoilt = torch.zeros_like(got, dtype=torch.bool)
            spoilt[(3, slice(None)) if operand == 0 else (slice(None), 3)] = True
            assert torch.equal(~got.isfinite(), spoilt)


@of_rows()
def test_zeros_that_fill_an_extent_change_no_scale(spec, product, device):
    m, n, k = 17, 13, 13
    a, b = on(device, operands(heavy_tailed, m, n, k))
    filled_a, filled_b = a.new_zeros((128, 128)), b.new_zeros((128, 128))
    filled_a[:m, :k], filled_b[:n, :k] = a, b
    got = assert_product(spec, product, a, b)
    filled = assert_product(spec, product, filled_a, filled_b)
    assert_defined(filled[:m, :n], (got.double(), definition(a, b, spec.recipe, product)[1]), k, spec, torch.float32)
    assert not filled[m:].any()
    assert not filled[:, n:].any()


@of_rows()
def test_an_empty_product_has_its_shape_and_zeros(spec, product, device):
    for m, n, k in EMPTY_SHAPES.values():
        a, b = on(device, operands(normal, m, n, k))
        for out_dtype in OUT_DTYPES:
            got = spec.load()(a, b, product=product, out_dtype=out_dtype)
            assert torch.equal(got, torch.zeros((m, n), dtype=out_dtype, device=device))


@of_rows(passes=("fprop",), definition=False)
def test_what_a_kernel_is_not_made_for_is_an_error_in_words(spec, product, device):
    kernel = spec.load()
    a, b = on(device, operands(normal, 9, 13, 40))
    for dtype in WRONG_DTYPES:
        with pytest.raises(KernelError, match=r"not torch\."):
            kernel(a.to(dtype), b, product=product, out_dtype=torch.float32)
        with pytest.raises(KernelError, match=r"torch\."):
            kernel(a, b, product=product, out_dtype=dtype)
    with pytest.raises(KernelError, match=r"needs a \[m, k\] and b \[n, k\]"):
        kernel(a, b.t(), product=product, out_dtype=torch.float32)


# --- the rows ---


@pytest.mark.parametrize("spec", ROWS.values(), ids=ROWS)
def test_a_row_that_states_a_constant_says_where_it_comes_from(spec):
    states = spec.min_capability or spec.below_capability or spec.alignment or spec.pads_to
    assert bool(spec.source) == bool(states), spec.name


@pytest.mark.parametrize("name", [name for name, spec in ROWS.items() if spec.requires], ids=str)
def test_a_library_that_is_absent_is_a_reason_that_says_what_to_install(name):
    spec = ROWS[name]
    reasons = [spec.unavailable(info) for info in (ADA, HOPPER, BLACKWELL)]
    missing = [reason for reason in reasons if reason and "compute capability" not in reason]
    assert all("install" in reason for reason in missing)
    assert None in reasons or missing


def test_architectures_get_the_rows_whose_recipe_they_keep():
    def reasons(info):
        return {name: spec.unavailable(info) or "" for name, spec in ROWS.items()}

    # 1x128 and 128x128 blocks exist in cuBLAS on Hopper alone; DeepGEMM rounds scales to powers of two from 10.0 on.
    for name in ("torch.scaled_mm.blockwise", "deepgemm.linear.blockwise", "fbgemm.linear.blockwise"):
        assert "9.0 or above, below 10.0" in reasons(BLACKWELL)[name]
        assert "9.0 or above, below 10.0" in reasons(ADA)[name]
        assert "compute capability" not in reasons(HOPPER)[name]
    assert "10.0" in reasons(HOPPER)["torch.scaled_mm.mxfp8"]
    assert "compute capability" not in reasons(BLACKWELL)["torch.scaled_mm.mxfp8"]


@pytest.mark.parametrize(
    ("name", "passes"),
    [("fbgemm.linear.tensorwise", ("fprop",)), ("fbgemm.linear.blockwise", ("fprop", "dgrad"))],
)
def test_a_pass_that_a_library_has_no_product_for_is_refused_by_row_and_kernel(name, passes):
    spec = ROWS[name]
    assert spec.passes == passes
    for product in set(PASSES) - set(passes):
        request = GemmRequest(site="up", product=product, op="linear", m=8, n=16, k=16, dtype="float32")
        assert f"not {product}" in spec.cannot(request)
        with pytest.raises(KernelError, match=f"{product} has .*Use another kernel"):
            spec.load()(*operands(normal, 8, 16, 16), product=product, out_dtype=torch.float32)


def test_every_library_that_can_run_here_is_under_the_contract():
    here = {spec.library for spec in ROWS.values() if runs(spec, device_info("cpu"))}
    assert {"emulated", "torch"} <= here
    assert ("torchao" in here) == (ROWS["torchao.linear.rowwise"].unavailable(HOPPER) is None)
    assert ("triton" in here) == interprets_triton()
