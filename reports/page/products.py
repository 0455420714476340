"""The table of products: one row per (site, pass), its cells in words, complete without a script."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from markupsafe import Markup, escape

from loka.reports.html import fragment
from loka.reports.words import (
    Report,
    Row,
    best_recipe,
    bound_of,
    chosen_kernel,
    error,
    has_own_bounds,
    loss_columns,
    loss_share,
    ordered,
    percent,
    plain,
    shape,
    site_name,
    speedup,
    upper,
)

# In no text that is printable.
_SEPARATOR: Final[str] = "\x1f"


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """One column: its header, and whether it holds numbers."""

    name: str
    numeric: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class ProductRow:
    """One row: where the product is in the report, and its cells after the site, the verdict's among them."""

    index: int
    fragment: str
    first: bool  # of its site in the table: the fragment is its id
    site: str
    verdict: str
    before: Markup
    after: Markup


@dataclass(frozen=True, kw_only=True, slots=True)
class ProductTable:
    """The table in reading order: unsafe first."""

    columns: tuple[Column, ...]
    rows: tuple[ProductRow, ...]
    decided: bool  # the last two columns are of the chosen kernel


def product_table(report: Report) -> ProductTable:
    """Return the table of a report."""
    position = {id(row): index for index, row in enumerate(report["sites"])}
    loss = tuple(loss_columns(report))
    own, decided = has_own_bounds(report), any(row["kernels"] for row in report["sites"])
    seen: set[str] = set()
    rows = []
    for row in ordered(report):
        rows.append(
            ProductRow(
                index=position[id(row)],
                fragment=fragment(row["site"]),
                first=row["site"] not in seen,
                site=site_name(row),
                verdict=row["verdict"],
                before=_before(row, loss),
                after=_after(row, own=own, decided=decided),
            )
        )
        seen.add(row["site"])
    return ProductTable(columns=_columns(loss, own=own, decided=decided), rows=tuple(rows), decided=decided)


def table_rows(rows: Sequence[ProductRow]) -> Markup:
    """Return the rows of the table in HTML, its tags as short as they may be: a page has thousands."""
    return Markup("".join(map(_line, rows)))


def _line(row: ProductRow) -> str:
    place, verdict = escape(row.fragment), escape(row.verdict)
    name, after = f' id="{place}"' if row.first else "", f"<td>{row.after}" if row.after else ""
    head = f'<tr data-i={row.index}{name}><th scope=row><a href="#{place}">{escape(row.site)}</a>'
    return f'{head}<td>{row.before}<td class="mark {verdict}">{verdict}{after}\n'


def _columns(loss: Iterable[str], *, own: bool, decided: bool) -> tuple[Column, ...]:
    names: list[tuple[str, Any]] = [
        *(("site", False), ("pass", False), ("m x k x n", True), ("FLOPs", True), ("best recipe", False)),
        *(("mean", True), ("upper", True)),
        *((name, True) for name in loss),
        ("verdict", False),
        *([("bound", False)] if own else []),
        *([("kernel", False), ("speed", True)] if decided else []),
    ]
    return tuple(Column(name=name, numeric=numeric) for name, numeric in names)


def _cells(texts: Iterable[str]) -> Markup:
    """Return cells without the tag that begins the first, escaped in one go: a page has tens of thousands."""
    return Markup(str(escape(_SEPARATOR.join(texts))).replace(_SEPARATOR, "<td>"))


def _before(row: Row, loss: Iterable[str]) -> Markup:
    """Return the cells of a row between its site and its verdict, those on the loss last."""
    recipe = best_recipe(row)
    numbers = (shape(row), percent(row["flop_share"]))
    errors = (error(recipe, "mean"), upper(recipe), *(loss_share(recipe, name) for name in loss))
    return _cells((row["pass"], *numbers, plain(row["best"] or "-"), *errors))


def _after(row: Row, *, own: bool, decided: bool) -> Markup:
    """Return the cells of a row after its verdict: a bound of its own, then the kernel and its speed-up."""
    kernel = chosen_kernel(row)
    chosen = (plain(row["chosen"] or "-"), speedup(kernel["speedup"] if kernel else None))
    return _cells((*((bound_of(row),) if own else ()), *(chosen if decided else ())))
