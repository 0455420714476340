"""What an expression in a method stands for: read from its syntax tree, without running anything.

`F.silu` is followed from the globals of the function to the object, `self.act` through the instance to the submodule.
A local variable stands for the expression it was last assigned, as long as nothing in between binds a name in that
expression anew, on any path.
"""

import ast
import builtins
import inspect
from collections import Counter
from collections.abc import Iterator, Mapping
from types import FunctionType, ModuleType
from typing import Final

from torch import nn

from loka.mods.source.functional import attribute_of
from loka.mods.source.sources import Definition, codes_in

UNKNOWN: Final = object()
_PURE: Final = (ast.Name, ast.Attribute, ast.Subscript, ast.Constant, ast.Slice, ast.Tuple, ast.UnaryOp)
_OWN_NAMES: Final = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_NAMED: Final = (
    *(ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef),
    *(ast.ExceptHandler, ast.MatchAs, ast.MatchStar),
)
Known = Mapping[str, ast.expr]  # local variable -> the expression it holds


class Scope:
    """The names that one method of one module sees."""

    def __init__(self, found: Definition, module: nn.Module, *, bound: bool) -> None:
        self.node = found.node
        self._module = module
        self._function = found.function
        arguments = [node.arg for node in ast.walk(found.node) if isinstance(node, ast.arg)]
        names = [node for node in ast.walk(found.node) if isinstance(node, ast.Name)]
        stored = {name.id for name in names if not isinstance(name.ctx, ast.Load)}
        self.loads = Counter(name.id for name in names if isinstance(name.ctx, ast.Load))
        own = found.node.args.posonlyargs + found.node.args.args
        first = own[0].arg if bound and own else ""
        self.self_name = first if first not in stored and arguments.count(first) == 1 else ""
        self.settled: set[int] = set()  # expressions, by id, that are what is looked for and stay as they are
        self._local = {*arguments, *stored, *_bound_otherwise(found.node)}

    def value(self, node: ast.expr) -> object:
        """Return the object that a name or a chain of attributes leads to, or UNKNOWN."""
        if isinstance(node, ast.Name):
            if node.id == self.self_name:
                return self._module
            return UNKNOWN if node.id in self._local else _global(self._function, node.id)
        if not isinstance(node, ast.Attribute):
            return UNKNOWN
        owner = self.value(node.value)
        if isinstance(owner, nn.Module):
            return _attribute(owner, node.attr)
        found = attribute_of(owner, node.attr) if isinstance(owner, ModuleType) else None
        return UNKNOWN if found is None else found

    def is_tensor(self, node: ast.expr) -> bool:
        """Whether a method called on this expression is one of a tensor, as far as can be told: it is nothing known."""
        return self.value(node) is UNKNOWN and not (isinstance(node, ast.Name) and node.id == self.self_name)

    def expressions(self) -> Iterator[tuple[ast.expr | ast.AugAssign, Known]]:
        """Yield each expression of the method, and what local variables hold there."""
        yield from _of_block(self.node.body, {})


def same(left: ast.expr, right: ast.expr) -> bool:
    """Whether two expressions are the same value: written alike, of names, attributes and constant indices alone."""
    parts = [node for node in ast.walk(left) if isinstance(node, ast.expr)]
    return all(isinstance(part, _PURE) for part in parts) and _written(left) == _written(right)


def resolved(node: ast.expr, known: Known) -> ast.expr:
    """Return what a local variable holds, any other expression as it is."""
    return known.get(node.id, node) if isinstance(node, ast.Name) else node


def blocks_of(body: list[ast.stmt]) -> list[list[ast.stmt]]:
    """Return a list of statements and all such lists inside them."""
    return [body, *(inner for statement in body for block in _blocks(statement) for inner in blocks_of(block))]


def names_in(function: FunctionType) -> frozenset[str]:
    """Return every global, attribute and free variable that the bytecode of a function names, nested ones included."""
    return frozenset(name for code in codes_in(function.__code__) for name in (*code.co_names, *code.co_freevars))


def _written(node: ast.expr) -> str:
    """Return a text that is the same for a variable that is read and one that is written."""
    return ast.dump(node).replace("Store()", "Load()")


def _bound_otherwise(outer: ast.AST) -> Iterator[str]:
    """Yield names that imports, definitions and patterns inside a function or block bind."""
    for node in ast.walk(outer):
        if isinstance(node, ast.alias):
            yield (node.asname or node.name).split(".")[0]
        elif isinstance(node, _NAMED) and node is not outer and node.name:
            yield node.name


def _global(function: FunctionType, name: str) -> object:
    code = function.__code__
    if name in code.co_freevars:
        cell = (function.__closure__ or ())[code.co_freevars.index(name)]
        try:
            return cell.cell_contents
        except ValueError:  # not filled yet
            return UNKNOWN
    return function.__globals__.get(name, getattr(builtins, name, UNKNOWN))


def _attribute(module: nn.Module, name: str) -> object:
    """Look an attribute up without running a property."""
    for table in (vars(module), module._parameters, module._buffers, module._modules):
        if name in table:
            value: object = table[name]
            return value
    found = inspect.getattr_static(type(module), name, UNKNOWN)
    return UNKNOWN if isinstance(found, property) else found


def _of_block(body: list[ast.stmt], outer: Known) -> Iterator[tuple[ast.expr | ast.AugAssign, Known]]:
    known = dict(outer)
    for statement in body:
        bound = _binds(statement)
        blocks = _blocks(statement)
        if blocks:
            inside = {} if isinstance(statement, ast.FunctionDef | ast.ClassDef) else _without(known, bound)
            for child in ast.iter_child_nodes(statement):
                if isinstance(child, ast.expr | ast.withitem):
                    yield from _within(child, inside)
            for block in blocks:
                yield from _of_block(block, inside)
        else:
            yield from _within(statement, known)
        known = _without(known, bound)
        if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            target = statement.targets[0]
            if isinstance(target, ast.Name) and target.id not in _names(statement.value):
                known[target.id] = statement.value


def _within(node: ast.AST, known: Known) -> Iterator[tuple[ast.expr | ast.AugAssign, Known]]:
    if isinstance(node, ast.expr | ast.AugAssign):
        yield node, known
    inside: Known = {} if isinstance(node, _OWN_NAMES) else known
    for child in ast.iter_child_nodes(node):
        yield from _within(child, inside)


def _blocks(statement: ast.stmt) -> list[list[ast.stmt]]:
    """Return the lists of statements inside a compound statement."""
    found: list[list[ast.stmt]] = []
    for node in (statement, *ast.iter_child_nodes(statement)):
        if node is not statement and not isinstance(node, ast.ExceptHandler | ast.match_case):
            continue
        for name in ("body", "orelse", "finalbody"):
            value = getattr(node, name, None)
            if isinstance(value, list) and value:
                found.append(value)
    return found


def _binds(statement: ast.stmt) -> set[str]:
    stores = {
        node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)
    }
    return stores | set(_bound_otherwise(ast.Module(body=[statement], type_ignores=[])))


def _names(node: ast.expr) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def _without(known: Known, bound: set[str]) -> dict[str, ast.expr]:
    return {name: value for name, value in known.items() if name not in bound and not bound & _names(value)}
