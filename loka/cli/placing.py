"""Commands that place experts: `loka moe place` and `loka moe evaluate`."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from loka.cli.shared import OutputOption, TableFormat, plain, progress, told, write
from loka.errors import ArgumentError

TraceArgument = Annotated[Path, typer.Argument(metavar="TRACE", help="Routing trace, an .npz file.")]

LoadOption = Annotated[
    float, typer.Option("--max-load", help="Most tokens of a device over the mean, in total over layers.")
]
CautionOption = Annotated[
    float,
    typer.Option("--caution", help="Standard deviations of a batch's mix by which --max-load is kept from afar."),
]
LayersOption = Annotated[
    str | None, typer.Option("--layers", metavar="1,3,5-9", help="The model's layer numbers; all by default.")
]
BusiestOption = Annotated[
    float, typer.Option("--busiest", help="Weight, 0 to 1, of the busiest device of each layer against bytes in all.")
]
PreviousOption = Annotated[Path | None, typer.Option("--previous", help="The placement in force; see --move-tokens.")]
MoveOption = Annotated[
    float, typer.Option("--move-tokens", help="Cost of moving one expert, in tokens of this trace sent.")
]
GroupsOption = Annotated[int, typer.Option("--expert-groups", help="Expert groups of group-limited routing, for EPLB.")]


@told
def place(  # noqa: PLR0913 - one parameter per flag
    trace: TraceArgument,
    devices: Annotated[int, typer.Option("--devices", help="Devices that share the experts of a layer.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the placement goes.")] = Path("placement.json"),
    nodes: Annotated[int, typer.Option("--nodes", help="Nodes that the devices stand in.")] = 1,
    replicas: Annotated[int, typer.Option("--replicas", help="More experts per device than it must hold.")] = 0,
    max_load: LoadOption = 1.2,
    caution: CautionOption = 2.0,
    layers: LayersOption = None,
    busiest: BusiestOption = 0.0,
    previous: PreviousOption = None,
    move_tokens: MoveOption = 0.0,
    expert_groups: GroupsOption = 1,
    seed: Annotated[int, typer.Option("--seed", help="Of every random start.")] = 0,
) -> None:
    """Place the experts of a mixture of experts so that decoding sends few tokens between devices."""
    from loka.dispatch.placement.options import PlaceOptions
    from loka.dispatch.placement.place import place as make_placement
    from loka.dispatch.placement.record import Placement
    from loka.probes.routing.trace import RoutingTrace
    from loka.reports.words import plural

    options = PlaceOptions(
        devices=devices,
        nodes=nodes,
        replicas=replicas,
        layers=None if layers is None else parse_layers(layers),
        max_load=max_load,
        caution=caution,
        busiest=busiest,
        move_tokens=move_tokens,
        expert_groups=expert_groups,
        seed=seed,
    )
    before = None if previous is None else Placement.load(previous)
    routed = RoutingTrace.load(trace)
    with progress("placing experts") as tick:
        made = make_placement(routed, options, previous=before, on_progress=tick)
    made.save(output)
    _say(made.notes)
    Console(highlight=False).print(
        f"Placed {plural(made.experts, 'expert')} in {plural(len(made.layers), 'layer')} on "
        f"{plural(made.devices, 'device')}. Wrote "
        f"{plain(str(output))}. Judge it on other requests with: loka moe evaluate {plain(str(output))} TRACE",
        soft_wrap=True,
    )


@told
def evaluate(
    placement: Annotated[Path, typer.Argument(metavar="PLACEMENT", help="A placement.json of `loka moe place`.")],
    trace: TraceArgument,
    format: Annotated[TableFormat, typer.Option("--format", help="How the figures are shown.")] = TableFormat.TABLE,
    output: OutputOption = None,
    window: Annotated[
        int | None, typer.Option("--window", help="Requests decided together on arrival; 128 per device by default.")
    ] = None,
    hidden_size: Annotated[
        int | None, typer.Option("--hidden-size", help="Elements of a token, where the trace does not say.")
    ] = None,
) -> None:
    """Judge a placement on a trace: bytes between devices, the busiest link, and how evenly devices work."""
    from loka.dispatch.placement.evaluate import evaluate as judge
    from loka.dispatch.placement.record import Placement
    from loka.probes.routing.trace import RoutingTrace

    if hidden_size is not None and hidden_size < 1:
        raise ArgumentError(f"--hidden-size {hidden_size}: a token has at least one element. Give the model's width.")
    made = Placement.load(placement)
    judged = judge(made, RoutingTrace.load(trace), window=window, hidden_size=hidden_size).to_json()
    if format is TableFormat.JSON:
        write(json.dumps(judged, indent=2), output)
        return
    if output is not None:
        raise ArgumentError("--output takes the figures as JSON. Add --format json, or leave it.")
    Console(highlight=False).print(_table(judged))
    _say(judged["notes"])


def parse_layers(text: str) -> tuple[int, ...]:
    """Return the numbers in a text like `1,3,5-9`; raise ArgumentError for anything else."""
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or len(first) > 6 or len(last) > 6:
            raise ArgumentError(f"--layers {text!r}: {part!r} is no layer. Give numbers and ranges, e.g. 1,3,5-9.")
        numbers += range(int(first), int(last or first) + 1)
    if not numbers or len(set(numbers)) != len(numbers):
        raise ArgumentError(f"--layers {text!r} names no layer, or one twice. Give numbers and ranges, e.g. 1,3,5-9.")
    return tuple(numbers)


def _say(notes: Iterable[str]) -> None:
    for note in notes:
        Console(highlight=False).print(plain(note), soft_wrap=True)


def _table(judged: dict[str, Any]) -> Table:
    from loka.reports.words import plural

    sizes = [plural(judged[name], name.removesuffix("s")) for name in ("requests", "devices")]
    table = Table(title=f"{' on '.join(sizes)}, {plural(len(judged['layers']), 'layer')}")
    for name in ("placement", "bytes sent", "of linear", "busiest link, of linear", "load max/mean", "per layer"):
        table.add_column(name, justify="left" if name == "placement" else "right")
    for name, sent in judged["bytes"].items():
        table.add_row(
            name,
            f"{sent:,}",
            _share(sent, judged["bytes"]["linear"]),
            _share(judged["busiest"][name], judged["busiest"]["linear"]),
            f"{judged['imbalance'][name]:.2f}",
            f"{judged['layer_imbalance'][name]:.2f}",
        )
    return table


def _share(value: float, whole: float) -> str:
    return f"{value / whole:.3f}" if whole else "-"
