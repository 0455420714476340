"""FP8 kernels against an independent numpy model of the recipes, and against each other."""

import numpy as np
import pytest
import torch
from torch._functorch.aot_autograd import aot_function
from torch.fx.experimental.proxy_tensor import make_fx

from loka.accumulation import reduced_product
from loka.formats import PASS_OPERANDS, PASSES, RECIPES
from loka.kernel_registry import emulated, torch_mm, torch_scaled_mm
from loka.kernel_registry.builtin import KERNELS
from tests.kernel_registry.made_devices import FP8_GPU
from tests.kernel_registry.made_gemm import DRAWS, SHAPES, accumulation_bound, heavy_tailed, modelled, normal, operands

# Reduced accumulation is a model of hardware, not a kernel.
EMULATED = {name: getattr(emulated, name) for name, recipe in RECIPES.items() if recipe.accumulation == "fp32"}
SCALED_MM = {name: getattr(torch_scaled_mm, name) for name in ("tensorwise", "rowwise")}
DEVICES = ["cpu", FP8_GPU]


@pytest.mark.parametrize("product", PASSES)
@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize("recipe", EMULATED)
def test_emulated_equals_the_numpy_model(recipe, draw, product):
    for m, n, k in SHAPES:
        a, b = operands(draw, m, n, k)
        role_a, role_b = PASS_OPERANDS[product]
        model_a, model_b = modelled(a.numpy(), recipe, role_a), modelled(b.numpy(), recipe, role_b)
        got = EMULATED[recipe](a, b, product=product, out_dtype=torch.float32)
        assert got.dtype == torch.float32
        error = np.abs(got.double().numpy() - model_a @ model_b.T)
        assert (error <= accumulation_bound(model_a, model_b, k, torch.float32)).all(), (m, n, k)


@pytest.mark.parametrize(
    "recipe",
    [recipe for recipe in RECIPES.values() if recipe.accumulation == "reduced"],
    ids=lambda recipe: recipe.name,
)
def test_reduced_accumulation_is_part_of_the_definition(recipe):
    base = recipe.name.removesuffix("_fast_accum")
    a, b = (x.abs() for x in operands(heavy_tailed, 9, 24, 429))
    model_a, model_b = modelled(a.numpy(), base, "input"), modelled(b.numpy(), base, "weight")
    got = emulated.emulate(recipe, a, b, product="fprop", out_dtype=torch.float32)
    want = reduced_product(torch.from_numpy(model_a), torch.from_numpy(model_b))
    torch.testing.assert_close(got, want)
    exact = torch.from_numpy(model_a @ model_b.T)
    # 14 groups of 33 addends, each cut by less than 2^-13 of the largest: always less than the exact sum, and visibly.
    lost = (exact - got) / exact
    assert 2.0**-16 < float(lost.mean()) < float(lost.max()) < 14 * 33 * 2.0**-13


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("product", PASSES)
@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize("recipe", SCALED_MM)
def test_scaled_mm_equals_emulated_up_to_the_order_of_its_sum(recipe, draw, product, out_dtype, device):
    for m, n, k in SHAPES:
        a, b = (x.to(device) for x in operands(draw, m, n, k))
        want = EMULATED[recipe](a, b, product=product, out_dtype=torch.float32).double().cpu().numpy()
        got = SCALED_MM[recipe](a, b, product=product, out_dtype=out_dtype)
        assert got.dtype == out_dtype
        assert got.shape == (m, n)
        rounded = torch.bfloat16 if device == "cuda" else out_dtype
        bound = accumulation_bound(a.cpu().numpy(), b.cpu().numpy(), k, rounded)
        if device == "cuda":  # tensor cores keep about 14 bits of a partial sum
            bound += 2.0**-12 * (np.abs(a.cpu().numpy()) @ np.abs(b.cpu().numpy()).T)
        assert (np.abs(got.double().cpu().numpy() - want) <= 1.2 * bound).all(), (m, n, k)


@pytest.mark.parametrize("product", PASSES)
def test_scales_of_rows_are_put_on_the_result_where_torch_takes_one_per_operand(product, monkeypatch):
    monkeypatch.setattr(torch_scaled_mm, "_TAKES_ROW_SCALES", False)
    for m, n, k in SHAPES:
        a, b = operands(heavy_tailed, m, n, k)
        want = EMULATED["rowwise"](a, b, product=product, out_dtype=torch.float32)
        got = SCALED_MM["rowwise"](a, b, product=product, out_dtype=torch.float32)
        bound = accumulation_bound(a.numpy(), b.numpy(), k, torch.float32)
        assert (np.abs(got.double().numpy() - want.double().numpy()) <= 1.2 * bound).all(), (m, n, k)


@pytest.mark.parametrize("product", PASSES)
@pytest.mark.parametrize("recipe", SCALED_MM)
def test_padding_to_the_alignment_of_a_gpu_changes_no_number(recipe, product, monkeypatch):
    for m, n, k in SHAPES:
        a, b = operands(heavy_tailed, m, n, k)
        plain = SCALED_MM[recipe](a, b, product=product, out_dtype=torch.float32)
        with monkeypatch.context() as patch:
            patch.setitem(torch_scaled_mm.ALIGNMENT, "cpu", 16)
            padded = SCALED_MM[recipe](a, b, product=product, out_dtype=torch.float32)
        torch.testing.assert_close(padded, plain, rtol=1e-5, atol=1e-6 * float(plain.abs().max()))


@pytest.mark.parametrize("kernel", [*EMULATED.values(), *SCALED_MM.values(), torch_mm.mm_bf16])
@pytest.mark.parametrize(
    "shape", [(0, 16, 16), (16, 0, 16), (16, 16, 0)], ids=["no_rows", "no_columns", "no_reduction"]
)
@pytest.mark.parametrize("product", PASSES)
def test_an_empty_product_has_its_shape_and_zeros(kernel, shape, product):
    a, b = operands(normal, *shape)
    for out_dtype in (torch.float32, torch.bfloat16):
        got = kernel(a, b, product=product, out_dtype=out_dtype)
        assert got.dtype == out_dtype
        assert torch.equal(got, torch.zeros(shape[0], shape[1], dtype=out_dtype))


@pytest.mark.parametrize("kernel", [*EMULATED.values(), *SCALED_MM.values()])
def test_transposed_views_and_their_copies_give_the_same_result_and_stay_untouched(kernel):
    a, b = operands(heavy_tailed, 34, 30, 70)
    before = a.clone(), b.clone()
    plain = kernel(a, b, product="wgrad", out_dtype=torch.float32)
    viewed = kernel(a.t().contiguous().t(), b.t().contiguous().t(), product="wgrad", out_dtype=torch.float32)
    torch.testing.assert_close(plain, viewed, rtol=1e-6, atol=1e-6 * float(plain.abs().max()))
    assert torch.equal(a, before[0])
    assert torch.equal(b, before[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kernel", [*EMULATED.values(), *SCALED_MM.values()])
def test_a_bad_element_spoils_its_own_row_only(kernel, bad):
    a, b = operands(normal, 8, 40, 64)
    a[3, 5] = bad
    got = kernel(a, b, product="fprop", out_dtype=torch.float32)
    assert not torch.isfinite(got[3]).any()
    assert torch.isfinite(torch.cat((got[:3], got[4:]))).all()


# mxfp8 differs from mxfp8_floor by one rounding, scaled_mm.tensorwise from .rowwise by the shape of its scales.
@pytest.mark.parametrize(
    "kernel",
    [
        emulated.tensorwise,
        emulated.rowwise,
        emulated.blockwise,
        emulated.mxfp8_floor,
        torch_scaled_mm.rowwise,
    ],
)
def test_dynamo_traces_the_kernel_in_one_graph_for_any_number_of_rows(kernel):
    compiled = torch.compile(kernel, backend="aot_eager", fullgraph=True, dynamic=True)
    for m in (40, 7):
        a, b = operands(normal, m, 48, 130)
        want = kernel(a, b, product="fprop", out_dtype=torch.float32)
        torch.testing.assert_close(compiled(a, b, product="fprop", out_dtype=torch.float32), want)


@pytest.mark.parametrize("recipe", EMULATED)
def test_tracers_outside_of_dynamo_find_nothing_that_reads_a_value(recipe):
    def kernel(a, b):
        return EMULATED[recipe](a, b, product="fprop", out_dtype=torch.float32)

    a, b = operands(normal, 40, 24, 130)
    want = kernel(a, b)
    torch.testing.assert_close(aot_function(kernel, fw_compiler=lambda graph, _: graph)(a, b), want)
    for mode in ("real", "fake", "symbolic"):
        torch.testing.assert_close(make_fx(kernel, tracing_mode=mode)(a, b)(a, b), want)


@pytest.mark.parametrize("recipe", EMULATED)
def test_autocast_does_not_reach_into_the_definition(recipe):
    a, b = operands(normal, 16, 16, 64)
    want = EMULATED[recipe](a, b, product="fprop", out_dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(EMULATED[recipe](a, b, product="fprop", out_dtype=torch.float32), want)


@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [(torch_mm.mm_fp32, torch.float32), (torch_mm.mm_bf16, torch.bfloat16), (torch_mm.mm_fp16, torch.float16)],
)
def test_a_baseline_computes_in_its_own_dtype(kernel, dtype):
    a, b = operands(normal, 16, 24, 64)
    want = (a.to(dtype) @ b.to(dtype).t()).float()
    assert torch.equal(kernel(a, b, product="fprop", out_dtype=torch.float32), want)
    assert kernel(a.to(dtype), b.to(dtype), product="fprop", out_dtype=dtype).dtype == dtype


def test_the_native_baseline_multiplies_batches():
    a, b = torch.randn(3, 4, 5), torch.randn(3, 6, 5)
    got = torch_mm.native(a, b, product="fprop", out_dtype=torch.float32)
    torch.testing.assert_close(got, torch.bmm(a, b.transpose(1, 2)))


def test_every_definition_of_a_linear_layer_is_covered_here():
    # Libraries are held to it by test_kernel_contract.py, with their layouts in test_library_adapters.py.
    assert {spec.recipe for spec in KERNELS if spec.library == "emulated" and spec.op == "linear"} == set(EMULATED)
