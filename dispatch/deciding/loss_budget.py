"""The budget of loss: one number that all forward products of a plan share, spent where it saves the most time.

Each product may buy one recipe: what it costs is an upper bound on what it does to the loss, what it is worth is the
time it saves per step; `knapsack` finds what to buy. A recipe that is not measurably faster than a cheaper one is
never bought.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from loka.bounds import Bound
from loka.dispatch.deciding.candidates import Case, Considered, fastest
from loka.dispatch.deciding.knapsack import Offer, spend
from loka.timing import faster


@dataclass(frozen=True, kw_only=True, slots=True)
class Ration:
    """What one forward product gets of a shared budget; the rest says what became of the budget."""

    recipe: str | None  # bought; None: none
    budget: float
    spent: float
    buyers: int

    @property
    def words(self) -> str:
        """Say where the budget went."""
        others = self.buyers - (self.recipe is not None)
        who = f"{others} other product{'' if others == 1 else 's'}"
        return f"of the budget of {self.budget:g}, {self.spent:.3g} is spent, where it saves more time ({who})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Spending:
    """How a plan spends its budget of loss. `rations` by position of the product."""

    budget: float
    spent: float = 0.0
    kl: float = 0.0  # sum of the means
    spread: float = 0.0  # of the first-order terms of one batch, added in quadrature
    buyers: int = 0
    candidates: int = 0  # products with anything to buy
    empirical: int = 0  # buyers whose curvature rests on the data's own labels
    rations: Mapping[int, Ration] = field(default_factory=dict)


def share_out(considered: Sequence[Considered], bound: Bound) -> Spending:
    """Spend the budget of a bound on the loss over the forward products of a plan."""
    assert bound.loss is not None
    choices = _choices(considered)
    bought = spend(_offers(considered, choices), bound.loss)
    losses = [loss for at, recipe in bought.items() if (loss := choices[at][recipe].loss) is not None]
    spent = math.fsum(loss.cost for loss in losses)
    return Spending(
        budget=bound.loss,
        spent=spent,
        kl=math.fsum(loss.kl for loss in losses),
        spread=math.sqrt(math.fsum(loss.spread**2 for loss in losses)),
        buyers=len(bought),
        candidates=len(choices),
        empirical=sum(loss.labels == "empirical" for loss in losses),
        rations={
            at: Ration(recipe=bought.get(at), budget=bound.loss, spent=spent, buyers=len(bought)) for at in choices
        },
    )


def _choices(considered: Sequence[Considered]) -> dict[int, dict[str, Case]]:
    """Return product -> recipe -> the kernel that would run it, for all that is worth buying."""
    result: dict[int, dict[str, Case]] = {}
    for position, each in enumerate(considered):
        if not each.by_loss or not each.admissible:
            continue
        cases: defaultdict[str, list[Case]] = defaultdict(list)
        for case in each.admissible:
            cases[case.spec.recipe or ""].append(case)
        kept: dict[str, Case] = {}
        for case in sorted(
            (fastest(some)[1] for some in cases.values()), key=lambda case: (_cost(case), case.spec.name)
        ):
            if all(faster(case.known_time, other.known_time) for other in kept.values()):
                kept[case.spec.recipe or ""] = case
        result[position] = kept
    return result


def _offers(considered: Sequence[Considered], choices: Mapping[int, Mapping[str, Case]]) -> list[Offer]:
    """Price all choices."""
    baseline_us = baseline_prices(considered, choices)
    offers = []
    for at, recipes in choices.items():
        per_step = baseline_us[at] * considered[at].evidence.calls
        for recipe, case in recipes.items():
            saved = 1.0 - case.known_time.median_us / case.known_baseline_time.median_us
            offers.append(Offer(product=at, recipe=recipe, cost=_cost(case), gain=per_step * saved))
    return offers


def baseline_prices(considered: Sequence[Considered], positions: Iterable[int]) -> dict[int, float]:
    """Return the time of one call of the baselines at these positions, in microseconds.

    One whose time is only assumed counts by its operations, at the rate of the others.
    """
    flops = {at: 2.0 * math.prod(_extents(considered[at])) for at in positions}
    times = {at: time for at in flops if (time := considered[at].baseline_time) is not None and not time.assumed}
    timed = math.fsum(flops[at] for at in times)
    us_per_flop = math.fsum(time.median_us for time in times.values()) / timed if timed else 1e-6
    return {at: times[at].median_us if at in times else us_per_flop * flops[at] for at in flops}


def _extents(considered: Considered) -> tuple[int, ...]:
    request = considered.request
    return request.batch, request.m, request.n, request.k


def _cost(case: Case) -> float:
    return case.loss.cost if case.loss is not None else math.inf
