"""What is said of a routing trace, against definitions written out and known answers."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from loka.errors import EvidenceError
from loka.probes.routing.classify import guess_domain
from loka.probes.routing.statistics import (
    coactivations,
    correlations,
    degenerate_layers,
    domain_shifts,
    layer_loads,
    phase_correlations,
    thinned,
)
from loka.probes.routing.trace import RoutingTrace
from tests.probes.made_routing import made_trace


def trace_of(*loads, domain=("a",), **facts):
    """One request per domain; loads [request][layer][expert], all of them prefill."""
    counts = np.zeros((len(domain), 2, len(loads[0]), len(loads[0][0])), int)
    counts[:, 0] = loads
    return RoutingTrace(counts=counts, domain=domain, layers=tuple(range(len(loads[0]))), **facts)


@settings(max_examples=40)
@given(st.lists(st.integers(0, 1000), min_size=2, max_size=12).filter(any))
def test_imbalance_is_as_defined(load):
    (found,) = layer_loads(trace_of([load]))
    experts, mean = len(load), sum(load) / len(load)
    assert found.max_over_mean == pytest.approx(max(load) / mean)
    assert found.cv == pytest.approx(np.std(load) / mean)
    apart = sum(abs(a - b) for a, b in itertools.product(load, repeat=2))
    assert found.gini == pytest.approx(apart / (2 * experts**2 * mean), abs=1e-12)
    assert found.unused == tuple(at for at, tokens in enumerate(load) if tokens == 0)
    assert load[found.busiest] == max(load)
    assert found.top_share == pytest.approx(max(load) / sum(load))


def test_known_loads():
    even, one = layer_loads(trace_of([[5, 5, 5, 5], [20, 0, 0, 0]]))
    assert (even.max_over_mean, even.gini, even.cv, even.unused, even.degenerate) == (1.0, 0.0, 0.0, (), False)
    assert (one.max_over_mean, one.gini, one.unused, one.degenerate) == (4.0, 0.75, (1, 2, 3), True)


def test_loads_are_told_for_all_for_every_domain_and_for_a_phase():
    trace = made_trace(10)
    found = layer_loads(trace)
    assert [(each.domain, each.layer) for each in found] == [(d, n) for d in (None, "code", "chat") for n in (1, 3, 5)]
    assert [each.tokens for each in found] == [1000] * 3 + [500] * 6
    assert [each.tokens for each in layer_loads(trace, phase="decode", by_domain=False)] == [400] * 3
    code = np.array([name == "code" for name in trace.domain])
    assert found[3].busiest == trace.counts[code].sum((0, 1))[0].argmax()


@pytest.mark.parametrize(
    ("load", "top_k", "degenerate"),
    [
        ([91, 9, 0, 0], 1, True),
        ([90, 10, 0, 0], 1, False),
        ([48, 46, 6, 0], 2, True),  # the same two for nearly every token
        ([48, 40, 6, 6], 2, False),
        ([50, 50, 0, 0], None, False),
        ([50, 50], 2, False),  # every token goes to all of them
    ],
)
def test_a_layer_is_degenerate_when_as_few_experts_as_a_token_gets_take_nine_tenths(load, top_k, degenerate):
    trace = trace_of([load, [1] * len(load)], top_k=top_k)
    assert degenerate_layers(trace) == ((0,) if degenerate else ())


def test_a_layer_without_tokens_has_no_numbers():
    found = layer_loads(trace_of([[0, 0, 0]]))[0]
    assert (found.tokens, found.max_over_mean, found.busiest, found.unused) == (0, None, None, (0, 1, 2))
    assert not found.degenerate


def test_the_shift_between_domains_is_the_total_variation_distance():
    trace = trace_of([[6, 2, 0]], [[0, 2, 2]], [[1, 1, 1]], domain=("a", "b", "c"))
    found = {each.domains: each.total_variation for each in domain_shifts(trace)}
    assert found[("a", "b")] == pytest.approx(0.75)
    assert found[("a", "c")] == pytest.approx(0.5 * (0.75 - 1 / 3 + abs(0.25 - 1 / 3) + 1 / 3))
    assert set(found) == {("a", "b"), ("a", "c"), ("b", "c")}
    with pytest.raises(EvidenceError, match="one domain, 'a'"):
        domain_shifts(trace_of([[1, 1]]))


def test_domains_that_route_alike_differ_by_chance_only():
    apart = domain_shifts(made_trace(60))
    assert min(each.total_variation - each.by_chance for each in apart) > 0.1
    alike = made_trace(60, domains=("code",))
    names = tuple("xy"[at % 2] for at in range(60))
    same = RoutingTrace(counts=alike.counts, domain=names, layers=alike.layers)
    assert max(abs(each.total_variation - each.by_chance) for each in domain_shifts(same)) < 0.03
    assert apart[0].n == (30, 30)


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=3, max_size=9))
def test_correlations_are_those_of_scipy(pairs):
    first, second = (np.array(each) for each in zip(*pairs, strict=True))
    pearson, spearman = correlations(first, second)
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        assert np.isnan(pearson)
        assert np.isnan(spearman)
    else:
        assert pearson == pytest.approx(stats.pearsonr(first, second).statistic, abs=1e-9)
        assert spearman == pytest.approx(stats.spearmanr(first, second).statistic, abs=1e-9)


def test_prefill_foretells_decode_better_for_a_domain_than_for_a_request():
    trace = made_trace(40)
    found = phase_correlations(trace)
    alone = [each for each in found if each.domain is None]
    summed = [each for each in found if each.domain is not None]
    assert [each.n for each in alone] == [40] * 3
    assert [each.n for each in summed] == [20] * 6
    assert min(each.pearson for each in summed) > 0.95 > max(each.pearson for each in alone) > 0.7
    rows = [stats.pearsonr(request[0, 0], request[1, 0]).statistic for request in trace.counts]
    assert alone[0].pearson == pytest.approx(np.mean(rows))
    code = trace.counts[[name == "code" for name in trace.domain]].sum(0)
    assert summed[1].spearman == pytest.approx(stats.spearmanr(code[0, 1], code[1, 1]).statistic)


def test_without_decode_there_is_no_correlation():
    found = phase_correlations(trace_of([[3, 1, 2]]))
    assert [(each.pearson, each.spearman) for each in found] == [(None, None)] * 2
    assert found[0].n == 0


def test_experts_that_the_same_requests_use_are_found():
    counts = np.zeros((40, 2, 2, 6), int)
    for request in range(40):
        pair = (0, 3) if request % 2 else (1, 4)
        counts[request, 0, 0, pair] = 10
        counts[request, 1, 1, 5 if request % 2 else 2] = 10
    trace = RoutingTrace(counts=counts, domain=("a",) * 40, layers=(8, 9))
    first, second = coactivations(trace, between=False)
    assert {pair[:2] for pair in first.pairs} == {(0, 3), (1, 4)}
    # Half of the requests use both of a pair: two draws of one give it with 1/2, and 2 x 1/4 x 1/4 by loads alone.
    assert first.pairs[0][2:] == pytest.approx((0.25, 2.0))
    assert first.dependence == pytest.approx(0.5)
    assert second.pairs == ()
    (between,) = coactivations(trace, between=True)
    assert between.layers == (8, 9)
    assert {pair[:2] for pair in between.pairs} == {(0, 5), (3, 5), (1, 2), (4, 2)}
    assert all(pair[2:] == pytest.approx((0.25, 2.0)) for pair in between.pairs)


def test_requests_that_are_all_alike_have_nothing_in_common_beyond_their_loads():
    counts = np.tile(np.array([4, 3, 2, 1]), (10, 2, 2, 1))
    trace = RoutingTrace(counts=counts, domain=("a",) * 10, layers=(0, 1))
    for between in (False, True):
        for each in coactivations(trace, between=between):
            assert each.dependence == pytest.approx(0.0, abs=1e-12)
            assert each.pairs == ()


def test_a_request_without_tokens_is_left_out_of_shares():
    trace = made_trace(12)
    counts = trace.counts.copy()
    counts[5] = 0
    holed = RoutingTrace(counts=counts, domain=trace.domain, layers=trace.layers)
    without = trace.select(requests=[at for at in range(12) if at != 5])
    assert coactivations(holed, between=False) == coactivations(without, between=False)
    assert phase_correlations(holed)[0].pearson == pytest.approx(phase_correlations(without)[0].pearson)


def test_the_domain_is_guessed_where_it_shows_and_by_chance_where_it_does_not():
    found = guess_domain(made_trace(60))
    assert found.accuracy > 0.95
    assert found.mean_layer > 0.9
    assert (found.chance, found.splits, found.requests, found.domains) == (0.5, 5, 60, ("code", "chat"))
    assert [each.layer for each in found.layers] == [1, 3, 5]
    random = np.random.default_rng(0)
    trace = made_trace(200, domains=("code",))
    names = tuple(random.permutation(["x"] * 140 + ["y"] * 60).tolist())
    blind = guess_domain(RoutingTrace(counts=trace.counts, domain=names, layers=trace.layers))
    assert blind.chance == pytest.approx(0.7)
    assert abs(blind.mean_layer - 0.7) < 0.12


def test_the_regression_is_the_one_of_scikit_learn():
    sklearn = pytest.importorskip("sklearn.linear_model")
    from loka.probes.routing.classify import _fit, _log_softmax

    random = np.random.default_rng(1)
    features, code = random.random((60, 4)), random.integers(0, 3, 60)
    reference = sklearn.LogisticRegression(C=1.0, tol=1e-8, max_iter=1000).fit(features, code)
    found = np.exp(_log_softmax(features, _fit(features, code, 3)))
    assert np.allclose(found, reference.predict_proba(features), atol=1e-3)


@pytest.mark.parametrize(
    ("trace", "words"),
    [
        (made_trace(30, domains=("code",)), "the trace has 30 of 'code'"),
        (made_trace(8), "10 requests in all"),
        (made_trace(1), "the trace has 1 of 'code'"),
    ],
)
def test_too_little_to_guess_from_is_refused_in_words(trace, words):
    with pytest.raises(EvidenceError, match=words):
        guess_domain(trace)


def test_domains_of_too_few_requests_are_left_out_and_no_prefill_is_refused():
    trace = made_trace(30)
    names = ("rare",) + trace.domain[1:]
    found = guess_domain(RoutingTrace(counts=trace.counts, domain=names, layers=trace.layers))
    assert (found.left_out, found.requests) == (("rare",), 29)
    counts = trace.counts.copy()
    counts[:, 0] = 0
    with pytest.raises(EvidenceError, match="no prefill"):
        guess_domain(RoutingTrace(counts=counts, domain=trace.domain, layers=trace.layers))


def test_a_large_trace_is_thinned_to_a_fixed_draw():
    trace = made_trace(20)
    found = thinned(trace, 5)
    assert found.requests == 5
    assert np.array_equal(found.counts, thinned(trace, 5).counts)
    assert thinned(trace, 20) is trace
