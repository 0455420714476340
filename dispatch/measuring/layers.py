"""Speed of whole linear layers, all three passes with the casts they share, on the layers a run has.

A cast that two passes share is paid once, so the passes cannot be timed apart and added up. What is timed is a layer
forward and backward; its time is kept as that of the layer's kernel on the forward product. Three casts of six are what
can be shared at most, so a kernel whose passes apart take more than twice the baselines is not timed together.
Where the rows of a layer vary, it is timed at each of its row counts.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final

import torch
from torch import Tensor

from loka.dispatch.deciding.requests import request_of
from loka.dispatch.measuring.draws import Source, draw_operands, sources
from loka.dispatch.measuring.measure import timed, timing_of, tried
from loka.dispatch.measuring.profile import NO_ROWS, TimeTable, at_rows, time_key, varies
from loka.formats import PASSES, Pass
from loka.hardware import DeviceInfo, device_info
from loka.kernel_registry.layers import Needs
from loka.kernel_registry.registry import Registry
from loka.kernel_registry.spec import GemmRequest, KernelSpec
from loka.probes.capturing.row_counts import RowCounts
from loka.probes.judging.evidence import ProductEvidence, RunEvidence
from loka.probes.records import LearnedRecord, Timing
from loka.timing import Candidate, Progress, in_turns, measure

logger = logging.getLogger("loka.dispatch")

# Of the time to measure, what single products get; the rest is for layers.
PRODUCTS_SHARE: Final[float] = 0.8
# Three casts of six can be shared: what a layer takes at least of its passes apart, were it nothing but casts.
LEAST_SHARE: Final[float] = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerShape:
    """A linear layer by its forward product, and where the values of its products come from."""

    request: GemmRequest
    forward: Source
    backward: Source
    rows: RowCounts = field(default_factory=RowCounts)
    share: float = 1.0  # of the time that a layer whose rows do not vary gets


def layer_shapes(evidence: RunEvidence, learned: Iterable[LearnedRecord] = ()) -> list[LayerShape]:
    """Return the distinct linear layers of which a run saw all three passes, those with most work first."""
    known = sources(learned, evidence.products)
    found: dict[tuple[object, ...], LayerShape] = {}
    work: dict[tuple[object, ...], float] = {}
    for products in layers_of(evidence):
        forward = products["fprop"]
        shape = shape_of(products, evidence, known)
        request = shape.request
        points = tuple((point.rows, point.weight) for point in forward.rows.points)
        key = (request.m, request.n, request.k, request.dtype, points)
        work[key] = work.get(key, 0.0) + forward.flops
        found.setdefault(key, shape)
    return [found[key] for key in sorted(found, key=lambda key: (-work[key], key))]


def shape_of(
    products: Mapping[Pass, ProductEvidence], evidence: RunEvidence, known: Mapping[tuple[str, Pass], Source]
) -> LayerShape:
    """Return a layer, given by its three products; `known` says where the values of all products come from."""
    forward = products["fprop"]
    return LayerShape(
        request=request_of(forward, evidence.info.fingerprint),
        forward=known[forward.site, "fprop"],
        backward=known[forward.site, "dgrad"],
        rows=forward.rows,
    )


def layers_of(evidence: RunEvidence) -> list[dict[Pass, ProductEvidence]]:
    """Return, site by site, the three products of each linear layer, where they are those of one layer."""
    sites: dict[str, dict[Pass, ProductEvidence]] = {}
    for product in evidence.products:
        if request_of(product, evidence.info.fingerprint).op == "linear" and product.batch == 1:
            sites.setdefault(product.site, {})[product.product] = product
    return [products for _, products in sorted(sites.items()) if set(products) == set(PASSES) and _is_layer(products)]


def _is_layer(products: dict[Pass, ProductEvidence]) -> bool:
    """Whether three products are Y = X W^T, dX = dY W and dW = dY^T X of one layer, each run as often as the others."""
    f, d, w = (products[each] for each in PASSES)
    same_sizes = (d.m, d.n, d.k) == (f.m, f.k, f.n) and (w.m, w.n, w.k) == (f.n, f.k, f.m)
    same_calls = f.calls == d.calls == w.calls and f.rows == d.rows == w.rows
    return same_sizes and same_calls and f.m * f.n * f.k > 0


def measure_layers(
    shapes: Iterable[LayerShape],
    registry: Registry,
    device: torch.device | str,
    *,
    budget_s: float,
    known: Iterable[Timing] = (),
    on_progress: Progress | None = None,
) -> list[Timing]:
    """Time every layer kernel that could gain, by what is `known` of its passes apart, where it has no time yet.

    Within about `budget_s` seconds; shapes that do not fit it are left out and logged.
    """
    device = torch.device(device)
    contests = _to_time(shapes, registry, device_info(device), TimeTable(known))
    turns = in_turns(
        contests,
        budget_s,
        "layers left untimed",
        lambda each: f"layer {each[0].request}",
        on_progress,
        weight=lambda each: each[0].share,
    )
    return timed(turns, lambda each, share_s: _time(*each, registry, device, share_s))


def _to_time(
    shapes: Iterable[LayerShape], registry: Registry, info: DeviceInfo, times: TimeTable
) -> list[tuple[LayerShape, list[KernelSpec]]]:
    """Return the layers, at each of their row counts, of which a kernel that could gain has no time yet."""
    contests: list[tuple[LayerShape, list[KernelSpec]]] = []
    seen: set[tuple[object, ...]] = set()
    for shape in shapes:
        specs = [
            spec
            for spec in registry.servable(shape.request, info, op="linear_layer")
            if _may_gain(spec, shape, registry, times)
        ]
        for part in _parts(shape):
            missing = [
                spec
                for spec in specs
                if registry.cannot(spec, part.request, info) is None
                and times.lookup(spec.name, part.request) is None
                and time_key(spec.name, part.request) not in seen
            ]
            if missing:
                contests.append((part, missing))
                seen |= {time_key(spec.name, part.request) for spec in missing}
    return contests


def _parts(shape: LayerShape) -> Iterator[LayerShape]:
    """Yield a layer at each of its row counts, those with most work first."""
    if not varies(shape.request, shape.rows):
        yield shape
        return
    for point in sorted(shape.rows.points, key=lambda point: -point.weight * point.rows):
        yield replace(shape, request=at_rows(shape.request, point.rows), rows=NO_ROWS, share=point.weight)


def _may_gain(spec: KernelSpec, shape: LayerShape, registry: Registry, times: TimeTable) -> bool:
    """Whether half of what the passes take apart is less than what the baselines take, as far as that is known."""
    request = shape.request
    rows = times.timed(registry.baseline(request).name, request, shape.rows)
    apart = passes_apart_us(spec, request, registry, times, rows)
    found = [times.expected(registry.baseline(each).name, each, rows) for each in passes_of(request)]
    known = [time.median_us for time in found if time is not None]
    # Without either there is nothing that its time could be compared with.
    return apart is not None and len(known) == len(found) and apart * LEAST_SHARE < sum(known)


def passes_apart_us(
    spec: KernelSpec, request: GemmRequest, registry: Registry, times: TimeTable, rows: RowCounts | None = NO_ROWS
) -> float | None:
    """Return what the passes of a layer kernel take one by one, over its `rows`; None where one was never timed."""
    name = next((each.name for each in registry.candidates("linear") if each.implementation == spec.implementation), "")
    found = [times.expected(name, each, rows) for each in passes_of(request)]
    known = [time.median_us for time in found if time is not None]
    return sum(known) if len(known) == len(found) else None


def passes_of(request: GemmRequest) -> tuple[GemmRequest, ...]:
    """Return the three products of the layer whose forward product this is."""
    m, n, k = request.m, request.n, request.k
    return (
        replace(request, product="fprop"),
        replace(request, product="dgrad", m=m, n=k, k=n),
        replace(request, product="wgrad", m=n, n=k, k=m),
    )


def _time(
    shape: LayerShape, specs: list[KernelSpec], registry: Registry, device: torch.device, budget_s: float
) -> list[Timing]:
    request, info = shape.request, device_info(device)
    dtype: torch.dtype = getattr(torch, request.dtype)
    backward = passes_of(request)[1]
    forward_pairs = draw_operands(request, dtype, device, shape.forward).pairs
    gradients = [pair[0] for pair in draw_operands(backward, dtype, device, shape.backward).pairs]
    pool = [(x, weight, gradients[turn % len(gradients)]) for turn, (x, weight) in enumerate(forward_pairs)]
    calls = tried({spec.name: partial(_loaded, spec, pool) for spec in specs}, request, registry, info)
    if not calls:
        return []
    measured = measure(calls, device=device, budget_s=budget_s, inputs=len(pool))
    values = "learned" if shape.forward.learned else "normal"
    return [timing_of(name, request, info, result, values) for name, result in measured.items()]


_Pool = list[tuple[Tensor, Tensor, Tensor]]  # x, weight and gradient, as many as leave the cache cold


def _loaded(spec: KernelSpec, pool: _Pool) -> Candidate:
    """Load a kernel of all passes, as a function of the copy of the operands that it reads."""
    layer = spec.load_layer()
    assert layer is not None  # a row of the op `linear_layer` has one

    def run(turn: int) -> object:
        x, weight, grad = pool[turn]
        _, kept = layer.forward(x, weight, Needs(x=True, weight=True))
        return layer.backward(grad, kept)

    return run
