"""Products in canonical form, and how a gradient's product is told from its twin."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loka.probes.capturing.products import FACTORS, Draw, Factors, Forward, aten, factors_of, gemm, stratified
from loka.probes.capturing.sites import SiteKey
from loka.probes.capturing.storage import Place, hold, inner_tensors, storage_key

sizes = st.integers(1, 5)


def forward_of(p, q, weight_is_p=False):
    return Forward(SiteKey("site"), "site.weight", Place.of(p, keep=True), Place.of(q, keep=True), weight_is_p, True)


def classified(forward, first, second, expected="p"):
    places = Place.of(first), Place.of(second)
    found = forward.classify(*places, expected)
    return None if forward.repeats(*places) or found is None else (forward.pass_of(found[0]), found[1])


@given(m=sizes, k=sizes, n=sizes, layout=st.sampled_from(["row", "column"]), weight_is_p=st.booleans())
def test_gradients_are_told_apart_by_the_factor_they_share_whatever_the_shape(m, k, n, layout, weight_is_p):
    """Both ways in which autograd writes each gradient, for every shape, square and degenerate ones included."""
    p = torch.randn(m, k)
    q = torch.randn(k, n) if layout == "row" else torch.randn(n, k).t()
    grad = torch.randn(m, n)
    forward = forward_of(p, q, weight_is_p)
    of_p, of_q = ("wgrad", "dgrad") if weight_is_p else ("dgrad", "wgrad")
    assert classified(forward, grad, q.t()) == (of_p, False)
    assert classified(forward, q, grad.t()) == (of_p, True)
    assert classified(forward, p.t(), grad) == (of_q, True)
    assert classified(forward, grad.t(), p) == (of_q, False)
    if max(m, k) > 1 and max(k, n) > 1:
        assert classified(forward, p, q) is None
        assert classified(forward, torch.randn(m, k), q) is None  # recomputed input, the same weight


@given(m=sizes, k=sizes, n=sizes)
def test_without_any_shared_memory_shapes_decide_and_then_the_order(m, k, n):
    p, q, grad = torch.randn(m, k), torch.randn(k, n), torch.randn(m, n)
    forward = forward_of(p, q)
    for expected, which in (("p", "dgrad"), ("q", "wgrad")):
        first, second = (grad, q.clone().t()) if expected == "p" else (p.clone().t(), grad)
        found = classified(forward, first, second, expected)
        assert found is not None
        if sorted((m, k)) != sorted((k, n)):
            assert found[0] == which
        else:
            assert found == (which, found[1])


def test_a_product_that_fits_neither_factor_is_none_of_its_gradients():
    forward = forward_of(torch.randn(2, 3), torch.randn(3, 5))
    assert classified(forward, torch.randn(7, 2), torch.randn(2, 7)) is None


def test_a_tensor_times_itself_is_told_apart_by_order():
    h = torch.randn(4, 4)
    forward, grad = forward_of(h, h.t()), torch.randn(4, 4)
    assert classified(forward, grad, h, "p") == ("dgrad", False)
    assert classified(forward, grad.t(), h, "q") == ("wgrad", False)


def test_a_storages_identity_is_not_reused_while_it_is_held():
    x = torch.randn(1000)
    key, held = storage_key(x), hold(x)
    del x
    assert all(storage_key(torch.randn(1000)) != key for _ in range(100))
    assert held.expired()


def test_places_tell_views_apart_and_transposes_together():
    x = torch.randn(3, 4, 5)
    assert Place.of(x[1]) == Place.of(x[1])
    assert Place.of(x[1]) != Place.of(x[1].t())
    assert Place.of(x[1]).shares(Place.of(x[1].t()))
    assert not Place.of(x[1]).shares(Place.of(x[2]))
    assert not Place.of(x.to_sparse()).shares(Place.of(x.to_sparse()))
    assert Place.of(x.to_sparse()).storage == 0
    column = torch.randn(5, 1)
    assert Place.of(column.t()) == Place.of(column.view(1, 5))


def test_the_tensors_inside_a_wrapper_are_found():
    from torch.testing._internal.two_tensor import TwoTensor

    a, b = torch.randn(2, 2), torch.randn(2, 2)
    assert inner_tensors(a) == (a,)
    inner = inner_tensors(TwoTensor(TwoTensor(a, b), TwoTensor(b, a)))
    assert [storage_key(x) for x in inner] == [storage_key(x) for x in (a, b, b, a)]


@given(extent=st.integers(0, 300), wanted=st.integers(1, 100), seed=st.integers(0, 100))
def test_sampled_positions_are_distinct_sorted_and_one_of_each_stratum(extent, wanted, seed):
    index = stratified(extent, wanted, torch.Generator().manual_seed(seed))
    if extent <= wanted:
        assert index is None
        return
    positions = index.tolist()
    assert len(positions) == wanted
    assert positions == sorted(set(positions))
    assert positions[0] >= 0
    assert positions[-1] < extent
    for stratum, position in enumerate(positions):
        assert stratum * extent / wanted - 1 <= position <= (stratum + 1) * extent / wanted


@given(extent=st.integers(65, 500))
def test_every_position_is_drawn_sooner_or_later(extent):
    drawn = set()
    for seed in range(200):
        drawn.update(stratified(extent, 64, torch.Generator().manual_seed(seed)).tolist())
    assert len(drawn) > 0.95 * extent


SIGNATURES = {
    "mm": lambda p, q: (p, q),
    "addmm": lambda p, q: (torch.zeros(1), p, q),
    "addmm_": lambda p, q: (torch.zeros(p.shape[0], q.shape[1]), p, q),
    "_addmm_activation": lambda p, q: (torch.zeros(q.shape[1]), p, q),
    "bmm": lambda p, q: (p[None], q[None]),
    "baddbmm": lambda p, q: (torch.zeros(1, 1, 1), p[None], q[None]),
    "baddbmm_": lambda p, q: (torch.zeros(1, p.shape[0], q.shape[1]), p[None], q[None]),
    "addbmm": lambda p, q: (torch.zeros(1), p[None], q[None]),
    "mv": lambda p, q: (p, q[:, 0].contiguous()),
    "addmv": lambda p, q: (torch.zeros(1), p, q[:, 0].contiguous()),
}


@pytest.mark.parametrize("packet", [packet for packet in FACTORS if packet.__name__ in SIGNATURES], ids=str)
def test_the_factors_named_in_the_table_are_those_of_the_op(packet):
    p, q = torch.randn(3, 4), torch.randn(4, 5)
    args = SIGNATURES[packet.__name__](p, q)
    factors = factors_of(packet, args, {})
    wanted = torch.matmul(factors.p, factors.q)
    found = packet(*args)
    if packet is aten._addmm_activation:
        wanted = wanted.relu()
    if packet is aten.addbmm:
        wanted = wanted.sum(0)
    torch.testing.assert_close(found.reshape(wanted.shape), wanted)


def test_every_op_of_the_table_is_tested_here_or_through_the_probe():
    through_the_probe = {"_grouped_mm", "_scaled_mm", "_sparse_addmm"}
    assert {packet.__name__ for packet in FACTORS} == SIGNATURES.keys() | through_the_probe


@given(batch=st.integers(1, 4), m=sizes, k=sizes, n=sizes, a_is_p=st.booleans())
def test_the_canonical_form_is_the_product_or_its_transpose(batch, m, k, n, a_is_p):
    p, q = torch.randn(batch, m, k, dtype=torch.float64), torch.randn(batch, k, n, dtype=torch.float64)
    found = gemm(Factors("bmm", p, q), a_is_p=a_is_p)
    (part,) = found.parts(Draw(10_000, torch.Generator()))
    product = torch.bmm(part.a, part.b.mT)
    torch.testing.assert_close(product, torch.bmm(p, q) if a_is_p else torch.bmm(p, q).mT)
    assert product.shape == (found.batch, found.m, found.n)
    assert part.a.shape[-1] == found.k
