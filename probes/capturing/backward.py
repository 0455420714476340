"""A scope around backward: while any probe is attached, every run of the autograd engine passes through here.

`torch.autograd.backward` and `.grad`, under whatever name they were imported, and `Tensor.backward` all end in one
function of `torch.autograd`, looked up at every call; replacing it catches them, and leaves the public functions, which
compiled code may guard on, as they are. On steps that are not sampled the replacement only calls through. Pushing a
mode inside an autograd hook instead would not last: the engine restores thread state at every node.
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Final, Protocol

import torch

_ENGINE: Final[str] = "_engine_run_backward"
# _engine_run_backward(outputs, grad_outputs, keep_graph, create_graph, inputs, ...)
_CREATE_GRAPH: Final[int] = 3


class BackwardListener(Protocol):
    """Something that may want a scope around a run of backward."""

    def around_backward(self, roots: Sequence[Any], *, create_graph: bool) -> AbstractContextManager[None] | None:
        """Return the scope to run this backward from `roots` in, or None to let it pass."""


_listeners: list[BackwardListener] = []
_installed: list[Callable[..., Any]] = []


def listen(listener: BackwardListener) -> None:
    """Start offering every backward to this listener."""
    if not _installed:
        _installed.append(_offered(getattr(torch.autograd, _ENGINE)))
        setattr(torch.autograd, _ENGINE, _installed[0])
    _listeners.append(listener)


def stop_listening(listener: BackwardListener) -> None:
    """Stop; with the last listener the original function is back, unless something else has been put over ours."""
    if listener in _listeners:
        _listeners.remove(listener)
    if not _listeners and _installed and getattr(torch.autograd, _ENGINE) is _installed[0]:
        setattr(torch.autograd, _ENGINE, _installed.pop().__wrapped__)  # type: ignore[attr-defined]  # functools.wraps


def is_alone(listener: BackwardListener) -> bool:
    """Whether no other listener is there."""
    return _listeners == [listener]


def _offered(engine: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(engine)
    def run_backward(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return engine(*args, **kwargs)
        create_graph = bool(args[_CREATE_GRAPH] if len(args) > _CREATE_GRAPH else kwargs.get("create_graph", False))
        with ExitStack() as stack:
            for listener in tuple(_listeners):
                scope = listener.around_backward(args[0], create_graph=create_graph)
                if scope is not None:
                    stack.enter_context(scope)
            return engine(*args, **kwargs)

    return run_backward
