"""Is it worth it? The error of a product under a recipe, on rows that a linear really got."""

from collections.abc import Callable

import torch
from torch import Tensor

from loka.formats import Recipe
from loka.numerics import gate_for, product_error
from loka.quantize import fake_quantize

# Turns rows [m, k] and a weight [n, k] into the operands that are multiplied.
Change = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def rounded_product(x: Tensor, weight: Tensor, recipe: Recipe) -> Tensor:
    """Return X W^T [m, n] with both operands rounded, added up in fp32."""
    rounded = fake_quantize(weight.float(), recipe.operand("weight"))
    return fake_quantize(x.float(), recipe.operand("input")) @ rounded.t()


@torch.no_grad()
def error_of(actual: Tensor, x: Tensor, weight: Tensor) -> float:
    """Return how far `actual` is from X W^T, in the metric that gates a product with so many columns."""
    reference = x.float() @ weight.float().t()
    return product_error(actual, reference).gated(gate_for(weight.shape[0]))


@torch.no_grad()
def rounding_error(x: Tensor, weight: Tensor, recipe: Recipe, change: Change | None = None) -> float:
    """Return the error of the rounded product, of changed operands where they are to be changed."""
    operands = (x, weight) if change is None else change(x, weight)
    return error_of(rounded_product(*operands, recipe), x, weight)
