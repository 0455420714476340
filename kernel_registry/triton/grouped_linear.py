"""A linear layer per expert, all in one launch per pass, with its gradients: the grouped product from end to end.

Operands come in high precision and are quantised here as `loka.quantize` defines it. In the weight gradient the sum
runs over tokens, so scales run along the tokens of one expert and never reach into the next expert's.
"""

from typing import Any, Final

import torch
from torch import Tensor

from loka.errors import ArgumentError
from loka.formats import PASS_OPERANDS, RECIPES, OperandSpec, Pass, Recipe
from loka.kernel_registry.grouped import result_shape
from loka.kernel_registry.grouped_tokens import quantize_experts, quantize_tokens
from loka.kernel_registry.operands import quantize_operand
from loka.kernel_registry.triton.grouped import grouped_gemm, grouped_wgrad
from loka.kernel_registry.triton.interpreter import define_op
from loka.quantize import quantize

GROUPED_RECIPES: Final[tuple[str, ...]] = ("rowwise", "blockwise")


def rowwise(a: Tensor, b: Tensor, offsets: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply each expert's operands with one scale per row of each; a kernel of the registry."""
    return _multiply(RECIPES["rowwise"], a, b, offsets, product=product, out_dtype=out_dtype)


def blockwise(a: Tensor, b: Tensor, offsets: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply each expert's operands with a scale per 1x128 elements, 128x128 of a weight."""
    return _multiply(RECIPES["blockwise"], a, b, offsets, product=product, out_dtype=out_dtype)


class Stored:
    """The products of one recipe with weights that are stored (`spec.StoredGroupedKernel`)."""

    def __init__(self, recipe: str) -> None:
        self._recipe = RECIPES[recipe]

    def __call__(
        self,
        a: Tensor,
        codes: Tensor,
        scale: Tensor,
        offsets: Tensor,
        *,
        out_dtype: torch.dtype,
        product: Pass = "fprop",
    ) -> Tensor:
        """Multiply each expert's rows by its codes and scales."""
        shape = result_shape(a, codes, offsets, product)
        if 0 in (*a.shape, *codes.shape):
            return a.new_zeros(shape, dtype=out_dtype)
        codes_a, scale_a, _ = quantize_operand(a, self._recipe.operand(PASS_OPERANDS[product][0]))
        return _product(codes_a, codes, offsets, (scale_a, scale), out_dtype)


rowwise_stored: Final = Stored("rowwise")
blockwise_stored: Final = Stored("blockwise")


def _multiply(
    recipe: Recipe, a: Tensor, b: Tensor, offsets: Tensor, *, product: Pass, out_dtype: torch.dtype
) -> Tensor:
    shape = result_shape(a, b, offsets, product)
    role_a, role_b = PASS_OPERANDS[product]
    if product == "wgrad":
        codes_a, scale_a = quantize_tokens(a, offsets, recipe.operand(role_a))
        codes_b, scale_b = quantize_tokens(b, offsets, recipe.operand(role_b))
        out: Tensor = grouped_wgrad(codes_a, codes_b, offsets, scale_a, scale_b, out_dtype=out_dtype)
        return out
    if 0 in (*a.shape, *b.shape):  # groups of nothing have no scales to speak of
        return a.new_zeros(shape, dtype=out_dtype)
    codes_a, scale_a, _ = quantize_operand(a, recipe.operand(role_a))
    codes_b, scale_b = quantize_experts(b, recipe.operand(role_b))
    return _product(codes_a, codes_b, offsets, (scale_a, scale_b), out_dtype)


def _quantized(x: Tensor, spec: OperandSpec) -> tuple[Tensor, Tensor]:
    """Quantise [..., rows, k] and drop the groups of zeros that `quantize` appends to dynamic extents."""
    codes, scale = quantize(x, spec)
    rows, depth = (
        -(-extent // group) if group else 1
        for extent, group in zip(x.shape[-2:], (spec.group_rows, spec.group_k), strict=True)
    )
    return codes, scale[..., :rows, :depth]


def _recipe(name: str) -> Recipe:
    if name not in GROUPED_RECIPES:
        raise ArgumentError(f"Experts run under the recipes {', '.join(GROUPED_RECIPES)}, not {name!r}: choose one.")
    return RECIPES[name]


# Opaque under the interpreter, a composition of traceable ops elsewhere; see `gemm`.
@define_op("loka::grouped_linear", mutates_args=())
def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor, recipe: str) -> Tensor:
    """Return x [tokens, k], sorted by expert, times its expert's weight [experts, n, k]; [tokens, n] in x's dtype.

    offsets: int32 [experts], the end of each expert's tokens; rows after the last are zero. `recipe` is "rowwise" or
    "blockwise" and holds for all three passes; differentiable in x and weight. Raises ArgumentError for another
    recipe, KernelError as `grouped_gemm` does.
    """
    chosen = _recipe(recipe)
    x_codes, x_scale = _quantized(x, chosen.operand("input"))
    codes, scale = _quantized(weight, chosen.operand("weight"))
    return _product(x_codes, codes, offsets, (x_scale, scale), x.dtype)


@grouped_linear.register_fake
def _(x: Tensor, weight: Tensor, offsets: Tensor, recipe: str) -> Tensor:
    _recipe(recipe)
    return x.new_empty((x.shape[0], weight.shape[1]))


def _product(
    x: Tensor, weight: Tensor, offsets: Tensor, scales: tuple[Tensor, Tensor], out_dtype: torch.dtype
) -> Tensor:
    if 0 in (*x.shape, *weight.shape):  # groups of nothing have no scales to speak of
        return x.new_zeros((x.shape[0], weight.shape[1]), dtype=out_dtype)
    out: Tensor = grouped_gemm(x, weight, offsets, *scales, out_dtype=out_dtype)
    return out


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, str], output: Tensor) -> None:
    x, weight, offsets, ctx.recipe = inputs
    ctx.save_for_backward(x, weight, offsets)


def _gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    x, weight, offsets = ctx.saved_tensors
    recipe = RECIPES[ctx.recipe]
    spec = recipe.operand("grad_output")
    grad_x = grad_weight = None
    if ctx.needs_input_grad[0]:
        codes, scale = _quantized(grad_output, spec)
        weight_codes, weight_scale = _quantized(weight.mT, recipe.operand("weight"))
        grad_x = _product(codes, weight_codes, offsets, (scale, weight_scale), x.dtype)
    if ctx.needs_input_grad[1]:
        codes, scale = quantize_tokens(grad_output, offsets, spec)
        x_codes, x_scale = quantize_tokens(x, offsets, recipe.operand("input"))
        grad_weight = grouped_wgrad(codes, x_codes, offsets, scale, x_scale, out_dtype=weight.dtype)
    return grad_x, grad_weight, None, None


grouped_linear.register_autograd(_gradients, setup_context=_keep)
