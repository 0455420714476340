"""Commands that act on what a probe has found: demo, plan."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from loka.cli.shared import (
    AssumeOption,
    BoundOption,
    Database,
    DeviceOption,
    ProfileOption,
    RunOption,
    plain,
    progress,
    told,
)


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

    with progress("measuring kernels") as tick:
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
        console.print(plain(note), soft_wrap=True)
    console.print(f"Wrote {output}.", soft_wrap=True)
