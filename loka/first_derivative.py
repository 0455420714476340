"""Backward passes that nothing is differentiated through again: whoever tries gets an error, and never a wrong number.

torch's own `once_differentiable` ties its error to results alone, not to what they were computed from. So
`torch.autograd.grad(loss, weights)` and `torch.autograd.functional.hessian` never come by it and go on with zeros, and
it ties none at all where the gradient that comes in is a constant. Here the error stands on every way from a result
back to its sources.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, Final, TypeVar
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_Backward = TypeVar("_Backward", bound=Callable[..., Any])

_WORDS: Final[str] = (
    "trying to differentiate twice a product in FP8, which is once_differentiable: rounding has no second derivative. "
    "Take it back by loka.revert(model), or plan with a filter= that leaves out what create_graph=True goes through."
)


def first_derivative_only(backward: _Backward) -> _Backward:
    """Make the backward of an autograd.Function one whose results cannot be differentiated: RuntimeError.

    Sources are the gradients that come in, what is saved, and what `depends_on` has named.
    """
    once = once_differentiable(backward)

    @functools.wraps(backward)
    def first(ctx: Any, *grads: Any) -> Any:
        if torch.compiler.is_dynamo_compiling() or not torch.is_grad_enabled():  # no create_graph=True
            return once(ctx, *grads)
        unpacked = _Unpacked(ctx)
        with torch.no_grad():
            results = backward(unpacked, *grads)
        return _refusing(results, [*_wanting(grads), *_wanting(unpacked.saved_tensors), *_named(ctx, grads)])

    return first  # type: ignore[return-value]  # of the same signature


def depends_on(ctx: Any, *inputs: Tensor) -> None:
    """Name inputs of a function that saves something else in their place; none is kept alive."""
    ctx.depends = tuple(ref(each) for each in inputs if each.requires_grad)


class _Unpacked:
    """A context whose saved tensors are unpacked once: a checkpoint gives them no second time."""

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx
        self.saved_tensors: tuple[Tensor | None, ...] = ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def _wanting(tensors: Iterable[Any]) -> list[Tensor]:
    return [each for each in tensors if isinstance(each, Tensor) and each.requires_grad]


def _named(ctx: Any, grads: tuple[Any, ...]) -> list[Tensor]:
    """Return the named inputs that are there; raise where nothing else would stand on the way to one that is gone."""
    named = [each() for each in getattr(ctx, "depends", ())]
    found = [each for each in named if each is not None]
    if len(found) < len(named) and not _wanting(grads):
        raise RuntimeError(_WORDS)
    return found


def _refusing(results: Any, sources: list[Tensor]) -> Any:
    """Return the results, each behind the error on the way to its sources."""
    if not sources:
        return results
    of_one = isinstance(results, Tensor)
    given = (results,) if of_one else tuple(results)
    places = [place for place, each in enumerate(given) if isinstance(each, Tensor)]
    behind: Any = _Refusal.apply(len(places), *(given[place] for place in places), *sources)  # type: ignore[no-untyped-call]  # torch does not annotate it
    made = list(given)
    for place, each in zip(places, behind, strict=True):
        made[place] = each
    return made[0] if of_one else tuple(made)


class _Refusal(torch.autograd.Function):
    """The first `count` tensors as they are, differentiable with regard to all of them in name only."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(each.detach() for each in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        raise RuntimeError(_WORDS)
