"""What a looser or a tighter bound would buy: plans for a range of bounds from one set of evidence and times.

Every tolerance in the evidence is a corner: between two of them no verdict changes, so no plan does. The range goes
from where nothing passes to where everything passes that has a kernel here. Nothing is measured between two points.

A point's time is that of the GEMMs of one step, each product with what was chosen for it, times its calls. A baseline
that was never timed counts by its operations where a speed-up is assumed, and is left out otherwise.
"""

import math
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Unpack

import numpy as np
from sqlalchemy import Engine

from loka.bounds import Bound, Limit, Metric
from loka.dispatch.deciding.decide import Decision
from loka.dispatch.deciding.loss_budget import baseline_prices
from loka.dispatch.deciding.options import PlanArguments, PlanOptions
from loka.dispatch.deciding.planner import DEFAULT_BOUND, Decided, decide_products, read_run, time_table
from loka.errors import ArgumentError, EvidenceError
from loka.kernel_registry.registry import Registry, default_registry
from loka.numerics import decibels
from loka.probes.judging.evidence import RunEvidence
from loka.probes.records import Timing

POINTS: Final[int] = 20

# Under such a bound everything passes that is bounded at all.
_ANYTHING: Final[dict[Metric, float]] = {"row_error": 1e300, "sqnr_db": 1e-6, "loss": 1e300}
_DIGITS: Final[int] = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepPoint:
    """What a plan under one bound comes to. Errors are upper tolerances of the products in FP8; None: there is none."""

    bound: Bound
    asked: bool  # the bound that was asked for
    products: int  # in FP8
    sites: int  # with a product in FP8
    fp8_share: float  # of the floating-point operations of a step
    time_us: float | None  # of the GEMMs of one step; None where no baseline was timed
    speedup: float  # of them, over all baselines
    error_max: float | None
    error_mean: float | None  # weighted by operations
    loss_kl: float | None  # of the forward products in FP8 together, where all were seen to do something to the loss
    loss_cost: float | None  # an upper bound on it
    best: bool = False  # no other point is as fast at less error


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """Points from the tightest bound to the loosest."""

    run: str
    model: str
    device: str
    metric: Metric  # what is bounded
    time_source: str
    products: int
    timed: int  # products whose time is in the sums
    baseline_us: float | None  # of the GEMMs of one step, all on their baseline
    points: tuple[SweepPoint, ...]

    @property
    def gains(self) -> bool:
        """Whether any point beats the baseline."""
        return any(point.products for point in self.points)

    @property
    def headline(self) -> str:
        """What there is to gain, in a sentence."""
        where = f"{self.products} products on {self.device}"
        if not self.gains:
            return f"Nothing to gain here: whatever the bound, no plan for {where} beats the baseline."
        fastest = max(self.points, key=lambda point: point.speedup)  # the tightest of equals
        first = next(point for point in self.points if point.products)
        begins = f"the first gain needs {_limit(first)}"
        if first is self.points[0]:  # what spends nothing of a budget, or has a bound of its own
            begins = f"{first.speedup:.3g}x needs no more than {_limit(first)}"
        return f"Of {where}, {begins} and the largest gain, {fastest.speedup:.3g}x, {_limit(fastest)}."

    @property
    def notes(self) -> tuple[str, ...]:
        """What qualifies the numbers."""
        notes = [f"Times: {self.time_source}. Speed is that of all GEMMs of one step together."]
        if self.timed < self.products:
            notes.append(f"Never timed, and in no sum: {self.products - self.timed} of {self.products} products.")
        own = self.points[0].bound.per_site if self.points else ()
        if own:
            notes.append(f"Held to a bound of their own at every point: {'; '.join(map(str, own))}.")
        return tuple(notes)


def sweep(
    db: str | os.PathLike[str] | Engine,
    bound: Bound = DEFAULT_BOUND,
    *,
    run: str | None = None,
    registry: Registry | None = None,
    points: int = POINTS,
    **arguments: Unpack[PlanArguments],
) -> Sweep:
    """Plan a probed run under a range of bounds of the kind of `bound`, itself one of them.

    Bounds per site stay as they are. Times are measured once, before the first point. The other arguments (`device`,
    `device_profile`, `assume_speedup`, `measure`, `budget_s`, `on_progress`, `filter`) and errors are those of
    `loka.plan`.
    """
    registry = default_registry() if registry is None else registry
    options = PlanOptions.of(**arguments)
    evidence, timings = read_run(db, _with(bound, _ANYTHING[bound.metric]), run, registry, options)
    return sweep_evidence(evidence, bound, registry, timings, options, points=points)


def sweep_evidence(
    evidence: RunEvidence,
    bound: Bound,
    registry: Registry,
    timings: Iterable[Timing],
    options: PlanOptions,
    *,
    points: int = POINTS,
) -> Sweep:
    """Do the same from evidence and times alone: no database, no measurement, no clock."""
    if points < 2:
        raise ArgumentError(f"A sweep of {points} points compares nothing. Ask for 2 or more, e.g. 20.")
    if not evidence.products:
        raise EvidenceError(f"Run {evidence.info.id} has no product to decide on. Probe a longer run.")
    times = time_table(timings, options)

    def decided(value: float) -> Decided:
        return decide_products(evidence, _with(bound, value), registry, times, options)

    loosest = decided(_ANYTHING[bound.metric])
    values = sorted({*_values(loosest, bound.metric, points), bound.value}, reverse=bound.metric == "sqnr_db")
    prices = _prices(loosest)
    found = [_point(decided(value), _with(bound, value), prices, asked=value == bound.value) for value in values]
    absolute = not any(_assumed(loosest, at) for at in prices)
    baseline_us = math.fsum(prices.values()) if absolute and prices else None
    return Sweep(
        run=evidence.info.id,
        model=evidence.info.model,
        device=str(options.info),
        metric=bound.metric,
        time_source=times.assumption or (times.source if len(times) else "none"),
        products=len(loosest.decisions),
        timed=len(prices),
        baseline_us=baseline_us,
        points=_marked(
            [replace(point, time_us=baseline_us / point.speedup if baseline_us else None) for point in found]
        ),
    )


def _with(bound: Bound, value: float) -> Bound:
    """Return the bound with another value."""
    limits: dict[Metric, float] = {bound.metric: value}
    return Bound(
        row_error=limits.get("row_error"),
        sqnr_db=limits.get("sqnr_db"),
        loss=limits.get("loss"),
        confidence=bound.confidence,
        per_site=bound.per_site,
    )


def _limit(point: SweepPoint) -> str:
    return str(point.bound.limit("fprop", ""))


def _values(loosest: Decided, metric: Metric, points: int) -> list[float]:
    """Return the bounds to try: just below the first corner, then corners up to the last."""
    corners = _corners(loosest, metric)
    if not corners:
        return []
    below = _rounded(corners[0], math.floor, digits=2)
    below = below if below < corners[0] else 0.9 * below
    chosen = [below, *_thinned(corners, points - 1)]
    if metric == "sqnr_db":
        return [value for error in chosen if (value := _ratio(error)) > 0]
    return [chosen[0], *dict.fromkeys(_rounded(value, math.ceil) for value in chosen[1:])]


def _corners(loosest: Decided, metric: Metric) -> list[float]:
    """Return, in order, the errors or costs from which on a recipe that has a kernel here is within the bound.

    Where no kernel is admissible at any bound, those of all recipes: to show that it is not the bound that matters.
    """

    def uppers(*, admissible: bool) -> list[list[float]]:
        return [
            [
                upper
                for recipe in ([case.known_recipe for case in each.admissible] if admissible else each.evidence.recipes)
                if 0.0 < (upper := recipe.upper(each.limit)) < math.inf
            ]
            for each in loosest.considered
            if each.limit.metric == metric and each.limit.pattern is None and each.limit.bias is None
        ]

    found = uppers(admissible=True)
    if not any(found):
        found = uppers(admissible=False)
    corners = sorted({upper for some in found for upper in some})
    if metric == "loss" and corners:  # a budget adds up: what single products cost says only where it begins
        total = math.fsum(max(some) for some in found if some)
        corners = [*np.geomspace(corners[0], max(total, corners[-1]), 4 * POINTS).tolist()]
    return corners


def _thinned(corners: Sequence[float], points: int) -> list[float]:
    """Return at most so many corners, first and last among them: evenly on a logarithmic scale, then by rank."""
    if len(corners) <= points:
        return list(corners)
    grid = np.geomspace(corners[0], corners[-1], points)
    picked = {max(bisect_right(corners, value * (1 + 1e-9)) - 1, 0) for value in grid.tolist()}
    for rank in np.linspace(0, len(corners) - 1, points).round().astype(int).tolist():
        if len(picked) < points:
            picked.add(rank)
    return [corners[at] for at in sorted(picked)]


def _rounded(value: float, towards: Callable[[float], int], digits: int = _DIGITS) -> float:
    """Return a value that can be typed, in so many digits, on the side of `towards`."""
    exponent = math.floor(math.log10(value)) - digits + 1
    found = float(f"{towards(value / 10.0**exponent)}e{exponent}")
    # The division may have rounded to the wrong side.
    return (
        found if towards is math.floor or found >= value else float(f"{towards(value / 10.0**exponent) + 1}e{exponent}")
    )


def _ratio(error: float) -> float:
    """Return a relative error as a ratio in dB that can be typed and admits it."""
    found = math.floor(100.0 * decibels(error) + 1e-6) / 100.0
    return found if Limit(metric="sqnr_db", value=found).most >= error else found - 0.01


def _assumed(loosest: Decided, at: int) -> bool:
    time = loosest.considered[at].baseline_time
    return time is None or time.assumed


def _prices(loosest: Decided) -> dict[int, float]:
    """Return the time per step of each product on its baseline, those left out that were never timed."""
    positions = [at for at, each in enumerate(loosest.considered) if each.baseline_time is not None]
    prices = baseline_prices(loosest.considered, positions)
    return {at: price * loosest.considered[at].evidence.calls for at, price in prices.items()}


def _point(decided: Decided, bound: Bound, prices: dict[int, float], *, asked: bool) -> SweepPoint:
    low = [
        (each.evidence, decision)
        for each, decision in zip(decided.considered, decided.decisions, strict=True)
        if decision.recipe is not None
    ]
    planned = math.fsum(price / _speedup(decided.decisions[at]) for at, price in prices.items())
    errors = [(product.flops, decision.error_upper) for product, decision in low if decision.error_upper is not None]
    flops = math.fsum(weight for weight, _ in errors)
    losses = [decision.loss for product, decision in low if product.product == "fprop"]
    kl = [loss.kl for loss in losses if loss is not None]
    cost = [loss.cost for loss in losses if loss is not None and loss.cost is not None]
    return SweepPoint(
        bound=bound,
        asked=asked,
        products=len(low),
        sites=len({product.site for product, _ in low}),
        fp8_share=min(math.fsum(product.flop_share for product, _ in low), 1.0),
        time_us=None,
        speedup=math.fsum(prices.values()) / planned if planned else 1.0,
        error_max=max((error for _, error in errors), default=None),
        error_mean=math.fsum(weight * error for weight, error in errors) / flops if flops else None,
        loss_kl=math.fsum(kl) if kl and len(kl) == len(losses) else None,
        loss_cost=math.fsum(cost) if cost and len(cost) == len(losses) else None,
    )


def _speedup(decision: Decision) -> float:
    return decision.speedup or 1.0 if decision.recipe is not None else 1.0


def _marked(points: Sequence[SweepPoint]) -> tuple[SweepPoint, ...]:
    """Mark the points that no other beats: none is as fast with less error, or faster with no more."""
    result, fastest = [], -math.inf
    for point in sorted(points, key=lambda point: (_error(point), -point.speedup, points.index(point))):
        result.append(replace(point, best=point.speedup > fastest))
        fastest = max(fastest, point.speedup)
    order = [point.bound for point in points]
    return tuple(sorted(result, key=lambda point: order.index(point.bound)))


def _error(point: SweepPoint) -> float:
    error = point.loss_cost if point.bound.metric == "loss" else point.error_max
    return error or 0.0
