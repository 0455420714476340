"""Commands that read what a probe has found: report, explain, diff."""

from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.console import Console

from loka.cli.shared import (
    EXIT_GATE,
    AssumeOption,
    BoundForOption,
    BoundOption,
    Database,
    DeviceOption,
    FailOn,
    OutputOption,
    ProfileOption,
    ReportFormat,
    RunOption,
    TableFormat,
    plain,
    progress,
    told,
    write,
)
from loka.collecting import uncollected
from loka.errors import ArgumentError

if TYPE_CHECKING:
    from loka.bounds import Bound


@told
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
    bound_for: BoundForOption = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Follow a training that is still running; Ctrl-C leaves it alone.")
    ] = False,
    interval: Annotated[
        float | None, typer.Option("--interval", help="Seconds between two looks of --watch; 2 by default.")
    ] = None,
) -> None:
    """Show, for every GEMM of a probed run, whether FP8 is safe, how sure that is, and what it would gain."""
    with uncollected():  # what is imported stays
        from loka.bounds import parse_bound

    limits = parse_bound(bound, bound_for or ())
    if watch or interval is not None:
        _watch(db, limits, run, interval, watch=watch, plain_table=(format, output, fail_on) == _PLAIN_TABLE)
        return
    with uncollected():
        from loka.reports.build import built_of
        from loka.reports.render import rendered
        from loka.reports.summary import fails
        from loka.reports.table import print_table
        from loka.reports.words import plural

        is_page = format is ReportFormat.HTML
        with progress("reading the run"):
            built = built_of(db, limits, run=run, device=device, material=is_page)
        if format is ReportFormat.TABLE and output is None:
            print_table(built.report, Console())
        else:
            write(rendered(built, format.value), output)
        failures = fails(built.report, fail_on.value) if fail_on is not None else []
        del built  # else the collector walks over all of it as soon as it may
    if fail_on is not None and failures:
        failing = f"{plural(len(failures), 'product')}. {'; '.join(failures[:3])}"
        Console(stderr=True, highlight=False).print(
            f"[bold red]--fail-on {fail_on.value}:[/] {plain(failing)}",
            soft_wrap=True,
        )
        raise typer.Exit(EXIT_GATE)


# What `loka report` shows unless it is told otherwise: --format, --output, --fail-on.
_PLAIN_TABLE: Final = (ReportFormat.TABLE, None, None)


def _watch(db: str, bound: "Bound", run: str | None, interval: float | None, *, watch: bool, plain_table: bool) -> None:
    from loka.cli import watching

    seconds = watching.checked_interval(interval)
    if not watch:
        raise ArgumentError("--interval says how often --watch looks. Add --watch, or leave it out.")
    if not plain_table:
        raise ArgumentError(
            "--watch shows a table until the run has ended: it does not go with --format, --output or --fail-on. Run "
            "the report again without --watch for those."
        )
    watching.watch(db, bound, run, seconds)


@told
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
    bound_for: BoundForOption = None,
) -> None:
    """Show every candidate kernel of one site with its time, error and the reason it won or lost."""
    from loka.bounds import parse_bound
    from loka.dispatch.deciding.planner import plan as make_plan
    from loka.formats import pass_name
    from loka.probes.judging.predictions import read_experts, read_predictions
    from loka.probes.judging.trajectories import read_trajectories
    from loka.probes.storing.database import open_database
    from loka.reports.dynamics import dynamics_lines
    from loka.reports.experts import expert_lines
    from loka.reports.explain import decisions_of, explain_json, explain_text

    with progress("reading the run"):
        made = make_plan(
            db,
            parse_bound(bound, bound_for or ()),
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
        dynamics = dynamics_lines(read_trajectories(engine, run), site)
        shown = {each.request.product for each in decisions}
        experts = read_experts(engine, run, site=site)
        dynamics += expert_lines({key: found for key, found in experts.items() if key[1] in shown})
    finally:
        engine.dispose()
    if format is TableFormat.JSON:
        write(explain_json(decisions, predictions, made.bound), None)
        return
    Console(highlight=False).print(explain_text(decisions, predictions, made.bound, dynamics))


@told
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

    with progress("comparing"):
        found = compare(first, second, parse_bound(bound), runs=(run_a, run_b), common=common)
    if format is TableFormat.JSON:
        write(diff_json(found), None)
    else:
        Console(highlight=False).print(diff_text(found))
    if fail_on_change and found.changed:
        raise typer.Exit(EXIT_GATE)
