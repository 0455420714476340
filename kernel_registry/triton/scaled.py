"""Our Triton product as kernels of the registry: quantise both operands under a recipe, multiply their codes.

Codes and scales are those of `loka.quantize`, so they equal the emulated kernel's; only the accumulation is ours.
"""

from typing import Final

from torch import Tensor, dtype

from loka.formats import PASS_OPERANDS, RECIPES, OperandSpec, Pass, Recipe
from loka.kernel_registry.triton import quantize as triton_quantize
from loka.kernel_registry.triton.gemm import scaled_gemm
from loka.quantize import quantize

# Where our quantise kernels do what `loka.quantize` defines. On a CPU they would be interpreted.
_TRITON_QUANTISES: Final[tuple[str, ...]] = ("cuda",)


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
    m, n = a.shape[0], b.shape[0]
    if m == 0 or n == 0 or a.shape[1] == 0:
        return a.new_zeros((m, n), dtype=out_dtype)
    role_a, role_b = PASS_OPERANDS[product]
    data_a, scale_a = _quantize(a, recipe.operand(role_a))
    data_b, scale_b = _quantize(b, recipe.operand(role_b))
    out: Tensor = scaled_gemm(data_a, data_b, scale_a, scale_b, out_dtype=out_dtype)
    return out


def _quantize(x: Tensor, spec: OperandSpec) -> tuple[Tensor, Tensor]:
    if x.device.type in _TRITON_QUANTISES:
        return triton_quantize.quantize(x, spec)
    data, scale = quantize(x, spec)
    # Under torch.compile with a dynamic extent, `quantize` appends groups of zeros; their scales describe no element.
    rows, depth = (
        -(-extent // group) if group else 1
        for extent, group in zip(x.shape, (spec.group_rows, spec.group_k), strict=True)
    )
    return data, scale[:rows, :depth]
