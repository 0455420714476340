"""What a program that torch.export records returns in the place of a result that is handed on: its numbers.

Operators are recorded one by one, and a tensor is known by the one that made it. What is handed on was made by none of
them: where it leaves the program, its numbers are computed there. Of one that only the next layer reads nothing is
recorded.
"""

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor

from loka.torch_release import is_exporting


def recorder() -> Any:
    """Return what records operators for torch.export at the moment, None where nothing does."""
    if not is_exporting():
        return None
    from torch.fx.experimental.proxy_tensor import get_proxy_mode  # loaded where something is exported, and costly

    mode = get_proxy_mode()
    return None if mode is None else mode.tracer


class _Leaving:
    """A tensor as its recorder keeps it, by a node: that of its numbers, once somebody asks for it."""

    def __init__(self, tensor: Tensor, numbers: Callable[[Any], Tensor], tracer: Any) -> None:
        self._tensor, self._numbers, self._tracer = weakref.ref(tensor), numbers, tracer

    @property
    def proxy(self) -> Any:
        """The node."""
        return self._tracer.tensor_tracker[self._numbers(self._tensor())].proxy


def leaves_as(tensor: Tensor, numbers: Callable[[Any], Tensor]) -> None:
    """Have a program that is being recorded, and returns a tensor, return its numbers."""
    tracer = recorder()
    if tracer is not None:
        tracer.tensor_tracker[tensor] = _Leaving(tensor, numbers, tracer)
