"""The call of the root module as a scope: what stands in front of `model(...)` while a probe watches.

`nn.Module.__call__` hands over to `_compiled_call_impl` where an instance has one; `module.compile()` puts its compiled
call there. A probe puts itself there. Unlike a pair of hooks that is one scope, left on KeyboardInterrupt too; deepcopy
and pickle leave it behind; compiled code holds no guard on it, so nothing is compiled again because of it.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Final

import torch
from torch import nn

_SLOT: Final[str] = "_compiled_call_impl"


# The scope of one call; what it yields is shown the output.
Around = Callable[[], AbstractContextManager[Callable[[Any], None]]]


class RootCall:
    """Runs every call of a module inside a scope of its own, until detached."""

    def __init__(self, module: nn.Module, around: Around) -> None:
        self.running = False
        self._module = module
        self._around = around
        self._attached = True
        self._inner = module.__dict__.get(_SLOT)
        module.__dict__[_SLOT] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module. A call inside a call, or one that is being traced or recorded, passes through."""
        inner = self._inner or self._module._call_impl
        if torch.compiler.is_compiling() or not self._attached or self.running or _is_recorded():
            return inner(*args, **kwargs)
        self.running = True
        try:
            with self._around() as returned:
                output = inner(*args, **kwargs)
                returned(output)
                return output
        finally:
            self.running = False

    def __deepcopy__(self, memo: Any) -> None:
        """Leave nothing in copies of the module: a wrapper's own way of copying may take this along."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    @property
    def is_in_place(self) -> bool:
        """Whether calls still come by; `module.compile()` inside the block displaces it."""
        found = self._module.__dict__.get(_SLOT)
        while isinstance(found, RootCall) and found is not self:
            found = found._inner
        return found is self

    def detach(self) -> None:
        """Give the module its own call back."""
        self._attached = False
        found = self._module.__dict__.get(_SLOT)
        while isinstance(found, RootCall) and not found._attached:
            found = found._inner
            if found is None:
                del self._module.__dict__[_SLOT]
            else:
                self._module.__dict__[_SLOT] = found


def _is_recorded() -> bool:
    """Whether what runs now is recorded for later, where reading a value would be part of it or an error."""
    if torch._C._get_tracing_state() is not None:
        return True
    initialized = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch does not annotate it
    return bool(initialized and torch.cuda.is_current_stream_capturing())
