"""What a request will decode, told from its prefill; and a trace's own counts, freed of their noise.

Decode counts of one request are sparse. Fitted to as they are, a placement remembers its trace and fails on the next.
So what is fitted to are predictions: ridge regression from prefill shares (known before a request is placed) for
grouping, and from the decode shares themselves for placing, each request predicted without itself (leave-one-out, in
closed form). How strongly to shrink is chosen by the same leave-one-out error; nothing outside the trace is looked at.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np

from loka.dispatch.placement.usage import fractions, typical_shares

STRENGTHS: Final[tuple[float, ...]] = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4)  # ridge, relative to the mean variance
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
    blocks = (share, root, share @ decode_share.T, root @ decode_root.T)
    kernels = [_kernel(block) for block in blocks]
    known, dual = _leave_one_out(np.sum([kernel for kernel, _ in kernels], axis=0), counts)
    cleaned, _ = _leave_one_out(2.0 * (_kernel(decode_share)[0] + _kernel(decode_root)[0]), counts)
    regression = Regression(
        share=share,
        root=root,
        decode_share=decode_share,
        decode_root=decode_root,
        centre=(shares.mean(axis=0), np.sqrt(shares).mean(axis=0)),
        scales=tuple(scale for _, scale in kernels),
        dual=dual,
        mean=counts.mean(axis=0),
    )
    return Smoothed(known=known, cleaned=cleaned, typical=typical, regression=regression)


def _centred(values: np.ndarray) -> np.ndarray:
    return np.asarray(values - values.mean(axis=0))


def _kernel(block: np.ndarray) -> tuple[np.ndarray, float]:
    """Return a quarter of the block's kernel, its mean variance made one, and the factor that did it."""
    kernel = (block @ block.T).astype(np.float64)
    variance = np.trace(kernel) / len(kernel)
    scale = 0.25 / variance if variance > 1e-12 else 0.0
    return kernel * scale, scale


def _leave_one_out(kernel: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each request's counts predicted from the others, and the dual weights, at the best strength."""
    mean = counts.mean(axis=0)
    if len(counts) < _FEWEST or not kernel.any():
        return np.broadcast_to(mean, counts.shape).copy(), np.zeros_like(counts)
    centred = counts - mean
    values, vectors = np.linalg.eigh(kernel)
    values = np.maximum(values, 0.0)
    gram = (centred @ centred.T).astype(np.float64)
    strength = min(STRENGTHS, key=lambda each: _error(_left_out(values, vectors, each), gram))
    operator = np.eye(len(counts)) - _left_out(values, vectors, strength)
    dual = (vectors / (values + strength)) @ vectors.T
    return mean + operator.astype(np.float32) @ centred, dual.astype(np.float32) @ centred


def _left_out(values: np.ndarray, vectors: np.ndarray, strength: float) -> np.ndarray:
    """Return the operator whose rows give each request's error when it is predicted from the others."""
    hat = (vectors * (values / (values + strength))) @ vectors.T
    return np.asarray((np.eye(len(hat)) - hat) / np.maximum(1.0 - np.diag(hat), 1e-6)[:, None])


def _error(residual: np.ndarray, gram: np.ndarray) -> float:
    return float(np.einsum("ij,jk,ik->", residual, gram, residual, optimize=True))
