"""The overhead budget: how much extra work a sampled step may do, and whether the next one may happen at all.

Time that the run spends on its own earns credit at the rate of the budget; the probe's work spends it. The first
samples happen as `scheduled`, each with what its interval will have earned; later ones wait until the credit covers
them, so the measured overhead settles at or below the budget however small the model is.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

# Samples that happen on schedule before the credit decides, so that a short run has evidence too. They may overdraw it,
# which later ones pay back.
_SCHEDULED_SAMPLES: Final[int] = 10
# How many intervals' credit the scheduled samples may be ahead.
_AHEAD: Final[float] = 3.0
# Share of a scheduled sample's credit given to measuring before it is known what capture and bookkeeping take; and what
# is left for measuring in any case once that is known.
_FIRST_SHARE: Final[float] = 0.5
_LEAST_SHARE: Final[float] = 0.3
# A run sampled more densely than every 100 steps asks for evidence before cheapness: it may spend this much in all
# before the budget binds, e.g. 0.45 s at every=10 and 2 s at every=1.
_GRACE_PER_DENSITY_S: Final[float] = 0.05
_GRACE_MAX_S: Final[float] = 2.0


# What was planned is measured even if it costs more than it used to, up to so many times the allowance: the credit pays
# it back with later samples, and products that come late in a step are not made to wait again and again.
_OVERRUN: Final[float] = 2.0
# A product whose verdict further samples cannot change is measured in one of so many of its turns.
_SETTLED_TURNS: Final[int] = 4


@dataclass(slots=True)
class _Job:
    samples: int = 0
    cost_s: float = 0.0  # 0 until it is known
    settled: bool = False
    turns_left_out: int = 0

    def waives_its_turn(self) -> bool:
        """Count a turn of a settled product; whether it leaves this one to the others."""
        self.turns_left_out = (self.turns_left_out + 1) % _SETTLED_TURNS if self.settled else 0
        return self.turns_left_out > 0


@dataclass(slots=True)
class Budget:
    """Credit and debit of one run, in seconds. `overhead` is a share of the run's own time."""

    every: int
    overhead: float
    scheduled: int = _SCHEDULED_SAMPLES
    samples: int = 0
    skipped: int = 0
    spent_s: float = 0.0
    aside_s: float = 0.0  # spent between samples, which those need not earn
    _plain_steps: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=20))
    _fixed_cost_s: float = 0.0
    _jobs: dict[Hashable, _Job] = field(default_factory=dict)
    _queue: list[Hashable] = field(default_factory=list)  # every job; the first has waited longest
    _allowance_s: float = 0.0
    _measured_s: float = 0.0
    _planned: set[Hashable] = field(default_factory=set)
    _waived: set[Hashable] = field(default_factory=set)
    _first: Hashable | None = None  # of the planned products, the one that has waited longest
    _served: set[Hashable] = field(default_factory=set)

    @property
    def plain_step_s(self) -> float:
        """Median time of the recent steps that were not sampled; 0 before the first."""
        return statistics.median(whole for whole, _ in self._plain_steps) if self._plain_steps else 0.0

    def plain_step(self, whole_s: float, inside_s: float = 0.0) -> None:
        """Take note of a step that was not sampled; `inside_s` of it went by in forward and backward."""
        self._plain_steps.append((whole_s, inside_s))

    def begin_sample(self, wall_s: float, *, urgent: bool = False) -> bool:
        """Decide whether a step that is due is sampled, and plan what it measures.

        An urgent one is, and measures everything: later ones pay it back.
        """
        credit = self.overhead * max(wall_s - self.spent_s, 0.0) - self.spent_s
        interval = self.overhead * self.every * self.plain_step_s
        if self.samples < self.scheduled:
            overdrawn = credit < -_AHEAD * interval
            most, fixed = max(interval, credit), self._fixed_cost_s
            allowance = max(most - fixed, _LEAST_SHARE * most) if fixed else _FIRST_SHARE * most
        else:
            allowance = credit - self._fixed_cost_s
            overdrawn = allowance < (self._cost_of(self._queue[0]) if self._queue else 0.0)
        grace = math.inf if urgent else self._grace()
        if self.samples and overdrawn and not grace:
            self.skipped += 1
            return False
        self._allowance_s = max(allowance, grace)
        self._measured_s = 0.0
        self._waived = set()
        self._planned = self._plan()
        self._served = set()
        self.samples += 1
        return True

    def withdraw(self) -> None:
        """Take back a sample that was allowed, and does not happen for another reason."""
        self.samples -= 1
        self.skipped += 1

    def _grace(self) -> float:
        density = max(100.0 / self.every - 1.0, 0.0)
        return max(min(_GRACE_MAX_S, _GRACE_PER_DENSITY_S * density) - self.spent_s, 0.0)

    def _cost_of(self, key: Hashable) -> float:
        """What measuring this product takes; where it was never measured, what others took on average."""
        if self._jobs[key].cost_s:
            return self._jobs[key].cost_s
        known = [job.cost_s for job in self._jobs.values() if job.cost_s]
        return statistics.fmean(known) if known else 0.0

    def _plan(self) -> set[Hashable]:
        """Take from the front of the queue what the allowance pays for, one product at least."""
        planned: set[Hashable] = set()
        cost = 0.0
        for key in self._queue:
            if planned and cost + self._cost_of(key) > self._allowance_s:
                break
            if self._jobs[key].waives_its_turn():
                self._waived.add(key)
                continue
            cost += self._cost_of(key)
            planned.add(key)
        self._first = next((key for key in self._queue if key in planned), None)
        return planned

    def settle(self, key: Hashable, *, settled: bool) -> None:
        """Say whether more samples of this product could still change its verdict; if not, it is measured rarer."""
        self._jobs[key].settled = settled

    def samples_of(self, key: Hashable) -> int:
        """How often this product has been measured."""
        return self._jobs[key].samples if key in self._jobs else 0

    def allows(self, key: Hashable, own_s: float) -> bool:
        """Whether this product is measured now; `own_s` is the step's own time in products so far.

        Products never seen before are measured while there is allowance; before anything is known of the step's length,
        half of its own time so far is. One that was planned and comes too late keeps its place in the queue; the one
        that has waited longest is measured whatever it costs, or those that come before it in a step could starve it.
        """
        allowance = max(self._allowance_s, 0.0 if self._plain_steps else 0.5 * own_s)
        if key not in self._jobs:
            return self._measured_s < allowance
        if key not in self._planned:
            return False
        allowed = self._measured_s < _OVERRUN * allowance or not self._measured_s or key == self._first
        if not allowed:
            self._planned.remove(key)
        return allowed

    def measured(self, key: Hashable, seconds: float) -> None:
        """Take note of what measuring one product took."""
        job = self._jobs.setdefault(key, _Job())
        job.samples += 1
        self._served.add(key)
        job.cost_s = seconds if not job.cost_s else 0.5 * (job.cost_s + seconds)
        self._measured_s += seconds

    def known(self, keys: Iterable[Hashable]) -> None:
        """Make sure that products seen and not measured get their turn, before the others."""
        new = [key for key in keys if key not in self._jobs]
        self._jobs.update((key, _Job()) for key in new)
        self._queue[:0] = new

    def first(self, wanted: Callable[[Any], bool]) -> None:
        """Let products that somebody waits for have the next turn."""
        self._queue.sort(key=lambda key: not wanted(key))

    def end_sample(self, probe_s: float, whole_s: float = 0.0, inside_s: float = 0.0) -> None:
        """Charge a finished sample with the probe's time in it, and with what else made the step longer than others.

        A compiled model runs eagerly while it is sampled, which only the length of the step shows. Both the whole step
        and its time in forward and backward are compared, since either may hold more for a reason of the user's own.
        """
        cost = probe_s
        if self._plain_steps and whole_s:
            whole, inside = (statistics.median(column) for column in zip(*self._plain_steps, strict=True))
            cost = max(probe_s, min(whole_s - whole, inside_s - inside))
        self.spent_s += cost
        fixed = max(cost - self._measured_s, 0.0)
        # It rises at once and falls by halves: what the first samples did not show would else overdraw the credit.
        self._fixed_cost_s = max(fixed, 0.5 * (self._fixed_cost_s + fixed))
        # A product that was planned and did not come has had its turn too, or it would hold up the others for ever.
        turned = self._served | self._planned | self._waived
        queue = [*self._queue, *(key for key in self._jobs if key in self._served.difference(self._queue))]
        self._queue = [key for key in queue if key not in turned] + [key for key in queue if key in turned]
