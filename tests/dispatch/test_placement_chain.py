"""Tokens that stay: experts used one after the other come together, as far as the load allows."""

import numpy as np
import pytest

from loka.dispatch.placement.chain import chained_places, hops, transitions
from loka.dispatch.placement.usage import slots_of
from tests.dispatch.made_routing import made_trace


def test_transitions_are_those_of_independent_choices_within_a_request():
    decode = np.array([[[4, 0], [1, 3]], [[0, 2], [0, 0]]])
    assert transitions(decode)[0].tolist() == [[1, 3], [0, 0]]  # the second request sends nothing on


def test_hops_are_counted_between_neighbouring_layers():
    passed = np.array([[[5.0, 1], [2, 7]]])
    assert hops(passed, np.array([[0, 1], [0, 1]])) == 3
    assert hops(passed, np.array([[0, 1], [1, 0]])) == 12


@pytest.mark.parametrize("devices", [3, 4])
def test_experts_of_a_domain_come_together_across_layers_under_the_load_cap(devices):
    trace = made_trace(requests=48, layers=4, seed=3)
    slots = slots_of(16, devices)
    passed = transitions(trace.decode)
    linear = np.tile(np.repeat(np.arange(devices), slots), (4, 1))
    found = chained_places(trace.decode, slots)
    assert all(np.array_equal(np.bincount(row), slots) for row in found)
    load = trace.decode.sum(axis=0)
    served = np.bincount(found.ravel(), load.ravel())
    assert served.max() <= 1.2 * served.mean() * (1 + 1e-6)
    assert hops(passed, found) < 0.75 * hops(passed, linear)
    again = chained_places(trace.decode, slots, start=found)
    assert hops(passed, again) <= hops(passed, found) * (1 + 1e-9)


def test_one_layer_has_no_hops():
    trace = made_trace(requests=4, layers=1)
    assert hops(transitions(trace.decode), chained_places(trace.decode, slots_of(16, 4))) == 0
