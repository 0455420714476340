"""The call of the root module as a scope: what stands in front of `model(...)` while a probe watches."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Self

import torch
from torch import nn

from loka.calls import Call

# The scope of one call; what it yields is shown the output.
Around = Callable[[], AbstractContextManager[Callable[[Any], None]]]


class RootCall(Call):
    """Runs every call of a module inside a scope of its own, until detached."""

    def __init__(self, module: nn.Module, around: Around) -> None:
        super().__init__(module)
        self.running = False
        self._around = around

    def entry(self) -> Self:
        """Return what is called instead of the module: this, which no copy takes along."""
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module. A call inside a call, or one that is being traced or recorded, passes through."""
        inner = self._inner
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


def _is_recorded() -> bool:
    """Whether what runs now is recorded for later, where reading a value would be part of it or an error."""
    if torch._C._get_tracing_state() is not None:
        return True
    initialized = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch does not annotate it
    return bool(initialized and torch.cuda.is_current_stream_capturing())
