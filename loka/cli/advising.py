"""The command that says what to change in a model: advise."""

from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Console

from loka.cli.shared import (
    BoundForOption,
    BoundOption,
    Database,
    DeviceOption,
    OutputOption,
    ProfileOption,
    RunOption,
    progress,
    told,
    write,
)


class AdviceFormat(StrEnum):
    """What `loka advise` can write."""

    TABLE = "table"
    JSON = "json"
    MD = "md"


@told
def advise(  # noqa: PLR0913 - one parameter per flag
    db: Database,
    format: Annotated[AdviceFormat, typer.Option("--format", help="How to write it.")] = AdviceFormat.TABLE,
    output: OutputOption = None,
    bound: BoundOption = "0.05",
    run: RunOption = None,
    device: DeviceOption = None,
    device_profile: ProfileOption = None,
    bound_for: BoundForOption = None,
) -> None:
    """Say which mods a probed run calls for, from which figure, and what each would change."""
    from loka.bounds import parse_bound
    from loka.reports.advise.report import advise as make_advice
    from loka.reports.advise.text import advice_json, advice_markdown, advice_plain, advice_text

    limits = parse_bound(bound, bound_for or ())
    with progress("reading the run"):
        made = make_advice(db, limits, run=run, device=device, device_profile=device_profile)
    if format is AdviceFormat.TABLE and output is None:
        Console(highlight=False).print(advice_text(made))
        return
    renderers = {AdviceFormat.TABLE: advice_plain, AdviceFormat.JSON: advice_json, AdviceFormat.MD: advice_markdown}
    write(renderers[format](made), output)
