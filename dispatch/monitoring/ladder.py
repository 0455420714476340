"""What a monitored product may run on: the planned kernel, then every other one that the plan found admissible, and in
the end high precision. One ladder per (site, pass), each rung with the most that its error may be.

The most is the plan's bound. A bound on the loss is a budget that forward products share, so there the most is the
error that the product was given its share for, times a margin: what an error costs the loss grows with its square.

A product that runs few rows and many on different kernels begins on both, and is watched for the recipes of both; where
both are in FP8, the next rungs are single kernels for all rows, and where one is, kernels for its rows.
"""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

from loka.bounds import DEFAULT_ROW_ERROR, Bound, Limit
from loka.dispatch.deciding.by_rows import by_rows, kernels_of, words
from loka.dispatch.deciding.decide import Candidate, Code, Decision
from loka.dispatch.deciding.plan import Plan
from loka.dispatch.running.linear import HIGH_PRECISION, load
from loka.dispatch.running.routing import runnable
from loka.errors import KernelError, PlanError
from loka.hardware import DeviceInfo
from loka.kernel_registry.spec import GemmRequest
from loka.numerics import Gate, gate_for

log: Final = logging.getLogger("loka.dispatch")

# Under a bound on the loss: at this many times the error that was planned with, it costs the loss twice as much.
LOSS_MARGIN: Final[float] = math.sqrt(2.0)
# Why a candidate that was within the bound was not chosen.
_ADMISSIBLE: Final[frozenset[Code]] = frozenset({"slower", "tie"})
# Rungs between the planned kernel and high precision: each has a recipe whose error is measured in case of need.
_MOST_OTHERS: Final[int] = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Rung:
    """A kernel, or one for few rows and one for many, that a product may run on.

    High precision has no recipe, and no limit.
    """

    kernel: str
    recipes: tuple[str, ...] = ()  # of few rows and of many, each once
    limit: float = math.inf

    @property
    def recipe(self) -> str | None:
        """Its recipe, or recipes, in a sentence; None in high precision."""
        return " and ".join(self.recipes) or None

    @property
    def kernels(self) -> tuple[str, ...]:
        """The kernels that have to work for it."""
        return kernels_of(self.kernel)

    @property
    def words(self) -> str:
        """Its name in a sentence."""
        return words(self.kernel)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ladder:
    """The rungs of one (site, pass), the planned kernel first, high precision last; `gate`: which error is limited."""

    request: GemmRequest
    gate: Gate
    rungs: tuple[Rung, ...]


def ladders(plan: Plan, here: DeviceInfo) -> list[Ladder]:
    """Return a ladder for every product that the plan runs in FP8, in the order of the plan.

    Where a planned kernel cannot run here, emulated ones stand in for all: that is what `emulate=True` has put in use.
    """
    planned = [decision for decision in plan.decisions if decision.recipe is not None]
    parts = [part for decision in planned for part in decision.parts if part.recipe is not None]
    emulate = any(_runnable(part.kernel, part, part.recipe, here) is None for part in parts)
    return [_ladder(decision, plan.bound, here, emulate=emulate) for decision in planned]


def _ladder(decision: Decision, bound: Bound, here: DeviceInfo, *, emulate: bool) -> Ladder:
    request = decision.request
    limit = bound.limit(request.product, request.site)
    usual = "relative_error" if limit.metric == "sqnr_db" else gate_for(request.n)
    rungs = list(_rungs(decision, limit, here, emulate=emulate))
    unique = list({rung.kernel: rung for rung in rungs}.values())
    return Ladder(
        request=request,
        gate=decision.gate or usual,
        rungs=(*unique[: 1 + _MOST_OTHERS], Rung(kernel=HIGH_PRECISION)),
    )


def _rungs(decision: Decision, limit: Limit, here: DeviceInfo, *, emulate: bool) -> Iterator[Rung]:
    """Yield what runs here of the chosen kernel, or kernels, and of those to fall back on."""
    if decision.ranges is None:
        yield from _of_one(decision, limit, here, emulate=emulate)
        return
    most = decision.ranges[0].m_max
    few, many = (list(_of_one(part, limit, here, emulate=emulate)) if part.recipe else [] for part in decision.ranges)
    if few and many:
        chosen = (few[0].kernel, many[0].kernel)
        kernel = chosen[0] if chosen[0] == chosen[1] else by_rows(chosen[0], most, chosen[1])
        recipes = tuple(dict.fromkeys((*few[0].recipes, *many[0].recipes)))
        yield Rung(kernel=kernel, recipes=recipes, limit=max(few[0].limit, many[0].limit))
        # For all rows: what was admissible for many, and was for few, even where it gains nothing there.
        able = {rung.kernel for rung in few} | set(_slower_than_the_baseline(decision.ranges[0]))
        yield from (rung for rung in many if rung.kernel in able)
    for rung in few if not many else ():
        yield replace(rung, kernel=by_rows(rung.kernel, most, HIGH_PRECISION))
    for rung in many if not few else ():
        yield replace(rung, kernel=by_rows(HIGH_PRECISION, most, rung.kernel))


def _of_one(decision: Decision, limit: Limit, here: DeviceInfo, *, emulate: bool) -> Iterator[Rung]:
    for name, recipe, error in _admissible(decision):
        kernel = _runnable(name, decision, recipe, here, emulate=emulate)
        if kernel is not None:
            yield Rung(kernel=kernel, recipes=(recipe,), limit=_most(limit, error))


def _slower_than_the_baseline(decision: Decision) -> Iterator[str]:
    return (each.kernel for each in decision.rejected if each.code == "no_gain")


def _admissible(decision: Decision) -> Iterator[tuple[str, str, float | None]]:
    """Yield kernel, recipe and error of the chosen kernel, and of those that lost by their time alone, by time."""
    assert decision.recipe is not None  # only products in FP8 have a ladder
    yield decision.kernel, decision.recipe, decision.error_upper
    others = [each for each in decision.rejected if each.recipe is not None and each.code in _ADMISSIBLE]
    for each in sorted(others, key=_by_time):
        yield each.kernel, str(each.recipe), each.error_upper


def _by_time(candidate: Candidate) -> tuple[float, str]:
    return candidate.time_us if candidate.time_us is not None else math.inf, candidate.kernel


def _most(limit: Limit, planned: float | None) -> float:
    """Return the most that an error may be, given what it was planned to be at most."""
    if limit.metric != "loss":
        return limit.most
    return LOSS_MARGIN * planned if planned is not None else DEFAULT_ROW_ERROR


def _runnable(
    kernel: str, decision: Decision, recipe: str | None, here: DeviceInfo, *, emulate: bool = False
) -> str | None:
    """Return what runs a kernel here, loaded; None where nothing does."""
    try:
        found = runnable(kernel, str(recipe), decision.request, here, emulate=emulate)
        load(found)
    except (PlanError, KernelError) as error:
        log.debug("%s is no kernel to fall back on: %s", kernel, error)
        return None
    return found
