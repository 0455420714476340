"""Time won against error spent: what a looser or a tighter bound would buy, from the times that a report holds.

Every product runs on its fastest timed kernel whose upper tolerance is at most the bound, its baseline otherwise; a
kernel counts as faster from the same factor on as in a plan. Under a budget of loss, products spend it in the order in
which it wins most time, and passes that cost no loss come first. Casts that two products share are charged to both,
which a plan does not do: `loka plan --sweep` has that, and all that a plan looks at.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, Final

from loka.dispatch.deciding.candidates import MIN_SPEEDUP, Code
from loka.reports.page.headline import baseline_us
from loka.reports.words import Report, Row, chosen_kernel

# Corners of the curve that are kept.
_MOST_POINTS: Final[int] = 400

# A kernel that cannot run here is not on the curve, whatever bound is asked for.
_IMPOSSIBLE: Final[frozenset[Code]] = frozenset({"unavailable", "cannot", "filtered"})

# (error, microseconds per step) of one kernel
_Choice = tuple[float, float]


def pareto_view(report: Report) -> dict[str, Any] | None:
    """Return the curve of a report; None where no FP8 kernel with a known error was timed.

        {"metric", "bound", "points": [[error, speed, products in FP8]], "products", "timed", "plan": [error, speed]}

    `plan` is where the decisions of the report lie.
    """
    rows = [(row, time) for row in report["sites"] if (time := baseline_us(row)) is not None]
    by_loss = report["bound"]["loss"] is not None
    choices = [(time, _choices(row, time, by_loss=by_loss)) for row, time in rows]
    if not any(found for _, found in choices):
        return None
    total = math.fsum(time for time, _ in choices)
    points = _spent(choices, total) if by_loss else _swept(choices, total)
    return {
        "metric": _metric(report),
        "bound": _limit(report),
        "points": _thinned(points),
        "products": len(report["sites"]),
        "timed": len(rows),
        "plan": _planned(report, by_loss=by_loss),
    }


def _metric(report: Report) -> str:
    if report["bound"]["loss"] is not None:
        return "loss"
    return "row_error" if report["bound"]["row_error"] is not None else "relative_error"


def _limit(report: Report) -> float | None:
    bound = report["bound"]
    if bound["loss"] is not None or bound["row_error"] is not None:
        found = bound["loss"] if bound["loss"] is not None else bound["row_error"]
        return float(found)
    return float(10.0 ** (-bound["sqnr_db"] / 20.0))


def _choices(row: Row, baseline: float, *, by_loss: bool) -> list[_Choice]:
    """Return the timed FP8 kernels of a product that beat its baseline, with what each of them spends."""
    spends = by_loss and row["bound"]["metric"] == "loss"
    found = []
    for kernel in row["kernels"]:
        if kernel["time_us"] is None or kernel["recipe"] is None or kernel["code"] in _IMPOSSIBLE:
            continue
        time = kernel["time_us"] * row["calls"]
        error = kernel["loss_cost"] if spends else kernel["error_upper"]
        if by_loss and not spends:  # held to a bound of its own, whatever the budget
            error = 0.0 if kernel["status"] != "rejected" else None
        if error is not None and time and baseline / time > MIN_SPEEDUP:
            found.append((float(error), float(time)))
    return sorted(found)


def _swept(choices: Iterable[tuple[float, list[_Choice]]], total: float) -> list[list[float]]:
    """Return (error, speed, products) wherever a larger bound lets a product run faster."""
    steps: list[tuple[float, float, int]] = []  # error, time won, products won
    for baseline, found in choices:
        now = baseline
        for error, time in found:
            if time < now:
                steps.append((error, now - time, int(now == baseline)))
                now = time
    return _summed(sorted(steps), total)


def _spent(choices: Iterable[tuple[float, list[_Choice]]], total: float) -> list[list[float]]:
    """Return (loss, speed, products) as a budget is spent where it wins most time for each part of it."""
    steps: list[tuple[float, float, int]] = []  # loss, time won, products won
    for baseline, found in choices:
        if found:
            cost, time = max(found, key=lambda choice: (baseline - choice[1]) / max(choice[0], 1e-300))
            steps.append((cost, baseline - time, 1))
    steps.sort(key=lambda step: step[0] / step[1])
    spent, summed = 0.0, []
    for cost, won, count in steps:
        spent += cost
        summed.append((spent, won, count))
    return _summed(summed, total)


def _summed(steps: Sequence[tuple[float, float, int]], total: float) -> list[list[float]]:
    points: list[list[float]] = []
    time, count = total, 0
    for error, won, products in steps:
        time -= won
        count += products
        if points and points[-1][0] == error:
            points.pop()
        points.append([error, total / time, count])
    return points


def _thinned(points: list[list[float]]) -> list[list[float]]:
    """Return at most so many points, evenly by rank, the last among them; each is a point of the curve."""
    if len(points) <= _MOST_POINTS:
        return points
    return [points[round(at * (len(points) - 1) / (_MOST_POINTS - 1))] for at in range(_MOST_POINTS)]


def _planned(report: Report, *, by_loss: bool) -> list[float] | None:
    """Return (error, speed) of the report's own decisions: the largest error of a product in FP8, or all their loss."""
    decided = report["summary"]["decisions"]
    chosen = [kernel for row in report["sites"] if (kernel := chosen_kernel(row)) is not None and kernel["recipe"]]
    spent = [kernel["loss_cost" if by_loss else "error_upper"] for kernel in chosen]
    known = [value for value in spent if value is not None]
    if not known or not decided["planned_us"]:
        return None
    return [math.fsum(known) if by_loss else max(known), decided["baseline_us"] / decided["planned_us"]]
