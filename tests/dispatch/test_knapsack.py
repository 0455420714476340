"""The knapsack: never over the budget, exact where all ways can be tried, close to the linear bound where not."""

import itertools
import math
import random
import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import optimize, sparse

from loka.dispatch.deciding.knapsack import Offer, spend
from tests.made_times import seconds_since


def brute_force(offers, budget):
    """The largest gain within the budget over all ways to take at most one offer of each product."""
    by_product = [[None, *some] for some in grouped(offers).values()]
    best = 0.0
    for choice in itertools.product(*by_product):
        taken = [offer for offer in choice if offer is not None]
        if math.fsum(offer.cost for offer in taken) <= budget:
            best = max(best, math.fsum(offer.gain for offer in taken))
    return best


def grouped(offers):
    found = {}
    for offer in offers:
        found.setdefault(offer.product, []).append(offer)
    return found


numbers = st.floats(1e-9, 1.0) | st.sampled_from((0.0, 0.25, 0.5, 1.0))
instances = st.lists(
    st.lists(st.tuples(numbers, numbers), min_size=1, max_size=3, unique_by=lambda pair: pair[0]),
    min_size=1,
    max_size=6,
)


@settings(max_examples=150, deadline=None)
@given(instances, st.sampled_from((1e-6, 0.3, 1.0, 2.0)))
@example([[(0.5, 1.0)], [(0.5, 1.0)], [(1.0, 1.9)]], 1.0)
def test_what_is_bought_saves_as_much_as_any_other_way_within_the_budget(instance, budget):
    offers = [
        Offer(product=at, recipe=f"r{index}", cost=cost * 1e-4, gain=gain)
        for at, some in enumerate(instance)
        for index, (cost, gain) in enumerate(some)
    ]
    bought = spend(offers, budget * 1e-4)
    taken = [offer for offer in offers if bought.get(offer.product) == offer.recipe]
    assert len(taken) == len(bought)
    assert math.fsum(offer.cost for offer in taken) <= budget * 1e-4
    # A purchase that fills the budget to within 1e-5 of it may fall to the solver's tolerance.
    least = brute_force(offers, budget * 1e-4 * (1 - 2e-5))
    assert math.fsum(offer.gain for offer in taken) >= least * (1 - 1e-5) - 1e-9


def test_the_best_bargain_is_not_always_part_of_the_best_purchase():
    offers = [
        Offer(product=at, recipe="r", cost=cost, gain=gain)
        for at, (cost, gain) in enumerate([(0.6, 7), (0.5, 5), (0.5, 5)])
    ]
    assert set(spend(offers, 1.0)) == {1, 2}


def linear_bound(offers, budget):
    """What no purchase can save more than: the optimum where any share of an offer may be bought."""
    rows = [offer.product for offer in offers]
    each = sparse.csr_array((np.ones(len(offers)), (rows, np.arange(len(offers)))))
    limits = sparse.vstack([each, sparse.csr_array([[offer.cost / budget for offer in offers]])])
    gain = [-offer.gain for offer in offers]
    return -optimize.linprog(gain, A_ub=limits, b_ub=np.ones(limits.shape[0]), bounds=(0, 1)).fun


@pytest.mark.parametrize(("products", "least"), [(60, 0.985), (2000, 0.9995)])
@pytest.mark.parametrize("sigma", [0.0, 2.0], ids=["costs alike", "costs of all sizes"])
def test_a_large_purchase_is_close_to_the_bound_of_any_and_quick(products, least, sigma):
    generator = random.Random(products)
    offers = []
    for at in range(products):
        scale = 1.7e-5 / products * 20 * math.exp(generator.gauss(0, sigma))
        for index in range(4):
            gain = (1 + at % 16) * (1 - 1 / generator.uniform(1.1, 2.5))
            offers.append(Offer(product=at, recipe=f"r{index}", cost=scale * (1 + index), gain=gain))
    began = time.process_time()
    bought = spend(offers, 1e-4)
    assert seconds_since(began) < 1.0
    taken = [offer for offer in offers if bought.get(offer.product) == offer.recipe]
    assert math.fsum(offer.cost for offer in taken) <= 1e-4
    # Where all costs are multiples of one, so is all that can be spent.
    spendable = 1e-4 if sigma else math.floor(1e-4 / scale) * scale
    assert math.fsum(offer.gain for offer in taken) >= least * linear_bound(offers, spendable)
    generator.shuffle(offers)
    assert spend(offers, 1e-4) == bought


def test_offers_without_cost_or_without_gain_do_no_harm():
    offers = [
        Offer(product=0, recipe="free", cost=0.0, gain=1.0),
        Offer(product=0, recipe="dear", cost=0.9, gain=3.0),
        Offer(product=1, recipe="useless", cost=0.2, gain=0.0),
        Offer(product=2, recipe="big", cost=0.8, gain=4.0),
        Offer(product=3, recipe="too big", cost=1.5, gain=9.0),
    ]
    bought = spend(offers, 1.0)
    assert {product: recipe for product, recipe in bought.items() if product != 1} == {0: "free", 2: "big"}
    assert spend([], 1.0) == {}
