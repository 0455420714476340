"""Classes that are made while a program runs, and how copies and saved models find them again.

No name leads to such a class, so what is written down is the call that makes it; where one of its arguments is another
such class, that one's call in turn. A layer may be of a class that a mod has made, converted or frozen on top.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from torch import nn

_CALL: Final = "_loka_made_by"


@dataclass(frozen=True, slots=True)
class _Call:
    """The function, which has a name, and the arguments that a class was made by."""

    maker: Callable[..., Any]
    arguments: tuple[Any, ...]


def make_class(name: str, base: Any, members: dict[str, Any], maker: Callable[..., Any], *arguments: Any) -> Any:
    """Make a class of `base` with these members; `maker(*arguments)` is the call that this happens in, and is cached.

    Modules of the class can be copied and pickled. One made of a layer of torch.nn says that it is one, too: tracers
    (`torch.fx`) leave those whole.
    """

    def reduce(self: Any, protocol: Any) -> Any:
        make, given, *state = base.__reduce_ex__(self, protocol)
        if given and isinstance(given[0], type) and _CALL in vars(given[0]):
            make, given = _restore, (_call_of(given[0]),)
        return make, given, *state

    about = {"__reduce_ex__": reduce, _CALL: _Call(maker, arguments)}
    is_layer = base.__module__.startswith("torch.nn.") and not issubclass(base, nn.Sequential)
    home = {"__module__": base.__module__} if is_layer else {}
    return type(base)(name, (base,), {**about, **members, **home})


def made_in(kind: type) -> Iterator[str]:
    """Yield the names of the Python modules that have made a class, or one that it is of."""
    for each in kind.__mro__:
        if _CALL in vars(each):
            yield vars(each)[_CALL].maker.__module__


def _call_of(argument: Any) -> Any:
    """Return the call that makes a class, and anything else as it is."""
    call = vars(argument).get(_CALL) if isinstance(argument, type) else None
    return argument if call is None else _Call(call.maker, tuple(map(_call_of, call.arguments)))


def _value_of(argument: Any) -> Any:
    if not isinstance(argument, _Call):
        return argument
    return argument.maker(*map(_value_of, argument.arguments))


def _restore(call: _Call) -> Any:
    """Make an empty module of the class that a call makes."""
    kind = _value_of(call)
    return kind.__new__(kind)
