"""The advice for people and for programs: a table, Markdown, and JSON (schema 1)."""

import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Final

from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from loka.reports.advise.advice import Advice, Prediction, Suggestion, plain_data
from loka.reports.markdown import code, line, text
from loka.reports.words import number, percent, plain

SCHEMA: Final[int] = 1
_WIDTH: Final[int] = 120
_COLUMNS: Final[tuple[str, ...]] = ("mod", "where", "row error", "underflow", "time us")


def advice_json(advice: Advice) -> str:
    """Return the advice as JSON: its records, `headline` with them; a number that is not known is null."""
    document: dict[str, Any] = {"schema": SCHEMA, "headline": advice.headline, **asdict(advice)}
    return json.dumps(plain_data(document), indent=2, allow_nan=False)


def advice_text(advice: Advice) -> Group:
    """Render the advice: a line per suggestion, then why and how, what else was looked at, and what is missing."""
    parts: list[Any] = [Text(plain(advice.headline), style="bold"), Text(plain(_about(advice)), style="dim")]
    if advice.suggestions:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for name in _COLUMNS:
            table.add_column(name, no_wrap=name != "where", justify="left" if name in _COLUMNS[:2] else "right")
        for each in advice.suggestions:
            table.add_row(*(Text(cell) for cell in _cells(each)))
        parts += [Text(), table]
        for each in advice.suggestions:
            parts += [Text(), Text(plain(f"{each.mod} on {', '.join(each.targets)}"), style="bold")]
            parts += [Padding(Text(plain(words)), (0, 0, 0, 2)) for words in suggestion_lines(each)]
    for title, lines in _sections(advice):
        parts += [Text(), Text(title, style="bold"), *(Padding(Text(plain(each)), (0, 0, 0, 2)) for each in lines)]
    return Group(*parts)


def advice_plain(advice: Advice) -> str:
    """Return the rendering for a terminal as plain text of a fixed width."""
    console = Console(file=io.StringIO(), width=_WIDTH, highlight=False)
    with console.capture() as captured:
        console.print(advice_text(advice))
    return captured.get()


def advice_markdown(advice: Advice) -> str:
    """Return the advice as GitHub-flavoured Markdown; names are code, and mean nothing else."""
    blocks = ["# FP8 advice", text(advice.headline), text(_about(advice))]
    if advice.suggestions:
        rows = [line(list(_COLUMNS)), line(["---", "---", "--:", "--:", "--:"])]
        for each in advice.suggestions:
            mod, where, *numbers = _cells(each)
            rows.append(line([mod, code(where), *numbers]))
        blocks.append("\n".join(rows))
        for each in advice.suggestions:
            blocks.append(f"## {each.mod} on {', '.join(code(plain(target)) for target in each.targets)}")
            blocks.append("\n".join(f"- {text(words)}" for words in suggestion_lines(each)))
    for title, lines in _sections(advice):
        blocks += [f"## {title}", "\n".join(f"- {text(each)}" for each in lines)]
    return "\n\n".join(blocks) + "\n"


def _about(advice: Advice) -> str:
    return f"run {advice.run[:8]} of {advice.model}, {advice.bound}, times of {advice.device}"


def _cells(suggestion: Suggestion) -> tuple[str, ...]:
    found = suggestion.predictions
    return (
        suggestion.mod,
        plain(", ".join(suggestion.targets)),
        _change(found.row_error),
        _change(found.underflow, share=True),
        _change(found.time_us),
    )


def _change(prediction: Prediction, *, share: bool = False) -> str:
    """Return e.g. `0.061 -> 0.024`; what is not known is a dash."""
    if prediction.after is None:
        return "-"
    return " -> ".join(percent(value) if share else number(value) for value in (prediction.before, prediction.after))


def suggestion_lines(suggestion: Suggestion) -> list[str]:
    """Return what there is to say of a suggestion: figure, sites, predictions with how they were made, the line."""
    found, figure = suggestion.predictions, suggestion.figure
    states = ", ".join(f"{each.site} ({each.status}, {percent(each.flop_share)} of FLOPs)" for each in suggestion.sites)
    lines = [f"{figure.words} ({figure.name}: {figure.value:.3g}, from {figure.threshold:g}; {figure.source})"]
    lines += [f"concerns {states}"] if states else []
    for name, prediction, share in (
        ("row error", found.row_error, False),
        ("underflow", found.underflow, True),
        ("time", found.time_us, False),
    ):
        recipe = f" with {prediction.recipe}" if prediction.recipe and prediction.after is not None else ""
        unit = " us" if name == "time" and prediction.after is not None else ""
        change = f"{_change(prediction, share=share)}{unit}{recipe}: " if prediction.after is not None else ""
        lines.append(f"{name}: {change}{prediction.how}")
    return [*lines, f"{suggestion.kind}: {suggestion.use}"]


def _sections(advice: Advice) -> Sequence[tuple[str, list[str]]]:
    others = [each for each in advice.checked if not each.outcome.startswith("called for")]
    found = (
        ("Looked at, and not called for", [f"{each.mod}: {each.outcome}" for each in others]),
        ("Not known", list(advice.missing)),
    )
    return [(title, lines) for title, lines in found if lines]
