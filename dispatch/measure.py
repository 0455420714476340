"""Speed of every kernel that could serve a model's products, on the shapes the model has.

A shape is timed once, whoever has it: speed, unlike error, does not depend on the site. Kernels take high-precision
operands, laid out as training lays them out (a gradient's operands are transposed views), so amax, cast, transpose and
padding are inside the time. All kernels of a shape are timed against each other in one session; where one is missing
among the known times, the whole shape is timed again.
"""

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

import torch
from torch import Tensor

from loka.bounds import Bound
from loka.dispatch.draws import draw_operands
from loka.dispatch.profile import TimeTable
from loka.dispatch.shapes import Shape, shapes_of
from loka.errors import KernelError
from loka.formats import Pass
from loka.hardware import DeviceInfo, device_info
from loka.kernel_registry.registry import Registry
from loka.kernel_registry.spec import GemmRequest, Kernel, KernelSpec
from loka.probes.evidence import ProductEvidence, RunEvidence
from loka.probes.records import LearnedRecord, Timing
from loka.timing import MIN_REPETITIONS, Candidate, measure

logger = logging.getLogger("loka.dispatch")

# Called with shapes done, shapes in all, and the shape that is timed next.
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class _Contest:
    """A shape and the kernels to time on it, the baseline first."""

    shape: Shape
    kernels: tuple[KernelSpec, ...]


def measure_products(  # noqa: PLR0913 - what to time, and one keyword per limit on it
    evidence: RunEvidence,
    registry: Registry,
    device: torch.device | str,
    *,
    budget_s: float,
    bound: Bound | None = None,
    known: Iterable[Timing] = (),
    learned: Iterable[LearnedRecord] = (),
    on_progress: Progress | None = None,
) -> list[Timing]:
    """Time baseline and candidates on every distinct linear product, the largest share of the work first.

    Only what is not `known` is timed, and with a `bound` only kernels whose recipe is safe at some site of the shape.
    Shapes that do not fit what is left of `budget_s` are left out and logged. Operands are drawn from what was
    `learned` of the site that spends most on a shape (see `draws`).
    """
    device = torch.device(device)
    info = device_info(device)
    contests = _to_time(shapes_of(evidence.products, learned), registry, info, bound, TimeTable(known))
    deadline = time.perf_counter() + budget_s
    timings: list[Timing] = []
    for done, contest in enumerate(contests):
        if on_progress is not None:
            on_progress(done, len(contests), _label(contest.shape.request))
        left = deadline - time.perf_counter()
        if left <= 0:
            logger.warning("%d of %d shapes left untimed: %g s spent", len(contests) - done, len(contests), budget_s)
            break
        timings += _time(contest, device, info, share_s=left / (len(contests) - done), left_s=left)
    if on_progress is not None and contests:
        on_progress(len(contests), len(contests), "done")
    return timings


def _to_time(
    shapes: Iterable[Shape], registry: Registry, info: DeviceInfo, bound: Bound | None, known: TimeTable
) -> list[_Contest]:
    """Return the shapes of which two kernels can be compared and a time is missing."""
    found = []
    for shape in shapes:
        kernels = [
            spec
            for spec in registry.candidates(shape.request.op)
            if registry.unavailable(spec, info) is None
            and spec.cannot(shape.request) is None
            and (bound is None or any(_safe(product, spec, bound) for product in shape.products))
        ]
        if kernels:
            contest = _Contest(shape, (registry.baseline(shape.request), *kernels))
            if any(known.lookup(spec.name, shape.request) is None for spec in contest.kernels):
                found.append(contest)
    return found


def _safe(product: ProductEvidence, spec: KernelSpec, bound: Bound) -> bool:
    return any(each.recipe == spec.recipe and each.judge(bound, product.product) == "safe" for each in product.recipes)


def _time(contest: _Contest, device: torch.device, info: DeviceInfo, *, share_s: float, left_s: float) -> list[Timing]:
    """Time one shape within `share_s` seconds; nothing when even the fewest repetitions exceed `left_s`."""
    request, source = contest.shape.request, contest.shape.source
    start = time.perf_counter()
    dtype: torch.dtype = getattr(torch, request.dtype)
    with torch.no_grad():
        drawn = draw_operands(request, dtype, device, source)
        operands = drawn.pairs
        calls = {}
        for spec in contest.kernels:
            call = _runnable(spec, request, operands, dtype)
            if call is not None:
                calls[spec.name] = call
        once_s = time.perf_counter() - start
        if contest.kernels[0].name not in calls or len(calls) < 2:
            return []
        needed_s, left_s = once_s * (MIN_REPETITIONS + 1), left_s - once_s
        if needed_s > left_s:
            logger.warning("%s left untimed: it needs %.2g s, %.2g s are left", _label(request), needed_s, left_s)
            return []
        measured = measure(calls, device=device, budget_s=max(0.0, share_s - once_s), inputs=len(operands))
    created = datetime.now(UTC).isoformat()
    return [
        Timing(
            kernel=name,
            product=request.product,
            batch=request.batch,
            m=request.m,
            n=request.n,
            k=request.k,
            dtype=request.dtype,
            device=str(info),
            median_us=result.median_us,
            spread_us=result.spread_us,
            repetitions=result.repetitions,
            values=drawn.values,
            created=created,
        )
        for name, result in measured.items()
    ]


def _runnable(
    spec: KernelSpec, request: GemmRequest, operands: list[tuple[Tensor, Tensor]], dtype: torch.dtype
) -> Candidate | None:
    """Load a kernel and run it once; None, and a line in the log, when it cannot do what its row says."""
    try:
        call = partial(_run, spec.load(), operands, request.product, dtype)
        call(0)
        if operands[0][0].is_cuda:
            torch.cuda.synchronize()
    except (KernelError, RuntimeError, ValueError) as error:
        logger.warning("%s left untimed on %s: %s", spec.name, _label(request), error)
        return None
    return call


def _run(
    kernel: Kernel, operands: list[tuple[Tensor, Tensor]], product: Pass, dtype: torch.dtype, index: int
) -> Tensor:
    a, b = operands[index]
    return kernel(a, b, product=product, out_dtype=dtype)


def _label(request: GemmRequest) -> str:
    return f"{request.product} {request.m}x{request.k}x{request.n} {request.dtype}"
