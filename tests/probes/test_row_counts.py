"""How many rows the calls of a product have: few points that stand for many, whatever the order they came in."""

import math
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import loka
from loka.errors import ArgumentError
from loka.probes.capturing.row_counts import MOST_POINTS, CallRows, RowCount, RowCounts, median_rows, row_counts
from loka.probes.judging.evidence import load_evidence
from loka.probes.records import LearnedRecord
from loka.probes.sampling.learning import ROWS
from loka.probes.storing.writer import RunWriter
from tests.probes.made_records import made_info, made_product, made_progress, made_step

CALLS = st.dictionaries(st.integers(1, 10_000), st.integers(1, 1000), min_size=1, max_size=40)


def points(found: RowCounts) -> dict[int, float]:
    return {each.rows: each.weight for each in found.points}


def test_few_row_counts_are_kept_as_they_are():
    assert points(row_counts({2048: 30, 8: 10}, 2048)) == {8: 0.25, 2048: 0.75}
    assert row_counts({64: 12}, 64) == RowCounts(points=(RowCount(rows=64, weight=1.0),))


def test_calls_without_rows_are_not_counted():
    assert points(row_counts({0: 5, 16: 1, 32: 3}, 16)) == {16: 0.25, 32: 0.75}
    assert row_counts({0: 5}, 0) == RowCounts()
    assert row_counts({}, 0) == RowCounts()


@settings(max_examples=200)
@given(CALLS, st.data())
def test_points_are_few_hold_the_ends_and_the_median_and_keep_calls_and_rows(calls, data):
    median = median_rows(calls)
    found = row_counts(calls, median)
    kept = points(found)
    assert len(kept) == min(len(calls), MOST_POINTS)
    assert list(kept) == sorted(kept)
    assert {min(calls), max(calls), median} <= set(kept) <= set(calls)
    assert min(kept.values()) > 0
    assert math.fsum(kept.values()) == pytest.approx(1.0, abs=1e-12)
    total = sum(calls.values())
    mean = sum(rows * count for rows, count in calls.items()) / total
    assert math.fsum(rows * weight for rows, weight in kept.items()) == pytest.approx(mean)
    # A point carries at least the calls that have exactly its rows.
    assert all(kept[rows] >= calls[rows] / total - 1e-12 for rows in kept)
    # Whatever the order in which the calls were seen.
    order = data.draw(st.permutations(list(calls)))
    assert row_counts({rows: calls[rows] for rows in order}, median) == found


def test_the_points_lie_where_the_calls_are():
    crowd = dict.fromkeys(range(100, 120), 100)
    found = points(row_counts({1: 1, **crowd, 5000: 1}, median_rows(crowd)))
    assert len([rows for rows in found if 100 <= rows < 120]) == MOST_POINTS - 2
    assert found[1] + found[5000] < 0.05


@given(CALLS)
def test_the_median_is_that_of_the_calls_one_by_one(calls):
    one_by_one = sorted(rows for rows, count in calls.items() for _ in range(count))
    assert median_rows(calls) == one_by_one[(len(one_by_one) - 1) // 2]


def test_a_rank_whose_batches_are_always_empty_leaves_the_median_to_the_others():
    assert median_rows({0: 60, 32: 40}) == median_rows({32: 40}) == 32
    assert median_rows({0: 60}) == median_rows({}) == 0


def test_what_covers_carries_the_calls_and_the_rows():
    decode = RowCounts(points=(RowCount(rows=8, weight=0.9), RowCount(rows=2048, weight=0.1)))
    assert decode.covers(decode, 0.8)
    assert not decode.only({8}).covers(decode, 0.8)  # most calls, few rows: the others may take the time
    assert not decode.only({2048}).covers(decode, 0.8)
    even = RowCounts(points=(RowCount(rows=60, weight=0.1), RowCount(rows=64, weight=0.9)))
    assert even.only({64}).covers(even, 0.8)
    assert (even.share, even.only({64}).share, even.only({60, 64})) == (1.0, 0.9, even)
    assert not even.only(()).covers(even, 0.8)


def test_row_counts_say_what_they_are():
    three = RowCounts(
        points=tuple(RowCount(rows=rows, weight=weight) for rows, weight in ((8, 0.9), (64, 0.06), (256, 0.04)))
    )
    assert three.words == "3 row counts, 8 to 256"
    assert three.only({8}).words == "1 of 3 row counts, 8, that carry 90% of the calls"
    assert row_counts({5: 1}, 5).words == "1 row count, 5"


# --- counted while a run is sampled ---


def counted(*steps: dict[int, int]) -> CallRows:
    found = CallRows()
    for step in steps:
        found.saw(step)
    return found


def test_calls_are_mixed_once_those_of_one_step_differ():
    assert not counted({4: 3}, {8: 3}).mixed
    assert counted({4: 3}, {8: 2, 1: 1}, {4: 3}).mixed
    assert counted({4: 3}, {8: 2, 1: 1}).calls == {4: 3, 8: 2, 1: 1}


def test_ranks_merge_in_any_order_and_come_back_as_they_were():
    parts = [counted({4: 3, 8: 1}), counted({8: 2}), counted({0: 7, 90: 1})]
    one = parts[0].merge(parts[1]).merge(parts[2])
    other = parts[2].merge(parts[0]).merge(parts[1])
    assert one.calls == other.calls == Counter({0: 7, 4: 3, 8: 3, 90: 1})
    assert CallRows.from_arrays(one.arrays()).calls == one.calls
    assert one.nbytes == sum(array.nbytes for array in one.arrays().values())


def test_row_counts_without_end_stay_small_and_keep_their_ends():
    rng = random.Random(0)
    seen = [rng.randrange(3, 10**6) for _ in range(20_000)]
    found = CallRows()
    for rows in seen:
        found.saw({rows: 1})
    assert found.nbytes <= 16 * 1025
    assert sum(found.calls.values()) == len(seen)
    assert (min(found.calls), max(found.calls)) == (min(seen), max(seen))
    assert median_rows(found.calls) == pytest.approx(sorted(seen)[len(seen) // 2], rel=0.07)


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"rows": np.array([1, 2]), "calls": np.array([1])},
        {"rows": np.array([-1]), "calls": np.array([1])},
        {"rows": np.array([1]), "calls": np.array([0])},
        {"rows": np.array([1.5]), "calls": np.array([1])},
        {"rows": np.array([[1]]), "calls": np.array([[1]])},
        {"rows": np.array([], dtype=np.int64), "calls": np.array([], dtype=np.int64)},
    ],
)
def test_arrays_that_are_no_row_counts_are_refused(arrays):
    with pytest.raises(ArgumentError, match="Row counts are"):
        CallRows.from_arrays(arrays)


# --- from a run to its evidence ---


def evidence_of(path, steps, learned=()):
    writer = RunWriter(path, made_info())
    for index, step in enumerate(steps, start=1):
        writer.write(step, made_progress(index))
    writer.learned(learned, final=True)
    writer.finish(made_progress(len(steps), status="complete"))
    assert writer.failure is None
    return load_evidence(path)


def test_evidence_holds_the_distribution_whatever_the_order_of_steps_and_ranks(tmp_path):
    sizes = [(64, 2), (64, 2), (10, 2), (64, 1), (3, 4)]  # m, calls
    rng = random.Random(1)
    found = []
    for attempt in range(4):
        order = rng.sample(sizes, len(sizes)) if attempt else sizes
        steps = []
        for index, (m, calls) in enumerate(order):
            products = made_product(m=m, calls=calls), made_product(product="wgrad", m=256, k=m, calls=calls)
            # In the end as two ranks, each with a part of the samples.
            rank, place = (index % 2, index // 2) if attempt == 3 else (0, index)
            steps.append(replace(made_step(100 + place, *products), rank=rank))
        forward, weight = evidence_of(tmp_path / f"{attempt}.db", steps).products
        assert points(forward.rows) == pytest.approx({3: 4 / 11, 10: 2 / 11, 64: 5 / 11})
        assert forward.rows == weight.rows
        assert (forward.m, forward.m_min, forward.m_max) == (10, 3, 64)
        assert (weight.m, weight.m_min, weight.m_max, weight.k) == (256, 256, 256, 10)
        found.append(forward.rows)
    assert len(set(found)) == 1


def test_a_product_of_one_size_has_one_row_count(tmp_path):
    (found,) = evidence_of(tmp_path / "run.db", [made_step(100 + step, made_product()) for step in range(9)]).products
    assert found.rows == RowCounts(points=(RowCount(rows=64, weight=1.0),))
    assert (found.m, found.m_min, found.m_max) == (64, 64, 64)


def test_calls_that_differ_within_a_step_are_kept_apart(tmp_path):
    """Generating text: one call with all of the prompt, then one row at a time."""
    torch.manual_seed(0)

    class Generator(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = torch.nn.Linear(16, 32)

        def forward(self, x):
            return sum(self.up(part).square().mean() for part in x.split([len(x) - 3, 1, 1, 1]))

    model = Generator()
    with loka.probe(model, tmp_path / "run.db", every=1, overhead=100.0):
        for _ in range(10):
            model(torch.randn(43, 16)).backward()
    found = {each.product: each for each in load_evidence(tmp_path / "run.db").products if each.site == "up"}
    for product in ("fprop", "wgrad"):
        assert points(found[product].rows) == {1: 0.75, 40: 0.25}
    assert (found["fprop"].m, found["fprop"].m_min, found["fprop"].m_max) == (1, 1, 40)
    assert (found["wgrad"].m, found["wgrad"].k) == (32, 1)


def test_damaged_counts_leave_the_means_of_the_steps(tmp_path, caplog):
    bad = LearnedRecord(site="up", product="fprop", kind=ROWS, samples=9, step=9, data=b"nothing")
    steps = [made_step(100 + step, made_product()) for step in range(9)]
    (found,) = evidence_of(tmp_path / "run.db", steps, [bad]).products
    assert points(found.rows) == {64: 1.0}
    assert "known by the mean rows" in caplog.text
