"""Covariance, full and sketched: merges equal the whole, the diagonal is exact, singular operands are safe."""

from functools import reduce

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from loka.errors import ArgumentError, LokaError
from loka.probes.capturing.storage import hold, storage_key
from loka.probes.distributions import moments
from loka.probes.distributions.covariance import FULL_FEATURES, RANK, Covariance, signs, square_root

# Ranks of the tests: None is the full form.
RANKS = [None, 8, 64]
KINDS = {
    "normal": lambda x: x,
    "far": lambda x: x + 1e4,
    "heavy": lambda x: x.sign() * (x.abs() * 4).exp(),
    "constant": lambda x: torch.full_like(x, 0.1),
    "zero": torch.zeros_like,
    "tiny": lambda x: x * 1e-30,
    "huge": lambda x: x * 1e30,
    "uneven": lambda x: x * torch.logspace(-20, 20, x.shape[1]),
}


def drawn(kind, features, counts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [KINDS[kind](torch.randn(count, features, generator=generator)) for count in counts]


def merged(states):
    return reduce(lambda one, two: one.merge(two), states)


def numpy_covariance(rows):
    """Float64, of deviations from the first row; zero below two rows."""
    rows = rows.double().numpy()
    if len(rows) < 2:
        return torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    centred = rows - rows[0]
    centred = centred - centred.mean(axis=0)
    return torch.from_numpy(centred.T @ centred / (len(rows) - 1))


def units(rows):
    spread = numpy_covariance(rows).diagonal().sqrt()
    return torch.outer(spread, spread)


def rebuilt(state):
    factor, rest = state.factor()
    assert factor.isfinite().all()
    assert (rest >= 0).all()
    return factor @ factor.T + torch.diag(rest)


def assert_same(actual, expected, tolerance=1e-6):
    """Equal up to the rounding of the fp32 state, which is free of units."""
    assert (actual.count, actual.skipped, actual.rank) == (expected.count, expected.skipped, expected.rank)
    torch.testing.assert_close(actual.matrix, expected.matrix, rtol=0, atol=tolerance)
    torch.testing.assert_close(actual.variance, expected.variance, rtol=1e-9, atol=0)


@settings(max_examples=60)
@given(
    st.sampled_from([kind for kind in KINDS if kind != "far"]),
    st.sampled_from([1, 13, 60]),
    st.sampled_from(RANKS),
    st.lists(st.integers(0, 9), min_size=1, max_size=4),
    st.randoms(use_true_random=False),
)
def test_merged_parts_equal_the_whole_in_any_order(kind, features, rank, counts, random):
    parts = drawn(kind, features, counts)
    whole = Covariance.of(torch.cat(parts), rank=rank)
    states = [Covariance.of(rows, rank=rank) for rows in parts]
    assert_same(merged(states), whole)
    random.shuffle(states)
    assert_same(merged(states), whole)


@settings(max_examples=40)
@given(
    st.sampled_from([kind for kind in KINDS if kind != "far"]),
    st.sampled_from(RANKS),
    st.lists(st.integers(0, 5), min_size=3, max_size=3),
)
def test_merging_is_commutative_and_associative_and_an_empty_part_changes_nothing(kind, rank, counts):
    a, b, c = (Covariance.of(rows, rank=rank) for rows in drawn(kind, 13, counts))
    assert_same(a.merge(b), b.merge(a))
    assert_same(a.merge(b).merge(c), a.merge(b.merge(c)))
    empty = Covariance.empty(13, rank=rank)
    assert torch.equal(a.merge(empty).matrix, a.matrix)
    assert torch.equal(empty.merge(a).matrix, a.matrix)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("features", [1, 13, 429])
def test_the_full_form_equals_numpy(kind, features):
    rows = torch.cat(drawn(kind, features, [40, 0, 1, 30]))
    state = merged(Covariance.of(part) for part in (rows[:40], rows[:0], rows[40:41], rows[41:]))
    expected, unit = numpy_covariance(rows), units(rows)
    assert state.rank is None
    assert ((state.dense() - expected).abs() <= 1e-6 * unit).all()
    assert ((rebuilt(state) - expected).abs() <= 1e-5 * unit).all()


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("count", [0, 1, 2, 5, 200])
def test_the_diagonal_of_the_factors_is_the_exact_variance(kind, count, rank):
    rows = drawn(kind, 70, [count])[0]
    state = Covariance.of(rows, rank=rank)
    expected = numpy_covariance(rows).diagonal()
    torch.testing.assert_close(rebuilt(state).diagonal(), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(state.dense().diagonal(), expected, rtol=1e-12, atol=0)
    smallest = torch.linalg.eigvalsh(state.correlation()).min()
    assert smallest >= -1e-6


def test_the_sketch_recovers_what_its_rank_can_hold():
    generator = torch.Generator().manual_seed(0)
    loadings = torch.randn(10, 300, generator=generator) * torch.logspace(-10, 10, 300)
    rows = torch.randn(500, 10, generator=generator) @ loadings
    state = merged(Covariance.of(part, rank=32) for part in rows.split(99))
    difference = (rebuilt(state) - numpy_covariance(rows)).abs() / units(rows)
    assert difference.max() < 1e-4
    assert state.factor()[0].shape == (300, 10)


def test_a_sketch_of_fewer_rows_than_its_rank_is_exact():
    rows = torch.randn(20, 300, generator=torch.Generator().manual_seed(0))
    difference = (rebuilt(Covariance.of(rows, rank=64)) - numpy_covariance(rows)).abs()
    assert (difference / units(rows)).max() < 1e-4


def test_a_sketch_of_factors_plus_noise_is_near_the_best_of_its_rank():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4000, 8, generator=generator) @ torch.randn(8, 200, generator=generator)
    rows += 0.5 * torch.randn(4000, 200, generator=generator)
    expected = numpy_covariance(rows)
    error = (rebuilt(Covariance.of(rows, rank=RANK)) - expected).norm() / expected.norm()
    only_diagonal = (torch.diag(expected.diagonal()) - expected).norm() / expected.norm()
    assert error < 0.01 < 0.9 < only_diagonal


def test_a_billion_rows_ten_thousand_deviations_from_zero():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.tensor([[1.0, 0.0, 0.0], [0.9, 0.436, 0.0], [-0.5, 0.3, 0.81]])
    rows = torch.randn(500, 3, generator=generator) @ mixing.T + 1e4
    expected = torch.from_numpy(np.corrcoef(rows.double().numpy() - 1e4, rowvar=False))
    for rank in (None, 16):
        state = Covariance.of(rows, rank=rank)
        for _ in range(21):
            state = state.merge(state)
        assert state.count == 500 * 2**21 > 10**9
        factor, rest = state.factor()
        spread = state.variance.sqrt()
        actual = (factor @ factor.T + torch.diag(rest)) / torch.outer(spread, spread)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_parts_with_means_far_apart_merge_exactly():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(300, 40, generator=generator)
    rows[100:200] += 50 * torch.randn(40, generator=generator)
    expected = numpy_covariance(rows)
    assert ((merged(map(Covariance.of, rows.split(100))).dense() - expected).abs() / units(rows)).max() < 1e-6
    assert_same(merged(Covariance.of(part, rank=8) for part in rows.split(100)), Covariance.of(rows, rank=8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [None, 16])
def test_every_float_dtype_is_summed_in_float64_even_under_autocast(dtype, rank):
    rows = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        state = Covariance.of(rows, rank=rank)
        difference = rebuilt(state) - numpy_covariance(rows)
    assert difference.abs().max() < 1e-5


@pytest.mark.parametrize("rank", [None, 16])
def test_constant_features_and_rows_that_are_not_finite_do_no_harm(rank):
    rows = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
    rows[:, 2] = 3.0
    rows[:, 4] = rows[:, 1] * 2
    bad = rows.clone()
    bad[10, 0], bad[20, 2] = float("nan"), float("inf")
    good = torch.cat([rows[:10], rows[11:20], rows[21:]])
    state = Covariance.of(bad, rank=rank)
    assert (state.count, state.skipped) == (58, 2)
    torch.testing.assert_close(rebuilt(state), numpy_covariance(good), rtol=0, atol=1e-5)
    correlation = state.correlation()
    assert not correlation[2].any()
    assert float(correlation[1, 4]) == pytest.approx(1.0, abs=1e-5)


def test_many_rows_and_features_are_cut_without_a_seam(monkeypatch):
    rows = torch.randn(100, 40, generator=torch.Generator().manual_seed(1)) + 3
    wholes = [Covariance.of(rows, rank=rank) for rank in (None, 8)]
    factors = [whole.factor()[0] for whole in wholes]
    monkeypatch.setattr(moments, "BLOCK_ROWS", 9)
    monkeypatch.setattr(moments, "PIECE_ELEMENTS", 50)
    for whole, factor in zip(wholes, factors, strict=True):
        cut = Covariance.of(rows, rank=whole.rank)
        assert_same(cut, whole)
        torch.testing.assert_close(cut.factor()[0] @ cut.factor()[0].T, factor @ factor.T, rtol=0, atol=1e-5)


def test_the_form_follows_the_features():
    assert Covariance.empty(FULL_FEATURES).rank is None
    assert Covariance.empty(FULL_FEATURES + 1).rank == RANK
    assert Covariance.empty(5, rank=2).matrix.shape == (5, 2)
    assert Covariance.of(torch.ones(3, 0)).factor()[0].shape == (0, 0)


def test_states_that_do_not_belong_together_are_refused_by_name():
    with pytest.raises(LokaError, match=r"3 features .* 5"):
        Covariance.empty(3).merge(Covariance.empty(5))
    with pytest.raises(LokaError, match=r"full form .* low-rank form \(rank 2\)"):
        Covariance.empty(3).merge(Covariance.empty(3, rank=2))
    with pytest.raises(ArgumentError, match="rank 0"):
        Covariance.empty(3, rank=0)


@pytest.mark.parametrize("rank", [None, 4])
def test_the_state_survives_as_arrays_bit_for_bit(rank):
    state = Covariance.of(torch.randn(9, 6), rank=rank)
    arrays = state.arrays()
    back = Covariance.from_arrays(arrays)
    assert_same(back, state, tolerance=0)
    assert torch.equal(back.mean, state.mean)
    assert state.nbytes == sum(arrays[name].nbytes for name in ("mean", "m2", "matrix"))
    with pytest.raises(ArgumentError, match=r"\(5, \d\) instead of \(6, \d\)"):
        Covariance.from_arrays({**arrays, "matrix": arrays["matrix"][:5]})
    with pytest.raises(ArgumentError, match="without rank"):
        Covariance.from_arrays({name: array for name, array in arrays.items() if name != "rank"})


def test_the_signs_are_the_same_for_ever_balanced_and_independent():
    device = torch.device("cpu")
    # splitmix64 of seed 0 begins e220a8397b1dcdaf 6e789e6aa1b965f4 (the reference implementation).
    words = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
    for row, word in zip(signs(slice(0, 2), 64, device), words, strict=True):
        octets = word.to_bytes(8, "little")
        expected = [2 * (octets[index // 8] >> (7 - index % 8) & 1) - 1 for index in range(64)]
        assert row.tolist() == expected
    omega = signs(slice(0, 20_000), 100, device)
    assert torch.equal(omega[7000:7010], signs(slice(7000, 7010), 100, device))
    gram = omega.T @ omega / 20_000
    assert (gram - torch.eye(100)).abs().max() < 6 / 20_000**0.5


@pytest.mark.parametrize("spectrum", [[4.0, 1.0, 0.5], [4.0, 1.0, 0.0], [1.0, -1e-9, 0.0], [0.0, 0.0, 0.0]])
def test_a_square_root_exists_for_singular_matrices(spectrum):
    basis = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).double())[0]
    matrix = basis @ torch.diag(torch.tensor(spectrum).double()) @ basis.T
    root = square_root(matrix)
    torch.testing.assert_close(root @ root.T, matrix, rtol=0, atol=1e-5)


class Live(TorchDispatchMode):
    """Measures the most bytes of tensors alive at once, besides the given ones."""

    def __init__(self, besides):
        super().__init__()
        self.besides = {storage_key(tensor) for tensor in besides}
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and storage_key(tensor) not in self.besides:
                self.alive[storage_key(tensor)] = (hold(tensor), tensor.untyped_storage().nbytes())
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


def test_123200_features_fit_and_the_work_on_them_is_bounded():
    features = 123_200
    rows = torch.randn(64, features, generator=torch.Generator().manual_seed(0))
    rows += 2 * rows[:, :1]  # one common direction
    with Live([rows]) as live:
        state = Covariance.of(rows)
    assert state.nbytes <= 40e6
    assert live.peak <= state.nbytes + 12e6  # pieces of 2 MB, and a few vectors
    factor, rest = state.factor()
    variance = rows.double().var(dim=0)
    torch.testing.assert_close(factor.square().sum(1) + rest, variance, rtol=1e-9, atol=0)
    some = torch.arange(0, features, 411)
    expected = numpy_covariance(rows[:, some])
    actual = factor[some] @ factor[some].T + torch.diag(rest[some])
    assert ((actual - expected).abs() / units(rows[:, some])).max() < 1e-3
