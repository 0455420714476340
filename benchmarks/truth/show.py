"""The figures as tables on a terminal: gaps by road, promises kept, costs. Percentages throughout."""

from collections.abc import Mapping
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from benchmarks.truth.show_more import show_more

# The other bounds are in the record; `tightest` is harder than any of them.
_BOUNDS_SHOWN: Final[tuple[str, ...]] = ("bound 0.02", "bound 0.03", "bound 0.05", "tightest")


def show(results: Mapping[str, Any], console: Console) -> None:
    """Print the tables that answer the study's questions; everything else is in the record."""
    for split in ("exchangeable", "domain"):
        if f"gaps, {split}" in results:
            console.print(_gap_table(f"|predicted / later - 1|, body, {split}", results[f"gaps, {split}"]["by_pass"]))
    if "gaps, exchangeable" in results:
        tables = results["gaps, exchangeable"]
        own = results["gaps on the early steps themselves, exchangeable"]
        console.print(_gap_table("|predicted / early - 1|, the same steps", own))
        console.print(_gap_table("|predicted / later - 1|, by recipe", tables["by_pass_and_recipe"]))
        console.print(_gap_table("|predicted / later - 1|, by material", tables["by_pass_and_material"]))
        console.print(_rank_table(results["spearman, exchangeable"]))
        if results["hard cases"]:
            console.print(_hard_table(results["hard cases"]))
    if "costs" in results:
        console.print(_coverage_table(results))
        console.print(_false_safe_table(results))
        console.print(_stability_table(results["stability"]))
        console.print(_cost_table(results["costs"]))
        console.print(_road_cost_table(results["seconds per row"]))
        console.print("rows", results["counts"])
    show_more(results, console)


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _gap_table(title: str, groups: Mapping[str, Any]) -> Table:
    """One row per group, one column per road; cells: median / worst, in percent."""
    roads = list(dict.fromkeys(road for found in groups.values() for road in found))
    table = Table("", "rows", *roads, title=f"{title}: median / worst, %")
    for group, found in groups.items():
        cells = [_cell(found.get(road), ("median", "worst")) for road in roads]
        table.add_row(group, str(found["direct"]["rows"]), *cells)
    return table


def _cell(entry: Mapping[str, float] | None, names: tuple[str, ...]) -> str:
    return " / ".join(_percent(entry[name]) for name in names) if entry else "-"


def _rank_table(groups: Mapping[str, Any]) -> Table:
    roads = list(dict.fromkeys(road for found in groups.values() for road in found))
    table = Table("", *roads, title="Spearman across the sites of a material, exchangeable: median / lowest material")
    for group, found in groups.items():
        cells = [
            f"{found[road]['median']:.2f} / {found[road]['lowest']:.2f}" if road in found else "-" for road in roads
        ]
        table.add_row(group, *cells)
    return table


def _hard_table(rows: Mapping[str, Any]) -> Table:
    """Signed gaps at the sites known to be hard; the backward passes are in the record."""
    shown = {name: found for name, found in rows.items() if ", fprop, " in name}
    roads = list(dict.fromkeys(road for found in shown.values() for road in found if road != "actual"))
    table = Table("", "later", *roads, title="hard cases, fprop: predicted / later - 1, %")
    for name, found in shown.items():
        cells = [f"{100 * found[road]:+.1f}" if road in found else "-" for road in roads]
        table.add_row(name, f"{found['actual']:.4f}", *cells)
    return table


def _coverage_table(results: Mapping[str, Any]) -> Table:
    table = Table("rows of", "rows", "covers, %", "two-sample, %", "steps above, %", "rows above", "U / mean")
    table.title = "intervals of early steps on later steps, at 95 %"
    for name, found in results.items():
        if name.startswith("coverage, "):
            table.add_row(
                name.removeprefix("coverage, "),
                str(found["rows"]),
                _percent(found["interval has the later mean"]),
                _percent(found["two_sample"]),
                f"{100 * found['later steps above the tolerance bound']:.2f}",
                str(found["rows with a later mean above it"]),
                f"{found['tolerance bound / later mean, median']:.3f}",
            )
    return table


def _false_safe_table(results: Mapping[str, Any]) -> Table:
    table = Table("rows of", "bound", "rows", "admissible", "safe", "false safe", "steps above, %", title="false safe")
    for name, found in results.items():
        if name.startswith("false safe, "):
            for bound in _BOUNDS_SHOWN:
                entry = found[bound]
                table.add_row(
                    name.removeprefix("false safe, "),
                    bound,
                    *(str(entry[key]) for key in ("rows", "admissible", "safe", "false_safe")),
                    f"{100 * entry['later steps above the bound']:.2f}",
                )
    return table


def _stability_table(found: Mapping[str, Any]) -> Table:
    table = Table("pass", "row_error", "mere (floored)", "spearman", "mere / row_error")
    table.title = "coefficient of variation over later steps: median / p90 / worst, %"
    for product, entry in found.items():
        cells = [_cell(entry[metric], ("median", "p90", "worst")) for metric in ("row_error", "mere")]
        table.add_row(
            product,
            *cells,
            f"{entry['spearman of mere with row_error']:.3f}",
            f"{entry['mere / row_error, median']:.1f}",
        )
    return table


def _cost_table(found: Mapping[str, Any]) -> Table:
    roads = list(dict.fromkeys(road for entry in found.values() for road in entry if road != "plain step, s"))
    table = Table("material", "plain step, s", *roads, title="cost: plain steps per sampled step; seconds once")
    for material, entry in found.items():
        cells = [
            f"{entry[road]['in plain steps']:.2f}; {entry[road]['once, s']:.1f}" if road in entry else "-"
            for road in roads
        ]
        table.add_row(material, f"{entry['plain step, s']:.3f}", *cells)
    return table


def _road_cost_table(found: Mapping[str, Any]) -> Table:
    """What one (site, pass, recipe) costs by each road, from operands to the predicted number."""
    materials = list(dict.fromkeys(name for entry in found.values() for name in entry))
    table = Table("road", *materials, title="CPU milliseconds per row, all early steps together")
    for road, entry in found.items():
        table.add_row(road, *(f"{1000 * entry[name]:.1f}" if name in entry else "-" for name in materials))
    return table
