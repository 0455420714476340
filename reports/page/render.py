"""The report as one HTML file that needs nothing but a browser: no network, no other file.

What is said in words stands in the page and needs no script: the answer, the model map, the table. A script adds
sorting, filters, the charts and a part for each site, from the report and the material that travel with the page as
`packing` says; "Save JSON" gives the report back in schema 1. A site's part is opened by its fragment, so that a link
to it can be sent to somebody.

Names are untrusted. The templates escape everything; data is base 64; a content security policy admits the scripts and
the style of this file by their hashes, and nothing else. Plotly reads a subset of HTML in its texts: the script
escapes them once more. It adds its style sheet as an empty element, whose hash is admitted too, and fills it by rules.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, Final

from markupsafe import Markup

from loka.collecting import uncollected
from loka.formats import FORMATS
from loka.reports.dynamics import dynamics_view
from loka.reports.html import html_environment, inline, source_hash
from loka.reports.page.headline import answer
from loka.reports.page.levels import BINS_OF_AN_OCTAVE
from loka.reports.page.material import Material, advice_view
from loka.reports.page.model_map import model_map
from loka.reports.page.packing import columns, deflated
from loka.reports.page.pareto import pareto_view
from loka.reports.page.plotly_script import plotly_script
from loka.reports.page.products import product_table, table_rows
from loka.reports.page.sections import experts_view, monitor_view, other_events
from loka.reports.words import (
    ORDER,
    VERDICTS,
    Report,
    Row,
    chosen_kernel,
    gate_name,
    limited,
    loss_columns,
    notes,
    percent,
    plain,
    run_facts,
)

_NO_MATERIAL: Final[Material] = Material()
_STYLES: Final[tuple[str, ...]] = ("report.css", "plot.css", "page.css", "site.css", "print.css")
_SCRIPTS: Final[tuple[str, ...]] = (
    *("base.js", "table.js", "charts.js", "intervals.js", "overview.js"),
    *("site_tables.js", "site_charts.js", "site.js", "main.js"),
)
# What is read only where the part of a site is opened: most of the data of a large model.
_HEAVY: Final[tuple[str, ...]] = ("operands", "kernels")
# Follows from the times of a product's kernels and the speed-up of the chosen one: the script computes it.
_FOLLOWING: Final[frozenset[str]] = frozenset({"speedup"})
# Rows that a page with a script shows before it is asked for more: `table.js` has the same number.
SHOWN_ROWS: Final[int] = 200


def render(report: Report, material: Material = _NO_MATERIAL) -> str:
    """Return the report as a self-contained HTML page; `material` is what a database holds beyond the report."""
    # Deflating takes a sixth of the time and no interpreter: it goes on beside the rest.
    with uncollected(), ThreadPoolExecutor(max_workers=1) as beside:
        return _render(report, material, beside)


def _render(report: Report, material: Material, beside: ThreadPoolExecutor) -> str:
    plotly = beside.submit(plotly_script)
    heavy = [{name: row[name] for name in _HEAVY} for row in report["sites"]]
    details = beside.submit(deflated, columns([heavy], _FOLLOWING))
    found = beside.submit(deflated, columns([_material(material)]))
    pareto = pareto_view(report)
    light = {**report, "sites": [_light(row) for row in report["sites"]], "pareto": pareto}
    data = beside.submit(deflated, columns([light]))
    style = Markup("\n").join(map(inline, _STYLES))
    script = Markup("\n").join([Markup('"use strict";\n(() => {'), *map(inline, _SCRIPTS), Markup("})();")])
    table = product_table(report)
    return (
        html_environment()
        .get_template("page.html")
        .render(
            report=report,
            answer=answer(report, material.worth),
            detail=plain(report["summary"]["headline"]),
            shares=_shares(report),
            facts=run_facts(report),
            notes=notes(report),
            map=model_map(report) if report["sites"] else None,
            pareto=pareto,
            table=table,
            shown=table_rows(table.rows[:SHOWN_ROWS]),
            rest=table_rows(table.rows[SHOWN_ROWS:]),
            order=ORDER,
            gate=gate_name(report),
            limited=limited(report),
            loss=loss_columns(report),
            verdicts=VERDICTS,
            advice=[_plain(each) for each in advice_view(material.advice)],
            advice_headline=_advice_headline(material),
            experts=experts_view(report),
            dynamics=dynamics_view(report),
            monitor=monitor_view(report),
            events=other_events(report),
            style=style,
            style_hashes=[source_hash(style), source_hash("")],
            script=script,
            script_hashes=[source_hash(script), plotly.result().hash],
            plotly=plotly.result(),
            data=data.result(),
            details=details.result(),
            material=found.result(),
        )
    )


def _light(row: Row) -> dict[str, Any]:
    """Return what the table and the charts need of a product."""
    kernel = chosen_kernel(row)
    light = {**row, "decided": bool(row["kernels"]), "speed": kernel["speedup"] if kernel else None}
    for name in _HEAVY:
        del light[name]
    return light


def _advice_headline(material: Material) -> str:
    if material.advice is not None:
        return plain(material.advice.headline)
    return "Left out for a model this large: loka advise DB says it." if material.unadvised else ""


def _plain(suggestion: dict[str, Any]) -> dict[str, Any]:
    """Return a suggestion with everything in it printable."""
    lines = {name: [plain(each) for each in suggestion[name]] for name in ("where", "lines")}
    return {**suggestion, **lines}


def _material(material: Material) -> dict[str, Any]:
    """Return the material as the script reads it, with the grids that histograms are held against."""
    formats = {
        name: {"max": each.max, "min_exponent": each.min_exponent, "mantissa_bits": each.mantissa_bits}
        for name, each in FORMATS.items()
    }
    histories = [
        {"site": site, "pass": name, **history, "recipes": _entries(history["recipes"], "recipe", "errors")}
        for site, passes in material.histories.items()
        for name, history in passes.items()
    ]
    histograms = [
        {"site": site, "role": role, **found, "groups": _entries(found["groups"], "group", "levels")}
        for site, roles in material.histograms.items()
        for role, found in roles.items()
    ]
    return {
        "histories": histories,
        "histograms": histograms,
        "advice": advice_view(material.advice),
        "worth": None if material.worth is None else asdict(material.worth),
        "formats": formats,
        "partial": material.partial,
        "unadvised": material.unadvised,
        "bins_of_an_octave": BINS_OF_AN_OCTAVE,
    }


def _entries(found: Mapping[str, Any], key: str, value: str) -> list[dict[str, Any]]:
    """Return a mapping as records: those travel in columns."""
    return [{key: each, value: values} for each, values in found.items()]


def _shares(report: Report) -> list[tuple[str, int, float, float, str]]:
    """Return (verdict, products, start, width, FLOP share in words) of each part of the bar, in percent of the bar."""
    parts: list[tuple[str, int, float, float, str]] = []
    start = 0.0
    for verdict in reversed(VERDICTS):
        share = report["summary"]["flop_shares"][verdict]
        count = report["summary"]["verdicts"][verdict]
        parts.append((verdict, count, round(start, 3), round(100.0 * share, 3), percent(share)))
        start += 100.0 * share
    return parts
