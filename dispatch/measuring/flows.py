"""Speed of layers that hand FP8 to each other in a frozen model, by the forms of their kernels, on the layers of a run.

Only layers that the run has seen forward alone are timed: a model that trains hands on numbers. All forms of all
kernels of a layer are timed side by side, at each of its row counts, their weights stored.
"""

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

import torch

from loka.dispatch.deciding.requests import request_of
from loka.dispatch.measuring.draws import draw_operands
from loka.dispatch.measuring.forms import Form, call_of, forms_of, takes_codes
from loka.dispatch.measuring.layers import LEAST_SHARE
from loka.dispatch.measuring.measure import as_defined, timed, timing_of
from loka.dispatch.measuring.profile import TimeTable, at_rows, time_key
from loka.dispatch.measuring.shapes import Shape, shapes_of
from loka.hardware import DeviceInfo, device_info
from loka.kernel_registry.bf16_units import left_idle
from loka.kernel_registry.registry import Registry
from loka.kernel_registry.spec import GemmRequest, KernelSpec, Op
from loka.probes.judging.evidence import ProductEvidence, RunEvidence
from loka.probes.records import LearnedRecord, Timing
from loka.timing import Candidate, Progress, in_turns, measure

logger = logging.getLogger("loka.dispatch")

_FUSED: Final[Op] = "linear_norm_act"


@dataclass(frozen=True, kw_only=True, slots=True)
class FlowShape:
    """A layer between others: whether it can be handed codes, and the products that read its result."""

    shape: Shape
    reads: bool
    readers: tuple[GemmRequest, ...]


def serving_flows(evidence: RunEvidence) -> dict[str, str]:
    """Return those flows of a run between layers that only ran forward, of which each reads one other's result."""
    passes: dict[str, set[str]] = {}
    for product in evidence.products:
        passes.setdefault(product.site, set()).add(product.product)
    served = {
        product.site
        for product in evidence.products
        if passes[product.site] == {"fprop"} and product.batch == 1 and product.parameter
    }
    found = {first: then for first, then in evidence.flows.items() if {first, then} <= served and first != then}
    counts = Counter(found.values())
    return {first: then for first, then in sorted(found.items()) if counts[then] == 1}


def op_of(site: str, evidence: RunEvidence) -> Op:
    """Return the op of the kernels with which a site can take part in a chain."""
    return _FUSED if site in evidence.epilogues else "linear"


def flow_shapes(evidence: RunEvidence, learned: Iterable[LearnedRecord] = ()) -> list[FlowShape]:
    """Return the distinct layers between which FP8 can be handed on, at each of their row counts, most work first."""
    flows = serving_flows(evidence)
    found: dict[tuple[object, ...], FlowShape] = {}
    learned = tuple(learned)
    requests = {
        each.site: replace(request_of(each, evidence.info.fingerprint), op=op_of(each.site, evidence))
        for each in evidence.products
        if each.site in flows.values()
    }
    for site in sorted({*flows, *flows.values()}):
        products: tuple[ProductEvidence, ...] = tuple(each for each in evidence.products if each.site == site)
        for shape in shapes_of(replace(evidence, products=products), learned, each_row_count=True):
            if (shape.request.op, shape.request.batch) != ("linear", 1):
                continue
            shape = replace(shape, request=replace(shape.request, op=op_of(site, evidence)))
            key = (shape.request.op, *time_key("", shape.request))
            reader = [at_rows(requests[flows[site]], shape.request.m)] if site in flows else []
            before = found.setdefault(key, FlowShape(shape=shape, reads=False, readers=()))
            reads = before.reads or site in flows.values()
            found[key] = replace(before, reads=reads, readers=(*before.readers, *reader))
    order = sorted(found, key=lambda key: (-found[key].shape.request.flops, str(key)))
    return [found[key] for key in order]


def measure_flows(
    shapes: Iterable[FlowShape],
    registry: Registry,
    device: torch.device | str,
    *,
    budget_s: float,
    known: Iterable[Timing] = (),
    on_progress: Progress | None = None,
) -> list[Timing]:
    """Time the forms of every kernel that could gain, by what is `known` of it, where one of them has no time yet.

    Within about `budget_s` seconds; layers that do not fit it are left out and logged.
    """
    device = torch.device(device)
    contests = _to_time(shapes, registry, device_info(device), TimeTable(known))
    turns = in_turns(
        contests,
        budget_s,
        "layers that hand on FP8 left untimed",
        lambda each: f"forms of {each[0].request}",
        on_progress,
        weight=lambda each: each[0].share,
    )
    return timed(turns, lambda each, share_s: _time(*each, registry, device, share_s))


_Forms = list[tuple[KernelSpec, tuple[Form, ...]]]


def _to_time(
    shapes: Iterable[FlowShape], registry: Registry, info: DeviceInfo, times: TimeTable
) -> list[tuple[Shape, _Forms]]:
    """Return the layers of which a kernel has other forms than the plain one, and one of them no time."""
    contests = []
    for each in shapes:
        request = each.shape.request
        writes = frozenset(recipe for reader in each.readers for recipe in _readable(reader, registry, info, times))
        found: _Forms = [
            (spec, forms)
            for spec in registry.servable(request, info)
            if _may_gain(spec, request, registry, times)
            and (forms := forms_of(spec, request.n, reads=each.reads, writes=writes))
        ]
        if any(times.lookup(form.of(spec.name), request) is None for spec, forms in found for form in forms):
            contests.append((each.shape, found))
    return contests


def _may_gain(spec: KernelSpec, request: GemmRequest, registry: Registry, times: TimeTable) -> bool:
    """Whether half of what a kernel takes is less than what the baseline takes: as with layers, casts are not more."""
    own, baseline = (times.lookup(each.name, request) for each in (spec, registry.baseline(request)))
    return own is not None and baseline is not None and own.median_us * LEAST_SHARE < baseline.median_us


def _readable(request: GemmRequest, registry: Registry, info: DeviceInfo, times: TimeTable) -> frozenset[str]:
    """Return the recipes of the kernels of a product that take codes and could gain."""
    return frozenset(
        spec.recipe
        for spec in registry.servable(request, info)
        if spec.recipe is not None and _may_gain(spec, request, registry, times) and takes_codes(spec)
    )


def _time(shape: Shape, forms: _Forms, registry: Registry, device: torch.device, budget_s: float) -> list[Timing]:
    request, info = shape.request, device_info(device)
    dtype: torch.dtype = getattr(torch, request.dtype)
    drawn = draw_operands(request, dtype, device, shape.source)
    calls: dict[str, Candidate] = {}
    for spec, own in forms:
        try:
            made = {form.of(spec.name): _made(spec, form, drawn.pairs, dtype) for form in own}
            for call in made.values():
                call(0)
            if info.type == "cuda":
                torch.cuda.synchronize()
        except Exception as error:  # noqa: BLE001 - a kernel of any library may fail in any way; its row says how
            logger.warning("%s left untimed with FP8 on either side: %s", spec.name, error)
            continue
        calls |= made
    if not calls:
        return []
    measured = measure(calls, device=device, budget_s=budget_s, inputs=len(drawn.pairs))
    return [timing_of(name, request, info, result, drawn.values) for name, result in measured.items()]


def _made(
    spec: KernelSpec, form: Form, pairs: list[tuple[torch.Tensor, torch.Tensor]], dtype: torch.dtype
) -> Candidate:
    """Load a kernel in one of its forms; an emulated one in the fp32 that defines it, as it is timed by itself."""
    if spec.library != "emulated":
        return call_of(spec, form, pairs, dtype)
    with left_idle():
        return as_defined(call_of(spec, form, pairs, dtype))
