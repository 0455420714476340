"""Measured times with what they are worth: work, shares of the device's ceilings, and which ceiling binds."""

from collections.abc import Iterable
from typing import Any

from loka.dispatch.measuring.forms import kernel_of
from loka.dispatch.measuring.profile import newest
from loka.kernel_registry.ceilings import precision_of
from loka.kernel_registry.registry import Registry
from loka.kernel_registry.spec import GemmRequest
from loka.probes.records import Timing
from loka.roofline import Ceilings, Roofline, roofline


def request_of_timing(timing: Timing, registry: Registry) -> GemmRequest:
    """Return the product that a time is of; a kernel that is not known here is taken for a linear one."""
    kernel = kernel_of(timing.kernel)
    op = registry.get(kernel).op if kernel in registry else "linear"
    return GemmRequest(
        site="",
        product=timing.product,
        op=op,
        m=timing.m,
        n=timing.n,
        k=timing.k,
        dtype=timing.dtype,
        batch=timing.batch,
    )


def placed(timing: Timing, registry: Registry, ceilings: Ceilings | None) -> Roofline | None:
    """Place a time under the ceilings of its device; None where they are not known, and for FP8 that is handed on."""
    if ceilings is None or kernel_of(timing.kernel) != timing.kernel:
        return None
    request = request_of_timing(timing, registry)
    recipe = registry.get(timing.kernel).recipe if timing.kernel in registry else None
    peak = ceilings.flops_per_s.get(precision_of(timing.kernel, recipe, timing.dtype), 0.0)
    return roofline(request.moved_bytes, request.flops, timing.median_us, peak, ceilings)


def described(timings: Iterable[Timing], registry: Registry, ceilings: Ceilings | None) -> list[dict[str, Any]]:
    """Return times as plain data, the newest per kernel and shape (see `described_all`)."""
    return described_all(newest(timings), registry, ceilings)


def described_all(timings: Iterable[Timing], registry: Registry, ceilings: Ceilings | None) -> list[dict[str, Any]]:
    """Return times as plain data, each with its work and its place under the ceilings (null where not known)."""
    rows = []
    for timing in timings:
        request, place = request_of_timing(timing, registry), placed(timing, registry, ceilings)
        rows.append(
            {
                "kernel": timing.kernel,
                "op": request.op,
                "pass": timing.product,
                **{name: getattr(timing, name) for name in ("batch", "m", "n", "k", "dtype", "device", "values")},
                **{name: getattr(timing, name) for name in ("median_us", "spread_us", "repetitions")},
                "bytes": request.moved_bytes,
                "flops": request.flops,
                "bandwidth_share": place.bandwidth_share if place else None,
                "compute_share": place.compute_share if place else None,
                "binds": place.binds if place else None,
            }
        )
    return rows
