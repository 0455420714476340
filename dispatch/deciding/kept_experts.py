"""Layers of experts in which a few experts stay in high precision.

A layer of experts is one product with one error, a mean over its experts. Where single experts exceed the bound by
themselves, the layer may still run in FP8 without them: their rows are computed once more, on the baseline, which
costs the share of the tokens that they get. Of a layer whose error as a whole is above the bound, or too uncertain,
each other expert has to be within it by itself.
"""

from dataclasses import dataclass, replace
from typing import Final

from loka.bounds import Limit
from loka.dispatch.deciding.candidates import Case, Code, Considered, Objection, objection_to_time
from loka.dispatch.deciding.decide import Decision
from loka.dispatch.measuring.profile import KernelTime
from loka.probes.experts.statistics import ExpertStatistics
from loka.probes.experts.verdicts import judge_experts, unsafe_experts

# Share of the tokens that kept experts may get: beyond, hardly anything is left to gain.
_MOST_TOKENS: Final[float] = 0.5
# Objections to the error of a layer that the errors of its experts may answer.
_OF_ERROR: Final[frozenset[Code]] = frozenset({"over_bound", "undecided"})

Kept = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Keeping:
    """Which experts each recipe would have to leave in high precision, and the share of tokens that they get."""

    by_recipe: dict[str, Kept]
    shares: dict[str, float]
    answered: frozenset[str]  # recipes of which the layer's error as a whole is not within the bound


_NOTHING: Final = Keeping({}, {}, frozenset())


def without_unsafe_experts(
    considered: Considered, experts: ExpertStatistics | None, confidence: float
) -> tuple[Considered, Keeping]:
    """Return the candidates of a layer with their unsafe experts left out, and which those are.

    A candidate without any stays as it is; so does everything where the bound is not on the row error.
    """
    if experts is None or considered.limit.metric != "row_error" or not considered.selected:
        return considered, _NOTHING
    recipes = [name for name in experts.recipes if any(case.spec.recipe == name for case in _cases(considered))]
    kept = {name: unsafe_experts(experts, name, considered.limit, confidence) for name in recipes}
    total = float(experts.tokens.sum())
    shares = {
        name: float(experts.tokens[list(some)].sum()) / total for name, some in kept.items() if some and total > 0
    }
    admissible: list[Case] = []
    rejected: list[tuple[Case, Objection]] = []
    answered: set[str] = set()
    for case, objection in [(case, None) for case in considered.admissible] + list(considered.rejected):
        recipe = case.spec.recipe or ""
        share = shares.get(recipe)
        if share is not None and _may_stay(objection, case, share, experts, (considered.limit, confidence)):
            answered |= {recipe} if objection is not None else set()
            case, objection = _charged(case, share, kept[recipe])
        if objection is None:
            admissible.append(case)
        else:
            rejected.append((case, objection))
    made = replace(considered, admissible=tuple(admissible), rejected=tuple(rejected))
    return made, Keeping({name: kept[name] for name in shares}, shares, frozenset(answered))


def keeping(decision: Decision, keep: Keeping) -> Decision:
    """Return a decision with the experts that its kernel does not compute, and a word on them."""
    kept = keep.by_recipe.get(decision.recipe or "", ())
    if not kept:
        return decision
    why = (
        f"{_words(kept, keep.shares[decision.recipe or ''])}, and stay in high precision, above the bound by themselves"
    )
    if decision.recipe in keep.answered:
        speed = decision.why.partition("; ")[0]
        return replace(decision, kept_experts=kept, why=f"{speed}; {why}; every other one is within it by itself")
    return replace(decision, kept_experts=kept, why=f"{decision.why}; {why}")


def _words(kept: Kept, share: float) -> str:
    """Return e.g. `experts 3, 17 (4.1 % of the tokens)`."""
    return f"expert{'s' if len(kept) > 1 else ''} {', '.join(map(str, kept))} ({100 * share:.3g} % of the tokens)"


def _cases(considered: Considered) -> tuple[Case, ...]:
    return (*considered.admissible, *(case for case, _ in considered.rejected))


def _may_stay(
    objection: Objection | None, case: Case, share: float, experts: ExpertStatistics, held_to: tuple[Limit, float]
) -> bool:
    """Whether a candidate is asked again without its unsafe experts."""
    if objection is None:
        return True
    if objection[0] not in _OF_ERROR or share > _MOST_TOKENS:
        return False
    verdicts = judge_experts(experts, case.spec.recipe or "", *held_to)
    others = [expert for expert in range(experts.experts) if expert not in experts.idle]
    return all(verdicts.get(expert) in ("safe", "unsafe") for expert in others)


def _charged(case: Case, share: float, kept: Kept) -> tuple[Case, Objection | None]:
    """Charge a candidate with the products that the baseline computes, and ask whether it still gains."""
    if share > _MOST_TOKENS:
        listed = ", ".join(map(str, kept))
        return case, (
            "over_bound",
            f"experts {listed} exceed the bound, and {100 * share:.3g} % of the tokens are theirs",
        )
    time, baseline_time = case.offer.time, case.wanted.baseline_time
    if time is not None and baseline_time is not None:
        case = case.on(case.spec, _sum(time, baseline_time, share))
    return case, objection_to_time(case)


def _sum(time: KernelTime, baseline: KernelTime, share: float) -> KernelTime:
    more = share * baseline.median_us / time.median_us if time.median_us else 0.0
    return replace(
        time,
        median_us=time.median_us * (1.0 + more),
        spread_us=time.spread_us + share * baseline.spread_us,
        at=tuple(replace(each, time_us=each.time_us * (1.0 + more)) for each in time.at),
    )
