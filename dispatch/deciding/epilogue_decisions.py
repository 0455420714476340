"""Decisions for a product with its norm and activation in one kernel, and what lost to it, as values and in words."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from loka.dispatch.deciding.candidates import Candidate, Code, Considered
from loka.dispatch.deciding.composition import case_of
from loka.dispatch.deciding.decide import Decision, beaten, won
from loka.dispatch.measuring.profile import KernelTime
from loka.kernel_registry.spec import GemmRequest, KernelSpec, Op
from loka.timing import faster

FUSED_OP: Final[Op] = "linear_norm_act"


def fused_request(request: GemmRequest) -> GemmRequest:
    """Return the forward product of a linear layer together with its norm and activation."""
    return replace(request, op=FUSED_OP)


@dataclass(frozen=True, slots=True)
class Offer:
    """The fastest fused kernel of a layer, and what it was compared with; it may be that baseline itself."""

    spec: KernelSpec
    time: KernelTime
    baseline: KernelSpec
    baseline_time: KernelTime
    behind: KernelTime  # what norm and activation take behind a product


def taken(offer: Offer, considered: Considered, unfused: Decision) -> Decision:
    """Return the decision for a fused kernel; `unfused` is what it takes the place of."""
    case = case_of(offer.spec, considered)
    assert case is not None  # else `_objection` has refused the kernel
    rejected = _rejected(offer, unfused)
    rejected[offer.baseline.name] = Candidate(
        kernel=offer.baseline.name,
        recipe=None,
        code="slower",
        reason=f"the baseline: {offer.baseline_time.median_us:.4g} us with norm and activation",
        time_us=offer.baseline_time.median_us,
        spread_us=offer.baseline_time.spread_us,
        times=offer.baseline_time.at or None,
    )
    wanted = replace(
        case.wanted,
        request=fused_request(case.wanted.request),
        baseline=offer.baseline.name,
        baseline_time=offer.baseline_time,
    )
    decision = won(
        case.on(offer.spec, offer.time)._replace(wanted=wanted),
        offer.baseline,
        tuple(rejected[name] for name in sorted(rejected)),
    )
    return replace(decision, why=f"{decision.why}; {_against(offer, unfused)}")


def stays(offer: Offer, considered: Considered, unfused: Decision) -> Decision:
    """Return the decision for a fused kernel in high precision, which is what the model runs by itself."""
    rejected = _rejected(offer, unfused)
    return replace(
        unfused,
        request=fused_request(considered.request),
        kernel=offer.baseline.name,
        recipe=None,
        why=f"it stays in high precision: {_against(offer, unfused)}",
        baseline=offer.baseline.name,
        baseline_time_us=offer.time.median_us,
        time_us=offer.time.median_us,
        time_source=offer.time.source,
        error_upper=None,
        horizon=None,
        rejected=tuple(rejected[name] for name in sorted(rejected)),
        loss=None,
        times=offer.time.at or None,
        over=offer.time.over.words if offer.time.at else None,
        ranges=None,
        share=None,
    )


def _against(offer: Offer, unfused: Decision) -> str:
    apart = (unfused.time_us or 0.0) + offer.behind.median_us
    return (
        f"norm and activation are in this kernel: {offer.time.median_us:.4g} us against {apart:.4g} us of "
        f"{unfused.kernel} and both behind it"
    )


def _rejected(offer: Offer, unfused: Decision) -> dict[str, Candidate]:
    """Return the kernels of the product alone, by name, with what norm and activation add to them."""
    behind = offer.behind.median_us
    rejected = {each.kernel: _behind_it(each, behind) for each in unfused.rejected if each.recipe is not None}
    for part in unfused.parts:
        if part.recipe is not None:
            rejected[part.kernel] = _beaten(part, offer)
    return rejected


def _beaten(unfused: Decision, offer: Offer) -> Candidate:
    """Return what the product would run on without the fused kernel, as a candidate that lost."""
    own = beaten(unfused, f"the best kernel of the product alone, {unfused.time_us or 0.0:.4g} us")
    return _behind_it(own, offer.behind.median_us)


def _behind_it(candidate: Candidate, behind_us: float) -> Candidate:
    """Return a kernel of the product alone with what norm and activation add to it."""
    if candidate.time_us is None:
        return candidate
    return replace(
        candidate,
        reason=f"{candidate.reason}; norm and activation behind it take {behind_us:.4g} us more",
        time_us=candidate.time_us + behind_us,
        times=None,
    )


def lost(offer: Offer, chosen: Decision) -> Candidate:
    """Return a fused kernel that did not pay, as a candidate that lost to what was chosen."""
    apart = (chosen.time_us or 0.0) + offer.behind.median_us
    reason = (
        f"{offer.time.median_us:.4g} us with norm and activation, against {apart:.4g} us of {chosen.kernel} and both "
        "behind it; its layer, with the gradients that share no casts with it, is not faster by more than the spread"
    )
    return candidate_of(offer.spec, "slower", reason, offer.time)


def with_told(decision: Decision, told: Sequence[Candidate]) -> Decision:
    """Add candidates that lost."""
    return replace(decision, rejected=tuple(sorted((*decision.rejected, *told), key=lambda each: each.kernel)))


def candidate_of(spec: KernelSpec, code: Code, reason: str, time: KernelTime | None) -> Candidate:
    """Return a fused kernel that was not chosen."""
    return Candidate(
        kernel=spec.name,
        recipe=spec.recipe,
        code=code,
        reason=reason,
        time_us=time.median_us if time else None,
        spread_us=time.spread_us if time else None,
        times=(time.at or None) if time else None,
    )


def outrun(offer: Offer, chosen: Offer) -> Candidate:
    """Return a fused kernel that is slower than another one, or ties with it."""
    code: Code = "slower" if faster(chosen.time, offer.time) else "tie"
    numbers = f"{offer.time.median_us:.4g} us with norm and activation against {chosen.time.median_us:.4g} us"
    return candidate_of(offer.spec, code, f"{numbers} of {chosen.spec.name}", offer.time)
