"""Requests find their devices: the best there are within equal sizes, and sizes that stay equal as requests arrive."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loka.dispatch.placement.grouping import (
    assign,
    assign_arriving,
    assign_equal,
    clusters_of,
    likely_groups,
    nearest_groups,
    normalised,
    paper_groups,
    size_limits,
)
from loka.errors import ArgumentError


def drawn(requests, devices, seed=0):
    return np.random.default_rng(seed).normal(size=(requests, devices))


def test_the_assignment_is_the_best_of_all_within_the_sizes():
    scores, low, high = drawn(7, 3), np.array([1, 2, 0]), np.array([3, 3, 2])
    best = max(
        sum(scores[at, device] for at, device in enumerate(each))
        for each in product(range(3), repeat=7)
        if all(low[device] <= each.count(device) <= high[device] for device in range(3))
    )
    groups = assign(scores, low, high)
    assert scores[np.arange(7), groups].sum() == pytest.approx(best)


def test_a_request_in_doubt_belongs_to_devices_in_part_and_devices_stay_equal():
    two = likely_groups(np.array([[1.0, 0.0], [0.0, 1.0]]), 0.5)
    assert two[0, 0] == pytest.approx(1 / (1 + np.exp(-2.0)))  # a score better by two doubts
    scores = drawn(40, 5)
    likely = likely_groups(scores + np.arange(5), 0.5)  # what is good for all alike decides nothing
    assert np.allclose(likely.sum(axis=1), 1)
    assert np.allclose(likely.sum(axis=0), 8, atol=1e-3)
    assert np.allclose(likely, likely_groups(scores, 0.5), atol=1e-4)


def test_without_doubt_a_request_belongs_to_its_device_alone():
    scores = drawn(12, 3)
    sure = np.eye(3)[assign_equal(scores, 0.0)]
    assert np.array_equal(likely_groups(scores, 0.0), sure)
    assert np.abs(likely_groups(scores + 50 * sure, 0.5) - sure).max() < 1e-12


@given(st.integers(1, 60), st.integers(1, 9), st.sampled_from([0.0, 0.1, 0.5]))
def test_equal_groups_are_equal_within_the_slack_or_as_equal_as_can_be(requests, devices, slack):
    sizes = np.bincount(assign_equal(drawn(requests, devices), slack), minlength=devices)
    equal = requests / devices
    assert sizes.sum() == requests
    assert sizes.max() <= max(equal * (1 + slack) + 1e-9, np.ceil(equal))
    assert sizes.min() >= min(equal * (1 - slack) - 1e-9, np.floor(equal))


@pytest.mark.parametrize("window", [1, 5, 16, 200])
def test_groups_stay_equal_while_requests_arrive_even_where_all_prefer_one_device(window):
    scores = drawn(150, 8)
    scores[:, 0] += 100
    groups = assign_arriving(scores, window)
    for end in {*range(window, 150, window), 150}:
        low, high = size_limits(end, 8)
        sizes = np.bincount(groups[:end], minlength=8)
        assert (sizes >= low - (window < 8)).all()
        assert (sizes <= high + (window < 8)).all()


def test_a_stream_decides_without_those_that_come_later():
    scores = drawn(40, 4)
    changed = scores.copy()
    changed[20:] = drawn(20, 4, seed=1)
    assert np.array_equal(assign_arriving(scores, 10)[:20], assign_arriving(changed, 10)[:20])


def test_shared_centroids_are_served_in_turn_and_others_by_score_alone():
    scores = np.tile([1.0, 1.0, 0.0], (10, 1))
    assert np.bincount(nearest_groups(scores), minlength=3).tolist() == [5, 5, 0]
    scores[:, 2] = 2.0
    assert set(nearest_groups(scores).tolist()) == {2}


def test_clusters_find_what_is_apart_whatever_their_number():
    points = normalised(np.repeat(np.eye(4) * 9, 5, axis=0) + drawn(20, 4) * 0.1)
    labels = clusters_of(points, 4, seed=0)
    assert len({tuple(labels[at : at + 5]) for at in range(0, 20, 5)}) == 4
    assert len(np.unique(labels)) == 4
    assert np.array_equal(clusters_of(np.ones((6, 3), np.float32), 4, seed=0), np.zeros(6))


@pytest.mark.parametrize(("clusters", "devices"), [(3, 3), (2, 6), (5, 2), (3, 8)])
def test_the_papers_clusters_are_mapped_to_any_number_of_devices(clusters, devices):
    decode = np.repeat(np.eye(6, dtype=int)[:clusters] * 50, [12, 6, 6, 6, 6][:clusters], axis=0)[:, None]
    groups, cluster = paper_groups(decode, devices, clusters=clusters)
    assert groups.min() >= 0
    assert groups.max() < devices
    assert len(cluster) == devices
    if devices >= clusters:  # no device mixes clusters, and the largest cluster has the most devices
        kinds = decode[:, 0].argmax(axis=1)
        assert all(len(np.unique(kinds[groups == device])) <= 1 for device in range(devices))
        assert len(np.unique(groups[kinds == 0])) >= len(np.unique(groups[kinds == 1]))
    else:
        assert len(np.unique(groups)) == devices


def test_sizes_and_windows_that_cannot_be_are_refused():
    with pytest.raises(ArgumentError, match="do not fit"):
        assign(drawn(5, 2), np.array([3, 3]), np.array([3, 3]))
    with pytest.raises(ArgumentError, match="from 1"):
        assign_arriving(drawn(5, 2), 0)
