"""The choice of a kernel, as a value: every candidate, what was known of it, and why it won or lost.

Order of the questions, for each candidate: available here? can it serve this product? is its error known and within the
bound? is it faster than the baseline? Of those left, the fastest; inside the measured spread the incumbent order wins.
The baseline (high precision) is always a candidate and always admissible, so there is always a decision.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from loka.bounds import Bound
from loka.dispatch.profile import KernelTime, TimeTable
from loka.errors import EvidenceError
from loka.hardware import DeviceInfo
from loka.kernel_registry.registry import Registry
from loka.kernel_registry.spec import GemmRequest, KernelSpec, Op
from loka.probes.evidence import ProductEvidence, RecipeEvidence
from loka.timing import faster

# Why a candidate was not chosen.
Code = Literal["unavailable", "cannot", "undecided", "over_bound", "untimed", "no_gain", "slower", "tie", "filtered"]

# A kernel must beat the baseline by this factor: less is not worth any error (DESIGN: speed > 1.05 x the baseline).
MIN_SPEEDUP: Final[float] = 1.05

# aten op, without overload and in-place underscore -> what the registry calls it. Anything else is "other".
ATEN_OPS: Final[dict[str, Op]] = {
    "mm": "linear",
    "addmm": "linear",
    "_addmm_activation": "linear",
    "linear": "linear",
    "mv": "linear",
    "addmv": "linear",
    "_scaled_mm": "linear",
    "_scaled_mm_v2": "linear",
    "bmm": "bmm",
    "baddbmm": "bmm",
    "addbmm": "bmm",
    "_grouped_mm": "grouped_linear",
    "_scaled_grouped_mm": "grouped_linear",
    "_scaled_grouped_mm_v2": "grouped_linear",
    "convolution": "convolution",
    "convolution_backward": "convolution",
    "_convolution": "convolution",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One kernel considered for one product. Times in microseconds per call; None where not measured."""

    kernel: str
    recipe: str | None
    code: Code | None  # None: chosen, or admissible and equal to the chosen one
    reason: str
    time_us: float | None = None
    spread_us: float | None = None
    error_mean: float | None = None
    error_upper: float | None = None  # what the bound was compared with


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """The kernel for one (site, pass), with all it was chosen from."""

    request: GemmRequest
    m_min: int
    m_max: int
    kernel: str
    recipe: str | None  # None: high precision
    why: str
    baseline: str
    baseline_time_us: float | None
    time_us: float | None
    time_source: str  # "measured", "profile: <name>", "assumed 1.3x", "none"
    error_upper: float | None
    horizon: int | None
    rejected: tuple[Candidate, ...]

    @property
    def speedup(self) -> float | None:
        """Time of the baseline over time of the chosen kernel, where both are known."""
        if self.baseline_time_us is None or not self.time_us:
            return None
        return self.baseline_time_us / self.time_us


def request_of(evidence: ProductEvidence) -> GemmRequest:
    """Return the request that a product of the model makes of the registry, at its median m."""
    return GemmRequest(
        site=evidence.site,
        product=evidence.product,
        op=ATEN_OPS.get(evidence.op, ATEN_OPS.get(evidence.op.removesuffix("_"), "other")),
        m=evidence.m,
        n=evidence.n,
        k=evidence.k,
        dtype=evidence.dtype,
        batch=evidence.batch,
    )


def row_error_limit(bound: Bound) -> float:
    """Return the limit on the gated error of one product; raise EvidenceError for a bound on the loss."""
    if bound.row_error is None:
        raise EvidenceError(
            f"A plan within {bound} needs to know what each error costs the loss, and this database holds no loss "
            "evidence. Bound the error of each product instead: Bound(row_error=0.05)."
        )
    return bound.row_error


@dataclass(frozen=True, slots=True)
class _Case:
    """One candidate with everything that is known of it."""

    spec: KernelSpec
    request: GemmRequest
    evidence: ProductEvidence
    recipe: RecipeEvidence | None
    limit: float
    unavailable: str | None
    baseline: str
    baseline_time: KernelTime | None
    time: KernelTime | None


_Objection = tuple[Code, str]


def _ask_available(case: _Case) -> _Objection | None:
    return None if case.unavailable is None else ("unavailable", case.unavailable)


def _ask_able(case: _Case) -> _Objection | None:
    reason = case.spec.cannot(case.request)
    if reason is None and not case.evidence.parameter:
        reason = "no parameter takes part in this product, and a plan finds products by their parameter"
    return None if reason is None else ("cannot", reason)


def _ask_error(case: _Case) -> _Objection | None:
    recipe = case.recipe
    if recipe is None:
        because = case.evidence.unmeasured or "the probe did not measure it; name it in probe(recipes=...)"
        return "undecided", f"the error of {case.spec.recipe} is unknown here: {because}"
    verdict = recipe.verdict(case.limit)
    if verdict == "safe":
        return None
    error = recipe.error
    if math.isnan(error.upper_tolerance):
        because = f": {recipe.note}" if recipe.note else "; probe longer"
        return "undecided", f"{recipe.samples} sampled steps are too few to bound its {recipe.gate}{because}"
    interval = f"{error.mean:.3g} on average ({error.low:.3g} to {error.high:.3g}, {recipe.samples} steps)"
    numbers = f"{recipe.gate} up to {error.upper_tolerance:.3g}, {interval}, against the bound {case.limit:g}"
    if verdict == "unsafe":
        return "over_bound", numbers
    return "undecided", f"{numbers}: more samples may settle it"


def _ask_timed(case: _Case) -> _Objection | None:
    if case.time is None:
        return "untimed", f"never timed at {_shape(case.request)} on this device"
    if case.baseline_time is None or (case.baseline_time.assumed and not case.time.assumed):
        return "untimed", f"its baseline {case.baseline} was never timed at {_shape(case.request)} on this device"
    return None


def _ask_gain(case: _Case) -> _Objection | None:
    time, baseline = _known(case.time), _known(case.baseline_time)
    speedup = baseline.median_us / time.median_us
    numbers = f"{time.median_us:.4g} us against {baseline.median_us:.4g} us of {case.baseline} ({speedup:.3g}x)"
    if speedup <= MIN_SPEEDUP:
        return "no_gain", f"{numbers}: not more than {MIN_SPEEDUP}x the baseline's speed"
    if not time.assumed and not faster(time, baseline):
        spread = time.spread_us + baseline.spread_us
        return "no_gain", f"{numbers}: inside the measured spread of {spread:.3g} us"
    return None


_QUESTIONS: Final[tuple[Callable[[_Case], _Objection | None], ...]] = (
    _ask_available,
    _ask_able,
    _ask_error,
    _ask_timed,
    _ask_gain,
)
# How far a candidate came, for the sentence that explains a decision for the baseline.
_PROGRESS: Final[tuple[Code, ...]] = ("unavailable", "cannot", "undecided", "over_bound", "untimed", "no_gain")


def decide(  # noqa: PLR0913 - the six things a choice rests on, and whether there is one
    request: GemmRequest,
    evidence: ProductEvidence,
    bound: Bound,
    registry: Registry,
    times: TimeTable,
    device: DeviceInfo,
    *,
    selected: bool = True,
) -> Decision:
    """Choose the kernel of one product; every candidate that loses says why.

    `selected=False` leaves the product on its baseline. Raises EvidenceError for a bound on the loss and KernelError
    when the registry has no baseline for the product.
    """
    limit = row_error_limit(bound)
    baseline = registry.baseline(request)
    baseline_time = times.of_baseline(baseline.name, request)
    recipes = {recipe.recipe: recipe for recipe in evidence.recipes}
    cases = [
        _Case(
            spec,
            request,
            evidence,
            recipes.get(spec.recipe or ""),
            limit,
            registry.unavailable(spec, device),
            baseline.name,
            baseline_time,
            times.of_candidate(spec.name, request, baseline_time),
        )
        for spec in registry.candidates(request.op) or registry.low_precision()
    ]
    if not selected:
        left_out = [_candidate(case, "filtered", "the plan's filter leaves this site out") for case in cases]
        why = f"left out by the plan's filter, so it stays on {baseline.name}"
        return _decision(request, evidence, baseline, baseline_time, why, _by_name(left_out))
    objections = [_objection(case) for case in cases]
    rejected = [_candidate(case, *found) for case, found in zip(cases, objections, strict=True) if found]
    admissible = [case for case, found in zip(cases, objections, strict=True) if found is None]
    if not admissible:
        why = _why_baseline(baseline.name, request, rejected)
        return _decision(request, evidence, baseline, baseline_time, why, _by_name(rejected))
    best = min(admissible, key=lambda case: (_known(case.time).median_us, case.spec.name))
    ties = [case for case in admissible if not faster(_known(best.time), _known(case.time))]
    winner = min(ties, key=lambda case: case.spec.name)
    rejected += [_loser(case, best, winner) for case in admissible if case is not winner]
    rejected.append(_beaten_baseline(baseline, winner))
    return _won(winner, baseline, _by_name(rejected))


def _objection(case: _Case) -> _Objection | None:
    return next((found for ask in _QUESTIONS if (found := ask(case)) is not None), None)


def _loser(case: _Case, best: _Case, winner: _Case) -> Candidate:
    """Return an admissible case as slower than the fastest, or as a tie with it that the order of names has settled."""
    time, fastest, won = _known(case.time), _known(best.time), _known(winner.time)
    if faster(fastest, time):
        difference = time.median_us - fastest.median_us
        share = 100 * difference / fastest.median_us
        reason = f"{time.median_us:.4g} us, {difference:.3g} us ({share:.3g} %) slower than {best.spec.name}"
        return _candidate(case, "slower", reason)
    spread = max(time.spread_us, won.spread_us) + fastest.spread_us
    reason = (
        f"{time.median_us:.4g} us against {won.median_us:.4g} us of {winner.spec.name}: a tie within the spread of "
        f"{spread:.3g} us, and the order of names decides"
    )
    return _candidate(case, "tie", reason)


def _beaten_baseline(baseline: KernelSpec, winner: _Case) -> Candidate:
    time, best = _known(winner.baseline_time), _known(winner.time)
    return Candidate(
        kernel=baseline.name,
        recipe=None,
        code="slower",
        reason=f"the baseline: {time.median_us:.4g} us, {time.median_us / best.median_us:.3g} times {winner.spec.name}",
        time_us=time.median_us,
        spread_us=time.spread_us,
    )


def _won(winner: _Case, baseline: KernelSpec, rejected: tuple[Candidate, ...]) -> Decision:
    time, baseline_time = _known(winner.time), _known(winner.baseline_time)
    recipe = winner.recipe
    assert recipe is not None  # _ask_error lets none without evidence pass
    why = (
        f"{baseline_time.median_us / time.median_us:.3g}x the speed of {baseline.name} "
        f"({time.median_us:.4g} us against {baseline_time.median_us:.4g} us, {time.source}); "
        f"{recipe.gate} up to {recipe.error.upper_tolerance:.3g} is within the bound {winner.limit:g}"
    )
    return Decision(
        request=winner.request,
        m_min=winner.evidence.m_min,
        m_max=winner.evidence.m_max,
        kernel=winner.spec.name,
        recipe=winner.spec.recipe,
        why=why,
        baseline=baseline.name,
        baseline_time_us=baseline_time.median_us,
        time_us=time.median_us,
        time_source=time.source,
        error_upper=_finite(recipe.error.upper_tolerance),
        horizon=recipe.horizon,
        rejected=rejected,
    )


def _decision(
    request: GemmRequest,
    evidence: ProductEvidence,
    baseline: KernelSpec,
    time: KernelTime | None,
    why: str,
    rejected: tuple[Candidate, ...],
) -> Decision:
    """Return the decision for the baseline."""
    time_us = None if time is None or time.assumed else time.median_us
    return Decision(
        request=request,
        m_min=evidence.m_min,
        m_max=evidence.m_max,
        kernel=baseline.name,
        recipe=None,
        why=why,
        baseline=baseline.name,
        baseline_time_us=time_us,
        time_us=time_us,
        time_source="none" if time is None or time.assumed else time.source,
        error_upper=None,
        horizon=None,
        rejected=rejected,
    )


def _why_baseline(baseline: str, request: GemmRequest, rejected: list[Candidate]) -> str:
    if request.dtype.startswith("float8"):
        return f"the model computes this product in FP8 already, so it stays as written ({baseline})"
    if not rejected:
        return f"no other kernel is known, so it stays on {baseline}"
    nearest = min(
        rejected,
        key=lambda each: (
            -_PROGRESS.index(each.code or "unavailable"),
            math.inf if each.time_us is None else each.time_us,
            math.inf if each.error_upper is None else each.error_upper,
            each.kernel,
        ),
    )
    if nearest.code in ("unavailable", "cannot"):
        return f"no kernel here serves it, so it stays on {baseline}; {nearest.kernel}: {nearest.reason}"
    return (
        f"no candidate is safe and faster, so it stays on {baseline}; the nearest, {nearest.kernel}: {nearest.reason}"
    )


def _candidate(case: _Case, code: Code, reason: str) -> Candidate:
    error = case.recipe.error if case.recipe else None
    return Candidate(
        kernel=case.spec.name,
        recipe=case.spec.recipe,
        code=code,
        reason=reason,
        time_us=case.time.median_us if case.time else None,
        spread_us=case.time.spread_us if case.time else None,
        error_mean=_finite(error.mean) if error else None,
        error_upper=_finite(error.upper_tolerance) if error else None,
    )


def _by_name(rejected: list[Candidate]) -> tuple[Candidate, ...]:
    return tuple(sorted(rejected, key=lambda candidate: candidate.kernel))


def _known(time: KernelTime | None) -> KernelTime:
    assert time is not None  # _ask_timed lets no untimed case pass
    return time


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _shape(request: GemmRequest) -> str:
    return f"{request.m}x{request.k}x{request.n} {request.dtype}"
