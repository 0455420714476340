"""Timings as a table: one line per shape and kernel, with the ratio to the baseline and whether it is a tie."""

from collections.abc import Sequence
from itertools import groupby
from typing import Final

from rich.markup import escape
from rich.table import Table

from loka.probes.records import Timing
from loka.timing import faster


def timings_table(timings: Sequence[Timing]) -> Table:
    """Render timings; within a shape the high-precision kernel first, the others against it."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("kernel", "median us", "+-", "against baseline"):
        table.add_column(name, justify="left" if name == "kernel" else "right", no_wrap=True)
    for shape, group in groupby(sorted(timings, key=_shape), key=_shape):
        rows = list(group)
        baseline = next((row for row in rows if row.kernel.startswith(_BASELINES)), None)
        product, m, k, n, dtype = shape
        table.add_row(f"[bold]{product} {m}x{k}x{n} {dtype}[/]")
        for row in rows:
            cells = (f"{row.median_us:.1f}", f"{row.spread_us:.1f}", _against(row, baseline))
            table.add_row(f"  {escape(row.kernel)}", *cells)
    return table


_BASELINES: Final[tuple[str, ...]] = ("torch.mm.", "torch.native.")


def _shape(timing: Timing) -> tuple[str, int, int, int, str]:
    return timing.product, timing.m, timing.k, timing.n, timing.dtype


def _against(row: Timing, baseline: Timing | None) -> str:
    if baseline is None or row is baseline:
        return ""
    ratio = f"{baseline.median_us / row.median_us:.2f}x"
    return ratio if faster(row, baseline) or faster(baseline, row) else f"{ratio} (tie)"
