"""What the prefill gives away about a request: its domain, guessed from which experts its prompt used.

For every layer a multinomial logistic regression, from the shares of the prompt's tokens that each expert got, and all
layers together by the sum of their log-probabilities. Fitted on four fifths of every domain, judged on the last fifth,
on several random splits. The level of chance is to guess the domain with the most requests.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from scipy.optimize import minimize
from scipy.special import logsumexp

from loka.errors import EvidenceError
from loka.probes.routing.statistics import thinned
from loka.probes.routing.trace import RoutingTrace

FEWEST_REQUESTS: Final[int] = 10
FEWEST_OF_A_DOMAIN: Final[int] = 5  # one of them is a fifth
SPLITS: Final[int] = 5

_TEST_SHARE: Final[float] = 0.2
_PENALTY: Final[float] = 1.0  # of the squared weights, against the summed log-loss; as in scikit-learn's default
_ITERATIONS: Final[int] = 100
_TOLERANCE: Final[float] = 1e-7  # of the loss


_OPTIONS: Final[dict[str, float]] = {"maxiter": _ITERATIONS, "ftol": _TOLERANCE}


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerAccuracy:
    """How often one layer alone names the domain right on unseen requests: mean and deviation over splits."""

    layer: int
    accuracy: float
    deviation: float


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainGuess:
    """How well the prefill tells the domain; `accuracy` of all layers together, `mean_layer` of one on average.

    chance: of guessing the largest domain. left_out: domains of too few requests.
    """

    domains: tuple[str, ...]
    requests: int
    splits: int
    chance: float
    accuracy: float
    deviation: float  # over splits
    mean_layer: float
    layer_deviation: float  # over layers
    layers: tuple[LayerAccuracy, ...]
    left_out: tuple[str, ...]


def guess_domain(trace: RoutingTrace, *, splits: int = SPLITS, seed: int = 0) -> DomainGuess:
    """Return how well the domain of a request can be guessed from its prefill.

    Raises EvidenceError, in words, with fewer than two domains of 5 requests, fewer than 10 requests, or no prefill.
    """
    trace, left_out = _usable(trace)
    code = np.array([trace.domains.index(domain) for domain in trace.domain])
    if not trace.prefill.any():
        raise EvidenceError("The trace has no prefill, from which the domain could be guessed. Record prompts too.")
    layers, classes = len(trace.layers), len(trace.domains)
    parts = [_split(code, np.random.default_rng(seed + split)) for split in range(splits)]
    log_probability = [np.zeros((len(test), classes)) for _, test in parts]
    right = np.zeros((splits, layers))
    for layer in range(layers):
        features = _features(trace.prefill[:, layer])
        for split, (train, test) in enumerate(parts):
            found = _log_softmax(features[test], _fit(features[train], code[train], classes))
            right[split, layer] = (found.argmax(axis=1) == code[test]).mean()
            log_probability[split] += found
    together = np.array(
        [(found.argmax(axis=1) == code[test]).mean() for found, (_, test) in zip(log_probability, parts, strict=True)]
    )
    return DomainGuess(
        domains=trace.domains,
        requests=trace.requests,
        splits=splits,
        chance=float(np.bincount(code).max() / len(code)),
        accuracy=float(together.mean()),
        deviation=float(together.std()),
        mean_layer=float(right.mean()),
        layer_deviation=float(right.mean(axis=0).std()),
        layers=tuple(
            LayerAccuracy(layer=layer, accuracy=float(right[:, at].mean()), deviation=float(right[:, at].std()))
            for at, layer in enumerate(trace.layers)
        ),
        left_out=left_out,
    )


def _usable(trace: RoutingTrace) -> tuple[RoutingTrace, tuple[str, ...]]:
    """Return the requests of domains that have enough of them, and the domains that have not."""
    trace = thinned(trace)
    counts = {domain: trace.domain.count(domain) for domain in trace.domains}
    left_out = tuple(domain for domain, count in counts.items() if count < FEWEST_OF_A_DOMAIN)
    kept = np.array([domain not in left_out for domain in trace.domain])
    if len(counts) - len(left_out) < 2 or kept.sum() < FEWEST_REQUESTS:
        have = ", ".join(f"{count} of {domain!r}" for domain, count in list(counts.items())[:5])
        raise EvidenceError(
            f"The domain cannot be guessed: that needs two domains of {FEWEST_OF_A_DOMAIN} requests each, and "
            f"{FEWEST_REQUESTS} requests in all; the trace has {have}{', ...' if len(counts) > 5 else ''}. Record more."
        )
    return trace.select(requests=kept), left_out


def _features(counts: np.ndarray) -> np.ndarray:
    """Return the root of every expert's share, [request, expert]: shares of few tokens spread with their root."""
    total = counts.sum(axis=-1, keepdims=True, dtype=np.float64)
    features: np.ndarray = np.sqrt(np.divide(counts, total, out=np.zeros(counts.shape), where=total > 0))
    return features


def _split(code: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return the requests to fit and those to judge on, a fifth of every domain."""
    test = []
    for domain in np.unique(code):
        members = random.permutation(np.flatnonzero(code == domain))
        test.append(members[: max(round(_TEST_SHARE * len(members)), 1)])
    chosen = np.sort(np.concatenate(test))
    return np.setdiff1d(np.arange(len(code)), chosen), chosen


def _fit(features: np.ndarray, code: np.ndarray, classes: int) -> np.ndarray:
    """Return the weights [features + 1, classes] with the least penalised log-loss; the last row is not penalised."""
    inputs = np.concatenate([features, np.ones((len(features), 1))], axis=1)
    target = np.eye(classes)[code]
    shape = (inputs.shape[1], classes)

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = flat.reshape(shape)
        logits = inputs @ weights
        normaliser = logsumexp(logits, axis=1, keepdims=True)
        gradient = inputs.T @ (np.exp(logits - normaliser) - target)
        gradient[:-1] += _PENALTY * weights[:-1]
        value = float((normaliser[:, 0] - (logits * target).sum(axis=1)).sum())
        return value + 0.5 * _PENALTY * float((weights[:-1] ** 2).sum()), gradient.ravel()

    found = minimize(loss, np.zeros(shape).ravel(), jac=True, method="L-BFGS-B", options=_OPTIONS)
    return np.asarray(found.x).reshape(shape)


def _log_softmax(features: np.ndarray, weights: np.ndarray) -> np.ndarray:
    logits = features @ weights[:-1] + weights[-1]
    normalised: np.ndarray = logits - logsumexp(logits, axis=1, keepdims=True)
    return normalised
