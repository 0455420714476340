"""Candidates: every kernel that could serve one product, with what is known of it, and what speaks against it.

The questions, for each candidate, in order: available here? can it serve this product? is its error known and within
the bound? is it faster than the baseline? The first objection is the reason that is told.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from loka.bounds import Bound
from loka.dispatch.profile import KernelTime, TimeTable
from loka.hardware import DeviceInfo
from loka.kernel_registry.registry import Registry
from loka.kernel_registry.spec import GemmRequest, KernelSpec, Op
from loka.probes.evidence import ProductEvidence, RecipeEvidence
from loka.probes.loss_evidence import LossEvidence
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
class LossCost:
    """What a kernel of a forward product does to the loss, relative to it; None where too few samples bound it."""

    kl: float  # mean over steps
    kl_low: float | None
    kl_high: float | None
    cost: float | None  # of the budget: kl_high and an established first-order increase


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
    error_upper: float | None = None  # what a bound on the error was compared with
    loss: LossCost | None = None


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


@dataclass(frozen=True, slots=True)
class Case:
    """One candidate with everything that is known of it."""

    spec: KernelSpec
    request: GemmRequest
    evidence: ProductEvidence
    recipe: RecipeEvidence | None
    bound: Bound
    unavailable: str | None
    baseline: str
    baseline_time: KernelTime | None
    time: KernelTime | None

    @property
    def known_time(self) -> KernelTime:
        """The time of an admissible case, which is known."""
        assert self.time is not None  # _ask_timed lets no untimed case pass
        return self.time

    @property
    def known_baseline_time(self) -> KernelTime:
        """The time of the baseline of an admissible case, which is known."""
        assert self.baseline_time is not None
        return self.baseline_time

    @property
    def known_recipe(self) -> RecipeEvidence:
        """The evidence of an admissible case, which is known."""
        assert self.recipe is not None  # _ask_error lets none without evidence pass
        return self.recipe

    @property
    def loss(self) -> LossEvidence | None:
        """What the case does to the loss, where a step has shown it."""
        return self.recipe.loss if self.recipe is not None else None


Objection = tuple[Code, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Considered:
    """All candidates of one product, and which of them nothing speaks against."""

    request: GemmRequest
    evidence: ProductEvidence
    baseline: KernelSpec
    baseline_time: KernelTime | None
    rejected: tuple[tuple[Case, Objection], ...]
    admissible: tuple[Case, ...]
    selected: bool
    by_loss: bool  # fprop under a bound on the loss


def consider(  # noqa: PLR0913 - the six things a choice rests on, and whether there is one
    request: GemmRequest,
    evidence: ProductEvidence,
    bound: Bound,
    registry: Registry,
    times: TimeTable,
    device: DeviceInfo,
    *,
    selected: bool = True,
) -> Considered:
    """Put the questions to every candidate of a product; raise KernelError when the registry has no baseline for it."""
    baseline = registry.baseline(request)
    baseline_time = times.of_baseline(baseline.name, request)
    recipes = {recipe.recipe: recipe for recipe in evidence.recipes}
    cases = [
        Case(
            spec,
            request,
            evidence,
            recipes.get(spec.recipe or ""),
            bound,
            registry.unavailable(spec, device),
            baseline.name,
            baseline_time,
            times.of_candidate(spec.name, request, baseline_time),
        )
        for spec in registry.candidates(request.op) or registry.low_precision()
    ]
    left_out: Objection = ("filtered", "the plan's filter leaves this site out")
    objections = [_objection(case) if selected else left_out for case in cases]
    return Considered(
        request=request,
        evidence=evidence,
        baseline=baseline,
        baseline_time=baseline_time,
        rejected=tuple((case, found) for case, found in zip(cases, objections, strict=True) if found is not None),
        admissible=tuple(case for case, found in zip(cases, objections, strict=True) if found is None),
        selected=selected,
        by_loss=bound.row_error_of(evidence.product) is None,
    )


def fastest(cases: list[Case]) -> tuple[Case, Case]:
    """Return the fastest of some admissible cases, and the one to take: the first by name of those that tie with it."""
    best = min(cases, key=lambda case: (case.known_time.median_us, case.spec.name))
    ties = [case for case in cases if not faster(best.known_time, case.known_time)]
    return best, min(ties, key=lambda case: case.spec.name)


def rejected_candidate(case: Case, code: Code, reason: str) -> Candidate:
    """Return a case as a candidate that lost."""
    error = case.recipe.error if case.recipe else None
    return Candidate(
        kernel=case.spec.name,
        recipe=case.spec.recipe,
        code=code,
        reason=reason,
        time_us=case.time.median_us if case.time else None,
        spread_us=case.time.spread_us if case.time else None,
        error_mean=finite(error.mean) if error else None,
        error_upper=finite(error.upper_tolerance) if error else None,
        loss=loss_cost(case.loss),
    )


def loss_cost(loss: LossEvidence | None) -> LossCost | None:
    """Return the part of loss evidence that a plan keeps."""
    if loss is None:
        return None
    return LossCost(kl=loss.kl, kl_low=finite(loss.kl_low), kl_high=finite(loss.kl_high), cost=finite(loss.cost))


def loss_words(loss: LossEvidence) -> str:
    """Return e.g. `up to 1.2e-06 of the loss (kl 1.1e-06, 1e-06 to 1.2e-06, 8 steps)`."""
    parts = f"kl {loss.kl:.3g}, {loss.kl_low:.3g} to {loss.kl_high:.3g}, {loss.samples} steps"
    if loss.first_order_low > 0:
        parts += f"; a first-order increase of at least {loss.first_order_low:.3g}"
    if loss.labels == "empirical":
        parts += "; from the data's own labels, which may overstate it"
    return f"up to {loss.cost:.3g} of the loss ({parts})"


def no_loss(evidence: ProductEvidence) -> str:
    """Return why no step took what a forward product does to the loss, where none did."""
    if evidence.batch > 1 or ATEN_OPS.get(evidence.op) == "convolution":
        return "no step takes what batches of matrices and convolutions do to it"
    return "no sampled step took it: probe longer, in a loop that runs backward"


def finite(value: float) -> float | None:
    """Return a number that a document can hold, else None."""
    return value if math.isfinite(value) else None


def _objection(case: Case) -> Objection | None:
    return next((found for ask in _QUESTIONS if (found := ask(case)) is not None), None)


def _ask_available(case: Case) -> Objection | None:
    return None if case.unavailable is None else ("unavailable", case.unavailable)


def _ask_able(case: Case) -> Objection | None:
    reason = case.spec.cannot(case.request)
    if reason is None and not case.evidence.parameter:
        reason = "no parameter takes part in this product, and a plan finds products by their parameter"
    return None if reason is None else ("cannot", reason)


def _ask_error(case: Case) -> Objection | None:
    recipe = case.recipe
    if recipe is None:
        because = case.evidence.unmeasured or "the probe did not measure it; name it in probe(recipes=...)"
        return "undecided", f"the error of {case.spec.recipe} is unknown here: {because}"
    limit, verdict = case.bound.row_error_of(case.request.product), recipe.judge(case.bound, case.request.product)
    if verdict == "safe":
        return None
    if limit is None:
        return _loss_objection(case, verdict == "unsafe")
    error = recipe.error
    if math.isnan(error.upper_tolerance):
        because = f": {recipe.note}" if recipe.note else "; probe longer"
        return "undecided", f"{recipe.samples} sampled steps are too few to bound its {recipe.gate}{because}"
    most = case.bound.bias_of(case.request.product)
    if most is not None and not abs(recipe.bias) <= most and error.upper_tolerance <= limit:
        code: Code = "undecided" if math.isnan(recipe.bias) else "over_bound"
        return code, f"its error along the gradient is {recipe.bias:.3g} on average, against the most of {most:g}"
    interval = f"{error.mean:.3g} on average ({error.low:.3g} to {error.high:.3g}, {recipe.samples} steps)"
    numbers = f"{recipe.gate} up to {error.upper_tolerance:.3g}, {interval}, against the bound {limit:g}"
    if verdict == "unsafe":
        return "over_bound", numbers
    return "undecided", f"{numbers}: more samples may settle it"


def _loss_objection(case: Case, is_unsafe: bool) -> Objection:
    """Say why a recipe of a forward product does not fit the budget of loss on its own."""
    loss, budget = case.loss, case.bound.loss
    assert budget is not None
    if loss is None:
        return "undecided", f"what {case.spec.recipe} does to the loss is unknown here: {no_loss(case.evidence)}"
    if math.isnan(loss.cost):
        return "undecided", f"{loss.samples} sampled step is too few to bound what it does to the loss; probe longer"
    numbers = f"costs {loss_words(loss)}, against the budget of {budget:g}"
    if is_unsafe or loss.kl_high <= budget:
        return "over_bound", numbers
    return "undecided", f"{numbers}: more samples may settle it"


def _ask_timed(case: Case) -> Objection | None:
    if case.time is None:
        return "untimed", f"never timed at {_shape(case.request)} on this device"
    if case.baseline_time is None or (case.baseline_time.assumed and not case.time.assumed):
        return "untimed", f"its baseline {case.baseline} was never timed at {_shape(case.request)} on this device"
    return None


def _ask_gain(case: Case) -> Objection | None:
    time, baseline = case.known_time, case.known_baseline_time
    speedup = baseline.median_us / time.median_us
    numbers = f"{time.median_us:.4g} us against {baseline.median_us:.4g} us of {case.baseline} ({speedup:.3g}x)"
    if speedup <= MIN_SPEEDUP:
        return "no_gain", f"{numbers}: not more than {MIN_SPEEDUP}x the baseline's speed"
    if not time.assumed and not faster(time, baseline):
        spread = time.spread_us + baseline.spread_us
        return "no_gain", f"{numbers}: inside the measured spread of {spread:.3g} us"
    return None


_QUESTIONS: Final[tuple[Callable[[Case], Objection | None], ...]] = (
    _ask_available,
    _ask_able,
    _ask_error,
    _ask_timed,
    _ask_gain,
)


def _shape(request: GemmRequest) -> str:
    return f"{request.m}x{request.k}x{request.n} {request.dtype}"
