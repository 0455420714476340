"""What a request will decode, told from its prefill; and a trace's own counts, freed of their noise.

Decode counts of one request are sparse. Fitted to as they are, a placement remembers its trace and fails on the next.
So what is fitted to are predictions: ridge regression from prefill shares (known before a request is placed) for
grouping, and from the decode shares themselves for placing, each request predicted without itself (leave-one-out, in
closed form). How strongly to shrink, and how far prefills are compared as they are or through what the trace's requests
decoded (a prefill is a few tokens), is chosen by the same leave-one-out error; nothing outside the trace is looked at.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np

from loka.dispatch.placement.usage import fractions, typical_shares

STRENGTHS: Final[tuple[float, ...]] = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4)  # ridge, relative to the mean variance
DIRECT: Final[tuple[float, ...]] = (0.25, 0.1, 0.0)  # part of each of two kernels that compare prefills as they are
_FEWEST: Final[int] = 3  # requests from which leaving one out still says something


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Smoothed:
    """Predicted decode counts [request, layer * expert] float32, and the regression behind them."""

    known: np.ndarray  # from the prefill of the request alone
    cleaned: np.ndarray  # from its decode, seen through that of the others
    typical: np.ndarray  # prefill shares per [layer, expert]
    regression: "Regression"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Regression:
    """Ridge regression from prefill shares and their roots, kept in the form of its training requests."""

    share: np.ndarray  # [request, feature], centred
    root: np.ndarray
    decode_share: np.ndarray
    decode_root: np.ndarray
    centre: tuple[np.ndarray, np.ndarray]  # of share and root, [feature]
    scales: tuple[float, ...]  # of the four kernels
    dual: np.ndarray  # [request, feature]
    mean: np.ndarray  # decode counts, [feature]

    def weights(self, hosted: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return what turns prefill into expected tokens for `hosted` [device, feature], a share of each expert's.

        The weights on shares and on roots of shares, [device, feature], and a constant [device].
        """
        dual = hosted @ self.dual.T
        first, second, third, fourth = self.scales
        share = (dual @ self.share) * first + ((dual @ (self.share @ self.decode_share.T)) @ self.decode_share) * third
        root = (dual @ self.root) * second + ((dual @ (self.root @ self.decode_root.T)) @ self.decode_root) * fourth
        constant = hosted @ self.mean - share @ self.centre[0] - root @ self.centre[1]
        return share, root, constant


def smooth(prefill: np.ndarray, decode: np.ndarray) -> Smoothed:
    """Return what is known of requests with these counts [request, layer, expert]."""
    typical = typical_shares(prefill)
    shares = fractions(prefill, typical)
    decode_shares = fractions(decode, typical_shares(decode))
    counts = decode.reshape(len(decode), -1).astype(np.float32)
    share, root, decode_share, decode_root = (
        _centred(part) for part in (shares, np.sqrt(shares), decode_shares, np.sqrt(decode_shares))
    )
    kernels = [_kernel(block) for block in (share, root, share @ decode_share.T, root @ decode_root.T)]
    centred = _centred(counts)
    gram = (centred @ centred.T).astype(np.float64)
    mixes = [(direct, direct, 0.5 - direct, 0.5 - direct) for direct in DIRECT]
    ridges = [_ridge([part * kernel for part, (kernel, _) in zip(mix, kernels, strict=True)], gram) for mix in mixes]
    ridge, mix = min(zip(ridges, mixes, strict=True), key=lambda pair: pair[0].error)
    known, dual = _leave_one_out(ridge, counts)
    cleaned, _ = _leave_one_out(_ridge([0.5 * _kernel(part)[0] for part in (decode_share, decode_root)], gram), counts)
    regression = Regression(
        share=share,
        root=root,
        decode_share=decode_share,
        decode_root=decode_root,
        centre=(shares.mean(axis=0), np.sqrt(shares).mean(axis=0)),
        scales=tuple(part * scale for part, (_, scale) in zip(mix, kernels, strict=True)),
        dual=dual,
        mean=counts.mean(axis=0),
    )
    return Smoothed(known=known, cleaned=cleaned, typical=typical, regression=regression)


def _centred(values: np.ndarray) -> np.ndarray:
    return np.asarray(values - values.mean(axis=0))


def _kernel(block: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the block's kernel, its mean variance made one, and the factor that did it."""
    kernel = (block @ block.T).astype(np.float64)
    variance = np.trace(kernel) / len(kernel)
    scale = 1.0 / variance if variance > 1e-12 else 0.0
    return kernel * scale, scale


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Ridge:
    """A kernel's eigenvalues and eigenvectors, and the strength whose error is least when each request is left out."""

    values: np.ndarray
    vectors: np.ndarray
    strength: float
    error: float


def _ridge(kernels: list[np.ndarray], gram: np.ndarray) -> _Ridge:
    """Return the ridge of a sum of kernels, for counts whose centred products are `gram` [request, request]."""
    values, vectors = np.linalg.eigh(np.sum(kernels, axis=0))
    values = np.maximum(values, 0.0)
    errors = [_error(_left_out(values, vectors, each), gram) for each in STRENGTHS]
    best = int(np.argmin(errors))
    return _Ridge(values=values, vectors=vectors, strength=STRENGTHS[best], error=errors[best])


def _leave_one_out(ridge: _Ridge, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each request's counts predicted from the others, and the dual weights."""
    mean = counts.mean(axis=0)
    if len(counts) < _FEWEST or not ridge.values.any():
        return np.broadcast_to(mean, counts.shape).copy(), np.zeros_like(counts)
    operator = np.eye(len(counts)) - _left_out(ridge.values, ridge.vectors, ridge.strength)
    dual = (ridge.vectors / (ridge.values + ridge.strength)) @ ridge.vectors.T
    centred = counts - mean
    return mean + operator.astype(np.float32) @ centred, dual.astype(np.float32) @ centred


def _left_out(values: np.ndarray, vectors: np.ndarray, strength: float) -> np.ndarray:
    """Return the operator, on centred counts, whose rows give each request's error when the others predict it.

    A request also has its share of the mean that was taken off, 1 / requests; without it the error of a weak ridge
    would come out as zero.
    """
    hat = (vectors * (values / (values + strength))) @ vectors.T
    own = 1.0 / len(hat) + np.diag(hat)
    return np.asarray((np.eye(len(hat)) - hat) / np.maximum(1.0 - own, 1e-6)[:, None])


def _error(residual: np.ndarray, gram: np.ndarray) -> float:
    return float(np.einsum("ij,jk,ik->", residual, gram, residual, optimize=True))
