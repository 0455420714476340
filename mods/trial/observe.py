"""What reads what: one pass over the inputs that says which linear reads which module's output, and what passes by.

A dispatch mode follows every tensor by its storage, through views, while hooks say which module is running. So a norm
whose output is also added to a residual stream is known to have another reader, which no look at modules alone would
tell, and a parameter that is read outside of its own module is known as well. Values are followed through a product
with something else, too: scaling a channel of `up` scales that channel of `act(gate) * up`.

What a linear got is kept as moments of all rows and as a few rows; the moments leave those rows out, so that what is
fitted to the one can be judged by the other.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from loka.mods.claims import walk
from loka.mods.scaled_norms import is_scaled_norm
from loka.mods.trial.equivalent import linears
from loka.mods.trial.wrapping import LinearWrapper

# Rows of one call of a linear that are kept: evenly spread, and the loudest; and of how many of its calls.
_SPREAD: Final[int] = 48
_LOUDEST: Final[int] = 2
_CALLS: Final[int] = 8

_aten = torch.ops.aten
# Their result is their argument, in other memory.
_COPIES: Final = frozenset({_aten.clone, _aten._to_copy, _aten.contiguous, _aten.alias, _aten.detach})
_PRODUCTS: Final = frozenset({_aten.mul})


@dataclass(eq=False, slots=True)
class Value:
    """A tensor's storage: what wrote it, and what read it."""

    number: int
    producer: nn.Module | None = None
    readers: dict[int, bool] = field(default_factory=dict)  # id of a linear -> whether it read the very output
    others: dict[str, None] = field(default_factory=dict)  # readers that are no linear, in words


@dataclass(slots=True)
class LinearTraffic:
    """What one linear got on the inputs, in fp32. Moments are empty where every row was kept."""

    calls: int = 0
    total: int = 0  # rows
    keys: list[tuple[object, ...]] = field(default_factory=list)  # of each call, equal where it got the same tensor
    values: list[Value] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)
    peaks: list[Tensor] = field(default_factory=list)  # largest magnitude of each row, call by call
    amax: Tensor | None = None  # of each feature
    weight_of_rows: float = 0.0
    energy_sum: Tensor | None = None
    covariance_sum: Tensor | None = None

    @property
    def rows(self) -> Tensor:
        """Return the rows that were kept, [rows, k]."""
        return torch.cat(self.kept).float()

    @property
    def energy(self) -> Tensor:
        """Return the mean square of each feature [k], where rows count by the inverse square of their output."""
        assert self.energy_sum is not None
        return self.energy_sum / max(self.weight_of_rows, 1e-30)

    @property
    def covariance(self) -> Tensor | None:
        """Return the second moments [k, k], weighted likewise, where they were asked for."""
        return None if self.covariance_sum is None else self.covariance_sum / max(self.weight_of_rows, 1e-30)


@dataclass(slots=True)
class Traffic:
    """Everything that was seen on the inputs, by the id of a module."""

    linears: dict[int, LinearTraffic] = field(default_factory=dict)
    outputs: defaultdict[int, list[Value]] = field(default_factory=lambda: defaultdict(list))
    foreign: dict[int, str] = field(default_factory=dict)  # who else read a module's parameters
    order: list[int] = field(default_factory=list)  # ids of linears, in the order of their first calls

    def of(self, linear: nn.Module) -> LinearTraffic | None:
        """Return what a linear got; None where it was not called, or with no row."""
        seen = self.linears.get(id(linear))
        return seen if seen is not None and seen.total else None

    def measured(self, linear: nn.Module) -> LinearTraffic | None:
        """Return what a linear got, if rows of it were kept."""
        seen = self.linears.get(id(linear))
        return seen if seen is not None and seen.kept else None

    def readers(self, producer: nn.Module, *, exact: bool) -> tuple[list[int], str]:
        """Return the ids of the linears that read a module's output, and nothing else does, or why not, in words.

        `exact`: each has to read the very output, and not a product with it.
        """
        values = self.outputs.get(id(producer), [])
        if not values:
            return [], "it was not called on the inputs"
        found: dict[int, bool] = {}
        for value in values:
            for reader, direct in value.readers.items():
                found[reader] = direct and found.get(reader, True)
        for value in values:
            if value.others:
                return [], f"its output is also read by {next(iter(value.others))}"
            if set(value.readers) != set(found):
                return [], "its output has other readers from call to call"
        if not found:
            return [], "no linear reads its output"
        if exact and not all(found.values()):
            return [], "its output is multiplied with something else before a linear reads it"
        for reader in found:
            if any(value.producer is not producer for value in self.linears[reader].values):
                return [], "a linear behind it also reads other modules' outputs"
        return list(found), ""


class Observer(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch does not annotate it
    """Fills a `Traffic` while it is active around forward passes of a model."""

    def __init__(self, model: nn.Module, measured: Iterable[nn.Linear], *, covariance: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch does not annotate it
        self.traffic = Traffic()
        self.covariance = covariance
        self._measured = {id(linear) for linear in measured}
        self._names = {id(module): fqn for fqn, module in reversed(list(walk(model)))}
        self._modules = {id(module): module for module in model.modules()}
        self._linears = {id(module) for module in linears(model).values()}
        self._sources = self._linears | {id(module) for module in model.modules() if is_scaled_norm(module)}
        self._values: dict[int, tuple[StorageWeakRef, Value]] = {}
        self._owners: dict[int, set[int]] = {}
        for module in model.modules():
            for parameter in module._parameters.values():
                if parameter is not None and type(parameter) is nn.Parameter:
                    self._owners.setdefault(parameter.untyped_storage()._cdata, set()).add(id(module))
        self._stack: list[int] = []
        self._products: set[int] = set()  # storages of products with a value
        self._count = 0
        self._own = False  # while the observer itself computes

    # --- modules ---

    def watch(self, forward: Callable[[], object]) -> object:
        """Run one forward pass under observation; return what the model returned."""
        handles: list[Any] = []
        try:
            for module in self._modules.values():
                handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
                handles.append(module.register_forward_hook(self._leave, with_kwargs=True, always_call=True))
            self._stack.clear()
            with self:
                output = forward()
        finally:
            for handle in handles:
                handle.remove()
        for tensor in tensors_in(output):
            value = self._value_of(tensor) if _followed(tensor) else None
            if value is not None:
                value.others["the model's caller"] = None
        return output

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._stack.append(id(module))
        x = _argument(args, kwargs)
        if id(module) not in self._linears or x is None:
            return
        value = self._value_of(x, make=True)
        seen = self.traffic.linears.setdefault(id(module), LinearTraffic())
        if not seen.calls:
            self.traffic.order.append(id(module))
        seen.calls += 1
        seen.total += x.numel() // max(x.shape[-1], 1)
        seen.keys.append((value.number, x.storage_offset(), tuple(x.shape), x.stride(), x.dtype, _version(x)))
        seen.values.append(value)
        features = _features_of(value.producer)
        if features is None or (x.shape[-1] == features and x.stride(-1) == 1):
            value.readers[id(module)] = value.readers.get(id(module), True) and not self._is_product(x)
        else:
            value.others[f"{self._name(id(module))} in another shape"] = None

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._stack and self._stack[-1] == id(module):
            self._stack.pop()
        x = _argument(args, kwargs)
        if id(module) in self._measured and x is not None and isinstance(output, Tensor) and x.numel():
            self._own = True
            try:
                self._measure(cast(nn.Linear, module), x.detach(), output.detach())
            finally:
                self._own = False
        if id(module) in self._sources and isinstance(output, Tensor) and _followed(output):
            value = self._value_of(output, make=True, fresh=True)
            value.producer = module
            self.traffic.outputs[id(module)].append(value)

    def _measure(self, module: nn.Linear, x: Tensor, output: Tensor) -> None:
        seen = self.traffic.linears[id(module)]
        x = x.reshape(-1, x.shape[-1]).float()
        y = output.reshape(-1, output.shape[-1]).float()
        y = y if module.bias is None else y - module.bias.detach().float()
        rows = x.shape[0]
        magnitude = x.abs()
        amax, peak = magnitude.amax(0), magnitude.amax(1)
        seen.peaks.append(peak)
        seen.amax = amax if seen.amax is None else torch.maximum(seen.amax, amax)
        spread = torch.linspace(0, rows - 1, min(_SPREAD, (rows + 1) // 2), dtype=torch.float32, device=x.device)
        chosen = torch.cat([spread.long(), peak.topk(min(_LOUDEST, rows)).indices])
        chosen = torch.unique(chosen)
        keep = len(seen.kept) < _CALLS
        if keep:
            seen.kept.append(x[chosen])
        square = y.square().mean(1)
        weights = torch.where((square > 0) & square.isfinite(), square.clamp_min(1e-30).reciprocal(), 0.0)
        if keep and rows > 2 * len(chosen):
            weights[chosen] = 0
        weights = weights / weights.max().clamp_min(1e-30)
        energy = weights @ x.square()
        seen.weight_of_rows += float(weights.sum())
        seen.energy_sum = energy if seen.energy_sum is None else seen.energy_sum + energy
        if self.covariance:
            moments = x.t() @ (x * weights.unsqueeze(1))
            seen.covariance_sum = moments if seen.covariance_sum is None else seen.covariance_sum + moments

    # --- tensors ---

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._own:
            return result
        results = {tensor.untyped_storage()._cdata for tensor in tensors_in(result) if _followed(tensor)}
        changes = func._schema.is_mutable
        for tensor in tensors_in((args, kwargs)):
            if _followed(tensor):
                self._read(func, tensor, result, views=not changes and tensor.untyped_storage()._cdata in results)
        return result

    def _read(self, func: Any, tensor: Tensor, result: Any, *, views: bool) -> None:
        """Note that an operation read a tensor."""
        top = self._stack[-1] if self._stack else 0
        owners = self._owners.get(tensor.untyped_storage()._cdata)
        if owners is not None:
            # A wrapper that reads what it wraps follows it when that is rewritten in turn.
            known = owners.intersection(self._stack) or isinstance(self._modules.get(top), LinearWrapper)
            if not views and not known:
                for owner in owners:
                    self.traffic.foreign.setdefault(owner, self._name(top))
            return
        value = self._value_of(tensor)
        if value is None or views:
            return
        if top in self._linears and top in value.readers:
            return  # the product itself
        packet = func._overloadpacket
        if isinstance(result, Tensor) and result.shape == tensor.shape and not func._schema.is_mutable:
            if packet in _COPIES:
                self._follow(result, value, product=self._is_product(tensor))
                return
            if packet in _PRODUCTS and self._value_of(result) is None:
                self._follow(result, value, product=True)
                return
        value.others[f"{packet.__name__} in {self._name(top)}"] = None

    def _follow(self, result: Tensor, value: Value, *, product: bool) -> None:
        storage = result.untyped_storage()
        reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]  # torch does not annotate it
        self._values[storage._cdata] = (reference, value)
        if product:
            self._products.add(storage._cdata)
        else:
            self._products.discard(storage._cdata)

    def _is_product(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._products

    def _value_of(self, tensor: Tensor, *, make: bool = False, fresh: bool = False) -> Any:
        """Return the value of a tensor's storage; a weak reference keeps another storage from taking its address."""
        storage = tensor.untyped_storage()
        known = None if fresh else self._values.get(storage._cdata)
        if known is not None:
            return known[1]
        if not make:
            return None
        self._count += 1
        value = Value(number=self._count)
        self._follow(tensor, value, product=False)
        return value

    def _name(self, module: int) -> str:
        fqn = self._names.get(module)
        return "code outside of the model" if fqn is None else repr(fqn) if fqn else "the model's own forward"


def tensors_in(value: object) -> Iterator[Tensor]:
    """Yield the tensors of nested tuples, lists, mappings and dataclass-like outputs."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for item in value:
            yield from tensors_in(item)
    elif hasattr(value, "__dataclass_fields__"):
        for name in cast(Iterable[str], value.__dataclass_fields__):
            yield from tensors_in(getattr(value, name))


def _followed(tensor: Tensor) -> bool:
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.is_meta:
        return False
    # Under a transform of torch.func it stands for others, and has no storage.
    return not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    x = args[0] if args else kwargs.get("input")
    return x if isinstance(x, Tensor) and _followed(x) and x.dim() > 0 else None


def _features_of(producer: nn.Module | None) -> int | None:
    if producer is None:
        return None
    weight = producer._parameters.get("weight")
    return None if weight is None else int(weight.shape[0])


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
