"""`loka bench --tune` as a table: the launch of each kernel and product, and what it gains over the untuned one."""

from pathlib import Path
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from loka import document
from loka.kernel_registry.triton.tuned import TunedLaunch, Tuning
from loka.reports.fitting import keep_figures

# What a column is called, and whether it is text.
_COLUMNS: Final[tuple[tuple[str, bool], ...]] = (
    ("kernel", True),
    ("scales", True),
    ("m x k x n", False),
    ("tile", False),
    ("warps", False),
    ("stages", False),
    ("splits", False),
    ("us", False),
    ("gain", False),
)
# Recipes that a kernel runs alike stand for one another (`launches`).
_SCALES: Final[dict[tuple[str, str], str]] = {
    ("gemm", "rowwise"): "tensorwise, rowwise",
    ("epilogue", "rowwise"): "tensorwise, rowwise",
}


def tuning_rows(tuning: Tuning) -> list[dict[str, Any]]:
    """Return the launches as plain data."""
    return [document.encode(launch) for launch in tuning.launches]


def tuning_table(tuning: Tuning, path: Path) -> RenderableType:
    """Render the launches that were measured, and say where they are kept."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    for name, is_text in _COLUMNS:
        table.add_column(name, justify="left" if is_text else "right", no_wrap=True)
    for each in tuning.launches:
        table.add_row(*_cells(each))
    kept = (
        f"{len(tuning.launches)} launches in {path}, used on {tuning.provenance.device} with these versions, for up to "
        "so many rows."
    )
    return Group(keep_figures(table, "kernel", "scales", "m x k x n"), Text(kept, style="dim"))


def _cells(each: TunedLaunch) -> tuple[str, ...]:
    scales = _SCALES.get((each.kernel, each.recipe), each.recipe)
    batch = f"{each.batch}x" if each.batch > 1 else ""
    launch = each.launch
    return (
        " ".join(part for part in (each.kernel, each.product if each.kernel == "small" else "", each.variant) if part),
        scales,
        f"{batch}{each.m}x{each.k}" + (f"x{each.n}" if each.kernel != "quantize" else ""),
        f"{launch.block_m}x{launch.block_n}",
        *(str(launch.num_warps), str(launch.num_stages), str(launch.splits)),
        f"{each.median_us:.1f}",
        f"{each.default_us / each.median_us:.2f}x" if each.median_us else "",
    )
