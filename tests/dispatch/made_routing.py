"""Routing traces with a structure that is known: each domain has experts of its own, in every layer."""

import numpy as np

from loka.probes.routing.trace import RoutingTrace


def made_trace(requests=64, layers=3, experts=16, domains=4, *, tokens=64, own=0.8, seed=0, hidden_size=8):
    """A trace in which a share `own` of a request's tokens goes to the experts of its domain, e.g. e % domains == d."""
    rng = np.random.default_rng(seed)
    domain = np.arange(requests) % domains
    counts = np.zeros((requests, 2, layers, experts), dtype=np.uint16)
    for request, layer in np.ndindex(requests, layers):
        order = np.random.default_rng(layer).permutation(experts)  # other experts in each layer
        share = np.full(experts, (1 - own) / experts)
        mine = order[np.arange(experts) % domains == domain[request]]
        share[mine] += own / len(mine)
        for phase, size in enumerate((tokens // 2, tokens)):
            counts[request, phase, layer] = rng.multinomial(size, share / share.sum())
    return RoutingTrace(
        counts=counts,
        domain=tuple(f"d{at}" for at in domain),
        layers=tuple(range(1, 2 * layers, 2)),
        hidden_size=hidden_size,
        top_k=1,
    )


def trace_of(counts, **values):
    """A trace of decode counts [request, layer, expert], with the same prefill."""
    counts = np.asarray(counts)
    both = np.stack([counts, counts], axis=1)
    return RoutingTrace(counts=both, domain=("all",) * len(counts), layers=tuple(range(counts.shape[1])), **values)
