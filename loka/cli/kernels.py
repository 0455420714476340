"""Commands about this machine: bench, kernels, env."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from loka.cli.shared import EXIT_GATE, DeviceOption, TableFormat, plain, progress, told, write
from loka.errors import ArgumentError


@told
def bench(
    db: Annotated[str | None, typer.Argument(metavar="[DB]", help="Probe database whose shapes are measured.")] = None,
    suite: Annotated[str | None, typer.Option("--suite", help="A named set of shapes instead, e.g. lrm27.")] = None,
    budget: Annotated[float, typer.Option("--budget", help="Seconds to spend.")] = 60.0,
    device: DeviceOption = None,
    export: Annotated[Path | None, typer.Option("--export", help="Write the times as a device profile.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare each kernel with its definition instead; exit with 1 on a fault.")
    ] = False,
) -> None:
    """Measure every available kernel on the shapes of a run, or of a named suite."""
    from loka.dispatch.bench import bench_database, bench_suite, profile_of, verify_database, verify_suite
    from loka.reports.timings import timings_table
    from loka.reports.verification import verification_table

    if (db is None) == (suite is None):
        raise ArgumentError("loka bench measures either a database or a suite. Give DB, or --suite lrm27.")
    if verify:
        with progress("verifying") as tick:
            found = verify_database(db, device, tick) if db else verify_suite(suite or "", device, tick)
        Console(highlight=False).print(verification_table(found))
        if not all(each.holds for each in found):
            raise typer.Exit(EXIT_GATE)
        return
    with progress("measuring") as tick:
        timings = bench_database(db, device, budget, tick) if db else bench_suite(suite or "", device, budget, tick)
    if export is not None:
        profile_of(timings, suite or str(db), device).save(export)
    Console().print(timings_table(timings))


@told
def kernels(
    format: Annotated[TableFormat, typer.Option("--format", help="How to write it.")] = TableFormat.TABLE,
    device: DeviceOption = None,
) -> None:
    """List every known kernel: available here, or why not."""
    from loka.hardware import current_device, device_info
    from loka.kernel_registry.registry import default_registry

    info = device_info(device or current_device())
    rows: list[dict[str, Any]] = [
        {
            "kernel": spec.name,
            "op": spec.op,
            "recipe": spec.recipe,
            "passes": list(spec.passes),
            "available": reason is None,
            "reason": reason or "",
        }
        for spec, reason in default_registry().listing(info)
    ]
    if format is TableFormat.JSON:
        write(json.dumps({"device": str(info), "kernels": rows}, indent=2), None)
        return
    table = Table("kernel", "recipe", "passes", "here", title=f"Kernels on {info}", title_justify="left")
    for row in rows:
        here = "[green]yes[/]" if row["available"] else f"[yellow]no:[/] {plain(str(row['reason']))}"
        table.add_row(str(row["kernel"]), str(row["recipe"] or "high precision"), " ".join(row["passes"]), here)
    Console().print(table)


@told
def env(
    format: Annotated[TableFormat, typer.Option("--format", help="How to write it.")] = TableFormat.TABLE,
) -> None:
    """Print versions, devices and settings: what to put into a bug report."""
    from loka.environment import environment_facts

    facts = environment_facts()
    if format is TableFormat.JSON:
        write(json.dumps(facts, indent=2), None)
        return
    table = Table("what", "value", title="LoKA environment", title_justify="left")
    for name, value in facts.items():
        table.add_row(name, plain(str(value)))
    Console().print(table)
