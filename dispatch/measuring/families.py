"""Speed of layers that read one input, all passes of all of them with the casts they share, on the families of a run.

What is timed is a family forward and backward on one kernel, its input cast once. Its time is kept as that of a layer
of their common input and of all their outputs, as many times as there are members.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from loka.dispatch.measuring.draws import draw_operands, sources
from loka.dispatch.measuring.layers import LayerShape, layers_of, passes_of, shape_of
from loka.dispatch.measuring.measure import timed, timing_of, tried
from loka.dispatch.measuring.profile import NO_ROWS, TimeTable, at_rows, time_key, varies
from loka.hardware import DeviceInfo, device_info
from loka.kernel_registry.layers import Made, Needs
from loka.kernel_registry.registry import Registry
from loka.kernel_registry.spec import GemmRequest, KernelSpec
from loka.probes.judging.evidence import RunEvidence
from loka.probes.records import LearnedRecord, Timing
from loka.timing import Candidate, Progress, in_turns, measure


@dataclass(frozen=True, kw_only=True, slots=True)
class FamilyShape:
    """Layers that read one input, the first reader first."""

    members: tuple[LayerShape, ...]

    @property
    def request(self) -> GemmRequest:
        """What the time of all of them is kept under."""
        return family_request([member.request for member in self.members])


def family_request(requests: Sequence[GemmRequest]) -> GemmRequest:
    """Return the forward products of several layers of one input as one request."""
    return replace(requests[0], n=sum(each.n for each in requests), batch=len(requests))


def family_shapes(evidence: RunEvidence, learned: Iterable[LearnedRecord] = ()) -> list[FamilyShape]:
    """Return the distinct families of a run, layers that read an input of one size, those with most work first."""
    layers = {products["fprop"].site: products for products in layers_of(evidence)}
    known = sources(learned, evidence.products)
    found: dict[tuple[object, ...], tuple[float, FamilyShape]] = {}
    for family in evidence.families:
        members = tuple(shape_of(layers[site], evidence, known) for site in family if site in layers)
        inputs = {(each.request.m, each.request.k, each.request.dtype, each.rows) for each in members}
        if len(members) < 2 or len(inputs) > 1:
            continue
        shape = FamilyShape(members=members)
        key = (*(each.request.n for each in members), *inputs)
        work = sum(layers[site]["fprop"].flops for site in family if site in layers)
        before = found.get(key, (0.0, shape))
        found[key] = (before[0] + work, before[1])
    return [shape for _, shape in sorted(found.values(), key=lambda each: (-each[0], each[1].request.site))]


def measure_families(
    families: Iterable[FamilyShape],
    registry: Registry,
    device: torch.device | str,
    *,
    budget_s: float,
    known: Iterable[Timing] = (),
    on_progress: Progress | None = None,
) -> list[Timing]:
    """Time every layer kernel that each member of a family has a time on, where the family has none yet.

    Within about `budget_s` seconds; families that do not fit it are left out and logged.
    """
    device = torch.device(device)
    contests = _to_time(families, registry, device_info(device), TimeTable(known))
    turns = in_turns(contests, budget_s, "families left untimed", lambda each: f"family {each[0].request}", on_progress)
    return timed(turns, lambda each, share_s: _time(*each, registry, device, share_s))


def _to_time(
    families: Iterable[FamilyShape], registry: Registry, info: DeviceInfo, times: TimeTable
) -> list[tuple[FamilyShape, list[KernelSpec]]]:
    """Return the families, at each of their row counts, of which a kernel of all members has no time yet."""
    contests: list[tuple[FamilyShape, list[KernelSpec]]] = []
    seen: set[tuple[object, ...]] = set()
    for family in families:
        for part in _parts(family):
            missing = [
                spec
                for spec in registry.servable(part.members[0].request, info, op="linear_layer")
                if all(times.lookup(spec.name, each.request) is not None for each in part.members)
                and times.lookup(spec.name, part.request) is None
                and time_key(spec.name, part.request) not in seen
            ]
            if missing:
                contests.append((part, missing))
                seen |= {time_key(spec.name, part.request) for spec in missing}
    return contests


def _parts(family: FamilyShape) -> Iterator[FamilyShape]:
    """Yield a family at each of its row counts, those with most work first."""
    first = family.members[0]
    if not varies(first.request, first.rows):
        yield family
        return
    for point in sorted(first.rows.points, key=lambda point: -point.weight * point.rows):
        yield FamilyShape(
            members=tuple(
                replace(each, request=at_rows(each.request, point.rows), rows=NO_ROWS, share=point.weight)
                for each in family.members
            )
        )


@dataclass(frozen=True, slots=True)
class _Operands:
    """What one member reads beside the input, as many copies as leave the cache cold."""

    weights: list[Tensor]
    gradients: list[Tensor]


def _time(
    family: FamilyShape, specs: list[KernelSpec], registry: Registry, device: torch.device, budget_s: float
) -> list[Timing]:
    request, info = family.request, device_info(device)
    dtype: torch.dtype = getattr(torch, request.dtype)
    inputs: list[Tensor] = []
    members = []
    for member in family.members:
        pairs = draw_operands(member.request, dtype, device, member.forward).pairs
        inputs = inputs or [pair[0] for pair in pairs]
        backward = draw_operands(passes_of(member.request)[1], dtype, device, member.backward).pairs
        members.append(_Operands([pair[1] for pair in pairs], [pair[0] for pair in backward]))
    calls = tried({spec.name: partial(_loaded, spec, inputs, members) for spec in specs}, request, registry, info)
    if not calls:
        return []
    measured = measure(calls, device=device, budget_s=budget_s, inputs=len(inputs))
    values = "learned" if family.members[0].forward.learned else "normal"
    return [timing_of(name, request, info, result, values) for name, result in measured.items()]


def _loaded(spec: KernelSpec, inputs: list[Tensor], members: list[_Operands]) -> Candidate:
    """Load a kernel of all passes, as a function of the copy of the input that all members read."""
    layer = spec.load_layer()
    assert layer is not None  # a row of the op `linear_layer` has one
    needs = Needs(x=True, weight=True)

    def run(turn: int) -> object:
        x = inputs[turn]
        made = Made(x=layer.input_sides(x, needs))
        kept = [layer.forward(x, each.weights[turn % len(each.weights)], needs, made)[1] for each in members]
        gradients = (each.gradients[turn % len(each.gradients)] for each in members)
        return [layer.backward(grad, one) for grad, one in zip(gradients, kept, strict=True)]

    return run
