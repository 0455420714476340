"""Speed of every kernel that could serve a model's products, on the shapes the model has.

A shape is timed once, whoever has it: speed, unlike error, does not depend on the site. A product whose rows vary is
timed at each of the row counts that stand for its calls, in the time that one shape gets, shared by weight.

Kernels take high-precision operands, laid out as training lays them out (a gradient's operands are transposed views),
so amax, cast, transpose and padding are inside the time. All kernels of a shape are timed against each other in one
session; where one is missing among the known times, the whole shape is timed again.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

import torch

from loka.bounds import Bound
from loka.dispatch.deciding.candidates import MIN_SPEEDUP
from loka.dispatch.deciding.requests import DISPATCHED
from loka.dispatch.measuring.draws import Drawn, draw_operands
from loka.dispatch.measuring.profile import TimeTable
from loka.dispatch.measuring.shapes import Shape, shapes_of
from loka.hardware import DeviceInfo, device_info
from loka.kernel_registry.bf16_units import left_idle
from loka.kernel_registry.registry import Registry
from loka.kernel_registry.spec import GemmRequest, KernelSpec
from loka.probes.judging.evidence import ProductEvidence, RunEvidence
from loka.probes.records import LearnedRecord, Timing
from loka.timing import MIN_REPETITIONS, Candidate, Measurement, Progress, T, Turn, in_turns, measure

logger = logging.getLogger("loka.dispatch")


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
    """Time baseline and candidates on every distinct product at each of its row counts, the most work first.

    With a `bound`, which a plan has, only products that dispatch can run are timed, and only kernels whose recipe is
    safe at some site of the shape. Operands are drawn from what was `learned` of the site that spends most on a shape
    (see `draws`). Else as `measure_shapes`.
    """
    shapes = shapes_of(evidence, learned, each_row_count=True)
    return measure_shapes(
        shapes, registry, device, budget_s=budget_s, bound=bound, known=known, on_progress=on_progress
    )


def measure_shapes(  # noqa: PLR0913 - what to time, and one keyword per limit on it
    shapes: Iterable[Shape],
    registry: Registry,
    device: torch.device | str,
    *,
    budget_s: float,
    bound: Bound | None = None,
    known: Iterable[Timing] = (),
    on_progress: Progress | None = None,
) -> list[Timing]:
    """Time baseline and candidates on every shape, in this order, each with its share of the budget.

    Only what is not `known` is timed. Shapes that do not fit what is left of `budget_s` are left out and logged.
    """
    device = torch.device(device)
    info = device_info(device)
    contests = _to_time(shapes, registry, info, bound, TimeTable(known))
    timings: list[Timing] = []
    for turn in in_turns(
        contests,
        budget_s,
        "shapes left untimed",
        lambda each: _label(each.shape.request),
        on_progress,
        weight=lambda each: each.shape.share,
    ):
        timings += _time(turn.item, device, registry, share_s=turn.share_s, left_s=turn.left_s)
    if on_progress is not None and contests:
        on_progress(len(contests), len(contests), "done")
    return timings


def _to_time(
    shapes: Iterable[Shape], registry: Registry, info: DeviceInfo, bound: Bound | None, known: TimeTable
) -> list[_Contest]:
    """Return the shapes of which two kernels can be compared and a time is missing."""
    found = []
    for shape in shapes:
        if bound is not None and shape.request.op not in DISPATCHED:
            continue
        kernels = [
            spec
            for spec in registry.servable(shape.request, info)
            if bound is None or any(_safe(product, spec, bound) for product in shape.products)
        ]
        if kernels:
            baselines = (registry.baseline(shape.request), *registry.rivals(shape.request, info))
            contest = _Contest(shape, (*baselines, *kernels))
            if any(known.lookup(spec.name, shape.request) is None for spec in contest.kernels):
                found.append(contest)
    return found


def _safe(product: ProductEvidence, spec: KernelSpec, bound: Bound) -> bool:
    limit = bound.limit(product.product, product.site)
    return any(each.recipe == spec.recipe and each.judge(limit) == "safe" for each in product.recipes)


def _time(
    contest: _Contest, device: torch.device, registry: Registry, *, share_s: float, left_s: float
) -> list[Timing]:
    """Time one shape within `share_s` seconds; nothing when even the fewest repetitions exceed `left_s`."""
    request, source = contest.shape.request, contest.shape.source
    start = time.perf_counter()
    dtype: torch.dtype = getattr(torch, request.dtype)
    with torch.no_grad():
        drawn = draw_operands(request, dtype, device, source)
        calls = runnable(contest.kernels, request, drawn, registry, device_info(device))
        if contest.kernels[0].name not in calls or len(calls) < 2:
            return []
        # The first calls imported and compiled what they need; what a call costs, the next ones tell.
        begun_s = time.perf_counter() - start
        for call in calls.values():
            call(0)
        if drawn.pairs[0][0].is_cuda:
            torch.cuda.synchronize()
        spent_s = time.perf_counter() - start
        needed_s, left_s = (spent_s - begun_s) * (MIN_REPETITIONS + 1), left_s - spent_s
        if needed_s > left_s:
            left_s = max(0.0, left_s)
            logger.warning("%s left untimed: it needs %.2g s, %.2g s are left", _label(request), needed_s, left_s)
            return []
        measured = measure(calls, device=device, budget_s=max(0.0, share_s - spent_s), inputs=len(drawn.pairs))
    impossible = _faster_than_its_part(contest, measured)
    if impossible:
        logger.warning("%s left untimed: %s", _label(request), impossible)
        return []
    info = device_info(device)
    return [timing_of(name, request, info, result, drawn.values) for name, result in measured.items()]


def _faster_than_its_part(contest: _Contest, measured: Mapping[str, Measurement]) -> str:
    """Say that times cannot be right: in fp32, emulation multiplies as the baseline does, and quantises before that.

    Where other programs take the cores, threads of one product wait for each other, ten times as long as they work.
    """
    request, baseline = contest.shape.request, measured[contest.kernels[0].name].median_us
    if (request.op, request.dtype) != ("linear", "float32"):
        return ""  # in bf16, and of experts, emulation may take another way than the baseline
    for spec in contest.kernels[1:]:
        own = measured[spec.name].median_us if spec.name in measured else baseline
        if spec.library == "emulated" and own * MIN_SPEEDUP < baseline:
            return (
                f"{spec.name} took {own:.3g} us, the product in high precision that it contains {baseline:.3g} us. "
                "The machine is too busy to tell; try again on a quiet one, or with OMP_NUM_THREADS=1"
            )
    return ""


def timing_of(kernel: str, request: GemmRequest, info: DeviceInfo, result: Measurement, values: str) -> Timing:
    """Write one measured time down."""
    return Timing(
        kernel=kernel,
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
        values=values,
        created=datetime.now(UTC).isoformat(),
    )


def runnable(
    kernels: Iterable[KernelSpec], request: GemmRequest, drawn: Drawn, registry: Registry, info: DeviceInfo
) -> dict[str, Candidate]:
    """Load kernels, run each once, and return those that did; the registry remembers what the others failed with."""
    dtype: torch.dtype = getattr(torch, request.dtype)
    loaders = {spec.name: partial(drawn.call, spec, request.product, dtype) for spec in kernels}
    return tried(loaders, request, registry, info)


def tried(
    loaders: Mapping[str, Callable[[], Candidate]], request: GemmRequest, registry: Registry, info: DeviceInfo
) -> dict[str, Candidate]:
    """Do the same with functions that load kernels, by name."""
    found: dict[str, Candidate] = {}
    for name, load in loaders.items():
        try:
            call = load() if registry.get(name).library != "emulated" else as_defined(load())
            call(0)
            if info.type == "cuda":
                torch.cuda.synchronize()
        except Exception as error:  # noqa: BLE001 - a kernel of any library may fail in any way; its row says how
            logger.warning("%s left untimed on %s: %s", name, _label(request), error)
            registry.failed(name, request, info, error)
            continue
        found[name] = call
    return found


def as_defined(call: Candidate) -> Candidate:
    """Return an emulated product in the fp32 that defines it: what units for bf16 win there, bf16 itself wins more."""

    def defined(i: int) -> object:
        with left_idle():
            return call(i)

    return defined


def timed(turns: Iterable[Turn[T]], work: Callable[[T, float], list[Timing]]) -> list[Timing]:
    """Return the times of everything that gets its turn, each within its share of the seconds."""
    timings: list[Timing] = []
    for turn in turns:
        with torch.no_grad():
            timings += work(turn.item, turn.share_s)
    return timings


def _label(request: GemmRequest) -> str:
    batch = f"{request.batch}x" if request.batch > 1 else ""
    return f"{request.product} {batch}{request.m}x{request.k}x{request.n} {request.dtype}"
