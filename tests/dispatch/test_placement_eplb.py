"""EPLB as published: the example of its description, and its own form of a placement."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loka.dispatch.placement.eplb import balanced_packing, eplb_hosts, from_maps, replicate, to_maps
from loka.errors import ArgumentError

# The example that DeepSeek publishes: 2 layers, 12 experts in 4 groups, 16 replicas, 2 nodes, 8 devices.
LOAD = np.array(
    [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]],
    dtype=float,
)
PUBLISHED = np.array(
    [[5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1], [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]]
)


def test_the_published_example_comes_out_device_by_device():
    hosts = eplb_hosts(LOAD, np.full(8, 2), nodes=2, groups=4)
    assert np.array_equal(hosts, from_maps(PUBLISHED, 8, 12))


def test_packing_goes_heaviest_first_to_the_lightest_with_room():
    packs = balanced_packing(np.array([9.0, 1, 8, 2]), np.array([2, 2]))
    assert packs.tolist() == [0, 0, 1, 1]


def test_replicas_go_to_the_most_load_per_replica_and_never_twice_to_a_device():
    assert replicate(np.array([9.0, 1, 4]), 6, most=9).tolist() == [0, 1, 2, 0, 0, 2]
    assert replicate(np.array([9.0, 1, 4]), 6, most=2).tolist() == [0, 1, 2, 0, 2, 1]


@given(st.integers(1, 6), st.integers(6, 17), st.integers(0, 3), st.integers(0, 99))
def test_every_expert_has_a_place_and_no_device_more_than_its_slots(devices, experts, replicas, seed):
    load = np.random.default_rng(seed).gamma(1.0, size=(2, experts))
    capacity = np.full(devices, experts // devices + replicas) + (np.arange(devices) < experts % devices)
    if capacity.max() > experts:
        return
    hosts = eplb_hosts(load, capacity)
    assert hosts.any(axis=1).all()
    assert (hosts.sum(axis=2) <= capacity).all()


def test_eplbs_arrays_say_the_same_as_ours_and_lead_back():
    hosts = eplb_hosts(LOAD, np.array([3, 3, 3, 2, 2]))
    maps = to_maps(hosts)
    assert maps.physical_to_logical.shape == (2, 15)
    assert (maps.physical_to_logical == -1).sum() == 4
    assert np.array_equal(maps.logical_count, hosts.sum(axis=1))
    for layer, expert in np.ndindex(2, 12):
        slots = maps.logical_to_physical[layer, expert]
        slots = slots[slots >= 0]
        assert (maps.physical_to_logical[layer, slots] == expert).all()
        assert len(slots) == maps.logical_count[layer, expert]
    assert np.array_equal(from_maps(maps.physical_to_logical, 5, 12), hosts)


@pytest.mark.parametrize(
    ("physical", "devices", "words"),
    [
        (np.zeros((2, 7), int), 2, "as many slots"),
        (np.zeros((2, 4)), 2, "integers"),
        (np.full((1, 4), 9), 2, "0 to 3"),
        (np.array([[0, 1, 2, 2]]), 2, "Expert 3 is on no device"),
    ],
)
def test_arrays_that_are_no_placement_are_refused(physical, devices, words):
    with pytest.raises(ArgumentError, match=words):
        from_maps(physical, devices, 4)
