"""Which rows of an input and which columns of a weight stand out: counted over all rows, mergeable, and kept."""

import numpy as np
import pytest
import torch

from loka.errors import ArgumentError
from loka.probes.distributions.extremes import BINS, Extremes
from loka.probes.distributions.gather import packed, unpacked


def rows(seed=0, count=200, features=40):
    return torch.randn(count, features, generator=torch.Generator().manual_seed(seed))


WEIGHT = torch.randn(24, 40, generator=torch.Generator().manual_seed(9))


def test_a_loud_row_is_counted_with_the_energy_that_it_carries():
    x = rows()
    x[17] *= 300
    found = Extremes.of(x, WEIGHT)
    energy = x.double().square().sum(1)
    assert found.loud_share == 1 / 200
    assert found.loud_energy == pytest.approx(float(energy[17] / energy.sum()))
    assert found.loud_amax == float(x[17].abs().max())
    assert found.quiet_amax == float(torch.cat((x[:17], x[18:])).abs().max())


def test_rows_that_are_alike_have_no_loud_one():
    found = Extremes.of(rows(), WEIGHT)
    assert (found.loud_share, found.loud_energy, found.loud_amax) == (0, 0, 0)
    assert found.rows.sum() == 200
    assert found.energy.sum() == pytest.approx(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_columns_of_the_weight_are_its_own(dtype):
    weight = WEIGHT.to(dtype)
    found = Extremes.of(rows().to(dtype), weight)
    np.testing.assert_allclose(found.weight_amax, weight.float().abs().amax(0).numpy(), rtol=1e-6)
    np.testing.assert_allclose(found.weight_energy, weight.double().square().sum(0).numpy(), rtol=1e-6)
    assert found.weight_rows == 24


def test_rows_that_are_zero_or_not_finite_do_not_count():
    x = rows(count=6)
    x[0], x[1, 2], x[2] = 0, float("nan"), float("inf")
    found = Extremes.of(x, WEIGHT)
    assert found.rows.sum() == 3
    assert found.quiet_amax == float(x[3:].abs().max())


@pytest.mark.parametrize("count", [0, 1])
def test_no_row_and_one_row_are_legal(count):
    found = Extremes.of(rows(count=count), WEIGHT)
    assert found.parts == found.rows.sum() == count
    assert np.isnan(found.loud_share) == (count == 0)
    assert found.merge(Extremes.of(rows(seed=1), WEIGHT)).rows.sum() == 200 + count


def test_parts_merge_in_any_order():
    parts = [Extremes.of(rows(seed), (1 + seed) * WEIGHT) for seed in range(3)]
    forward = parts[0].merge(parts[1]).merge(parts[2])
    backward = parts[2].merge(parts[1]).merge(parts[0])
    np.testing.assert_array_equal(forward.rows, sum(part.rows for part in parts))
    assert forward.energy.sum() == pytest.approx(3)
    for name, array in forward.arrays().items():
        np.testing.assert_allclose(array, backward.arrays()[name], rtol=1e-12)
    np.testing.assert_allclose(forward.weight_energy, np.mean([part.weight_energy for part in parts], axis=0))


def test_other_products_do_not_merge():
    with pytest.raises(ArgumentError, match="only parts of one product"):
        Extremes.of(rows(), WEIGHT).merge(Extremes.of(rows(), WEIGHT[:8]))


def test_it_comes_back_from_bytes_and_a_damaged_one_is_refused():
    found = Extremes.of(rows(), WEIGHT)
    arrays = unpacked(packed(found.arrays()))
    again = Extremes.from_arrays(arrays)
    for name, array in found.arrays().items():
        np.testing.assert_array_equal(array, again.arrays()[name])
    for name, wrong in (
        ("rows", np.zeros(BINS + 1)),
        ("energy", np.full(BINS, np.nan)),
        ("weight_amax", -arrays["weight_amax"]),
        ("weight_energy", arrays["weight_energy"][:-1]),
        ("counts", np.array((-1, 3))),
    ):
        with pytest.raises(ArgumentError, match=name):
            Extremes.from_arrays({**arrays, name: wrong})
