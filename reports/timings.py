"""Timings as a table: a line per shape and kernel, with the ratio to the baseline, ties, and shares of the ceilings."""

from collections.abc import Sequence
from itertools import groupby
from typing import Final

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from loka.dispatch.rooflines import placed, request_of_timing
from loka.kernel_registry.registry import default_registry
from loka.probes.records import Timing
from loka.roofline import Ceilings, Roofline
from loka.timing import faster

# The least width of each column: on a narrow terminal long names of kernels give way, and numbers do not.
_COLUMNS: Final[dict[str, int]] = {"median us": 9, "+-": 7, "speed-up": 11, "of limit": 12}


def timings_table(timings: Sequence[Timing], ceilings: Ceilings | None = None) -> RenderableType:
    """Render timings; within a shape the high-precision kernel first, the others against it."""
    registry = default_registry()
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("kernel", no_wrap=True)
    for name, width in _COLUMNS.items():
        table.add_column(name if ceilings or name != "of limit" else "", justify="right", no_wrap=True, min_width=width)

    def shape(timing: Timing) -> str:
        return str(request_of_timing(timing, registry)).removeprefix(".")

    def is_baseline(timing: Timing) -> bool:
        return timing.kernel in registry and registry.get(timing.kernel).is_baseline

    for words, group in groupby(sorted(timings, key=shape), key=shape):
        rows = sorted(group, key=lambda row: (not is_baseline(row), row.kernel))
        baseline = rows[0] if is_baseline(rows[0]) else None
        table.add_row(f"[bold]{escape(words)}[/]")
        for row in rows:
            cells = [f"{row.median_us:.1f}", f"{row.spread_us:.1f}", _against(row, baseline)]
            table.add_row(f"  {escape(row.kernel)}", *cells, _of_limit(placed(row, registry, ceilings)))
    return table if ceilings is None else Group(table, Text(_legend(ceilings), style="dim"))


def _against(row: Timing, baseline: Timing | None) -> str:
    if baseline is None or row is baseline:
        return ""
    ratio = f"{baseline.median_us / row.median_us:.2f}x"
    return ratio if faster(row, baseline) or faster(baseline, row) else f"{ratio} (tie)"


def _of_limit(place: Roofline | None) -> str:
    if place is None:
        return ""
    share = place.bandwidth_share if place.binds == "memory" else place.compute_share
    return f"{share:.0%} {place.binds}"


def _legend(ceilings: Ceilings) -> str:
    rates = ", ".join(f"{value / 1e9:,.0f} GFLOP/s {name}" for name, value in ceilings.flops_per_s.items())
    return (
        f"of limit: the share of what this device was measured to reach, {ceilings.bytes_per_s / 1e9:,.1f} GB/s, "
        f"{rates}, by whichever of the two the product cannot go below."
    )
