"""The formats of a report by name, as the command line knows them."""

from collections.abc import Callable
from typing import Final

from loka.reports import csv_report, html_report, json_report, markdown, table
from loka.reports.build import Built
from loka.reports.words import Report

FORMATS: Final[dict[str, Callable[[Report], str]]] = {
    "table": table.render,
    "json": json_report.render,
    "csv": csv_report.render,
    "md": markdown.render,
    "html": html_report.render,
}


def rendered(built: Built, format: str) -> str:
    """Return a report in one of FORMATS, the page with its material."""
    if format == "html":
        return html_report.render(built.report, built.material)
    return FORMATS[format](built.report)
