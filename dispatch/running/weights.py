"""Quantised weights kept for the micro-batches of one optimiser step.

Under gradient accumulation the same weight is quantised in every forward and every backward, though it changes once per
step. A weight that is kept here is quantised once per pass instead. What is kept is an operand as its kernel reads it;
it costs a copy of the weight per pass: in FP8 for a real kernel, in fp32 for an emulated one.

An operand serves as long as the weight is what it was: the same Parameter with the same version counter, storage and
shape, and no step of an optimiser since. The version misses an edit through `.data`: `dispatch.running.windows` says
when there was none, unless a weight is to be kept always. A step of any `torch.optim` optimiser ends what is kept
whatever way it writes, and only code that autograd records reads or writes here, so that weights swapped in for an
evaluation are never met. Nothing is kept of what is computed from a Parameter (parametrised weights), of what stands in
for one (FSDP), in a copy of a converted model, or where something traces or captures. Of a layer on a kernel that
computes all passes together (`*.linear_layer.*`) both sides of the weight are kept, as that kernel makes them.
"""

import logging
import weakref
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from loka.dispatch.running.windows import Step, View, Window
from loka.errors import KernelError
from loka.formats import Pass
from loka.kernel_registry.grouped_halves import GroupedHalves, grouped_halves
from loka.kernel_registry.layers import Layer, Needs, Sides
from loka.kernel_registry.norm_act import FusedLayer
from loka.kernel_registry.registry import default_registry
from loka.kernel_registry.spec import Kernel, Prepared, PreparedKernel

log: Final = logging.getLogger("loka.dispatch")


@dataclass(frozen=True, slots=True)
class _Kept:
    """One operand: the kernel it is laid out for, and the values it was made of."""

    made_for: tuple[Any, ...]
    values: tuple[Any, ...]
    stamp: int
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

    __slots__ = ("kept", "owner", "window")

    def __init__(self, parameter: Tensor, module: nn.Module | None) -> None:
        # It goes with the Parameter or, as `torch.utils.swap_tensors`, by which `.to()` may work, refuses tensors that
        # have a weak reference, with its module.
        self.owner = weakref.ref(parameter if module is None else module, partial(_pop, id(parameter)))
        self.kept: dict[tuple[Any, ...], _Kept] = {}
        self.window = None if module is None else Window(self.kept.clear)  # None: always

    def is_of(self, parameter: Tensor) -> bool:
        """Whether this is the slot of a tensor that has its id; of one in a module, its values tell the rest."""
        return self.owner() is parameter if self.window is None else type(parameter) is nn.Parameter


def _pop(key: int, owner: Any) -> None:
    slot = _slots.get(key)
    if slot is not None and slot.owner is owner:
        _discard(key)


def _discard(key: int) -> None:
    slot = _slots.pop(key, None)
    if slot is not None and slot.window is not None:
        slot.window.close()


_ALL_PASSES: Final = "all passes"

# By id of the Parameter; a slot goes with its owner.
_slots: Final[dict[int, _Slot]] = {}
_halves: Final[dict[str, PreparedKernel | None]] = {}
_grouped_halves: Final[dict[str, GroupedHalves | None]] = {}


class _Steps:
    """Steps that any optimiser has taken since weights are kept."""

    taken = 0
    watched: RemovableHandle | None = None


def keep(parameter: Tensor, module: nn.Module | None = None) -> None:
    """Keep the quantised operands of a Parameter from now on; of any other tensor nothing is kept.

    Given its module, only where micro-batches repeat and nothing can have written to it in between.
    """
    if not (isinstance(parameter, nn.Parameter) if module is None else type(parameter) is nn.Parameter):
        return
    slot = _slots.get(id(parameter))
    if slot is None or not slot.is_of(parameter) or (module is None and slot.window is not None):
        _discard(id(parameter))
        _slots[id(parameter)] = _Slot(parameter, module)
    if _Steps.watched is None:
        # Code that is compiled around a step calls it as it is: Dynamo would trace it, and guard on what it counts.
        _Steps.watched = register_optimizer_step_post_hook(_disable_dynamo(_stepped))


def forget(parameter: Tensor) -> None:
    """Drop what is kept of a Parameter, and keep nothing of it any more."""
    _discard(id(parameter))
    if _Steps.watched is not None and not _slots:
        _Steps.watched.remove()
        _Steps.watched = None


def kept_bytes() -> int:
    """Return the memory that kept operands take, in bytes."""
    operands = [kept.operand for slot in list(_slots.values()) for kept in list(slot.kept.values())]
    return sum(tensor.untyped_storage().nbytes() for operand in operands for tensor in operand.tensors)


def _stepped(optimizer: Optimizer, *_: object) -> None:
    _Steps.taken += 1
    step = Step(optimizer)
    for key, slot in list(_slots.items()):
        if slot.window is None or slot.window.frees:
            slot.kept.clear()
        if slot.window is not None:
            slot.window.stepped(step, key)


class Weight:
    """The values that a weight has now, as the operand of products that may run later."""

    __slots__ = ("_parameter", "_slot", "_stamp", "_values", "_view")

    def __init__(self, parameter: Tensor, slot: _Slot, values: tuple[Any, ...], view: View, stamp: int) -> None:
        self._parameter, self._slot, self._values, self._view = parameter, slot, values, view
        self._stamp = stamp

    def kernel(self, name: str, kernel: Kernel) -> Kernel:
        """Return a kernel that takes its operand b, made of this weight, from what is kept."""
        try:
            halves, grouped = halves_of(name), grouped_halves_of(name)
        except KernelError as error:  # that a conversion which is to keep weights always raises
            log.warning("Weights on %s are quantised in every micro-batch: %s", name, error)
            halves = grouped = _halves[name] = _grouped_halves[name] = None
        if grouped is not None:
            return self._of_experts(name, grouped, kernel)
        if halves is None:
            return kernel

        def call(a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
            made_for = (name, b.dtype, out_dtype, _stream(b))
            operand = self._find(product, made_for)
            if not isinstance(operand, Prepared):
                operand = halves.prepare(b.detach(), product=product, out_dtype=out_dtype)
                self._keep(product, self._made(made_for, operand, b.numel()))
            return halves.multiply(a, operand, product=product, out_dtype=out_dtype)

        return call

    def _of_experts(self, name: str, halves: GroupedHalves, kernel: Any) -> Kernel:
        """Do the same for a layer of experts, whose b [experts, n, k] is this weight."""

        def call(a: Tensor, b: Tensor, offsets: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
            if product not in halves.passes:
                plain: Tensor = kernel(a, b, offsets, product=product, out_dtype=out_dtype)
                return plain
            made_for = (name, b.dtype, out_dtype, _stream(b))
            operand = self._find(product, made_for)
            if not isinstance(operand, Prepared):
                operand = halves.prepare(b.detach(), product=product, out_dtype=out_dtype)
                self._keep(product, self._made(made_for, operand, b.numel()))
            return halves.multiply(a, operand, offsets, product=product, out_dtype=out_dtype)

        return cast(Kernel, call)

    def prepared(self, name: str, weight: Tensor, layer: FusedLayer) -> Prepared | None:
        """Return this weight [n, k] as a kernel with norm and activation reads it, from what is kept; None: plain."""
        made_for = (name, weight.dtype, _stream(weight))
        operand = self._find("fprop", made_for)
        if not isinstance(operand, Prepared):
            operand = layer.prepare(weight.detach())
            if operand is not None:
                self._keep("fprop", self._made(made_for, operand, weight.numel()))
        return operand

    def sides(self, name: str, layer: Layer, weight: Tensor, needs: Needs, out_dtype: torch.dtype) -> Sides:
        """Return this weight [n, k] as a kernel of all passes reads it, from what is kept."""
        made_for = (name, weight.dtype, out_dtype, _stream(weight))
        found = self._find(_ALL_PASSES, made_for)
        if not isinstance(found, _BothSides) or (needs.x and found.sides[1] is None):
            found = _BothSides(layer.weight_sides(weight.detach(), needs, out_dtype))
            self._keep(_ALL_PASSES, self._made(made_for, found, weight.numel()))
        along_k, turned = found.sides
        return along_k, turned if needs.x else None

    def _made(self, made_for: tuple[Any, ...], operand: "Prepared | _BothSides", elements: int) -> _Kept:
        return _Kept(made_for, self._values, self._stamp, operand, elements)

    def _find(self, product: str, made_for: tuple[Any, ...]) -> "Prepared | _BothSides | None":
        kept = self._slot.kept.get((product, *self._view))
        if kept is None or (kept.stamp, kept.values, kept.made_for) != (self._stamp, self._values, made_for):
            return None
        window = self._slot.window
        return kept.operand if window is None or window.is_untouched(self._parameter) else None

    def _keep(self, product: str, new: _Kept) -> None:
        """Keep an operand; those of other values go, and overlapping views: each pass keeps one copy of the weight."""
        kept, window = self._slot.kept, self._slot.window
        if window is not None and not window.is_latest(self._view, self._stamp):
            return
        for key in [key for key, each in kept.items() if each.values != new.values]:
            kept.pop(key, None)
        of_pass = [key for key in kept if key[0] == product]
        if sum(kept[key].elements for key in of_pass) + new.elements > self._parameter.numel():
            for key in of_pass:
                kept.pop(key, None)
        kept[product, *self._view] = new


def weight_of(weight: Tensor) -> Weight | None:
    """Return the values of a weight, a Parameter or a view of one, to keep operands of; None where nothing is kept."""
    if torch.compiler.is_compiling() or not _slots:
        return None
    parameter = weight if weight._base is None else weight._base
    slot = _slots.get(id(parameter))
    if slot is None or not slot.is_of(parameter) or parameter.is_inference():
        return None
    if (slot.window is not None and slot.window.rests(parameter, _Steps.taken)) or is_seen() or not weight.numel():
        return None
    # As long as something refers to a storage, if only weakly, no other one is taken for it: addresses are used again.
    storage = StorageWeakRef(parameter.untyped_storage())  # type: ignore[no-untyped-call]  # torch does not annotate it
    values = (_Steps.taken, parameter._version, storage, parameter.data_ptr(), parameter.shape)
    view = (weight.storage_offset(), weight.shape, weight.stride())
    stamp = 0 if slot.window is None else slot.window.entered(parameter, view, values)
    return None if stamp is None else Weight(parameter, slot, values, view, stamp)


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


def grouped_halves_of(name: str) -> GroupedHalves | None:
    """Do the same for a kernel of experts."""
    if name not in _grouped_halves:
        spec = default_registry().get(name) if name else None
        _grouped_halves[name] = None if spec is None else grouped_halves(spec)
    return _grouped_halves[name]
