"""Whether a weight is still what it was in an earlier micro-batch: what its gradient and its optimiser tell of it.

`torch.Tensor._version` misses a write through `.data`, and such a write is how some loops update. So that a quantised
weight is never one step behind without a word, it serves again only where all of this holds:

- The Parameter is held by an optimiser of `torch.optim`, or one derived from it, and the window began with a step of it
  (any step of any optimiser ends it). A loop that updates by hand never gets here.
- Nothing but backward passes has touched its gradient since. A hook notes what every accumulation leaves, and the next
  forward must find that very tensor in that very version; where a gradient was zeroed, scaled, clipped or replaced, the
  window is over. That includes those who zero behind the first forward of a window: an update by hand looks the same.
- At least one gradient has been accumulated since the weight served last: several forwards in a row are an evaluation,
  or one Parameter in several places, and no micro-batches. What a checkpoint recomputes in a backward pass is no other.
- The window is no longer than one that has been seen to end with a step.

So nothing is kept before a whole window has repeated, and a training without accumulation, which is noticed after two
steps, has no hook, keeps nothing and pays two comparisons per call. What remains is a write through `.data` between two
micro-batches by code that leaves gradients alone: it takes effect with the next window.
"""

import functools
import itertools
import weakref
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

# Windows in a row without a second micro-batch, after which a weight is watched no more; and how often that may happen.
_MISSES: Final[int] = 2
_CHANCES: Final[int] = 3
# Micro-batches without a step: a loop that updates by hand, and leaves no trace of it.
_LONGEST: Final[int] = 1024
# Views of one Parameter that are told apart within a window, as the experts of a stack are.
_VIEWS: Final[int] = 1024

View = tuple[Any, ...]  # where in a Parameter a weight lies: its offset, shape and strides

_stamps: Final = itertools.count(1)


class Step:
    """A step of an optimiser."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    @functools.cached_property
    def parameters(self) -> set[int]:
        """Ids of the Parameters that the optimiser has."""
        return {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}


class _Left:
    """The gradient as it was last seen."""

    __slots__ = ("_storage", "_version")

    def __init__(self, grad: Tensor | None) -> None:
        # As long as something refers to a storage, if only weakly, no other one takes its place in memory. A reference
        # to a tensor would be in the way: `torch.utils.swap_tensors`, by which `.to()` may work, refuses what has one.
        self._storage = None if grad is None else StorageWeakRef(grad.untyped_storage())  # type: ignore[no-untyped-call]  # untyped in torch
        self._version = 0 if grad is None else grad._version

    def is_still(self, grad: Tensor | None) -> bool:
        """Whether this is the same tensor, or none still, and nothing has written to it."""
        if grad is None or self._storage is None:
            return grad is None and self._storage is None
        return grad._version == self._version and self._is_stored_in(grad)

    def became(self, grad: Tensor | None) -> bool:
        """Whether one accumulation made this of it."""
        if grad is None or self._storage is None:
            return grad is not None
        return grad._version == self._version + 1 and self._is_stored_in(grad)

    def _is_stored_in(self, grad: Tensor) -> bool:
        return self._storage is not None and bool(grad.untyped_storage()._cdata == self._storage.cdata)


class Window:
    """The forwards of one Parameter between two steps, as far as they are known to see the same values."""

    __slots__ = (
        "_accumulated",
        "_chances",
        "_drop",
        "_forwards",
        "_handle",
        "_last",
        "_left",
        "_limit",
        "_misses",
        "_open",
        "_optimizer",
        "_owned",
        "_repeats",
        "_stepped",
        "_values",
        "frees",
    )

    def __init__(self, drop: Callable[[], None]) -> None:
        """`drop` lets go of all that is kept of the Parameter."""
        self._drop = drop
        # Whether a step frees what is kept, which nothing reads any more. On a CPU, the next forward does it: freed all
        # at once, it would go back to the system and have to be faulted in again, page by page.
        self.frees = True
        self._handle: RemovableHandle | None = None  # of the hook; None: nothing is watched
        self._last: tuple[int, int] | None = None  # steps and version at the last forward, while nothing is watched
        self._chances = _CHANCES
        self._misses = 0
        self._limit = 0  # accumulations before the last forward of the longest window that ended with a step
        self._optimizer: weakref.ref[Optimizer] | None = None
        self._owned = False  # whether any optimiser has been found to hold it
        self._stepped = False  # whether that optimiser has, since the last forward
        self._values: tuple[Any, ...] | None = None  # None: the window is over
        self._open = False
        self._left = _Left(None)
        self._accumulated = self._repeats = 0
        # By view: the stamp of the values that its operands are made of, and what was accumulated at its last forward.
        self._forwards: dict[View, tuple[int, int]] = {}

    def rests(self, parameter: Tensor, steps: int) -> bool:
        """Whether there is nothing to keep in a recorded forward, as far as a glance tells; else look closely."""
        if self._handle is not None:
            return False
        last, self._last = self._last, (steps, parameter._version)
        if last is not None and (last != self._last or parameter.grad is None):
            return True
        if not self._chances or not parameter.requires_grad or not parameter.is_leaf:
            return True
        self._handle = parameter.register_post_accumulate_grad_hook(self._note)  # type: ignore[no-untyped-call]  # untyped in torch
        self._misses = 0
        return False

    def entered(self, parameter: Tensor, view: View, values: tuple[Any, ...]) -> int | None:
        """Note a recorded forward. Return a stamp, which is another one where the values may be; None: keep nothing."""
        if values != self._values or not self._left.is_still(parameter.grad):
            self._begin(parameter, values)
        elif self._accumulated >= _LONGEST:
            self._give_up()
        if self._handle is None:
            return None
        stamp, before = self._forwards.get(view, (0, 0))
        if stamp and self._accumulated > before:
            self._repeats = self._accumulated
        elif not stamp or torch._C._current_graph_task_id() == -1:  # no repetition, nor a checkpoint's recompute
            stamp = next(_stamps)
        if len(self._forwards) >= _VIEWS and view not in self._forwards:
            self._forwards.clear()
        self._forwards[view] = (stamp, self._accumulated)
        return stamp if self._open and 0 < self._limit >= self._accumulated else None

    def is_latest(self, view: View, stamp: int) -> bool:
        """Whether no later forward of this view is in doubt about what this one saw."""
        return self._forwards.get(view, (0, 0))[0] == stamp

    def is_untouched(self, parameter: Tensor) -> bool:
        """Whether nothing but accumulation has touched the gradient since the window began."""
        return self._left.is_still(parameter.grad)

    def stepped(self, step: Step, key: int) -> None:
        """Note a step of an optimiser, which may have the Parameter of this id or not."""
        if self._handle is None:
            return
        known = None if self._optimizer is None else self._optimizer()
        if known is None and key in step.parameters:
            self._optimizer, self._owned, known = weakref.ref(step.optimizer), True, step.optimizer
        self._stepped = self._stepped or known is step.optimizer

    def close(self) -> None:
        """Watch no more."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None
        self._optimizer = None
        self._limit = 0
        self._over()

    def _begin(self, parameter: Tensor, values: tuple[Any, ...]) -> None:
        """Begin a window, of which this is the first forward."""
        if self._repeats and self._stepped:
            self._limit, self._misses, self._chances = max(self._limit, self._repeats), 0, _CHANCES
        elif not self._repeats or not self._owned:
            self._misses += 1
        stepped, self._stepped = self._stepped, False
        self._over()
        if self._misses > _MISSES:
            self._give_up()
            return
        if not stepped:
            self._optimizer = None  # another one may have taken over
        self._values = values
        self.frees = not parameter.is_cpu
        self._left = _Left(parameter.grad)
        # Memory that processes share is written by others.
        self._open = stepped and (parameter.is_cuda or not parameter.is_shared())  # type: ignore[no-untyped-call]  # untyped in torch

    def _give_up(self) -> None:
        self._chances -= 1
        self.close()

    def _over(self) -> None:
        self._drop()
        self._forwards.clear()
        self._values, self._open, self._left = None, False, _Left(None)
        self._accumulated = self._repeats = 0

    def _note(self, parameter: Tensor) -> None:
        """Note what an accumulation has left: the hook."""
        # In a compiled backward pass, which takes in its hooks, nothing is noted: the next forward is in doubt.
        if torch.compiler.is_compiling() or self._values is None:
            return
        if not self._left.became(parameter.grad):
            self._over()
            return
        self._left = _Left(parameter.grad)
        self._accumulated += 1
