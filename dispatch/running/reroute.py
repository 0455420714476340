"""Products with a bare Parameter, found while a module's forward runs, and sent to their kernels.

A torch-function mode sees each call of `F.linear`, `matmul`, `@`, `addmm`, ... in its scope before torch does. Where an
operand is a planned Parameter, or a view or cast of one, `dispatch.running.linear` computes the product instead, and
`dispatch.running.grouped` the product of all experts. Nothing else is touched, and outside of the scope nothing is
there.
"""

import inspect
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any, Final, Protocol, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from loka.dispatch.running.contractions import einsum_with, tensordot_with
from loka.dispatch.running.grouped import GroupedCall, grouped_matmul, is_grouped
from loka.dispatch.running.linear import linear, open_checkpoint
from loka.dispatch.running.norm_act import linear_norm_act
from loka.dispatch.running.routing import SiteKernels
from loka.dispatch.running.sharded import own_part
from loka.dtensors import Part, first_among, is_sharded
from loka.kernel_registry.norm_act import OPERATOR
from loka.kernel_registry.spec import Op
from loka.stepping_aside import steps_aside

Kernels = tuple[str, str, str]  # fprop, dgrad, wgrad


def _let_pass(function: Callable[..., Any], *args: Any) -> Any:
    """Call what Dynamo refuses in a checkpoint, a graph of its own: what leaves something behind."""
    call: Any = torch._dynamo.utils._disable_side_effect_safety_checks_for_current_subtracer
    return call(function, *args)


@dataclass(eq=False)
class Route:
    """The kernels of one converted site, and whether a product has gone to them yet."""

    site: str
    kernels: SiteKernels
    reached: bool = False
    turned: bool | None = None  # whether the model has the weight as [.., k, n], once that has been seen
    part: Part | None = None  # which experts are here, where ranks share a stack out

    def of(self, weight: Tensor) -> Kernels:
        """Return the kernels of a product with this weight: one matrix of a stack may be kept in high precision."""
        if not any(self.kernels.kept):
            return self.kernels.as_tuple()
        expert, stack = _expert_of(weight), weight._base
        if expert is not None and stack is not None:
            expert += first_among(self.part, stack.shape[0])
        return self.kernels.of_expert(expert).as_tuple()

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Compute input [.., k] times a matrix [n, k] of this site, transposed."""
        self._note_layout(weight)
        return unseen(linear, input, weight, bias, *self.of(weight))

    def grouped(self, left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
        """Compute `torch._grouped_mm` with the weights of this site's experts on either side, and rows on the other."""
        self._note_layout(right.mT if right.dim() == 3 else left)
        experts = right.shape[0] if right.dim() == 3 else left.shape[0]
        kept = self.kernels.kept_among(first_among(self.part, experts), experts)
        return unseen(grouped_matmul, left, right, offsets, self.kernels.as_tuple(), kept)

    def note_reached(self) -> None:
        """Note that a product has gone to the kernels."""
        if torch.compiler.is_dynamo_compiling():
            _let_pass(setattr, self, "reached", True)
        else:
            self.reached = True

    def _note_layout(self, weight: Tensor) -> None:
        """Note which way the model has a weight that its products have as [.., n, k]."""
        if not torch.compiler.is_dynamo_compiling():
            down, across = weight.stride()[-2:]
            self.turned = self.turned if down == across else down < across


def _expert_of(weight: Tensor) -> int | None:
    """Return which matrix of a stacked Parameter a view is of; None where that cannot be told.

    Those of a Parameter that is a matrix itself lie one below the other (`probes.experts.slices`).
    """
    stack = weight._base
    if stack is None or stack.dim() not in (2, 3):
        return None
    size = stack.stride(0) if stack.dim() == 3 else weight.numel()
    return (int(weight.storage_offset()) - int(stack.storage_offset())) // size if size else None


# What a rerouted call came to: None where it is not the planned product, or not in a form that can be rerouted.
Outcome = tuple[Route, Any] | None
Arguments = tuple[Any, ...]
Options = dict[str, Any]

# How many dimensions the weight of a product has.
_WEIGHT_DIMS: Final[Mapping[Op, int]] = {"linear": 2, "grouped_linear": 3}


class Find(Protocol):
    """Finds the route of a product's operand, None where it is no planned weight of a product of this op."""

    def __call__(self, tensor: Any, op: Op = "linear") -> Route | None:
        """Return the route."""


class Reroute(TorchFunctionMode):
    """While it is active, products with the planned tensors go to their kernels."""

    def __init__(self, routes: Iterable[tuple[Tensor, Route]]) -> None:
        super().__init__()
        self._routes = list(routes)  # compared by `is`: Dynamo would guard on an id()
        self._checkpoint = open_checkpoint()
        self._sharded: list[tuple[nn.Module, str, Route]] = []  # of which others stand in while modules inside run

    @classmethod
    def of(cls, module: nn.Module, routes: Mapping[str, Route]) -> Self:
        """Reroute products with these tensors of a module, given by their names in it."""
        made = cls([(_resolve(module, name), route) for name, route in routes.items()])
        for (planned, route), name in zip(tuple(made._routes), routes, strict=True):
            if is_sharded(planned):
                made._sharded.append((module, name, route))
                if route.part is None and not torch.compiler.is_dynamo_compiling():
                    route.part = Part.of(planned)  # it was sharded after it was converted
        return made

    def run(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a forward in the scope of this mode."""
        _push(self)
        try:
            return forward(*args, **kwargs)
        finally:
            _pop()

    def __torch_function__(self, func: Any, types: Any, args: Arguments = (), kwargs: Options | None = None) -> Any:
        kwargs = kwargs or {}
        reroute = _reroute_grouped if is_grouped(func) else PRODUCTS.get(func)
        outcome = reroute(self._find, args, kwargs) if reroute is not None else None
        if outcome is not None and outcome[1] is not None:
            outcome[0].note_reached()
            return outcome[1]
        if func is Tensor.unflatten and torch.compiler.is_dynamo_compiling():
            func = torch.unflatten  # Dynamo cannot follow the method to its super() under a mode (torch 2.13)
        result = func(*args, **kwargs)
        if func in _CASTS and isinstance(result, Tensor) and (route := self._route_of(args[0])) is not None:
            self._routes.append((result, route))
        return result

    def _find(self, tensor: Any, op: Op = "linear") -> Route | None:
        """Return the route of a weight that is a planned tensor, or a view or cast of one."""
        is_weight = isinstance(tensor, Tensor) and tensor.dim() == _WEIGHT_DIMS[op]
        route = self._route_of(tensor) if is_weight else None
        if route is None or route.kernels.op != op:
            return None  # a product of another form than the one that is planned
        if open_checkpoint() is not self._checkpoint:
            return None  # a checkpoint that began in this scope is recomputed outside of it, and must come to the same
        return route

    def _route_of(self, tensor: Tensor) -> Route | None:
        base = tensor if tensor._base is None else tensor._base
        for planned, route in self._routes:
            if planned is tensor or planned is base:
                return route
        return self._route_of_part(tensor, base) if self._sharded else None

    def _route_of_part(self, tensor: Tensor, base: Tensor) -> Route | None:
        """Find what FSDP has gathered for a module inside since the scope began, and this rank's part of a DTensor."""
        for module, name, route in self._sharded:
            planned = _resolve(module, name)
            if planned is tensor or planned is base or own_part(planned) is base:
                return route
        return None


_depth: Final = torch._C._len_torch_function_stack  # found once: every planned product asks


def unseen(compute: Callable[..., Tensor], *args: Any) -> Tensor:
    """Compute a planned product with the scopes around it put aside.

    Nothing in it is a product of the model's, and each call of torch would pass through them: with emulated kernels
    that was a quarter of the time that Dynamo took, and a tenth or more of an eager step of small matrices.
    """
    if not _depth():
        return compute(*args)
    aside: list[Any] = []
    while (depth := _depth()) and isinstance(torch._C._get_function_stack_at(depth - 1), Reroute):
        aside.append(_pop())
    try:
        return compute(*args)
    finally:
        while aside:
            _push(aside.pop())


def _pop() -> Any:
    if torch.compiler.is_dynamo_compiling():
        return _let_pass(torch._C._pop_torch_function_stack)
    return torch._C._pop_torch_function_stack()


def _push(mode: Any) -> None:
    if torch.compiler.is_dynamo_compiling():
        _let_pass(torch._C._push_on_torch_function_stack, mode)
    else:
        torch._C._push_on_torch_function_stack(mode)


def _resolve(module: nn.Module, name: str) -> Tensor:
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part)
    return cast(Tensor, value)


# --- one function per form that a product is written in ---


def _reroute_linear(find: Find, args: Arguments, kwargs: Options) -> Outcome:
    input, weight, bias = _bind(("input", "weight", "bias"), args, kwargs)
    route = find(weight)
    return None if route is None else (route, route.linear(input, weight, bias))


def _reroute_matmul(find: Find, args: Arguments, kwargs: Options) -> Outcome:
    left = args[0] if args else kwargs.get("input")
    right = args[1] if len(args) > 1 else next((kwargs[key] for key in ("other", "mat2", "vec") if key in kwargs), None)
    if left is None or right is None or "out" in kwargs:
        return None
    right = _one_matrix(left, right)
    if (route := find(right)) is not None:
        return route, route.linear(left, right.mT, None)
    if (route := find(left)) is not None:
        if right.dim() == 1:
            return route, route.linear(right, left, None)
        return route, route.linear(right.mT, left, None).mT
    return None


def _one_matrix(left: Any, right: Any) -> Any:
    """Return the matrix of a stack of one, as `split` makes, that multiplies all of `left`; else `right` itself."""
    if is_one_matrix(getattr(left, "shape", ()), getattr(right, "shape", ())):
        for _ in right.shape[:-2]:
            right = right.select(0, 0)
    return right


def is_one_matrix(left: Sequence[int], right: Sequence[int]) -> bool:
    """Whether a matmul of operands of these shapes has one matrix on its right, behind dimensions of one."""
    return 2 < len(right) <= len(left) and all(type(extent) is int and extent == 1 for extent in right[:-2])


def _reroute_rmatmul(find: Find, args: Arguments, kwargs: Options) -> Outcome:
    return _reroute_matmul(find, (args[1], args[0]), kwargs)


def _reroute_inner(find: Find, args: Arguments, kwargs: Options) -> Outcome:
    input, weight = _bind(("input", "other"), args, kwargs)
    if "out" in kwargs or not input.dim() or (route := find(weight)) is None:
        return None
    return route, route.linear(input, weight, None)


def _reroute_addmm(find: Find, args: Arguments, kwargs: Options) -> Outcome:
    bias, left, right = _bind(("input", "mat1", "mat2"), args, kwargs)
    if kwargs.keys() & {"alpha", "beta", "out"} or (route := find(right)) is None:
        return None
    return route, route.linear(left, right.mT, bias)


def _reroute_tensordot(find: Find, args: Arguments, kwargs: Options) -> Outcome:
    left, right, dims = _bind(("a", "b", "dims"), args, kwargs)
    dims = 2 if dims is None else dims
    if is_sharded(left) or is_sharded(right):
        return None  # not every reshaping of one is there
    for weight, is_left in ((right, False), (left, True)):
        if (route := find(weight)) is not None:
            return route, tensordot_with(route.linear, left, right, dims, weight_is_left=is_left)
    return None


def _reroute_einsum(find: Find, args: Arguments, kwargs: Options) -> Outcome:
    operands = args[1] if len(args) == 2 and isinstance(args[1], list | tuple) else args[1:]
    if not isinstance(args[0], str) or len(operands) != 2:
        return None
    left, right = operands
    if is_sharded(left) or is_sharded(right):
        return None  # likewise
    for weight, is_left in ((right, False), (left, True)):
        if (route := find(weight)) is not None:
            return route, einsum_with(route.linear, args[0], (left, right), weight_is_left=is_left)
    return None


def _reroute_grouped(find: Find, args: Arguments, kwargs: Options) -> Outcome:
    call = GroupedCall.of(args, kwargs)
    if call is None or {call.left.dim(), call.right.dim()} != {2, 3} or call.left.dtype != call.right.dtype:
        return None
    if is_sharded(call.left) or is_sharded(call.right):
        return None  # whose rows are whose expert's is known of a rank's own part alone
    if not torch.compiler.is_dynamo_compiling() and steps_aside() and open_checkpoint() is None:
        return None  # what is sampled is the model's own product; a checkpoint has to save the same tensors as ever
    route = find(call.right, "grouped_linear") or find(call.left, "grouped_linear")
    if route is None:
        return None
    return route, route.grouped(call.left, call.right, call.offsets)


def _reroute_norm_act(find: Find, args: Arguments, kwargs: Options) -> Outcome:
    """Dynamo alone shows the operator: eager modules that are no part of a plan multiply in the open."""
    input, weight, bias, eps = _bind(("x", "weight", "bias", "eps"), args, kwargs)
    route = find(weight)
    return None if route is None else (route, linear_norm_act(input, weight, bias, eps, route.of(weight)))


def _bind(names: tuple[str, ...], args: Arguments, kwargs: Options) -> list[Any]:
    return [args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names)]


# --- multi-head attention: one function of torch that runs several planned products ---

_ATTENTION_PARAMETERS: Final[tuple[str, ...]] = tuple(inspect.signature(F.multi_head_attention_forward).parameters)
_ATTENTION_WEIGHTS: Final = frozenset(name for name in _ATTENTION_PARAMETERS if name.endswith("_weight"))


def attention_weights(args: Arguments, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return, by name, the weights in the arguments of a call of `F.multi_head_attention_forward`."""
    bound = {**dict(zip(_ATTENTION_PARAMETERS, args, strict=False)), **kwargs}
    return {name: bound[name] for name in _ATTENTION_WEIGHTS if bound.get(name) is not None}


def attention(planned: tuple[tuple[str, Kernels], ...], *args: Any, **kwargs: Any) -> Any:
    """Compute `F.multi_head_attention_forward` with the products of the named weights on their kernels."""
    weights = attention_weights(args, kwargs)
    with Reroute([(weights[name], Route(name, SiteKernels(*kernels))) for name, kernels in planned]):
        return _open_attention(*args, **kwargs)


def _transparent(function: Any) -> Any:
    """Copy a Python function of torch that offers itself to modes as a whole, so that modes see what is inside it."""
    names = {**function.__globals__, "has_torch_function": lambda arguments: False}
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


_open_attention: Final = _transparent(F.multi_head_attention_forward)


def _reroute_attention(find: Find, args: Arguments, kwargs: Options) -> Outcome:
    routes = {name: route for name, weight in attention_weights(args, kwargs).items() if (route := find(weight))}
    if not routes:
        return None
    result = attention(tuple((name, route.kernels.as_tuple()) for name, route in routes.items()), *args, **kwargs)
    for route in routes.values():
        route.note_reached()
    return next(iter(routes.values())), result


PRODUCTS: Final[dict[Any, Callable[[Find, Arguments, Options], Outcome]]] = {
    F.linear: _reroute_linear,
    operator.matmul: _reroute_matmul,  # what Dynamo hands over while it exports
    torch.matmul: _reroute_matmul,
    torch.mm: _reroute_matmul,
    torch.mv: _reroute_matmul,
    Tensor.matmul: _reroute_matmul,
    Tensor.mm: _reroute_matmul,
    Tensor.mv: _reroute_matmul,
    Tensor.__matmul__: _reroute_matmul,
    Tensor.__rmatmul__: _reroute_rmatmul,
    torch.linalg.matmul: _reroute_matmul,
    torch.inner: _reroute_inner,
    Tensor.inner: _reroute_inner,
    torch.addmm: _reroute_addmm,
    Tensor.addmm: _reroute_addmm,
    torch.tensordot: _reroute_tensordot,
    torch.einsum: _reroute_einsum,
    OPERATOR: _reroute_norm_act,
    F.multi_head_attention_forward: _reroute_attention,
}
_CASTS: Final = frozenset(
    {Tensor.to, Tensor.float, Tensor.double, Tensor.bfloat16, Tensor.half, Tensor.type, Tensor.type_as}
)
