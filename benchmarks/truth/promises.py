"""Whether the intervals of early steps keep their word on later ones, and whether `safe` is safe.

Intervals are those of a report (`loka.probes.judging.intervals`, frozen weights): family-wise over all rows of one
material and split, and, to see the method without Bonferroni, each row on its own.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.truth.judge import actual, grouped
from benchmarks.truth.rows import Collected, Row
from loka.probes.judging.intervals import MIN_SAMPLES, Intervals, intervals, select_window

CONFIDENCE: Final[float] = 0.95
BOUNDS: Final[tuple[float, ...]] = (0.01, 0.015, 0.02, 0.025, 0.03, 0.035, 0.04, 0.05)
# Bounds as multiples of what later steps showed: below 1 every `safe` is false.
AROUND: Final[tuple[float, ...]] = (0.9, 0.95, 0.98, 1.0, 1.02, 1.05, 1.1, 1.2)

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Promise:
    """One row with what its early steps promised."""

    row: Row
    low: float
    high: float
    upper: float


def promises(rows: Sequence[Row], *, confidence: float) -> list[Promise]:
    """Return the intervals of these rows as one family; rows with fewer than MIN_SAMPLES early steps are left out."""
    rows = [row for row in rows if len(row.early) >= MIN_SAMPLES and len(row.later) > 1 and actual(row) > 0]
    rows = [row for row in rows if not any(map(math.isnan, (*row.early, *row.later)))]
    if not rows:
        return []
    found = _intervals(rows, confidence)
    columns = (found.low.tolist(), found.high.tolist(), found.upper.tolist())
    return [
        Promise(row=row, low=low, high=high, upper=upper) for row, low, high, upper in zip(rows, *columns, strict=True)
    ]


def _intervals(rows: Sequence[Row], confidence: float) -> Intervals:
    length = [len(row.early) for row in rows]
    series = np.repeat(np.arange(len(rows), dtype=np.int64), length)
    step = np.concatenate([np.arange(count, dtype=np.int64) for count in length])
    value = np.concatenate([np.array(row.early, dtype=np.float64) for row in rows])
    window = select_window(series, step, value, len(rows), frozen=True)
    return intervals(window, step, value, frozen=True, confidence=confidence)


def coverage(found: Sequence[Promise]) -> dict[str, Any]:
    """How often the interval has the later mean, and how many later steps lie above the tolerance bound.

    The later mean is a mean of few steps and has noise of its own; `two_sample` allows for it.
    """
    means = np.array([actual(promise.row) for promise in found])
    low, high, upper = (np.array([getattr(promise, name) for promise in found]) for name in ("low", "high", "upper"))
    middle, half = (low + high) / 2, (high - low) / 2
    wider = np.sqrt([1 + len(promise.row.early) / len(promise.row.later) for promise in found])
    above = [np.mean(np.array(promise.row.later) > promise.upper) for promise in found]
    return {
        "rows": len(found),
        "interval has the later mean": float(np.mean((low <= means) & (means <= high))),
        "two_sample": float(np.mean(np.abs(means - middle) <= wider * half)),
        "later steps above the tolerance bound": float(np.mean(above)),
        "rows with a later mean above it": int(np.sum(means > upper)),
        "tolerance bound / later mean, median": float(np.median(upper / means)),
    }


def false_safe(found: Sequence[Promise]) -> dict[str, Any]:
    """Of the rows called safe under a bound, how many were not on later steps.

    `tightest` sets each row's bound to the smallest at which it is still called safe: no bound can be harder.
    """
    result: dict[str, Any] = {}
    for bound in BOUNDS:
        result[f"bound {bound:g}"] = _under(found, [bound] * len(found))
    for factor in AROUND:
        result[f"bound {factor:g} x the later mean"] = _under(found, [factor * actual(p.row) for p in found])
    result["tightest"] = _under(found, [promise.upper for promise in found])
    return result


def _under(found: Sequence[Promise], bounds: Sequence[float]) -> dict[str, Any]:
    safe = [(promise, bound) for promise, bound in zip(found, bounds, strict=True) if promise.upper <= bound]
    wrong = [(promise, bound) for promise, bound in safe if actual(promise.row) > bound]
    above = [float(np.mean(np.array(promise.row.later) > bound)) for promise, bound in safe]
    admissible = sum(actual(promise.row) <= bound for promise, bound in zip(found, bounds, strict=True))
    return {
        "rows": len(found),
        "admissible": admissible,
        "safe": len(safe),
        "false_safe": len(wrong),
        "false_safe_at": [f"{p.row.material}: {p.row.site}, {p.row.product}, {p.row.recipe}" for p, _ in wrong[:8]],
        "later steps above the bound": float(np.mean(above)) if above else 0.0,
    }


def judge_promises(collected: Sequence[Collected]) -> Mapping[str, Any]:
    """Return coverage and false `safe`, by split and pass, in the family of a report and each row on its own."""
    rows = [row for entry in collected for row in entry.rows if row.group in ("body", "head", "activation")]
    result: dict[str, Any] = {}
    for split, members in grouped(rows, lambda row: row.split).items():
        families = grouped(members, lambda row: row.material).values()
        together = [found for family in families for found in promises(family, confidence=CONFIDENCE)]
        alone = [found for row in members for found in promises([row], confidence=CONFIDENCE)]
        for kind, found in (("family-wise", together), ("each row on its own", alone)):
            for group in ("body", "head"):
                chosen = [promise for promise in found if promise.row.group == group]
                for product, some in grouped(chosen, lambda promise: promise.row.product).items():
                    result[f"coverage, {split}, {kind}, {group}, {product}"] = coverage(some)
        judged = [promise for promise in together if promise.row.group == "body"]
        for product, some in grouped(judged, lambda promise: promise.row.product).items():
            result[f"false safe, {split}, {product}"] = false_safe(some)
        reports = grouped((p for p in together), lambda promise: promise.row.material)
        broken = sum(any(actual(p.row) > p.upper for p in some) for some in reports.values())
        result[f"reports with any false safe under any bound, {split}"] = f"{broken} of {len(reports)}"
    return result
