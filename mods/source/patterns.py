"""What activation mods look for in a method: calls of Swish and of ReLU, in the ways that people write them.

    F.silu(x)  swish(x)                      Swish, also a function of the user's that computes it
    x * torch.sigmoid(x)  x * x.sigmoid()    Swish, in either order, also torch.mul, `x *= ...`, the gate in a variable
    x * torch.sigmoid(norm(x))               SwishNorm: the gate becomes hard and keeps its norm
    F.relu(x)  x.relu()                      ReLU, unless what follows squares it

A sigmoid that multiplies anything else than what it is the gate of is a gate, not a Swish, and stays.
"""

import ast
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loka.mods.source.calls import Form, Match, Pattern
from loka.mods.source.scope import UNKNOWN, Known, Scope, names_in, resolved, same

SILU: Final = (F.silu, torch._C._nn.silu)
RELU: Final = (F.relu, torch.relu)
RELU_IN_PLACE: Final = (F.relu_, torch.relu_)
_SIGMOID: Final = (torch.sigmoid, F.sigmoid, torch.special.expit)
_PRODUCT: Final = (torch.mul, torch.multiply)
_PRODUCT_METHODS: Final = ("mul", "mul_", "multiply")
_NORMS: Final = (F.layer_norm, F.rms_norm, torch.layer_norm, torch.rms_norm, F.batch_norm, F.group_norm)
_SWISH_NAMES: Final = frozenset({"silu", "sigmoid", "expit"})
_GRID: Final = torch.linspace(-8, 8, 65, dtype=torch.float64, device="cpu")


@dataclass(frozen=True, slots=True)
class SwishCalls(Pattern):
    """Swish and SwishNorm as calls."""

    def uses(self, value: object) -> bool:
        """Whether it is a function that computes Swish."""
        return is_swish(value)

    def hinted(self, module: nn.Module, names: frozenset[str]) -> bool:
        """Whether a sigmoid is named or at hand."""
        return bool(names & _SWISH_NAMES) or any(isinstance(child, nn.Sigmoid) for child in module.children())

    def match(self, node: ast.expr | ast.AugAssign, scope: Scope, known: Known) -> Match | None:
        """Return the Swish at this expression, or the gate of the one that it multiplies."""
        if isinstance(node, ast.Call) and is_swish(scope.value(node.func)):
            return Match(node=node, form="call", stand_in="hard_swish", words=ast.unparse(node.func))
        for value, gate in products(node, scope):
            holder = resolved(gate, known)
            argument = _sigmoid_of(holder, scope)
            if argument is None or (isinstance(gate, ast.Name) and holder is not gate and scope.loads[gate.id] != 1):
                continue
            words = f"{ast.unparse(value)} * {ast.unparse(holder)}"
            if same(value, argument):
                if isinstance(node, ast.BinOp) and holder is gate:
                    return Match(node=node, form="product", stand_in="hard_swish", words=words)
            elif not _is_norm_of(resolved(argument, known), value, scope):
                continue
            assert isinstance(holder, ast.Call)
            form: Form = "call" if holder.args else "method"
            return Match(node=holder, form=form, stand_in="hard_sigmoid", words=f"the sigmoid of {words}")
        return None


@dataclass(frozen=True, slots=True)
class ReluCalls(Pattern):
    """ReLU as calls."""

    def uses(self, value: object) -> bool:
        """Whether it is ReLU."""
        return _is_one_of(value, (*RELU, *RELU_IN_PLACE))

    def hinted(self, module: nn.Module, names: frozenset[str]) -> bool:
        """Whether a ReLU is named, as a method of tensors is."""
        return bool(names & {"relu", "relu_"})

    def match(self, node: ast.expr | ast.AugAssign, scope: Scope, known: Known) -> Match | None:
        """Return the ReLU at this expression; one that is squared is what it is to become."""
        scope.settled.update(id(resolved(squared, known)) for squared in _squares(node, scope))
        if not isinstance(node, ast.Call):
            return None
        words = ast.unparse(node.func)
        for functions, method, stand_in in ((RELU, "relu", "squared_relu"), (RELU_IN_PLACE, "relu_", "squared_relu_")):
            if _is_one_of(scope.value(node.func), functions):
                return Match(node=node, form="call", stand_in=stand_in, words=words)
            if _is_method(node, method, scope):
                return Match(node=node, form="method", stand_in=stand_in, words=words)
        return None


def is_swish(value: object) -> bool:
    """Whether an object is a function that computes x * sigmoid(x): torch's, or one of the user's that is tried."""
    if _is_one_of(value, SILU):
        return True
    if not isinstance(value, FunctionType) or not names_in(value) & _SWISH_NAMES:
        return False
    return _module_of(value) != "torch" and computes(value, F.silu)


def computes(function: Callable[[Tensor], object], reference: Callable[[Tensor], Tensor]) -> bool:
    """Whether a function of one tensor returns what the reference does, tried on a grid in fp64."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
        if not parameters or any(each.default is each.empty for each in parameters[1:]):
            return False
        with torch.no_grad():
            found = function(_GRID.clone())
    except Exception:  # noqa: BLE001 - a function of the user's that cannot be tried on this grid is another one
        return False
    wanted = reference(_GRID)
    return isinstance(found, Tensor) and found.shape == wanted.shape and torch.allclose(found.to(wanted), wanted)


def products(node: ast.AST, scope: Scope) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Yield the factors of a product, in both orders."""
    factors: Sequence[ast.expr] = ()
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        factors = (node.left, node.right)
    elif isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Mult):
        yield node.target, node.value
    elif isinstance(node, ast.Call) and not node.keywords:
        if _is_one_of(scope.value(node.func), _PRODUCT) and len(node.args) == 2:
            factors = node.args
        elif (
            isinstance(node.func, ast.Attribute)
            and node.func.attr in ("mul", "mul_", "multiply")
            and len(node.args) == 1
        ):
            factors = (node.func.value, node.args[0])
    yield from zip(factors, reversed(factors), strict=True)


def _squares(node: ast.AST, scope: Scope) -> Iterator[ast.expr]:
    """Yield what an expression is the square of."""
    if isinstance(node, ast.BinOp):
        if (isinstance(node.op, ast.Pow) and _is_two(node.right)) or (
            isinstance(node.op, ast.Mult) and same(node.left, node.right)
        ):
            yield node.left
    elif isinstance(node, ast.Call):
        two = [argument for argument in node.args if _is_two(argument)]
        rest = [argument for argument in node.args if not _is_two(argument)]
        called = scope.value(node.func)
        if (called is torch.square or (called is torch.pow and two)) and rest:
            yield rest[0]
        elif isinstance(node.func, ast.Attribute) and not rest and node.func.attr == ("pow" if two else "square"):
            yield node.func.value


def _is_two(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value == 2


def _sigmoid_of(node: ast.expr, scope: Scope) -> ast.expr | None:
    """Return what a sigmoid is applied to, or None for anything else."""
    if not isinstance(node, ast.Call) or node.keywords:
        return None
    called = scope.value(node.func)
    if len(node.args) == 1 and (_is_one_of(called, _SIGMOID) or isinstance(called, nn.Sigmoid)):
        return node.args[0]
    return node.func.value if _is_method(node, "sigmoid", scope) and isinstance(node.func, ast.Attribute) else None


def _is_norm_of(node: ast.expr, value: ast.expr, scope: Scope) -> bool:
    if not isinstance(node, ast.Call) or not node.args or not same(value, node.args[0]):
        return False
    called = scope.value(node.func)
    return _is_one_of(called, _NORMS) or is_called_norm(called)


def is_called_norm(value: object) -> bool:
    """Whether an object is a module whose class calls itself a norm."""
    return isinstance(value, nn.Module) and "norm" in type(value).__name__.lower()


def _is_method(node: ast.Call, name: str, scope: Scope) -> bool:
    """Whether a call is e.g. `x.relu()` of a tensor."""
    called = node.func
    return (
        isinstance(called, ast.Attribute)
        and called.attr == name
        and not node.args
        and not node.keywords
        and scope.is_tensor(called.value)
    )


def _is_one_of(value: object, functions: Iterable[object]) -> bool:
    return value is not UNKNOWN and any(value is function for function in functions)


def _module_of(function: FunctionType) -> str:
    return (function.__module__ or "").partition(".")[0]
