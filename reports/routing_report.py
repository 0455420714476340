"""The report on a routing trace: for a terminal, as JSON, as Markdown, and as one HTML page with heat maps.

The data and its keys are those of `loka.reports.routing_record`. The page needs nothing but a browser: the heat maps
are drawn here, as SVG with one path for each level of load, and a content security policy admits the style of the page
by its hash and nothing else.
"""

import json
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from rich.console import Group
from rich.table import Table
from rich.text import Text

from loka.probes.routing.statistics import summed
from loka.probes.routing.trace import RoutingTrace
from loka.reports.html import html_environment, inline, source_hash
from loka.reports.markdown import code, line, text
from loka.reports.routing_record import RoutingReport, RoutingTable, routing_report, routing_tables
from loka.reports.words import plain, plural

_CELL: Final[float] = 6.0  # of a heat map, in units of its own
_ROW: Final[float] = 10.0
_LEFT: Final[float] = 40.0
_MOST_MAPS: Final[int] = 13
# Levels of load over a balanced one: the upper end of each, and what the legend calls it.
_LEVELS: Final[tuple[tuple[float, str], ...]] = (
    (0.0, "unused"),
    (0.25, "to 1/4"),
    (0.5, "to 1/2"),
    (1.0, "to 1"),
    (2.0, "to 2"),
    (4.0, "to 4"),
    (8.0, "to 8"),
    (np.inf, "over 8 times balanced"),
)


def routing_json(trace: RoutingTrace) -> str:
    """Return the report as JSON, schema 1."""
    return json.dumps(routing_report(trace), indent=2, allow_nan=False)


def routing_text(trace: RoutingTrace) -> Group:
    """Render the report for a terminal."""
    report = routing_report(trace)
    parts: list[Any] = [Text(plain(report["headline"]), style="bold"), Text(_facts_line(report), style="dim")]
    for table in routing_tables(report):
        shown = Table(box=None, pad_edge=False, header_style="bold")
        for at, name in enumerate(table.header):
            shown.add_column(name, justify="right" if at else "left", no_wrap=bool(at), min_width=0 if at else 5)
        for row in table.rows:
            shown.add_row(*(Text(cell) for cell in row), style="red" if row[0].endswith(" !") else None)
        parts += [Text(), Text(table.title, style="bold"), shown, Text(table.legend, style="dim")]
    parts += [Text(), *(Text(plain(note)) for note in report["notes"])]
    return Group(*parts)


def routing_markdown(trace: RoutingTrace) -> str:
    """Return the report as GitHub-flavoured Markdown."""
    report = routing_report(trace)
    blocks = ["# Routing report", text(report["headline"])]
    blocks.append("\n".join(f"- {label}: {text(value)}" for label, value in _facts(report)))
    for table in routing_tables(report):
        lines = [line(list(table.header)), line(["---", *["--:"] * (len(table.header) - 1)])]
        lines += [line([code(row[0]), *row[1:]]) for row in table.rows]
        blocks += [f"## {table.title}", "\n".join(lines), text(table.legend) + "."]
    if report["notes"]:
        blocks += ["## Notes", "\n".join(f"- {text(note)}" for note in report["notes"])]
    return "\n\n".join(blocks) + "\n"


def routing_html(trace: RoutingTrace) -> str:
    """Return the report as a self-contained HTML page, with a heat map of load over all and for each domain."""
    report = routing_report(trace)
    style = inline("report.css") + inline("routing.css")
    return (
        html_environment()
        .get_template("routing.html")
        .render(
            headline=plain(report["headline"]),
            facts=_facts(report),
            notes=[plain(note) for note in report["notes"]],
            tables=[_table(table) for table in routing_tables(report)],
            levels=[name for _, name in _LEVELS],
            maps=_heat_maps(trace),
            left_out=max(len(trace.domains) + 1 - _MOST_MAPS, 0),
            style=style,
            style_hashes=[source_hash(style)],
            script_hashes=[],
        )
    )


FORMATS: Final[dict[str, Callable[[RoutingTrace], str]]] = {
    "json": routing_json,
    "md": routing_markdown,
    "html": routing_html,
}


def _table(table: RoutingTable) -> dict[str, Any]:
    return {name: getattr(table, name) for name in ("title", "legend", "header", "rows")}


def _facts(report: RoutingReport) -> list[tuple[str, str]]:
    trace = report["trace"]
    sizes = [("top k", trace["top_k"]), ("token width", trace["hidden_size"])]
    return [
        *([("model", plain(trace["model"]))] if trace["model"] else []),
        ("requests", f"{trace['requests']:,} of {plural(len(trace['domains']), 'domain')}"),
        ("layers", str(len(trace["layers"]))),
        ("experts", str(trace["experts"])),
        *((name, str(value)) for name, value in sizes if value is not None),
        *((f"tokens routed in {phase}", f"{count:,}") for phase, count in trace["tokens"].items()),
    ]


def _facts_line(report: RoutingReport) -> str:
    return "; ".join(f"{label} {value}" for label, value in _facts(report))


def _heat_maps(trace: RoutingTrace) -> list[dict[str, Any]]:
    """Return a heat map of layer x expert over all requests, and one for each of the first domains."""
    every = np.ones(trace.requests, dtype=bool)
    groups = [("All requests", every)]
    if len(trace.domains) > 1:
        groups += [(plain(name), np.array([each == name for each in trace.domain])) for name in trace.domains]
    return [_heat_map(title, summed(trace, mask), trace.layers) for title, mask in groups[:_MOST_MAPS]]


def _heat_map(title: str, loads: np.ndarray, layers: tuple[int, ...]) -> dict[str, Any]:
    mean = loads.mean(axis=1, keepdims=True)
    times = np.divide(loads, mean, out=np.zeros(loads.shape), where=mean > 0)
    level = np.searchsorted([end for end, _ in _LEVELS], times)  # the first level whose end is not below
    experts = loads.shape[1]
    width = min(_CELL, max(900.0 / experts, 1.0))
    paths = []
    for at, (_, name) in enumerate(_LEVELS):
        cells = zip(*np.nonzero(level == at), strict=True)
        d = "".join(f"M{_LEFT + x * width:g} {y * _ROW:g}h{width:g}v{_ROW:g}h-{width:g}z" for y, x in cells)
        paths.append((at, name, d))
    ticks = [(x, _LEFT + x * width) for x in range(0, experts, max(experts // 8, 1))]
    return {
        "title": title,
        "width": _LEFT + experts * width,
        "height": len(layers) * _ROW + 14,
        "bottom": len(layers) * _ROW + 10,
        "rows": [(layer, at * _ROW + _ROW - 2) for at, layer in enumerate(layers)],
        "ticks": ticks,
        "paths": [path for path in paths if path[2]],
    }
