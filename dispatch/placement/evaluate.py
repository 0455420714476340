"""What a placement costs on a trace: bytes between devices, the busiest link, and how evenly devices work.

Requests are sent to devices as they would be when served: from their prefill alone, in order of arrival. What is then
counted is the decode of the same requests. A (token, expert) pair is one message; with several experts per token some
of them could travel together, so for top-k > 1 the bytes are an upper bound.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from loka.dispatch.placement.place import WINDOW
from loka.dispatch.placement.record import METHODS, Placement
from loka.dispatch.placement.signature import groups_of
from loka.dispatch.placement.usage import group_use, only_layers
from loka.errors import ArgumentError
from loka.probes.routing.trace import RoutingTrace

SCHEMA: Final[int] = 1
ELEMENT_BYTES: Final[int] = 2  # bf16


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodCost:
    """One method on one trace; bytes are those of the dispatch, and combining moves as many."""

    bytes: int
    busiest: int  # of each layer's busiest device, sent or received, summed over layers
    imbalance: float  # most tokens of a device over the mean, in total over layers
    layer_imbalance: float  # the same within a layer, mean over layers
    node_bytes: int  # between nodes
    group_sizes: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """A placement judged on a trace."""

    devices: int
    layers: tuple[int, ...]
    requests: int
    methods: Mapping[str, MethodCost]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return schema 1: one entry per method under each measure."""
        measures = ("bytes", "busiest", "imbalance", "layer_imbalance", "node_bytes", "group_sizes")
        costs = {measure: {name: getattr(self.methods[name], measure) for name in METHODS} for measure in measures}
        head = {"schema": SCHEMA, "devices": self.devices, "layers": list(self.layers)}
        costs["group_sizes"] = {name: list(sizes) for name, sizes in costs["group_sizes"].items()}
        return head | costs | {"requests": self.requests, "notes": list(self.notes)}


def evaluate(
    placement: Placement,
    trace: RoutingTrace,
    *,
    window: int | None = None,
    hidden_size: int | None = None,
    element_bytes: int = ELEMENT_BYTES,
) -> Evaluation:
    """Judge every method of a placement on the decode of a trace.

    `window`: requests decided together on arrival, 128 per device by default (1: one by one). Raises ArgumentError when
    the trace is not of this model.
    """
    missing = [layer for layer in placement.layers if layer not in trace.layers]
    if missing or trace.experts != placement.experts:
        raise ArgumentError(
            f"This placement is of {placement.experts} experts in layers {list(placement.layers)[:8]}; the trace has "
            f"{trace.experts} experts{f' and no layers {missing[:5]}' if missing else ''}. Give a trace of the same "
            "model."
        )
    used = only_layers(trace, placement.layers)
    hidden = hidden_size or trace.hidden_size or placement.hidden_size
    notes = [] if hidden else ["the trace names no hidden size: bytes are those of one element per token"]
    if not used.decode.any():
        raise ArgumentError("This trace has no decode tokens in the layers of the placement. Trace generation too.")
    together = WINDOW * placement.devices if window is None else window
    costs = {name: _cost(placement, name, used, together, (hidden or 1) * element_bytes) for name in METHODS}
    return Evaluation(
        devices=placement.devices,
        layers=placement.layers,
        requests=trace.requests,
        methods=costs,
        notes=(*placement.notes, *notes),
    )


def _cost(placement: Placement, name: str, trace: RoutingTrace, window: int, token_bytes: int) -> MethodCost:
    devices, hosts = placement.devices, placement.hosts(name)
    signature = placement.method(name).signature
    groups = groups_of(signature, trace.prefill, devices, window=window, slack=placement.slack)
    flows = flow(group_use(trace.decode, groups, devices), hosts, nodes=placement.nodes)
    moved = flows * (1 - np.eye(devices))
    node = np.arange(devices) // (devices // placement.nodes)
    served = flows.sum(axis=1)  # [layer, device]
    busiest = np.maximum(moved.sum(axis=1), moved.sum(axis=2)).max(axis=1)
    return MethodCost(
        bytes=round(moved.sum() * token_bytes),
        busiest=round(busiest.sum() * token_bytes),
        imbalance=_peak(served.sum(axis=0)),
        layer_imbalance=float(np.mean([_peak(layer) for layer in served])),
        node_bytes=round((moved * (node[:, None] != node)).sum() * token_bytes),
        group_sizes=tuple(np.bincount(groups, minlength=devices).tolist()),
    )


def _peak(load: np.ndarray) -> float:
    """Return the largest load over the mean one; 1 where there is none."""
    return float(load.max() / load.mean()) if load.any() else 1.0


def flow(use: np.ndarray, hosts: np.ndarray, *, nodes: int = 1) -> np.ndarray:
    """Return tokens [layer, from, to], those that stay on the diagonal.

    A token is served at home where its expert is, else in its node, else anywhere; among several replicas equally.
    """
    layers, devices, experts = use.shape
    node = np.arange(devices) // (devices // nodes)
    near = (node[:, None] == node).astype(np.float64)  # [from, to]
    held = hosts.astype(np.float64)
    result = np.zeros((layers, devices, devices))
    for layer in range(layers):
        home = use[layer] * held[layer]
        away = use[layer] - home
        in_node = near @ held[layer]  # replicas within reach [from, expert]
        inside = np.divide(away, in_node, out=np.zeros((devices, experts)), where=in_node > 0)
        outside = np.where(in_node > 0, 0.0, away) / held[layer].sum(axis=0)
        result[layer] = (inside @ held[layer].T) * near + outside @ held[layer].T
        result[layer][np.diag_indices(devices)] += home.sum(axis=1)
    return result
