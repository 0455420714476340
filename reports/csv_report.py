"""The report as CSV (RFC 4180): one line per (site, pass, recipe), for spreadsheets and data frames.

Numbers are written in full, so that they read back equal. Text is untrusted: a cell that a spreadsheet would take for
a formula gets an apostrophe in front, which spreadsheets do not show.
"""

import csv
import io
from collections.abc import Callable
from typing import Any, Final

from loka.reports.words import Report, Row, chosen_kernel

# What starts a formula, full-width forms included, and the white space that may precede one.
_FORMULA: Final[tuple[str, ...]] = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
_ERRORS: Final[tuple[str, ...]] = ("mean", "low", "high", "p99", "upper_tolerance")
_LOSS: Final[tuple[str, ...]] = ("kl", "kl_high", "first_order", "low", "high", "cost", "samples", "labels")

_Fill = Callable[[Row, Row, Row], Any]


def _of_row(name: str) -> _Fill:
    return lambda row, recipe, bound: row[name]


def _of_recipe(name: str) -> _Fill:
    return lambda row, recipe, bound: recipe.get(name)


def _of_bound(name: str) -> _Fill:
    return lambda row, recipe, bound: bound[name]


def _of_limit(name: str) -> _Fill:
    return lambda row, recipe, bound: row["bound"][name]


def _of_kernel(name: str) -> _Fill:
    return lambda row, recipe, bound: (chosen_kernel(row) or {}).get(name)


def _of_drift(name: str) -> _Fill:
    return lambda row, recipe, bound: (recipe.get("drift") or {}).get(name)


def _of_loss(name: str) -> _Fill:
    return lambda row, recipe, bound: (recipe.get("loss") or {}).get(name)


def _number(path: str) -> _Fill:
    """Return one number of a recipe by its dotted path: `inf` where it is infinite, empty where it is missing."""
    section, _, name = path.rpartition(".")

    def fill(row: Row, recipe: Row, bound: Row) -> Any:
        if not recipe:
            return None
        if path in recipe["infinite"]:
            return "inf"
        return recipe[section][name] if section else recipe[name]

    return fill


# Stable: columns may be added at the end, never renamed or moved. Each is filled from (row, recipe, bound).
_COLUMNS: Final[dict[str, _Fill]] = {
    **{name: _of_row(name) for name in ("site", "pass", "op", "batch", "m", "k", "n", "calls", "flop_share")},
    **{name: _of_row(name) for name in ("dtype", "verdict")},
    "recipe": _of_recipe("recipe"),
    "format": _of_recipe("format"),
    "recipe_verdict": _of_recipe("verdict"),
    "samples": _of_recipe("n"),
    "gate": _of_recipe("gate"),
    **{f"row_error_{name}": _number(f"row_error.{name}") for name in _ERRORS},
    "bound_row_error": _of_bound("row_error"),
    "confidence": _of_bound("confidence"),
    **{name: _number(name) for name in ("relative_error", "sqnr_db", "mere")},
    "horizon": _of_recipe("horizon"),
    "chosen": _of_row("chosen"),
    "time_us": _of_kernel("time_us"),
    "speedup": _of_kernel("speedup"),
    "note": lambda row, recipe, bound: recipe.get("note", row["reason"]),
    **{f"drift_{name}": _of_drift(name) for name in ("per_100_steps", "low", "high", "crosses_at")},
    **{f"loss_{name}": _of_loss(name) for name in _LOSS},
    "bias": _of_recipe("bias"),
    "bound_loss": _of_bound("loss"),
    "bound_sqnr_db": _of_bound("sqnr_db"),
    "sqnr_low_db": _of_recipe("sqnr_low_db"),
    **{f"held_to_{name}": _of_limit(name) for name in ("metric", "value", "pattern")},
}

COLUMNS: Final[tuple[str, ...]] = tuple(_COLUMNS)


def render(report: Report) -> str:
    """Return the report as CSV with a header; a product without any recipe keeps one line, empty where unmeasured."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\r\n")
    writer.writerow(COLUMNS)
    for row in report["sites"]:
        for recipe in row["recipes"] or [{}]:
            writer.writerow([_safe(fill(row, recipe, report["bound"])) for fill in _COLUMNS.values()])
    return out.getvalue()


def _safe(value: Any) -> Any:
    if isinstance(value, str) and value.lstrip(" ").startswith(_FORMULA):
        return f"'{value}"
    return value
