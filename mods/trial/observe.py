"""What reads what: one pass over the inputs that says which linear reads which module's output, and what passes by.

A dispatch mode shows every operator to what follows values (`loka.value_flow`), while hooks say which module runs. A
parameter that is read outside of its own module is known as well.

What a linear got is kept as moments of all rows and as a few rows; the moments leave those rows out, so that what is
fitted to the one can be judged by the other.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from loka.mods.claims import walk
from loka.mods.trial.equivalent import linears
from loka.mods.trial.wrapping import LinearWrapper
from loka.scaled_norms import is_scaled_norm
from loka.value_flow import ValueFlow, argument_of, read_by

# Rows of one call of a linear that are kept: evenly spread, and the loudest; and of how many of its calls.
_SPREAD: Final[int] = 48
_LOUDEST: Final[int] = 2
_CALLS: Final[int] = 8


@dataclass(slots=True)
class LinearTraffic:
    """What one linear got on the inputs, in fp32. Moments are empty where every row was kept."""

    calls: int = 0
    total: int = 0  # rows
    keys: list[tuple[object, ...]] = field(default_factory=list)  # of each call, equal where it got the same tensor
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

    flow: ValueFlow
    linears: dict[int, LinearTraffic] = field(default_factory=dict)
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
        return self.flow.readers(id(producer), exact=exact)

    def reached(self, producer: nn.Module) -> set[int]:
        """Return the ids of all linears that read a module's output, whoever else does."""
        return self.flow.reached(id(producer))


class Observer(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch does not annotate it
    """Fills a `Traffic` while it is active around forward passes of a model."""

    def __init__(self, model: nn.Module, measured: Iterable[nn.Linear], *, covariance: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch does not annotate it
        stock = {id(module) for module in linears(model).values()}
        norms = {id(module) for module in model.modules() if is_scaled_norm(module)}
        names = {id(module): fqn for fqn, module in reversed(list(walk(model)))}
        self.flow = ValueFlow(names=names, linears=stock, sources=stock | norms)
        self.traffic = Traffic(self.flow)
        self.covariance = covariance
        self._measured = {id(linear) for linear in measured}
        self._modules = {id(module): module for module in model.modules()}
        self._owners: dict[int, set[int]] = {}
        for module in model.modules():
            for parameter in module._parameters.values():
                if parameter is not None and type(parameter) is nn.Parameter:
                    self._owners.setdefault(parameter.untyped_storage()._cdata, set()).add(id(module))
        self._own = False  # while the observer itself computes

    # --- modules ---

    def watch(self, forward: Callable[[], object]) -> object:
        """Run one forward pass under observation; return what the model returned."""
        handles: list[Any] = []
        try:
            for module in self._modules.values():
                handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
                handles.append(module.register_forward_hook(self._leave, with_kwargs=True, always_call=True))
            self.flow.stack.clear()
            with self:
                output = forward()
        finally:
            for handle in handles:
                handle.remove()
        self.flow.returned(output)
        return output

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = argument_of(args, kwargs)
        value = self.flow.entered(module, x)
        if value is None or x is None:
            return
        seen = self.traffic.linears.setdefault(id(module), LinearTraffic())
        if not seen.calls:
            self.traffic.order.append(id(module))
        seen.calls += 1
        seen.total += x.numel() // max(x.shape[-1], 1)
        seen.keys.append((value.number, x.storage_offset(), tuple(x.shape), x.stride(), x.dtype, _version(x)))

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x = argument_of(args, kwargs)
        if id(module) in self._measured and x is not None and isinstance(output, Tensor) and x.numel():
            self._own = True
            try:
                self._measure(cast(nn.Linear, module), x.detach(), output.detach())
            finally:
                self._own = False
        self.flow.left(module, output)

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
        for tensor, views in read_by(func, args, kwargs, result):
            self._read(func, tensor, result, views=views)
        return result

    def _read(self, func: Any, tensor: Tensor, result: Any, *, views: bool) -> None:
        """Note that an operation read a tensor."""
        owners = self._owners.get(tensor.untyped_storage()._cdata)
        if owners is None:
            self.flow.ran(func, tensor, result, views=views)
            return
        top = self.flow.stack[-1] if self.flow.stack else 0
        # A wrapper that reads what it wraps follows it when that is rewritten in turn.
        known = owners.intersection(self.flow.stack) or isinstance(self._modules.get(top), LinearWrapper)
        if not views and not known:
            for owner in owners:
                self.traffic.foreign.setdefault(owner, self.flow.name(top))


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
