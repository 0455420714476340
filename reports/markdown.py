"""The report as GitHub-flavoured Markdown, for a comment on a pull request, the summary of a CI job or a wiki.

What needs attention stands open, the other products are folded away, and the whole fits into a comment whatever the
model: GitHub takes 65,536 characters. What found no room is counted, the last in reading order first.

Names are untrusted: they stand in code spans, where nothing is a link, a mention or HTML, and every character that
could end the span or the table cell is written as an entity.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Final

from loka.reports.words import (
    ORDER,
    VERDICTS,
    Report,
    Row,
    best_recipe,
    bound_of,
    chosen_kernel,
    elide,
    error,
    events,
    gate_name,
    has_own_bounds,
    limited,
    loss_columns,
    loss_share,
    notes,
    number,
    ordered,
    percent,
    plain,
    plural,
    run_facts,
    shape,
    site_name,
    speedup,
    upper,
)

_HEADER: Final[tuple[tuple[str, str], ...]] = (
    ("verdict", "---"),
    ("site", "---"),
    ("pass", "---"),
    ("m x k x n", "--:"),
    ("FLOPs", "--:"),
    ("best recipe", "---"),
    ("mean", "--:"),
    ("upper", "--:"),
)
_DECIDED: Final[tuple[tuple[str, str], ...]] = (("kernel", "---"), ("time [us]", "--:"), ("speed", "--:"))
# A comment holds 65,536 characters; in bytes, with room for a line of the poster's own.
LIMIT: Final[int] = 64_000
# Products that are not folded away.
_OPEN: Final[int] = 20
# Characters of a name, and of a line of words, that are shown at most.
_NAME: Final[int] = 160
_WORDS: Final[int] = 400
# Bytes that each list of words may take; tables take what is left.
_LIST: Final[int] = 8_000
_MARK: Final[dict[str, str]] = {"safe": "safe", "unsafe": "**unsafe**", "undecided": "_undecided_"}


def render(report: Report) -> str:
    """Return the report as Markdown of at most LIMIT bytes."""
    counts = report["summary"]["verdicts"]
    facts = [("verdicts", ", ".join(f"{counts[verdict]:,} {verdict}" for verdict in VERDICTS)), *run_facts(report)]
    head = ["# FP8 safety report", text(elide(report["summary"]["headline"], 4 * _WORDS, "..."))]
    head.append(_bullets(f"{label}: {value}" for label, value in facts))
    tail = []
    for title, lines in (("Notes", notes(report)), ("Events", events(report))):
        if lines:
            tail += [f"## {title}", _bullets(lines)]
    if report["sites"]:
        taken = _size([*head, *tail])
        head += [*_tables(report, LIMIT - taken), _legend(report)]
    return "\n\n".join([*head, *tail]) + "\n"


def _bullets(lines: Iterable[str]) -> str:
    """Return words as a list, at most _LIST bytes of it."""
    points = [f"- {text(elide(each, _WORDS, '...'))}" for each in lines]
    kept = _fitting(points, _LIST)
    rest = [f"- {plural(len(points) - kept, 'more line')}: in the JSON report"] if kept < len(points) else []
    return "\n".join([*points[:kept], *rest])


def _fitting(lines: Sequence[str], room: int) -> int:
    """Return how many lines, from the first on, fit into so many bytes."""
    for index, each in enumerate(lines):
        room -= len(each.encode()) + 1
        if room < 0:
            return index
    return len(lines)


def _size(blocks: Iterable[str]) -> int:
    return sum(len(block.encode()) + 2 for block in blocks)


def _tables(report: Report, room: int) -> list[str]:
    """Return the table of what needs attention, the folded one of the others, and what found no room."""
    header, rows = _table(report)
    legend = _size([_legend(report)]) + 500  # and the words around the tables
    head = _size(["\n".join(header)])
    kept = _fitting(rows, room - legend - 2 * head)
    shown = rows[: min(_OPEN, kept)]
    blocks = ["\n".join([*header, *shown])]
    if folded := rows[len(shown) : kept]:
        table = "\n".join([*header, *folded])
        summary = f"<summary>{plural(len(folded), 'more product')}</summary>"
        blocks.append(f"<details>\n{summary}\n\n{table}\n\n</details>")
    if kept < len(rows):
        left = plural(len(rows) - kept, "product")
        blocks.append(
            f"Left out, because a comment holds no more: {left}. `loka report DB --format csv` has all of them."
        )
    return blocks


def _legend(report: Report) -> str:
    meanings = (
        f"mean: {gate_name(report)} of the best recipe over steps",
        f"upper: its tolerance for 99 % of steps{limited(report)}",
        *loss_columns(report).values(),
        "speed: against the baseline",
    )
    return f"{ORDER} {'; '.join(meanings)}."


def _table(report: Report) -> tuple[list[str], list[str]]:
    """Return the two lines of the header, and one per product in reading order."""
    rows = ordered(report)
    decided = any(row["kernels"] for row in rows)
    loss = tuple(loss_columns(report))
    own = (("bound", "--:"),) if has_own_bounds(report) else ()
    header = (*_HEADER, *((name, "--:") for name in loss), *own, *(_DECIDED if decided else ()))
    lines = [line([name for name, _ in header]), line([rule for _, rule in header])]
    return lines, [line(_cells(row, decided=decided, loss=loss, own=bool(own))) for row in rows]


def _cells(row: Row, *, decided: bool, loss: tuple[str, ...], own: bool) -> list[str]:
    recipe, kernel = best_recipe(row), chosen_kernel(row)
    cells = [
        _MARK[row["verdict"]],
        code(elide(site_name(row), _NAME, "...")),
        row["pass"],
        shape(row),
        percent(row["flop_share"]),
        code(plain(row["best"])) if row["best"] else "-",
        error(recipe, "mean"),
        upper(recipe),
        *(loss_share(recipe, name) for name in loss),
        *([code(elide(bound_of(row), _NAME, "..."))] if own else []),
    ]
    if decided and kernel:
        cells += [code(plain(kernel["kernel"])), number(kernel["time_us"]), speedup(kernel["speedup"])]
    return cells + ["-"] * (len(_DECIDED) if decided and not kernel else 0)


def line(cells: list[str]) -> str:
    """Return a line of a table."""
    return f"| {' | '.join(cells)} |"


def code(name: str) -> str:
    """Return a name as a code span that stays inside its cell."""
    if "`" in name or "\\" in name:
        return f"<code>{re.sub(r'[^0-9A-Za-z_. ]', _entity, name)}</code>"
    return f"`{name.replace('|', chr(92) + '|')}`"


def text(words: str) -> str:
    """Return words that mean nothing to Markdown, HTML or GitHub (links, mentions, references)."""
    return re.sub(r"[\\`*\[\]|@#&]|<(?=[A-Za-z/!?])", _entity, plain(words)).replace("://", ":&#47;/")


def _entity(match: re.Match[str]) -> str:
    return f"&#{ord(match.group())};"
