"""Requests to devices: equal groups by an assignment problem, the paper's clusters, and requests as they arrive.

A request is served where its score is highest, as far as group sizes allow: they stay within a slack of equal. Many
requests at once are an exact assignment problem; a stream is a row of such problems, one per window, each of which
knows how many requests every device already has.
"""

from typing import Final

import numpy as np
from scipy.optimize import linear_sum_assignment

from loka.errors import ArgumentError

SLACK: Final[float] = 0.10  # of group sizes, around equal
_PASSES: Final[int] = 50  # of K-means
_SCALINGS: Final[int] = 40  # of likely groups to equal sizes
_SAME: Final[float] = 1e-6  # squared distance of points of length one that float32 cannot tell apart


def size_limits(requests: int, devices: int, slack: float = SLACK) -> tuple[np.ndarray, np.ndarray]:
    """Return the fewest and most requests per device, [device]: equal within `slack`, or as equal as can be."""
    equal = requests / devices
    low = min(int(np.ceil(equal * (1 - slack) - 1e-9)), requests // devices)
    high = max(int(np.floor(equal * (1 + slack) + 1e-9)), -(-requests // devices))
    return np.full(devices, low), np.full(devices, high)


def assign(scores: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Return the device of each request that maximises the sum of `scores` [request, device] within the sizes.

    Exact (a linear assignment problem over places). Raises ArgumentError when the sizes do not fit the requests.
    """
    requests, devices = scores.shape
    if low.sum() > requests or high.sum() < requests or (low > high).any():
        raise ArgumentError(f"{requests} requests do not fit into groups of {low.tolist()} to {high.tolist()}.")
    if requests == 0:
        return np.empty(0, dtype=np.int64)
    # A place that must be taken is worth more than every score together.
    bonus = requests * (float(np.ptp(scores)) + 1.0)
    device = np.concatenate([np.repeat(np.arange(devices), low), np.repeat(np.arange(devices), high - low)])
    worth = scores[:, device]
    worth[:, : int(low.sum())] += bonus
    _, places = linear_sum_assignment(worth, maximize=True)
    return np.asarray(device[places])


def assign_equal(scores: np.ndarray, slack: float = SLACK) -> np.ndarray:
    """Return the best device of each request with group sizes equal within `slack`."""
    return assign(scores, *size_limits(len(scores), scores.shape[1], slack))


def likely_groups(scores: np.ndarray, doubt: float) -> np.ndarray:
    """Return how likely each request is served by each device [request, device], when scores err by about `doubt`.

    Shares of exp(score / doubt), every device as many requests in all (Sinkhorn's scaling). No doubt: the best device.
    """
    devices = scores.shape[1]
    if doubt <= 0:
        return np.asarray(np.eye(devices)[assign_equal(scores, 0.0)])
    logits = (scores - scores.max(axis=1, keepdims=True)) / doubt
    price = np.zeros(devices)
    for _ in range(_SCALINGS):
        likely = np.exp(logits - price - (logits - price).max(axis=1, keepdims=True))
        likely /= likely.sum(axis=1, keepdims=True)
        price += np.log(np.maximum(likely.mean(axis=0) * devices, _SAME))
    return np.asarray(likely)


def assign_arriving(scores: np.ndarray, window: int, slack: float = SLACK) -> np.ndarray:
    """Return a device for each request of a stream; sizes stay within `slack` of equal at the end of every window.

    `window` requests are decided together, without those that come later; 1 is one by one. Within the rounding of a
    small window, a device may be one request off.
    """
    if window < 1:
        raise ArgumentError(f"A window of {window} requests decides nothing. Give a number from 1.")
    requests, devices = scores.shape
    counts = np.zeros(devices, dtype=np.int64)
    groups = np.empty(requests, dtype=np.int64)
    for start in range(0, requests, window):
        part = scores[start : start + window]
        low, high = size_limits(start + len(part), devices, slack)
        groups[start : start + window] = assign(part, *_left(counts, low, high, len(part)))
        counts = np.bincount(groups[: start + len(part)], minlength=devices)
    return groups


def _left(counts: np.ndarray, low: np.ndarray, high: np.ndarray, coming: int) -> tuple[np.ndarray, np.ndarray]:
    """Return what a window may add: within the limits, or as near to them as so few requests come."""
    most = np.maximum(high - counts, 0)
    least = np.maximum(low - counts, 0)
    while least.sum() > coming:  # serve the devices that lag most
        least[least.argmax()] -= 1
    while most.sum() < coming:
        most[(counts + most).argmin()] += 1
    return least, np.maximum(most, least)


def arrival_groups(requests: int, devices: int) -> np.ndarray:
    """Return devices in turn: what serves requests without looking at them."""
    return np.arange(requests) % devices


def nearest_groups(scores: np.ndarray) -> np.ndarray:
    """Return the device with the highest score per request; equal scores (shared centroids) are served in turn."""
    groups = np.asarray(scores.argmax(axis=1))
    counts = np.zeros(scores.shape[1], dtype=np.int64)
    best = scores >= scores.max(axis=1, keepdims=True) - 1e-9 * np.abs(scores).max(initial=1.0)
    for at, tied in enumerate(best):
        if tied.sum() > 1:
            groups[at] = min(np.flatnonzero(tied), key=lambda device: counts[device])
        counts[groups[at]] += 1
    return groups


def normalised(counts: np.ndarray) -> np.ndarray:
    """Return requests' counts as vectors of length one, [request, everything else] float32; zeros stay zeros."""
    flat = counts.reshape(len(counts), -1).astype(np.float32)
    length = np.linalg.norm(flat, axis=1, keepdims=True)
    return np.asarray(flat / np.where(length > 0, length, 1))


def clusters_of(points: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """Return the K-means cluster of each point, numbered without gaps (k-means++ starts, a fixed seed, Lloyd's steps).

    Fewer clusters than asked for where there are fewer distinct points.
    """
    rng = np.random.default_rng(seed)
    centres = [points[rng.integers(len(points))]]
    nearest = _distances(points, centres[0][None])[:, 0]
    while len(centres) < clusters and nearest.max() > _SAME:
        centres.append(points[rng.choice(len(points), p=nearest / nearest.sum())])
        nearest = np.minimum(nearest, _distances(points, centres[-1][None])[:, 0])
    middles = np.stack(centres)
    labels = _distances(points, middles).argmin(axis=1)
    for _ in range(_PASSES):
        labels = np.unique(labels, return_inverse=True)[1].reshape(-1)  # a cluster that lost its points is gone
        middles = np.stack([points[labels == label].mean(axis=0) for label in range(int(labels.max()) + 1)])
        moved = _distances(points, middles).argmin(axis=1)
        if np.array_equal(moved, labels):
            break
        labels = moved
    return np.unique(labels, return_inverse=True)[1].reshape(-1)


def _distances(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Return squared distances [point, centre], float64 and not below zero."""
    squares = (points**2).sum(axis=1, dtype=np.float64)[:, None] + (centres**2).sum(axis=1, dtype=np.float64)
    return np.asarray(np.maximum(squares - 2.0 * (points @ centres.T), 0.0))


def paper_groups(
    decode: np.ndarray, devices: int, *, clusters: int | None = None, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return the paper's groups: the device of each request [request], and the cluster of each device [device].

    K-means on L2-normalised decode counts. K = D: one to one. K < D: large clusters get several devices (largest
    remainder by size), their requests in turn. K > D: a second K-means on the clusters' summed counts. Sizes are what
    they are. Source: arXiv 2604.23150, section 4.1.
    """
    labels = clusters_of(normalised(decode), clusters or devices, seed)
    found = int(labels.max()) + 1
    if found > devices:
        sums = np.stack([decode[labels == label].sum(axis=0, dtype=np.float64) for label in range(found)])
        labels = clusters_of(normalised(sums), devices, seed)[labels]
        found = int(labels.max()) + 1
    shares = _shares(np.bincount(labels, minlength=found), devices)
    first, groups = np.cumsum(shares) - shares, np.empty(len(labels), dtype=np.int64)
    for label, share in enumerate(shares):
        members = np.flatnonzero(labels == label)
        groups[members] = first[label] + np.arange(len(members)) % share
    return groups, np.repeat(np.arange(found), shares)


def _shares(sizes: np.ndarray, devices: int) -> np.ndarray:
    """Return how many devices each cluster gets: one each, the rest to where most requests wait per device."""
    shares = np.ones(len(sizes), dtype=np.int64)
    for _ in range(devices - len(sizes)):
        shares[(sizes / shares).argmax()] += 1
    return shares
