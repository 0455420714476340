"""The source of a function as a syntax tree, and the function made anew from a changed one.

Only a tree that compiles to the very code the function runs is given out: source that was edited since it was imported,
or generated, is no source. The changed function keeps the globals, defaults and closure of the one it is made from, and
the line numbers, so that a traceback points into the user's file.
"""

import ast
import functools
import linecache
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CellType, CodeType, FunctionType


@dataclass(frozen=True, kw_only=True, slots=True)
class Definition:
    """A function and where its source defines it: the node belongs to a tree that others read too."""

    function: FunctionType
    text: str  # of the whole file
    node: ast.FunctionDef


@functools.lru_cache(maxsize=1024)
def definition(function: FunctionType) -> Definition | None:
    """Return the definition of a function, or None where its source is not there or not what it runs."""
    text = _text(function)
    tree, codes = _parsed(text, function.__code__.co_filename)
    if not text or function.__code__ not in codes.get(_place(function.__code__), ()):
        return None
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and _defines(node, function)]
    return Definition(function=function, text=text, node=nodes[0]) if len(nodes) == 1 else None


def redefined(found: Definition, change: Callable[[ast.FunctionDef], None]) -> FunctionType | None:
    """Return the function with its node changed in place by `change`, or None where that is not a function any more."""
    function = found.function
    tree = ast.parse(found.text)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and _defines(node, function):
            change(node)
    ast.fix_missing_locations(tree)
    old = function.__code__
    made = compile(tree, old.co_filename, "exec", dont_inherit=True)
    code = next((code for code in codes_in(made) if _place(code) == _place(old)), None)
    cells = dict(zip(old.co_freevars, function.__closure__ or (), strict=True))
    if code is None or not set(code.co_freevars) <= cells.keys():
        return None
    closure = tuple(cells[name] for name in code.co_freevars)
    return _like(function, code, closure)


def with_function(member: object, old: FunctionType, new: FunctionType) -> object | None:
    """Return a member of a class, a function or one that decorators wrap, with `new` inside instead of `old`."""
    if member is old:
        return new
    if isinstance(member, staticmethod | classmethod):
        inner = with_function(member.__func__, old, new)
        return None if inner is None else type(member)(inner)  # type: ignore[arg-type]
    if not isinstance(member, FunctionType):
        return None
    cells: list[CellType] = []
    changed = False
    for cell in member.__closure__ or ():
        held = _content(cell)
        inner = with_function(held, old, new) if isinstance(held, FunctionType) else None
        cells.append(cell if inner is None else CellType(inner))
        changed = changed or inner is not None
    if not changed:
        return None
    copy = _like(member, member.__code__, tuple(cells))
    if vars(copy).get("__wrapped__") is old:
        vars(copy)["__wrapped__"] = new
    return copy


def _like(function: FunctionType, code: CodeType, closure: tuple[CellType, ...]) -> FunctionType:
    copy = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__qualname__, copy.__doc__, copy.__module__ = function.__qualname__, function.__doc__, function.__module__
    copy.__annotations__ = dict(function.__annotations__)
    vars(copy).update(vars(function))
    return copy


def _content(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _text(function: FunctionType) -> str:
    return "".join(linecache.getlines(function.__code__.co_filename, function.__globals__))


@functools.lru_cache(maxsize=16)
def _parsed(text: str, filename: str) -> tuple[ast.Module, dict[tuple[str, int], list[CodeType]]]:
    """Return the tree of a file and the code of its functions by name and first line; both empty if it is no Python."""
    try:
        tree = ast.parse(text)
        made = compile(tree, filename, "exec", dont_inherit=True)
    except (SyntaxError, ValueError):  # a cell with magic commands, a file with null bytes
        return ast.Module(body=[], type_ignores=[]), {}
    codes: dict[tuple[str, int], list[CodeType]] = {}
    for code in codes_in(made):
        codes.setdefault(_place(code), []).append(code)
    return tree, codes


def codes_in(code: CodeType) -> Iterator[CodeType]:
    """Yield the code of a function or file and of the functions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes_in(constant)


def _place(code: CodeType) -> tuple[str, int]:
    return code.co_qualname, code.co_firstlineno


def _defines(node: ast.FunctionDef, function: FunctionType) -> bool:
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return node.name == function.__code__.co_name and first == function.__code__.co_firstlineno
