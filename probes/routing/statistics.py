"""What a routing trace says: how unevenly experts are used, how that shifts with the domain, what prefill foretells.

All measures are of loads: tokens per expert, experts that are never used counted as zero.

- `layer_loads`: how uneven a layer's load is. `max_over_mean` is what the slowest expert does beyond a balanced one.
- `domain_shifts`: total variation distance between the loads of two domains, 0 (the same) to 1 (no expert in common),
  beside what the same requests give when their domains are shuffled: few tokens differ by chance alone.
- `phase_correlations`: how well the counts of the prefill foretell those of the decode, expert by expert: for single
  requests, and for the sum of a domain's requests.
- `coactivations`: which experts the same *requests* use, beyond what their loads alone would give. A trace holds no
  tokens, so this is not which experts the same token uses.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from scipy.stats import rankdata

from loka.errors import EvidenceError
from loka.probes.routing.trace import DECODE, PREFILL, RoutingTrace

DEGENERATE: Final[float] = 0.9  # a layer's share of tokens on as few experts as one token gets, above which it is

Phase = Literal["prefill", "decode"]
_PHASES: Final[dict[Phase | None, list[int]]] = {None: [PREFILL, DECODE], "prefill": [PREFILL], "decode": [DECODE]}
MOST_REQUESTS: Final[int] = 1000  # for measures that look at requests one by one; a fixed draw of so many
_SHUFFLES: Final[int] = 20
_TOP_PAIRS: Final[int] = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerLoad:
    """How uneven the load of one layer is; `domain` None: over all. Without tokens there is no number."""

    layer: int
    domain: str | None
    tokens: int  # times an expert was given a token
    max_over_mean: float | None
    gini: float | None
    cv: float | None  # standard deviation over mean
    busiest: int | None  # the expert with the most tokens
    top_share: float | None  # of the tokens, on as few experts as one token gets
    unused: tuple[int, ...]
    degenerate: bool  # top_share > DEGENERATE


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainShift:
    """How far apart the loads of two domains are in one layer, and for shuffled domains; `n`: requests of each."""

    layer: int
    domains: tuple[str, str]
    total_variation: float
    by_chance: float
    n: tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseCorrelation:
    """How well prefill counts foretell decode counts in one layer; `domain` None: mean over single requests.

    n: requests that have both phases, each spread unevenly enough for a correlation; None where there is none.
    """

    layer: int
    domain: str | None
    pearson: float | None
    spearman: float | None
    n: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Coactivation:
    """Experts that the same requests use: of one layer, or of a layer and the one after it.

    dependence: total variation distance between the joint use and the product of loads, 0 to 1. pairs: (expert,
        expert, share of pairs of tokens of a request that they get, how many times what their loads would give), by
        the excess of that share. top_tenth: share of all use on the tenth of the pairs that is used most.
    """

    layers: tuple[int, int]
    dependence: float
    top_tenth: float
    pairs: tuple[tuple[int, int, float, float], ...]


def layer_loads(trace: RoutingTrace, *, phase: Phase | None = None, by_domain: bool = True) -> tuple[LayerLoad, ...]:
    """Return the load of every layer over all requests, then for every domain; `phase` None: of both together."""
    groups: list[tuple[str | None, np.ndarray]] = [(None, np.ones(trace.requests, dtype=bool))]
    if by_domain and len(trace.domains) > 1:
        groups += [(domain, _of_domain(trace, domain)) for domain in trace.domains]
    found = []
    for domain, mask in groups:
        loads = summed(trace, mask, phase)
        found += [_load(layer, domain, load, trace.top_k) for layer, load in zip(trace.layers, loads, strict=True)]
    return tuple(found)


def summed(trace: RoutingTrace, mask: np.ndarray, phase: Phase | None = None) -> np.ndarray:
    """Return tokens per expert of the masked requests, [layer, expert]."""
    total = np.zeros((len(trace.layers), trace.experts), dtype=np.int64)
    for at in _PHASES[phase]:
        total += trace.counts[:, at].sum(axis=0, dtype=np.int64, where=mask[:, None, None])
    return total


def _load(layer: int, domain: str | None, load: np.ndarray, top_k: int | None) -> LayerLoad:
    tokens, experts = int(load.sum()), len(load)
    unused = tuple(np.flatnonzero(load == 0).tolist())
    if not tokens:
        return LayerLoad(
            layer=layer,
            domain=domain,
            tokens=0,
            max_over_mean=None,
            gini=None,
            cv=None,
            busiest=None,
            top_share=None,
            unused=unused,
            degenerate=False,
        )
    mean, ordered = tokens / experts, np.sort(load)
    few = top_k or 1
    top_share = float(ordered[-few:].sum() / tokens)
    return LayerLoad(
        layer=layer,
        domain=domain,
        tokens=tokens,
        max_over_mean=float(ordered[-1] / mean),
        gini=float((2 * np.arange(1, experts + 1) - experts - 1) @ ordered / (experts * tokens)),
        cv=float(load.std() / mean),
        busiest=int(load.argmax()),
        top_share=top_share,
        unused=unused,
        degenerate=top_share > DEGENERATE and experts >= 2 * few,
    )


def degenerate_layers(trace: RoutingTrace) -> tuple[int, ...]:
    """Return the layers that send nearly every token to the same few experts, as few as one token gets."""
    return tuple(load.layer for load in layer_loads(trace, by_domain=False) if load.degenerate)


def domain_shifts(trace: RoutingTrace, *, seed: int = 0) -> tuple[DomainShift, ...]:
    """Return the distance between every two domains in every layer where both have tokens.

    Raises EvidenceError when there is one domain only.
    """
    if len(trace.domains) < 2:
        raise EvidenceError(
            f"The trace has one domain, {trace.domains[0]!r}, so there is no shift between domains. Record others too, "
            'with `trace.domain("code")`.'
        )
    trace = thinned(trace)
    use = trace.counts.sum(axis=1, dtype=np.float32).reshape(trace.requests, -1)  # [request, layer * expert]
    code = np.array([trace.domains.index(domain) for domain in trace.domain])
    random = np.random.default_rng(seed)
    distances = _distances(use, code, trace)
    # Where requests have no token, a shuffle can leave a domain without any: it tells nothing there.
    shuffled = np.array([_distances(use, random.permutation(code), trace) for _ in range(_SHUFFLES)])
    told = ~np.isnan(shuffled)
    sums = np.where(told, shuffled, 0.0).sum(axis=0)
    by_chance = np.where(told.any(axis=0), sums / np.maximum(told.sum(axis=0), 1), distances)
    n = np.bincount(code)
    return tuple(
        DomainShift(
            layer=layer,
            domains=(trace.domains[a], trace.domains[b]),
            total_variation=float(distances[pair, at]),
            by_chance=float(by_chance[pair, at]),
            n=(int(n[a]), int(n[b])),
        )
        for pair, (a, b) in enumerate(itertools.combinations(range(len(trace.domains)), 2))
        for at, layer in enumerate(trace.layers)
        if not np.isnan(distances[pair, at])
    )


def _distances(use: np.ndarray, code: np.ndarray, trace: RoutingTrace) -> np.ndarray:
    """Return the distance of every two domains, [pair, layer]; NaN where one of them has no token."""
    loads = (np.eye(len(trace.domains), dtype=use.dtype)[code].T @ use).astype(np.float64)
    share = _shares(loads.reshape(len(trace.domains), len(trace.layers), trace.experts))
    pairs = itertools.combinations(range(len(trace.domains)), 2)
    return np.array([0.5 * np.abs(share[a] - share[b]).sum(axis=-1) for a, b in pairs])


def _shares(counts: np.ndarray) -> np.ndarray:
    """Return counts over the last axis as shares; NaN where there are none."""
    total = counts.sum(axis=-1, keepdims=True)
    shares: np.ndarray = np.divide(counts, total, out=np.full(counts.shape, np.nan), where=total > 0)
    return shares


def phase_correlations(trace: RoutingTrace) -> tuple[PhaseCorrelation, ...]:
    """Return how well prefill foretells decode: the mean over requests, then the sums of every domain, by layer."""
    some = thinned(trace)
    found = [
        _mean(layer, *correlations(some.prefill[:, at], some.decode[:, at])) for at, layer in enumerate(trace.layers)
    ]
    for domain in trace.domains:
        mask = _of_domain(trace, domain)
        both = correlations(summed(trace, mask, "prefill"), summed(trace, mask, "decode"))
        found += [
            PhaseCorrelation(layer=layer, domain=domain, pearson=_number(p), spearman=_number(s), n=int(mask.sum()))
            for layer, p, s in zip(trace.layers, *both, strict=True)
        ]
    return tuple(found)


def _mean(layer: int, pearson: np.ndarray, spearman: np.ndarray) -> PhaseCorrelation:
    n = int((~np.isnan(pearson)).sum())
    return PhaseCorrelation(
        layer=layer,
        domain=None,
        pearson=float(np.nanmean(pearson)) if n else None,
        spearman=float(np.nanmean(spearman)) if n else None,
        n=n,
    )


def correlations(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return Pearson's and Spearman's correlation over the last axis; NaN where one side is the same everywhere."""
    ranks = (rankdata(each, axis=-1) for each in (first, second))
    return _pearson(first, second), _pearson(*ranks)


def _pearson(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    a, b = (each - each.mean(axis=-1, keepdims=True, dtype=np.float64) for each in (first, second))
    norm = np.sqrt((a * a).sum(axis=-1) * (b * b).sum(axis=-1))
    found: np.ndarray = np.divide((a * b).sum(axis=-1), norm, out=np.full(norm.shape, np.nan), where=norm > 0)
    return found


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def coactivations(trace: RoutingTrace, *, between: bool) -> tuple[Coactivation, ...]:
    """Return which experts the same requests use, in every layer, or `between` every layer and the next one."""
    trace, positions = thinned(trace), range(len(trace.layers))
    pairs = itertools.pairwise(positions) if between else zip(positions, positions, strict=True)
    return tuple(_coactivations(trace, pairs))


def _coactivations(trace: RoutingTrace, pairs: Iterable[tuple[int, int]]) -> Iterator[Coactivation]:
    layers = trace.layers
    for a, b in pairs:
        first, second = (_shares(trace.counts[:, :, at].sum(axis=1, dtype=np.float64)) for at in (a, b))
        known = ~(np.isnan(first[:, 0]) | np.isnan(second[:, 0]))
        if not known.any():
            continue
        first, second = first[known], second[known]
        joint = first.T @ second / known.sum()
        alone = np.outer(first.mean(axis=0), second.mean(axis=0))
        yield Coactivation(
            layers=(layers[a], layers[b]),
            dependence=float(0.5 * np.abs(joint - alone).sum()),
            top_tenth=float(np.sort(joint, axis=None)[-max(joint.size // 10, 1) :].sum()),
            pairs=_top_pairs(joint, alone, same=a == b),
        )


def _top_pairs(joint: np.ndarray, alone: np.ndarray, *, same: bool) -> tuple[tuple[int, int, float, float], ...]:
    excess = joint - alone
    if same:  # a pair of experts stands there twice, and an expert with itself is none
        excess = np.where(np.tri(len(excess), dtype=bool), -1.0, excess)
        joint, alone = 2 * joint, 2 * alone
    best = np.argsort(-excess, axis=None, kind="stable")[:_TOP_PAIRS]
    return tuple(
        (int(i), int(j), float(joint[i, j]), float(joint[i, j] / alone[i, j]))
        for i, j in zip(*np.unravel_index(best, excess.shape), strict=True)
        if excess[i, j] > 1e-12
    )


def thinned(trace: RoutingTrace, most: int = MOST_REQUESTS) -> RoutingTrace:
    """Return the trace, or a fixed draw of `most` of its requests where it has more."""
    if trace.requests <= most:
        return trace
    drawn = np.sort(np.random.default_rng(0).choice(trace.requests, most, replace=False))
    return trace.select(requests=drawn)


def _of_domain(trace: RoutingTrace, domain: str) -> np.ndarray:
    return np.array([each == domain for each in trace.domain])
