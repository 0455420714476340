"""What ranks tell each other at monitored steps: each sends what it has read, all reach the same conclusions.

Everything is a collective over the job's group, in the same order on every rank: one when a monitored step is due, one
when it is over. A rank on which something fails still takes part, and says so; one that leaves by an exception does
not, since the others will not come. Messages are JSON.
"""

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Final

import torch.distributed as dist
from torch import nn

from loka.dispatch.monitoring.guard import Guard, Key, Operand, Reading
from loka.probes.distributions.gather import gather_bytes
from loka.probes.records import ProductRecord

log: Final = logging.getLogger("loka.monitor")

_UNEVEN: Final = (
    "ranks inside torch's Join may take different numbers of steps, and would wait for each other's readings for ever; "
    "monitor there without process_group=, each rank for itself"
)


@dataclass(slots=True)
class Team:
    """The ranks that monitor together; without a group, this process alone."""

    group: "dist.ProcessGroup | None" = None
    root: nn.Module | None = None  # what the training loop calls
    lost: str = ""  # why this process is on its own from here on

    @property
    def leads(self) -> bool:
        """Whether this is the rank that writes."""
        return self.group is None or dist.get_rank(self.group) == 0

    def agree(self, *, allowed: bool, leaving: str) -> tuple[bool, str]:
        """Return whether all ranks allow a sample, and why any of them leaves, "" where none does."""
        if self.group is not None and _takes_uneven_inputs(self.root):
            self.leave(_UNEVEN)
        told = self._exchange({"allowed": allowed, "leaving": leaving})
        if told is None:
            return False, self.lost
        left = [
            f"rank {rank}: {each['leaving']}" if self.group is not None else str(each["leaving"])
            for rank, each in enumerate(told)
            if each["leaving"]
        ]
        return all(each["allowed"] for each in told), left[0] if left else ""

    def tell(self, message: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return what all ranks tell, in rank order; nothing where they are lost."""
        return self._exchange(message) or []

    def leave(self, why: str = "this process has left its training loop by an exception") -> None:
        """Take part no more: what would be waited for does not come."""
        self.lost = self.lost or why

    def _exchange(self, message: Mapping[str, Any]) -> list[dict[str, Any]] | None:
        if self.lost:
            return None
        if self.group is None:
            return [dict(message)]
        try:
            return [json.loads(each) for each in gather_bytes(json.dumps(message).encode(), self.group)]
        except RuntimeError as error:
            self.lost = f"the other ranks cannot be reached ({str(error).splitlines()[0]})"
            return None


def _takes_uneven_inputs(root: nn.Module | None) -> bool:
    """Whether ranks take different numbers of steps, and those that are done take part in what DDP does in others."""
    config = (getattr(module, "_join_config", None) for module in (() if root is None else root.modules()))
    return any(getattr(each, "enable", False) for each in config)


@dataclass(slots=True)
class Shown:
    """What one monitored step has shown, on this rank or on all of them."""

    step: int
    readings: dict[Key, Reading] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)  # kernel -> what is wrong with it
    remarks: dict[str, str] = field(default_factory=dict)  # kernel -> how it differs from its definition

    def message(self) -> dict[str, Any]:
        """Return it as plain data."""
        readings = [
            {
                "site": site,
                "product": product,
                "errors": dict(reading.errors),
                "operands": {role: [each.amax, dict(each.underflow)] for role, each in reading.operands.items()},
                "alignment": reading.alignment,
            }
            for (site, product), reading in self.readings.items()
        ]
        return {"step": self.step, "readings": readings, "faults": self.faults, "remarks": self.remarks}


def reading_of(guard: Guard, record: ProductRecord) -> Reading:
    """Return what a guard is to see of a sampled product."""
    return Reading(
        errors={name: error.gated(guard.ladder.gate) for name, error in record.errors.items()},
        operands={each.role: Operand(amax=each.amax, underflow=each.underflow) for each in record.operands},
        alignment=record.alignment,
    )


def together(messages: Sequence[Mapping[str, Any]]) -> Shown:
    """Return what all ranks have shown as one: errors, shares and alignment averaged, the largest of the largest."""
    shown = Shown(max(each["step"] for each in messages))
    parts: dict[Key, list[Mapping[str, Any]]] = {}
    for message in messages:
        shown.faults = {**message["faults"], **shown.faults}
        shown.remarks = {**message["remarks"], **shown.remarks}
        for reading in message["readings"]:
            parts.setdefault((reading["site"], reading["product"]), []).append(reading)
    shown.readings = {key: _merged(found) for key, found in parts.items()}
    return shown


def _merged(found: Sequence[Mapping[str, Any]]) -> Reading:
    roles = dict.fromkeys(role for each in found for role in each["operands"])
    operands = {}
    for role in roles:
        entries = [each["operands"][role] for each in found if role in each["operands"]]
        operands[role] = Operand(amax=max(amax for amax, _ in entries), underflow=_means(one for _, one in entries))
    alignments = [each["alignment"] for each in found if not math.isnan(each["alignment"])]
    return Reading(
        errors=_means(each["errors"] for each in found),
        operands=operands,
        alignment=fmean(alignments) if alignments else math.nan,
    )


def _means(found: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Average by name over those that have it; NaN is no value."""
    values: dict[str, list[float]] = {}
    for each in found:
        for name, value in each.items():
            if not math.isnan(value):
                values.setdefault(name, []).append(value)
    return {name: fmean(some) for name, some in values.items()}
