"""Does a kernel compute what its recipe defines? Element by element, on values like those of the run.

A kernel's product is compared with the emulated definition. What may differ is what the order and the width of its
sums can explain: a share of sum_k |a_ik b_jk|, the magnitude of what was added up there. Every element counts, in
every row; a mean over all of N(0, 1) hides faults that need rows of unequal loudness, or a sum that grows, to show: a
scale of the wrong row, a block of the reduction left out, a narrow accumulator. Operands are therefore drawn from what
the run has learned, and from N(0, 1) beside it.

Of a batch, every matrix is a product of its own, and of a grouped product every expert: its scales come from its own
rows alone, and rows of no expert are zero.
"""

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from loka.dispatch.measuring.draws import Drawn, Source, draw_operands
from loka.dispatch.measuring.shapes import Shape
from loka.formats import PASS_OPERANDS, RECIPES, Pass
from loka.hardware import DeviceInfo, device_info
from loka.kernel_registry.grouped import spans
from loka.kernel_registry.norm_act import NORM_BLOCK, block_norm, norm_act
from loka.kernel_registry.registry import Registry
from loka.kernel_registry.spec import BATCHED, GemmRequest, KernelSpec
from loka.kernel_registry.torch_mm import matmul
from loka.quantize import fake_quantize
from loka.timing import Progress

logger = logging.getLogger("loka.dispatch")

# Rows that are compared, spread over all, the first and the last among them.
_ROWS: Final[int] = 256
# Of every matrix of a batch and every expert at least so many.
_MIN_ROWS: Final[int] = 8
# The steepest slope of hard_swish, at 3.
_HARD_SWISH_SLOPE: Final[float] = 1.5
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
    row: int  # of the worst element, the leading dimensions of the result flattened
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
        for spec in registry.servable(shape.request, info)
        if spec.library != "emulated"  # which is the definition itself
        for values in ((shape.source, Source()) if shape.source.learned else (Source(),))
    ]
    found = []
    for done, (request, spec, source) in enumerate(jobs):
        if on_progress is not None:
            on_progress(done, len(jobs), f"{spec.name} {request}")
        with torch.no_grad():
            found.append(_verify(spec, request, source, device, info))
    return found


def _verify(
    spec: KernelSpec, request: GemmRequest, source: Source, device: torch.device, info: DeviceInfo
) -> Verification:
    dtype: torch.dtype = getattr(torch, request.dtype)
    drawn = draw_operands(request, dtype, device, source)
    parts = parts_of(request, drawn)
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
        actual = drawn.call(spec, request.product, torch.float32)(0)
        expected = _result_shape(request)
        if tuple(actual.shape) != expected:
            return replace(blank, reason=f"returned {tuple(actual.shape)}, not {expected}")
        return compare(blank, actual.reshape(-1, request.n), parts)
    except Exception as error:  # noqa: BLE001 - a kernel of any library may fail in any way; its row says how
        logger.warning("%s failed on %s: %s", spec.name, request, error)
        return replace(blank, reason=f"{type(error).__name__}: {error}")


def allowed_share(k: int, info: DeviceInfo) -> float:
    """Return which share of the magnitude the order and the width of a sum of `k` products may explain."""
    return _FLOOR + _FP32_SHARE * k + (_TENSOR_CORE_SHARE if info.type == "cuda" else 0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A product of its own within a result: rows from `first` on are a [m, k] times b [n, k]."""

    a: Tensor
    b: Tensor
    first: int


def parts_of(request: GemmRequest, drawn: Drawn) -> list[Part]:
    """Return the products that a result consists of, with its leading dimensions flattened: one per matrix or expert.

    Tokens after the last offset are the last part, against a weight of zeros.
    """
    a, b = drawn.pairs[0]
    if drawn.offsets is None:
        if a.dim() == 2:
            return [Part(a=a, b=b, first=0)]
        return [Part(a=x, b=y, first=request.m * index) for index, (x, y) in enumerate(zip(a, b, strict=True))]
    ends = spans(drawn.offsets, len(a))
    if request.product == "wgrad":
        return [
            Part(a=a[start:end].mT, b=b[start:end].mT, first=request.m * expert)
            for expert, (start, end) in enumerate(ends)
        ]
    routed = [Part(a=a[start:end], b=b[expert], first=start) for expert, (start, end) in enumerate(ends)]
    routed_end = ends[-1][1]
    return [*routed, Part(a=a[routed_end:], b=torch.zeros_like(b[0]), first=routed_end)]


def compare(blank: Verification, actual: Tensor, parts: Sequence[Part]) -> Verification:
    """Fill in the worst element of `actual` [rows, n] against the definition of its parts."""
    parts = [part for part in parts if len(part.a) and len(part.b)]
    found, wrong, compared = replace(blank, worst=0.0), 0, 0
    values = (0.0, 0.0)
    for part in parts:
        rows = _some_rows(part.a, max(_ROWS // len(parts), _MIN_ROWS))
        share, definition = _shares(blank, actual, part, rows)
        at = int(share.argmax())
        row, column = divmod(at, share.shape[1])
        worst, place = float(share.flatten()[at]), part.first + int(rows[row])
        if worst > found.worst or found.row < 0:
            found = replace(found, worst=worst, row=place, column=column)
            values = float(actual[place, column]), float(definition[row, column])
        wrong += int((share > blank.allowed).any(dim=1).sum())
        compared += len(rows)
    if found.holds:
        return found
    return replace(
        found,
        reason=f"{wrong} of {compared} rows compared differ by more than the order of a sum explains, "
        f"the most at row {found.row}, column {found.column}: {values[0]:.6g} instead of {values[1]:.6g}",
    )


def _some_rows(x: Tensor, most: int) -> Tensor:
    """Return at most so many rows, spread over all, the first and the last among them."""
    return torch.linspace(0, len(x) - 1, min(most, len(x)), dtype=torch.float32, device=x.device).round().long()


def _shares(blank: Verification, actual: Tensor, part: Part, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the difference of some rows of a part as shares of what was added up, and what they should be."""
    exact_a, exact_b = _rounded(part.a, part.b, blank.recipe, blank.request.product)
    exact_a = exact_a[rows]
    definition, magnitude = matmul(exact_a, exact_b), matmul(exact_a.abs(), exact_b.abs())
    if blank.request.op == "linear_norm_act":
        definition, magnitude = _through_norm_act(definition, magnitude)
    found = actual[part.first + rows].float()
    difference = (found - definition).abs()
    share = torch.where(difference == 0, 0.0, difference / magnitude)
    # What is not finite where the definition is has lost everything.
    return torch.where(
        found.isfinite() | ~definition.isfinite(), share.nan_to_num(nan=0.0, posinf=math.inf), math.inf
    ), definition


def _through_norm_act(y: Tensor, magnitude: Tensor) -> tuple[Tensor, Tensor]:
    """Return hard_swish(block_norm(y)), and how far it moves where every y moves by up to its magnitude.

    A block's RMS moves by the RMS of what its elements move by, at most, and hard_swish by 1.5 times its argument.
    """
    moved = torch.empty_like(y)
    together = (y, magnitude, block_norm(y), moved)
    columns = (torch.tensor_split(x, list(range(NORM_BLOCK, x.shape[1], NORM_BLOCK)), dim=1) for x in together)
    for block, move, some, out in zip(*columns, strict=True):
        rms = (block.square().mean(dim=1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
        out.copy_((move + some.abs() * move.square().mean(dim=1, keepdim=True).sqrt()) / rms)
    return norm_act(y), _HARD_SWISH_SLOPE * moved


def _result_shape(request: GemmRequest) -> tuple[int, ...]:
    """Return the shape of a result: a product per matrix of a batch, and a weight gradient per expert."""
    batched = request.op in BATCHED or (request.op == "grouped_linear" and request.product == "wgrad")
    return (request.batch, request.m, request.n) if batched else (request.m, request.n)


def _rounded(a: Tensor, b: Tensor, recipe: str, product: Pass) -> tuple[Tensor, Tensor]:
    roles = PASS_OPERANDS[product]
    exact_a, exact_b = (fake_quantize(x, RECIPES[recipe].operand(role)) for x, role in zip((a, b), roles, strict=True))
    return exact_a, exact_b
