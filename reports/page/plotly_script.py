"""Plotly's script as the page carries it: deflated, and started only when a chart comes into view.

The Python side of Plotly is not needed, so the package is located and never imported. Its script is admitted by the
content security policy under its own hash: an altered one does not run.
"""

import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

from markupsafe import Markup

from loka.errors import LokaError
from loka.reports.html import source_hash
from loka.reports.page.packing import deflated

_SCRIPT: Final[str] = "package_data/plotly.min.js"


@dataclass(frozen=True, kw_only=True, slots=True)
class PlotlyScript:
    """The script, and what a page has to say with it."""

    data: Markup  # deflated
    hash: str  # for the content security policy
    licence: str  # its copyright notice, which has to stay with it


@lru_cache(maxsize=1)
def plotly_script() -> PlotlyScript:
    """Return the script of the installed Plotly. Raises LokaError where there is none."""
    found = importlib.util.find_spec("plotly")
    folders = (found.submodule_search_locations or ()) if found is not None else ()
    path = next((path for folder in folders if (path := Path(folder) / _SCRIPT).is_file()), None)
    if path is None:
        raise LokaError(
            "The HTML report draws its charts with Plotly, whose script was not found beside this Python. Install it "
            "with `pip install plotly`, or write the report as a table, md, csv or json."
        )
    text = path.read_text(encoding="utf-8")
    return PlotlyScript(data=deflated(text), hash=source_hash(text), licence=_licence(text))


def _licence(script: str) -> str:
    """Return the first comment of the script as one line."""
    comment = script.partition("*/")[0].replace("/**", "")
    return "; ".join(line.strip(" *") for line in comment.splitlines() if line.strip(" *"))
