"""Our fused linear layer, BlockNorm and HardSwish as kernels of the registry: quantise both operands, run the epilogue.

Codes and scales are those of `loka.quantize`; the product never reaches memory (see `epilogue`).
"""

from torch import Tensor, dtype

from loka.formats import RECIPES, Pass
from loka.kernel_registry.operands import is_empty, quantize_operands, zeros
from loka.kernel_registry.triton.epilogue import gemm_norm_swish


def tensorwise(a: Tensor, b: Tensor, *, product: Pass, out_dtype: dtype) -> Tensor:
    """Multiply a [m, k] and b [n, k] with one scale per operand, normalise, activate."""
    return _fused("tensorwise", a, b, product, out_dtype)


def rowwise(a: Tensor, b: Tensor, *, product: Pass, out_dtype: dtype) -> Tensor:
    """Multiply a [m, k] and b [n, k] with one scale per row of each, normalise, activate."""
    return _fused("rowwise", a, b, product, out_dtype)


def blockwise(a: Tensor, b: Tensor, *, product: Pass, out_dtype: dtype) -> Tensor:
    """Multiply a [m, k] and b [n, k] with a scale per 1x128 elements, 128x128 of a weight, normalise, activate."""
    return _fused("blockwise", a, b, product, out_dtype)


def _fused(recipe: str, a: Tensor, b: Tensor, product: Pass, out_dtype: dtype) -> Tensor:
    if is_empty(a, b, out_dtype):
        return zeros(a, b, out_dtype)  # the norm of zeros is zero, and so is its activation
    left, right = quantize_operands(RECIPES[recipe], a, b, product)
    name = str(out_dtype).removeprefix("torch.")
    out: Tensor = gemm_norm_swish(left.data, right.data, None, left.scale, right.scale, out=name)[0]
    return out
