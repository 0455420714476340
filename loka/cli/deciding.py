"""Commands that act on what a probe has found: demo, plan."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from loka.cli.shared import (
    AssumeOption,
    BoundForOption,
    BoundOption,
    Database,
    DeviceOption,
    ProfileOption,
    RunOption,
    TableFormat,
    plain,
    progress,
    told,
    write,
)
from loka.errors import ArgumentError

if TYPE_CHECKING:
    from loka.bounds import Bound


ByRowsOption = Annotated[
    bool,
    typer.Option(
        "--by-rows/--no-by-rows",
        help="Where calls differ in rows, as decode and prefill do: a kernel for few rows and one for many.",
    ),
]


@told
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for the database, reports and plan.")] = Path("loka-demo"),
) -> None:
    """Train a Wukong on the bundled real click log under the probe, plan, convert, train on, write the report."""
    from loka.demo import run_demo

    run_demo(out, Console())


@told
def plan(  # noqa: PLR0913 - one parameter per flag
    db: Database,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Where the plan goes, plan.json by default; of a sweep, a .html plot or a .json file.",
        ),
    ] = None,
    bound: BoundOption = "0.05",
    run: RunOption = None,
    device: DeviceOption = None,
    device_profile: ProfileOption = None,
    assume_speedup: AssumeOption = None,
    filter: Annotated[
        list[str] | None, typer.Option("--filter", help="Sites that may leave high precision: name, glob or re:regex.")
    ] = None,
    budget: Annotated[float, typer.Option("--budget", help="Seconds to spend on measuring missing times.")] = 30.0,
    bound_for: BoundForOption = None,
    by_rows: ByRowsOption = True,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Show what a range of bounds would gain instead; no plan is written.")
    ] = False,
    format: Annotated[
        TableFormat | None, typer.Option("--format", help="How a sweep is shown; a table by default.")
    ] = None,
) -> None:
    """Decide a kernel for every GEMM of a probed run, and say what is gained."""
    from loka.bounds import parse_bound

    if format is not None and not sweep:
        raise ArgumentError("--format says how a sweep is shown, and a plan is JSON anyway. Add --sweep, or leave it.")
    options = {
        "run": run,
        "device": device,
        "device_profile": device_profile,
        "assume_speedup": assume_speedup,
        "budget_s": budget,
        "filter": filter,
        "by_rows": by_rows,
    }
    limits = parse_bound(bound, bound_for or ())
    if sweep:
        _sweep(db, limits, output, format or TableFormat.TABLE, options)
    else:
        _plan(db, limits, output or Path("plan.json"), options)


def _sweep(db: str, bound: "Bound", output: Path | None, format: TableFormat, options: dict[str, Any]) -> None:
    from loka.dispatch.deciding.sweep import sweep as make_sweep
    from loka.reports.sweep import render_html, sweep_json, sweep_text

    renderers = {".html": render_html, ".json": sweep_json}
    if output is not None and output.suffix not in renderers:
        raise ArgumentError(
            f"--output {output}: a sweep is written as a plot or as data. Give it a name in .html or .json."
        )
    with progress("measuring kernels") as tick:
        made = make_sweep(db, bound, on_progress=tick, **options)
    if output is not None:
        write(renderers[output.suffix](made), output)
    if format is TableFormat.JSON:
        write(sweep_json(made), None)
        return
    console = Console(highlight=False)
    console.print(sweep_text(made))
    if output is not None:
        console.print(f"Wrote {plain(str(output))}.", soft_wrap=True)


def _plan(db: str, bound: "Bound", output: Path, options: dict[str, Any]) -> None:
    from loka.dispatch.deciding.planner import plan as make_plan

    with progress("measuring kernels") as tick:
        made = make_plan(db, bound, on_progress=tick, **options)
    made.save(output)
    console = Console(highlight=False)
    for note in made.notes:
        console.print(plain(note), soft_wrap=True)
    console.print(f"Wrote {plain(str(output))}.", soft_wrap=True)
