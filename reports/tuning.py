"""`loka bench --tune` as a table: the launch of each product, and what it gains over the untuned one."""

from pathlib import Path
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from loka import document
from loka.kernel_registry.triton.tuned import Tuning

_SCALES: Final[dict[int, str]] = {0: "tensorwise, rowwise", 128: "blockwise", 32: "mxfp8"}


def tuning_rows(tuning: Tuning) -> list[dict[str, Any]]:
    """Return the launches as plain data."""
    return [document.encode(launch) for launch in tuning.launches]


def tuning_table(tuning: Tuning, path: Path) -> RenderableType:
    """Render the launches that were measured, and say where they are kept."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("rows up to", "k x n", "scales", "tile", "warps", "stages", "splits", "median us", "gain"):
        table.add_column(name, justify="left" if name == "scales" else "right", no_wrap=True)
    for each in tuning.launches:
        table.add_row(
            *(str(each.m), f"{each.k}x{each.n}", _SCALES[each.group_k], f"{each.block_m}x{each.block_n}"),
            *(str(each.num_warps), str(each.num_stages), str(each.splits), f"{each.median_us:.1f}"),
            f"{each.default_us / each.median_us:.2f}x" if each.median_us else "",
        )
    kept = f"{len(tuning.launches)} launches in {path}, used on {tuning.provenance.device} with these versions."
    return Group(table, Text(kept, style="dim"))
