"""Does a kernel compute what its recipe defines? Element by element, on values like those of the run.

A kernel's product is compared with the emulated definition. What may differ is what the order and the width of its
sums can explain: a share of sum_k |a_ik b_jk|, the magnitude of what was added up there. Every element counts, in
every row; a mean over all of N(0, 1) hides faults that need rows of unequal loudness, or a sum that grows, to show: a
scale of the wrong row, a block of the reduction left out, a narrow accumulator. Operands are therefore drawn from what
the run has learned, and from N(0, 1) beside it.
"""

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from loka.dispatch.draws import Source, draw_operands
from loka.dispatch.shapes import Shape
from loka.formats import PASS_OPERANDS, RECIPES, Pass
from loka.hardware import DeviceInfo, device_info
from loka.kernel_registry.registry import Registry
from loka.kernel_registry.spec import GemmRequest, KernelSpec
from loka.kernel_registry.torch_mm import matmul
from loka.quantize import fake_quantize

logger = logging.getLogger("loka.dispatch")

# Called with comparisons done, comparisons in all, and the one that is next.
Progress = Callable[[int, int, str], None]

# Rows that are compared, spread over all, the first and the last among them.
_ROWS: Final[int] = 256
# Share of the magnitude that FP8 tensor cores may lose: they cut addends to 14 bits of the largest of 32 (see
# `loka.accumulation`), 33 * 2^-13 where one addend dominates its group and 2^-13 where all are alike.
_TENSOR_CORE_SHARE: Final[float] = 2.0**-9
# What fp32 sums lose for every addend, and roundings at the end.
_FP32_SHARE: Final[float] = 2.0**-24
_FLOOR: Final[float] = 2.0**-21


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """One kernel on one product and one kind of values: the worst element, as a share of what was added up there."""

    kernel: str
    recipe: str
    request: GemmRequest
    values: str  # as `draws.Drawn` names them
    worst: float  # NaN: it did not run
    allowed: float
    row: int  # of the worst element
    column: int
    reason: str = ""  # why it did not run, or what is wrong

    @property
    def holds(self) -> bool:
        """Whether every element is within what is allowed."""
        return self.worst <= self.allowed


def verify(
    shapes: Iterable[Shape],
    registry: Registry,
    device: torch.device | str,
    on_progress: Progress | None = None,
) -> list[Verification]:
    """Compare every available low-precision kernel, apart from the definition, with it on every product.

    A source that has learned nothing gives one comparison, on N(0, 1); else there are two. A kernel that raises is a
    row with its reason.
    """
    device = torch.device(device)
    info = device_info(device)
    jobs = [
        (shape.request, spec, values)
        for shape in shapes
        for spec in registry.candidates(shape.request.op)
        if _is_other(spec, shape.request, registry, info)
        for values in ((shape.source, Source()) if shape.source.learned else (Source(),))
    ]
    found = []
    for done, (request, spec, source) in enumerate(jobs):
        if on_progress is not None:
            on_progress(done, len(jobs), f"{spec.name} {request}")
        with torch.no_grad():
            found.append(_verify(spec, request, source, device, info))
    return found


def _is_other(spec: KernelSpec, request: GemmRequest, registry: Registry, info: DeviceInfo) -> bool:
    """Whether a kernel serves a product here and is not the definition itself."""
    servable = registry.unavailable(spec, info) is None and spec.cannot(request) is None
    return servable and spec.library != "emulated"


def _verify(
    spec: KernelSpec, request: GemmRequest, source: Source, device: torch.device, info: DeviceInfo
) -> Verification:
    dtype: torch.dtype = getattr(torch, request.dtype)
    drawn = draw_operands(request, dtype, device, source)
    a, b = drawn.pairs[0]
    blank = Verification(
        kernel=spec.name,
        recipe=str(spec.recipe),
        request=request,
        values=drawn.values,
        worst=math.nan,
        allowed=allowed_share(request.k, info),
        row=-1,
        column=-1,
    )
    try:
        actual = spec.load()(a, b, product=request.product, out_dtype=torch.float32)
        if tuple(actual.shape) != (request.m, request.n):
            return replace(blank, reason=f"returned {tuple(actual.shape)}, not {(request.m, request.n)}")
        return compare(blank, actual, a, b)
    except Exception as error:  # noqa: BLE001 - a kernel of any library may fail in any way; its row says how
        logger.warning("%s failed on %s: %s", spec.name, request, error)
        return replace(blank, reason=f"{type(error).__name__}: {error}")


def allowed_share(k: int, info: DeviceInfo) -> float:
    """Return which share of the magnitude the order and the width of a sum of `k` products may explain."""
    return _FLOOR + _FP32_SHARE * k + (_TENSOR_CORE_SHARE if info.type == "cuda" else 0.0)


def compare(blank: Verification, actual: Tensor, a: Tensor, b: Tensor) -> Verification:
    """Fill in the worst element of `actual` [m, n] against the definition on operands a [m, k] and b [n, k]."""
    rows = torch.linspace(0, max(len(a) - 1, 0), min(_ROWS, len(a)), device=a.device).round().long()
    if not actual.numel():
        return replace(blank, worst=0.0)
    exact_a, exact_b = _rounded(a, b, blank.recipe, blank.request.product)
    exact_a = exact_a[rows]
    definition, magnitude = matmul(exact_a, exact_b), matmul(exact_a.abs(), exact_b.abs())
    difference = (actual[rows].float() - definition).abs()
    share = torch.where(difference == 0, 0.0, difference / magnitude)
    # What is not finite where the definition is has lost everything.
    share = torch.where(actual[rows].isfinite() | ~definition.isfinite(), share.nan_to_num(nan=0.0), math.inf)
    at = int(share.argmax())
    row, column = divmod(at, share.shape[1])
    worst = float(share.flatten()[at])
    found = replace(blank, worst=worst, row=int(rows[row]), column=column)
    if found.holds:
        return found
    wrong = int((share > blank.allowed).any(dim=1).sum())
    return replace(
        found,
        reason=f"{wrong} of {len(rows)} rows compared differ by more than the order of a sum explains, "
        f"the most at row {found.row}, column {column}: {float(actual[found.row, column]):.6g} instead of "
        f"{float(definition[row, column]):.6g}",
    )


def _rounded(a: Tensor, b: Tensor, recipe: str, product: Pass) -> tuple[Tensor, Tensor]:
    roles = PASS_OPERANDS[product]
    exact_a, exact_b = (fake_quantize(x, RECIPES[recipe].operand(role)) for x, role in zip((a, b), roles, strict=True))
    return exact_a, exact_b
