"""A sampled step, or a whole report, as one flat dict of numbers: what Weights & Biases, MLflow and others log.

Keys are stable. `<site>` is the name of a site, `(root)` for that of the root itself; `<pass>` fprop, dgrad or wgrad:

    loka/step, loka/sampled_steps, loka/overhead                of a sampled step, and loka/loss where it is known
    loka/all/worst/<pass>/<recipe>/row_error                    the largest over the sites that were measured in it
    loka/all/median/<pass>/<recipe>/row_error                   the median over them
    loka/<site>/<pass>/<recipe>/row_error                       and sqnr_db, relative_error, bias, kl
    loka/<site>/<pass>/<operand>/amax                           and rms, zeros

    loka/products/safe, /unsafe, /undecided                     of a report; loka/flops/safe: the share of GEMM FLOPs
    loka/<site>/<pass>/<recipe>/row_error_mean                  and row_error_upper, which the bound is compared with
    loka/<site>/<pass>/safe                                     1 where some recipe is safe, else 0

A number that was not measured has no key. An infinite error has one, and is infinite.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, Final, Literal

from loka.errors import ArgumentError
from loka.probes.records import ProductRecord, RunProgress, StepRecord
from loka.reports.words import VERDICTS, Report

Detail = Literal["summary", "sites"]
DETAILS: Final[tuple[str, ...]] = ("summary", "sites")

_ERRORS: Final[tuple[str, ...]] = ("row_error", "sqnr_db", "relative_error", "bias")
_OPERAND: Final[tuple[str, ...]] = ("amax", "rms", "zeros")
_INTERVAL: Final[dict[str, str]] = {"mean": "row_error_mean", "upper_tolerance": "row_error_upper"}


def check_detail(detail: str) -> Detail:
    """Return how much is logged; raise ArgumentError where that is none of DETAILS."""
    for known in ("summary", "sites"):
        if detail == known:
            return known
    raise ArgumentError(
        f"detail={detail!r}: 'summary' logs the worst and the median error per pass and recipe, 'sites' every site's."
    )


def step_metrics(step: StepRecord, progress: RunProgress, *, detail: Detail = "sites") -> dict[str, float]:
    """Return the numbers of one sampled step; with detail="summary" those over all sites only."""
    check_detail(detail)
    totals = {
        "step": float(step.step),
        "sampled_steps": float(progress.sampled_steps),
        "overhead": progress.overhead_fraction,
        "loss": step.loss,
        **_over_sites(step),
    }
    found = {f"loka/{name}": value for name, value in totals.items()}
    if detail == "sites":
        for product in step.products:
            name = f"loka/{product.site or '(root)'}/{product.product}"
            found.update((f"{name}/{key}", value) for key, value in _product(product))
    return {key: value for key, value in found.items() if not math.isnan(value)}


def _over_sites(step: StepRecord) -> dict[str, float]:
    errors: dict[str, list[float]] = defaultdict(list)
    for product in step.products:
        for recipe, error in product.errors.items():
            if not math.isnan(error.row_error):
                errors[f"{product.product}/{recipe}/row_error"].append(error.row_error)
    worst = {f"all/worst/{key}": max(values) for key, values in errors.items()}
    return {**worst, **{f"all/median/{key}": statistics.median(values) for key, values in errors.items()}}


def _product(product: ProductRecord) -> Iterator[tuple[str, float]]:
    for recipe, error in product.errors.items():
        yield from ((f"{recipe}/{name}", float(getattr(error, name))) for name in _ERRORS)
    for recipe, impact in product.impacts.items():
        yield f"{recipe}/kl", impact.kl
    for operand in product.operands:
        yield from ((f"{operand.role}/{name}", float(getattr(operand, name))) for name in _OPERAND)


def report_metrics(report: Report) -> dict[str, float]:
    """Return the numbers of a report, as `loka.reports.build.report_of` returns it."""
    summary, run = report["summary"], report["run"]
    found: dict[str, float | None] = {
        "loka/sampled_steps": float(run["sampled_steps"]),
        "loka/overhead": run["overhead_fraction"],
        **{f"loka/products/{verdict}": float(summary["verdicts"][verdict]) for verdict in VERDICTS},
        **{f"loka/flops/{verdict}": float(summary["flop_shares"][verdict]) for verdict in VERDICTS},
    }
    for row in report["sites"]:
        name = f"loka/{row['site'] or '(root)'}/{row['pass']}"
        found[f"{name}/safe"] = float(row["verdict"] == "safe")
        for recipe in row["recipes"]:
            found.update(_interval(f"{name}/{recipe['recipe']}", recipe))
    return {key: value for key, value in found.items() if value is not None}


def _interval(name: str, recipe: Mapping[str, Any]) -> dict[str, float | None]:
    infinite = recipe["infinite"]
    return {
        f"{name}/{key}": math.inf if f"row_error.{field}" in infinite else recipe["row_error"][field]
        for field, key in _INTERVAL.items()
    }
