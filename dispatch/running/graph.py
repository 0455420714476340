"""Products in a Dynamo graph: which nodes they are, which operand is a weight, and what runs them as planned.

Dynamo keeps the calls that a model writes (`linear`, `matmul`, `@`, `addmm`, `einsum`, ...), so they are matched by
what was called. A weight operand is followed back through views and casts to the graph input that it comes from.
"""

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from loka.dispatch.running.contractions import einsum, is_linear_einsum, is_linear_tensordot, tensordot
from loka.dispatch.running.grouped import GroupedCall, grouped_matmul, is_grouped
from loka.dispatch.running.linear import linear
from loka.dispatch.running.norm_act import linear_norm_act
from loka.dispatch.running.reroute import attention, attention_weights, is_one_matrix
from loka.dispatch.running.routing import SiteKernels
from loka.dtensors import Part, first_among
from loka.kernel_registry.norm_act import OPERATOR
from loka.kernel_registry.spec import Op
from loka.torch_release import takes_own_part

# Puts a product on the kernels of its weight's site: returns the node that replaces it.
Place = Callable[[fx.Graph, SiteKernels], fx.Node]


@dataclass(frozen=True, slots=True)
class Operand:
    """One operand of a product that may be its weight, and what to do if it is."""

    weight: fx.Node
    place: Place
    ops: tuple[Op, ...] = ("linear",)  # that the site may be planned as


# What leads from a weight operand back to its parameter without changing its numbers, other than by a cast.
_VIEWS: Final = (
    *("t", "transpose", "swapaxes", "swapdims", "permute", "movedim", "view", "reshape", "flatten", "unflatten"),
    *("squeeze", "unsqueeze", "select", "narrow", "chunk", "split", "tensor_split", "unbind", "contiguous", "detach"),
    "to_local",  # this rank's part of a DTensor
)
_CASTS: Final = ("to", "float", "double", "bfloat16", "half", "type", "type_as")
_STEP_METHODS: Final = frozenset({*_VIEWS, *_CASTS})
_STEP_FUNCTIONS: Final = frozenset({getattr(torch, name) for name in _VIEWS if hasattr(torch, name)})
_STEP_ATTRIBUTES: Final = frozenset({"T", "mT", "H", "mH", "data"})


def shape_of(node: Any) -> tuple[int, ...]:
    """Return the shape of a node's tensor, with symbols where it is dynamic; () for anything else."""
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def origin(node: fx.Node) -> fx.Node:
    """Walk from a weight operand back through views and casts to the node it comes from."""
    while node.args and isinstance(node.args[0], fx.Node) and _is_step(node):
        node = node.args[0]
    return node


def _is_step(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _STEP_METHODS
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] in _STEP_ATTRIBUTES
    if node.target is operator.getitem:
        index = node.args[1]
        # Integers and slices make views, or take one of several chunks; tensors gather rows, as a lookup does.
        return all(part is None or isinstance(part, int | slice) or part is ... for part in _as_tuple(index))
    return node.target in _STEP_FUNCTIONS or takes_own_part(node.target)


def _as_tuple(index: Any) -> tuple[Any, ...]:
    return tuple(index) if isinstance(index, tuple | list) else (index,)


def operands(node: fx.Node) -> list[Operand]:
    """Return the operands of a product that may be its weight; none for other nodes."""
    # `out=` writes into a tensor of the caller's, `alpha` and `beta` scale: such calls stay as written.
    if node.op not in ("call_function", "call_method") or node.kwargs.keys() & {"out", "alpha", "beta"}:
        return []
    if is_grouped(node.target):
        return _match_grouped(node)
    match = (_METHODS if node.op == "call_method" else _FUNCTIONS).get(node.target)
    return match(node) if match is not None else []


def _argument(node: fx.Node, position: int, *names: str) -> Any:
    if position < len(node.args):
        return node.args[position]
    return next((node.kwargs[name] for name in names if name in node.kwargs), None)


def _if_matrix(weight: Any, place: Callable[..., fx.Node], *arguments: Any) -> list[Operand]:
    """Return the operand if it is a matrix, placed with these arguments of `place`."""
    return [Operand(weight, functools.partial(place, *arguments))] if len(shape_of(weight)) == 2 else []


# --- which nodes are products ---


def _match_linear(node: fx.Node) -> list[Operand]:
    x, weight, bias = (_argument(node, i, name) for i, name in enumerate(("input", "weight", "bias")))
    return _if_matrix(weight, _place_linear, x, weight, bias)


def _match_matmul(node: fx.Node) -> list[Operand]:
    left, right = _argument(node, 0, "input"), _argument(node, 1, "other", "mat2", "vec")
    if is_one_matrix(shape_of(left), shape_of(right)):
        return [Operand(right, functools.partial(_place_one_matrix, left, right))]
    return [
        *_if_matrix(right, _place_transposed, left, right, None),
        *(_if_matrix(left, _place_left, left, right) if shape_of(right) else []),
    ]


def _match_inner(node: fx.Node) -> list[Operand]:
    x, weight = _argument(node, 0, "input"), _argument(node, 1, "other")
    return _if_matrix(weight, _place_linear, x, weight, None) if shape_of(x) else []


def _match_addmm(node: fx.Node) -> list[Operand]:
    bias, x, weight = (_argument(node, i, name) for i, name in enumerate(("input", "mat1", "mat2")))
    return _if_matrix(weight, _place_transposed, x, weight, bias)


def _match_tensordot(node: fx.Node) -> list[Operand]:
    left, right, dims = _argument(node, 0, "a"), _argument(node, 1, "b"), _argument(node, 2, "dims")
    if not is_linear_tensordot(dims, len(shape_of(left))):
        return []
    return [
        *_if_matrix(right, _place_contraction, tensordot, (left, right, dims), False),
        *_if_matrix(left, _place_contraction, tensordot, (left, right, dims), True),
    ]


def _match_einsum(node: fx.Node) -> list[Operand]:
    equation, *rest = node.args
    tensors = rest[0] if len(rest) == 1 else rest
    if not isinstance(equation, str) or not isinstance(tensors, tuple | list) or len(tensors) != 2:
        return []
    found = []
    for weight, is_left in ((tensors[1], False), (tensors[0], True)):
        if is_linear_einsum(equation, weight_is_left=is_left):
            found += _if_matrix(weight, _place_contraction, einsum, (equation, *tensors), is_left)
    return found


def _match_attention(node: fx.Node) -> list[Operand]:
    """Several products in one node: placing one gives an attention that the next is placed in."""
    planned = node.args[0] if node.target is attention else ()
    args = node.args[1:] if node.target is attention else node.args
    assert isinstance(planned, tuple)
    weights = attention_weights(args, node.kwargs)
    done = {name for name, _ in planned}
    return [
        operand
        for name in sorted(weights.keys() - done)
        for operand in _if_matrix(weights[name], _place_attention, planned, name, args, node.kwargs)
    ]


def _match_grouped(node: fx.Node) -> list[Operand]:
    call = GroupedCall.of(node.args, node.kwargs)
    dims = [len(shape_of(call.left)), len(shape_of(call.right))] if call is not None else []
    if call is None or sorted(dims) != [2, 3]:
        return []
    weight = call.right if dims[1] == 3 else call.left
    return [Operand(weight, functools.partial(_place_grouped, call, weight), ("grouped_linear",))]


def _match_norm_act(node: fx.Node) -> list[Operand]:
    """A linear layer with its norm and activation: they are placed together, however the product is planned."""
    x, weight, bias, eps = (_argument(node, i, name) for i, name in enumerate(("x", "weight", "bias", "eps")))
    placed = _if_matrix(weight, _place_norm_act, x, weight, bias, eps)
    return [replace(operand, ops=("linear", "linear_norm_act")) for operand in placed]


_FUNCTIONS: Final[dict[Any, Callable[[fx.Node], list[Operand]]]] = {
    F.linear: _match_linear,
    torch._C._nn.linear: _match_linear,
    operator.matmul: _match_matmul,
    torch.matmul: _match_matmul,
    torch.mm: _match_matmul,
    torch.mv: _match_matmul,
    torch.linalg.matmul: _match_matmul,
    torch.inner: _match_inner,
    torch.addmm: _match_addmm,
    torch.tensordot: _match_tensordot,
    torch.einsum: _match_einsum,
    OPERATOR: _match_norm_act,
    OPERATOR.default: _match_norm_act,
    F.multi_head_attention_forward: _match_attention,
    attention: _match_attention,
}
_METHODS: Final[dict[Any, Callable[[fx.Node], list[Operand]]]] = {
    "matmul": _match_matmul,
    "__matmul__": _match_matmul,
    "mm": _match_matmul,
    "mv": _match_matmul,
    "inner": _match_inner,
    "addmm": _match_addmm,
}


# --- what replaces them ---


def _transposed(graph: fx.Graph, node: fx.Node) -> fx.Node:
    return graph.call_function(getattr, (node, "mT"))


def _place_linear(x: fx.Node, weight: fx.Node, bias: Any, graph: fx.Graph, kernels: SiteKernels) -> fx.Node:
    return graph.call_function(linear, (x, weight, bias, *kernels.as_tuple()))


def _place_transposed(x: fx.Node, weight: fx.Node, bias: Any, graph: fx.Graph, kernels: SiteKernels) -> fx.Node:
    """x @ W + bias with W [K, N]."""
    return _place_linear(x, _transposed(graph, weight), bias, graph, kernels)


def _place_one_matrix(x: fx.Node, weight: fx.Node, graph: fx.Graph, kernels: SiteKernels) -> fx.Node:
    """x @ W with W [1, .., K, N]."""
    for _ in shape_of(weight)[:-2]:
        weight = graph.call_method("select", (weight, 0, 0))
    return _place_transposed(x, weight, None, graph, kernels)


def _place_left(weight: fx.Node, x: fx.Node, graph: fx.Graph, kernels: SiteKernels) -> fx.Node:
    """W @ x with W [N, K] is the transpose of x^T @ W^T; a vector has none."""
    if len(shape_of(x)) == 1:
        return _place_linear(x, weight, None, graph, kernels)
    return _transposed(graph, _place_linear(_transposed(graph, x), weight, None, graph, kernels))


def _place_contraction(
    function: Any, arguments: tuple[Any, ...], weight_is_left: bool, graph: fx.Graph, kernels: SiteKernels
) -> fx.Node:
    return graph.call_function(function, (*arguments, kernels.as_tuple()), {"weight_is_left": weight_is_left})


def _place_attention(
    planned: tuple[Any, ...], name: str, args: Any, kwargs: Any, graph: fx.Graph, kernels: SiteKernels
) -> fx.Node:
    return graph.call_function(attention, ((*planned, (name, kernels.as_tuple())), *args), kwargs)


def _place_grouped(call: GroupedCall, weight: fx.Node, graph: fx.Graph, kernels: SiteKernels) -> fx.Node:
    operands, experts = (call.left, call.right, call.offsets), shape_of(weight)[0]
    part = Part.of(origin(weight).meta.get("example_value"))
    kept = kernels.kept_among(first_among(part, experts), experts)
    return graph.call_function(grouped_matmul, (*operands, kernels.as_tuple(), kept))


def _place_norm_act(x: fx.Node, weight: fx.Node, bias: Any, eps: Any, graph: fx.Graph, kernels: SiteKernels) -> fx.Node:
    return graph.call_function(linear_norm_act, (x, weight, bias, eps, kernels.as_tuple()))
