"""The report as one HTML file that needs nothing but a browser; `loka.reports.page` makes it, part by part."""

from loka.reports.page.render import render

__all__ = ["render"]
