"""The definition of an FP8 product, in plain torch: quantise both operands, multiply what they stand for in fp32.

Runs on every device and is what other kernels are compared with. Accumulation is fp32; it holds as long as the process
does not allow TF32 or bf16 inside fp32 products (`torch.get_float32_matmul_precision() == "highest"`, the default).
Recipes of reduced accumulation are defined by `emulate` as well, but no kernel here runs them: they model a hardware
unit, one group of products after the other.

On a CPU with units for bf16 the sum is taken over codes, which are exact there, and scales come after: the same sum of
the same numbers, in less time. In fp32 (`bf16_units`) it is as near to the exact sum; a bf16 result is rounded
before and after its scales: within one and a half bf16 ulp of the definition, where rounding once leaves a half.
"""

from typing import Final

import torch
from torch import Tensor

from loka.accumulation import reduced_product
from loka.formats import PASS_OPERANDS, RECIPES, OperandSpec, Pass, Recipe
from loka.kernel_registry.bf16_units import available, exact_matmul
from loka.kernel_registry.operands import Operand, scaled
from loka.kernel_registry.spec import Prepared
from loka.kernel_registry.torch_mm import matmul
from loka.quantize import dequantize, fake_quantize, held_codes


def emulate(recipe: Recipe, a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Return the product of a [m, k] and b [n, k] under `recipe`, whose operands the pass names."""
    return _multiply(recipe, a, _prepare(recipe, b, product, out_dtype), product, out_dtype)


def quantise(recipe: Recipe, x: Tensor, spec: OperandSpec, out_dtype: torch.dtype) -> Operand:
    """Return x [rows, k] as `multiply_operands` takes it: what it stands for, without a scale, or its codes."""
    if dtype := _code_dtype(recipe, x, out_dtype):
        return Operand(*held_codes(x, spec, dtype), spec)
    return Operand(fake_quantize(x, spec), x.new_empty(0), spec)


def _prepare(recipe: Recipe, b: Tensor, product: Pass, out_dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return the values that b stands for, or its codes and their scales, where these serve the product."""
    spec = recipe.operand(PASS_OPERANDS[product][1])
    dtype = _code_dtype(recipe, b, out_dtype)
    return held_codes(b, spec, dtype) if dtype else (fake_quantize(b, spec),)


def _multiply(recipe: Recipe, a: Tensor, b: tuple[Tensor, ...], product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply a [m, k] by what `_prepare` made of b."""
    spec = recipe.operand(PASS_OPERANDS[product][0])
    if dtype := _code_dtype(recipe, a, out_dtype):
        codes, scale = b
        return _scaled_product(*held_codes(a, spec, dtype), codes, scale, out_dtype)
    (values,) = b
    return _product(recipe, fake_quantize(a, spec), values, out_dtype)


def _product(recipe: Recipe, a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Multiply the values [m, k] and [n, k] that operands stand for."""
    return (reduced_product if recipe.accumulation == "reduced" else matmul)(a, b).to(out_dtype)


def multiply_operands(a: Operand, b: Operand, out_dtype: torch.dtype) -> Tensor:
    """Multiply a [m, k] and b [n, k], both from `quantise`; the numbers are those of `emulate`."""
    if a.scale.numel():
        return _scaled_product(a.data, a.scale, b.data, b.scale, out_dtype)
    return matmul(a.data, b.data).to(out_dtype)


def _scaled_product(a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Multiply codes [m, k] and [n, k], and then by their scales, [m or 1, 1] and [n or 1, 1]."""
    sums = matmul(a, b).float() if a.dtype == torch.bfloat16 else exact_matmul(a, b)
    return scaled(sums, scale_a, scale_b.mT).to(out_dtype)


def _code_dtype(recipe: Recipe, x: Tensor, out_dtype: torch.dtype) -> torch.dtype | None:
    """Return what codes are held in, for a sum over them; None where the sum is over values."""
    of_rows = recipe.scaling in ("tensorwise", "rowwise") and recipe.accumulation == "fp32"
    if not (of_rows and x.shape[-1] > 0 and available(x.device)):
        return None
    return torch.bfloat16 if out_dtype == torch.bfloat16 else torch.float32


class Halves:
    """The emulated product of one recipe in two halves (`spec.PreparedKernel`)."""

    def __init__(self, recipe: str) -> None:
        self._recipe = RECIPES[recipe]

    def prepare(self, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Prepared:
        """Quantise b [n, k]."""
        return Prepared(_prepare(self._recipe, b, product, out_dtype), b.shape[0])

    def lay_out(self, codes: Tensor, scale: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Prepared:
        """Read a b that is stored as codes [n, k] and scales."""
        if dtype := _code_dtype(self._recipe, codes, out_dtype):
            return Prepared((codes.to(dtype), scale), codes.shape[0])
        spec: OperandSpec = self._recipe.operand(PASS_OPERANDS[product][1])
        return Prepared((dequantize(codes, scale, spec),), codes.shape[0])

    def multiply(self, a: Tensor, b: Prepared, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
        """Multiply a [m, k] and b [n, k]."""
        return _multiply(self._recipe, a, b.tensors, product, out_dtype)

    def multiply_codes(self, a: Operand, b: Prepared, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
        """Multiply a [m, k] that is quantised and b [n, k]."""
        if dtype := _code_dtype(self._recipe, a.data, out_dtype):
            codes, scale = b.tensors
            return _scaled_product(a.data.to(dtype), a.scale, codes, scale, out_dtype)
        (values,) = b.tensors
        return _product(self._recipe, dequantize(*a), values, out_dtype)


def tensorwise(a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply a [m, k] and b [n, k] with one scale per operand."""
    return emulate(RECIPES["tensorwise"], a, b, product=product, out_dtype=out_dtype)


def rowwise(a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply a [m, k] and b [n, k] with one scale per row of each."""
    return emulate(RECIPES["rowwise"], a, b, product=product, out_dtype=out_dtype)


def blockwise(a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply a [m, k] and b [n, k] with a scale per 1x128 elements, 128x128 of a weight."""
    return emulate(RECIPES["blockwise"], a, b, product=product, out_dtype=out_dtype)


def blockwise_pow2(a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply a [m, k] and b [n, k] with an E8M0 scale per 1x128 elements, 128x128 of a weight, rounded up."""
    return emulate(RECIPES["blockwise_pow2"], a, b, product=product, out_dtype=out_dtype)


def mxfp8(a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply a [m, k] and b [n, k] with an E8M0 scale per 32 elements, rounded up."""
    return emulate(RECIPES["mxfp8"], a, b, product=product, out_dtype=out_dtype)


def mxfp8_floor(a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply a [m, k] and b [n, k] with an E8M0 scale per 32 elements, under the OCP floor rule."""
    return emulate(RECIPES["mxfp8_floor"], a, b, product=product, out_dtype=out_dtype)


tensorwise_halves: Final = Halves("tensorwise")
rowwise_halves: Final = Halves("rowwise")
blockwise_halves: Final = Halves("blockwise")
blockwise_pow2_halves: Final = Halves("blockwise_pow2")
mxfp8_halves: Final = Halves("mxfp8")
mxfp8_floor_halves: Final = Halves("mxfp8_floor")
