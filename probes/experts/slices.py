"""Stacks of weights: experts that a layer keeps as one parameter [experts, rows, columns], or one below the other."""

import re
from dataclasses import dataclass
from typing import Final

from torch import Tensor

# A matrix of a module in `experts`, all of whose weights it may hold; not one of an expert of its own, `experts.3.w1`.
_BELOW_EACH_OTHER: Final = re.compile(r"(^|\.)experts\.(?!(expert_)?\d+\.)")


@dataclass(frozen=True, slots=True)
class Slice:
    """Which matrix of a stacked parameter the weight of a product is; None: all of them, one product for each.

    Where ranks share the stack out, it is of the part that is here, which begins with the model's expert `first`.
    """

    expert: int | None
    experts: int
    first: int = 0
    layer: int = 0  # experts of the layer, here and on other ranks; 0: those here are all


def slice_of(name: str, stack: Tensor, weight: Tensor) -> Slice | None:
    """Say which matrix of a parameter a weight in its memory is, or that it is all of them; None without a stack.

    `weight`: two-dimensional where it is one matrix, or a part of it. Of a matrix [experts * rows, columns], which its
    `name` tells, only equal shares of whole rows are known.
    """
    if stack.dim() == 3:
        if weight.dim() == 3:
            return Slice(None, stack.shape[0]) if weight.shape[0] == stack.shape[0] else None
        experts, size, whole = stack.shape[0], stack.stride(0), weight.numel() <= stack[0].numel()
    elif stack.dim() == weight.dim() == 2 and 0 < weight.numel() < stack.numel() and _BELOW_EACH_OTHER.search(name):
        size = weight.numel()
        whole = stack.is_contiguous() and not stack.numel() % size and stack.shape[1] in weight.shape
        experts = stack.numel() // size if whole else 0
    else:
        return None
    if not whole or not size:
        return None
    expert, rest = divmod(int(weight.storage_offset()) - int(stack.storage_offset()), size)
    known = 0 <= expert < experts and (stack.dim() == 3 or not rest)
    return Slice(expert, experts) if known else None
