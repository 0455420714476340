"""Function calls in the forward of a module, exchanged for others: what a replaced submodule cannot reach.

`F.silu(x)`, or `x * torch.sigmoid(x)`, in a method of the user's is found in its source, and the method is compiled
again with another call in that place and nothing else changed. The module gets a class of its own, made from the one it
has, with this method in it. So parameters, submodules, hooks, `state_dict` keys, the training flag and control flow
that depends on data are as they were, `torch.compile` sees a plain method, and the way back is the class it had.

What is refused, with the name of the module: a call in a function whose source is not there or is not what runs (typed
into a shell, made by `exec`), and one that a subclass reaches through `super()`.
"""

import ast
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any, Final, Literal, cast

from torch import nn

from loka.errors import ModError
from loka.made_classes import make_class
from loka.mods.claims import CLASS_SLOT, Claim, listing
from loka.mods.source.functional import loaded
from loka.mods.source.methods import BASE, methods_of, written_as
from loka.mods.source.scope import Known, Scope, names_in
from loka.mods.source.sources import definition, redefined, with_function

# call: the function that is called is exchanged. method: x.relu() becomes f(x). product: x * sigmoid(x) becomes f(x).
Form = Literal["call", "method", "product"]
_SITES: Final = "_loka_calls"  # in a class made here: what was exchanged


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One call in a method, where it is written, and the function of `stand_ins` that stands in for it."""

    method: str
    start: tuple[int, int]  # line and column
    end: tuple[int, int]
    form: Form
    stand_in: str
    words: str
    options: tuple[tuple[str, int], ...] = ()  # keyword arguments beside those that are written there
    dropped: tuple[str, ...] = ()  # parameters of the module that only this call read

    @property
    def place(self) -> tuple[object, ...]:
        """Where it is."""
        return self.method, self.start, self.end


class Pattern(ABC):
    """What to look for in a method, and what to put there."""

    __slots__ = ()

    @abstractmethod
    def uses(self, value: object) -> bool:
        """Whether an object that a method uses is a function to exchange."""

    @abstractmethod
    def hinted(self, module: nn.Module, names: frozenset[str]) -> bool:
        """Whether a method of this module that names these may hold such a call in another form."""

    @abstractmethod
    def match(self, node: ast.expr | ast.AugAssign, scope: Scope, known: Known) -> "Match | None":
        """Return what to exchange at this expression."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Match:
    """An expression to exchange, which may be a part of the one that was looked at."""

    node: ast.expr
    form: Form
    stand_in: str
    words: str
    options: tuple[tuple[str, int], ...] = ()
    dropped: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rewrite:
    """Builds the class of a module: its own, with these calls exchanged."""

    base: type[nn.Module]
    calls: tuple[Call, ...]

    def __call__(self) -> type[nn.Module]:
        """Return the class."""
        made: type[nn.Module] = rewritten(cast(Any, self.base), self.calls)
        return made


def calls_in(module: nn.Module, pattern: Pattern) -> tuple[tuple[Call, ...], str]:
    """Return the calls in the methods of a module that a pattern finds and that are not exchanged yet, and a refusal.

    The refusal says, where it is not empty, why a method that has such a call cannot be made anew.
    """
    found: list[Call] = []
    refusal = ""
    done = {call.place for call in exchanged(module)}
    for name, (hidden, function, bound) in methods_of(written_as(module)).items():
        certain = any(pattern.uses(value) for value in loaded(function))
        if not certain and not pattern.hinted(module, names_in(function)):
            continue
        defined = definition(function)
        if defined is None or (not hidden and _member(written_as(module), name, function, function) is None):
            refusal = refusal or (_no_source(module, name) if certain else "")
            continue
        scope = Scope(defined, module, bound=bound)
        matches = {id(match.node): match for match in _matches(pattern, scope)}
        kept = [match for place, match in matches.items() if place not in scope.settled]
        calls = [call for match in kept if (call := _call(name, match)).place not in done]
        if calls and hidden:
            refusal = refusal or (
                f"{calls[0].words} is called in {function.__qualname__}, which {type(module).__name__} overrides and "
                "can reach through super() only. Call a module there, or leave this one out with filter_fn."
            )
        found += [] if hidden else calls
    return tuple(found), refusal


def _matches(pattern: Pattern, scope: Scope) -> Iterator[Match]:
    for node, known in scope.expressions():
        match = pattern.match(node, scope, known)
        if match is not None:
            yield match


def _call(method: str, match: Match) -> Call:
    return Call(
        method=method,
        start=(match.node.lineno, match.node.col_offset),
        end=(match.node.end_lineno or 0, match.node.end_col_offset or 0),
        form=match.form,
        stand_in=match.stand_in,
        words=match.words,
        options=match.options,
        dropped=match.dropped,
    )


def _no_source(module: nn.Module, method: str) -> str:
    return (
        f"{type(module).__name__}.{method} calls what is to be replaced, and its source is not there to be rewritten, "
        "is not what runs, or is hidden by a decorator. Keep the class in a file, call a module there, or leave this "
        "one out with filter_fn."
    )


def call_claim(mod: str, fqn: str, module: nn.Module, calls: tuple[Call, ...], refusal: str) -> Claim:
    """Return the claim on the class of a module whose calls are to be exchanged."""
    reason = ", ".join(dict.fromkeys(f"{call.words} becomes {call.stand_in} in line {call.start[0]}" for call in calls))
    return Claim(
        mod=mod,
        fqn=fqn,
        module=module,
        slot=CLASS_SLOT,
        build=Rewrite(written_as(module), (*exchanged(module), *calls)),
        reason=reason or refusal,
        refusal=refusal,
    )


def merged(claims: Sequence[Claim]) -> list[Claim]:
    """Join the claims of several mods on the calls of one module, as long as no two want the same call.

    Raises ModError where `filter_fn` has let pass only some of the claims that make sense together only.
    """
    names = {claim.name for claim in claims}
    for claim in claims:
        missing = [name for name in getattr(claim.build, "together", ()) if name not in names]
        if missing:
            raise ModError(
                f"{claim.mod} cannot rewrite {claim.name!r} without {listing(missing)}, which filter_fn refused. Let "
                "all of them pass or none. Nothing was changed."
            )
    joined: dict[tuple[int, str], Claim] = {}
    rest: list[Claim] = []
    for claim in claims:
        key = (id(claim.module), claim.slot)
        other = joined.get(key)
        if other is None or claim.slot != CLASS_SLOT:
            if claim.slot == CLASS_SLOT:
                joined[key] = claim
            rest.append(claim)
            continue
        one = _joined(other, claim)
        if one is None:
            rest.append(claim)
        else:
            joined[key] = one
            rest = [one if each is other else each for each in rest]
    return rest


def _joined(first: Claim, second: Claim) -> Claim | None:
    one, other = first.build, second.build
    if not isinstance(one, Rewrite) or not isinstance(other, Rewrite):
        return None
    before = {call.place for call in exchanged(first.module)}
    new = [call for call in other.calls if call.place not in before]
    if {call.place for call in one.calls} & {call.place for call in new}:
        return None
    return Claim(
        mod=f"{first.mod} and {second.mod}",
        fqn=first.fqn,
        module=first.module,
        slot=CLASS_SLOT,
        build=Rewrite(one.base, (*one.calls, *new)),
        reason=f"{first.reason}; {second.reason}",
    )


def exchanged(module: nn.Module) -> tuple[Call, ...]:
    """Return the calls of a module that are exchanged already."""
    calls: tuple[Call, ...] = getattr(type(module), _SITES, ())
    return calls


# --- the class ---


@functools.cache
def rewritten(base: Any, calls: tuple[Call, ...]) -> Any:
    """Return the class that a module of class `base` becomes: `base` with these calls exchanged."""
    members: dict[str, object] = {}
    for name, (hidden, function, _) in methods_of(base).items():
        own = [call for call in calls if call.method == name]
        if own and not hidden:
            members[name] = _exchange(base, name, function, own)

    words = dict.fromkeys(f"{call.stand_in} for {call.words}" for call in calls)
    about = {
        "__prepare_scriptable__": _refuse_script,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_loka_words": f"{base.__name__} with {', '.join(words)}",
        BASE: base,
        _SITES: calls,
    }
    return make_class(base.__name__, base, {**about, **members}, rewritten, base, calls)


def _refuse_script(self: nn.Module) -> None:
    """TorchScript compiles the text of a method, and would find the old one."""
    raise ModError(
        f"{type(self).__name__} has calls that loka.mods has exchanged, which torch.jit.script does not see. Use "
        "torch.compile, torch.export or torch.jit.trace, or undo the mods first."
    )


def _exchange(base: type, name: str, function: FunctionType, calls: Sequence[Call]) -> object:
    found = definition(function)
    new = None if found is None else redefined(found, functools.partial(_change, calls=calls))
    whole = None if new is None else _member(base, name, function, new)
    assert whole is not None, f"{base.__name__}.{name} was looked into before"
    return whole


def _member(base: type, name: str, old: FunctionType, new: FunctionType) -> object | None:
    """Return what a class has under a name, with `new` in place of `old`, None where that cannot be told apart."""
    return with_function(next(vars(each)[name] for each in base.__mro__ if name in vars(each)), old, new)


def _change(node: ast.FunctionDef, calls: Sequence[Call]) -> None:
    """Exchange the calls in a function, and import what they go to at its beginning."""
    _Exchanger(calls).visit(node)
    names = sorted({call.stand_in for call in calls})
    line = ast.ImportFrom(
        module="loka.mods.source.stand_ins",
        names=[ast.alias(name=name, asname=_alias(name)) for name in names],
        level=0,
    )
    node.body.insert(1 if ast.get_docstring(node) is not None else 0, ast.copy_location(line, node.body[0]))


def _alias(name: str) -> str:
    return f"_loka_{name}"


class _Exchanger(ast.NodeTransformer):
    def __init__(self, calls: Iterable[Call]) -> None:
        self._calls = {(call.start, call.end): call for call in calls}

    def generic_visit(self, node: ast.AST) -> ast.AST:
        visited = super().generic_visit(node)
        if not isinstance(visited, ast.expr):
            return visited
        start, end = (visited.lineno, visited.col_offset), (visited.end_lineno or 0, visited.end_col_offset or 0)
        call = self._calls.get((start, end))
        return visited if call is None else ast.copy_location(_FORMS[call.form](visited, call), visited)


def _as_call(node: ast.expr, call: Call) -> ast.expr:
    assert isinstance(node, ast.Call)
    extra = [ast.keyword(arg=name, value=ast.Constant(value)) for name, value in call.options]
    return ast.Call(func=_name(call), args=node.args, keywords=[*node.keywords, *extra])


def _as_method(node: ast.expr, call: Call) -> ast.expr:
    assert isinstance(node, ast.Call)
    assert isinstance(node.func, ast.Attribute)
    return ast.Call(func=_name(call), args=[node.func.value, *node.args], keywords=node.keywords)


def _as_product(node: ast.expr, call: Call) -> ast.expr:
    assert isinstance(node, ast.BinOp)
    operand = node.right if isinstance(node.left, ast.Call) else node.left
    return ast.Call(func=_name(call), args=[operand], keywords=[])


def _name(call: Call) -> ast.Name:
    return ast.Name(id=_alias(call.stand_in), ctx=ast.Load())


_FORMS: Final[Mapping[Form, Callable[[ast.expr, Call], ast.expr]]] = {
    "call": _as_call,
    "method": _as_method,
    "product": _as_product,
}
