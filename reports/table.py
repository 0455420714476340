"""The report on a terminal: headline, run, one line per product, then what qualifies it.

The table fits any width from 80 columns up. Columns have fixed widths; the site and the kernel share what is left, and
where that is too little, the least needed columns are left out by name (`_DROP`) instead of wrapping a line. No figure
is ever cut. Names that are shortened to the same text are told apart by `~1`, `~2`.
"""

import io
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from rich.cells import set_cell_size
from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style
from rich.text import Text

from loka.reports.words import (
    ORDER,
    Report,
    Row,
    best_recipe,
    bound_of,
    chosen_kernel,
    elide,
    elide_site,
    error,
    events,
    gate_name,
    has_own_bounds,
    limited,
    loss_columns,
    loss_share,
    notes,
    ordered,
    percent,
    plain,
    run_line,
    shape,
    site_name,
    speedup,
    upper,
)

_STYLE: Final[dict[str, Style]] = {
    "safe": Style(color="green"),
    "unsafe": Style(color="red", bold=True),
    "undecided": Style(color="yellow"),
}
_BOLD: Final[Style] = Style(bold=True)
_SITE_WIDTH: Final[int] = 16
_KERNEL_WIDTH: Final[int] = 8
_FILE_WIDTH: Final[int] = 120


@dataclass(frozen=True, kw_only=True, slots=True)
class _Column:
    """One column: its header, how a row fills it, and on which side it is aligned."""

    name: str
    cell: Callable[[Row], str]
    justify: Literal["left", "right"] = "left"


_COLUMNS: Final[tuple[_Column, ...]] = (
    _Column(name="site", cell=site_name),
    _Column(name="pass", cell=lambda row: str(row["pass"])),
    _Column(name="m x k x n", cell=shape, justify="right"),
    _Column(name="FLOPs", cell=lambda row: percent(row["flop_share"]), justify="right"),
    _Column(name="recipe", cell=lambda row: plain(row["best"] or "-")),
    _Column(name="mean", cell=lambda row: error(best_recipe(row), "mean"), justify="right"),
    _Column(name="upper", cell=lambda row: upper(best_recipe(row)), justify="right"),
    _Column(name="kl", cell=lambda row: loss_share(best_recipe(row), "kl"), justify="right"),
    _Column(name="cost", cell=lambda row: loss_share(best_recipe(row), "cost"), justify="right"),
    _Column(name="bound", cell=bound_of, justify="right"),
    _Column(name="verdict", cell=lambda row: str(row["verdict"])),
    _Column(name="kernel", cell=lambda row: plain(row["chosen"] or "-")),
    _Column(name="speed", cell=lambda row: speedup(kernel["speedup"] if (kernel := chosen_kernel(row)) else None)),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Lines of a table, the widths of its columns, the columns that found no room, and whether names got numbers."""

    lines: Segments
    widths: Mapping[str, int]
    dropped: tuple[str, ...]
    alike: bool


# Left out in this order where the width does not suffice.
_DROP: Final[tuple[str, ...]] = ("speed", "mean", "m x k x n", "FLOPs", "kernel", "recipe", "kl", "cost", "bound")


def render(report: Report) -> str:
    """Return the report as plain text of 120 columns, for a file."""
    console = Console(file=io.StringIO(), width=_FILE_WIDTH, color_system=None, legacy_windows=False)
    with console.capture() as capture:
        print_table(report, console)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"


def print_table(report: Report, console: Console) -> None:
    """Print the report, no line longer than the console is wide; colours as the console has them."""
    _say(console, report["summary"]["headline"], style="bold")
    _say(console, run_line(report))
    if report["sites"]:
        console.print()
        table = table_of(report, console.width, ascii_only=console.options.ascii_only)
        console.print(table.lines, end="")
        console.print()
        for words in (_legend(report, table), _limits(report, table)):
            if words:
                _say(console, words, style="dim")
    for title, lines in (("Notes", notes(report)), ("Events", events(report))):
        if lines:
            console.print()
            _say(console, title, style="bold")
            for line in lines:
                _say(console, f"- {line}")


def _say(console: Console, text: str, style: str = "") -> None:
    """Print words as they are: no markup, no highlighting, folded at the width of the console."""
    console.print(Text(plain(text), style=style, overflow="fold"), highlight=False)


def _legend(report: Report, table: Table) -> str:
    """Return what the columns that are shown mean."""
    name = gate_name(report)
    meanings = {
        "mean": f"mean: {name} of the best recipe over steps",
        "upper": f"upper: {name} tolerance of the best recipe for 99 % of steps{limited(report)}",
        **loss_columns(report),
        "speed": "speed: against the baseline",
    }
    return f"{ORDER} {'; '.join(words for name, words in meanings.items() if name in table.widths)}."


def _limits(report: Report, table: Table) -> str:
    """Return what found no room at this width."""
    told = [f"Left out at this width: {', '.join(table.dropped)}."] if table.dropped else []
    names = {"site": site_name, "kernel": lambda row: plain(row["chosen"] or "-")}
    cut = [f"{name}s" for name, say in names.items() if _any_longer(report, say, table.widths.get(name))]
    if cut:
        alike = ", ~1 and ~2 tell apart those that look alike" if table.alike else ""
        told.append(f"Long {' and '.join(cut)} are shortened{alike}: --format csv has them in full.")
    return " ".join(told)


def _any_longer(report: Report, say: Callable[[Row], str], width: int | None) -> bool:
    return width is not None and any(len(say(row)) > width for row in report["sites"])


def table_of(report: Report, width: int, *, ascii_only: bool = False, most: int | None = None) -> Table:
    """Lay out the table in lines of at most `width` cells; `most`: only so many rows, the first in reading order.

    The lines are laid out here, once all widths are known: a Rich table takes seconds over thousands of rows.
    """
    rows = ordered(report)[:most]
    decided = any(row["kernels"] for row in rows)
    without = {*(() if decided else ("kernel", "speed")), *({"kl", "cost"} - loss_columns(report).keys())}
    without |= set() if has_own_bounds(report) else {"bound"}
    columns = [column for column in _COLUMNS if column.name not in without]
    cells = {column.name: [column.cell(row) for row in rows] for column in columns}
    widths, dropped = _fit({name: max(map(len, [name, *texts])) for name, texts in cells.items()}, width)
    mark = "~" if ascii_only else "\u2026"
    if "kernel" in widths:
        cells["kernel"] = [_kernel(row, widths["kernel"]) for row in rows]

    kept = [column for column in columns if column.name in widths]
    cells["site"], alike = _shortened(cells["site"], widths["site"], mark)
    laid_out = [
        [_lay_out(text, column, widths[column.name], mark) for text in (column.name, *cells[column.name])]
        for column in kept
    ]
    verdict = [column.name for column in kept].index("verdict")
    styles = [_BOLD, *(_STYLE[row["verdict"]] for row in rows)]
    segments: list[Segment] = []
    for index, (style, line) in enumerate(zip(styles, zip(*laid_out, strict=True), strict=True)):
        segments += [
            Segment(" ".join([*line[:verdict], ""]), _BOLD if index == 0 else None),
            Segment(line[verdict], style),
            Segment(" ".join(["", *line[verdict + 1 :]]).rstrip(), _BOLD if index == 0 else None),
            Segment.line(),
        ]
    return Table(lines=Segments(segments), widths=widths, dropped=tuple(dropped), alike=alike)


def _shortened(names: Sequence[str], width: int, mark: str) -> tuple[list[str], bool]:
    """Return names in at most `width` characters, different where they differ, and whether that took a number."""
    short = {name: elide_site(name, width, mark) for name in names}
    same: dict[str, list[str]] = defaultdict(list)
    for name, text in short.items():
        same[text].append(name)
    alike = [group for group in same.values() if len(group) > 1]
    for group in alike:
        for number, name in enumerate(group, start=1):
            tail = f"~{number}"
            short[name] = elide_site(name, max(width - len(tail), 1), mark) + tail
    return [short[name] for name in names], bool(alike)


def _lay_out(text: str, column: _Column, width: int, mark: str) -> str:
    """Return `text` in exactly `width` terminal cells."""
    text = elide(text, width, mark)
    if not text.isascii():  # wide characters take two cells
        return set_cell_size(text, width)
    return text.rjust(width) if column.justify == "right" else text.ljust(width)


def _fit(natural: dict[str, int], total: int) -> tuple[dict[str, int], list[str]]:
    """Return the width of each column that fits into `total`, one space between two, and the names left out."""
    minimum = {"site": min(_SITE_WIDTH, natural["site"])}
    if "kernel" in natural:
        minimum["kernel"] = min(_KERNEL_WIDTH, natural["kernel"])
    widths = {**natural, **minimum}
    dropped: list[str] = []
    for name in _DROP:
        if sum(widths.values()) + len(widths) - 1 <= total:
            break
        if name in widths:
            del widths[name]
            dropped.append(name)
    spare = total - sum(widths.values()) - (len(widths) - 1)
    if spare < 0:  # narrower than any terminal: the name gives way, the verdict stays
        widths["site"] = max(1, widths["site"] + spare)
    for name in ("kernel", "site"):  # the kernel may take half of what is spare, the site whatever remains
        if name in widths and spare > 0:
            room = spare if name == "site" else max(spare // 2, spare - (natural["site"] - widths["site"]))
            grown = min(natural[name], widths[name] + room)
            spare -= grown - widths[name]
            widths[name] = grown
    return widths, dropped


def _kernel(row: Row, width: int) -> str:
    """Return the chosen kernel in the longest form that fits: in full, without its recipe, else its library."""
    kernel = chosen_kernel(row)
    if kernel is None:
        return "-"
    if kernel.get("ranges"):
        names = [plain(each["kernel"]).split(".") for each in kernel["ranges"]]
        forms = tuple("/".join(".".join(parts[:length]) for parts in names) for length in (3, 2, 1))
        return next((form for form in (plain(kernel["kernel"]), *forms) if len(form) <= width), forms[-1])
    parts = plain(kernel["kernel"]).split(".")
    short = "baseline" if kernel["recipe"] is None else parts[0]
    forms = (".".join(parts), ".".join(parts[:2]), short)
    return next((form for form in forms if len(form) <= width), short)
