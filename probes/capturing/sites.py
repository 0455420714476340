"""Sites: which matrix product of which part of the model is this?

A product is named by the identity of its weight operand, never by a tracker's guess: the operand's storage is looked up
among the model's parameters, through views, copies and dtype casts. A parameter called `weight` names its module's
site, any other names its own (`crossnet.W_kernels.0`). Products of activations carry the name of the innermost running
module, with `#1`, `#2` where one call of it runs several.
"""

import bisect
import sys
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from loka.dtensors import Part, is_sharded
from loka.kernel_registry.norm_act import runs_fused
from loka.naming import clean_fqn
from loka.probes.capturing.storage import hold, inner_tensors, storage_key
from loka.probes.experts.slices import Slice, slice_of

FilterFn = Callable[[nn.Module, str], bool]

# Owner of products that run outside every module's forward, e.g. functional code inside `probe.step()`.
OUTSIDE = "(functional)"
# What FSDP1 calls the parameter that it makes of many.
_FLAT: Final = "_flat_param"


@dataclass(frozen=True, slots=True)
class Owner:
    """One name of one parameter: its FQN, the site it gives its products, and the module that holds it."""

    parameter: str
    site: str
    module: nn.Module

    def slice_of(self, weight: Tensor) -> Slice | None:
        """Say which matrix of a stacked parameter a weight is, or that it is the whole stack; None without a stack.

        None as well for a cast of a single matrix, which lies in memory of its own.
        """
        whole: Any = getattr(self.module, self.parameter.rpartition(".")[2], None)
        stack = whole._local_tensor if is_sharded(whole) else whole
        if not isinstance(stack, Tensor) or type(stack) not in (Tensor, nn.Parameter):
            return None
        found = slice_of(self.parameter, stack, weight) if stack.numel() else None
        is_one = found is not None and found.expert is not None
        return None if is_one and storage_key(weight) != storage_key(stack) else found


@dataclass(frozen=True, slots=True)
class SiteKey:
    """Identity of a site within a run; `ordinal` counts nameless products of one call of a module, 0 for named ones."""

    owner: str
    ordinal: int = 0


@dataclass(slots=True)
class _Frame:
    module: nn.Module | None
    fqn: str
    nameless: int = 0


@dataclass(slots=True)
class SiteMap:
    """Parameters by storage, and the stack of running modules.

    `filter_fn(module, fqn)` limits which sites count; the module is the one that holds the parameter, or that runs the
    product.
    """

    model: nn.Module
    filter_fn: FilterFn | None = None
    _owners: dict[int, list[tuple[int, int, Owner]]] = field(default_factory=dict)
    _aliases: dict[int, Owner] = field(default_factory=dict)
    _parts: dict[str, Part] = field(default_factory=dict)  # of parameters that ranks share out
    _held: list[StorageWeakRef] = field(default_factory=list)
    _stack: list[_Frame] = field(default_factory=list)
    _names: dict[int, str] = field(default_factory=dict)
    _final: dict[SiteKey, str] = field(default_factory=dict)
    _filtered: dict[tuple[int, str], bool] = field(default_factory=dict)
    fused: frozenset[str] = frozenset()  # modules that fused kernels compute with their norm and activation
    recurrent: frozenset[str] = frozenset()  # sites of weights that torch's recurrent layers multiply with inside

    def refresh(self) -> None:
        """Read the model again: names of modules and where its parameters lie now."""
        self.clear()
        modules = [(module, clean_fqn(name)) for name, module in self.model.named_modules()]
        self._names = {id(module): name for module, name in modules}
        self.fused = frozenset(name for module, name in modules if runs_fused(module))
        owned = list(_owners(self.model))
        self.recurrent = frozenset(owner.site for owner, _ in owned if _is_recurrent(owner.module))
        self._parts = {owner.parameter: part for owner, parameter in owned if (part := Part.of(parameter)) is not None}
        for owner, parameter in owned:
            self._place(owner, parameter)

    def clear(self) -> None:
        """Let go of every tensor; names stay."""
        self._owners = {}
        self._aliases = {}
        self._held = []
        self._stack = [_Frame(None, OUTSIDE)]

    def _place(self, owner: Owner, parameter: Tensor) -> None:
        for inner in inner_tensors(parameter):
            key = storage_key(inner)
            if key:
                self._held.append(hold(inner))
                start = int(inner.storage_offset())
                entries = self._owners.setdefault(key, [])
                entries.append((start, start + max(_extent(inner), 1), owner))
                entries.sort(key=lambda entry: entry[:2])

    # --- the stack of running modules ---

    def enter(self, module: nn.Module) -> None:
        """A module's forward begins."""
        fqn = self._names.get(id(module))
        self._stack.append(_Frame(module, self._stack[-1].fqn if fqn is None else fqn))

    def leave(self, module: nn.Module) -> None:
        """A module's forward ends, also by an exception: everything above it on the stack is gone too."""
        for index in range(len(self._stack) - 1, 0, -1):
            if self._stack[index].module is module:
                del self._stack[index:]
                return

    def leave_all(self) -> None:
        """Nothing runs any more; a forward that was interrupted may have left something."""
        del self._stack[1:]

    @property
    def inside_module(self) -> bool:
        """Whether some module's forward is running."""
        return len(self._stack) > 1

    def stranger(self, parameter: str) -> str:
        """Return the running module that multiplies with a parameter of another one; empty where it is its own."""
        running = self._stack[-1].fqn
        return "" if running == parameter.rpartition(".")[0] else running or type(self.model).__name__

    # --- names ---

    def name_of(self, module: nn.Module) -> str:
        """Return the name of a module of the model, "" of any other."""
        return self._names.get(id(module), "")

    def alias(self, copy: Tensor, original: Tensor) -> None:
        """Remember that `copy` holds a parameter's values in memory of its own: a cast by autocast, a layout change."""
        owner = self.find(original)
        key = storage_key(copy)
        if owner is not None and key and key != storage_key(original):
            self._held.append(hold(copy))
            self._aliases[key] = owner

    def parameters(self, names: Container[str]) -> list[Tensor]:
        """Return the trained parameters of these names, each once."""
        found = {id(value): value for owner, value in _owners(self.model) if owner.parameter in names}
        return [value for value in found.values() if value.requires_grad]

    def find(self, tensor: Tensor) -> Owner | None:
        """Return the parameter that this tensor is, or is a view or cast of."""
        key = storage_key(tensor)
        if not key:
            return None
        if key in self._aliases:
            return self._aliases[key]
        entries, offset = self._owners.get(key, []), int(tensor.storage_offset())
        end = bisect.bisect_right(entries, offset, key=lambda entry: entry[0])
        names = [owner for start, stop, owner in entries[:end] if start <= offset < stop]
        return self._preferred(names) if names else self._find_in_running_modules(key, offset)

    def _find_in_running_modules(self, key: int, offset: int) -> Owner | None:
        """Find parameters that were swapped in for this forward, as FSDP does when it gathers them.

        FSDP1 gathers those of many modules into one memory, and may leave views of it in their places.
        """
        modules = [(frame.module, frame.fqn) for frame in reversed(self._stack) if frame.module is not None]
        flat = any(flat_parameter(module) is not None for module, _ in modules)
        for module, fqn in modules:
            for name, parameter in _weights_of(module, views=flat):
                if any(_holds(inner, key, offset) for inner in inner_tensors(parameter)):
                    owner = _owner(module, fqn, name)
                    self._place(owner, parameter)
                    return owner
        return None

    def slice_of(self, owner: Owner, weight: Tensor) -> Slice | None:
        """Say the same as the owner does of a weight, with the model's numbers where ranks share the stack out."""
        found, part = owner.slice_of(weight), self._parts.get(owner.parameter)
        if found is None or part is None or part.count != found.experts:
            return found  # all of them, gathered
        return replace(found, first=part.first, layer=part.whole)

    def _preferred(self, names: list[Owner]) -> Owner:
        """Among the names of a shared parameter, take the running module's, else a non-embedding's, else the first."""
        if len(names) > 1:
            running = [id(frame.module) for frame in reversed(self._stack)]
            for module in running:
                for owner in names:
                    if id(owner.module) == module:
                        return owner
            for owner in names:
                if not isinstance(owner.module, nn.Embedding | nn.EmbeddingBag):
                    return owner
        return names[0]

    def nameless(self) -> tuple[SiteKey, nn.Module]:
        """Return the key of the next product of activations in the running module."""
        frame = self._stack[-1]
        frame.nameless += 1
        return SiteKey(frame.fqn, frame.nameless), frame.module or self.model

    def admits(self, module: nn.Module, fqn: str) -> bool:
        """Whether the user's filter lets this site count."""
        if self.filter_fn is None:
            return True
        key = (id(module), fqn)
        if key not in self._filtered:
            self._filtered[key] = bool(self.filter_fn(module, fqn))
        return self._filtered[key]

    def finish_names(self, keys: Iterator[SiteKey]) -> dict[SiteKey, str]:
        """Give every key its site name; a name once given stays for the run.

        A module's only product of activations has the module's name; of several, each has its number.
        """
        keys_list = sorted(set(keys), key=lambda key: (key.owner, key.ordinal))
        taken = {key.owner for key in (*keys_list, *self._final) if key.ordinal == 0}
        several = {key.owner for key in keys_list if key.ordinal > 1}
        for key in keys_list:
            if key not in self._final:
                numbered = key.ordinal and (key.owner in taken or key.owner in several)
                base = key.owner or type(self.model).__name__
                self._final[key] = f"{base}#{key.ordinal}" if numbered else base
        return {key: self._final[key] for key in keys_list}


def _owner(module: nn.Module, fqn: str, name: str) -> Owner:
    parameter = f"{fqn}.{name}" if fqn else name
    return Owner(parameter, fqn if name == "weight" and fqn else parameter, module)


def _owners(model: nn.Module) -> Iterator[tuple[Owner, Tensor]]:
    """Every parameter with every name it has; buffers too, since some models keep frozen weights there."""
    for raw, module in model.named_modules():
        fqn = clean_fqn(raw)
        for name, parameter in (*module._parameters.items(), *module._buffers.items()):
            if isinstance(parameter, Tensor) and parameter.is_floating_point() and parameter.dim() >= 2:
                yield _owner(module, fqn, name), parameter


def named_sites(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Every site that a parameter names, with the module that holds it."""
    for owner, _ in _owners(model):
        yield owner.module, owner.site


def _is_recurrent(module: nn.Module) -> bool:
    """Whether the forward of a module is that of a recurrent layer or cell of torch, one call for all its products."""
    return isinstance(module, nn.RNNBase | nn.RNNCellBase) and type(module).forward.__module__ == nn.RNNBase.__module__


def _weights_of(module: nn.Module, *, views: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield what a module may multiply with under the name of a parameter; `views`: that stand there for one, too."""
    for name, value in (*module._parameters.items(), *(vars(module).items() if views else ())):
        if isinstance(value, Tensor) and name != _FLAT:
            yield name, value


def _holds(tensor: Tensor, key: int, offset: int) -> bool:
    """Whether an element of a storage lies in what a tensor spans of it."""
    start = tensor.storage_offset()
    return storage_key(tensor) == key and start <= offset < start + max(_extent(tensor), 1)


def fingerprint(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return every parameter's FQN and shape, as before FSDP1 has made it flat: what a plan is checked against."""
    found = {clean_fqn(name): tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for prefix, module in model.named_modules():
        flat = flat_parameter(module)
        if flat is not None:
            found.pop(clean_fqn(f"{prefix}.{_FLAT}".removeprefix(".")), None)
            names = (clean_fqn(f"{prefix}.{name}".removeprefix(".")) for name in flat._fqns)
            found.update(zip(names, map(tuple, flat._shapes), strict=True))
    return found


def flat_parameter(module: nn.Module) -> Any:
    """Return the parameter that FSDP1 has made of those of a module that it wraps; None of any other module."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", None)
    return getattr(module, _FLAT) if kind is not None and isinstance(module, kind) else None


def _extent(tensor: Tensor) -> int:
    """Elements of its storage that a tensor spans."""
    if not tensor.numel():
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def is_plain(tensor: object) -> bool:
    """Whether this is a dense floating-point tensor that can be measured."""
    return (
        isinstance(tensor, Tensor)
        and tensor.layout == torch.strided
        and tensor.is_floating_point()
        and tensor.dtype.itemsize > 1
    )
