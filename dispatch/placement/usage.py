"""What a trace says about experts: how often each is used, by whom, and in which layers that means anything.

Arrays everywhere in this package: `use` [layer, device, expert] = decode tokens that the requests of a device send to
an expert; `hosts` [layer, device, expert] = whether a device holds an expert. A token counts once per expert it goes
to.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from loka.errors import ArgumentError
from loka.probes.routing.trace import RoutingTrace

DEGENERATE_SHARE: Final[float] = 0.9
_CHUNK: Final[int] = 512  # requests that are unpacked to floats at once


def usable_layers(trace: RoutingTrace, layers: Sequence[int] | None = None) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return the layers to place and a note for each left out.

    Left out is a layer in which one expert takes more than 90 % of the decode tokens (its router has collapsed: every
    placement is the same) and one without decode tokens. Raises ArgumentError when none is left.
    """
    chosen = trace if layers is None else trace.select(layers=layers)
    totals = chosen.decode.sum(axis=0, dtype=np.float64)
    kept, notes = [], []
    for layer, total in zip(chosen.layers, totals, strict=True):
        tokens = total.sum()
        if tokens == 0:
            notes.append(f"layer {layer} is left out: it has no decode tokens")
        elif total.max() > DEGENERATE_SHARE * tokens:
            share = total.max() / tokens
            notes.append(f"layer {layer} is left out: expert {total.argmax()} takes {share:.1%} of its decode tokens")
        else:
            kept.append(layer)
    if not kept:
        raise ArgumentError(
            f"No layer of this trace can be placed: {'; '.join(notes[:3])}. Placement needs decode counts of a router "
            "that uses several experts; trace requests that generate tokens."
        )
    return tuple(kept), tuple(notes)


def only_layers(trace: RoutingTrace, layers: tuple[int, ...]) -> RoutingTrace:
    """Return the trace of some of its layers; of all of them, the trace itself: it may be half of the memory."""
    if layers == trace.layers:
        return trace
    return replace(trace, layers=layers, counts=trace.counts[:, :, [trace.layers.index(layer) for layer in layers]])


def check_devices(devices: int, nodes: int, experts: int, replicas: int = 0) -> None:
    """Raise ArgumentError when so many experts cannot be spread over so many devices."""
    if devices < 1 or devices > experts:
        raise ArgumentError(
            f"{devices} devices for {experts} experts: every device holds at least one. Give 1 to {experts} devices."
        )
    if nodes < 1 or devices % nodes:
        raise ArgumentError(f"{devices} devices do not divide into {nodes} nodes. Give a divisor of {devices}.")
    if replicas < 0 or -(-experts // devices) + replicas > experts:
        most = experts - -(-experts // devices)
        raise ArgumentError(
            f"{replicas} replicas on each of {devices} devices: there is room for at most {most} more of the {experts} "
            "experts. Give a number from 0."
        )


def slots_of(experts: int, devices: int) -> np.ndarray:
    """Return how many experts each device holds, [device]: the first `experts` mod `devices` hold one more."""
    return np.full(devices, experts // devices) + (np.arange(devices) < experts % devices)


def fractions(prefill: np.ndarray, typical: np.ndarray) -> np.ndarray:
    """Return each request's share of prefill tokens per expert, [request, layer * expert] float32.

    Where a request has no prefill token in a layer, the `typical` shares [layer, expert] stand in.
    """
    counts = prefill.astype(np.float32)
    total = counts.sum(axis=2, keepdims=True)
    shares = np.where(total > 0, counts / np.maximum(total, 1), typical.astype(np.float32))
    return np.asarray(shares.reshape(len(prefill), -1))


def typical_shares(prefill: np.ndarray) -> np.ndarray:
    """Return the shares of all prefill tokens per expert, [layer, expert]; equal ones where there are none."""
    total = prefill.sum(axis=0, dtype=np.float64)
    tokens = total.sum(axis=1, keepdims=True)
    return np.asarray(np.where(tokens > 0, total / np.maximum(tokens, 1), 1 / total.shape[1]))


def group_use(decode: np.ndarray, groups: np.ndarray, devices: int) -> np.ndarray:
    """Return `use` [layer, device, expert] of requests' counts [request, layer, expert] and their devices."""
    return np.stack([decode[groups == device].sum(axis=0, dtype=np.float64) for device in range(devices)], axis=1)


def hosts_of(device: np.ndarray, devices: int) -> np.ndarray:
    """Return `hosts` [layer, device, expert] of a placement without replicas, [layer, expert] -> device."""
    return np.asarray(device[:, None, :] == np.arange(devices)[None, :, None])


def device_of(hosts: np.ndarray) -> np.ndarray:
    """Return the first device that holds each expert, [layer, expert]."""
    return np.asarray(hosts.argmax(axis=1))


def chunks(requests: int) -> list[slice]:
    """Return slices that walk over many requests in little memory."""
    return [slice(start, start + _CHUNK) for start in range(0, requests, _CHUNK)]


def trace_hash(trace: RoutingTrace) -> str:
    """Return SHA-256, in hex, of the counts, layers and domains of a trace."""
    digest = hashlib.sha256(repr((trace.counts.shape, trace.layers, trace.domain)).encode())
    for part in chunks(trace.requests):
        digest.update(np.ascontiguousarray(trace.counts[part], dtype="<u4").tobytes())
    return digest.hexdigest()
