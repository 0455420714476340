"""`tensordot` and `einsum` with one weight matrix are linear layers in other words: the same product, moved axes.

Each function here answers with the planned product's result, or None where the call is something else (several
contracted axes, batch axes shared with the weight, repeated labels); the caller then leaves the call as it is.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from loka.dispatch.running.linear import linear

Kernels = tuple[str, str, str]  # fprop, dgrad, wgrad
# The planned product of input [.., k], weight [n, k] and a bias, or None.
Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def tensordot(left: Tensor, right: Tensor, dims: Any, kernels: Kernels, *, weight_is_left: bool) -> Tensor | None:
    """Compute `torch.tensordot(left, right, dims)` with a 2-d weight on one side and one contracted axis."""
    return tensordot_with(partial(_linear, kernels), left, right, dims, weight_is_left=weight_is_left)


def einsum(equation: str, left: Tensor, right: Tensor, kernels: Kernels, *, weight_is_left: bool) -> Tensor | None:
    """Compute a two-operand `torch.einsum` in which a 2-d weight trades one label of the other operand for its own."""
    return einsum_with(partial(_linear, kernels), equation, (left, right), weight_is_left=weight_is_left)


def _linear(kernels: Kernels, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return linear(input, weight, bias, *kernels)


def tensordot_with(product: Linear, left: Tensor, right: Tensor, dims: Any, *, weight_is_left: bool) -> Tensor | None:
    """Compute the same by this product."""
    axes = _contracted(dims, left.dim())
    if axes is None:
        return None
    weight, x = (left, right) if weight_is_left else (right, left)
    weight_axis, x_axis = axes if weight_is_left else axes[::-1]
    out = _apply(product, x, x_axis, weight, weight_axis)
    return out.movedim(-1, 0) if weight_is_left else out


def einsum_with(
    product: Linear, equation: str, operands: tuple[Tensor, Tensor], *, weight_is_left: bool
) -> Tensor | None:
    """Compute the same by this product."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow or len(terms) != 2:
        return None
    weight_labels, x_labels = terms if weight_is_left else terms[::-1]
    traded = _traded(weight_labels, x_labels, output)
    if traded is None:
        return None
    contracted, gained = traded
    weight, x = operands if weight_is_left else operands[::-1]
    # Axes are counted from the end: an ellipsis may stand at the front.
    x_axis = x_labels.index(contracted) - len(x_labels)
    out = _apply(product, x, x_axis, weight, weight_labels.index(contracted))
    return out.movedim(-1, output.index(gained) - len(output))


def is_linear_tensordot(dims: Any, left_dims: int) -> bool:
    """Whether `tensordot` with these `dims` is a linear layer, should one operand be a weight."""
    return _contracted(dims, left_dims) is not None


def is_linear_einsum(equation: str, *, weight_is_left: bool) -> bool:
    """Whether `einsum` with this equation is a linear layer, should that operand be a weight."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow or len(terms) != 2:
        return False
    weight_labels, x_labels = terms if weight_is_left else terms[::-1]
    return _traded(weight_labels, x_labels, output) is not None


def _apply(product: Linear, x: Tensor, x_axis: int, weight: Tensor, weight_axis: int) -> Tensor:
    """Contract one axis of x with one of the weight; the weight's other axis comes last."""
    nk = weight.mT if weight_axis % 2 == 0 else weight
    return product(x.movedim(x_axis, -1), nk, None)


def _contracted(dims: Any, left_dims: int) -> tuple[int, int] | None:
    """Return the one contracted axis of each operand, as tensordot's `dims` names them."""
    if isinstance(dims, int):
        return (left_dims - 1, 0) if dims == 1 else None
    if not isinstance(dims, Sequence) or len(dims) != 2:
        return None
    first, second = ([axis] if isinstance(axis, int) else list(axis) for axis in dims)
    return (first[0], second[0]) if len(first) == len(second) == 1 else None


def _traded(weight_labels: str, x_labels: str, output: str) -> tuple[str, str] | None:
    """Return (contracted label, the weight's other label), None where the equation is no linear layer."""
    labels = x_labels.removeprefix("...")
    shared = set(weight_labels) & set(labels)
    if len(weight_labels) != 2 or len(set(weight_labels)) != 2 or len(shared) != 1 or "..." in labels:
        return None
    contracted = shared.pop()
    gained = weight_labels.replace(contracted, "")
    # Apart from the traded label, the output keeps x's labels in order.
    kept = x_labels.replace(contracted, "")
    if len(set(labels)) != len(labels) or gained not in output or output.replace(gained, "") != kept:
        return None
    return contracted, gained
