"""SwishNorm whose gate is held in one piece: `x * self.gate(x)`, the gate an nn.Sequential of norms and a sigmoid.

torchrec's `SwishLayerNorm` is written so. There the sigmoid is a module, and is exchanged as one; nothing else of the
method is touched.
"""

import ast
from collections import Counter
from collections.abc import Iterator

from torch import nn

from loka.mods.claims import walk
from loka.mods.source.methods import methods_of, written_as
from loka.mods.source.patterns import is_called_norm, products
from loka.mods.source.scope import Scope, resolved, same
from loka.mods.source.sources import definition


def gates_of(model: nn.Module, last: type[nn.Module]) -> dict[str, tuple[nn.Module, str]]:
    """Return the `last` modules of the gates of SwishNorms by FQN: the module, and how the gate is written.

    One that is registered elsewhere as well, where it gates nothing or something else, is left out.
    """
    found: dict[str, tuple[nn.Module, str]] = {}
    written: dict[int, dict[str, str]] = {}
    for fqn, module in walk(model):
        held = {key: child for key, child in module._modules.items() if _may_be_gate(child, last)}
        if held and id(module) not in written:
            written[id(module)] = dict(_gates_in(module, held))
        for key, words in written.get(id(module), {}).items():
            gate = held[key]
            assert isinstance(gate, nn.Sequential)
            name = ".".join(part for part in (fqn, key, next(reversed(gate._modules))) if part)
            found[name] = gate[-1], words
    places = Counter(id(module) for _, module in walk(model))
    gating = Counter(id(module) for module, _ in found.values())
    return {name: each for name, each in found.items() if places[id(each[0])] == gating[id(each[0])]}


def _may_be_gate(module: nn.Module | None, last: type[nn.Module]) -> bool:
    if type(module) is not nn.Sequential or not len(module) or type(module[-1]) is not last:
        return False
    return all(is_called_norm(each) for each in list(module)[:-1])


def _gates_in(module: nn.Module, held: dict[str, nn.Module | None]) -> Iterator[tuple[str, str]]:
    """Yield those children by key that the methods of a module call as gates of what they are given, and only so."""
    scopes: list[Scope] = []
    for _, function, bound in methods_of(written_as(module)).values():
        defined = definition(function)
        if defined is None:
            return
        scopes.append(Scope(defined, module, bound=bound))
    for key, child in held.items():
        uses = sum(
            scope.value(node) is child
            for scope in scopes
            for node in ast.walk(scope.node)
            if isinstance(node, ast.Attribute)
        )
        words = {node: text for scope in scopes for node, text in _products_with(child, scope)}
        if words and len(words) == uses:
            yield key, next(iter(words.values()))


def _products_with(child: nn.Module | None, scope: Scope) -> Iterator[tuple[ast.expr, str]]:
    """Yield each call of a child by which what it is given is multiplied, once, and how that is written."""
    for node, known in scope.expressions():
        for value, gate in products(node, scope):
            call = resolved(gate, known)
            if not isinstance(call, ast.Call) or call.keywords or len(call.args) != 1:
                continue
            read_again = isinstance(gate, ast.Name) and scope.loads[gate.id] != 1
            if scope.value(call.func) is child and same(value, call.args[0]) and not read_again:
                yield call, f"{ast.unparse(value)} * {ast.unparse(call)}"
