"""The report as GitHub-flavoured Markdown, for a pull request or a wiki.

Names are untrusted: they stand in code spans, where nothing is a link, a mention or HTML, and every character that
could end the span or the table cell is written as an entity.
"""

import re
from typing import Final

from loka.reports.words import (
    ORDER,
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
    number,
    ordered,
    percent,
    plain,
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
_MARK: Final[dict[str, str]] = {"safe": "safe", "unsafe": "**unsafe**", "undecided": "_undecided_"}


def render(report: Report) -> str:
    """Return the report as Markdown."""
    blocks = ["# FP8 safety report", text(report["summary"]["headline"])]
    blocks.append("\n".join(f"- {label}: {text(value)}" for label, value in run_facts(report)))
    if report["sites"]:
        blocks += [_table(report), _legend(report)]
    for title, lines in (("Notes", notes(report)), ("Events", events(report))):
        if lines:
            blocks += [f"## {title}", "\n".join(f"- {text(line)}" for line in lines)]
    return "\n\n".join(blocks) + "\n"


def _legend(report: Report) -> str:
    meanings = (
        f"mean: {gate_name(report)} of the best recipe over steps",
        f"upper: its tolerance for 99 % of steps{limited(report)}",
        *loss_columns(report).values(),
        "speed: against the baseline",
    )
    return f"{ORDER} {'; '.join(meanings)}."


def _table(report: Report) -> str:
    rows = ordered(report)
    decided = any(row["kernels"] for row in rows)
    loss = tuple(loss_columns(report))
    own = (("bound", "--:"),) if has_own_bounds(report) else ()
    header = (*_HEADER, *((name, "--:") for name in loss), *own, *(_DECIDED if decided else ()))
    lines = [line([name for name, _ in header]), line([rule for _, rule in header])]
    return "\n".join([*lines, *(line(_cells(row, decided=decided, loss=loss, own=bool(own))) for row in rows)])


def _cells(row: Row, *, decided: bool, loss: tuple[str, ...], own: bool) -> list[str]:
    recipe, kernel = best_recipe(row), chosen_kernel(row)
    cells = [
        _MARK[row["verdict"]],
        code(site_name(row)),
        row["pass"],
        shape(row),
        percent(row["flop_share"]),
        code(plain(row["best"])) if row["best"] else "-",
        error(recipe, "mean"),
        upper(recipe),
        *(loss_share(recipe, name) for name in loss),
        *([code(bound_of(row))] if own else []),
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
