"""The report as one HTML file that needs nothing but a browser: no network, no other file.

The table is written out here and is complete without scripts. A script adds sorting, filters and the details of a
product, which it reads from the report embedded as JSON; "Save JSON" gives that report back in schema 1.

Thousands of products repeat the same keys and words, so the embedded copy of `sites` is packed: `shapes` lists the key
tuples and `strings` the distinct strings. An object is [shape, value, ...], a list [-1, item, ...], a string its index
in base 36; numbers, booleans and null stand for themselves, numbers in six digits.

Names are untrusted. The template escapes everything; the JSON has no `<`; a content security policy admits the script
and the style of this file by their hashes, and nothing else.
"""

import base64
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from loka.reports.dynamics import dynamics_view
from loka.reports.words import (
    ORDER,
    VERDICTS,
    Report,
    Row,
    best_recipe,
    bound_of,
    chosen_kernel,
    error,
    events,
    gate_name,
    has_own_bounds,
    limited,
    loss_columns,
    loss_share,
    notes,
    percent,
    plain,
    run_facts,
    shape,
    site_name,
    speedup,
    upper,
)
from loka.reports.words import ordered as in_order

_TEMPLATES: Final[Path] = Path(__file__).parent / "templates"
_DIGITS: Final[str] = "0123456789abcdefghijklmnopqrstuvwxyz"


def render(report: Report) -> str:
    """Return the report as a self-contained HTML page."""
    dynamics = dynamics_view(report)
    style, script = inline("report.css") + (inline("plot.css") if dynamics else ""), inline("report.js")
    position = {id(row): index for index, row in enumerate(report["sites"])}
    loss = loss_columns(report)
    own, decided = has_own_bounds(report), any(row["kernels"] for row in report["sites"])
    return (
        html_environment()
        .get_template("report.html")
        .render(
            report=report,
            headline=plain(report["summary"]["headline"]),
            facts=run_facts(report),
            notes=notes(report),
            events=events(report),
            dynamics=dynamics,
            order=ORDER,
            verdicts=VERDICTS,
            shares=_shares(report),
            limited=limited(report),
            gate=gate_name(report),
            own_bounds=own,
            loss=loss,
            cell=Markup("<td>"),
            decided=decided,
            rows=[
                (position[id(row)], row["verdict"], _before(row, loss), _after(row, own=own, decided=decided))
                for row in in_order(report)
            ],
            style=style,
            script=script,
            style_hash=source_hash(style),
            script_hash=source_hash(script),
            data=_embed(report),
        )
    )


def html_environment() -> Environment:
    """Return the templates of this folder, everything in them escaped."""
    return Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _before(row: Row, loss: Iterable[str]) -> tuple[str, ...]:
    """Return the cells of a row before its verdict, those on the loss last."""
    recipe = best_recipe(row)
    return (
        site_name(row),
        row["pass"],
        shape(row),
        percent(row["flop_share"]),
        plain(row["best"] or "-"),
        error(recipe, "mean"),
        upper(recipe),
        *(loss_share(recipe, name) for name in loss),
    )


def _after(row: Row, *, own: bool, decided: bool) -> tuple[str, ...]:
    """Return the cells of a row after its verdict: a bound of its own, then the kernel and its speed-up."""
    kernel = chosen_kernel(row)
    chosen = (plain(row["chosen"] or "-"), speedup(kernel["speedup"] if kernel else None))
    return (*((bound_of(row),) if own else ()), *(chosen if decided else ()))


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


def inline(name: str) -> Markup:
    """Return a file of ours to be placed in the page unescaped."""
    return Markup((_TEMPLATES / name).read_text(encoding="utf-8"))  # no foreign text in it


def source_hash(text: str) -> str:
    """Return the source expression by which a content security policy admits an inline script or style."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _embed(report: Report) -> Markup:
    """Return the report as JSON, sites packed, that cannot end the script element it stands in."""
    packed = {**report, **pack(report["sites"])}
    text = json.dumps(packed, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def pack(sites: list[Any]) -> dict[str, Any]:
    """Return `sites` packed as the module describes, with the `strings` and `shapes` that unpack it."""
    strings: dict[str, str] = {}  # string -> index in base 36
    shapes: dict[tuple[str, ...], int] = {}

    def visit(value: Any) -> Any:
        kind = type(value)
        if kind is str:
            found = strings.get(value)
            if found is None:
                found = strings[value] = _base36(len(strings))
            return found
        if kind is float:
            return float(f"{value:.6g}")
        if kind is dict:
            return [shapes.setdefault(tuple(value), len(shapes)), *map(visit, value.values())]
        if kind is list:
            return [-1, *map(visit, value)]
        return value

    return {"sites": visit(sites), "strings": list(strings), "shapes": [list(shape) for shape in shapes]}


def _base36(index: int) -> str:
    digits = ""
    while True:
        index, digit = divmod(index, 36)
        digits = _DIGITS[digit] + digits
        if not index:
            return digits
