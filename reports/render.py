"""The formats of a report by name, as the command line knows them."""

from collections.abc import Callable
from typing import Final

from loka.reports import csv_report, html_report, json_report, markdown, table
from loka.reports.words import Report

FORMATS: Final[dict[str, Callable[[Report], str]]] = {
    "table": table.render,
    "json": json_report.render,
    "csv": csv_report.render,
    "md": markdown.render,
    "html": html_report.render,
}
