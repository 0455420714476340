"""What a whole report comes to: counts, the worst products, one honest sentence, and the gate for a CI job.

Everything is computed from the rows of the report, so that a report read back from JSON summarises the same.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Literal

from loka.dispatch.deciding.decide import Decision
from loka.errors import ArgumentError
from loka.formats import PASSES
from loka.reports.words import (
    VERDICTS,
    Report,
    Row,
    best_recipe,
    crossing,
    error,
    grouped,
    percent,
    plain,
    plural,
    product_name,
    small,
    speedup,
)

FailLevel = Literal["unsafe", "undecided"]

_FAILING: Final[dict[str, frozenset[str]]] = {
    "unsafe": frozenset({"unsafe"}),
    "undecided": frozenset({"unsafe", "undecided"}),
}
_WORST: Final[int] = 5
_NAMED: Final[int] = 3


def verdict_counts(report: Report) -> dict[str, int]:
    """Return how many products are safe, unsafe and undecided, each under its best recipe."""
    return _counts(report["sites"])


def fails(report: Report, level: FailLevel) -> list[str]:
    """Return why a gate at this level fails, one sentence per product; empty when it passes.

    `unsafe` fails on products that no recipe makes safe and every recipe makes unsafe; `undecided` fails on those and
    on everything undecided, a report without a single product included. Raises ArgumentError for another level.
    """
    if level not in _FAILING:
        raise ArgumentError(f"--fail-on {level!r} is not a level. Levels: {', '.join(_FAILING)}.")
    if not report["sites"] and level == "undecided":
        return ["no matrix product was sampled: there is no evidence"]
    return [_failure(row) for row in report["sites"] if row["verdict"] in _FAILING[level]]


def summarise(
    rows: Sequence[Row], bound: Mapping[str, Any], decisions: Mapping[tuple[str, str], Decision]
) -> dict[str, Any]:
    """Return the `summary` section of a report over its finished rows."""
    summary: dict[str, Any] = {
        "products": len(rows),
        "verdicts": _counts(rows),
        "passes": {product: _counts(row for row in rows if row["pass"] == product) for product in PASSES},
        "flop_shares": {verdict: _share(rows, verdict) for verdict in VERDICTS},
        "safe_flop_share": _share(rows, "safe"),
        "unsafe": [{"site": row["site"], "pass": row["pass"]} for row in rows if row["verdict"] == "unsafe"],
        "worst": _worst(rows),
        "undecided_reasons": grouped(row["reason"] for row in rows if row["verdict"] == "undecided"),
        "drifting": _drifting(rows),
        "loss": _spending(rows, bound) if bound["loss"] is not None else None,
        "decisions": _decided(rows, decisions) if decisions else None,
    }
    return {"headline": _headline(summary, bound), **summary}


def _counts(rows: Iterable[Row]) -> dict[str, int]:
    counted = Counter(row["verdict"] for row in rows)
    return {verdict: counted[verdict] for verdict in ("safe", "unsafe", "undecided")}


def _share(rows: Iterable[Row], verdict: str) -> float:
    total = math.fsum(row["flop_share"] or 0.0 for row in rows if row["verdict"] == verdict)
    return min(total, 1.0)  # the shares of all products add up to one but for rounding


def _failure(row: Row) -> str:
    recipe = best_recipe(row)
    best = f"; best recipe {row['best']}, upper tolerance {error(recipe, 'upper_tolerance')}" if recipe else ""
    if recipe and recipe.get("loss"):
        best += f", kl {small(recipe['loss']['kl'])}"
    return f"{product_name(row)} is {row['verdict']}: {plain(row['reason'])}{best}"


def _worst(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the products whose best recipe errs most, the worst first."""
    measured = [(row, recipe) for row in rows if (recipe := best_recipe(row)) is not None and _size(recipe) >= 0.0]
    measured.sort(key=lambda pair: -_size(pair[1]))
    return [
        {
            "site": row["site"],
            "pass": row["pass"],
            "recipe": recipe["recipe"],
            "verdict": row["verdict"],
            "mean": recipe["row_error"]["mean"],
            "upper_tolerance": recipe["row_error"]["upper_tolerance"],
        }
        for row, recipe in measured[:_WORST]
    ]


def _spending(rows: Iterable[Row], bound: Mapping[str, Any]) -> dict[str, Any]:
    """Return what all safe forward products, each with its best recipe, would spend of the budget of loss together."""
    recipes = [best_recipe(row) for row in rows if row["bound"]["metric"] == "loss" and row["verdict"] == "safe"]
    losses = [recipe["loss"] for recipe in recipes if recipe is not None]
    return {
        "budget": bound["loss"],
        "products": len(losses),
        "kl": math.fsum(loss["kl"] for loss in losses),
        "cost": math.fsum(loss["cost"] for loss in losses),
        "spread": math.sqrt(math.fsum(loss["spread"] ** 2 for loss in losses)),
    }


def _spending_sentence(loss: Mapping[str, Any]) -> str:
    share = 100 * loss["cost"] / loss["budget"]
    return (
        f"Together the {plural(loss['products'], 'safe fprop product')} would spend {small(loss['cost'])} of the loss "
        f"({share:.3g} % of the budget)."
    )


def _drifting(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Return the products whose best recipe drifts towards the bound, the soonest across it first."""
    found = [
        {
            "site": row["site"],
            "pass": row["pass"],
            "recipe": row["best"],
            "per_100_steps": recipe["drift"]["per_100_steps"],
            "crosses_at": step,
        }
        for row in rows
        if (recipe := best_recipe(row)) is not None and (step := crossing(recipe)) is not None
    ]
    return sorted(found, key=lambda entry: entry["crosses_at"])


def _drift_sentence(drifting: Sequence[Row]) -> str:
    """Return which products drift towards the bound and when they cross it, the first few by name."""
    shown = [f"{product_name(entry)} crosses it about step {entry['crosses_at']:,}" for entry in drifting[:_NAMED]]
    if len(drifting) > _NAMED:
        shown.append(f"{len(drifting) - _NAMED:,} more later")
    verb = "drifts" if len(drifting) == 1 else "drift"
    return f"{plural(len(drifting), 'product')} {verb} towards the bound: {', '.join(shown)}."


def _size(recipe: Row) -> float:
    """Return the upper tolerance, else the mean, of a recipe as a sort key; -1 where neither is known."""
    for key in ("upper_tolerance", "mean"):
        if f"row_error.{key}" in recipe["infinite"]:
            return math.inf
        if recipe["row_error"][key] is not None:
            return float(recipe["row_error"][key])
    return -1.0


def _decided(rows: Sequence[Row], decisions: Mapping[tuple[str, str], Decision]) -> dict[str, Any]:
    """Return what the decisions come to, over the products of the report."""
    pairs = [(row, decisions[row["site"], row["pass"]]) for row in rows if (row["site"], row["pass"]) in decisions]
    gains = [decision.speedup for _, decision in pairs if decision.recipe is not None and decision.speedup is not None]
    timed = [
        (row["calls"], decision.baseline_time_us, decision.time_us)
        for row, decision in pairs
        if row["calls"] is not None and decision.baseline_time_us is not None and decision.time_us is not None
    ]
    return {
        "products": len(pairs),
        "fp8": sum(decision.recipe is not None for _, decision in pairs),
        "contended": sum(_contended(row) for row, _ in pairs),  # an admissible FP8 kernel was timed
        "untimed": sum(_untimed(row) for row, _ in pairs),  # an FP8 kernel lacks nothing but a time
        "time_sources": sorted({decision.time_source for _, decision in pairs} - {"none"}),
        "speedup_low": min(gains, default=None),
        "speedup_high": max(gains, default=None),
        "timed": len(timed),  # the times below are per step, over these products
        "baseline_us": math.fsum(calls * baseline for calls, baseline, _ in timed),
        "planned_us": math.fsum(calls * time for calls, _, time in timed),
    }


def _contended(row: Row) -> bool:
    return any(kernel["recipe"] is not None and kernel["status"] != "rejected" for kernel in row["kernels"])


def _untimed(row: Row) -> bool:
    return any(kernel["code"] == "untimed" for kernel in row["kernels"])


def _headline(summary: Mapping[str, Any], bound: Mapping[str, Any]) -> str:
    if not summary["products"]:
        return "No matrix product was sampled: there is no evidence to judge."
    counts = summary["verdicts"]
    rest = [
        f"{counts[verdict]:,} {'is' if counts[verdict] == 1 else 'are'} {words}"
        for verdict, words in (("unsafe", "unsafe with every recipe"), ("undecided", "undecided"))
        if counts[verdict]
    ]
    sentence = (
        f"FP8 is safe on {counts['safe']:,} of {plural(summary['products'], 'product')} "
        f"({percent(summary['safe_flop_share'])} of GEMM FLOPs) within {bound['text']}"
    )
    sentence += f"; {', '.join(rest)}." if rest else "."
    if summary["loss"]:
        sentence += f" {_spending_sentence(summary['loss'])}"
    if summary["drifting"]:
        sentence += f" {_drift_sentence(summary['drifting'])}"
    return f"{sentence} {_gain(summary['decisions'])}" if summary["decisions"] else sentence


def _gain(decided: Mapping[str, Any]) -> str:
    """Return whether anything gets faster, and by which times this is known."""
    times = f" (times: {', '.join(decided['time_sources'])})" if decided["time_sources"] else ""
    untimed = f"; {plural(decided['untimed'], 'product')} could gain but lack times" if decided["untimed"] else ""
    if not decided["fp8"]:
        if decided["contended"]:
            return f"Nothing is faster in FP8{times}: every product stays in high precision{untimed}."
        why = "no FP8 kernel has been timed here" if decided["untimed"] else "no FP8 kernel is admissible here"
        return f"Every product stays in high precision: {why}."
    sentence = f"FP8 is chosen for {decided['fp8']:,} of {plural(decided['products'], 'product')}"
    low, high = decided["speedup_low"], decided["speedup_high"]
    if low is None:
        return f"{sentence}{times}{untimed}."
    factor = speedup(low) if speedup(low) == speedup(high) else f"{speedup(low)} to {speedup(high)}"
    total = f"{decided['baseline_us'] / 1e3:.3g} ms becomes {decided['planned_us'] / 1e3:.3g} ms"
    return f"{sentence}, at {factor} the speed of the baseline{times}; GEMM time per step of {total}{untimed}."
