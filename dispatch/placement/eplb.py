"""EPLB, the expert-parallel load balancer that DeepSeek published with DeepSeek-V3, from its description.

The heaviest expert gets the next replica, until all slots are taken; then experts, heaviest first, go to the device
with the least load that still has room. With several nodes and expert groups the same happens in three steps: groups to
nodes, replicas within a node, replicas to devices. Arguments and results have the form of the published
`rebalance_experts`: [layers, ...] arrays, -1 where there is nothing.
"""

from dataclasses import dataclass

import numpy as np

from loka.errors import ArgumentError


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertMaps:
    """EPLB's own form of a placement; slot s is on device s // (slots / devices). -1 fills what has no entry."""

    physical_to_logical: np.ndarray  # [layer, slot]
    logical_to_physical: np.ndarray  # [layer, expert, most replicas]
    logical_count: np.ndarray  # [layer, expert]


def balanced_packing(weight: np.ndarray, capacity: np.ndarray) -> np.ndarray:
    """Return the pack of each item, for one layer: heaviest first, to the lightest pack with room. [item], [pack]."""
    loads, left = np.zeros(len(capacity)), capacity.copy()
    packs = np.empty(len(weight), dtype=np.int64)
    for item in np.argsort(-weight, kind="stable"):
        pack = int(np.where(left > 0, loads, np.inf).argmin())
        packs[item], loads[pack], left[pack] = pack, loads[pack] + weight[item], left[pack] - 1
    return packs


def replicate(weight: np.ndarray, slots: int, most: int) -> np.ndarray:
    """Return the expert in each slot, for one layer: every expert once, then the one with most load per replica.

    `most` replicas of one expert at most (more than devices would put two on one).
    """
    counts = np.ones(len(weight), dtype=np.int64)
    experts = list(range(len(weight)))
    for _ in range(slots - len(weight)):
        expert = int(np.where(counts < most, weight / counts, -np.inf).argmax())
        experts.append(expert)
        counts[expert] += 1
    return np.array(experts)


def eplb_hosts(load: np.ndarray, capacity: np.ndarray, *, nodes: int = 1, groups: int = 1) -> np.ndarray:
    """Return `hosts` [layer, device, expert] for loads [layer, expert] and slots per device [device].

    Hierarchical where expert groups and devices divide evenly over the nodes, as published; global elsewhere. Two
    replicas that land on one device are one: a device serves its tokens from one copy.
    """
    layers, experts = load.shape
    devices = len(capacity)
    hosts = np.zeros((layers, devices, experts), dtype=bool)
    even = len(set(capacity.tolist())) == 1 and devices % nodes == 0
    hierarchical = nodes > 1 and groups % nodes == 0 and experts % groups == 0 and even
    for layer in range(layers):
        parts = [(np.arange(experts), np.arange(devices))]
        if hierarchical:
            parts = _node_parts(load[layer], groups, nodes, devices)
        for members, on in parts:
            weight = load[layer, members]
            filled = replicate(weight, int(capacity[on].sum()), len(on))
            copies = np.bincount(filled, minlength=len(members))
            packs = balanced_packing(weight[filled] / copies[filled], capacity[on])
            hosts[layer, on[packs], members[filled]] = True
    return hosts


def _node_parts(load: np.ndarray, groups: int, nodes: int, devices: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (experts, devices) of each node, whole expert groups packed to nodes by load."""
    size = len(load) // groups
    node = balanced_packing(load.reshape(groups, size).sum(axis=1), np.full(nodes, groups // nodes))
    experts = np.arange(len(load)).reshape(groups, size)
    per_node = devices // nodes
    return [(experts[node == at].ravel(), np.arange(at * per_node, (at + 1) * per_node)) for at in range(nodes)]


def to_maps(hosts: np.ndarray) -> ExpertMaps:
    """Return EPLB's arrays of `hosts` [layer, device, expert]."""
    layers, devices, experts = hosts.shape
    width = int(hosts.sum(axis=2).max())
    counts = hosts.sum(axis=1)
    physical = np.full((layers, devices * width), -1, dtype=np.int64)
    logical = np.full((layers, experts, int(counts.max())), -1, dtype=np.int64)
    seen = np.zeros((layers, experts), dtype=np.int64)
    for layer, device in np.ndindex(layers, devices):
        held = np.flatnonzero(hosts[layer, device])
        slots = device * width + np.arange(len(held))
        physical[layer, slots] = held
        logical[layer, held, seen[layer, held]] = slots
        seen[layer, held] += 1
    return ExpertMaps(physical_to_logical=physical, logical_to_physical=logical, logical_count=counts)


def from_maps(physical_to_logical: np.ndarray, devices: int, experts: int) -> np.ndarray:
    """Return `hosts` of EPLB's physical_to_logical [layer, slot]; raise ArgumentError where it is no placement."""
    physical = np.asarray(physical_to_logical)
    if physical.ndim != 2 or physical.dtype.kind not in "iu" or devices < 1 or physical.shape[1] % devices:
        raise ArgumentError(
            f"physical_to_logical of shape {physical.shape} and type {physical.dtype} is no placement on {devices} "
            "devices. Give integers [layer, slot], with as many slots on each device."
        )
    if physical.size and (physical.min() < -1 or physical.max() >= experts):
        raise ArgumentError(
            f"physical_to_logical goes from {physical.min()} to {physical.max()}; experts are 0 to {experts - 1}, and "
            "-1 is an empty slot."
        )
    hosts = np.zeros((len(physical), devices, experts), dtype=bool)
    width = physical.shape[1] // devices
    layer, slot = np.nonzero(physical >= 0)
    hosts[layer, slot // width, physical[layer, slot]] = True
    if not hosts.any(axis=1).all():
        layer, expert = np.argwhere(~hosts.any(axis=1))[0]
        raise ArgumentError(f"Expert {expert} is on no device in row {layer} of physical_to_logical. Place each once.")
    return hosts
