"""One layer's experts to devices with a fixed number of slots: a transportation problem, solved exactly.

Across layers, devices are balanced by one price per device and unit of load. What is priced is the load that a device
should be prepared for: its mean over requests plus some standard deviations of the mean of a batch, because the next
batch holds another mix of requests. `repair` swaps experts until the promise holds.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from scipy.optimize import linear_sum_assignment

_SWEEPS: Final[int] = 12
_STEP: Final[float] = 0.5  # of a price, relative to gain per load
_SWAPS: Final[int] = 400
_TRIED: Final[int] = 24  # swaps that are computed exactly, of those that look best


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Load:
    """What the devices carry under a placement; `weight` is its derivative by every expert's place."""

    expected: np.ndarray  # [device] tokens per request that a device should be prepared for
    mean: float  # over devices, tokens per request
    weight: np.ndarray  # [layer, device, expert]

    @property
    def ratio(self) -> np.ndarray:
        """The load to be prepared for over the mean load, [device]."""
        return np.asarray(self.expected / self.mean)


def place_by_gain(gain: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """Return the device of each expert [layer, expert] that maximises the sum of `gain` [layer, device, expert]."""
    rows = np.repeat(np.arange(len(slots)), slots)
    device = np.empty((gain.shape[0], gain.shape[2]), dtype=np.int64)
    for layer, worth in enumerate(gain):
        # Experts as rows: with equal slots as rows the same solver takes seven times as long.
        expert, slot = linear_sum_assignment(worth[rows].T, maximize=True)
        device[layer, expert] = rows[slot]
    return device


def carried(counts: np.ndarray, device: np.ndarray, devices: int) -> np.ndarray:
    """Return each request's tokens per device that serves them, [request, device], of [request, layer * expert]."""
    return np.asarray(counts @ (device.reshape(-1, 1) == np.arange(devices)).astype(counts.dtype))


def relative(served: np.ndarray) -> np.ndarray:
    """Return [request, device] without what all devices share: a longer request is no imbalance."""
    exact = served.astype(np.float64)
    return np.asarray(exact - exact.mean(axis=1, keepdims=True) + exact.mean())


def load_of(counts: np.ndarray, device: np.ndarray, devices: int, margin: float) -> Load:
    """Return the load of counts [request, layer * expert]; `margin` in standard deviations over requests."""
    served = relative(carried(counts, device, devices))
    mean, deviation = served.mean(axis=0), served.std(axis=0)
    weight = _weights(counts, served, margin).reshape(*device.shape, devices).transpose(0, 2, 1)
    return Load(expected=mean + margin * deviation, mean=float(mean.mean()), weight=weight)


def _weights(counts: np.ndarray, served: np.ndarray, margin: float) -> np.ndarray:
    """Return how the load to be prepared for grows with each expert's place on a device, [layer * expert, device]."""
    centred = served - served.mean(axis=0)
    slope = centred / np.maximum(centred.std(axis=0), 1e-9)
    means = counts.mean(axis=0, dtype=np.float64)[:, None]
    return np.asarray(means + margin * (counts.T @ slope.astype(counts.dtype)) / len(counts))


def places_under_load(
    gain: np.ndarray, counts: np.ndarray, slots: np.ndarray, *, max_load: float, margin: float = 0.0
) -> np.ndarray:
    """Return the device of each expert [layer, expert]: much gain, and no device above `max_load` x the mean.

    gain [layer, device, expert]; counts [request, layer * expert], whose mean and spread make the load. Where the cap
    cannot be held, devices are as near to it as swaps bring them.
    """
    layers, devices, experts = gain.shape
    prices = np.zeros(devices)
    weight = np.repeat(counts.mean(axis=0, dtype=np.float64).reshape(layers, 1, experts), devices, axis=1)
    step = _STEP * float(np.abs(gain).max(initial=0.0)) / max(float(weight.max()), 1e-12)
    best: tuple[float, np.ndarray] | None = None
    device = place_by_gain(gain, slots)
    for sweep in range(_SWEEPS):
        load = load_of(counts, device, devices, margin)
        repair = Repair(gain, counts, device, margin)
        if repair.run(max_load):
            value = float(np.take_along_axis(gain, repair.device[:, None], axis=1).sum())
            best = (value, repair.device) if best is None or value > best[0] else best
        if sweep == 0 and load.ratio.max() <= max_load:
            break  # without a price the best is within the cap
        weight = load.weight
        prices = np.maximum(prices + step / (1 + sweep / 4) * (load.ratio - max_load), 0.0)
        device = place_by_gain(gain - prices[None, :, None] * weight, slots)
    return repair.device if best is None else best[1]


class Repair:
    """Swaps two experts of one layer at a time, until no device is expected to carry more than `most` x the mean."""

    def __init__(self, gain: np.ndarray, counts: np.ndarray, device: np.ndarray, margin: float) -> None:
        self.gain, self.counts, self.margin = gain, counts, margin
        self.device = device.copy()
        self.devices = gain.shape[1]
        self.served = relative(carried(counts, device, self.devices))
        self.weight = load_of(counts, device, self.devices, margin).weight.copy()

    def run(self, most: float) -> bool:
        """Swap; return whether the promise holds. Every swap lowers the load of the busiest device."""
        for _ in range(_SWAPS):
            load = self._load(self.served)
            busiest, limit = int(load.argmax()), most * float(self.served.mean())
            if load[busiest] <= limit:
                return True
            if not self._swap_off(busiest, load, limit):
                return False
        return False

    def _load(self, served: np.ndarray) -> np.ndarray:
        return np.asarray(served.mean(axis=0) + self.margin * served.std(axis=0))

    def _swap_off(self, busiest: int, load: np.ndarray, limit: float) -> bool:
        """Make the swap that costs least gain per load taken off the busiest device; return whether there is one."""
        layers, experts = self.device.shape
        rows = np.arange(layers)[:, None, None]
        on = self.device == busiest
        mine = np.nonzero(on)[1].reshape(layers, -1, 1)
        others = np.nonzero(~on)[1].reshape(layers, 1, experts - mine.shape[1])
        there = self.device[rows, others]
        falls = self.weight[rows, busiest, mine] - self.weight[rows, busiest, others]
        rises = self.weight[rows, there, mine] - self.weight[rows, there, others]
        loss = self.gain[rows, busiest, mine] + self.gain[rows, there, others]
        loss = loss - self.gain[rows, there, mine] - self.gain[rows, busiest, others]
        helps = (falls > 0) & (load[there] + rises < np.maximum(limit, load[busiest] - falls))
        needed = np.maximum(np.minimum(falls, load[busiest] - limit), 1e-12)
        price = np.where(helps, loss / needed, np.inf).ravel()
        tried = min(_TRIED, price.size)
        best = np.argpartition(price, tried - 1)[:tried]
        for at in best[np.argsort(price[best])]:
            if not np.isfinite(price[at]):
                return False
            layer, i, j = np.unravel_index(at, loss.shape)
            swap = (int(layer), int(mine[layer, i, 0]), int(others[layer, 0, j]))
            if self._swap(swap, busiest, float(load[busiest])):
                return True
        return False

    def _swap(self, swap: tuple[int, int, int], busiest: int, load: float) -> bool:
        """Swap (layer, expert of the busiest, another expert) if both devices end below `load`."""
        layer, mine, other = swap
        there = int(self.device[layer, other])
        first = layer * self.device.shape[1]
        moved = self.counts[:, first + mine].astype(np.float64) - self.counts[:, first + other]
        after = self.served[:, [busiest, there]] + np.stack([-moved, moved], axis=1)
        if self._load(after).max() >= load * (1 - 1e-9):
            return False
        self.device[layer, mine], self.device[layer, other] = there, busiest
        self.served[:, [busiest, there]] = after
        fresh = _weights(self.counts, after, self.margin).reshape(*self.device.shape, 2)
        self.weight[:, busiest], self.weight[:, there] = fresh[..., 0], fresh[..., 1]
        return True
