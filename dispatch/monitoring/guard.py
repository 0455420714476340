"""What becomes of one monitored product: the sequential test on its error, and the moves up and down its ladder.

Down at an alarm of the test, and where an operand has jumped and the error is beyond its limit with it: to the next
rung whose recipe is within its limit on the operands of this very step. Down at a fault of a kernel, too. Up again, to
the highest rung that has shown so many clean monitored steps in a row, and only so often.

Nothing here refers to a tensor, a clock or a process: ranks that see the same readings move alike.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from loka.dispatch.monitoring.ladder import Ladder, Rung
from loka.dispatch.monitoring.sequential import Jumps, LimitTest
from loka.formats import PASSES, Pass, Role
from loka.probes.records import Event

# A step is clean for a recipe where its error is at most this share of its limit: what is at the limit moves no one up.
CLEAN: Final[float] = 0.9
Key = tuple[str, Pass]


@dataclass(frozen=True, kw_only=True, slots=True)
class Operand:
    """One operand in one monitored step: its largest value, and by recipe the share that rounds to zero."""

    amax: float
    underflow: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """One product in one monitored step, all ranks together; errors by recipe, each the one that is limited."""

    errors: Mapping[str, float]
    operands: Mapping[Role, Operand]
    alignment: float = math.nan


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """Hysteresis: clean monitored steps in a row before a product moves up again, and how often it may at most."""

    clean_steps: int
    max_flips: int


@dataclass(slots=True)
class Guard:
    """The state of one (site, pass). `position` is the rung it is on, 0 the planned one."""

    ladder: Ladder
    patience: Patience
    position: int = 0
    flips: int = 0
    test: LimitTest = field(default_factory=LimitTest)
    _jumps: dict[Role, Jumps] = field(default_factory=dict)
    _clean: dict[int, int] = field(default_factory=dict)  # rung -> clean steps in a row
    _dead: dict[str, str] = field(default_factory=dict)  # kernels that failed -> why
    _first_alignment: float = math.nan

    @property
    def name(self) -> str:
        """The product, as a plan writes it."""
        return f"{self.ladder.request.site}.{self.ladder.request.product}"

    @property
    def rung(self) -> Rung:
        """What the product runs on."""
        return self.ladder.rungs[self.position]

    @property
    def key(self) -> Key:
        """The site and pass."""
        return self.ladder.request.site, self.ladder.request.product

    @property
    def suspects(self) -> bool:
        """Whether the last reading has left something in the test of its error, or of an operand."""
        return self.test.suspects or any(jumps.test.suspects for jumps in self._jumps.values())

    @property
    def wanted(self) -> tuple[str, ...]:
        """The recipes to measure: its own; those above that it may move up to; those below where it may have to go."""
        low = range(len(self.ladder.rungs) if self.suspects else self.position + 1)
        rungs = [self.ladder.rungs[index] for index in low if index >= self.position or self._may_climb(index)]
        return tuple(dict.fromkeys(name for rung in rungs for name in rung.recipes))

    def _may_climb(self, index: int) -> bool:
        return self.flips < self.patience.max_flips and self._works(self.ladder.rungs[index])

    def _works(self, rung: Rung) -> bool:
        return not any(kernel in self._dead for kernel in rung.kernels)

    def saw(self, step: int, reading: Reading) -> Iterator[Event]:
        """Take one monitored step; yield what happens because of it."""
        outliers = list(self._outliers(step, reading))
        yield from outliers
        if math.isnan(self._first_alignment):
            self._first_alignment = reading.alignment
        if self.position:
            yield from self._climb(step, reading)
        if not self.rung.recipes:
            return
        recipe, found = _worst(self.rung, reading)
        alarm = self.test.saw(found, self.rung.limit)
        if alarm or (outliers and self.test.suspects and self.test.last > 1):
            error = f"{self.ladder.gate} {found:.3g} under {recipe}"
            why = f"{error} is {self.test.last:.3g} times its limit of {self.rung.limit:.3g}"
            beyond = f", beyond it for {self.test.steps} monitored steps on the whole"
            why += beyond if alarm else " since its operands have jumped"
            yield self._demote(step, f"{why}; {self._because(recipe, reading)}", reading)

    def fault(self, step: int, kernel: str, why: str) -> Iterator[Event]:
        """Take note that a kernel does not work; leave it where the product runs on it."""
        if kernel in self._dead or all(kernel not in rung.kernels for rung in self.ladder.rungs):
            return
        self._dead[kernel] = why
        if kernel in self.rung.kernels:
            yield self._demote(step, why, None)

    # --- moves ---

    def _demote(self, step: int, why: str, reading: Reading | None) -> Event:
        left, self.position = self.rung, self._next_below(reading)
        self.test.clear()
        self._clean.clear()
        tail = ""
        if self._works(left):
            tail = f". Back after {self.patience.clean_steps} clean monitored steps"
            if self.flips >= self.patience.max_flips:
                tail = f". It stays there: it has come back {self.flips} times"
        return self._event(step, "demoted", f"from {left.words} to {self.rung.words}: {why}{tail}")

    def _next_below(self, reading: Reading | None) -> int:
        """Return the next rung whose kernel works and, where its own recipe is at fault, whose recipe is clean now."""
        last = len(self.ladder.rungs) - 1
        for index in range(self.position + 1, last):
            rung = self.ladder.rungs[index]
            if self._works(rung) and (reading is None or _is_clean(rung, reading)):
                return index
        return last

    def _climb(self, step: int, reading: Reading) -> Iterator[Event]:
        for index in range(self.position):
            rung = self.ladder.rungs[index]
            recipe, found = _worst(rung, reading)
            if not self._may_climb(index) or math.isnan(found):
                continue
            self._clean[index] = self._clean.get(index, 0) + 1 if _is_clean(rung, reading) else 0
            if self._clean[index] < self.patience.clean_steps:
                continue
            left, clean = self.rung, self._clean[index]
            self.position, self.flips = index, self.flips + 1
            self.test.clear()
            self._clean.clear()
            why = f"{self.ladder.gate} {found:.3g} under {recipe}, within {CLEAN:g} of its limit for {clean} steps"
            yield self._event(step, "promoted", f"from {left.words} back to {rung.words}: {why}")
            return

    # --- explanations ---

    def _outliers(self, step: int, reading: Reading) -> Iterator[Event]:
        for role, operand in reading.operands.items():
            times = self._jumps.setdefault(role, Jumps()).saw(operand.amax)
            if times is not None:
                what = f"the largest value of {role} is {operand.amax:.3g}, {times:.3g} times what it was lately"
                recipe, error = _worst(self.rung, reading)
                if not math.isnan(error):
                    what += f"; {self.ladder.gate} {error:.3g} under {recipe}, limit {self.rung.limit:.3g}"
                yield self._event(step, "outliers", what)

    def _because(self, recipe: str, reading: Reading) -> str:
        """Say what operands and alignment were like."""
        parts = []
        for role, operand in reading.operands.items():
            lost = operand.underflow.get(recipe, math.nan)
            underflow = "" if math.isnan(lost) else f", {100 * lost:.3g} % of it rounds to zero"
            usual = self._jumps[role].usual if role in self._jumps else math.nan
            times = "" if math.isnan(usual) else f" ({operand.amax / usual:.3g} times the usual)"
            parts.append(f"{role} up to {operand.amax:.3g}{times}{underflow}")
        if not math.isnan(reading.alignment):
            parts.append(f"alignment {reading.alignment:.3g}, first {self._first_alignment:.3g}")
        return "; ".join(parts)

    def _event(self, step: int, kind: str, message: str) -> Event:
        return Event(step=step, kind=kind, message=f"{self.name}: {message}")


def _is_clean(rung: Rung, reading: Reading) -> bool:
    return _worst(rung, reading)[1] <= CLEAN * rung.limit


def _worst(rung: Rung, reading: Reading) -> tuple[str, float]:
    """Return the recipe of a rung that errs most, and by how much; NaN where one of them was not measured."""
    found = {name: reading.errors.get(name, math.nan) for name in rung.recipes}
    unknown = [name for name, error in found.items() if math.isnan(error)]
    if unknown or not found:
        return (unknown or [""])[0], math.nan
    return max(found.items(), key=lambda each: each[1])


def in_order(keys: Iterator[Key] | list[Key]) -> list[Key]:
    """Return products in an order that is the same on every rank."""
    return sorted(keys, key=lambda key: (key[0], PASSES.index(key[1])))
