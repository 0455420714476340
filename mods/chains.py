"""Chains of a linear layer, a BlockNorm and an activation, found where a model runs them one after the other.

In an nn.Sequential they are neighbours; in a method they are called one on the other, `act(norm(up(x)))`, or in
statements that follow each other. A chain is one only if nobody else sees what is inside: each of its modules is
registered once and named once in all methods, has no hooks, and its result is used by the next alone.
"""

import ast
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from torch import nn

from loka.mods.block_norm import BlockRMSNorm
from loka.mods.claims import CARRIED_HOOKS
from loka.mods.fused_linear import Activation
from loka.mods.source.calls import Call, exchanged
from loka.mods.source.methods import scopes
from loka.mods.source.scope import Scope, blocks_of
from loka.mods.squared_relu import ReLUSquared

_MODULES: Final[dict[type[nn.Module], Activation]] = {nn.Hardswish: "hard_swish", ReLUSquared: "squared_relu"}
_CALLS: Final[Mapping[str, Activation]] = {"hard_swish": "hard_swish", "squared_relu": "squared_relu"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Chain:
    """A linear layer, its norm and, where one follows, the activation: a module, or a call in a method of `owner`."""

    linear: nn.Linear
    norm: BlockRMSNorm
    activation: nn.Module | Call | None
    owner: nn.Module | None = None

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The modules of the chain, in order."""
        return tuple(each for each in (self.linear, self.norm, self.activation) if isinstance(each, nn.Module))

    @property
    def activation_name(self) -> Activation:
        """The name of the activation."""
        if isinstance(self.activation, Call):
            return _CALLS[self.activation.stand_in]
        return "none" if self.activation is None else _MODULES[type(self.activation)]


def chains_in(model: nn.Module) -> Iterator[Chain]:
    """Yield each chain of a model whose products nobody else sees."""
    registered = Counter(id(child) for module in model.modules() for child in module._modules.values())
    mentioned: Counter[int] = Counter()
    found: list[Chain] = []
    for module in model.modules():
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            children = list(module)
            mentioned.update(map(id, children))
            found += _in_sequence(children)
        for name, scope in scopes(module) if module._modules else ():
            mentioned.update(id(held) for held in _mentions(scope))
            calls = {(call.start, call.end): call for call in exchanged(module) if call.method == name}
            found += _in_method(scope, module, calls)
    for chain in found:
        if all(registered[id(module)] == mentioned[id(module)] == 1 and _bare(module) for module in chain.modules):
            yield chain


def _bare(module: nn.Module) -> bool:
    """Whether nobody looks at what goes into a module or comes out of it."""
    hooks = any(vars(module)[name] for name in CARRIED_HOOKS if name.endswith("_hooks"))
    return not hooks and "forward" not in vars(module)


def _chain(linear: object, norm: object, activation: object, owner: nn.Module | None = None) -> Chain | None:
    """Return the chain of these, if they are one."""
    if type(linear) is not nn.Linear or not isinstance(norm, BlockRMSNorm) or norm.features != linear.out_features:
        return None
    known = type(activation) in _MODULES or isinstance(activation, Call)
    taken = activation if known and isinstance(activation, nn.Module | Call) else None
    return Chain(linear=linear, norm=norm, activation=taken, owner=owner)


def _in_sequence(children: Sequence[nn.Module]) -> Iterator[Chain]:
    for index in range(len(children) - 1):
        following = children[index + 2] if index + 2 < len(children) else None
        chain = _chain(children[index], children[index + 1], following)
        if chain is not None:
            yield chain


# --- in a method ---


def _mentions(scope: Scope) -> Iterator[nn.Module]:
    """Yield each submodule that a method names, as often as it does; with a sequence that it takes apart, its parts."""
    whole = {id(node.func) for node in ast.walk(scope.node) if isinstance(node, ast.Call)}
    whole |= {id(node.left) for node in ast.walk(scope.node) if isinstance(node, ast.Compare)}  # e.g. with None
    for node in ast.walk(scope.node):
        value = scope.value(node) if isinstance(node, ast.Attribute) else None
        if isinstance(value, nn.Module):
            yield value
            if isinstance(value, nn.Sequential) and id(node) not in whole:
                yield from value


def _in_method(
    scope: Scope, owner: nn.Module, calls: Mapping[tuple[tuple[int, int], tuple[int, int]], Call]
) -> Iterator[Chain]:
    """Yield the chains of one method; `calls` of it are exchanged, and may be the activation."""
    fused: set[int] = set()
    steps = [step for block in blocks_of(scope.node.body) for step in _steps(block)]
    # Those with an activation first: a norm that is a part of one is not fused again without.
    for with_activation in (True, False):
        for call, before in steps:
            activation = _activation(call, scope, calls) if with_activation else None
            if with_activation:
                inner = None if activation is None else _argument(call, before, scope)
            else:
                inner = None if id(call) in fused else (call, before)
            product = None if inner is None else _argument(*inner, scope)
            if inner is None or product is None:
                continue
            chain = _chain(scope.value(product[0].func), scope.value(inner[0].func), activation, owner)
            if chain is not None:
                fused.add(id(inner[0]))
                yield chain


def _activation(
    call: ast.Call, scope: Scope, calls: Mapping[tuple[tuple[int, int], tuple[int, int]], Call]
) -> nn.Module | Call | None:
    """Return the activation that a call is: a module's, or a function that another mod has put there."""
    called = scope.value(call.func)
    if isinstance(called, nn.Module):
        return called if type(called) in _MODULES else None
    place = (call.lineno, call.col_offset), (call.end_lineno or 0, call.end_col_offset or 0)
    found = calls.get(place)
    return found if found is not None and found.form == "call" and found.stand_in in _CALLS else None


Step = tuple[ast.Call, list[ast.stmt]]  # a call, and the statements of its block up to its own, the last of them


def _steps(block: list[ast.stmt]) -> Iterator[Step]:
    for index, statement in enumerate(block):
        if blocks_of([statement])[1:]:
            continue  # its own blocks come by themselves
        for node in ast.walk(statement):
            if isinstance(node, ast.Call):
                yield node, block[: index + 1]


def _argument(call: ast.Call, before: list[ast.stmt], scope: Scope) -> Step | None:
    """Return the call whose result is the only argument of this one and is used nowhere else."""
    if len(call.args) != 1 or call.keywords:
        return None
    argument = call.args[0]
    if isinstance(argument, ast.Call):
        return argument, before
    if not isinstance(argument, ast.Name) or len(before) < 2:
        return None
    current, previous = before[-1], before[-2]
    assigned = _assigned(previous)
    if assigned is None or assigned[0] != argument.id or not isinstance(assigned[1], ast.Call):
        return None
    overwritten = _assigned(current)
    reads = sum(isinstance(node, ast.Name) and node.id == argument.id for node in ast.walk(current))
    dead = overwritten is not None and overwritten[0] == argument.id and reads == 2  # written once, read once
    return (assigned[1], before[:-1]) if dead or scope.loads[argument.id] == 1 else None


def _assigned(statement: ast.stmt) -> tuple[str, ast.expr] | None:
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1 and isinstance(statement.targets[0], ast.Name):
        return statement.targets[0].id, statement.value
    return None
