"""The class that a module becomes when weights of it are stored in FP8: what it holds, saves, loads and refuses.

In place of a Parameter `w` there are two buffers, `w`, the codes as [.., n, k], and `w_scale`; and `w_kept`, the
numbers of the experts that are not multiplied in FP8, where there are any. What the module's code finds under `w` is a
`StoredWeight`. A linear layer without a forward of its own, and one with its norm and activation, reads its buffers
directly.
"""

import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any, Final, Literal, cast

import torch
from torch import Tensor, nn

from loka.calls import forward_of
from loka.dispatch.deciding.by_rows import kernels_of
from loka.dispatch.freezing.handed import Handed, in_flow
from loka.dispatch.freezing.storage import Storage, Tensors, check_inference
from loka.dispatch.freezing.stored import stored_linear
from loka.dispatch.freezing.stored_grouped import quantize_stack, stored_kernel
from loka.dispatch.freezing.stored_norm_act import stored_norm_act
from loka.dispatch.freezing.stored_weight import StoredWeight
from loka.dispatch.running.convert import FROZEN
from loka.dispatch.running.linear import load
from loka.dispatch.running.weights import halves_of
from loka.kernel_registry.norm_act import is_norm_act, runs_fused
from loka.kernel_registry.operands import DTYPES
from loka.made_classes import make_class

_SCALE: Final = "_scale"
_KEPT: Final = "_kept"


def names_taken(module: nn.Module, name: str) -> list[str]:
    """Return the names that a module has already, of those that a stored `name` needs."""
    return [each for each in (f"{name}{_SCALE}", f"{name}{_KEPT}") if hasattr(module, each)]


def made_of(weight: Tensor, storage: Storage) -> Tensors:
    """Quantise a weight, as its model has it: codes, scales, and the numbers of kept experts."""
    with torch.no_grad():
        codes, scale = quantize_stack(weight.mT if storage.turned else weight, storage.spec)
        return codes, scale, weight[list(storage.kept)] if storage.kept else None


def store(module: nn.Module, stored: dict[str, tuple[Storage, Tensors]]) -> None:
    """Put codes and scales in the place of the Parameters that a module had under these names."""
    for name, (_, (codes, scale, high)) in stored.items():
        module.register_buffer(name, codes)
        module.register_buffer(f"{name}{_SCALE}", scale)
        if high is not None:
            module.register_buffer(f"{name}{_KEPT}", high)
    module.__class__ = _frozen_class(_kind_of(module, stored), cast(Any, type(module)), tuple(stored))
    setattr(module, FROZEN, {name: storage for name, (storage, _) in stored.items()})


# Linear: a linear layer that runs its stored weight itself. Joint: one with norm and activation. Views: any module.
Kind = Literal["Linear", "Joint", "Views"]


def _kind_of(module: nn.Module, stored: Collection[str]) -> Kind:
    if set(stored) != {"weight"} or "forward" in vars(module):
        return "Views"
    if forward_of(module) is nn.Linear.forward:
        return "Linear"
    return "Joint" if runs_fused(module) else "Views"


def load_kernels(storage: Storage) -> None:
    """Import the kernels of a stored weight: Dynamo cannot trace how that is done."""
    for kernel in kernels_of(storage.kernel):
        if storage.op == "grouped_linear":
            stored_kernel(kernel)
        else:
            load(kernel)
            halves_of(kernel)


def _forward(self: Any, input: Tensor) -> Tensor:
    """Run a linear layer on its stored weight."""
    return in_flow(self, input, _linear) if isinstance(input, Handed) else _linear(self, input)


def _linear(self: Any, input: Tensor) -> Tensor:
    storage, buffers = getattr(self, FROZEN)["weight"], self._buffers
    check_inference(input, storage.site, self.out_features, self.in_features)
    codes, scale = buffers["weight"], buffers[f"weight{_SCALE}"]
    return stored_linear(input, codes, scale, self.bias, storage.kernel, storage.traceable)


@is_norm_act
def _joint(self: Any, input: Tensor) -> Tensor:
    """Run a linear layer with norm and activation on its stored weight."""
    hands = getattr(self, FROZEN)["weight"].hands
    return in_flow(self, input, _norm_act) if hands or isinstance(input, Handed) else _norm_act(self, input)


def _norm_act(self: Any, input: Tensor) -> Tensor:
    storage, buffers = getattr(self, FROZEN)["weight"], self._buffers
    check_inference(input, storage.site, *storage.shape)
    return stored_norm_act(input, buffers["weight"], buffers[f"weight{_SCALE}"], self.bias, self.eps, storage)


_FORWARDS: Final[Mapping[Kind, Callable[[Any, Tensor], Tensor]]] = {"Linear": _forward, "Joint": _joint}


def frozen_kind(module: nn.Module) -> Kind | None:
    """Return which kind of frozen module this is, where it runs its stored weight itself and does nothing else."""
    forward = forward_of(module)
    return "Joint" if forward is _joint else "Linear" if forward is _forward else None


def _get(name: str) -> property:
    """Make the attribute under which a module's code finds a stored weight."""

    def get(self: Any) -> StoredWeight:
        buffers = self._buffers
        tensors = buffers[name], buffers[f"{name}{_SCALE}"], buffers.get(f"{name}{_KEPT}")
        return StoredWeight.whole(getattr(self, FROZEN)[name], *tensors)

    return property(get)


def _apply(self: Any, base: Any, function: Callable[[Tensor], Tensor], recurse: bool) -> Any:
    """Move codes and scales with the module; of a cast of the model, the weight has the dtype alone."""
    before = dict(self._buffers)
    base._apply(self, function, recurse)
    frozen = getattr(self, FROZEN)
    for name, storage in frozen.items():
        dtype = function(torch.empty(0, dtype=storage.dtype, device=before[name].device)).dtype
        frozen[name] = replace(storage, dtype=dtype)
        for each in (name, f"{name}{_SCALE}"):
            moved = self._buffers[each]
            if moved.dtype != before[each].dtype:
                self._buffers[each] = before[each].to(moved.device)
    return self


def _load(self: Any, base: Any, state: dict[str, Any], prefix: str, *args: Any) -> None:
    """Load codes and scales; a weight in high precision is quantised."""
    for name, storage in getattr(self, FROZEN).items():
        key, codes = f"{prefix}{name}", self._buffers[name]
        given = state.get(key)
        if not isinstance(given, Tensor) or given.dtype == codes.dtype:
            continue
        if given.dtype not in DTYPES or given.shape != storage.shape:
            args[-1].append(
                f"{key} is {given.dtype} {list(given.shape)}; this frozen layer takes {codes.dtype} "
                f"{list(codes.shape)}, or high precision {list(storage.shape)}."
            )
            return
        # What is assigned lies where it was given; numbers never go to `meta`, where there are none.
        stays = codes.is_meta or args[0].get("assign_to_params_buffers", False)
        made, scale, high = made_of(given if stays else given.to(codes.device), storage)
        state = {**state, key: made, f"{key}{_SCALE}": scale}
        if high is not None:
            state[f"{key}{_KEPT}"] = high
    base._load_from_state_dict(self, state, prefix, *args)


def _save(self: Any, base: Any, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
    """Save codes and scales, also where a module's own code would save what it finds under the name of its weight."""
    base._save_to_state_dict(self, destination, prefix, keep_vars)
    for name in getattr(self, FROZEN):
        for each in (name, f"{name}{_SCALE}", f"{name}{_KEPT}"):
            tensor = self._buffers.get(each)
            if tensor is not None:
                destination[f"{prefix}{each}"] = tensor if keep_vars else tensor.detach()


@functools.cache
def _frozen_class(kind: Kind, base: Any, names: tuple[str, ...]) -> Any:
    """Make the class that a module of class `base` becomes."""

    def apply(self: Any, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return _apply(self, base, fn, recurse)

    def load(self: Any, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        _load(self, base, state_dict, prefix, *args)

    def save(self: Any, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        _save(self, base, destination, prefix, keep_vars)

    def restore(self: Any, state: Any) -> None:
        base.__setstate__(self, state)
        setattr(self, FROZEN, dict(getattr(self, FROZEN)))  # a copy's own
        for storage in getattr(self, FROZEN).values():
            load_kernels(storage)

    members = {
        **{name: _get(name) for name in names},
        **({"forward": _FORWARDS[kind]} if kind in _FORWARDS else {}),
        "_apply": apply,
        "_load_from_state_dict": load,
        "_save_to_state_dict": save,
        "__setstate__": restore,
        "__module__": __name__,
        "__doc__": None,
    }
    return make_class(f"Frozen{base.__name__}", base, members, _frozen_class, kind, base, names)
