"""Calls of functions that a module replacement cannot reach, found in the bytecode of the model's classes.

`self.act(x)` calls a module that can be replaced; `F.silu(x)` in a `forward` cannot. Finding the latter lets a mod say
what it leaves untouched. A name is followed from the function's globals to the object, so `self.silu(x)` is not taken
for a call of `F.silu`.
"""

import dis
import inspect
from collections.abc import Collection, Iterator
from types import CodeType, FunctionType, ModuleType

from torch import nn

from loka.mods.claims import walk


def callers(model: nn.Module, functions: Collection[object]) -> tuple[str, ...]:
    """Return e.g. `'mlp' (class MLP)` for each module whose own code, or a plain attribute of it, uses a function."""
    verdicts: dict[type, bool] = {}
    found: list[str] = []
    for fqn, module in walk(model):
        kind = type(module)
        if kind not in verdicts:
            verdicts[kind] = any(_uses(method, functions) for method in _methods(kind))
        held = any(value is function for value in vars(module).values() for function in functions)
        if verdicts[kind] or held:
            found.append(f"{fqn!r} (class {kind.__name__})" if fqn else f"the model (class {kind.__name__})")
    return tuple(dict.fromkeys(found))


def _methods(kind: type) -> Iterator[FunctionType]:
    """Yield the methods of the user's classes; torch's own modules call functions by definition."""
    for base in kind.__mro__:
        if base is nn.Module or base.__module__.startswith("torch.nn."):
            return
        for name, member in vars(base).items():
            method = inspect.unwrap(getattr(member, "__func__", member))
            if isinstance(method, FunctionType) and not name.startswith("__"):
                yield method


def _uses(method: FunctionType, functions: Collection[object]) -> bool:
    return any(
        value is function
        for code in _codes(method.__code__)
        for value in _loaded(code, method.__globals__)
        for function in functions
    )


def _codes(code: CodeType) -> Iterator[CodeType]:
    """Yield the code of a function and of the lambdas and functions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _loaded(code: CodeType, names: dict[str, object]) -> Iterator[object]:
    """Yield each object that the code reaches from a global through attributes of Python modules."""
    value: object = None
    for instruction in dis.get_instructions(code):
        if instruction.opname == "LOAD_GLOBAL":
            value = names.get(instruction.argval)
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD") and isinstance(value, ModuleType):
            value = getattr(value, instruction.argval, None)
        else:
            value = None
        if value is not None:
            yield value
