"""What stands in front of a module's own call, and what else may stand there.

`nn.Module.__call__` hands over to `_compiled_call_impl` where an instance has one; `module.compile()` puts its compiled
call there. Whoever watches a module can put itself there too. Unlike a pair of hooks that is one scope, left on
KeyboardInterrupt too, and the module stays on the short way through `nn.Module.__call__`; deepcopy and pickle leave it
behind; compiled code holds no guard on it, so nothing is compiled again because of it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Final

import torch
from torch import nn

_SLOT: Final[str] = "_compiled_call_impl"
_MARK: Final[str] = "_loka_call"  # of functions that stand for one
_EMPTY: Final = object()  # the instance had no such attribute


class Call(ABC):
    """Stands in front of a module's call, until detached; several stand in front of one another.

    `entry` is what is called instead of the module: the subclass itself, or a function, marked as its own, which is
    faster, but goes along in copies of the module where `copies_leave_it` does not hold.
    """

    __slots__ = ("_attached", "_before", "_inner", "_module")

    hidden: ClassVar[bool] = False  # whether a model that it stands before is to be converted as if it were not there

    def __init__(self, module: nn.Module) -> None:
        self._attached = True
        self._module = module
        self._before = module.__dict__.get(_SLOT, _EMPTY)  # what stood there
        is_own = self._before is _EMPTY or self._before is None
        self._inner: Callable[..., Any] = module._call_impl if is_own else self._before
        module.__dict__[_SLOT] = self.entry()

    @abstractmethod
    def entry(self) -> Callable[..., Any]:
        """Return what is called instead of the module."""

    def __deepcopy__(self, memo: Any) -> None:
        """Leave nothing in copies of the module: a wrapper's own way of copying may take this along."""
        return None  # said, since this class is abstract

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    @property
    def is_in_place(self) -> bool:
        """Whether calls still come by; `module.compile()` inside the block displaces it."""
        found = _call_of(self._module.__dict__.get(_SLOT))
        while found is not None and found is not self:
            found = _call_of(found._before)
        return found is self

    def detach(self) -> None:
        """Give the module its own call back."""
        self._attached = False
        found = _call_of(self._module.__dict__.get(_SLOT))
        while found is not None and not found._attached:
            if found._before is _EMPTY:
                del self._module.__dict__[_SLOT]
            else:
                self._module.__dict__[_SLOT] = found._before
            found = _call_of(found._before)


def mark(entry: Callable[..., Any], call: Call) -> Callable[..., Any]:
    """Have a function stand for a call."""
    entry.__dict__[_MARK] = call
    return entry


def _call_of(found: Any) -> Call | None:
    """Return whose entry this is, None where it is no call's."""
    call = found if isinstance(found, Call) else getattr(found, "__dict__", {}).get(_MARK)
    return call if isinstance(call, Call) else None


def copies_leave_it(module: nn.Module) -> bool:
    """Whether copies of a module, and what is pickled of it, are without its entry, as is the rule."""
    kind = type(module)
    usual = kind.__getstate__ is nn.Module.__getstate__ and kind.__reduce_ex__ is object.__reduce_ex__
    return usual and kind.__reduce__ is object.__reduce__ and not hasattr(module, "__deepcopy__")


def is_compiled(module: nn.Module) -> bool:
    """Whether the call of a module is no longer its own, apart from those who only watch it and may be passed over."""
    found = module.__dict__.get(_SLOT)
    while (call := _call_of(found)) is not None and call.hidden:
        found = call._before
    return found is not None and found is not _EMPTY


def is_watched(module: nn.Module) -> bool:
    """Whether a probe or a monitor stands in front of a module's call, for as long as its block lasts."""
    call = _call_of(module.__dict__.get(_SLOT))
    while call is not None and call.hidden:
        call = _call_of(call._before)
    return call is not None


def forward_of(module: nn.Module) -> Any:
    """Return the function that a module's class has for its forward; None of TorchScript, which has none in Python."""
    return getattr(type(module), "forward", None)


def is_scripted(module: nn.Module) -> bool:
    """Whether what a module runs is TorchScript, which nothing in Python can take the place of."""
    return isinstance(module, torch.jit.ScriptModule)
