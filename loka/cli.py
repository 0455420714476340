"""The command line: parse arguments, call one function per command, print. No logic of its own.

A `LokaError` becomes one paragraph on stderr and exit code 2; a traceback appears only with `--debug`.
"""

import functools
import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from loka.errors import ArgumentError, LokaError
from loka.version import VERSION

app: Final = typer.Typer(
    name="loka",
    help="FP8 where it usually fails: which GEMMs of your model are safe, which are faster, which kernel should run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

P = ParamSpec("P")
R = TypeVar("R")

EXIT_ERROR: Final[int] = 2  # something went wrong
EXIT_GATE: Final[int] = 1  # --fail-on found what it looks for

_debug = {"on": False}


class ReportFormat(StrEnum):
    """What `loka report` can write."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"
    MD = "md"
    HTML = "html"


class TableFormat(StrEnum):
    """What the listing commands can write."""

    TABLE = "table"
    JSON = "json"


class FailOn(StrEnum):
    """What makes `loka report` fail."""

    UNSAFE = "unsafe"
    UNDECIDED = "undecided"


Database = Annotated[str, typer.Argument(metavar="DB", help="Probe database: a path or a database URL.")]
RunOption = Annotated[str | None, typer.Option("--run", help="Run id or its beginning; the newest by default.")]
BoundOption = Annotated[
    str,
    typer.Option(
        "--bound",
        help="row_error=0.05 (or 0.05) for each product, or loss=2e-4, a share of the loss for all fprop products.",
    ),
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="Device, e.g. cpu or cuda:0; CUDA where there is one.")
]
ProfileOption = Annotated[
    Path | None, typer.Option("--device-profile", help="Take times from this JSON profile instead of this machine.")
]
AssumeOption = Annotated[
    float | None,
    typer.Option("--assume-speedup", help="Count every emulated kernel as so many times faster than its baseline."),
]
OutputOption = Annotated[Path | None, typer.Option("--output", "-o", help="Write here instead of to the terminal.")]


def _told(command: Callable[P, R]) -> Callable[P, R]:
    """Turn a LokaError into one paragraph and an exit code."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except LokaError as error:
            if _debug["on"]:
                raise
            Console(stderr=True, highlight=False).print(f"[bold red]Error:[/] {_plain(str(error))}", soft_wrap=True)
            raise typer.Exit(EXIT_ERROR) from error

    return run


def _plain(text: str) -> str:
    return text.replace("[", r"\[")


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and debug logging.")] = False,
) -> None:
    if version:
        typer.echo(f"loka {VERSION}")
        raise typer.Exit()
    _debug["on"] = debug
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING, format="%(name)s: %(message)s")
    if debug:
        logging.getLogger("loka").setLevel(logging.DEBUG)


@app.command()
@_told
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for the database, reports and plan.")] = Path("loka-demo"),
) -> None:
    """Train a Wukong on the bundled real click log under the probe, plan, convert, train on, write the report."""
    from loka.demo import run_demo

    run_demo(out, Console())


@app.command()
@_told
def report(  # noqa: PLR0913 - one parameter per flag
    db: Database,
    format: Annotated[ReportFormat, typer.Option("--format", help="How to write it.")] = ReportFormat.TABLE,
    output: OutputOption = None,
    bound: BoundOption = "0.05",
    fail_on: Annotated[
        FailOn | None, typer.Option("--fail-on", help="Exit with 1 when a product is unsafe (or undecided).")
    ] = None,
    run: RunOption = None,
    device: DeviceOption = None,
) -> None:
    """Show, for every GEMM of a probed run, whether FP8 is safe, how sure that is, and what it would gain."""
    from loka.bounds import parse_bound
    from loka.reports.build import report_of
    from loka.reports.render import FORMATS
    from loka.reports.summary import fails
    from loka.reports.table import print_table

    document = report_of(db, parse_bound(bound), run=run, device=device)
    if format is ReportFormat.TABLE and output is None:
        print_table(document, Console())
    else:
        _write(FORMATS[format.value](document), output)
    if fail_on is not None:
        failures = fails(document, fail_on.value)
        if failures:
            Console(stderr=True, highlight=False).print(
                f"[bold red]--fail-on {fail_on.value}:[/] {len(failures)} products. {_plain('; '.join(failures[:3]))}",
                soft_wrap=True,
            )
            raise typer.Exit(EXIT_GATE)


@app.command()
@_told
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
        with _progress("verifying") as tick:
            found = verify_database(db, device, tick) if db else verify_suite(suite or "", device, tick)
        Console(highlight=False).print(verification_table(found))
        if not all(each.holds for each in found):
            raise typer.Exit(EXIT_GATE)
        return
    with _progress("measuring") as tick:
        timings = bench_database(db, device, budget, tick) if db else bench_suite(suite or "", device, budget, tick)
    if export is not None:
        profile_of(timings, suite or str(db), device).save(export)
    Console().print(timings_table(timings))


@app.command()
@_told
def plan(  # noqa: PLR0913 - one parameter per flag
    db: Database,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the plan goes.")] = Path("plan.json"),
    bound: BoundOption = "0.05",
    run: RunOption = None,
    device: DeviceOption = None,
    device_profile: ProfileOption = None,
    assume_speedup: AssumeOption = None,
    filter: Annotated[
        list[str] | None, typer.Option("--filter", help="Sites that may leave high precision: name, glob or re:regex.")
    ] = None,
    budget: Annotated[float, typer.Option("--budget", help="Seconds to spend on measuring missing times.")] = 30.0,
) -> None:
    """Decide a kernel for every GEMM of a probed run, and say what is gained."""
    from loka.bounds import parse_bound
    from loka.dispatch.planner import plan as make_plan

    with _progress("measuring kernels") as tick:
        made = make_plan(
            db,
            parse_bound(bound),
            run=run,
            device=device,
            device_profile=device_profile,
            assume_speedup=assume_speedup,
            budget_s=budget,
            on_progress=tick,
            filter=filter,
        )
    made.save(output)
    console = Console(highlight=False)
    for note in made.notes:
        console.print(_plain(note), soft_wrap=True)
    console.print(f"Wrote {output}.", soft_wrap=True)


@app.command()
@_told
def explain(  # noqa: PLR0913 - one parameter per flag
    db: Database,
    site: Annotated[str, typer.Argument(metavar="SITE", help="Name of a module or parameter.")],
    product: Annotated[str | None, typer.Option("--pass", help="fprop, dgrad or wgrad; all by default.")] = None,
    bound: BoundOption = "0.05",
    run: RunOption = None,
    device: DeviceOption = None,
    device_profile: ProfileOption = None,
    assume_speedup: AssumeOption = None,
    format: Annotated[TableFormat, typer.Option("--format", help="How to write it.")] = TableFormat.TABLE,
) -> None:
    """Show every candidate kernel of one site with its time, error and the reason it won or lost."""
    from loka.bounds import parse_bound
    from loka.dispatch.planner import plan as make_plan
    from loka.formats import pass_name
    from loka.probes.database import open_database
    from loka.probes.predictions import read_predictions
    from loka.reports.explain import decisions_of, explain_json, explain_text

    made = make_plan(
        db,
        parse_bound(bound),
        run=run,
        device=device,
        device_profile=device_profile,
        assume_speedup=assume_speedup,
        measure=False,
    )
    decisions = decisions_of(made, site, None if product is None else pass_name(product))
    engine = open_database(db, create=False)
    try:
        predictions = read_predictions(engine, run, site=site)
    finally:
        engine.dispose()
    if format is TableFormat.JSON:
        _write(explain_json(decisions, predictions), None)
        return
    Console(highlight=False).print(explain_text(decisions, predictions))


@app.command()
@_told
def diff(  # noqa: PLR0913 - one parameter per flag
    first: Annotated[str, typer.Argument(metavar="A", help="Probe database or plan.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another of the same kind.")],
    bound: BoundOption = "0.05",
    run_a: Annotated[str | None, typer.Option("--run-a", help="Run of A; the newest by default.")] = None,
    run_b: Annotated[str | None, typer.Option("--run-b", help="Run of B; the newest by default.")] = None,
    common: Annotated[bool, typer.Option("--common", help="Compare what two different models share.")] = False,
    fail_on_change: Annotated[
        bool, typer.Option("--fail-on-change", help="Exit with 1 when anything changed.")
    ] = False,
    format: Annotated[TableFormat, typer.Option("--format", help="How to write it.")] = TableFormat.TABLE,
) -> None:
    """Show what differs between two probed runs, or two plans, and whether it is more than noise."""
    from loka.bounds import parse_bound
    from loka.reports.diff import diff as compare
    from loka.reports.diff_text import diff_json, diff_text

    found = compare(first, second, parse_bound(bound), runs=(run_a, run_b), common=common)
    if format is TableFormat.JSON:
        _write(diff_json(found), None)
    else:
        Console(highlight=False).print(diff_text(found))
    if fail_on_change and found.changed:
        raise typer.Exit(EXIT_GATE)


@app.command()
@_told
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
        _write(json.dumps({"device": str(info), "kernels": rows}, indent=2), None)
        return
    table = Table("kernel", "recipe", "passes", "here", title=f"Kernels on {info}", title_justify="left")
    for row in rows:
        here = "[green]yes[/]" if row["available"] else f"[yellow]no:[/] {_plain(str(row['reason']))}"
        table.add_row(str(row["kernel"]), str(row["recipe"] or "high precision"), " ".join(row["passes"]), here)
    Console().print(table)


@app.command()
@_told
def env(
    format: Annotated[TableFormat, typer.Option("--format", help="How to write it.")] = TableFormat.TABLE,
) -> None:
    """Print versions, devices and settings: what to put into a bug report."""
    from loka.environment import environment_facts

    facts = environment_facts()
    if format is TableFormat.JSON:
        _write(json.dumps(facts, indent=2), None)
        return
    table = Table("what", "value", title="LoKA environment", title_justify="left")
    for name, value in facts.items():
        table.add_row(name, _plain(str(value)))
    Console().print(table)


def _write(text: str, output: Path | None) -> None:
    if output is None:
        sys.stdout.write(text if text.endswith("\n") else text + "\n")
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ArgumentError(
            f"Cannot write {output}: {error.strerror}. Give --output a file in a writable folder."
        ) from error


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int, str], None]]:
    """Show a progress bar on stderr while something long runs."""
    columns = (SpinnerColumn(), TextColumn(what), BarColumn(), TextColumn("{task.fields[now]}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=None, now="")

        def tick(done: int, total: int, now: str) -> None:
            progress.update(task, completed=done, total=total, now=_plain(now))

        yield tick


def main() -> None:
    """Run the command line."""
    app()
