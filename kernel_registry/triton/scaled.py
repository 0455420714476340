"""Our Triton product as kernels of the registry: quantise both operands under a recipe, multiply their codes.

Codes and scales are those of `loka.quantize`, so they equal the emulated kernel's; only the accumulation is ours.
"""

from typing import Final

from torch import Tensor, dtype

from loka.formats import PASS_OPERANDS, RECIPES, Pass, Recipe
from loka.kernel_registry.operands import (
    Operand,
    is_empty,
    is_empty_product,
    is_empty_with,
    quantize_operand,
    quantize_operands,
    zeros,
)
from loka.kernel_registry.spec import Prepared
from loka.kernel_registry.triton.gemm import scaled_gemm


def tensorwise(a: Tensor, b: Tensor, *, product: Pass, out_dtype: dtype) -> Tensor:
    """Multiply a [m, k] and b [n, k] with one scale per operand."""
    return _multiply(RECIPES["tensorwise"], a, b, product=product, out_dtype=out_dtype)


def rowwise(a: Tensor, b: Tensor, *, product: Pass, out_dtype: dtype) -> Tensor:
    """Multiply a [m, k] and b [n, k] with one scale per row of each."""
    return _multiply(RECIPES["rowwise"], a, b, product=product, out_dtype=out_dtype)


def blockwise(a: Tensor, b: Tensor, *, product: Pass, out_dtype: dtype) -> Tensor:
    """Multiply a [m, k] and b [n, k] with a scale per 1x128 elements, 128x128 of a weight."""
    return _multiply(RECIPES["blockwise"], a, b, product=product, out_dtype=out_dtype)


def mxfp8(a: Tensor, b: Tensor, *, product: Pass, out_dtype: dtype) -> Tensor:
    """Multiply a [m, k] and b [n, k] with an E8M0 scale per 32 elements, rounded up."""
    return _multiply(RECIPES["mxfp8"], a, b, product=product, out_dtype=out_dtype)


def _multiply(recipe: Recipe, a: Tensor, b: Tensor, *, product: Pass, out_dtype: dtype) -> Tensor:
    if is_empty(a, b, out_dtype):
        return zeros(a, b, out_dtype)
    left, right = quantize_operands(recipe, a, b, product)
    out: Tensor = scaled_gemm(left.data, right.data, left.scale, right.scale, out_dtype=out_dtype)
    return out


class Halves:
    """The product under one recipe in two halves (`spec.PreparedKernel`)."""

    def __init__(self, recipe: str) -> None:
        self._recipe = RECIPES[recipe]

    def prepare(self, b: Tensor, *, product: Pass, out_dtype: dtype) -> Prepared:
        """Quantise b [n, k]."""
        codes, scale, _ = quantize_operand(b, self._recipe.operand(PASS_OPERANDS[product][1]))
        return self.lay_out(codes, scale, product=product, out_dtype=out_dtype)

    def lay_out(self, codes: Tensor, scale: Tensor, *, product: Pass, out_dtype: dtype) -> Prepared:
        """Take codes [n, k] and scales as they are."""
        return Prepared((codes, scale), codes.shape[0])

    def multiply(self, a: Tensor, b: Prepared, *, product: Pass, out_dtype: dtype) -> Tensor:
        """Multiply a [m, k] and b [n, k]."""
        if is_empty_with(a, b, out_dtype):
            return a.new_zeros((a.shape[0], b.n), dtype=out_dtype)
        left = quantize_operand(a, self._recipe.operand(PASS_OPERANDS[product][0]))
        return self.multiply_codes(left, b, product=product, out_dtype=out_dtype)

    def multiply_codes(self, a: Operand, b: Prepared, *, product: Pass, out_dtype: dtype) -> Tensor:
        """Multiply a [m, k] that is quantised and b [n, k]."""
        if is_empty_product(a, b):
            return a.scale.new_zeros((a.data.shape[0], b.n), dtype=out_dtype)
        codes, scale = b.tensors
        out: Tensor = scaled_gemm(a.data, codes, a.scale, scale, out_dtype=out_dtype)
        return out


tensorwise_halves: Final = Halves("tensorwise")
rowwise_halves: Final = Halves("rowwise")
blockwise_halves: Final = Halves("blockwise")
mxfp8_halves: Final = Halves("mxfp8")
