"""The methods of a module: those of the user's classes, as they were written, and what they read.

A class that `calls` has made stands for the one it was made from: its methods are those of the source.
"""

import ast
import inspect
from collections import Counter
from collections.abc import Iterable, Iterator
from types import FunctionType
from typing import Final

from torch import nn

from loka.mods.source.scope import Scope, names_in
from loka.mods.source.sources import definition

BASE: Final = "_loka_written_as"  # in a class made by `calls`: the class that it was made of


def written_as(module: nn.Module) -> type[nn.Module]:
    """Return the class that a module was written as, without exchanged calls."""
    base: type[nn.Module] = getattr(type(module), BASE, type(module))
    return base


def scopes(module: nn.Module) -> Iterator[tuple[str, Scope]]:
    """Yield the name of each method of a module and what it sees, as far as its source is there."""
    for name, (_, function, bound) in methods_of(written_as(module)).items():
        found = definition(function)
        if found is not None:
            yield name, Scope(found, module, bound=bound)


def parameters_read(model: nn.Module) -> dict[int, str]:
    """Return the submodules whose parameters the method of another module reads, by id, and where that is."""
    found: dict[int, str] = {}
    for module in model.modules():
        for name, scope in scopes(module) if module._modules else ():
            for node in ast.walk(scope.node):
                if not isinstance(node, ast.Attribute):
                    continue
                held = scope.value(node.value)
                if isinstance(held, nn.Module) and held is not module and node.attr in held._parameters:
                    where = f"its parameter {node.attr!r} is read in {type(module).__name__}.{name}"
                    found.setdefault(id(held), where)
    return found


def read_there_alone(module: nn.Module, names: Iterable[str]) -> list[str]:
    """Return those of these parameters that the methods of a module name no more often than they are given here."""
    reads: Counter[str] = Counter()
    for _, function, _ in methods_of(written_as(module)).values():
        found = definition(function)
        if found is None:
            return []
        reads.update(node.attr for node in ast.walk(found.node) if isinstance(node, ast.Attribute))
    gone = Counter(names)
    return [name for name, count in gone.items() if reads[name] == count]


def methods_of(kind: type) -> dict[str, tuple[bool, FunctionType, bool]]:
    """Return the methods of the user's classes by name: whether a subclass hides it, the function, whether it is bound.

    torch's own modules call functions by definition. A hidden method has its class in its name, and is there only if
    one that hides it calls super() or names its class.
    """
    found: dict[str, tuple[bool, FunctionType, bool]] = {}
    hiding: dict[str, set[str]] = {}  # method -> what the methods of this name so far refer to
    for base in kind.__mro__:
        if base is nn.Module or base.__module__.startswith("torch.nn."):
            for name in vars(base):
                hiding.setdefault(name, set())
            continue  # there may be a mixin of the user's behind it
        for name, member in vars(base).items():
            function = inspect.unwrap(getattr(member, "__func__", member))
            if not isinstance(function, FunctionType) or name.startswith("__"):
                continue
            hidden = name in hiding
            if not hidden or hiding[name] & {"super", base.__name__}:
                bound = not isinstance(member, staticmethod | classmethod)
                found[f"{base.__qualname__}.{name}" if hidden else name] = (hidden, function, bound)
            hiding.setdefault(name, set()).update(names_in(function))
    return found
