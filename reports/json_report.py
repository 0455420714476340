"""The report as JSON, schema 1: one product per line, so that two reports diff by product."""

import json
from typing import Any, Final

from loka.reports.words import Report

_LISTS: Final[tuple[str, ...]] = ("sites", "events")


def render(report: Report) -> str:
    """Return the report as strictly valid JSON (no NaN, no Infinity)."""
    members = [f" {_dump(key)}: {_lines(value) if key in _LISTS else _dump(value)}" for key, value in report.items()]
    return "{\n" + ",\n".join(members) + "\n}\n"


def _lines(entries: list[Any]) -> str:
    return "[\n  " + ",\n  ".join(map(_dump, entries)) + "\n ]" if entries else "[]"


def _dump(value: Any) -> str:
    return json.dumps(value, allow_nan=False)
