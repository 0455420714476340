"""Scales that no quantiser makes: zero, infinity, NaN. Each spoils, or empties, its own rows and no others."""

import math

import pytest
import torch

from loka.formats import RECIPES
from loka.kernel_registry.torch_scaled_mm import rowwise_halves
from loka.quantize import quantize
from tests.kernel_registry.made_devices import triton_devices

pytest.importorskip("triton")
gemm = pytest.importorskip("loka.kernel_registry.triton.gemm")
grouped = pytest.importorskip("loka.kernel_registry.triton.grouped")

ROW = 2
on_devices = pytest.mark.parametrize("device", triton_devices())
of_scales = pytest.mark.parametrize("value", [0.0, math.inf, math.nan])


def codes(recipe, rows, k, role):
    return quantize(torch.randn(rows, k), RECIPES[recipe].operand(role))


def check(got, clean, value):
    """Row ROW is what its scale makes of it; every other row is as it was."""
    others = torch.arange(len(got), device=got.device) != ROW
    assert torch.equal(got[others], clean[others])
    if value == 0.0:
        assert (got[ROW] == 0).all()
    else:
        assert not got[ROW].isfinite().any()


@of_scales
@pytest.mark.parametrize("recipe", ["rowwise", "blockwise"])
@on_devices
def test_our_product_keeps_a_bad_scale_to_its_row(recipe, value, device):
    (a, a_scale), (b, b_scale) = codes(recipe, 20, 200, "input"), codes(recipe, 24, 200, "weight")
    operands = [x.to(device) for x in (a, b, a_scale, b_scale)]
    clean = gemm.scaled_gemm(*operands, out_dtype=torch.float32)
    operands[2][ROW] = value
    check(gemm.scaled_gemm(*operands, out_dtype=torch.float32), clean, value)


@of_scales
@on_devices
def test_our_grouped_product_keeps_a_bad_scale_to_its_row(value, device):
    a, a_scale = codes("rowwise", 20, 64, "input")
    weight, weight_scale = quantize(torch.randn(3, 24, 64), RECIPES["rowwise"].operand("weight"))
    offsets = torch.tensor([5, 5, 20], dtype=torch.int32)
    operands = [x.to(device) for x in (a, weight, offsets, a_scale, weight_scale)]
    clean = grouped.grouped_gemm(*operands, out_dtype=torch.float32)
    operands[3][ROW] = value
    check(grouped.grouped_gemm(*operands, out_dtype=torch.float32), clean, value)


@of_scales
def test_torchs_product_keeps_a_bad_scale_of_the_weight_to_its_column(value):
    weight, scale = codes("rowwise", 24, 64, "weight")
    x = torch.randn(20, 64)

    def product():
        prepared = rowwise_halves.lay_out(weight, scale, product="fprop", out_dtype=torch.float32)
        return rowwise_halves.multiply(x, prepared, product="fprop", out_dtype=torch.float32)

    clean = product()
    scale[ROW] = value
    check(product().t(), clean.t(), value)
