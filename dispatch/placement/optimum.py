"""The best placement there is, for small cases: a mixed-integer program that every heuristic can be held against."""

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from loka.errors import ArgumentError

_MOST: int = 20_000  # binary variables; more take hours


def optimal_places(
    gain: np.ndarray, load: np.ndarray, slots: np.ndarray, *, max_load: float, seconds: float = 60.0
) -> np.ndarray:
    """Return the device of each expert [layer, expert] with the largest sum of `gain` [layer, device, expert].

    Each device holds `slots` experts per layer and serves, of `load` [layer, expert] in total over layers, at most
    `max_load` x the mean. Raises ArgumentError when that is impossible, too large, or not proven in `seconds`.
    """
    layers, devices, experts = gain.shape
    if gain.size > _MOST:
        raise ArgumentError(f"{gain.size:,} choices are too many to prove an optimum for; at most {_MOST:,}.")
    index = np.arange(gain.size).reshape(gain.shape)
    once = _rows([index[layer, :, expert] for layer in range(layers) for expert in range(experts)], gain.size)
    room = _rows([index[layer, device] for layer in range(layers) for device in range(devices)], gain.size)
    carried = sparse.csr_array(
        (
            np.repeat(load[:, None], devices, axis=1).transpose(1, 0, 2).ravel().astype(np.float64),
            (np.repeat(np.arange(devices), layers * experts), index.transpose(1, 0, 2).ravel()),
        ),
        shape=(devices, gain.size),
    )
    constraints = [
        LinearConstraint(once, 1, 1),
        LinearConstraint(room, np.tile(slots, layers), np.tile(slots, layers)),
        LinearConstraint(carried, 0, max_load * load.sum() / devices),
    ]
    found = milp(
        -gain.ravel(),
        integrality=np.ones(gain.size),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"time_limit": seconds, "mip_rel_gap": 1e-6},
    )
    if not found.success:
        raise ArgumentError(f"No optimum was proven: {found.message} Allow more load, or more seconds.")
    return np.asarray(found.x.reshape(gain.shape).argmax(axis=1))


def _rows(groups: list[np.ndarray], size: int) -> sparse.csr_array:
    """Return one row per group of variables, with ones at its members."""
    lengths = [len(group) for group in groups]
    rows = np.repeat(np.arange(len(groups)), lengths)
    return sparse.csr_array((np.ones(sum(lengths)), (rows, np.concatenate(groups))), shape=(len(groups), size))
