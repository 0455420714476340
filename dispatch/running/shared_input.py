"""Casts of an input that several layers read, as q, k and v or a gate and its twin do: made for the first of them.

A whole-layer kernel quantises its input along both sides, for its forward product and for the gradient of its weight.
The next layer that reads the same values under the same recipe takes what is there. The same: one storage, one version
counter, one place in it. That is what autograd, too, trusts when it saves an input for backward; only code that it
records comes here. One input is remembered per thread, until another one comes or a backward pass begins.
"""

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from loka.dispatch.running.weights import is_seen
from loka.kernel_registry.layers import Layer, Needs, Sides


@dataclass(frozen=True, slots=True)
class _Remembered:
    values: tuple[Any, ...]
    dtype: torch.dtype
    layer: Layer
    sides: Sides


class _Slot(threading.local):
    """What this thread remembers."""

    last: _Remembered | None = None
    reused = 0


_slot = _Slot()


def input_sides(layer: Layer, x: Tensor, needs: Needs, dtype: torch.dtype) -> Sides:
    """Return the casts of an input x [m, k] that a layer needs: those of the layer before, where it read the same.

    They are of its values in `dtype`, to which x is cast first where it has another one.
    """
    values, last = _values(x), _slot.last
    same = last is not None and values == last.values and layer is last.layer and dtype == last.dtype
    if last is not None and same and (last.sides[1] or not needs.weight):
        _slot.reused += 1
        return last.sides[0], last.sides[1] if needs.weight else None
    sides = layer.input_sides(x if x.dtype == dtype else x.to(dtype), needs)
    _slot.last = None if values is None else _Remembered(values, dtype, layer, sides)
    return sides


def forget_input() -> None:
    """Let go of what is remembered: whoever needs it from here on has it saved."""
    _slot.last = None


def reused_inputs() -> int:
    """Return how many layers of this thread took the casts of one before them."""
    return _slot.reused


def _values(x: Tensor) -> tuple[Any, ...] | None:
    """Return what is the same for the same values; None for a tensor that does not tell, and where nothing is kept.

    A CUDA graph would repeat with a cast that was made before it, and a dispatch mode may count on every op.
    """
    if x.is_inference() or not x.numel() or is_seen():
        return None
    # A weak reference keeps the storage's place from being taken by another one: addresses are used again.
    storage = StorageWeakRef(x.untyped_storage())  # type: ignore[no-untyped-call]  # torch does not annotate it
    stream = torch.cuda.current_stream(x.device) if x.is_cuda else None
    return storage, x._version, x.data_ptr(), x.shape, x.stride(), x.dtype, stream
