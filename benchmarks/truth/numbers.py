"""The numbers that the project set itself beside those that were found: held or missed, by how much, where and why."""

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, Final

Entry = dict[str, Any]

# Why a number can be missed. Which of the first two it is, the worst row itself tells.
_BATCHES: Final[str] = (
    "the error itself differs by {floor:.1%} between the early and the later batches there; on the same batches the "
    "road is off by {same:.1%}"
)
_ROAD: Final[str] = (
    "on the very same batches the road is off by {same:.1%} there, and the error itself differs by only {floor:.1%} "
    "between the early and the later ones"
)
_WGRAD: Final[str] = (
    "the reduction of a weight gradient runs over the batch, so its error is a property of the batch: even all rows of "
    "the early batches are off by {floor:.1%} (median)"
)
_SHARED: Final[str] = (
    "the curvature is taken row by row, with labels drawn for some 512 items: what rows have in common, such as the "
    "rounding of a weight, is left out"
)
_TAILS: Final[str] = (
    "misses come by the batch: the worst later batch is covered in {worst:.0%} of rows, the median one in {median:.0%}"
)
_EVERYTHING: Final[str] = (
    "a sampled step measures every pass of every product, whether a rank needs it or not, and a small batch makes a "
    "cheap plain step to compare with"
)


def numbers_to_hold(results: Mapping[str, Any]) -> list[Entry]:
    """Return every number as an entry: what, the limit, what was found, whether it holds, and where it is worst."""
    return [
        *_gap_entries(results),
        *_unpromised_entries(results),
        *_safe_entries(results),
        *_impact_entries(results),
        *_cost_entries(results),
    ]


def _entry(what: str, found: float | None, limit: float, **more: Any) -> Entry:
    """One number with an upper limit; `lower=True` in `more` makes it a lower one."""
    if found is None:
        return {"what": what, "limit": limit, "found": None, "holds": None, "at": ""}
    lower = more.pop("lower", False)
    holds = found >= limit if lower else found <= limit
    entry = {"what": what, "limit": limit, "found": found, "holds": holds, "at": more.get("at", "")}
    why = more.get("why", "")
    return entry | ({"missed by": abs(found - limit), "why": why} if not holds else {})


def _gap_entries(results: Mapping[str, Any]) -> list[Entry]:
    """Gaps on later batches of the exchangeable split; the pass goes into the name."""
    tables = results.get("gaps, exchangeable", {}).get("by_pass", {})
    wanted: tuple[tuple[str, Sequence[str], float, float], ...] = (
        ("direct", ("fprop", "dgrad", "wgrad"), 0.01, 0.05),
        ("closed form x alignment", ("fprop", "dgrad"), 0.015, 0.12),
        ("copula x alignment", ("fprop",), 0.01, 0.08),
    )
    entries = []
    for road, passes, middle, worst in wanted:
        for product in passes:
            found, floor = (tables.get(product, {}).get(name, {}) for name in (road, "direct, all truth rows"))
            name, at = f"{road}, {product}: gap on later batches", found.get("worst_at", "")
            usual = f"all rows of the early batches are off by {floor.get('median', math.nan):.1%} (median)"
            entries.append(_entry(f"{name}, median", found.get("median"), middle, why=usual))
            entries.append(_entry(f"{name}, worst", found.get("worst"), worst, at=at, why=_why(found, floor, product)))
    return entries + _closer_entries(results)


def _why(found: Mapping[str, Any], floor: Mapping[str, Any], product: str) -> str:
    if not found:
        return ""
    if product == "wgrad":
        return _WGRAD.format(floor=floor.get("median", math.nan))
    batches, same = found["floor_at_worst"], found["same_steps_at_worst"]
    return (_BATCHES if batches > same else _ROAD).format(floor=batches, same=same)


def _unpromised_entries(results: Mapping[str, Any]) -> list[Entry]:
    """What nothing was promised of."""
    wanted = (
        ("exchangeable", "wgrad", "closed form x alignment"),
        ("exchangeable", "wgrad", "copula x alignment"),
        ("exchangeable", "dgrad", "copula x alignment"),
        *(("domain", product, "direct") for product in ("fprop", "dgrad", "wgrad")),
    )
    entries = []
    for split, product, road in wanted:
        table = results.get(f"gaps, {split}", {}).get("by_pass", {}).get(product, {})
        found = table.get(road, {})
        why = _why(found, table.get("direct, all truth rows", {}), product)
        for figure in ("median", "worst"):
            what = f"{road}, {product}, {split}: gap on later batches, {figure}"
            at = found.get("worst_at", "") if figure == "worst" else ""
            entry = {"what": what, "limit": None, "found": found.get(figure), "holds": None, "at": at, "why": why}
            entries.append(entry)
    return entries


def _closer_entries(results: Mapping[str, Any]) -> list[Entry]:
    found = results.get("closer, exchangeable", {}).get("fprop", {}).get("gaussian, matrix normal", {})
    worst = found.get("where gaussian, matrix normal is worst", {})
    what = "copula x alignment, fprop: times closer than a Gaussian with a matrix normal weight, where that is worst"
    return [_entry(what, worst.get("times closer"), 3.0, lower=True, at=worst.get("at", ""))]


def _safe_entries(results: Mapping[str, Any]) -> list[Entry]:
    entries = []
    for product in ("fprop", "dgrad", "wgrad"):
        found = results.get(f"false safe, exchangeable, {product}", {})
        safe, wrong = (sum(v[key] for v in found.values()) for key in ("safe", "false_safe"))
        what = f"frozen weights, {product}: share of `safe` that is false, over all bounds"
        entries.append(_entry(what, wrong / safe if safe else None, 0.05))
    for product, limit in (("fprop", 0.01), ("dgrad", 0.10)):
        found = results.get(f"training, {product}", {})
        for kind in ("all bounds", "tightest"):
            what = f"training, within the horizon, unmonitored, {product}: share of `safe` that is false, {kind}"
            entries.append(_entry(what, found.get(kind, {}).get("share"), limit, at=_worst_at(found)))
    return entries


def _worst_at(found: Mapping[str, Any]) -> str:
    return str(found.get("tightest", {}).get("worst_at", ""))


def _impact_entries(results: Mapping[str, Any]) -> list[Entry]:
    entries = []
    for name, found in results.items():
        if name.startswith("loss impact, "):
            ratio = found["predicted / measured kl"]
            inside = found["interval has the change on a later batch"]
            covered = found["by later batch"]
            tails = _TAILS.format(worst=min(covered), median=median(covered))
            few = found["spearman, from two batches"]
            entries += [
                _entry(f"{name}: predicted / measured kl, median", ratio["median"], 0.8, lower=True, why=_SHARED),
                _entry(f"{name}: predicted / measured kl, median, at most", ratio["median"], 1.25, why=_SHARED),
                _entry(f"{name}: spearman from two batches", few, 0.95, lower=True, why=_SHARED),
                _entry(f"{name}: interval has the change on a later batch", inside, 0.95, lower=True, why=tails),
            ]
    return entries


def _cost_entries(results: Mapping[str, Any]) -> list[Entry]:
    found = results.get("sensitivities of twenty linears", {})
    return [
        _entry(f"sensitivities of twenty linears, {name}", ratio["median"], 12.0, why=_EVERYTHING)
        for name, ratio in found.items()
        if name.startswith("batch") and "linears" in name
    ]
