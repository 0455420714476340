"""Training dynamics: what ruins FP8 before any product shows it, taken of modules on sampled steps.

Three hazards, as the LoKA paper names them: biases that never settle, means that a norm subtracts from rows which are
little else, and the exponential of Swish, which turns small entries into tiny ones. So of every bias its size, of every
norm what its input looks like, of every Swish how much of its input lies where the exponential rules and what that
costs; and of norms and activations also which products read their output, by the identity of its memory.

Modules are seen as they run, on a few rows and all columns. A functional call is no module: it is not seen here, and
the mods do not replace it either.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from loka.formats import RECIPES
from loka.naming import class_name, clean_fqn
from loka.probes.capturing.sites import SiteKey
from loka.probes.capturing.storage import hold, stands_for_many, storage_key
from loka.probes.records import DynamicsKind, DynamicsRecord
from loka.quantize import fake_quantize

# Rows of an input that are looked at, all columns of each; fewer where they are wide.
_MOST_ROWS: Final[int] = 32
_FEWEST_ROWS: Final[int] = 4
_ELEMENTS: Final[int] = 1 << 14
# Of all that a probe spends, dynamics may take this share; a step that finds more spent leaves them out.
SHARE: Final[float] = 0.1
# Below this input Swish is all exponential, and HardSwish is zero.
STRETCH: Final[float] = -3.0
# Norms over the batch or over groups of channels have other statistics than those of a row.
_OTHER_NORMS: Final[tuple[str, ...]] = ("batch", "instance", "group", "response", "weight", "spectral")
_SWISHES: Final[tuple[str, ...]] = ("silu", "swish")
# What an activation's output goes through next: a scale per row, as the most widely supported careful recipe has.
_SPEC: Final = RECIPES["rowwise"].operand("input")
# What is known of each kind: fields of a DynamicsRecord.
QUANTITIES: Final[dict[DynamicsKind, tuple[str, ...]]] = {
    "bias": ("norm", "amax"),
    "norm": ("cancellation", "crest"),
    "activation": ("crest", "stretched", "output_crest", "underflow", "hard_underflow"),
}


def kind_of(module: nn.Module) -> DynamicsKind | None:
    """Return what a module is to the dynamics: a norm over features, a Swish without parameters, or nothing."""
    name = class_name(module).lower()
    if module._modules:
        return None
    if any(word in name for word in _SWISHES):
        return None if "hard" in name or module._parameters else "activation"
    return "norm" if "norm" in name and not any(word in name for word in _OTHER_NORMS) else None


def watched_modules(model: nn.Module) -> dict[int, tuple[str, DynamicsKind]]:
    """Return the FQN and kind of every module that is looked at, by its id."""
    named = ((clean_fqn(raw), module, kind_of(module)) for raw, module in model.named_modules())
    return {id(module): (name, kind) for name, module, kind in named if name and kind is not None}


@dataclass(slots=True)
class _Found:
    """One module in one step; `values` [quantities] stay on their device until the step is over."""

    kind: DynamicsKind
    module: nn.Module
    values: Tensor
    feeds: dict[SiteKey, None] = field(default_factory=dict)


@dataclass(slots=True)
class DynamicsMeter:
    """Collects what one step shows of the `watched` modules; `spent_s` is the time that it took, told from outside."""

    watched: Mapping[int, tuple[str, DynamicsKind]]
    biases: bool = True  # whether this process reads them; of replicated ones, one process' are all there is to know
    spent_s: float = 0.0
    _found: dict[str, _Found] = field(default_factory=dict)
    _outputs: dict[int, tuple[str, StorageWeakRef]] = field(default_factory=dict)

    def entered(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A module's forward begins: look at its input, the first time in a step; a Swish may work in place."""
        name, kind = self.watched[id(module)]
        if name in self._found or not args or not _is_readable(args[0]) or not _is_of_features(module, args[0]):
            return
        rows = _sampled(args[0], len(getattr(module, "normalized_shape", (0,))))
        values = _norm_values(rows) if kind == "norm" else _activation_values(rows)
        self._found[name] = _Found(kind, module, values)

    def left(self, module: nn.Module, output: Any) -> None:
        """A module's forward ended: remember where its output lies."""
        name, _ = self.watched[id(module)]
        if name in self._found and isinstance(output, Tensor) and (key := storage_key(output)):
            self._outputs[key] = name, hold(output)

    def copied(self, copy: Tensor, original: Tensor) -> None:
        """Remember that `copy` holds the same values, in another precision or layout."""
        known = self._outputs.get(storage_key(original))
        if known is not None and (key := storage_key(copy)):
            self._outputs[key] = known[0], hold(copy)

    def consumed(self, site: SiteKey, operand: Tensor) -> None:
        """A forward product reads this operand: whose output is it?"""
        known = self._outputs.get(storage_key(operand)) if self._outputs else None
        if known is not None:
            self._found[known[0]].feeds[site] = None

    def finish(self, model: nn.Module, sites: Mapping[SiteKey, str]) -> tuple[DynamicsRecord, ...]:
        """Return everything seen, and the biases as they are now; `sites` are the final names."""
        values = _to_host([found.values for found in self._found.values()])
        records = [
            DynamicsRecord(
                name=name,
                kind=found.kind,
                module=class_name(found.module),
                parameters=tuple(key for key, value in found.module._parameters.items() if value is not None),
                feeds=tuple(sites[site] for site in found.feeds if site in sites),
                **dict(zip(QUANTITIES[found.kind], numbers, strict=True)),
            )
            for (name, found), numbers in zip(self._found.items(), values, strict=True)
        ]
        records += _bias_records(model) if self.biases else ()
        return tuple(records)


# --- inputs of modules ---


def _is_readable(x: object) -> bool:
    if not isinstance(x, Tensor) or type(x) not in (Tensor, nn.Parameter) or x.layout != torch.strided:
        return False
    if stands_for_many(x):
        return False
    return x.is_floating_point() and x.dtype.itemsize > 1 and not x.is_meta and x.numel() > 0


def _is_of_features(module: nn.Module, x: Tensor) -> bool:
    """Whether the last dimension is what a module scales: some norms take the channels of an image, that come first."""
    weight = module._parameters.get("weight")
    return weight is None or weight.dim() != 1 or weight.shape[0] == x.shape[-1]


def _sampled(x: Tensor, dims: int) -> Tensor:
    """Return rows [r, features] fp64, evenly spread over all that the last `dims` dimensions (1 for 0) are a row of."""
    dims = min(max(dims, 1), x.dim())
    lead = x.shape[: x.dim() - dims] or torch.Size((1,))
    x = x.detach().reshape(lead + x.shape[x.dim() - dims :]) if x.dim() == dims else x.detach()
    total, features = math.prod(lead), math.prod(x.shape[len(lead) :])
    count = min(total, max(_FEWEST_ROWS, min(_MOST_ROWS, _ELEMENTS // max(features, 1))))
    index, places = torch.arange(count, device=x.device) * total // count, []
    for extent in reversed(lead):
        places.append(index % extent)
        index = index // extent
    return x[tuple(reversed(places))].flatten(1).double()


def _crest(rows: Tensor) -> Tensor:
    """Return the mean over rows of amax / rms; rows of zeros, and those that are not finite, do not count."""
    return (rows.abs().amax(1) / rows.square().mean(1).sqrt()).nanmean()


def _norm_values(rows: Tensor) -> Tensor:
    cancellation = (rows.mean(1).abs() / rows.square().mean(1).sqrt()).nanmean()
    return torch.stack([cancellation, _crest(rows)])


def _activation_values(rows: Tensor) -> Tensor:
    """Compare what Swish and HardSwish make of the same rows."""
    rows = rows.float()
    soft = F.silu(rows)
    stretched = (rows < STRETCH).float().mean()
    underflows = [_underflow(output) for output in (soft, F.hardswish(rows))]
    return torch.stack([_crest(rows), stretched, _crest(soft), *underflows])


def _underflow(x: Tensor) -> Tensor:
    """Return the share of the non-zero elements that a row-wise cast turns into zero; NaN where all are zero."""
    some = torch.count_nonzero(x)
    return 1 - torch.count_nonzero(fake_quantize(x, _SPEC)) / some


def _to_host(values: list[Tensor]) -> list[list[float]]:
    """Return small vectors of several lengths as numbers: one transfer per device."""
    result: list[list[float]] = [[] for _ in values]
    by_device: defaultdict[torch.device, list[int]] = defaultdict(list)
    for position, vector in enumerate(values):
        by_device[vector.device].append(position)
    for positions in by_device.values():
        numbers = iter(torch.cat([values[position].double() for position in positions]).tolist())
        for position in positions:
            result[position] = [next(numbers) for _ in range(values[position].numel())]
    return result


# --- biases ---


def _biases(model: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Yield every bias that lies whole in this process; a shard's norm would be another's."""
    for raw, module in model.named_modules():
        for key, value in module._parameters.items():
            if value is not None and "bias" in key.split("_") and _is_readable(value):
                yield clean_fqn(f"{raw}.{key}" if raw else key), module, value.detach()


def _bias_records(model: nn.Module) -> Iterable[DynamicsRecord]:
    found = list(_biases(model))
    by_device: defaultdict[torch.device, list[int]] = defaultdict(list)
    for position, (_, _, bias) in enumerate(found):
        by_device[bias.device].append(position)
    sizes: dict[int, tuple[float, float]] = {}
    for positions in by_device.values():
        tensors = [found[position][2] for position in positions]
        norms, amaxes = (
            torch.stack(torch._foreach_norm(tensors, order, dtype=torch.float64)).tolist() for order in (2, math.inf)
        )
        sizes.update(zip(positions, zip(norms, amaxes, strict=True), strict=True))
    for position, (name, module, _) in enumerate(found):
        norm, amax = sizes[position]
        yield DynamicsRecord(name=name, kind="bias", module=class_name(module), norm=norm, amax=amax)
