"""A placement judged: bytes token by token, replicas, odd sizes, and traces that say little or nothing."""

import numpy as np
import pytest

from loka.dispatch.placement.evaluate import evaluate, flow
from loka.dispatch.placement.options import PlaceOptions
from loka.dispatch.placement.place import place
from loka.dispatch.placement.usage import usable_layers
from loka.errors import ArgumentError
from tests.dispatch.made_routing import made_trace, trace_of


def by_hand(trace, hosts, groups, devices):
    """Tokens [layer, from, to], one request, layer and expert at a time; no replicas."""
    flows = np.zeros((len(trace.layers), devices, devices), dtype=int)
    for request, layer, expert in np.ndindex(*trace.decode.shape):
        (to,) = np.flatnonzero(hosts[layer, :, expert])
        flows[layer, groups[request], to] += int(trace.decode[request, layer, expert])
    return flows


def test_bytes_load_and_busiest_link_are_those_counted_token_by_token():
    fit, other = made_trace(seed=1, requests=32), made_trace(seed=2, requests=30)
    placement = place(fit, PlaceOptions(devices=3))
    judged = evaluate(placement, other)
    for name in ("linear", "eplb", "loka"):
        signature = placement.methods[name].signature
        groups = np.arange(30) % 3
        if signature is not None:
            groups = signature.groups(other.prefill, window=30, slack=0.1)
        flows = by_hand(other, placement.hosts(name), groups, 3)
        moved = flows.copy()
        for device in range(3):
            moved[:, device, device] = 0
        served = flows.sum(axis=(0, 1))
        link = sum(max(layer.sum(axis=0).max(), layer.sum(axis=1).max()) for layer in moved)
        cost = judged.methods[name]
        assert cost.bytes == moved.sum() * 8 * 2
        assert cost.busiest == link * 8 * 2
        assert cost.imbalance == pytest.approx(served.max() / served.mean())


def test_a_token_stays_home_then_in_its_node_and_is_shared_among_replicas():
    use = np.array([[[8.0, 0], [4, 0], [2, 0], [0, 0]]])
    hosts = np.zeros((1, 4, 2), dtype=bool)
    hosts[0, [0, 3], 0] = True
    hosts[0, 1, 1] = True
    near = flow(use, hosts, nodes=2)[0]
    assert near.tolist() == [[8, 0, 0, 0], [4, 0, 0, 0], [0, 0, 0, 2], [0, 0, 0, 0]]
    anywhere = flow(use, hosts)[0]
    assert anywhere.tolist() == [[8, 0, 0, 0], [2, 0, 0, 2], [1, 0, 0, 1], [0, 0, 0, 0]]


def test_replicas_only_save_bytes():
    fit, other = made_trace(seed=1, own=0.5), made_trace(seed=2, own=0.5)
    bare, more = (evaluate(place(fit, PlaceOptions(devices=4, replicas=r)), other).methods for r in (0, 3))
    for name in ("linear", "paper", "loka"):
        assert more[name].bytes < bare[name].bytes
    full = evaluate(place(fit, PlaceOptions(devices=4, replicas=12)), other).methods
    assert full["linear"].bytes == full["paper"].bytes == 0


def test_layers_that_say_nothing_are_left_out_with_a_note():
    counts = np.full((6, 4, 8), 5)
    counts[:, 1] = 0
    counts[:, 2, 3] = 1000
    kept, notes = usable_layers(trace_of(counts))
    assert kept == (0, 3)
    assert "layer 1 is left out: it has no decode tokens" in notes
    assert any("expert 3 takes 96.6%" in note for note in notes)
    assert place(trace_of(counts), PlaceOptions(devices=2)).layers == (0, 3)


@pytest.mark.parametrize(
    "trace",
    [
        made_trace(requests=1),
        made_trace(requests=3, domains=1),
        made_trace(requests=5, experts=7),
        made_trace(requests=16, experts=5, layers=1),
        trace_of(np.eye(6, dtype=int)[[0, 1, 2, 0, 1, 2]][:, None]),  # half of the experts are never used
        trace_of(np.full((9, 2, 6), 3)),  # all requests are alike
    ],
    ids=["one request", "one domain", "D does not divide E", "as many devices as experts", "unused", "alike"],
)
def test_small_and_odd_traces_are_placed_and_judged(trace):
    placement = place(trace, PlaceOptions(devices=5))
    sizes = placement.hosts("loka").sum(axis=2)
    assert (sizes == sizes[0]).all()
    assert 1 <= sizes.min() <= sizes.max() <= sizes.min() + 1
    judged = evaluate(placement, trace)
    assert all(np.isfinite(cost.imbalance) and cost.bytes >= 0 for cost in judged.methods.values())
    assert sum(judged.methods["loka"].group_sizes) == trace.requests


def test_requests_without_prefill_are_served_too():
    fit = made_trace(requests=16)
    counts = fit.counts.copy()
    counts[:4, 0] = 0
    blind = type(fit)(counts=counts, domain=fit.domain, layers=fit.layers)
    judged = evaluate(place(blind, PlaceOptions(devices=4)), blind)
    assert judged.methods["loka"].group_sizes == (4, 4, 4, 4)
    assert "one element per token" in judged.notes[-1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"devices": 17}, "17 devices for 16 experts"),
        ({"devices": 0}, "devices is 0"),
        ({"devices": 4, "nodes": 3}, "do not divide into 3 nodes"),
        ({"devices": 4, "replicas": 13}, "at most 12"),
        ({"devices": 4, "max_load": 0.9}, "max_load is 0.9"),
        ({"devices": 4, "max_load": float("nan")}, "max_load is nan"),
        ({"devices": 4, "layers": [2]}, "layers"),
    ],
)
def test_what_cannot_be_placed_is_refused_in_a_sentence(options, words):
    with pytest.raises(ArgumentError, match=words):
        place(made_trace(requests=4), PlaceOptions(**options))


def test_traces_of_another_model_or_without_decode_are_refused():
    placement = place(made_trace(requests=8), PlaceOptions(devices=4))
    with pytest.raises(ArgumentError, match="same model"):
        evaluate(placement, made_trace(experts=12))
    with pytest.raises(ArgumentError, match="no layers"):
        evaluate(placement, made_trace(layers=2))
    empty = made_trace(requests=8)
    counts = empty.counts.copy()
    counts[:, 1] = 0
    prefill = type(empty)(counts=counts, domain=empty.domain, layers=empty.layers)
    with pytest.raises(ArgumentError, match="no decode tokens"):
        evaluate(placement, prefill)
    with pytest.raises(ArgumentError, match="No layer of this trace"):
        place(prefill, PlaceOptions(devices=4))
    with pytest.raises(ArgumentError, match="previous placement is of 16 experts on 4 devices"):
        place(made_trace(requests=8), PlaceOptions(devices=2), previous=placement)
