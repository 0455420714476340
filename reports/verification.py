"""`loka bench --verify` as a table: one line per shape, kernel and kind of values, faults with what is wrong."""

import math
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from loka.dispatch.measuring.verify import Verification
from loka.reports.fitting import keep_figures

_NOTHING = (
    "Nothing to verify: no kernel but the definition itself serves these products on this device. `loka kernels` says "
    "why."
)


def verification_rows(found: Sequence[Verification]) -> list[dict[str, Any]]:
    """Return the comparisons as plain data; `worst` is null where a kernel did not run."""
    return [
        {
            "kernel": each.kernel,
            "recipe": each.recipe,
            "product": str(each.request),
            "values": each.values,
            "holds": each.holds,
            "worst": None if math.isnan(each.worst) else min(each.worst, sys.float_info.max),
            "allowed": each.allowed,
            "reason": each.reason,
        }
        for each in found
    ]


def verification_table(found: Sequence[Verification]) -> RenderableType:
    """Render what was compared, then every fault as a sentence."""
    if not found:
        return Text(_NOTHING)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("kernel", "values", "worst", "allowed", ""):
        table.add_column(name, justify="right" if name in ("worst", "allowed") else "left", no_wrap=True)
    shape = ""
    for each in sorted(found, key=lambda one: (str(one.request), one.kernel, one.values)):
        if str(each.request) != shape:
            shape = str(each.request)
            table.add_row(f"[bold]{escape(shape)}[/]")
        worst = "" if math.isnan(each.worst) else f"{each.worst:.2g}"
        outcome = "[green]holds[/]" if each.holds else "[bold red]fails[/]"
        table.add_row(f"  {escape(each.kernel)}", each.values, worst, f"{each.allowed:.2g}", outcome)
    faults = [each for each in found if not each.holds]
    lines = [
        Padding(Text.assemble((each.kernel, "bold"), f" on {each.request}, {each.values}: {each.reason}"), (0, 0, 0, 2))
        for each in faults
    ]
    legend = Text(
        f"{len(faults)} of {len(found)} comparisons fail. worst: largest difference from the definition, as a share of "
        "the magnitude of what is added up there."
    )
    return Group(keep_figures(table), *lines, legend)
