"""Alignment: the coherence of output rows against a float64 brute force, in parts that add."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loka.errors import ArgumentError
from loka.probes.distributions.alignment import Alignment, row_factors, weighted_energy
from loka.probes.distributions.gather import packed, unpacked


def operands(rows=40, columns=12, features=30, seed=0):
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(extent, features, generator=generator) for extent in (rows, columns))
    return a + 0.3, b - 0.2


def of(a, b):
    return Alignment.of(a, b.double().square().sum(0), a @ b.T)


def brute_force(a, b):
    """A^-1/2 of every row, one row and one term at a time."""
    a, b = a.double().numpy(), b.double().numpy()
    result = []
    for row in a:
        terms = sum(row[k] ** 2 * (b[:, k] ** 2).sum() for k in range(len(row)))
        reference = ((b @ row) ** 2).sum()
        result.append(math.sqrt(terms / reference))
    return np.array(result)


@pytest.mark.parametrize("scale", [1.0, 1e12, 1e-12])
def test_mean_and_spread_are_those_of_a_brute_force(scale):
    a, b = operands()
    a, b = a * scale, b * scale
    state, expected = of(a, b), brute_force(a, b)
    assert state.count == len(a)
    assert state.factor == pytest.approx(expected.mean(), rel=1e-6)
    assert state.spread == pytest.approx(expected.std(), rel=1e-5)
    assert state.uncertainty == pytest.approx(expected.std(ddof=1) / math.sqrt(len(a)) / expected.mean(), rel=1e-5)


def test_independent_terms_have_an_alignment_of_one_and_coherent_ones_more():
    a, b = torch.randn(64, 4096), torch.randn(256, 4096)
    assert of(a, b).factor == pytest.approx(1, abs=0.03)
    assert of(torch.ones(1, 100), torch.ones(5, 100)).factor == pytest.approx(0.1)


def test_one_term_is_aligned_with_itself():
    a, b = operands(features=1)
    assert of(a, b).factor == pytest.approx(1)
    assert of(a, b).spread == pytest.approx(0, abs=1e-4)


def test_rows_without_a_result_are_counted_apart():
    a, b = operands(rows=6)
    a[1] = 0
    a[2, 3] = float("nan")
    a[4, 0] = float("inf")
    state = of(a, b)
    assert (state.count, state.zero_rows, state.skipped) == (3, 1, 2)
    assert state.factor == pytest.approx(brute_force(a[[0, 3, 5]], b).mean(), rel=1e-6)
    b[0, 0] = float("nan")
    assert of(a, b).count == 0
    assert of(a, b).skipped == 6


def test_of_no_rows_nothing_is_known():
    for state in (Alignment.empty(), of(torch.empty(0, 3), torch.ones(2, 3)), of(torch.zeros(2, 3), torch.ones(2, 3))):
        assert math.isnan(state.factor)
        assert math.isnan(state.spread)
        assert math.isnan(state.uncertainty)
    assert math.isnan(of(torch.ones(1, 3), torch.ones(2, 3)).uncertainty)


def test_the_uncertainty_tells_means_that_few_rows_make():
    torch.manual_seed(0)
    tame = Alignment.of_factors(torch.rand(64, dtype=torch.float64) + 0.5)
    wild = Alignment.of_factors(torch.cat([torch.ones(63), torch.tensor([200.0])]).double())
    assert tame.uncertainty < 0.05
    assert wild.uncertainty > 0.5


@given(st.lists(st.integers(0, 7), min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_parts_add_in_any_order(counts, random):
    a, b = operands(rows=sum(counts))
    a[::5] = 0
    energy, y = b.double().square().sum(0), a @ b.T
    whole = Alignment.of(a, energy, y)
    parts = [Alignment.of(rows, energy, part) for rows, part in zip(a.split(counts), y.split(counts), strict=True)]
    random.shuffle(parts)
    total = Alignment.empty()
    for part in parts:
        total = total.merge(part)
    assert (total.count, total.zero_rows, total.skipped) == (whole.count, whole.zero_rows, whole.skipped)
    assert total.total == pytest.approx(whole.total, rel=1e-12)
    assert total.squares == pytest.approx(whole.squares, rel=1e-12)


def test_energies_are_exact_beyond_the_range_of_fp32_squares():
    rows = torch.full((2, 3), 1e25)
    assert weighted_energy(rows).tolist() == pytest.approx([3e50] * 2)
    assert weighted_energy(rows, torch.tensor([1.0, 0.0, 2.0])).tolist() == pytest.approx([3e50] * 2)


def test_row_factors_name_what_is_zero_and_what_is_not_finite():
    terms = torch.tensor([4.0, 4.0, 0.0, math.inf, 4.0], dtype=torch.float64)
    reference = torch.tensor([1.0, 0.0, 0.0, 1.0, math.nan], dtype=torch.float64)
    factors = row_factors(terms, reference).tolist()
    assert factors[:3] == [2.0, math.inf, math.inf]
    assert all(math.isnan(value) for value in factors[3:])


def test_arrays_restore_the_state():
    a, b = operands()
    a[0] = 0
    assert Alignment.from_arrays(unpacked(packed(of(a, b).arrays()))) == of(a, b)
    assert Alignment.from_arrays(Alignment.empty().arrays()) == Alignment.empty()


@pytest.mark.parametrize(
    "changes",
    [
        {"counts": None},
        {"sums": None},
        {"counts": np.array((-1, 0, 0))},
        {"counts": np.array((1, 0))},
        {"counts": np.array((1.0, 0.0, 0.0))},
        {"sums": np.array((1.0, np.nan))},
        {"sums": np.array((-1.0, 1.0))},
        {"sums": np.array((1.0,))},
        {"sums": np.array(("a", "b"))},
        {"counts": np.array((0, 0, 0))},
    ],
)
def test_damaged_states_are_refused(changes):
    arrays = {**of(*operands()).arrays(), **changes}
    with pytest.raises(ArgumentError, match="stored Alignment"):
        Alignment.from_arrays({name: array for name, array in arrays.items() if array is not None})
