"""What is recorded of a product's operands: statistics of all their elements, and what rounding made of those it saw.

A device is waited for once for the statistics of both operands, and once for what became of their elements.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from loka.formats import OperandSpec, Recipe, Role
from loka.probes.records import OperandRecord
from loka.quantize import saturated_share


@dataclass(slots=True)
class Counts:
    """What becomes of the elements of one operand, by recipe; zeros are counted over one in `step` of its rows.

    Counts are added up in place: small tensors that outlive the slabs would lie between them and break up the heap.
    """

    step: int = 1
    elements: int = 0
    saturated: dict[str, float] = field(default_factory=dict)  # elements
    _non_zero: Tensor | None = None
    _kept: dict[str, Tensor] = field(default_factory=dict)  # of those, elements that are still not zero

    def add(self, exact: Tensor) -> None:
        """Count a piece of the operand; once, whatever the number of recipes."""
        self.elements += exact.numel()
        count = torch.count_nonzero(exact[:, :: self.step])
        self._non_zero = count if self._non_zero is None else self._non_zero.add_(count)

    def add_rounded(
        self, recipe: Recipe, exact: Tensor, rounded: Tensor, spec: OperandSpec, amax: Tensor | None
    ) -> None:
        """Count what a recipe made of that piece."""
        count = torch.count_nonzero(rounded[:, :: self.step])
        self._kept[recipe.name] = self._kept[recipe.name].add_(count) if recipe.name in self._kept else count
        clipped = saturated_share(exact, spec, amax) * exact.numel() if recipe.saturating else 0.0
        self.saturated[recipe.name] = self.saturated.get(recipe.name, 0.0) + clipped

    def still_there(self) -> list[Tensor]:
        """Return how many elements were not zero, then how many still were not under each recipe; none where unread."""
        return [] if self._non_zero is None or not self._kept else [self._non_zero, *self._kept.values()]

    def underflow(self, still_there: Sequence[int]) -> dict[str, float]:
        """Share of the non-zero elements that became zero, by the values of `still_there`."""
        if not still_there:
            return {}
        non_zero, *kept = still_there
        return {name: 1.0 - count / non_zero if non_zero else 0.0 for name, count in zip(self._kept, kept, strict=True)}

    def saturation(self) -> dict[str, float]:
        """Share of all elements that were clipped."""
        return {name: count / max(self.elements, 1) for name, count in self.saturated.items()}


@dataclass(frozen=True, slots=True)
class Statistics:
    """Statistics over all elements of an operand; amax and rms over the finite ones."""

    amax: float
    rms: float
    zeros: float  # share
    nan: int
    inf: int
    elements: int


_EMPTY = Statistics(0.0, 0.0, 0.0, 0, 0, 0)


def records_of(
    roles: Sequence[Role], statistics: Sequence[Statistics], counts: Sequence[Counts]
) -> tuple[OperandRecord, ...]:
    """Return the records of operands; one transfer to the host."""
    tensors = [each.still_there() for each in counts]
    numbers = torch.stack([one for some in tensors for one in some]).tolist() if any(tensors) else []
    records = []
    for role, entry, count, own in zip(roles, statistics, counts, tensors, strict=True):
        values, numbers = numbers[: len(own)], numbers[len(own) :]
        records.append(
            OperandRecord(
                role=role,
                amax=entry.amax,
                rms=entry.rms,
                zeros=entry.zeros,
                nan=entry.nan,
                inf=entry.inf,
                elements=entry.elements,
                underflow=count.underflow(values),
                saturation=count.saturation(),
            )
        )
    return tuple(records)


def unmeasured(role: Role, tensor: Tensor) -> OperandRecord:
    """Record an operand of a product that is not measured: its statistics, where it has any numbers."""
    readable = tensor.dtype.itemsize > 1 and not tensor.is_meta
    statistics = statistics_of([tensor])[0] if readable else Statistics(0.0, 0.0, 0.0, 0, 0, tensor.numel())
    return records_of([role], [statistics], [Counts()])[0]


def statistics_of(tensors: Sequence[Tensor]) -> list[Statistics]:
    """Take the statistics of whole operands on one device: three passes over each, one transfer to the host."""
    ordered = [_in_memory_order(tensor.detach()) for tensor in tensors]
    taken = torch.stack([_extremes(x) for x in ordered]).tolist()
    return [_of_extremes(x, *facts) for x, facts in zip(ordered, taken, strict=True)]


def _extremes(x: Tensor) -> Tensor:
    """Return minimum, maximum, norm and number of zeros of a tensor, fp64 [4]; zeros of an empty one."""
    if not x.numel():
        return torch.zeros(4, dtype=torch.float64, device=x.device)
    low, high = torch.aminmax(x)
    norm = torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32))
    zeros = x.numel() - torch.count_nonzero(x)
    return torch.stack([low.double(), high.double(), norm.double(), zeros.double()])


def _of_extremes(x: Tensor, low: float, high: float, norm: float, zeros: float) -> Statistics:
    elements = x.numel()
    if not elements:
        return _EMPTY
    if abs(norm) < float("inf"):
        return Statistics(max(-low, high), norm / elements**0.5, zeros / elements, 0, 0, elements)
    nan, inf, kept = int(x.isnan().sum()), int(x.isinf().sum()), x[x.isfinite()].double()
    amax = float(kept.abs().max()) if kept.numel() else 0.0
    rms = float(kept.norm() / max(kept.numel(), 1) ** 0.5)
    return Statistics(amax, rms, zeros / elements, nan, inf, elements)


def _in_memory_order(x: Tensor) -> Tensor:
    """Permute the dimensions so that the largest stride comes first: reductions then read memory as it lies."""
    return x.permute(sorted(range(x.dim()), key=x.stride, reverse=True))
