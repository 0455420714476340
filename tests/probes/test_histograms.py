"""Energy histograms: every bin against a float64 brute force, ragged groups and all, in parts that add."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loka.errors import ArgumentError
from loka.formats import PASS_OPERANDS, PASSES, RECIPES, recipe
from loka.probes.distributions.gather import packed, unpacked
from loka.probes.distributions.histograms import (
    AMAX_BIN,
    BELOW,
    BINS,
    BINS_PER_OCTAVE,
    PHASES,
    EnergyHistogram,
    OperandHistograms,
    Survey,
    column_amax,
    group_kinds,
)

TENSOR, ROW, BLOCK, SMALL, SQUARE = (None, None), (1, None), (1, 128), (1, 32), (128, 128)
KINDS = (TENSOR, ROW, BLOCK, SMALL, SQUARE)


def drawn(rows, features, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, features, generator=generator)
    return x * torch.exp(2 * torch.randn(rows, features, generator=generator))


def amax_of_group(x, kind, row, column):
    height, width = kind[0] or len(x), kind[1] or x.shape[1]
    top, left = row // height * height, column // width * width
    group = np.abs(x[top : top + height, left : left + width])
    return group[np.isfinite(group)].max()


def brute_force(x, kind, column_weight=None, per_row=True, rows=None):
    """One element at a time, by logarithms."""
    x = x.double().numpy()
    weight = np.ones(x.shape[1]) if column_weight is None else column_weight.double().numpy()
    rows = range(len(x)) if rows is None else rows
    energy, phase = np.zeros(BINS), np.zeros(PHASES)
    totals = {row: (x[row] ** 2 * weight).sum() for row in rows}
    for row in rows:
        for column in range(x.shape[1]):
            value, amax = abs(x[row, column]), amax_of_group(x, kind, row, column)
            if value == 0:
                continue
            share = value**2 * weight[column] / (totals[row] if per_row else sum(totals.values()) / len(totals))
            mantissa, exponent = math.frexp(np.float32(value) / np.float32(amax))  # 0.5 <= mantissa < 1
            index = -(exponent - 1) * BINS_PER_OCTAVE - math.floor((2 * mantissa - 1) * BINS_PER_OCTAVE)
            energy[min(index, BELOW)] += share
            phase[math.floor((2 * math.frexp(amax)[0] - 1) * PHASES)] += share
    return energy, phase


def assert_close(histogram, expected):
    np.testing.assert_allclose(histogram.energy, expected[0], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(histogram.phase, expected[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("features", [1, 13, 128, 429])
@pytest.mark.parametrize("kind", KINDS)
def test_every_bin_is_that_of_a_brute_force(kind, features):
    x = drawn(6, features)
    state = OperandHistograms.of(x, (kind,))
    assert (state.rows, state.zero_rows, state.skipped) == (6, 0, 0)
    assert_close(state.by_group[kind], brute_force(x, kind))


@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_columns_weigh_and_rows_weigh_as_asked(kind, per_row):
    x, weight = drawn(140, 45), torch.rand(45)
    weight[7] = 0
    rows = torch.tensor([0, 3, 127, 128, 139])
    state = OperandHistograms.of(x, (kind,), column_weight=weight, per_row=per_row, sample=rows)
    assert state.rows == 5
    assert_close(state.by_group[kind], brute_force(x, kind, weight, per_row, rows.tolist()))
    assert state.by_group[kind].energy.sum() == pytest.approx(5)


def test_rows_can_be_given_their_weights():
    x = drawn(3, 20)
    state = OperandHistograms.of(x, KINDS, per_row=torch.tensor([2.0, 0.0, 0.5]))
    assert (state.rows, state.zero_rows) == (2, 1)
    for kind in KINDS:
        one, two = (brute_force(x, kind, rows=[row]) for row in (0, 2))
        assert_close(state.by_group[kind], [2 * left + right / 2 for left, right in zip(one, two, strict=True)])


def test_the_largest_element_has_a_bin_of_its_own():
    x = torch.tensor([[1.0, -1.0, 0.999, 2**-12, 2.0**-30, 0.0]])
    energy = OperandHistograms.of(x, (ROW,)).by_group[ROW].energy * float(x.square().sum())
    assert energy[AMAX_BIN] == pytest.approx(2)
    assert energy[1] == pytest.approx(0.999**2, rel=1e-6)
    assert energy[12 * BINS_PER_OCTAVE] == pytest.approx(2.0**-24)
    assert energy[BELOW] == pytest.approx(2.0**-60)
    assert np.count_nonzero(energy) == 4


def test_an_amax_of_the_whole_is_taken_but_never_one_below_the_rows():
    x = torch.tensor([[1.0, 0.5]])
    above = OperandHistograms.of(x, (TENSOR,), amax=4.0).by_group[TENSOR].energy
    assert np.flatnonzero(above).tolist() == [2 * BINS_PER_OCTAVE, 3 * BINS_PER_OCTAVE]
    below = OperandHistograms.of(x, (TENSOR,), amax=0.1).by_group[TENSOR].energy
    assert np.flatnonzero(below).tolist() == [AMAX_BIN, BINS_PER_OCTAVE]


def test_rows_that_are_zero_or_not_finite_are_counted_apart():
    x = drawn(5, 40)
    x[1] = 0
    x[3, 5] = float("nan")
    state = OperandHistograms.of(x, KINDS)
    assert (state.rows, state.zero_rows, state.skipped) == (3, 1, 1)
    for kind in KINDS:
        assert_close(state.by_group[kind], brute_force(x, kind, rows=[0, 2, 4]))
    nothing = OperandHistograms.of(torch.zeros(4, 3), KINDS)
    assert (nothing.rows, nothing.zero_rows, dict(nothing.by_group)) == (0, 4, {})
    assert OperandHistograms.of(torch.full((2, 3), math.inf), KINDS).skipped == 2


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_of_no_elements_there_is_nothing(shape):
    state = OperandHistograms.of(torch.empty(shape), KINDS)
    assert (state.rows, dict(state.by_group)) == (0, {})


def test_rows_sum_to_one_each_at_any_size():
    for shape in ((1, 1), (3, 429), (700, 600)):
        state = OperandHistograms.of(drawn(*shape), KINDS)
        for histogram in state.by_group.values():
            assert histogram.energy.sum() == pytest.approx(shape[0])
            assert histogram.phase.sum() == pytest.approx(shape[0])


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_units_do_not_matter(scale):
    x = drawn(4, 50)
    one, two = OperandHistograms.of(x, KINDS), OperandHistograms.of(x * scale, KINDS)
    for kind in KINDS:
        moved = np.abs(one.by_group[kind].energy - two.by_group[kind].energy).sum()
        assert moved < 0.02 * 4  # an element at the border of two bins may move by rounding


@settings(max_examples=30)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=4), st.sampled_from([1, 40, 200]), st.randoms())
def test_parts_add_in_any_order(counts, features, random):
    kinds = (TENSOR, ROW, BLOCK, SMALL)  # blocks of rows do not split
    x = drawn(sum(counts), features)
    x[::4] = 0
    amax = x.abs().max() if len(x) else 1.0
    whole = OperandHistograms.of(x, kinds, amax=amax)
    parts = [OperandHistograms.of(rows, kinds, amax=amax) for rows in x.split(counts)]
    random.shuffle(parts)
    total = OperandHistograms.empty()
    for part in parts:
        total = total.merge(part)
    assert (total.rows, total.zero_rows, total.skipped) == (whole.rows, whole.zero_rows, whole.skipped)
    assert total.by_group.keys() == whole.by_group.keys()
    for kind, histogram in whole.by_group.items():
        assert_close(total.by_group[kind], (histogram.energy, histogram.phase))


def test_parts_over_other_groups_are_refused():
    one, two = (OperandHistograms.of(drawn(2, 8), (kind,)) for kind in (ROW, SMALL))
    with pytest.raises(ArgumentError, match="same groups"):
        one.merge(two)
    assert one.merge(OperandHistograms.empty()).by_group.keys() == {ROW}


def test_a_histogram_that_was_not_taken_is_refused():
    state = OperandHistograms.of(drawn(2, 8), (ROW,))
    spec = recipe("mxfp8").operand("input")
    with pytest.raises(ArgumentError, match=r"\(1, 32\).* Known: \(1, None\)"):
        state.histogram(spec)
    assert OperandHistograms.empty().histogram(spec).energy.sum() == 0


@pytest.mark.parametrize("product", PASSES)
def test_the_groups_of_all_recipes_are_taken(product):
    for role, kinds in zip(PASS_OPERANDS[product], group_kinds(product), strict=True):
        assert len(set(kinds)) == len(kinds)
        for each in RECIPES.values():
            spec = each.operand(role)
            assert (spec.group_rows, spec.group_k) in kinds


def test_column_maxima_leave_out_what_is_not_finite():
    x = drawn(3000, 100)
    x[5, 5], x[6, 5], x[7] = math.nan, -math.inf, -1e9
    x[:, 9] = math.nan
    expected = torch.where(x.isfinite(), x.abs(), 0.0).amax(0)
    torch.testing.assert_close(column_amax(x), expected, rtol=0, atol=0)
    torch.testing.assert_close(column_amax(x.T.contiguous().T), expected, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(1, 1), (128, 13), (300, 700), (129, 2500), (0, 4), (4, 0)])
@pytest.mark.parametrize("lay", [lambda x: x, lambda x: x.T.contiguous().T])
@pytest.mark.parametrize("bad", [None, math.nan, -math.inf])
def test_a_survey_tells_what_a_brute_force_does(shape, lay, bad):
    x = drawn(*shape)
    if bad is not None and x.numel():
        x[-1, -1] = bad
    state = Survey.of(lay(x))
    finite = torch.where(x.isfinite(), x.abs(), 0.0)
    np.testing.assert_allclose(state.energy, (x.double().numpy() ** 2).sum(0), rtol=1e-12)
    assert len(state.amax) == math.ceil(len(x) / 128)
    for found, rows in zip(state.amax, finite.split(128), strict=len(x) > 0):
        torch.testing.assert_close(found, rows.amax(0), rtol=0, atol=0)
    assert state.largest == (float(finite.max()) if x.numel() else 0)


@pytest.mark.parametrize("features", [13, 429])
def test_of_a_surveyed_operand_the_histograms_are_the_same(features):
    x, rows = drawn(300, features), torch.tensor([3, 130, 131, 299])
    state = OperandHistograms.of(x, KINDS, amax=Survey.of(x).amax, sample=rows)
    for kind in KINDS:
        assert_close(state.by_group[kind], brute_force(x, kind, rows=rows.tolist()))


def test_arrays_restore_the_state():
    x = drawn(5, 40)
    x[0] = 0
    state = OperandHistograms.of(x, KINDS)
    again = OperandHistograms.from_arrays(unpacked(packed(state.arrays())))
    assert (again.rows, again.zero_rows, again.skipped) == (4, 1, 0)
    assert list(again.by_group) == list(KINDS)
    for kind in KINDS:
        np.testing.assert_array_equal(again.by_group[kind].energy, state.by_group[kind].energy)
        np.testing.assert_array_equal(again.by_group[kind].phase, state.by_group[kind].phase)
    assert again.nbytes == state.nbytes == len(KINDS) * 8 * (BINS + PHASES)
    assert EnergyHistogram.empty().nbytes == 8 * (BINS + PHASES)
    nothing = OperandHistograms.from_arrays(OperandHistograms.empty().arrays())
    assert dict(nothing.by_group) == {}


@pytest.mark.parametrize(
    "changes",
    [
        {"counts": None},
        {"kinds": None},
        {"energy": None},
        {"phase": None},
        {"counts": np.array((5, -1, 0))},
        {"counts": np.array((0, 0, 0))},
        {"counts": np.array((5.0, 0.0, 0.0))},
        {"counts": np.array((5, 0))},
        {"kinds": np.array(((1, 0), (1, 0)))},
        {"kinds": np.array(((1, 0), (1, -32)))},
        {"kinds": np.array(((1.0, 0.0), (1.0, 32.0)))},
        {"kinds": np.array((1, 0))},
        {"kinds": np.array(((1, 0),))},
        {"energy": np.ones((2, BINS - 1))},
        {"energy": np.ones((2, BINS))},
        {"energy": -np.ones((2, BINS))},
        {"energy": np.full((2, BINS), np.nan)},
        {"phase": np.ones((2, PHASES), dtype=np.int64)},
        {"phase": np.ones((2, PHASES + 1))},
    ],
)
def test_damaged_states_are_refused(changes):
    arrays = {**OperandHistograms.of(drawn(5, 40), (ROW, SMALL)).arrays(), **changes}
    with pytest.raises(ArgumentError, match="stored OperandHistograms"):
        OperandHistograms.from_arrays({name: array for name, array in arrays.items() if array is not None})
