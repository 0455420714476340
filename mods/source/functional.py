"""Functions that a method uses, read from its bytecode: the quick look before its source is read.

A name is followed from the function's globals to the object, so `self.silu(x)` is not taken for a call of `F.silu`.
"""

import dis
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType

from loka.mods.source.sources import codes_in


def attribute_of(module: ModuleType, name: str) -> object:
    """Return what a Python module has under a name, None where that is nothing or cannot be had."""
    try:
        return getattr(module, name, None)
    except Exception:  # noqa: BLE001 - a lazy module may import what is not installed, and that may raise anything
        return None


def loaded(method: FunctionType) -> Iterator[object]:
    """Yield each object that a method reaches from a global or a closure, through attributes of Python modules."""
    for cell in method.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not filled yet
            continue
    for code in codes_in(method.__code__):
        yield from _loaded(code, method.__globals__)


def _loaded(code: CodeType, names: dict[str, object]) -> Iterator[object]:
    value: object = None
    for instruction in dis.get_instructions(code):
        if instruction.opname == "LOAD_GLOBAL":
            value = names.get(instruction.argval)
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD") and isinstance(value, ModuleType):
            value = attribute_of(value, instruction.argval)
        else:
            value = None
        if value is not None:
            yield value
