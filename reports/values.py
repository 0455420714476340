"""`loka bench --compare-values` as a table: one line per kernel, a time per kind of values, each against the first."""

from collections.abc import Sequence
from itertools import groupby

from rich.markup import escape
from rich.table import Table

from loka.probes.records import Timing
from loka.reports.fitting import keep_figures
from loka.timing import faster


def values_table(timings: Sequence[Timing]) -> Table:
    """Render times on several kinds of values; the first kind is what the others are compared with."""
    kinds = list(dict.fromkeys(timing.values for timing in timings))
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("kernel", *(f"{kind}, us" for kind in kinds)):
        table.add_column(name, justify="left" if name == "kernel" else "right", no_wrap=True)
    for shape, group in groupby(sorted(timings, key=_shape), key=_shape):
        table.add_row(f"[bold]{shape}[/]")
        rows = list(group)
        for kernel in dict.fromkeys(row.kernel for row in rows):
            of_kind = {row.values: row for row in rows if row.kernel == kernel}
            table.add_row(f"  {escape(kernel)}", *(_cell(of_kind, kind, kinds[0]) for kind in kinds))
    return keep_figures(table)


def _shape(timing: Timing) -> str:
    batch = f"{timing.batch} of " if timing.batch > 1 else ""
    return f"{timing.product} {batch}{timing.m}x{timing.k}x{timing.n} {timing.dtype}"


def _cell(of_kind: dict[str, Timing], kind: str, first: str) -> str:
    time, reference = of_kind.get(kind), of_kind.get(first)
    if time is None:
        return "nothing known"
    if reference is None or time is reference:
        return f"{time.median_us:.1f}"
    differ = faster(time, reference) or faster(reference, time)
    return f"{time.median_us:.1f} ({time.median_us / reference.median_us:.2f}x{'' if differ else ', tie'})"
