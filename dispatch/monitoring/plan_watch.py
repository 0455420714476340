"""The watch over a plan's products: it chooses what is measured, reads what was, and changes kernels."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import nn

from loka.dispatch.deciding.plan import Plan
from loka.dispatch.monitoring.effect import put_into_effect
from loka.dispatch.monitoring.guard import Guard, Key, Patience
from loka.dispatch.monitoring.kernel_check import Finding, KernelCheck
from loka.dispatch.monitoring.ladder import ladders
from loka.dispatch.monitoring.team_watch import Shown, Team, reading_of, together
from loka.dispatch.running.linear import HIGH_PRECISION, quarantine
from loka.dispatch.running.routing import device_of
from loka.errors import KernelError
from loka.formats import Pass, Recipe, recipe
from loka.hardware import device_info
from loka.kernel_registry.registry import default_registry
from loka.probes.capturing.products import Gemm
from loka.probes.records import Event, StepRecord

log: Final = logging.getLogger("loka.monitor")


@dataclass(slots=True)
class PlanWatch:
    """A `loka.probes.sampling.watch.Watch`: a guard per product that the plan runs in FP8. `tell` takes every event."""

    model: nn.Module
    plan: Plan
    patience: Patience
    team: Team
    tell: Callable[[Event], None]
    guards: dict[Key, Guard] = field(init=False)
    products: int = 0  # readings of products taken so far
    urgent: bool = False  # gradients were not finite: every kernel is to be tried
    device: torch.device = field(init=False)
    can_fail: bool = field(init=False)  # whether any product runs on a kernel that may be out of order
    _check: KernelCheck = field(default_factory=KernelCheck)
    _findings: list[Finding] = field(default_factory=list)
    _told: set[str] = field(default_factory=set)  # kernels of which faults and remarks have been told

    def __post_init__(self) -> None:
        self.device = device_of(self.model)
        found = (Guard(ladder, self.patience) for ladder in ladders(self.plan, device_info(self.device)))
        self.guards = {guard.key: guard for guard in found}
        self._note_kernels()

    def _note_kernels(self) -> None:
        """Take note of whether a kernel is in use that is not the definition of its recipe."""
        names = {name for guard in self.guards.values() for name in guard.rung.kernels} - {HIGH_PRECISION}
        self.can_fail = any(default_registry().get(name).library != "emulated" for name in names)

    # --- what a sample asks and shows ---

    def recipes(self, site: str, product: Pass) -> Sequence[Recipe]:
        """Return the recipes that the guard of a product wants to see; none where it has none."""
        guard = self.guards.get((site, product))
        return () if guard is None else [recipe(name) for name in guard.wanted]

    def waits_for(self, site: str, product: Pass) -> bool:
        """Have a product that is under suspicion measured in every sample until that is settled."""
        guard = self.guards.get((site, product))
        return guard is not None and guard.suspects

    def asks(self) -> bool:
        """Have the next step sampled where this process decides alone; ranks go by the schedule that they share."""
        return self.urgent and self.team.group is None

    def look(self, site: str, product: Pass, gemm: Gemm) -> None:
        """Try the kernel in use on the operands of this step."""
        guard = self.guards[site, product]
        finding = self._check.look(guard.ladder, guard.rung, gemm)
        if finding is not None:
            self._findings.append(finding)

    def agrees(self, *, allowed: bool, leaving: str) -> tuple[bool, str]:
        """Take a sample where all ranks can afford it; end where one of them ends."""
        return self.team.agree(allowed=allowed, leaving=leaving)

    def sampled(self, record: StepRecord | None) -> None:
        """Read what a sample has shown on all ranks, and act on it; where it failed on one of them, none does."""
        self.urgent = False
        failure: Exception | None = None
        message: dict[str, Any] = {"failed": True}
        try:
            if record is not None:
                message = self._shown(record).message()
        except Exception as error:  # noqa: BLE001 - raised below, once the other ranks know and do not wait for ever
            failure = error
        self._findings = []
        messages = self.team.tell(message)
        if failure is not None:
            raise failure
        if messages and not any("failed" in each for each in messages):
            self._act(together(messages))

    def _act(self, shown: Shown) -> None:
        """Put a step's readings before the guards, and what they decide into effect."""
        before = {key: guard.rung for key, guard in self.guards.items()}
        self._take_faults(shown)
        for key, guard in self.guards.items():
            if key in shown.readings:
                self.products += 1
                for event in guard.saw(shown.step, shown.readings[key]):
                    self.tell(event)
        changes = {key: guard.rung.kernel for key, guard in self.guards.items() if guard.rung is not before[key]}
        if changes:
            put_into_effect(self.model, self.plan, changes)
            self._note_kernels()

    def _shown(self, record: StepRecord) -> Shown:
        """Return what this rank has to tell."""
        shown = Shown(record.step)
        for product in record.products:
            guard = self.guards.get((product.site, product.product))
            if guard is not None and product.errors:
                shown.readings[guard.key] = reading_of(guard, product)
        for finding in self._findings:
            kind = shown.faults if finding.fatal else shown.remarks
            kind.setdefault(finding.kernel, finding.words)
        for kernel in self._in_use():
            reason = self._out_of_use(kernel)
            if reason is not None:
                shown.faults.setdefault(kernel, f"{kernel} is out of use: {reason}")
        return shown

    # --- kernels that do not work ---

    def _take_faults(self, shown: Shown) -> None:
        for kernel, words in sorted(shown.faults.items()):
            if kernel not in self._told:
                self._told.add(kernel)
                self.tell(Event(step=shown.step, kind="kernel_fault", message=words))
                if self._out_of_use(kernel) is None:
                    quarantine(kernel, self.device, KernelError(words))
            for guard in self.guards.values():
                for event in guard.fault(shown.step, kernel, words):
                    self.tell(event)
        for kernel, words in sorted(shown.remarks.items()):
            if kernel not in self._told:
                self._told.add(kernel)
                self.tell(Event(step=shown.step, kind="kernel_differs", message=words))

    def _in_use(self) -> list[str]:
        """Return the kernels that products run on, or may come to run on."""
        names = {kernel for guard in self.guards.values() for rung in guard.ladder.rungs for kernel in rung.kernels}
        return sorted(names - {HIGH_PRECISION} - self._told)

    def _out_of_use(self, kernel: str) -> str | None:
        """Return why a kernel cannot be used any more; it could when the watch began."""
        registry = default_registry()
        return registry.unavailable(registry.get(kernel), device_info(self.device))

    def state(self) -> dict[str, str]:
        """Return what has changed: product -> the kernel that it runs on instead of the planned one."""
        return {guard.name: guard.rung.words for guard in self.guards.values() if guard.position}

    def worst(self) -> tuple[str, float]:
        """Return the product that was last closest to its limit, and its error as a share of that."""
        known = [(guard.test.last, guard.name) for guard in self.guards.values() if not math.isnan(guard.test.last)]
        return (max(known)[1], max(known)[0]) if known else ("", math.nan)
