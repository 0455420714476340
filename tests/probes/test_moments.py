"""Moments: merges that equal the whole, at any scale, in any order, down to 10^9 rows far from zero."""

import io
from dataclasses import replace
from fractions import Fraction
from functools import reduce

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loka.errors import ArgumentError, LokaError
from loka.probes.distributions import moments as module
from loka.probes.distributions.moments import Moments

KINDS = {
    "normal": lambda x: x,
    "far": lambda x: x + 1e4,
    "heavy": lambda x: x.sign() * (x.abs() * 4).exp(),
    "constant": lambda x: torch.full_like(x, 0.1),
    "zero": torch.zeros_like,
    "tiny": lambda x: x * 1e-30,
    "huge": lambda x: x * 1e30,
}
parts = st.tuples(
    st.sampled_from(list(KINDS)), st.sampled_from([1, 13, 429]), st.lists(st.integers(0, 9), min_size=1, max_size=4)
)


def drawn(kind, features, counts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [KINDS[kind](torch.randn(count, features, generator=generator)) for count in counts]


def merged(states):
    return reduce(lambda one, two: one.merge(two), states)


def assert_same(actual, expected, rtol=1e-12):
    """Equal up to rounding, for which values far from zero have a margin: that of their magnitude."""
    assert (actual.count, actual.skipped) == (expected.count, expected.skipped)
    torch.testing.assert_close(actual.mean, expected.mean, rtol=rtol, atol=float(expected.m2.max().sqrt()) * rtol)
    margin = float(expected.m2.max()) * rtol + float(expected.mean.abs().max()) ** 2 * 1e-25
    torch.testing.assert_close(actual.m2, expected.m2, rtol=rtol, atol=margin)


def reference(rows):
    """Numpy in float64, of deviations from the first row."""
    rows = rows.double().numpy()
    if not len(rows):
        return Moments.empty(rows.shape[1])
    shifted = rows - rows[0]
    m2 = ((shifted - shifted.mean(axis=0)) ** 2).sum(axis=0)
    mean = rows[0] + shifted.mean(axis=0)
    return Moments(count=len(rows), mean=torch.from_numpy(mean), m2=torch.from_numpy(m2))


@settings(max_examples=60)
@given(parts, st.randoms(use_true_random=False))
def test_merged_parts_equal_the_whole_in_any_order(case, random):
    tensors = drawn(*case)
    states = [Moments.of(rows) for rows in tensors]
    whole = reference(torch.cat(tensors))
    assert_same(merged(states), whole)
    random.shuffle(states)
    assert_same(merged(states), whole)


@settings(max_examples=40)
@given(st.sampled_from(list(KINDS)), st.lists(st.integers(0, 5), min_size=3, max_size=3))
def test_merging_is_commutative_and_associative_and_an_empty_part_changes_nothing(kind, counts):
    a, b, c = (Moments.of(rows) for rows in drawn(kind, 13, counts))
    assert_same(a.merge(b), b.merge(a))
    assert_same(a.merge(b).merge(c), a.merge(b.merge(c)))
    for same in (a.merge(Moments.empty(13)), Moments.empty(13).merge(a)):
        assert torch.equal(same.mean, a.mean)
        assert torch.equal(same.m2, a.m2)
        assert same.count == a.count


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_float_dtype_is_summed_in_float64(dtype):
    rows = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert_same(Moments.of(rows), reference(rows))


def test_the_rows_are_left_as_they_were():
    rows = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    before = rows.detach().clone()
    state = Moments.of(rows)
    assert torch.equal(rows, before)
    assert not state.mean.requires_grad


def test_many_rows_and_wide_rows_are_cut_without_a_seam(monkeypatch):
    rows = torch.randn(100, 40, generator=torch.Generator().manual_seed(1)) + 1e4
    whole = Moments.of(rows)
    monkeypatch.setattr(module, "BLOCK_ROWS", 7)
    monkeypatch.setattr(module, "PIECE_ELEMENTS", 20)
    assert_same(Moments.of(rows), whole)


def test_a_billion_rows_ten_thousand_deviations_from_zero():
    rows = torch.randn(1000, 5, generator=torch.Generator().manual_seed(2)) + 1e4
    state = Moments.of(rows)
    exact = [[Fraction(value) for value in column] for column in rows.double().T.tolist()]
    means = [sum(column) / len(column) for column in exact]
    squares = [sum((value - mean) ** 2 for value in column) for column, mean in zip(exact, means, strict=True)]
    for _ in range(20):
        state = state.merge(state)
    assert state.count == 1000 * 2**20 > 10**9
    for index, (mean, square) in enumerate(zip(means, squares, strict=True)):
        assert abs(Fraction(float(state.mean[index])) - mean) <= mean * Fraction(1, 10**15)
        variance = square * 2**20 / (state.count - 1)
        assert abs(Fraction(float(state.variance[index])) - variance) <= variance * Fraction(1, 10**12)


def test_the_last_row_of_a_billion_still_counts():
    many = Moments(count=10**9, mean=torch.tensor([1e4]).double(), m2=torch.tensor([1e9]).double())
    more = many.merge(Moments.of(torch.tensor([[1e4 + 10.0]])))
    assert more.count == 10**9 + 1
    assert float(more.m2 - many.m2) == pytest.approx(100.0, rel=1e-6)
    assert float(more.mean - many.mean) == pytest.approx(1e-8, rel=1e-3)


def test_a_constant_feature_has_no_variance_even_after_merging():
    state = merged(Moments.of(torch.full((count, 2), 0.1)) for count in (1, 7, 3, 1000, 2048))
    assert torch.equal(state.m2, torch.zeros(2).double())
    assert torch.equal(state.mean, torch.full((2,), 0.1).double())


def test_rows_that_are_not_finite_are_left_out_and_counted():
    rows = torch.tensor([[1.0, 2.0], [float("nan"), 0.0], [3.0, 6.0], [0.0, float("-inf")]])
    state = Moments.of(rows)
    assert (state.count, state.skipped) == (2, 2)
    assert state.mean.tolist() == [2.0, 4.0]
    assert state.variance.tolist() == [2.0, 8.0]
    assert state.merge(Moments.of(rows[1:2])).skipped == 3
    nothing = Moments.of(rows[1:2])
    assert (nothing.count, nothing.skipped, nothing.mean.tolist()) == (0, 1, [0.0, 0.0])


@pytest.mark.parametrize("count", [0, 1])
def test_below_two_rows_the_variance_is_zero(count):
    state = Moments.of(torch.ones(count, 3))
    assert (state.count, state.variance.tolist()) == (count, [0.0] * 3)


def test_other_features_and_other_shapes_are_refused_by_name():
    with pytest.raises(LokaError, match=r"3 features .* 5"):
        Moments.empty(3).merge(Moments.empty(5))
    with pytest.raises(ArgumentError, match=r"\(2, 3, 4\)"):
        Moments.of(torch.ones(2, 3, 4))
    with pytest.raises(ArgumentError, match="int64"):
        Moments.of(torch.ones(2, 3, dtype=torch.int64))


def test_the_state_survives_npy_files_bit_for_bit():
    state = replace(Moments.of(torch.randn(9, 4)), skipped=3)
    stored = {}
    for name, array in state.arrays().items():
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        stored[name] = np.load(io.BytesIO(buffer.getvalue()), allow_pickle=False)
    assert_same(Moments.from_arrays(stored), state, rtol=0)
    assert state.nbytes == 2 * 4 * 8
    with pytest.raises(ArgumentError, match="without m2"):
        Moments.from_arrays({name: array for name, array in stored.items() if name != "m2"})
    with pytest.raises(ArgumentError, match=r"\(4,\) .* \(3,\)"):
        Moments.from_arrays({**stored, "m2": stored["m2"][:3]})
