"""Commands about this machine: bench, kernels, env."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console, RenderableType
from rich.table import Table

from loka.cli.shared import EXIT_GATE, DeviceOption, TableFormat, plain, progress, told, write
from loka.errors import ArgumentError

_WIDE: Final[int] = 110  # columns of a terminal


@told
def bench(  # noqa: PLR0913 - one parameter per flag
    db: Annotated[str | None, typer.Argument(metavar="[DB]", help="Probe database whose shapes are measured.")] = None,
    suite: Annotated[str | None, typer.Option("--suite", help="A named set of shapes instead, e.g. lrm27.")] = None,
    budget: Annotated[float, typer.Option("--budget", help="Seconds to spend.")] = 60.0,
    device: DeviceOption = None,
    export: Annotated[Path | None, typer.Option("--export", help="Write the times as a device profile.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare each kernel with its definition instead; exit with 1 on a fault.")
    ] = False,
    tune: Annotated[
        bool, typer.Option("--tune", help="Find the fastest launches of our Triton kernels instead, and keep them.")
    ] = False,
    compare_values: Annotated[
        str | None,
        typer.Option("--compare-values", help="Compare times on other values instead: normal,zeros,learned."),
    ] = None,
    format: Annotated[TableFormat, typer.Option("--format", help="How to write it.")] = TableFormat.TABLE,
) -> None:
    """Measure every available kernel on the shapes of a run, or of a named suite."""
    if (db is None) == (suite is None):
        raise ArgumentError("loka bench measures either a database or a suite. Give DB, or --suite lrm27.")
    asked = [name for name, given in _MODES.items() if {"verify": verify, "tune": tune}.get(name, compare_values)]
    if len(asked) > 1 or (asked and export is not None):
        extra = ["export"] if export is not None else []
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in (*asked, *extra))
        raise ArgumentError(f"{flags} do not go together: each is a measurement of its own. Run one after the other.")
    job = _Job(db, suite, budget, device, format)
    if asked:
        _MODES[asked[0]](job, compare_values or "")
    else:
        _bench_times(job, export)


@dataclass(frozen=True, slots=True)
class _Job:
    """What `loka bench` was asked to measure."""

    db: str | None
    suite: str | None
    budget_s: float
    device: str | None
    format: TableFormat

    def show(self, rows: list[dict[str, Any]], table: Callable[[], RenderableType], **more: Any) -> None:
        """Print rows as JSON, and what there is more, or else the table."""
        if self.format is TableFormat.JSON:
            write(json.dumps({"rows": rows, **more}, indent=2), None)
        else:
            Console(highlight=False).print(table())


def _bench_times(job: _Job, export: Path | None) -> None:
    from loka.dispatch.measuring.bench import bench_database, bench_suite, ceilings_here, profile_of, row_times
    from loka.dispatch.measuring.rooflines import described
    from loka.kernel_registry.registry import default_registry
    from loka.reports.timings import row_times_json, timings_table

    with progress("measuring") as tick:
        if job.db:
            timings = bench_database(job.db, job.device, job.budget_s, tick)
        else:
            timings = bench_suite(job.suite or "", job.device, job.budget_s, tick)
    ceilings = ceilings_here(timings, job.device)
    if export is not None:
        profile_of(timings, job.suite or str(job.db), job.device, ceilings).save(export)
    over_rows = row_times(job.db, timings, job.device) if job.db else ()
    job.show(
        described(timings, default_registry(), ceilings),
        lambda: timings_table(timings, ceilings, over_rows),
        over_rows=row_times_json(over_rows),
    )


def _bench_verify(job: _Job, _: str) -> None:
    from loka.dispatch.measuring.bench import shapes_for, verify_shapes
    from loka.reports.verification import verification_rows, verification_table

    with progress("verifying") as tick:
        found = verify_shapes(shapes_for(job.db, job.suite, job.device), job.device, tick)
    job.show(verification_rows(found), lambda: verification_table(found))
    if not all(each.holds for each in found):
        raise typer.Exit(EXIT_GATE)


def _bench_tune(job: _Job, _: str) -> None:
    from loka.dispatch.measuring.bench import shapes_for, tune_shapes
    from loka.reports.tuning import tuning_rows, tuning_table

    with progress("tuning") as tick:
        path, found = tune_shapes(shapes_for(job.db, job.suite, job.device), job.device, job.budget_s, tick)
    job.show(tuning_rows(found), lambda: tuning_table(found, path))


def _bench_values(job: _Job, kinds: str) -> None:
    from loka.dispatch.measuring.bench import compare_shapes, shapes_for
    from loka.dispatch.measuring.rooflines import described_all
    from loka.kernel_registry.registry import default_registry
    from loka.reports.values import values_table

    with progress("comparing") as tick:
        shapes = shapes_for(job.db, job.suite, job.device)
        timings = compare_shapes(shapes, job.device, kinds, job.budget_s, tick)
    job.show(described_all(timings, default_registry(), None), lambda: values_table(timings))


_MODES: Final[dict[str, Callable[[_Job, str], None]]] = {
    "verify": _bench_verify,
    "tune": _bench_tune,
    "compare_values": _bench_values,
}


@told
def kernels(
    format: Annotated[TableFormat, typer.Option("--format", help="How to write it.")] = TableFormat.TABLE,
    device: DeviceOption = None,
) -> None:
    """List every known kernel: available here, or why not."""
    from loka.hardware import chosen_device, device_info
    from loka.kernel_registry.registry import default_registry

    info = device_info(chosen_device(device))
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
    console = Console(highlight=False)
    # A name that is cut is no name: it says its recipe too, which goes where there is little room.
    wide = console.width >= _WIDE
    table = Table(title=f"Kernels on {info}", title_justify="left", box=None, pad_edge=False, header_style="dim")
    table.add_column("kernel", overflow="fold", min_width=min(40, max(len(str(row["kernel"])) for row in rows)))
    for name in (*(["recipe"] if wide else []), "passes"):
        table.add_column(name, no_wrap=True)
    table.add_column("here", overflow="fold")
    for row in rows:
        here = "[green]yes[/]" if row["available"] else f"[yellow]no:[/] {plain(str(row['reason']))}"
        recipe = [str(row["recipe"] or "high precision")] if wide else []
        table.add_row(str(row["kernel"]), *recipe, " ".join(row["passes"]), here)
    console.print(table)


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
