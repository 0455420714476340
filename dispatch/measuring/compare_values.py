"""Does the time of a kernel depend on the values it multiplies? The same shapes, kernels and turns, other values.

    normal    N(0, 1) times the operand's measured size: what benchmarks feed their kernels
    zeros     what a chip multiplies at its lowest power
    learned   drawn from what a probe has learned: what the model feeds them

All kinds of values of a shape are timed in one session, taking turns, so that a clock that drifts or throttles hits all
of them alike.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import torch

from loka.dispatch.measuring.draws import Drawn, draw_operands
from loka.dispatch.measuring.measure import runnable, timing_of
from loka.dispatch.measuring.shapes import Shape
from loka.errors import ArgumentError, nearest
from loka.hardware import device_info
from loka.kernel_registry.registry import Registry
from loka.probes.records import Timing
from loka.timing import Candidate, Progress, in_turns, measure

logger = logging.getLogger("loka.dispatch")

KINDS: Final[tuple[str, ...]] = ("normal", "zeros", "learned")


def parse_kinds(text: str) -> tuple[str, ...]:
    """Return the kinds of values in a comma-separated list; raise ArgumentError for others, or fewer than two."""
    kinds = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for kind in kinds:
        if kind not in KINDS:
            raise ArgumentError(f"There are no values {kind!r}. Values: {', '.join(KINDS)}.{nearest(kind, KINDS)}")
    if len(kinds) < 2:
        raise ArgumentError(f"Comparing values takes two kinds at least, of {', '.join(KINDS)}; this is {text!r}.")
    return kinds


def compare_values(
    shapes: Sequence[Shape],
    registry: Registry,
    device: torch.device | str,
    kinds: Sequence[str],
    *,
    budget_s: float,
    on_progress: Progress | None = None,
) -> list[Timing]:
    """Time every available kernel on every shape with every kind of values, within about `budget_s` seconds.

    Returns times whose `values` is the kind. A shape of which nothing is learned has no time for "learned"; raises
    ArgumentError where that is so of all.
    """
    device = torch.device(device)
    if "learned" in kinds and not any(shape.source.learned for shape in shapes):
        raise ArgumentError(
            "Nothing is learned of these products, so no values can be drawn from it. Give a probe database whose run "
            "has learned, or compare normal,zeros."
        )
    timings: list[Timing] = []
    for turn in in_turns(shapes, budget_s, "shapes left untimed", lambda shape: str(shape.request), on_progress):
        with torch.no_grad():
            timings += _compare(turn.item, registry, device, kinds, turn.share_s)
    return timings


def _compare(
    shape: Shape, registry: Registry, device: torch.device, kinds: Sequence[str], budget_s: float
) -> list[Timing]:
    """Time one shape, all kinds of values in turns."""
    request, info = shape.request, device_info(device)
    specs = (registry.baseline(request), *registry.servable(request, info))
    contest: dict[tuple[str, str], Candidate] = {}
    copies = 0
    for kind in kinds:
        drawn = _drawn(shape, kind, device)
        if drawn is not None:
            calls = runnable(specs, request, drawn, registry, info)
            contest |= {(name, kind): call for name, call in calls.items()}
            copies = len(drawn.pairs)
    if not contest:
        return []
    labels = {f"{name} on {kind}": (name, kind) for name, kind in contest}
    measured = measure(
        {label: contest[key] for label, key in labels.items()},
        device=device,
        budget_s=budget_s,
        inputs=copies,
    )
    return [timing_of(name, request, info, measured[label], kind) for label, (name, kind) in labels.items()]


def _drawn(shape: Shape, kind: str, device: torch.device) -> Drawn | None:
    """Draw operands of one kind; None where the shape has none of it."""
    source = shape.source
    if kind == "learned" and not source.learned:
        return None
    if kind != "learned":
        source = replace(source, learned={})
    drawn = draw_operands(shape.request, getattr(torch, shape.request.dtype), device, source)
    if kind != "zeros":
        return drawn
    for a, b in drawn.pairs:
        a.zero_()
        b.zero_()
    return replace(drawn, values="zeros")
