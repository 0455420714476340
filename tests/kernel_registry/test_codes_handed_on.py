"""Operands that are quantised already: kernels that take and write them have the numbers of those that cast."""

import pytest
import torch

from loka.formats import RECIPES
from loka.kernel_registry import norm_act
from loka.kernel_registry.builtin import KERNELS
from loka.kernel_registry.norm_act import Coded
from loka.kernel_registry.operands import quantize_operand
from loka.quantize import quantize
from tests.kernel_registry.made_devices import interprets_triton

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ON_A_CPU = ("torch.scaled_mm.tensorwise", "torch.scaled_mm.rowwise")
LIBRARIES = ("emulated", "triton") if interprets_triton() else ("emulated",)
HERE = [spec for spec in KERNELS if spec.library in LIBRARIES or spec.name in ON_A_CPU]
HALVES = {spec.name: spec for spec in HERE if spec.op == "linear" and spec.prepared}
FUSED = {spec.name: spec for spec in HERE if spec.op == "linear_norm_act" and spec.recipe}
# Rows, k, n: odd everything, ragged against blocks of 128, no rows.
SHAPES = [(5, 13, 300), (3, 429, 20), (0, 13, 20)]


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", HALVES)
def test_a_product_of_codes_is_that_of_what_they_were_made_of(name, dtype):
    halves, recipe = HALVES[name].load_prepared(), RECIPES[HALVES[name].recipe]
    for m, k, n in SHAPES:
        a, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
        made = halves.prepare(b, product="fprop", out_dtype=dtype)
        wanted = halves.multiply(a, made, product="fprop", out_dtype=dtype)
        codes = quantize_operand(a, recipe.operand("input"))
        found = halves.multiply_codes(codes, made, product="fprop", out_dtype=dtype)
        assert torch.equal(found, wanted), (m, k, n)
        assert found.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FUSED)
def test_a_layer_writes_the_codes_of_its_own_result_and_reads_those_of_another(name, dtype):
    layer, own = FUSED[name].load_fused(), RECIPES[FUSED[name].recipe].operand("input")
    for (m, k, n), then in zip(SHAPES, ("blockwise", "rowwise", "blockwise"), strict=True):
        x, weight, bias = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)
        made = layer.prepare(weight)
        wanted = layer.forward(x, made, bias, eps=1e-3, out_dtype=dtype, save=False)[0]
        quantised = quantize_operand(x, own)
        assert torch.equal(layer.forward(quantised, made, bias, eps=1e-3, out_dtype=dtype, save=False)[0], wanted)
        spec = RECIPES[then].operand("input")
        codes, scale = quantize(wanted, spec)
        for operand in (x, quantised):
            found = layer.coded(operand, made, bias, Coded(then, 1e-3, dtype))
            assert found.spec == spec
            assert torch.equal(found.scale, scale), (m, k, n)
            assert torch.equal(found.data.view(torch.uint8), codes.view(torch.uint8))


@pytest.mark.parametrize("name", [name for name in FUSED if name.startswith("triton.")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_bad_values_are_rounded_like_any_other(name, dtype):
    layer, spec = FUSED[name].load_fused(), RECIPES["blockwise"].operand("input")
    x, weight = torch.randn(6, 20).to(dtype), torch.randn(300, 20).to(dtype)
    x[1, 2], x[4, 0] = float("nan"), float("inf")
    made = layer.prepare(weight)
    wanted = quantize(layer.forward(x, made, None, eps=None, out_dtype=dtype, save=False)[0], spec)
    codes, scale, _ = layer.coded(x, made, None, Coded("blockwise", None, dtype))
    assert torch.equal(scale, wanted[1])
    torch.testing.assert_close(codes.float(), wanted[0].float(), rtol=0, atol=0, equal_nan=True)
    assert codes[[1, 4]].float().isnan().all(dim=1).any()


def test_only_what_is_inside_a_norm_block_is_written_by_the_kernel():
    name = "triton.linear_norm_act.blockwise"
    if name not in FUSED:
        pytest.skip("needs Triton's interpreter")
    layer = FUSED[name].load_fused()
    found = {(recipe, n) for recipe in RECIPES for n in (20, 256, 300) if layer.writes(recipe, n)}
    assert found == {("blockwise", 20), ("blockwise", 256), ("blockwise", 300), ("rowwise", 20), ("rowwise", 256)}
    assert not any(norm_act.blockwise_layer.writes(recipe, 20) for recipe in RECIPES)
    native = next(spec for spec in KERNELS if spec.name == "triton.native.linear_norm_act").load_fused()
    assert not native.writes("blockwise", 20)
