"""The last products of a run: those whose output reaches the output of the model without another product.

Their layers are the prediction heads. They are found by following the autograd graph of one run backwards, from the
output to the first product on each way; nothing is computed.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from torch import Tensor

from loka.value_flow import tensors_in

# Nodes of the autograd graph that multiply, and those between a product and the parameter that is its operand.
_PRODUCTS: Final = re.compile(
    r"(Addmm|Mm|Bmm|Baddbmm|Mv|Addmv|Addbmm|Dot|Linear|ScaledDot\w*|\w*Convolution|\w*Rnn\w*)Backward\d*"
)
_VIEWS: Final = re.compile(
    r"(T|Transpose|Permute|View|UnsafeView|ReshapeAlias|Expand|ToCopy|Unsqueeze|Squeeze|Alias|Clone)Backward\d*"
)
# Nodes that stand for much that ran, and do not say what: torch.compile, reentrant activation checkpointing.
_OPAQUE: Final = re.compile(r"(Compiled|Checkpoint)FunctionBackward")


@dataclass(slots=True)
class LastProducts:
    """What the last products were made of: their parameters, and those added behind them."""

    parameters: list[Tensor] = field(default_factory=list)
    opaque: str = ""  # a node that the graph could not be followed through; the parameters are then not all


def last_products(output: object) -> LastProducts:
    """Follow the graph of what a model returned: tensors in tuples, dicts and dataclasses; empty without a graph."""
    found = LastProducts()
    waiting: list[Any] = [tensor.grad_fn for tensor in tensors_in(output) if tensor.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if hasattr(node, "variable"):
            found.parameters.append(node.variable)
            continue
        if _OPAQUE.fullmatch(node.name()):
            found.opaque = node.name()
            continue
        following = [each for each, _ in node.next_functions if each is not None]
        if _PRODUCTS.fullmatch(node.name()) or _multiplies(node, following):
            found.parameters += (each for operand in following for each in _operand(operand))
            continue
        fresh = [each for each in following if each not in seen]
        seen.update(fresh)
        waiting += fresh
    return found


def _multiplies(node: Any, following: list[Any]) -> bool:
    """Whether a node of a torch.autograd.Function is a product: one that takes a matrix of parameters is."""
    if not hasattr(node, "_forward_cls"):
        return False
    return any(parameter.dim() > 1 for operand in following for parameter in _operand(operand))


def _operand(node: Any) -> Iterator[Tensor]:
    """Yield the parameter that an operand of a product is a view of."""
    while node is not None and not hasattr(node, "variable"):
        inputs = [following for following, _ in node.next_functions if following is not None]
        if len(inputs) != 1 or not _VIEWS.fullmatch(node.name()):
            return
        node = inputs[0]
    if node is not None:
        yield node.variable
