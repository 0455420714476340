"""From rows to figures: how close each road came to what later steps showed, and whether the intervals kept their word.

The gap of a prediction is predicted / actual - 1, where actual is the mean over later steps; absolute unless said.
Heads, products of activations and reduction length 1 are kept apart from the body.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from statistics import fmean, median, stdev
from typing import Any, Final, TypeVar

import numpy as np
from scipy import stats

from benchmarks.truth.rows import Collected, Row
from loka.formats import PASSES, RECIPES

# Roads that need no entry in a row's predictions: what the probe measured, and the same on as many rows as the truth.
DIRECT: Final[str] = "direct"
FLOOR: Final[str] = "direct, all truth rows"
# What the learned distribution is held against: the paper's, and the same with the weight as it is.
_PAPER: Final[tuple[str, ...]] = ("gaussian, matrix normal", "gaussian, real weight")
# Fewer sites than this have no rank correlation worth naming.
_MIN_RANKED: Final[int] = 6

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


def actual(row: Row) -> float:
    """Return what later steps showed: the mean of their errors; NaN where there were none."""
    return _mean(row.later)


def prediction(row: Row, road: str) -> float:
    """Return what a road said of this row; NaN where it does not lead there."""
    if road == DIRECT:
        return _mean(row.early)
    return _mean(row.early_full) if road == FLOOR else row.predictions.get(road, math.nan)


def gap(row: Row, road: str) -> float:
    """Return predicted / actual - 1, signed; NaN where either is missing or the error is exactly zero."""
    truth = actual(row)
    return prediction(row, road) / truth - 1.0 if truth > 0 else math.nan


def roads_of(rows: Iterable[Row]) -> list[str]:
    """Return every road that appears, the direct one and its floor first."""
    return [DIRECT, FLOOR, *dict.fromkeys(name for row in rows for name in row.predictions)]


def grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Sort into lists by key, in order of first appearance."""
    found: dict[K, list[T]] = defaultdict(list)
    for item in items:
        found[key(item)].append(item)
    return dict(found)


def method_gap(row: Row, road: str) -> float:
    """Return the gap against the truth of the very steps that the prediction was made from: without the step noise."""
    truth = _mean(row.early_full)
    return prediction(row, road) / truth - 1.0 if truth > 0 else math.nan


def body(rows: Iterable[Row], split: str) -> list[Row]:
    """Return the rows of one split that count."""
    return [row for row in rows if row.split == split and row.group == "body" and actual(row) > 0]


# --- how close ---


def gaps(rows: Sequence[Row], road: str, measure: Callable[[Row, str], float] = gap) -> dict[str, Any]:
    """Median, 90th percentile and worst |gap|, with the row that has it."""
    found = [(abs(value), row) for row in rows if not math.isnan(value := measure(row, road))]
    if not found:
        return {}
    values = np.array([value for value, _ in found])
    worst, where = max(found, key=lambda pair: pair[0])
    return {
        "rows": len(found),
        "median": float(np.median(values)),
        "p90": float(np.quantile(values, 0.9)),
        "worst": worst,
        "worst_at": f"{where.material}: {where.site}, {where.product}, {where.recipe}",
        # The same row apart: how much the error itself differs between the batches, and the road on the same batches.
        "floor_at_worst": abs(gap(where, FLOOR)),
        "same_steps_at_worst": abs(method_gap(where, road)),
    }


def gap_tables(rows: Sequence[Row], roads: Sequence[str]) -> dict[str, Any]:
    """Gaps of every road by pass, by pass and recipe, and by pass and material."""
    keys: dict[str, Callable[[Row], str]] = {
        "by_pass": lambda row: row.product,
        "by_pass_and_recipe": lambda row: f"{row.product} {row.recipe}",
        "by_pass_and_material": lambda row: f"{row.product} {row.material}",
    }
    return {
        name: {
            group: _by_road(members, roads, gaps) for group, members in grouped(_unsaturated(rows, name), key).items()
        }
        for name, key in keys.items()
    }


def _unsaturated(rows: Sequence[Row], table: str) -> list[Row]:
    """Pool recipes that every road can predict; a saturating one stands only where recipes are apart."""
    return [row for row in rows if table == "by_pass_and_recipe" or not RECIPES[row.recipe].saturating]


def closer(rows: Sequence[Row], road: str, other: str) -> dict[str, Any]:
    """How many times closer one road is than another: at the row where it is worst itself, and at the other's worst."""
    pairs = [(abs(gap(row, road)), abs(gap(row, other)), row) for row in rows]
    pairs = [pair for pair in pairs if not math.isnan(pair[0] + pair[1])]
    if not pairs:
        return {}
    result = {}
    worst = max(pairs, key=lambda pair: pair[0]), max(pairs, key=lambda pair: pair[1])
    for name, (own, others, row) in zip((f"where {road} is worst", f"where {other} is worst"), worst, strict=True):
        site = f"{row.material}: {row.site}, {row.product}, {row.recipe}"
        result[name] = {"at": site, road: own, other: others, "times closer": others / own if own else math.inf}
    return result


def rank_correlations(rows: Sequence[Row], roads: Sequence[str]) -> dict[str, Any]:
    """Spearman across the sites of one material, by pass and recipe: the median and the lowest over materials."""
    return {
        f"{product} {recipe}": _by_road(members, roads, _ranks)
        for (product, recipe), members in grouped(rows, lambda row: (row.product, row.recipe)).items()
    }


def _ranks(rows: Sequence[Row], road: str) -> dict[str, Any]:
    found = []
    for members in grouped(rows, lambda row: row.material).values():
        pairs = [(prediction(row, road), actual(row)) for row in members]
        pairs = [pair for pair in pairs if not math.isnan(pair[0])]
        if len(pairs) >= _MIN_RANKED and not math.isnan(rank := spearman(pairs)):
            found.append(rank)
    return {"materials": len(found), "median": median(found), "lowest": min(found)} if found else {}


def spearman(pairs: Sequence[tuple[float, float]]) -> float:
    """Return the rank correlation of pairs; NaN where one side is constant, as N(0,1) nearly is."""
    sides = list(zip(*pairs, strict=True))
    return float(stats.spearmanr(*sides).statistic) if all(len(set(side)) > 1 for side in sides) else math.nan


def hard_cases(rows: Sequence[Row], roads: Sequence[str]) -> dict[str, Any]:
    """Signed gaps of every road at the sites that are known to be hard."""
    return {
        f"{row.material}: {row.site}, {row.product}, {row.recipe}": {
            "actual": actual(row),
            **{road: value for road in roads if not math.isnan(value := gap(row, road))},
        }
        for row in rows
        if row.hard and actual(row) > 0
    }


def _by_road(
    rows: Sequence[Row], roads: Sequence[str], measure: Callable[[Sequence[Row], str], dict[str, Any]]
) -> dict[str, Any]:
    return {road: found for road in roads if (found := measure(rows, road))}


# --- how steady ---


def variation(values: Sequence[float]) -> float:
    """Return the coefficient of variation; NaN for fewer than two values or a mean of zero."""
    return stdev(values) / abs(fmean(values)) if len(values) > 1 and fmean(values) else math.nan


def stability(rows: Sequence[Row]) -> dict[str, Any]:
    """How much row_error and mere of one row vary over later steps, and whether they rank rows alike."""
    result: dict[str, Any] = {}
    chosen = [row for row in rows if row.gate == "row_error" and len(row.later) == len(row.later_mere) > 1]
    for product, members in grouped(chosen, lambda row: row.product).items():
        pairs = [(_mean(row.later), _mean(row.later_mere)) for row in members]
        result[product] = {
            "rows": len(pairs),
            "row_error": _spread([variation(row.later) for row in members]),
            "mere": _spread([variation(row.later_mere) for row in members]),
            "spearman of mere with row_error": spearman(pairs),
            "mere / row_error, median": median(mere / error for error, mere in pairs),
        }
    return result


def _spread(values: Sequence[float]) -> dict[str, float]:
    known = np.array([value for value in values if not math.isnan(value)])
    if not known.size:
        return {}
    return {"median": float(np.median(known)), "p90": float(np.quantile(known, 0.9)), "worst": float(known.max())}


# --- what it costs ---


def costs(collected: Sequence[Collected]) -> dict[str, Any]:
    """CPU seconds of every road: per sampled step, all products together, also in plain steps; and once, to predict."""
    result: dict[str, Any] = {}
    for entry in collected:
        if entry.split != "exchangeable":
            continue
        names = grouped(entry.costs, lambda cost: cost.name)
        result[entry.material] = {"plain step, s": entry.step_s} | {
            name: {
                "per sampled step, s": sum(cost.per_step_s for cost in members),
                "in plain steps": sum(cost.per_step_s for cost in members) / entry.step_s,
                "once, s": sum(cost.once_s for cost in members),
            }
            for name, members in names.items()
        }
    return result


# Roads -> the observations that they start from.
_STARTS_FROM: Final[dict[str, str]] = {"direct": "direct", "closed form x alignment": "statistics"}
_DRAWN: Final[str] = "distributions"  # what all others start from


def seconds_per_row(collected: Sequence[Collected]) -> dict[str, Any]:
    """CPU seconds that one predicted (site, pass, recipe) takes, all early steps included, by road and material."""
    result: dict[str, dict[str, float]] = defaultdict(dict)
    for entry in collected:
        if entry.split != "exchangeable":
            continue
        steps = max(len(row.early) for row in entry.rows)
        for road in roads_of(entry.rows):
            rows = sum(not math.isnan(prediction(row, road)) for row in entry.rows)
            start = _STARTS_FROM.get(road, _DRAWN)
            taken = sum(cost.per_step_s for cost in entry.costs if cost.name == start) * steps
            once = sum(cost.once_s for cost in entry.costs if cost.name == road)
            if rows and road != FLOOR:
                result[road][entry.material] = (taken + once) / rows
    return dict(result)


# --- everything ---


def heads(rows: Iterable[Row]) -> dict[str, Any]:
    """Direct gaps of the heads, by pass: relative_error where the output has fewer than 8 columns."""
    chosen = [row for row in rows if row.group == "head" and row.split == "exchangeable" and actual(row) > 0]
    return {
        f"{product} {gate}": {
            **gaps(members, DIRECT),
            "variation over steps": _spread([variation(row.later) for row in members]),
        }
        for (product, gate), members in grouped(chosen, lambda row: (row.product, row.gate)).items()
    }


def counts(rows: Sequence[Row]) -> dict[str, Any]:
    """How many rows there are, by split and group, and how many of them showed no error at all."""
    return {
        split: {
            **{group: len(found) for group, found in grouped(members, lambda row: row.group).items()},
            "all": len(members),
            "without an error to predict": sum(not actual(row) > 0 for row in members),
        }
        for split, members in grouped(rows, lambda row: row.split).items()
    }


def shift(rows: Sequence[Row]) -> dict[str, Any]:
    """How far the error itself moved from early to later batches: |full early / later - 1| by split and pass."""
    return {
        f"{split} {product}": gaps(members, FLOOR)
        for split in dict.fromkeys(row.split for row in rows)
        for product in PASSES
        if (members := [row for row in body(rows, split) if row.product == product])
    }


def judge(collected: Sequence[Collected]) -> Mapping[str, Any]:
    """Return every table but the intervals', by name."""
    rows = [row for entry in collected for row in entry.rows]
    roads = roads_of(rows)
    result: dict[str, Any] = {"counts": counts(rows)}
    for split in dict.fromkeys(row.split for row in rows):
        chosen = body(rows, split)
        result[f"gaps, {split}"] = gap_tables(chosen, roads)
        result[f"gaps on the early steps themselves, {split}"] = {
            product: _by_road(members, roads, lambda rows, road: gaps(rows, road, method_gap))
            for product, members in grouped(_unsaturated(chosen, ""), lambda row: row.product).items()
        }
        result[f"closer, {split}"] = {
            product: {other: found for other in _PAPER if (found := closer(members, "copula x alignment", other))}
            for product, members in grouped(_unsaturated(chosen, ""), lambda row: row.product).items()
        }
        result[f"spearman, {split}"] = rank_correlations(chosen, roads)
    exchangeable = body(rows, "exchangeable")
    return result | {
        "shift": shift(rows),
        "hard cases": hard_cases(exchangeable, roads),
        "heads": heads(rows),
        "activations": gap_tables(
            [row for row in rows if row.group == "activation" and row.split == "exchangeable" and actual(row) > 0],
            roads,
        )["by_pass"],
        "stability": stability(exchangeable),
        "costs": costs(collected),
        "seconds per row": seconds_per_row(collected),
    }


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return fmean(known) if known else math.nan
