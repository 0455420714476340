"""A sweep of bounds for people and for programs: a table, JSON, and one HTML page with a plot.

The page needs nothing but a browser: the plot is drawn here, as SVG, and a content security policy admits the style of
the page by its hash and nothing else.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, Final

from rich.console import Group
from rich.table import Table
from rich.text import Text

from loka.dispatch.deciding.sweep import Sweep, SweepPoint
from loka.reports.axes import Axis
from loka.reports.html import html_environment, inline, source_hash
from loka.reports.words import number, percent, plain, small, speedup

SCHEMA: Final[int] = 1

# The plot, in units of its own.
_WIDTH, _HEIGHT = 720.0, 320.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 64.0, 16.0, 16.0, 48.0


def sweep_json(sweep: Sweep) -> str:
    """Return the sweep as JSON, schema 1: the fields of its record, and of its points."""
    document: dict[str, Any] = {
        "schema": SCHEMA,
        **{name: getattr(sweep, name) for name in ("run", "model", "device", "metric", "time_source", "products")},
        "timed": sweep.timed,
        "baseline_us": sweep.baseline_us,
        "gains": sweep.gains,
        "headline": sweep.headline,
        "notes": list(sweep.notes),
        "points": [{**asdict(point), "value": point.bound.value} for point in sweep.points],
    }
    return json.dumps(document, indent=2, allow_nan=False)


def sweep_text(sweep: Sweep) -> Group:
    """Render the sweep: what there is to gain, a line per bound, what qualifies it."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    columns = _columns(sweep)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for point in sweep.points:
        style = "bold" if point.asked else None
        table.add_row(*(fill(point) for fill in columns.values()), _marks(point), style=style)
    notes = [Text(plain(line), style="dim") for line in (_legend(sweep), *sweep.notes)]
    return Group(Text(plain(sweep.headline), style="bold"), Text(), table, Text(), *notes)


_Fill = Callable[[SweepPoint], str]


def _columns(sweep: Sweep) -> dict[str, _Fill]:
    """Return how each column is filled; those on the loss are there where anything is known of it."""
    columns: dict[str, _Fill] = {
        "sqnr_db >=" if sweep.metric == "sqnr_db" else f"{sweep.metric} <=": lambda point: f"{point.bound.value:.4g}",
        "time ms": lambda point: number(None if point.time_us is None else point.time_us / 1e3, 4),
        "speed": lambda point: speedup(point.speedup),
        "FP8": lambda point: percent(point.fp8_share),
        "products": lambda point: str(point.products),
        "sites": lambda point: str(point.sites),
        "worst": lambda point: number(point.error_max),
        "mean": lambda point: number(point.error_mean),
    }
    if any(point.loss_kl is not None for point in sweep.points):
        columns["kl"] = lambda point: small(point.loss_kl)
        columns["cost"] = lambda point: small(point.loss_cost)
    if sweep.baseline_us is None:
        del columns["time ms"]
    return columns


def _marks(point: SweepPoint) -> str:
    return " ".join([*(["*"] if point.best else []), *(["asked"] if point.asked else [])])


def _legend(sweep: Sweep) -> str:
    error = "relative_error" if sweep.metric == "sqnr_db" else "row_error"
    words = f"*: no other bound is as fast at less error; worst, mean: upper tolerance of {error} over the FP8 products"
    if any(point.loss_kl is not None for point in sweep.points):
        words += "; kl: what their forward products add to the loss on average, cost: an upper bound on it"
    if sweep.baseline_us is not None:
        words += f"; the baseline takes {sweep.baseline_us / 1e3:.4g} ms per step"
    return f"{words}."


def render_html(sweep: Sweep) -> str:
    """Return the sweep as a self-contained HTML page: the plot, and the table as its numbers."""
    style = inline("report.css") + inline("plot.css") + inline("sweep.css")
    columns = _columns(sweep)
    return (
        html_environment()
        .get_template("sweep.html")
        .render(
            sweep=sweep,
            headline=plain(sweep.headline),
            model=plain(sweep.model),
            facts=[("run", plain(sweep.run[:8])), ("model", plain(sweep.model)), ("device", plain(sweep.device))],
            notes=[plain(line) for line in (_legend(sweep), *sweep.notes)],
            header=[*columns, ""],
            rows=[([fill(point) for fill in columns.values()], _marks(point)) for point in sweep.points],
            plot=_plot(sweep),
            style=style,
            style_hashes=[source_hash(style)],
            script_hashes=[],
        )
    )


def _plot(sweep: Sweep) -> dict[str, Any] | None:
    """Return places of points, line and ticks: error of the FP8 products across, speed of a step's GEMMs up."""
    shown = [(error, point) for point in sweep.points if point.products and (error := _error(sweep, point))]
    if not shown:
        return None
    errors, speeds = [error for error, _ in shown], [point.speedup for _, point in shown]
    low, high = min(errors), max(errors)
    across = Axis(low / 1.15, high * 1.15, _LEFT, _WIDTH - _RIGHT, log=True)
    up = Axis(min(1.0, *speeds), 1.0 + 1.08 * (max(speeds) - 1.0) or 1.01, _HEIGHT - _BOTTOM, _TOP)
    dots = [
        {"x": across(error), "y": up(point.speedup), "best": point.best, "asked": point.asked, "words": _words(point)}
        for error, point in shown
    ]
    return {
        "width": _WIDTH,
        "height": _HEIGHT,
        "left": _LEFT,
        "right": _WIDTH - _RIGHT,
        "top": _TOP,
        "bottom": _HEIGHT - _BOTTOM,
        "baseline": up(1.0),
        "line": _steps([dot for dot in dots if dot["best"]], _WIDTH - _RIGHT),
        "dots": sorted(dots, key=lambda dot: bool(dot["best"] or dot["asked"])),  # on top of those they hide
        "x_ticks": across.ticks(),
        "y_ticks": [(place, f"{label}x") for place, label in up.ticks()],
        "x_label": _X_LABEL[sweep.metric],
        "y_label": "speed of one step's GEMMs, all on their baseline = 1",
    }


_X_LABEL: Final[dict[str, str]] = {
    "row_error": "largest upper tolerance of row_error over the FP8 products",
    "sqnr_db": "largest upper tolerance of relative_error over the FP8 products",
    "loss": "upper bound on what the FP8 products add to the loss, relative to it",
}


def _error(sweep: Sweep, point: SweepPoint) -> float | None:
    return point.loss_cost if sweep.metric == "loss" else point.error_max


def _words(point: SweepPoint) -> str:
    return (
        f"{point.bound.limit('fprop', '')}: {speedup(point.speedup)}, {percent(point.fp8_share)} of FLOPs in FP8, "
        f"{point.sites} sites"
    )


def _steps(dots: Sequence[dict[str, Any]], end: float) -> str:
    """Return the path of a staircase through dots: what an error allows holds until the next one allows more."""
    ordered = sorted(dots, key=lambda dot: float(dot["x"]))
    if not ordered:
        return ""
    path = f"M{ordered[0]['x']} {ordered[0]['y']}"
    return path + "".join(f"H{dot['x']}V{dot['y']}" for dot in ordered[1:]) + f"H{end}"
