"""`loka bench`: every available kernel on the shapes of a probed run, or of a named suite, as timings and a profile.

Of products whose rows vary, also what a plan counts: the mean time of each kernel over the row counts of the product.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from loka.dispatch.deciding.epilogue import epilogue_shapes
from loka.dispatch.deciding.requests import request_of
from loka.dispatch.measuring.compare_values import compare_values, parse_kinds
from loka.dispatch.measuring.draws import Source
from loka.dispatch.measuring.flows import flow_shapes, measure_flows
from loka.dispatch.measuring.layers import PRODUCTS_SHARE, LayerShape, layer_shapes, measure_layers
from loka.dispatch.measuring.measure import measure_products, measure_shapes
from loka.dispatch.measuring.profile import DeviceProfile, KernelTime, TimeTable, newest, time_key, varies
from loka.dispatch.measuring.shapes import DRAWABLE, Shape, shapes_of
from loka.dispatch.measuring.verify import Verification, verify
from loka.environment import environment_facts
from loka.errors import KernelError
from loka.formats import PASSES, Pass
from loka.hardware import chosen_device, current_device, device_info
from loka.kernel_registry.ceilings import ceilings_of
from loka.kernel_registry.registry import Registry, default_registry
from loka.kernel_registry.spec import GemmRequest
from loka.probes.capturing.row_counts import RowCounts
from loka.probes.judging.evidence import RunEvidence, collect_evidence
from loka.probes.records import Timing
from loka.probes.storing.database import open_database, read_learned, read_timings, write_timings
from loka.roofline import Ceilings
from loka.timing import Progress
from loka.workloads.suites import SuiteProduct, suite

if TYPE_CHECKING:
    from loka.kernel_registry.triton.tuned import Tuning

# One of the kernels that are tuned; where it runs, all do.
TUNED_KERNEL: Final[str] = "triton.gemm.rowwise"


def bench_database(
    db: str | os.PathLike[str], device: torch.device | str | None, budget_s: float, on_progress: Progress | None = None
) -> tuple[Timing, ...]:
    """Measure what a database's newest run needs and does not have yet; the times are kept in it.

    Returns all its times for this device. Raises DatabaseError, EvidenceError.
    """
    where = chosen_device(device)
    engine = open_database(db, create=False)
    try:
        evidence = collect_evidence(engine)
        known, learned = read_timings(engine, str(device_info(where))), read_learned(engine)
        measured = measure_products(
            evidence,
            default_registry(),
            where,
            budget_s=budget_s * PRODUCTS_SHARE,
            known=known,
            learned=learned,
            on_progress=on_progress,
        )
        flows, registry = flow_shapes(evidence, learned), default_registry()
        rest_s = budget_s * (1 - PRODUCTS_SHARE) / (1 + bool(evidence.epilogues) + bool(flows))
        rest: dict[str, Any] = {"budget_s": rest_s, "on_progress": on_progress}
        layers, epilogues = layer_shapes(evidence, learned), epilogue_shapes(evidence, learned)
        measured += measure_layers(layers, registry, where, known=(*known, *measured), **rest)
        measured += measure_shapes(epilogues, registry, where, known=(*known, *measured), **rest)
        measured += measure_flows(flows, registry, where, known=(*known, *measured), **rest)
        if measured:
            write_timings(engine, measured)
    finally:
        engine.dispose()
    return (*known, *measured)


@dataclass(frozen=True, kw_only=True, slots=True)
class RowTimes:
    """A product whose rows vary, and the mean time of each of its kernels over its row counts, the baseline first."""

    request: GemmRequest  # at its median
    sites: tuple[str, ...]
    seen: RowCounts
    timed: RowCounts | None  # None: those timed stand for too few of the calls
    times: tuple[tuple[str, KernelTime], ...]


def row_times(
    db: str | os.PathLike[str], timings: Iterable[Timing], device: torch.device | str | None = None
) -> tuple[RowTimes, ...]:
    """Return the products of a database's newest run whose rows vary, with what these times come to over them."""
    engine = open_database(db, create=False)
    try:
        evidence = collect_evidence(engine)
    finally:
        engine.dispose()
    info = device_info(chosen_device(device))
    table = TimeTable(each for each in timings if each.device == str(info))
    return times_over_rows(evidence, table, default_registry())


def times_over_rows(evidence: RunEvidence, table: TimeTable, registry: Registry) -> tuple[RowTimes, ...]:
    """Do the same from evidence and times; products of one shape and the same row counts are one."""
    found: dict[tuple[object, ...], tuple[GemmRequest, RowCounts, list[str]]] = {}
    for product in evidence.products:
        request = request_of(product, evidence.info.fingerprint)
        if request.op in DRAWABLE and request.batch and varies(request, product.rows):
            key = (request.op, *time_key("", request), product.rows.points)
            found.setdefault(key, (request, product.rows, []))[2].append(product.site)
    result = []
    for request, rows, sites in found.values():
        baseline = registry.baseline(request).name
        timed = table.timed(baseline, request, rows)
        names = (baseline, *(spec.name for spec in registry.candidates(request.op)))
        times = ((name, table.expected(name, request, timed)) for name in names)
        known = tuple((name, time) for name, time in times if time is not None)
        result.append(RowTimes(request=request, sites=tuple(sites), seen=rows, timed=timed, times=known))
    return tuple(result)


def bench_suite(
    name: str, device: torch.device | str | None, budget_s: float, on_progress: Progress | None = None
) -> tuple[Timing, ...]:
    """Measure a named suite of products in all their passes, in bf16 on CUDA and fp32 on a CPU."""
    where = chosen_device(device)
    shapes, registry = suite_shapes(name, where), default_registry()
    share_s = budget_s * PRODUCTS_SHARE
    measured = measure_shapes(shapes, registry, where, budget_s=share_s, on_progress=on_progress)
    layers = [
        LayerShape(request=shape.request, forward=shape.source, backward=shape.source)
        for shape in shapes
        if shape.request.op == "linear" and shape.request.product == "fprop"
    ]
    left_s = budget_s - share_s
    measured += measure_layers(layers, registry, where, budget_s=left_s, known=measured, on_progress=on_progress)
    return tuple(measured)


def verify_shapes(
    shapes: Sequence[Shape], device: torch.device | str | None, on_progress: Progress | None = None
) -> list[Verification]:
    """Compare every kernel available here with its definition: on values like the run's, and on N(0, 1)."""
    return verify(shapes, default_registry(), current_device() if device is None else device, on_progress)


def compare_shapes(
    shapes: Sequence[Shape],
    device: torch.device | str | None,
    kinds: str,
    budget_s: float,
    on_progress: Progress | None = None,
) -> list[Timing]:
    """Time every kernel on several kinds of values, given as `normal,zeros,learned`."""
    where = chosen_device(device)
    return compare_values(
        shapes, default_registry(), where, parse_kinds(kinds), budget_s=budget_s, on_progress=on_progress
    )


def tune_shapes(
    shapes: Sequence[Shape], device: torch.device | str | None, budget_s: float, on_progress: Progress | None = None
) -> "tuple[Path, Tuning]":
    """Tune our kernels for these shapes; return where the launches are kept, and all of them.

    Raises KernelError where our kernels do not run.
    """
    where = chosen_device(device)
    registry = default_registry()
    reason = registry.unavailable(registry.get(TUNED_KERNEL), device_info(where))
    if reason is not None:
        raise KernelError(f"There is nothing to tune on {device_info(where)}: {TUNED_KERNEL} {reason}.")
    from loka.dispatch.measuring.tune import tune  # only here: it imports triton
    from loka.kernel_registry.triton.tuned import tuning_path

    tuning = tune(shapes, where, budget_s=budget_s, on_progress=on_progress)
    path = tuning_path(where)
    assert path is not None  # else `tune` has raised
    return path, tuning


def ceilings_here(timings: Sequence[Timing], device: torch.device | str | None) -> Ceilings | None:
    """Measure the ceilings of the device that these times were measured on; None where there are none to place."""
    return ceilings_of(chosen_device(device)) if timings else None


def shapes_for(db: str | None, suite_name: str | None, device: torch.device | str | None) -> list[Shape]:
    """Return the distinct products of a database's newest run, with what is known of their values, or of a suite."""
    where = chosen_device(device)
    if db is None:
        return suite_shapes(suite_name or "", where)
    engine = open_database(db, create=False)
    try:
        return shapes_of(collect_evidence(engine), read_learned(engine))
    finally:
        engine.dispose()


def profile_of(
    timings: Sequence[Timing], label: str, device: torch.device | str | None, ceilings: Ceilings | None = None
) -> DeviceProfile:
    """Bundle the times of this device, and its ceilings, into a profile that plans can be made from elsewhere."""
    info = device_info(chosen_device(device))
    if not timings:
        raise KernelError(
            f"Nothing was timed on {info}: no FP8 kernel serves these shapes here, or the budget was too small. "
            "See `loka kernels`, or give a larger --budget."
        )
    return DeviceProfile(
        label=label,
        source="measured",
        device=info,
        environment=environment_facts(),
        times=tuple(newest(timings)),
        ceilings=ceilings,
    )


def suite_shapes(name: str, device: torch.device) -> list[Shape]:
    """Return a suite's products in all their passes, the smallest first: what a short budget times is then the most.

    On a CPU the largest of `lrm27` takes longer than the whole budget, and nothing would be timed after it.
    """
    shapes = [_shape(each, product, _dtype(device)) for each in suite(name) for product in _passes(each)]
    return sorted(shapes, key=lambda shape: shape.request.flops)


def _dtype(device: torch.device) -> str:
    return "bfloat16" if device.type == "cuda" else "float32"


def _passes(product: SuiteProduct) -> tuple[Pass, ...]:
    """Return the passes that a product is of: the gradients of a fused layer are products of the op `linear`."""
    return ("fprop",) if product.op == "linear_norm_act" else PASSES


def _shape(product: SuiteProduct, which: Pass, dtype: str) -> Shape:
    rows, reduction, columns = product.m, product.k, product.n
    m, n, k = {
        "fprop": (rows, columns, reduction),
        "dgrad": (rows, reduction, columns),
        "wgrad": (columns, reduction, rows),
    }[which]
    request = GemmRequest(
        site=str(product), product=which, op=product.op, m=m, n=n, k=k, dtype=dtype, batch=product.batch
    )
    return Shape(request=request, products=(), source=Source(tokens=product.tokens))
