"""What a device can do at most, measured, and how near to it a kernel comes: bandwidth, compute, which one binds.

    bytes   what any implementation has to move: both operands read once in the precision the model has them in, the
            result written once; quantising, padding and transposing in memory count as time and not as work
    FLOPs   2 * m * n * k per product (both in `kernel_registry.spec.GemmRequest`)

A ceiling is what a plain copy, or a large square product in one precision, reaches on this device under the protocol of
`loka.timing`. The one under which the work takes longer binds.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Literal

import torch

from loka.hardware import cache_bytes
from loka.timing import measure

# Square products whose rate is a device's ceiling: large enough to fill it, small enough not to be waited for.
_PRODUCT_EXTENT: Final[Mapping[str, int]] = {"cuda": 8192, "cpu": 1024}
# The best of so few says what a device reaches. Where a product of that extent takes longer than leaves time for them,
# as one in fp16 does on a CPU without units for it, it is of half the extent, and so on.
_MIN_REPETITIONS: Final[int] = 5
_LEAST_EXTENT: Final[int] = 128
# A copy is of so many times the last cache, and never more than this.
_COPY_OF_CACHE: Final[int] = 4
_MAX_COPY_BYTES: Final[int] = 2**30
_HIGH_PRECISION: Final[tuple[str, ...]] = ("float32", "bfloat16", "float16")

Limit = Literal["memory", "compute"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ceilings:
    """What a device reaches: bytes per second of a copy, read and written, and FLOP per second by precision."""

    bytes_per_s: float
    flops_per_s: Mapping[str, float] = field(default_factory=dict)  # "float32", "bfloat16", ..., and "fp8" where it is


@dataclass(frozen=True, kw_only=True, slots=True)
class Roofline:
    """A kernel's time against the ceilings: shares of each, and the one that binds."""

    bandwidth_share: float
    compute_share: float
    binds: Limit


def roofline(moved_bytes: float, flops: float, time_us: float, peak: float, ceilings: Ceilings) -> Roofline | None:
    """Place a time in microseconds under the ceilings, `peak` FLOP per second that of its precision.

    None where there is no ceiling, or the time says nothing.
    """
    if not peak > 0 or not ceilings.bytes_per_s > 0 or not time_us > 0:
        return None
    moving_s, computing_s = moved_bytes / ceilings.bytes_per_s, flops / peak
    return Roofline(
        bandwidth_share=moving_s / (time_us * 1e-6),
        compute_share=computing_s / (time_us * 1e-6),
        binds="memory" if moving_s > computing_s else "compute",
    )


def measure_ceilings(
    device: torch.device | str, *, fp8_product: Callable[[int], object] | None = None, budget_s: float = 3.0
) -> Ceilings:
    """Measure a device's ceilings within about `budget_s` seconds.

    `fp8_product(n)` computes one product of extents n x n x n on FP8 operands that exist already; without one the
    device has no FP8 ceiling. Returns what the best repetition reaches.
    """
    device = torch.device(device)
    share_s = budget_s / (len(_HIGH_PRECISION) + 2)
    rates = {
        name: _rate_of_products(_square(getattr(torch, name), device), device, share_s) for name in _HIGH_PRECISION
    }
    if fp8_product is not None:
        rates["fp8"] = _rate_of_products(fp8_product, device, share_s)
    count = min(_COPY_OF_CACHE * cache_bytes(device), _MAX_COPY_BYTES) // 4
    source = torch.zeros(count, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return Ceilings(bytes_per_s=_rate(8.0 * count, partial(target.copy_, source), device, share_s), flops_per_s=rates)


def _square(dtype: torch.dtype, device: torch.device) -> Callable[[int], object]:
    """Return a product of two square matrices, as a function of their extent."""
    drawn = functools.cache(lambda extent: torch.randn(extent, extent, dtype=torch.float32, device=device).to(dtype))
    return lambda extent: torch.mm(drawn(extent), drawn(extent))


def _rate_of_products(product: Callable[[int], object], device: torch.device, budget_s: float) -> float:
    """Return the FLOP per second of products of n x n x n, as large as are timed within the budget."""
    extent = _PRODUCT_EXTENT.get(device.type, _PRODUCT_EXTENT["cpu"])
    if device.type == "cpu":  # elsewhere what is small says nothing of what is large
        small = _rate(2.0 * _LEAST_EXTENT**3, partial(product, _LEAST_EXTENT), device, 0.0)
        while extent > _LEAST_EXTENT and 2.0 * extent**3 / small > budget_s / _MIN_REPETITIONS:
            extent //= 2
    return _rate(2.0 * extent**3, partial(product, extent), device, budget_s)


def _rate(amount: float, call: Callable[[], object], device: torch.device, budget_s: float) -> float:
    """Return how much of `amount` is done per second by a call."""
    timed = {"ceiling": lambda _: call()}
    found = measure(timed, device=device, budget_s=budget_s, min_repetitions=_MIN_REPETITIONS)["ceiling"]
    return amount / (found.best_us * 1e-6)
