"""What to buy within a budget: at most one offer of each product, for the largest gain in all.

A multiple-choice knapsack. Its linear relaxation buys steps along each product's concave hull, the best gain per cost
first, and differs from the best purchase only near the step at which the budget runs out. Products whose steps lie near
that one are the core: all their combinations are gone through, keeping those that no other beats in both cost and
gain. Everything else stays as the relaxation has it. Up to about a dozen products that is exact; beyond, as good as an
integer program to a few parts in 100,000, in a fraction of its time and the same on every machine.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

# Steps on either side of the one at which the budget runs out whose products are the core.
_REACH: Final[int] = 32
# Combinations kept at once: of more, the best of each of so many equal parts of the budget.
_MOST_KEPT: Final[int] = 2048
# Sums are rounded; where the exact one exceeds the budget, it is asked again for a little less.
_CAPACITIES: Final[tuple[float, ...]] = (1.0, 1.0 - 1e-9)


@dataclass(frozen=True, kw_only=True, slots=True)
class Offer:
    """One recipe that a product may buy."""

    product: int
    recipe: str
    cost: float  # of the loss, relative
    gain: float  # time saved per step, in any one unit


def spend(offers: Sequence[Offer], budget: float) -> dict[int, str]:
    """Return product -> recipe: at most one offer of each product, within the budget, with the largest gain in all."""
    by_product: defaultdict[int, list[Offer]] = defaultdict(list)
    # In an order of its own, so that the order of the offers changes nothing.
    for offer in sorted(offers, key=lambda offer: (offer.product, offer.cost, -offer.gain, offer.recipe)):
        by_product[offer.product].append(offer)
    dearest = [min(some, key=lambda offer: (-offer.gain, offer.cost, offer.recipe)) for some in by_product.values()]
    if _fits(dearest, budget):
        return {offer.product: offer.recipe for offer in dearest}
    for capacity in _CAPACITIES:
        found = _buy(by_product, budget * capacity)
        if _fits(found, budget):
            break
    return {offer.product: offer.recipe for offer in found}


def _buy(by_product: dict[int, list[Offer]], budget: float) -> list[Offer]:
    steps = sorted(step for some in by_product.values() for step in _hull(some))
    bought: dict[int, Offer] = {}
    left = budget
    end = len(steps)
    for at, (_, product, _, offer) in enumerate(steps):
        more = offer.cost - (bought[product].cost if product in bought else 0.0)
        if more > left:
            end = at
            break
        left -= more
        bought[product] = offer
    core = sorted({product for _, product, _, _ in steps[max(end - _REACH, 0) : end + _REACH]})
    kept = [offer for product, offer in bought.items() if product not in core]
    return [*kept, *_best([by_product[product] for product in core], budget - math.fsum(each.cost for each in kept))]


def _hull(offers: Sequence[Offer]) -> list[tuple[float, int, int, Offer]]:
    """Return the steps (-gain per cost, product, position, offer) along the concave hull of offers sorted by cost."""
    hull: list[Offer] = []
    for offer in offers:
        if offer.gain <= (hull[-1].gain if hull else 0.0):
            continue
        while hull and _worth(offer, hull[-1]) >= _worth(hull[-1], hull[-2] if len(hull) > 1 else None):
            hull.pop()
        hull.append(offer)
    before = [None, *hull][: len(hull)]
    return [
        (-_worth(offer, last), offer.product, at, offer)
        for at, (offer, last) in enumerate(zip(hull, before, strict=True))
    ]


def _worth(offer: Offer, before: Offer | None) -> float:
    """Return the gain per cost of an offer over a cheaper one, or over none."""
    cost, gain = (offer.cost, offer.gain) if before is None else (offer.cost - before.cost, offer.gain - before.gain)
    return gain / cost if cost > 0 else math.inf


def _best(choices: Sequence[Sequence[Offer]], budget: float) -> list[Offer]:
    """Return the best purchase of the core: all combinations, one product after the other, without those beaten."""
    cost, gain = np.zeros(1), np.zeros(1)
    history: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for some in choices:
        # Column 0 buys nothing.
        costs = (cost[:, None] + np.array([0.0, *(offer.cost for offer in some)])).ravel()
        gains = (gain[:, None] + np.array([0.0, *(offer.gain for offer in some)])).ravel()
        order = np.lexsort((-gains, costs))
        order = order[costs[order] <= budget]
        best_before = np.maximum.accumulate(np.append(-np.inf, gains[order]))[:-1]
        order = order[gains[order] > best_before]
        if order.size > _MOST_KEPT:
            # Gains rise with costs here, so the last of each part is its best.
            part = np.floor(costs[order] * (_MOST_KEPT / budget))
            order = order[np.append(part[1:] != part[:-1], True)]
        history.append(tuple(np.divmod(order, len(some) + 1)))
        cost, gain = costs[order], gains[order]
    found: list[Offer] = []
    at = gain.size - 1
    for some, (came_from, bought) in zip(reversed(choices), reversed(history), strict=True):
        if bought[at]:
            found.append(some[bought[at] - 1])
        at = came_from[at]
    return found


def _fits(offers: Iterable[Offer], budget: float) -> bool:
    return math.fsum(offer.cost for offer in offers) <= budget
