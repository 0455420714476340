"""Which products are measured rarer because their verdict is settled."""

import math
import random

import pytest

from loka.numerics import ProductError
from loka.probes.sampling.settled import Settled


def error(value):
    counts = {"rows": 64, "zero_rows": 0, "bad_rows": 0}
    return ProductError(row_error=value, row_error_p99=value, relative_error=2 * value, sqnr_db=0, mere=0, **counts)


def after(values, columns=64, other=None):
    settled = Settled()
    results = [
        settled.saw("job", {"rowwise": error(value), **({} if other is None else {"mxfp8": error(other)})}, columns)
        for value in values
    ]
    return results


def noisy(mean, deviation, count=30):
    draw = random.Random(0)
    return [mean * math.exp(deviation * draw.gauss(0, 1)) for _ in range(count)]


@pytest.mark.parametrize(
    ("mean", "deviation", "settled"),
    [(0.025, 0.01, True), (0.2, 0.01, True), (0.045, 0.01, False), (0.025, 0.2, False), (0.06, 0.01, False)],
)
def test_settled_is_what_neither_spread_nor_drift_can_carry_across_the_bound(mean, deviation, settled):
    results = after(noisy(mean, deviation))
    assert results[:9] == [False] * 9
    assert results[-1] is settled


def test_every_recipe_has_to_be_settled():
    assert after(noisy(0.025, 0.01), other=0.2)[-1]
    assert not after(noisy(0.025, 0.01), other=0.05)[-1]


def test_a_sample_that_comes_near_unsettles():
    results = after([*noisy(0.02, 0.01), 0.045])
    assert results[-2:] == [True, False]


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
def test_what_is_not_a_number_settles_nothing(value):
    assert not after([*noisy(0.02, 0.01), value])[-1]


def test_narrow_heads_are_judged_by_the_error_of_the_whole_tensor():
    assert after(noisy(0.03, 0.001), columns=64)[-1]
    assert not after(noisy(0.03, 0.001), columns=1)[-1]  # twice 0.03, too near to the bound of 0.05
