"""Timings as a table: a line per shape and kernel, with the ratio to the baseline, ties, and shares of the ceilings.

Products whose rows vary come after their shapes once more, with the mean over their row counts: what a plan decides by.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import groupby
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from loka.dispatch.measuring.bench import RowTimes
from loka.dispatch.measuring.rooflines import placed, request_of_timing
from loka.kernel_registry.registry import default_registry
from loka.probes.records import Timing
from loka.reports.fitting import keep_figures
from loka.roofline import Ceilings, Roofline
from loka.timing import Timed, faster

# The least width of each column: on a narrow terminal long names of kernels give way, and numbers do not.
_COLUMNS: Final[dict[str, int]] = {"median us": 9, "+-": 7, "speed-up": 11, "of limit": 12}


def timings_table(
    timings: Sequence[Timing], ceilings: Ceilings | None = None, over_rows: Sequence[RowTimes] = ()
) -> RenderableType:
    """Render timings; within a shape the high-precision kernel first, the others against it."""
    registry = default_registry()
    table = _empty_table(_COLUMNS if ceilings else {**_COLUMNS, "of limit": 0})

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
    keep_figures(table)
    parts = [table, *(part for each in over_rows for part in _means(each))]
    if ceilings is not None:
        parts.append(Text(_legend(ceilings), style="dim"))
    return table if len(parts) == 1 else Group(*parts)


def _empty_table(columns: Mapping[str, int]) -> Table:
    """Return a table of kernels with columns of at least these widths; one of no width has no heading."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("kernel", no_wrap=True)
    for name, width in columns.items():
        table.add_column(name if width else "", justify="right", no_wrap=True, min_width=width or _COLUMNS[name])
    return table


def _means(each: RowTimes) -> Iterator[RenderableType]:
    """Yield one product whose rows vary: what it is, and the mean time of each of its kernels."""
    rows = each.seen if each.timed is None else each.timed
    few = ": too few of them were timed" if each.timed is None else ""
    others = f" and {len(each.sites) - 1} more" if len(each.sites) > 1 else ""
    heading = f"{replace(each.request, site=each.sites[0])}{others}"
    yield Text.assemble("\n", (heading, "bold"), f", mean over {rows.words}{few}")
    if not each.times:
        return
    table = _empty_table({name: width for name, width in _COLUMNS.items() if name != "of limit"})
    for kernel, time in each.times:
        cells = [f"{time.median_us:.1f}", f"{time.spread_us:.1f}", _against(time, each.times[0][1])]
        table.add_row(f"  {escape(kernel)}", *cells)
    yield keep_figures(table)


def row_times_json(over_rows: Sequence[RowTimes]) -> list[dict[str, Any]]:
    """Return the means over row counts as plain values, `times` of each kernel by row count."""
    return [
        {
            "sites": list(each.sites),
            "pass": each.request.product,
            "op": each.request.op,
            **{name: getattr(each.request, name) for name in ("batch", "m", "n", "k", "dtype")},
            "row_counts": [asdict(point) for point in each.seen.points],
            "covered": 0.0 if each.timed is None else each.timed.share,
            "kernels": [
                {
                    "kernel": kernel,
                    "time_us": time.median_us,
                    "spread_us": time.spread_us,
                    "times": [asdict(at) for at in time.at],
                }
                for kernel, time in each.times
            ],
        }
        for each in over_rows
    ]


def _against(row: Timed, baseline: Timed | None) -> str:
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
