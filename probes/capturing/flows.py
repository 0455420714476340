"""Where the result of a layer goes: unchanged into one other layer and nowhere else, or to anybody besides.

A layer that `loka.mods.FuseEpilogue` made can write its result as the FP8 that the next product multiplies, if nobody
else needs its numbers. That is seen, not read from the model's code: the memory in which such a result lies is followed
through every operator of a step's forward. It has one reader if all that ever touches it is one linear layer, which
gets it as it is. A residual, a view, a loss on it, and an output of the model are somebody else.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from loka.calls import forward_of
from loka.kernel_registry.norm_act import has_norm_act, runs_fused
from loka.probes.capturing.storage import Place, storage_key

# Somebody who is no layer that reads its input once.
_OTHER: Final[str] = ""


@dataclass(slots=True)
class _Result:
    """One result of one call: where it lies, and who has touched it since."""

    writer: str
    place: Place
    readers: set[str] = field(default_factory=set)


@dataclass(slots=True)
class Flows:
    """The results of one step. Modules are named by whoever calls; backward passes and recomputations are not shown."""

    _results: dict[int, _Result] = field(default_factory=dict)  # by storage
    _gone: list[_Result] = field(default_factory=list)
    _reading: list[tuple[nn.Module, int]] = field(default_factory=list)  # the layers that run, and what each reads

    def minds(self, module: nn.Module) -> bool:
        """Whether a module is one whose result is followed, or that may be the one to read such a result."""
        return _reads_once(module)

    def entered(self, module: nn.Module, args: tuple[Any, ...], name: str) -> None:
        """A module's forward begins."""
        if not self._results or not args or not isinstance(args[0], Tensor) or not _reads_once(module):
            return
        key = storage_key(args[0])
        result = self._results.get(key)
        if result is not None and result.place == Place.of(args[0]) and torch._C._current_autograd_node() is None:
            result.readers.add(name)
            self._reading.append((module, key))

    def left(self, module: nn.Module, output: Any, name: str, *, outermost: bool) -> None:
        """A module's forward ended; `outermost`: what it returns goes to the user."""
        if torch._C._current_autograd_node() is not None:
            return
        if self._reading and self._reading[-1][0] is module:
            self._reading.pop()
        if isinstance(output, Tensor) and type(output) is Tensor and runs_fused(module):
            key = storage_key(output)
            if key in self._results:  # a place that was written anew, as static buffers are
                self._gone.append(self._results.pop(key))
            if key:
                self._results[key] = _Result(name, Place.of(output, keep=True))
        if outermost and self._results:
            self._touched(tree_leaves(output))
            self._reading.clear()

    def ran(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """An operator is about to read, or to write, what is given to it."""
        if self._results and torch._C._current_autograd_node() is None:
            self._touched(args)
            if kwargs:
                self._touched(kwargs.values())

    def _touched(self, values: Iterable[Any]) -> None:
        for value in values:
            if isinstance(value, Tensor):
                result = self._results.get(key := storage_key(value))
                if result is not None and not (self._reading and self._reading[-1][1] == key):
                    result.readers.add(_OTHER)
            elif isinstance(value, list | tuple):
                self._touched(value)

    def reader(self, writer: str) -> str:
        """Return the layer that alone has read every result of another one so far; "" where there is no such layer."""
        of_all = [each.readers for each in (*self._gone, *self._results.values()) if each.writer == writer]
        readers = set().union(*of_all)
        return next(iter(readers)) if len(readers) == 1 and all(of_all) else _OTHER


def _reads_once(module: nn.Module) -> bool:
    """Whether a module multiplies its input by its weight, and does nothing else with it."""
    return forward_of(module) is nn.Linear.forward or has_norm_act(module)
