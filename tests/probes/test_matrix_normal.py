"""The matrix normal: it finds the (U, V) that weights were drawn from, and no weight breaks it."""

from dataclasses import replace
from functools import reduce

import numpy as np
import pytest
import torch

from loka.errors import ArgumentError
from loka.probes.distributions import matrix_normal as module
from loka.probes.distributions import moments
from loka.probes.distributions.matrix_normal import MatrixNormal


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def covariance(length, seed):
    """A random correlated covariance of trace `length`."""
    root = torch.randn(length, length, generator=generator(seed)).double()
    result = root @ root.T / length + 0.2 * torch.eye(length)
    return result * (length / result.trace())


def draws(count, rows, columns, scale=1.0, seed=0):
    """Draw weights from MN(0, rows, columns) by numpy, independently of the code under test."""
    random = np.random.default_rng(seed)
    left, right = (np.linalg.cholesky(side.numpy()) for side in (rows, columns))
    noise = random.standard_normal((count, len(rows), len(columns)))
    return torch.from_numpy(scale * left @ noise @ right.T).float()


def learned(weights, momentum=0.999):
    return reduce(MatrixNormal.update, weights, MatrixNormal.empty(tuple(weights.shape[1:]), momentum=momentum))


def gap(actual, expected):
    return float((actual.double() - expected).norm() / expected.norm())


def test_known_covariances_are_recovered_from_draws():
    rows, columns = covariance(6, 1), covariance(9, 2)
    state = learned(draws(600, rows, columns, scale=0.02) + 0.5)
    assert gap(state.rows, rows) < 0.05
    assert gap(state.columns, columns) < 0.05
    assert state.variance == pytest.approx(4e-4, rel=0.05)
    assert state.mean == pytest.approx(0.5, abs=1e-3)
    assert state.updates == 600


def test_flip_flop_is_nearer_than_the_average_of_products():
    rows, columns = covariance(6, 1), torch.diag(torch.logspace(-2, 2, 30).double())
    columns *= 30 / columns.trace()
    ratios = []
    for seed in range(12):
        weights = draws(40, rows, columns, seed=seed)
        products = torch.einsum("nij,nkj->ik", weights, weights)
        products = products * (6 / products.trace())
        ratios.append(gap(learned(weights).rows, rows) / gap(products, rows))
    assert np.median(ratios) < 0.85, ratios


def test_the_average_forgets_at_the_rate_of_the_momentum():
    rows, other, columns = covariance(6, 1), covariance(6, 7), covariance(40, 2)
    state = learned(torch.cat([draws(50, rows, columns), draws(200, other, columns, seed=1)]), momentum=0.95)
    assert gap(state.rows, other) < 0.15 < gap(state.rows, rows)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e3, 1e30])
def test_only_the_variance_knows_the_unit(scale):
    weights = draws(5, covariance(6, 1), covariance(9, 2))
    one, scaled = learned(weights), learned(weights * scale)
    torch.testing.assert_close(scaled.rows, one.rows, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scaled.columns, one.columns, rtol=1e-4, atol=1e-5)
    assert scaled.variance == pytest.approx(one.variance * scale**2, rel=1e-5)


def test_a_factor_moved_between_u_and_v_changes_nothing():
    rows, columns = covariance(6, 1), covariance(9, 2)
    one, moved = learned(draws(5, rows, columns)), learned(draws(5, 100 * rows, columns / 100))
    torch.testing.assert_close(moved.rows, one.rows, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moved.columns, one.columns, rtol=1e-4, atol=1e-5)
    assert float(one.rows.trace()) == pytest.approx(6, rel=1e-6)
    assert float(one.columns.trace()) == pytest.approx(9, rel=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, -1e30])
def test_a_constant_weight_is_its_own_sample(value):
    weight = torch.full((4, 5), value)
    state = MatrixNormal.of(weight).update(weight)
    assert state.variance == 0
    assert torch.equal(state.sample(generator()), weight)


def test_a_weight_that_was_constant_at_first_is_learned_as_if_it_had_not_been():
    weights = draws(3, covariance(6, 1), covariance(9, 2))
    late = reduce(MatrixNormal.update, weights, MatrixNormal.of(torch.zeros(6, 9)))
    assert late.rows.isfinite().all()
    assert gap(late.rows, learned(weights).rows.double()) < 0.2
    assert late.variance < learned(weights).variance


def test_a_weight_of_rank_one_gives_samples_of_rank_one_and_of_its_norm():
    weight = torch.outer(torch.arange(1.0, 7.0), torch.tensor([1.0, -1.0] * 5))
    state = MatrixNormal.of(weight).update(weight)
    samples = torch.stack([state.sample(generator(seed)) for seed in range(400)])
    assert int(torch.linalg.matrix_rank(samples[0], rtol=1e-3)) == 1
    assert float(samples.square().mean()) == pytest.approx(float(weight.square().mean()), rel=0.3)


def test_samples_have_the_covariance_that_was_learned():
    state = learned(draws(50, covariance(6, 1), covariance(9, 2), scale=0.1))
    samples = torch.stack([state.sample(generator(seed)) for seed in range(3000)]).double() - state.mean
    assert samples.shape == (3000, 6, 9)
    across = torch.einsum("nij,nkj->ik", samples, samples) / (3000 * 9) / state.variance
    along = torch.einsum("nij,nik->jk", samples, samples) / (3000 * 6) / state.variance
    assert gap(across, state.rows.double()) < 0.05
    assert gap(along, state.columns.double()) < 0.05
    assert torch.equal(state.sample(generator(3)), state.sample(generator(3)))


@pytest.mark.parametrize("limit", [7, 5, 0], ids=["long columns", "both long", "always"])
def test_a_long_side_keeps_its_diagonal(monkeypatch, limit):
    rows, columns = covariance(6, 1), covariance(9, 2)
    monkeypatch.setattr(module, "FULL_FEATURES", limit)
    state = learned(draws(600, rows, columns))
    assert state.columns.shape == (9,)
    assert gap(state.columns, columns.diagonal()) < 0.05
    assert gap(state.rows, rows if limit == 7 else rows.diagonal()) < 0.05
    assert state.sample(generator()).shape == (6, 9)
    transposed = learned(draws(600, columns, rows))
    assert gap(transposed.rows, columns.diagonal()) < 0.05
    assert transposed.sample(generator()).shape == (9, 6)


@pytest.mark.parametrize("limit", [1024, 7, 0])
def test_large_weights_are_cut_without_a_seam(monkeypatch, limit):
    monkeypatch.setattr(module, "FULL_FEATURES", limit)
    weights = draws(3, covariance(6, 1), covariance(9, 2))
    whole = [learned(each) for each in (weights, weights.mT)]
    monkeypatch.setattr(moments, "PIECE_ELEMENTS", 13)
    for state, cut in zip(whole, (learned(weights), learned(weights.mT)), strict=True):
        torch.testing.assert_close(cut.rows, state.rows)
        torch.testing.assert_close(cut.columns, state.columns)
        assert cut.variance == pytest.approx(state.variance)


def test_a_wide_weight_of_a_recommendation_model_fits():
    weight = torch.randn(16, 123_200, generator=generator()).bfloat16()
    weight[3] *= 3
    state = MatrixNormal.of(weight)
    assert state.nbytes < 1e6
    variances = state.rows.diagonal() / state.rows.diagonal()[0]
    assert float(variances[3]) == pytest.approx(9, rel=0.05)
    assert state.sample(generator()).shape == weight.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_float_dtype_counts_at_its_own_value(dtype):
    weight = draws(1, covariance(6, 1), covariance(9, 2))[0].to(dtype).requires_grad_()
    state = MatrixNormal.of(weight)
    values = weight.detach().double()
    assert state.mean == pytest.approx(float(values.mean()), rel=1e-9)
    assert state.variance == pytest.approx(float(values.var(correction=0)), rel=1e-9)
    centred = values - values.mean()
    expected = centred @ centred.T
    assert gap(state.rows, expected * (6 / expected.trace())) < 1e-6


def test_weights_that_are_not_finite_are_left_out_and_counted():
    state = learned(draws(3, covariance(6, 1), covariance(9, 2)))
    weight = torch.ones(6, 9)
    weight[2, 3] = float("nan")
    after = state.update(weight).update(torch.full((6, 9), float("inf")))
    assert after.skipped == 2
    assert replace(after, skipped=0) != after
    assert torch.equal(after.rows, state.rows)
    assert after.updates == state.updates


def test_replicas_merge_to_themselves_and_runs_to_their_average():
    weights = draws(300, covariance(6, 1), covariance(9, 2))
    state = learned(weights)
    same = state.merge(state)
    torch.testing.assert_close(same.rows, state.rows)
    assert (same.variance, same.mean) == (state.variance, state.mean)
    assert torch.equal(MatrixNormal.empty((6, 9), momentum=0.999).merge(state).rows, state.rows)
    one, two = learned(weights[:100]), learned(weights[100:])
    for both in (one.merge(two), two.merge(one)):
        assert both.updates == 300
        assert gap(both.rows, state.rows.double()) < 0.02
        assert gap(both.columns, state.columns.double()) < 0.02
        assert both.variance == pytest.approx(state.variance, rel=1e-2)


def test_shards_of_rows_stack_to_the_whole_without_the_covariance_between_them():
    rows, columns = covariance(6, 1), covariance(9, 2)
    rows[:2, 2:], rows[2:, :2] = 0.0, 0.0  # what shards cannot see
    weights = draws(400, rows, columns)
    shards = [learned(weights[:, :2]), learned(weights[:, 2:2]), learned(weights[:, 2:])]
    stacked = reduce(MatrixNormal.stack, shards)
    assert gap(stacked.rows, rows) < 0.07
    assert gap(stacked.columns, columns) < 0.07
    assert stacked.variance == pytest.approx(float(weights.square().mean()), rel=0.01)
    assert float(stacked.rows.trace()) == pytest.approx(6, rel=1e-6)


def test_stacking_beyond_the_limit_keeps_the_diagonal(monkeypatch):
    weights = draws(50, covariance(6, 1), covariance(9, 2))
    one, two = learned(weights[:, :3]), learned(weights[:, 3:])
    full = one.stack(two)
    monkeypatch.setattr(module, "FULL_FEATURES", 5)
    torch.testing.assert_close(one.stack(two).rows, full.rows.diagonal())


def test_what_does_not_belong_together_is_refused():
    state = MatrixNormal.of(torch.randn(3, 4))
    with pytest.raises(ArgumentError, match=r"\(4, 3\) .* \(3, 4\)"):
        state.update(torch.ones(4, 3))
    with pytest.raises(ArgumentError, match=r"\(2, 3, 4\)"):
        MatrixNormal.of(torch.ones(2, 3, 4))
    with pytest.raises(ArgumentError, match=r"\(3, 4\) .* \(3, 5\)"):
        state.merge(MatrixNormal.empty((3, 5)))
    with pytest.raises(ArgumentError, match=r"\(3, 4\) and \(3, 5\)"):
        state.stack(MatrixNormal.of(torch.randn(3, 5)))
    with pytest.raises(ArgumentError, match="Update every shard"):
        state.stack(MatrixNormal.empty((3, 4)))
    with pytest.raises(ArgumentError, match=r"momentum of 1\.0"):
        MatrixNormal.empty((3, 4), momentum=1.0)


def test_the_state_survives_as_arrays_bit_for_bit():
    state = replace(learned(draws(3, covariance(6, 1), covariance(9, 2))), skipped=2)
    arrays = state.arrays()
    back = MatrixNormal.from_arrays(arrays)
    assert torch.equal(back.rows, state.rows)
    assert torch.equal(back.columns, state.columns)
    numbers = ("mean", "variance", "momentum", "updates", "skipped")
    assert [getattr(back, name) for name in numbers] == [getattr(state, name) for name in numbers]
    with pytest.raises(ArgumentError, match=r"\(5, 6\)"):
        MatrixNormal.from_arrays({**arrays, "rows": arrays["rows"][:5]})
    with pytest.raises(ArgumentError, match="without counts"):
        MatrixNormal.from_arrays({name: array for name, array in arrays.items() if name != "counts"})
