"""Candidates: every kernel that could serve one product, with what is known of it, and what speaks against it.

The questions, for each candidate, in order: available here? can it serve this product? is its error known and within
the bound? is it faster than the baseline? The first objection is the reason that is told.

Where the rows of a product vary, a kernel has to serve all of the row counts that stand for its calls, and what counts
is its mean time over those at which the baseline was timed: all kernels of a product are compared at the same ones.
"""

import math
from dataclasses import dataclass, replace
from typing import Final, Literal, NamedTuple

from loka.bounds import Bound, Limit
from loka.dispatch.deciding.judged import Judged, LossCost, judge_recipe
from loka.dispatch.deciding.requests import DISPATCHED
from loka.dispatch.measuring.profile import LEAST_COVERED, NO_ROWS, KernelTime, TimeAt, TimeTable, at_rows, varies
from loka.hardware import DeviceInfo
from loka.kernel_registry.registry import Registry
from loka.kernel_registry.spec import GemmRequest, KernelSpec
from loka.probes.capturing.row_counts import RowCounts
from loka.probes.judging.evidence import GatedError, ProductEvidence, RecipeEvidence
from loka.probes.judging.loss_evidence import LossEvidence
from loka.timing import faster

# Why a candidate was not chosen.
Code = Literal[
    "unavailable",
    "cannot",
    "undecided",
    "over_bound",
    "untimed",
    "no_gain",
    "budget_spent",
    "slower",
    "tie",
    "filtered",
]

# A kernel must beat the baseline by this factor: less is not worth any error (DESIGN: speed > 1.05 x the baseline).
MIN_SPEEDUP: Final[float] = 1.05


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One kernel considered for one product. Times in microseconds per call; None where not measured.

    Where the rows of the product vary, `time_us` is the mean over its row counts, and `times` what it is made of.
    """

    kernel: str
    recipe: str | None
    code: Code | None  # None: chosen, or admissible and equal to the chosen one
    reason: str
    time_us: float | None = None
    spread_us: float | None = None
    error_mean: float | None = None
    error_upper: float | None = None  # what a bound on the error was compared with
    loss: LossCost | None = None
    times: tuple[TimeAt, ...] | None = None


@dataclass(frozen=True, slots=True)
class _Offer:
    """One kernel for all products of one shape, and what is known of it there."""

    spec: KernelSpec
    unavailable: str | None
    unable: str | None
    time: KernelTime | None
    # Row counts that it has no time at, and its baseline has one; where too few were timed, those of the baseline.
    missing: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Wanted:
    """One product that a kernel is wanted for, what it is held to, and the baseline that a kernel has to beat."""

    request: GemmRequest
    evidence: ProductEvidence
    limit: Limit
    baseline: str
    baseline_time: KernelTime | None


class Case(NamedTuple):
    """One candidate with everything that is known of it: there are many, so what they share is held once."""

    wanted: _Wanted
    offer: _Offer
    judged: Judged

    def on(self, spec: KernelSpec, time: KernelTime) -> "Case":
        """Return the case of another kernel of the same recipe, or of the same, with a time of its own."""
        return self._replace(offer=replace(self.offer, spec=spec, time=time))

    @property
    def spec(self) -> KernelSpec:
        """The kernel."""
        return self.offer.spec

    @property
    def known_time(self) -> KernelTime:
        """The time of an admissible case, which is known."""
        assert self.offer.time is not None  # _ask_timed lets no untimed case pass
        return self.offer.time

    @property
    def known_baseline_time(self) -> KernelTime:
        """The time of the baseline of an admissible case, which is known."""
        assert self.wanted.baseline_time is not None
        return self.wanted.baseline_time

    @property
    def known_recipe(self) -> RecipeEvidence:
        """The evidence of an admissible case, which is known."""
        assert self.recipe is not None  # _ask_error lets none without evidence pass
        return self.recipe

    @property
    def known_error(self) -> GatedError:
        """The error of an admissible case, which is known."""
        assert self.judged.gated is not None
        return self.judged.gated

    @property
    def recipe(self) -> RecipeEvidence | None:
        """The evidence of its recipe, where there is any."""
        return self.judged.evidence

    @property
    def loss(self) -> LossEvidence | None:
        """What the case does to the loss, where a step has shown it."""
        return self.recipe.loss if self.recipe is not None else None


Objection = tuple[Code, str]
# Of a case that is asked whatever its error.
_NO_LIMIT: Final[Limit] = Limit(metric="row_error", value=math.inf)


@dataclass(frozen=True, kw_only=True, slots=True)
class Considered:
    """All candidates of one product, and which of them nothing speaks against."""

    request: GemmRequest
    evidence: ProductEvidence
    baseline: KernelSpec
    baseline_time: KernelTime | None
    rejected: tuple[tuple[Case, Objection], ...]
    admissible: tuple[Case, ...]
    limit: Limit
    left_out: Objection | None = None  # what keeps the product on its baseline whatever its kernels are like
    rows: RowCounts | None = NO_ROWS  # at which its kernels are compared; None: too few were timed

    @property
    def selected(self) -> bool:
        """Whether it may leave its baseline."""
        return self.left_out is None

    @property
    def by_loss(self) -> bool:
        """Whether it takes part in a budget of loss."""
        return self.limit.metric == "loss"


@dataclass(frozen=True, slots=True)
class _Shape:
    """What is the same for all products of one shape."""

    baseline: KernelSpec
    baseline_time: KernelTime | None
    rows: RowCounts | None
    # Each with what speaks against it whatever its error, asked before that and after it.
    offers: tuple[tuple[_Offer, Objection | None, Objection | None], ...]
    recipes: tuple[str, ...]  # of the offers


# What `consider` keeps of each shape while nothing but the site changes: layers of a model are alike.
Shapes = dict[tuple[object, ...], _Shape]
FILTERED: Final[Objection] = ("filtered", "the plan's filter leaves this site out")
TWICE: Final[Objection] = (
    "cannot",
    "the loop differentiates its gradients again (create_graph=True), and rounding has no second derivative",
)


def consider(  # noqa: PLR0913 - the six things a choice rests on, whether there is one, and what others have shared
    request: GemmRequest,
    evidence: ProductEvidence,
    bound: Bound,
    registry: Registry,
    times: TimeTable,
    device: DeviceInfo,
    *,
    left_out: Objection | None = None,
    shapes: Shapes | None = None,
) -> Considered:
    """Put the questions to every candidate of a product; raise KernelError when the registry has no baseline for it.

    left_out: what keeps the product on its baseline. shapes: kept between products under
    one registry, one table of times and one device.
    """
    shape = _shape_of(request, evidence, registry, times, device, {} if shapes is None else shapes)
    limit = bound.limit(evidence.product, evidence.site)
    judged = {name: judge_recipe(name, evidence, limit) for name in shape.recipes}
    rejected: list[tuple[Case, Objection]] = []
    admissible: list[Case] = []
    wanted = _Wanted(request, evidence, limit, shape.baseline.name, shape.baseline_time)
    for offer, before, after in shape.offers:
        error = judged[offer.spec.recipe or ""]
        case = Case(wanted, offer, error)
        objection = left_out or before or error.objection or after
        if objection is None:
            admissible.append(case)
        else:
            rejected.append((case, objection))
    return Considered(
        request=request,
        evidence=evidence,
        baseline=shape.baseline,
        baseline_time=shape.baseline_time,
        rejected=tuple(rejected),
        admissible=tuple(admissible),
        limit=limit,
        left_out=left_out,
        rows=shape.rows,
    )


def _shape_of(
    request: GemmRequest,
    evidence: ProductEvidence,
    registry: Registry,
    times: TimeTable,
    device: DeviceInfo,
    shapes: Shapes,
) -> _Shape:
    """Return what is known of the shape of a product, and keep it."""
    shape = (request.product, request.op, request.m, request.n, request.k, request.dtype, request.batch)
    key = (*shape, evidence.rows, not evidence.parameter)
    if key not in shapes:
        baseline = registry.baseline(request)
        rows = times.timed(baseline.name, request, evidence.rows)
        baseline_time = times.of_baseline(baseline.name, request, rows)
        untimed = times.missing(baseline.name, request, evidence.rows) if rows is None else ()
        specs = registry.candidates(request.op) or registry.low_precision()
        offers = [
            _Offer(
                spec,
                registry.unavailable(spec, device),
                unable_at(spec, request, evidence.rows, registry, device),
                times.of_candidate(spec.name, request, baseline_time, rows),
                times.missing(spec.name, request, rows) if rows is not None else untimed,
            )
            for spec in specs
        ]
        wanted, nothing = _Wanted(request, evidence, _NO_LIMIT, baseline.name, baseline_time), Judged(*[None] * 4)
        asked = tuple((offer, *_asked(Case(wanted, offer, nothing))) for offer in offers)
        recipes = tuple(dict.fromkeys(spec.recipe or "" for spec in specs))
        shapes[key] = _Shape(baseline, baseline_time, rows, asked, recipes)
    return shapes[key]


def _asked(case: Case) -> tuple[Objection | None, Objection | None]:
    before = _ask_available(case) or _ask_able(case)
    return before, None if before is not None else objection_to_time(case)


def unable_at(
    spec: KernelSpec, request: GemmRequest, rows: RowCounts, registry: Registry, device: DeviceInfo
) -> str | None:
    """Return why a kernel cannot serve a product at one of its row counts, or None."""
    reason = registry.cannot(spec, request, device)
    if reason is not None or not varies(request, rows):
        return reason
    for each in rows.points:
        reason = registry.cannot(spec, at_rows(request, each.rows), device)
        if reason is not None:
            return f"with {each.rows} rows: {reason}"
    return None


def fastest(cases: list[Case]) -> tuple[Case, Case]:
    """Return the fastest of some admissible cases, and the one to take: the first by name of those that tie with it."""
    best = min(cases, key=lambda case: (case.known_time.median_us, case.spec.name))
    ties = [case for case in cases if not faster(best.known_time, case.known_time)]
    return best, min(ties, key=lambda case: case.spec.name)


def rejected_candidate(case: Case, code: Code, reason: str) -> Candidate:
    """Return a case as a candidate that lost."""
    spec, time, judged = case.offer.spec, case.offer.time, case.judged
    return Candidate(
        kernel=spec.name,
        recipe=spec.recipe,
        code=code,
        reason=reason,
        time_us=time.median_us if time is not None else None,
        spread_us=time.spread_us if time is not None else None,
        error_mean=judged.mean,
        error_upper=judged.upper,
        loss=judged.loss,
        times=(time.at or None) if time is not None else None,
    )


def _ask_available(case: Case) -> Objection | None:
    unavailable = case.offer.unavailable
    return None if unavailable is None else ("unavailable", unavailable)


def _ask_able(case: Case) -> Objection | None:
    reason = case.offer.unable
    if reason is None and case.wanted.request.op not in DISPATCHED:
        reason = "dispatch runs linear products and those of experts; this one stays as written"
    if reason is None and not case.wanted.evidence.parameter:
        reason = "no parameter takes part in this product, and a plan finds products by their parameter"
    return None if reason is None else ("cannot", reason)


def _ask_timed(case: Case) -> Objection | None:
    wanted, time, missing = case.wanted, case.offer.time, case.offer.missing
    request, rows, baseline, baseline_time = wanted.request, wanted.evidence.rows, wanted.baseline, wanted.baseline_time
    if varies(request, rows) and (time is None or baseline_time is None):
        listed = ", ".join(map(str, missing))
        if baseline_time is not None:
            return "untimed", f"never timed with {listed} rows, as its baseline {baseline} was on this device"
        rest = f"; its other row counts do not carry {LEAST_COVERED:.0%} of the calls and of the rows"
        rest = rest if len(missing) < len(rows.points) else ""
        return "untimed", f"its baseline {baseline} was never timed with {listed} rows on this device{rest}"
    if time is None:
        return "untimed", f"never timed at {_shape(request)} on this device"
    if baseline_time is None or (baseline_time.assumed and not time.assumed):
        return "untimed", f"its baseline {baseline} was never timed at {_shape(request)} on this device"
    return None


def _ask_gain(case: Case) -> Objection | None:
    time, baseline = case.known_time, case.known_baseline_time
    speedup = baseline.median_us / time.median_us
    numbers = f"{time.median_us:.4g} us against {baseline.median_us:.4g} us of {case.wanted.baseline} ({speedup:.3g}x)"
    numbers += time.words
    if speedup <= MIN_SPEEDUP:
        return "no_gain", f"{numbers}: not more than {MIN_SPEEDUP}x the baseline's speed"
    if not time.assumed and not faster(time, baseline):
        spread = time.spread_us + baseline.spread_us
        return "no_gain", f"{numbers}: inside the measured spread of {spread:.3g} us"
    return None


def objection_to_time(case: Case) -> Objection | None:
    """Return what speaks against the time of a candidate, whatever its error."""
    return _ask_timed(case) or _ask_gain(case)


def _shape(request: GemmRequest) -> str:
    return f"{request.m}x{request.k}x{request.n} {request.dtype}"
