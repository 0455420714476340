"""The definition of an FP8 product, in plain torch: quantise both operands, multiply what they stand for in fp32.

Runs on every device and is what other kernels are compared with. Accumulation is fp32; it holds as long as the process
does not allow TF32 or bf16 inside fp32 products (`torch.get_float32_matmul_precision() == "highest"`, the default).
Recipes of reduced accumulation are defined by `emulate` as well, but no kernel here runs them: they model a hardware
unit, one group of products after the other.
"""

import torch
from torch import Tensor

from loka.accumulation import reduced_product
from loka.formats import PASS_OPERANDS, RECIPES, Pass, Recipe
from loka.kernel_registry.torch_mm import matmul
from loka.quantize import fake_quantize


def emulate(recipe: Recipe, a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Return the product of a [m, k] and b [n, k] under `recipe`, whose operands the pass names."""
    role_a, role_b = PASS_OPERANDS[product]
    quantized_a = fake_quantize(a, recipe.operand(role_a))
    quantized_b = fake_quantize(b, recipe.operand(role_b))
    if recipe.accumulation == "reduced":
        return reduced_product(quantized_a, quantized_b).to(out_dtype)
    return matmul(quantized_a, quantized_b).to(out_dtype)


def tensorwise(a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply a [m, k] and b [n, k] with one scale per operand."""
    return emulate(RECIPES["tensorwise"], a, b, product=product, out_dtype=out_dtype)


def rowwise(a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply a [m, k] and b [n, k] with one scale per row of each."""
    return emulate(RECIPES["rowwise"], a, b, product=product, out_dtype=out_dtype)


def blockwise(a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply a [m, k] and b [n, k] with a scale per 1x128 elements, 128x128 of a weight."""
    return emulate(RECIPES["blockwise"], a, b, product=product, out_dtype=out_dtype)


def mxfp8(a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply a [m, k] and b [n, k] with an E8M0 scale per 32 elements, rounded up."""
    return emulate(RECIPES["mxfp8"], a, b, product=product, out_dtype=out_dtype)


def mxfp8_floor(a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply a [m, k] and b [n, k] with an E8M0 scale per 32 elements, under the OCP floor rule."""
    return emulate(RECIPES["mxfp8_floor"], a, b, product=product, out_dtype=out_dtype)
