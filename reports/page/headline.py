"""The first thing on the page: what can run in FP8, what cannot and why, and what that is worth on this device.

Shares are of GEMM time where every product's baseline was timed on the device, of floating-point operations otherwise,
and the sentence says which. Nothing is said of speed where nothing was timed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from loka.reports.html import fragment
from loka.reports.page.worth import CONFIDENCE, Worth
from loka.reports.words import (
    Report,
    Row,
    best_recipe,
    chosen_kernel,
    error,
    percent,
    plain,
    plural,
    site_name,
    small,
)

# Products that are named with their reason.
_NAMED: Final[int] = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class Reason:
    """Why one product cannot run in FP8."""

    site: str
    product: str
    words: str
    fragment: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """The sentence, and the reasons that it promises."""

    sentence: str
    reasons: tuple[Reason, ...]  # the first few, those with the most work first
    more: int  # products with a reason that is not named


def answer(report: Report, worth: Worth | None = None) -> Answer:
    """Return the answer of a report; `worth` adds how sure its times are."""
    rows = report["sites"]
    if not rows:
        return Answer(sentence="No matrix product was sampled: there is no evidence to judge.", reasons=(), more=0)
    unsafe = sorted((row for row in rows if row["verdict"] == "unsafe"), key=lambda row: -(row["flop_share"] or 0.0))
    share, of_what = safe_share(rows)
    sentence = f"{percent(share)} of {of_what} can run in FP8 within {plain(report['bound']['text'])}"
    return Answer(
        sentence=f"{sentence}{_rest(rows)}{_gain(report, worth) if share else ''}.",
        reasons=tuple(
            Reason(site=site_name(row), product=row["pass"], words=_why(row), fragment=fragment(row["site"]))
            for row in unsafe[:_NAMED]
        ),
        more=max(len(unsafe) - _NAMED, 0),
    )


def safe_share(rows: Sequence[Row]) -> tuple[float, str]:
    """Return the share of the safe products, and of what: of GEMM time where all of it is known, else of FLOPs."""
    times = [baseline_us(row) for row in rows]
    known = [time for time in times if time is not None]
    if len(known) == len(times) and math.fsum(known) > 0.0:
        safe = [time for time, row in zip(known, rows, strict=True) if row["verdict"] == "safe"]
        return math.fsum(safe) / math.fsum(known), "GEMM time"
    return min(math.fsum(row["flop_share"] or 0.0 for row in rows if row["verdict"] == "safe"), 1.0), "GEMM FLOPs"


def baseline_us(row: Row) -> float | None:
    """Return the time of a product on its baseline per step, None where it was not timed or its calls are unknown."""
    kernel = chosen_kernel(row)
    if kernel is None or kernel["time_us"] is None or kernel["speedup"] is None or row["calls"] is None:
        return None
    return float(kernel["time_us"] * kernel["speedup"] * row["calls"])


def _rest(rows: Sequence[Row]) -> str:
    """Return how many sites cannot, and how many are open; a site counts once, by the worst of its passes."""
    sites = {row["site"] for row in rows}
    unsafe = {row["site"] for row in rows if row["verdict"] == "unsafe"}
    waiting = {row["site"] for row in rows if row["verdict"] == "undecided"} - unsafe
    whole, one = plural(len(sites), "site"), len({row["pass"] for row in rows}) == 1
    parts: list[str] = []
    for found, verb in ((unsafe, "cannot"), (waiting, "is undecided")):
        if not found:
            continue
        count = f"{len(found):,}" if parts else f"{len(found):,} of {whole}"
        plain_verb = verb if len(found) == 1 else verb.replace("is ", "are ")
        has = "has" if len(found) == 1 else "have"
        parts.append(f"{count} {plain_verb}" if one else f"{count} {has} a pass that {verb}")
    return "".join(f"; {part}" for part in parts)


def _gain(report: Report, worth: Worth | None) -> str:
    """Return what the decisions are worth on this device, as far as it was timed."""
    decided = report["summary"]["decisions"]
    if not decided or not decided["timed"] or not decided["planned_us"]:
        return "; what that is worth on this device has not been timed"
    if not decided["fp8"]:
        waiting = (
            f", as far as it was timed ({plural(decided['untimed'], 'product')} had no times)"
            if decided["untimed"]
            else ""
        )
        return f"; on this device no FP8 kernel is faster{waiting}"
    speed = decided["baseline_us"] / decided["planned_us"]
    interval = ""
    if worth is not None:
        interval = f" ({100 * CONFIDENCE:.0f} % {worth.low:.2f} to {worth.high:.2f})"
    part = "" if decided["timed"] == len(report["sites"]) else f" over the {decided['timed']:,} products timed"
    return f"; on this device that is worth {speed:.2f} x{interval}{part}"


def _why(row: Row) -> str:
    """Return why no recipe makes a product safe: what the best one does, against what it may do."""
    recipe = best_recipe(row)
    if recipe is None:
        return plain(row["reason"])
    limit = row["bound"]
    if limit["metric"] == "loss" and recipe["loss"] is not None:
        kl, surely = small(recipe["loss"]["kl"]), small(recipe["loss"]["kl_low"])
        words = f"{plain(row['best'])}, the best recipe, adds {kl} to the loss on average, surely above {surely}"
        return f"{words}; the budget is {limit['value']:g}"
    low, bound = error(recipe, "low"), plain(limit["text"])
    words = f"{plain(row['best'])}, the best recipe, errs by {error(recipe, 'mean')} on average"
    if recipe["row_error"]["low"] is not None and recipe["row_error"]["low"] > (limit["value"] or math.inf):
        words += f", surely above {low}"
    return f"{words}; the bound is {bound}"
