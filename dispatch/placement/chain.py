"""Tokens that stay: where a token goes on from the device of its last expert, instead of back to its request's device.

Then what costs is a hop between the devices of consecutive layers' experts, and experts used one after the other belong
together. A trace of counts does not hold which expert followed which; it is taken from what each request used in both
layers, as if its tokens chose independently. Requests differ enough in what they use for that to say something.
"""

from typing import Final

import numpy as np

from loka.dispatch.placement.transport import Repair, load_of, place_by_gain
from loka.dispatch.placement.usage import chunks

_ROUNDS: Final[int] = 12
_STEP: Final[float] = 0.5


def transitions(decode: np.ndarray) -> np.ndarray:
    """Return expected tokens [layer, expert, next expert] of counts [request, layer, expert], from a layer to the next.

    A request with t tokens in a layer and u in the next sends min(t, u) of them on.
    """
    layers, experts = decode.shape[1:]
    result = np.zeros((layers - 1, experts, experts))
    for part in chunks(len(decode)):
        counts = decode[part].astype(np.float64)
        total = counts.sum(axis=2)
        shares = counts / np.maximum(total, 1)[:, :, None]
        passed = np.minimum(total[:, :-1], total[:, 1:])
        for layer in range(layers - 1):
            result[layer] += (shares[:, layer] * passed[:, layer, None]).T @ shares[:, layer + 1]
    return result


def hops(passed: np.ndarray, device: np.ndarray) -> float:
    """Return the tokens that change device between layers: `passed` [layer, expert, next], places [layer, expert]."""
    away = device[:-1, :, None] != device[1:, None, :]
    return float((passed * away).sum())


def chained_places(
    decode: np.ndarray, slots: np.ndarray, *, max_load: float = 1.2, start: np.ndarray | None = None
) -> np.ndarray:
    """Return places [layer, expert] with few hops and no device above `max_load` x the mean load in total.

    Each layer in turn is placed exactly, given its neighbours (a transportation problem), until nothing changes. It
    ends at a local optimum: give a `start` that is good otherwise, else experts start in order.
    """
    layers, experts = decode.shape[1:]
    devices = len(slots)
    passed = transitions(decode)
    counts = decode.sum(axis=0, dtype=np.float64).reshape(1, -1).astype(np.float32)
    device = np.tile(np.repeat(np.arange(devices), slots), (layers, 1)) if start is None else start.copy()
    prices = np.zeros(devices)
    tokens = counts.reshape(layers, experts).astype(np.float64)
    best = device
    for at in range(_ROUNDS):
        before = device.copy()
        for layer in range(layers):
            gain = _gain(passed, device, layer, devices) - prices[:, None] * tokens[layer]
            device[layer] = place_by_gain(gain[None], slots)[0]
        mended = _mended(passed, counts, device, max_load)
        if at == 0 or hops(passed, mended) < hops(passed, best):
            best = mended
        if np.array_equal(before, device):
            break
        ratio = load_of(counts, device, devices, 0.0).ratio
        prices = np.maximum(prices + _STEP / (1 + at) * (ratio - max_load), 0.0)
    return best


def _gain(passed: np.ndarray, device: np.ndarray, layer: int, devices: int) -> np.ndarray:
    """Return the tokens that need no hop when an expert of a layer is on a device, [device, expert]."""
    gain = np.zeros((devices, device.shape[1]))
    if layer > 0:
        np.add.at(gain, device[layer - 1], passed[layer - 1])
    if layer + 1 < len(device):
        np.add.at(gain, device[layer + 1], passed[layer].T)
    return gain


def _mended(passed: np.ndarray, counts: np.ndarray, device: np.ndarray, max_load: float) -> np.ndarray:
    """Return the places after the swaps that bring the load below the cap, neighbours taken as they are."""
    devices = int(device.max()) + 1
    gain = np.stack([_gain(passed, device, layer, devices) for layer in range(len(device))])
    repair = Repair(gain, counts, device, 0.0)
    repair.run(max_load)
    return repair.device
