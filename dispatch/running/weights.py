"""Quantised weights kept for the micro-batches of one optimiser step.

Under gradient accumulation the same weight is quantised in every forward and every backward, though it changes once per
step. A weight that is kept here is quantised once per pass instead. What is kept is an operand as its kernel reads it;
it costs a copy of the weight per pass: in FP8 for a real kernel, in fp32 for an emulated one.

An operand serves as long as the weight is what it was: the same Parameter with the same version counter, storage and
shape, and no step of an optimiser since. The version misses an edit through `.data`; a step of any `torch.optim`
optimiser ends what is kept whatever way it writes, and only code that autograd records reads or writes here, so that
weights swapped in for an evaluation are never met. Nothing is kept of what is computed from a Parameter (parametrised
weights), of what stands in for one (FSDP), or where something traces or captures. Of a layer on a kernel that computes
all passes together (`*.linear_layer.*`) both sides of the weight are kept, as that kernel makes them.
"""

import weakref
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from loka.formats import Pass
from loka.kernel_registry.layers import Layer, Needs, Sides
from loka.kernel_registry.norm_act import FusedLayer
from loka.kernel_registry.registry import default_registry
from loka.kernel_registry.spec import Kernel, Prepared, PreparedKernel


@dataclass(frozen=True, slots=True)
class _Kept:
    """One operand: the kernel it is laid out for, and the values it was made of."""

    made_for: tuple[Any, ...]
    values: tuple[Any, ...]
    operand: "Prepared | _BothSides"
    elements: int


@dataclass(frozen=True, slots=True)
class _BothSides:
    """A weight as a kernel of all passes reads it."""

    sides: Sides

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Codes and scales of either side."""
        return tuple(tensor for side in self.sides if side is not None for tensor in (side.data, side.scale))


class _Slot:
    """What is kept of one Parameter."""

    __slots__ = ("kept", "parameter")

    def __init__(self, parameter: Tensor) -> None:
        key = id(parameter)
        self.parameter = weakref.ref(parameter, lambda _: _slots.pop(key, None))
        self.kept: dict[tuple[Any, ...], _Kept] = {}


_ALL_PASSES: Final = "all passes"

# By id of the Parameter; a slot goes with it.
_slots: Final[dict[int, _Slot]] = {}
_halves: Final[dict[str, PreparedKernel | None]] = {}


class _Steps:
    """Steps that any optimiser has taken since weights are kept."""

    taken = 0
    watched = False


def keep(parameter: Tensor) -> None:
    """Keep the quantised operands of a Parameter from now on; of any other tensor nothing is kept."""
    if not isinstance(parameter, nn.Parameter):
        return
    if not _Steps.watched:
        register_optimizer_step_post_hook(_stepped)
        _Steps.watched = True
    _slots.setdefault(id(parameter), _Slot(parameter))


def forget(parameter: Tensor) -> None:
    """Drop what is kept of a Parameter, and keep nothing of it any more."""
    _slots.pop(id(parameter), None)


def kept_bytes() -> int:
    """Return the memory that kept operands take, in bytes."""
    operands = [kept.operand for slot in list(_slots.values()) for kept in list(slot.kept.values())]
    return sum(tensor.untyped_storage().nbytes() for operand in operands for tensor in operand.tensors)


def _stepped(*_: object) -> None:
    _Steps.taken += 1
    for slot in list(_slots.values()):
        slot.kept.clear()


class Weight:
    """The values that a weight has now, as the operand of products that may run later."""

    __slots__ = ("_slot", "_values", "_view")

    def __init__(self, slot: _Slot, values: tuple[Any, ...], view: tuple[Any, ...]) -> None:
        self._slot, self._values, self._view = slot, values, view

    def kernel(self, name: str, kernel: Kernel) -> Kernel:
        """Return a kernel that takes its operand b, made of this weight, from what is kept."""
        halves = halves_of(name)
        if halves is None:
            return kernel

        def call(a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
            made_for = (name, b.dtype, out_dtype, _stream(b))
            operand = self._find(product, made_for)
            if not isinstance(operand, Prepared):
                operand = halves.prepare(b.detach(), product=product, out_dtype=out_dtype)
                self._keep(product, _Kept(made_for, self._values, operand, b.numel()))
            return halves.multiply(a, operand, product=product, out_dtype=out_dtype)

        return call

    def prepared(self, name: str, weight: Tensor, layer: FusedLayer) -> Prepared | None:
        """Return this weight [n, k] as a kernel with norm and activation reads it, from what is kept; None: plain."""
        made_for = (name, weight.dtype, _stream(weight))
        operand = self._find("fprop", made_for)
        if not isinstance(operand, Prepared):
            operand = layer.prepare(weight.detach())
            if operand is not None:
                self._keep("fprop", _Kept(made_for, self._values, operand, weight.numel()))
        return operand

    def sides(self, name: str, layer: Layer, weight: Tensor, needs: Needs, out_dtype: torch.dtype) -> Sides:
        """Return this weight [n, k] as a kernel of all passes reads it, from what is kept."""
        made_for = (name, weight.dtype, out_dtype, _stream(weight))
        found = self._find(_ALL_PASSES, made_for)
        if not isinstance(found, _BothSides) or (needs.x and found.sides[1] is None):
            found = _BothSides(layer.weight_sides(weight.detach(), needs, out_dtype))
            self._keep(_ALL_PASSES, _Kept(made_for, self._values, found, weight.numel()))
        along_k, turned = found.sides
        return along_k, turned if needs.x else None

    def _find(self, product: str, made_for: tuple[Any, ...]) -> "Prepared | _BothSides | None":
        kept = self._slot.kept.get((product, *self._view))
        same = kept is not None and kept.values == self._values and kept.made_for == made_for
        return kept.operand if kept is not None and same else None

    def _keep(self, product: str, new: _Kept) -> None:
        """Keep an operand; those of other values go, and overlapping views: each pass keeps one copy of the weight."""
        parameter, kept = self._slot.parameter(), self._slot.kept
        for key in [key for key, each in kept.items() if each.values != new.values]:
            kept.pop(key, None)
        of_pass = [key for key in kept if key[0] == product]
        if parameter is None or sum(kept[key].elements for key in of_pass) + new.elements > parameter.numel():
            for key in of_pass:
                kept.pop(key, None)
        kept[product, *self._view] = new


def weight_of(weight: Tensor) -> Weight | None:
    """Return the values of a weight, a Parameter or a view of one, to keep operands of; None where nothing is kept."""
    if torch.compiler.is_compiling() or not _slots or is_seen():
        return None
    parameter = weight if weight._base is None else weight._base
    slot = _slots.get(id(parameter))
    if slot is None or slot.parameter() is not parameter or not weight.numel() or parameter.is_inference():
        return None
    # As long as something refers to a storage, if only weakly, no other one is taken for it: addresses are used again.
    storage = StorageWeakRef(parameter.untyped_storage())  # type: ignore[no-untyped-call]  # torch does not annotate it
    values = (_Steps.taken, parameter._version, storage, parameter.data_ptr(), parameter.shape)
    return Weight(slot, values, (weight.storage_offset(), weight.shape, weight.stride()))


def is_seen() -> bool:
    """Whether a dispatch mode, which may be making a graph, or a CUDA graph takes down what runs now."""
    if torch._C._len_torch_dispatch_stack():
        return True
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _stream(x: Tensor) -> Any:
    """Return the stream that an operand is made on, and may be read on without waiting."""
    return torch.cuda.current_stream(x.device) if x.is_cuda else None


def halves_of(name: str) -> PreparedKernel | None:
    """Import the two halves of a kernel, None where it has none; raise KernelError when they cannot be loaded."""
    if name not in _halves:
        _halves[name] = default_registry().get(name).load_prepared() if name else None
    return _halves[name]
