"""The definition of an FP8 product, in plain torch: quantise both operands, multiply what they stand for in fp32.

Runs on every device and is what other kernels are compared with. Accumulation is fp32; it holds as long as the process
does not allow TF32 or bf16 inside fp32 products (`torch.get_float32_matmul_precision() == "highest"`, the default).
Recipes of reduced accumulation are defined by `emulate` as well, but no kernel here runs them: they model a hardware
unit, one group of products after the other.

A bf16 result may take a shorter way on a CPU that multiplies bf16: FP8 codes are exact in bf16 and their products in
fp32, so a bf16 product of codes, scaled afterwards, is the same sum of the same numbers. It is rounded to bf16 before
and after its scales: within one and a half bf16 ulp of the definition, where rounding once leaves a half.
"""

from typing import Final

import torch
from torch import Tensor

from loka.accumulation import reduced_product
from loka.formats import PASS_OPERANDS, RECIPES, OperandSpec, Pass, Recipe
from loka.hardware import multiplies_bf16
from loka.kernel_registry.operands import Operand
from loka.kernel_registry.spec import Prepared
from loka.kernel_registry.torch_mm import matmul
from loka.quantize import bf16_codes, dequantize, fake_quantize

# Asked once: Dynamo cannot trace the question.
_MULTIPLIES_BF16: Final[dict[str, bool]] = {"cpu": multiplies_bf16("cpu")}


def emulate(recipe: Recipe, a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Return the product of a [m, k] and b [n, k] under `recipe`, whose operands the pass names."""
    return _multiply(recipe, a, _prepare(recipe, b, product, out_dtype), product, out_dtype)


def prepared(recipe: Recipe, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Prepared:
    """Return operand b [n, k] quantised, for `emulate_prepared` into this dtype."""
    return Prepared(_prepare(recipe, b, product, out_dtype), b.shape[0])


def emulate_prepared(recipe: Recipe, a: Tensor, b: Prepared, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Return what `emulate` does, of a b that `prepared` has made."""
    return _multiply(recipe, a, b.tensors, product, out_dtype)


def _prepare(recipe: Recipe, b: Tensor, product: Pass, out_dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return the values that b stands for, or its codes in bf16 and their scales, where these serve the product."""
    spec = recipe.operand(PASS_OPERANDS[product][1])
    return bf16_codes(b, spec) if _has_short_way(recipe, b, out_dtype) else (fake_quantize(b, spec),)


def _multiply(recipe: Recipe, a: Tensor, b: tuple[Tensor, ...], product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply a [m, k] by what `_prepare` made of b."""
    spec = recipe.operand(PASS_OPERANDS[product][0])
    if _has_short_way(recipe, a, out_dtype):
        codes_a, scale_a = bf16_codes(a, spec)
        codes_b, scale_b = b
        # One scale after the other: the product of both may leave the range of fp32 where the result does not.
        return ((matmul(codes_a, codes_b).float() * scale_a) * scale_b.mT).bfloat16()
    values_a, (values_b,) = fake_quantize(a, spec), b
    if recipe.accumulation == "reduced":
        return reduced_product(values_a, values_b).to(out_dtype)
    return matmul(values_a, values_b).to(out_dtype)


def quantise(recipe: Recipe, x: Tensor, spec: OperandSpec, out_dtype: torch.dtype) -> Operand:
    """Return x [rows, k] as `multiply_operands` takes it: what it stands for, without a scale, or its codes in bf16."""
    if _has_short_way(recipe, x, out_dtype):
        return Operand(*bf16_codes(x, spec), spec)
    return Operand(fake_quantize(x, spec), x.new_empty(0), spec)


def multiply_operands(a: Operand, b: Operand, out_dtype: torch.dtype) -> Tensor:
    """Multiply a [m, k] and b [n, k], both from `quantise`; the numbers are those of `emulate`."""
    if a.scale.numel():
        return ((matmul(a.data, b.data).float() * a.scale) * b.scale.mT).bfloat16()
    return matmul(a.data, b.data).to(out_dtype)


def _has_short_way(recipe: Recipe, x: Tensor, out_dtype: torch.dtype) -> bool:
    """Whether scales can be taken out of the sum, which is fp32, and codes multiplied faster in bf16."""
    of_rows = recipe.scaling in ("tensorwise", "rowwise") and recipe.accumulation == "fp32"
    return out_dtype == torch.bfloat16 and of_rows and x.shape[1] > 0 and _MULTIPLIES_BF16.get(x.device.type, False)


class Halves:
    """The emulated product of one recipe in two halves (`spec.PreparedKernel`)."""

    def __init__(self, recipe: str) -> None:
        self._recipe = RECIPES[recipe]

    def prepare(self, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Prepared:
        """Quantise b [n, k]."""
        return prepared(self._recipe, b, product=product, out_dtype=out_dtype)

    def lay_out(self, codes: Tensor, scale: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Prepared:
        """Read a b that is stored as codes [n, k] and scales."""
        if _has_short_way(self._recipe, codes, out_dtype):
            return Prepared((codes.bfloat16(), scale), codes.shape[0])
        spec: OperandSpec = self._recipe.operand(PASS_OPERANDS[product][1])
        return Prepared((dequantize(codes, scale, spec),), codes.shape[0])

    def multiply(self, a: Tensor, b: Prepared, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
        """Multiply a [m, k] and b [n, k]."""
        return emulate_prepared(self._recipe, a, b, product=product, out_dtype=out_dtype)

    def multiply_codes(self, a: Operand, b: Prepared, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
        """Multiply a [m, k] that is quantised and b [n, k]."""
        if _has_short_way(self._recipe, a.data, out_dtype):
            codes, scale = b.tensors
            right = Operand(codes, scale, self._recipe.operand(PASS_OPERANDS[product][1]))
            return multiply_operands(a._replace(data=a.data.bfloat16()), right, out_dtype)
        values_a, (values_b,) = dequantize(*a), b.tensors
        if self._recipe.accumulation == "reduced":
            return reduced_product(values_a, values_b).to(out_dtype)
        return matmul(values_a, values_b).to(out_dtype)


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
