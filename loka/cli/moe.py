"""Commands on mixtures of experts: where the tokens went, and where the experts should lie."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console

from loka.cli.placing import evaluate, place
from loka.cli.shared import OutputOption, plain, told, write

app: Final = typer.Typer(
    name="moe",
    help="Mixtures of experts: read routing traces, place experts on devices.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


class RoutingFormat(StrEnum):
    """What `loka moe report` can write."""

    TABLE = "table"
    JSON = "json"
    HTML = "html"
    MD = "md"


@told
def report(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="Routing trace: an .npz of loka.trace_routing.")],
    format: Annotated[RoutingFormat, typer.Option("--format", help="How to write it.")] = RoutingFormat.TABLE,
    output: OutputOption = None,
) -> None:
    """Show how unevenly the experts are used, how that shifts with the domain, and what prefill foretells of decode."""
    from loka.probes.routing.trace import RoutingTrace
    from loka.reports.routing_report import FORMATS, routing_text

    found = RoutingTrace.load(trace)
    if format is not RoutingFormat.TABLE:
        write(FORMATS[format.value](found), output)
    elif output is None:
        Console(highlight=False).print(routing_text(found))
    else:
        console = Console(highlight=False, width=120, no_color=True)
        with console.capture() as captured:
            console.print(routing_text(found))
        write(captured.get(), output)


@told
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="IN", help="Token-level trace (.json, .jsonl, .csv), or the .partial file of a cut-off recording."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Routing trace to write, an .npz.")],
    experts: Annotated[
        int | None, typer.Option("--experts", help="Experts of a layer, where the last ones may never be used.")
    ] = None,
) -> None:
    """Turn a token-level trace of another program, or what a crash has left of a recording, into a routing trace."""
    from loka.probes.routing.convert import convert as make_trace
    from loka.reports.words import plural

    made = make_trace(source, experts=experts)
    made.save(output)
    Console(highlight=False).print(
        plain(
            f"Wrote {output}: {plural(made.requests, 'request')} of {plural(len(made.domains), 'domain')}, "
            f"{plural(len(made.layers), 'layer')} of {plural(made.experts, 'expert')}."
        ),
        soft_wrap=True,
    )


for _command in (report, convert, place, evaluate):
    app.command()(_command)
