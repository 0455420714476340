"""The choice of a kernel, as a value: every candidate, what was known of it, and why it won or lost.

`candidates` says which kernels nothing speaks against. Of those the fastest wins; inside the measured spread the
incumbent order does. Where forward products share a budget of loss, the plan's `Ration` says which recipe a product
was given. The baseline (high precision) is always a candidate and always admissible, so there is always a decision.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from loka.bounds import Bound
from loka.dispatch.deciding.candidates import (
    MIN_SPEEDUP,
    Candidate,
    Case,
    Code,
    Considered,
    Objection,
    consider,
    fastest,
    rejected_candidate,
)
from loka.dispatch.deciding.judged import LossCost, error_words, finite, loss_words
from loka.dispatch.deciding.loss_budget import Ration
from loka.dispatch.deciding.rejected import Entry, Rejected, candidate_of, code_of
from loka.dispatch.measuring.profile import KernelTime, TimeAt, TimeTable
from loka.hardware import DeviceInfo
from loka.kernel_registry.registry import Registry
from loka.kernel_registry.spec import GemmRequest, KernelSpec
from loka.numerics import Gate
from loka.probes.judging.evidence import ProductEvidence
from loka.timing import faster

__all__ = [
    "MIN_SPEEDUP",
    "Candidate",
    "Code",
    "Decision",
    "LossCost",
    "conclude",
    "decide",
]

# How far a candidate came, for the sentence that explains a decision for the baseline.
_PROGRESS: Final[tuple[Code, ...]] = (
    *("unavailable", "cannot", "undecided", "over_bound", "untimed", "no_gain", "budget_spent"),
)
_RANK: Final[dict[str, int]] = {code: rank for rank, code in enumerate(_PROGRESS)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """The kernel for one (site, pass), with all it was chosen from.

    Where the rows of the product vary, its times are means over its row counts; `times` are those of the chosen kernel.
    Rows from `m_min` to `m_max` are those that it was decided on; of two ranges, a call belongs to the nearer one.
    """

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
    rejected: Sequence[Candidate]
    loss: LossCost | None = None  # fprop in FP8, where a step has shown it
    gate: Gate | None = None  # which error is compared with the bound, here and of every candidate
    times: tuple[TimeAt, ...] | None = None  # None: of one shape, or never timed
    over: str | None = None  # which row counts the times are over, in words
    kept_experts: tuple[int, ...] = ()  # of a layer of experts: those whose own products stay in high precision
    # Few rows and many apart: the decision for each, which together are this one; `kernel` names both (see `by_rows`),
    # times are means over all calls, and what was rejected are single kernels for all of them.
    ranges: "tuple[Decision, ...] | None" = None
    share: float | None = None  # of one of such ranges: its share of the calls

    @property
    def parts(self) -> "tuple[Decision, ...]":
        """The decisions that name one kernel each: those of its ranges, or itself."""
        return self.ranges or (self,)

    @property
    def speedup(self) -> float | None:
        """Time of the baseline over time of the chosen kernel, where both are known."""
        if self.baseline_time_us is None or not self.time_us:
            return None
        return self.baseline_time_us / self.time_us


def decide(  # noqa: PLR0913 - the six things a choice rests on, and whether there is one
    request: GemmRequest,
    evidence: ProductEvidence,
    bound: Bound,
    registry: Registry,
    times: TimeTable,
    device: DeviceInfo,
    *,
    left_out: Objection | None = None,
) -> Decision:
    """Choose the kernel of one product; every candidate that loses says why.

    A bound on the loss is one product's own here: a plan shares it out. `left_out` says what keeps the product on
    its baseline. Raises KernelError when the registry has no baseline for the product.
    """
    return conclude(consider(request, evidence, bound, registry, times, device, left_out=left_out))


def conclude(considered: Considered, ration: Ration | None = None) -> Decision:
    """Choose among the candidates of one product; with a `ration`, among those of the recipe that it grants."""
    baseline = considered.baseline
    rejected: list[Entry] = list(considered.rejected)
    if considered.left_out is not None:
        return _stays(considered, f"{considered.left_out[1]}, so it stays on {baseline.name}", rejected)
    granted = [case for case in considered.admissible if ration is None or case.spec.recipe == ration.recipe]
    others = [case for case in considered.admissible if ration is not None and case.spec.recipe != ration.recipe]
    if not granted:
        rejected += [_unpaid(case, ration) for case in others if ration is not None]
        return _stays(considered, _why_baseline(considered, rejected), rejected)
    best, winner = fastest(granted)
    rejected += [_loser(case, best, winner) for case in granted if case is not winner]
    rejected += [_outbid(case, winner, ration) for case in others if ration is not None]
    rejected.append(_beaten_baseline(baseline, winner))
    return won(winner, baseline, Rejected(rejected))


def _loser(case: Case, best: Case, winner: Case) -> Candidate:
    """Return an admissible case as slower than the fastest, or as a tie with it that the order of names has settled."""
    if faster(best.known_time, case.known_time):
        return _slower(case, best)
    return rejected_candidate(case, "tie", f"{_tie(case, best, winner)}, and the order of names decides")


def _outbid(case: Case, winner: Case, ration: Ration) -> Candidate:
    """Return an admissible case of a recipe that the product was not granted."""
    if faster(case.known_time, winner.known_time):
        return _unpaid(case, ration)
    if faster(winner.known_time, case.known_time):
        return _slower(case, winner)
    costs = [each.loss.cost if each.loss is not None else math.nan for each in (winner, case)]
    settled = f"{winner.spec.name} costs the loss {costs[0]:.3g} against {costs[1]:.3g}"
    return rejected_candidate(case, "tie", f"{_tie(case, winner, winner)}, and {settled}")


def _unpaid(case: Case, ration: Ration) -> Candidate:
    assert case.loss is not None  # it is admissible under a bound on the loss
    return rejected_candidate(case, "budget_spent", f"costs {loss_words(case.loss)}; {ration.words}")


def _slower(case: Case, best: Case) -> Candidate:
    time, quickest = case.known_time.median_us, best.known_time.median_us
    difference = time - quickest
    share = 100 * difference / quickest
    reason = f"{time:.4g} us, {difference:.3g} us ({share:.3g} %) slower than {best.spec.name}"
    return rejected_candidate(case, "slower", reason)


def _tie(case: Case, best: Case, winner: Case) -> str:
    time, won = case.known_time, winner.known_time
    spread = max(time.spread_us, won.spread_us) + best.known_time.spread_us
    return (
        f"{time.median_us:.4g} us against {won.median_us:.4g} us of {winner.spec.name}: a tie within the spread of "
        f"{spread:.3g} us"
    )


def _beaten_baseline(baseline: KernelSpec, winner: Case) -> Candidate:
    time, best = winner.known_baseline_time, winner.known_time
    return Candidate(
        kernel=baseline.name,
        recipe=None,
        code="slower",
        reason=f"the baseline: {time.median_us:.4g} us, {time.median_us / best.median_us:.3g} times {winner.spec.name}",
        time_us=time.median_us,
        spread_us=time.spread_us,
        times=time.at or None,
    )


def beaten(chosen: Decision, reason: str) -> Candidate:
    """Return what was decided as a candidate that lost to something that is decided for more than this product."""
    return Candidate(
        kernel=chosen.kernel,
        recipe=chosen.recipe,
        code="slower",
        reason=reason,
        time_us=chosen.time_us,
        error_upper=chosen.error_upper,
        loss=chosen.loss,
        times=chosen.times,
    )


def won(winner: Case, baseline: KernelSpec, rejected: Sequence[Candidate], *, together: str = "") -> Decision:
    """Return the decision for an admissible case; `together` ends the sentence on why."""
    time, baseline_time, recipe = winner.known_time, winner.known_baseline_time, winner.known_recipe
    wanted, gated = winner.wanted, winner.known_error
    why = (
        f"{baseline_time.median_us / time.median_us:.3g}x the speed of {baseline.name} "
        f"({time.median_us:.4g} us against {baseline_time.median_us:.4g} us{time.words}, {time.source}); "
        f"{_within(winner)}{together}"
    )
    return Decision(
        request=wanted.request,
        m_min=wanted.evidence.m_min,
        m_max=wanted.evidence.m_max,
        kernel=winner.spec.name,
        recipe=winner.spec.recipe,
        why=why,
        baseline=baseline.name,
        baseline_time_us=baseline_time.median_us,
        time_us=time.median_us,
        time_source=time.source,
        error_upper=finite(gated.error.upper_tolerance),
        horizon=recipe.horizon,
        rejected=rejected,
        loss=winner.judged.loss,
        gate=gated.gate,
        times=time.at or None,
        over=time.over.words if time.at else None,
    )


def _within(winner: Case) -> str:
    """Return what keeps the winner within the bound."""
    recipe, limit, product = winner.known_recipe, winner.wanted.limit, winner.wanted.request.product
    if limit.metric == "loss":
        assert recipe.loss is not None  # else it is not admissible
        return f"it spends {loss_words(recipe.loss)} of the budget of {limit.value:g}"
    error = error_words(winner.known_error, limit)
    if limit.bias is None:
        return f"{error} is within the bound {limit.words}"
    return (
        f"a {product} changes no loss in the same step, so the default bound holds: {error} is within {limit.words}, "
        f"and its error along the gradient, {recipe.bias:.2g}, within {limit.bias:g}"
    )


def _stays(considered: Considered, why: str, rejected: Sequence[Entry]) -> Decision:
    """Return the decision for the baseline."""
    time: KernelTime | None = considered.baseline_time
    time_us = None if time is None or time.assumed else time.median_us
    at = time.at if time is not None else ()
    return Decision(
        request=considered.request,
        m_min=considered.evidence.m_min,
        m_max=considered.evidence.m_max,
        kernel=considered.baseline.name,
        recipe=None,
        why=why,
        baseline=considered.baseline.name,
        baseline_time_us=time_us,
        time_us=time_us,
        time_source="none" if time is None or time.assumed else time.source,
        error_upper=None,
        horizon=None,
        rejected=Rejected(rejected),
        gate=_gate(considered),
        times=at or None,
        over=time.over.words if time is not None and at else None,
    )


def _gate(considered: Considered) -> Gate | None:
    """Return which error the limit of a product is compared with: one for all its recipes."""
    recipes = considered.evidence.recipes
    return recipes[0].gated(considered.limit).gate if recipes else None


def _why_baseline(considered: Considered, rejected: Sequence[Entry]) -> str:
    baseline, request, by_loss = considered.baseline.name, considered.request, considered.by_loss
    if request.dtype.startswith("float8"):
        return f"the model computes this product in FP8 already, so it stays as written ({baseline})"
    if not rejected:
        return f"no other kernel is known, so it stays on {baseline}"
    ranks = [_RANK.get(code_of(each) or "", 0) for each in rejected]
    furthest = max(ranks)
    nearest = min(
        (candidate_of(each) for each, rank in zip(rejected, ranks, strict=True) if rank == furthest),
        key=lambda each: _distance(each, by_loss=by_loss),
    )
    if nearest.code in ("unavailable", "cannot"):
        return f"no kernel here serves it, so it stays on {baseline}; {nearest.kernel}: {nearest.reason}"
    if nearest.code == "budget_spent":
        because = f"{nearest.kernel} {nearest.reason}"
        return f"the plan's budget of loss does not reach for it, so it stays on {baseline}; {because}"
    return (
        f"no candidate is safe and faster, so it stays on {baseline}; the nearest, {nearest.kernel}: {nearest.reason}"
    )


def _distance(candidate: Candidate, *, by_loss: bool) -> tuple[float | str, ...]:
    """Return the key by which, of candidates that came equally far, the nearest is the smallest."""
    cost = candidate.loss.cost if candidate.loss is not None else None
    numbers = (candidate.time_us, cost if by_loss else candidate.error_upper)
    known = (math.inf if number is None else number for number in numbers)
    return *known, candidate.kernel
