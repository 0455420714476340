"""What an all-to-all costs: bytes and time of one decode step's dispatch and combine, from tokens per pair of devices.

Every device sends to every other one; a link is a device's way into its node (intra) or out of it (inter), each with a
bandwidth and a latency. A step takes as long as its busiest link. A padded kernel sends messages as large as the
largest of all, which is why fewer bytes save less time than they could. Token payloads are bf16, or FP8 with one fp32
scale per 128 elements on the way out (the way back is bf16, as results are summed).
"""

import math
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from loka.errors import ArgumentError

Payload = Literal["bf16", "fp8"]
_SCALE_GROUP: Final[int] = 128
_SCALE_BYTES: Final[int] = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Links:
    """How devices are joined. The defaults are assumptions: NVLink 4 and one 400 Gb/s port per device."""

    intra_bandwidth: float = 450e9  # bytes per second and device, one direction
    inter_bandwidth: float = 50e9
    intra_latency_us: float = 2.0  # per message; messages to different peers overlap but for this
    inter_latency_us: float = 6.0

    def __post_init__(self) -> None:
        """Refuse links that carry nothing."""
        if (
            min(self.intra_bandwidth, self.inter_bandwidth) <= 0
            or min(self.intra_latency_us, self.inter_latency_us) < 0
        ):
            raise ArgumentError("A link needs a bandwidth above zero and a latency from zero. Correct the Links.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchange:
    """One all-to-all; bytes exclude what stays on its device."""

    bytes: int  # sent by all, padding included
    payload_bytes: int  # without padding
    busiest_bytes: int  # of the device that sends or receives most
    busiest: str  # e.g. "device 3 receives, between nodes"
    time_us: float


def token_bytes(hidden_size: int, payload: Payload = "bf16") -> int:
    """Return the bytes of one token: 2 per element, or 1 and a 4-byte scale per 128 elements."""
    if hidden_size < 1 or payload not in ("bf16", "fp8"):
        raise ArgumentError(f"A token of {hidden_size} elements in {payload!r}: give a size from 1, and bf16 or fp8.")
    if payload == "bf16":
        return 2 * hidden_size
    return hidden_size + _SCALE_BYTES * math.ceil(hidden_size / _SCALE_GROUP)


def exchange(
    tokens: np.ndarray, bytes_per_token: int, *, nodes: int = 1, padded: bool = False, links: Links | None = None
) -> Exchange:
    """Return the cost of sending `tokens` [from, to]; the diagonal stays. Raises ArgumentError for what is no matrix.

    `padded`: every pair's message is as large as the largest between two devices.
    """
    links = links or Links()
    counts = _checked(tokens, nodes)
    devices = len(counts)
    sent = counts * (1 - np.eye(devices))
    messages = np.full_like(sent, sent.max()) * (1 - np.eye(devices)) if padded else sent
    node = np.arange(devices) // (devices // nodes)
    same = node[:, None] == node
    volume = messages * bytes_per_token
    loads = []
    for kind, mask in (("within its node", same), ("between nodes", ~same)):
        inside = kind == "within its node"
        bandwidth = links.intra_bandwidth if inside else links.inter_bandwidth
        latency = links.intra_latency_us if inside else links.inter_latency_us
        for verb, axis in (("sends", 1), ("receives", 0)):
            carried = (volume * mask).sum(axis=axis)
            peers = ((messages > 0) & mask).sum(axis=axis)
            time = carried / bandwidth * 1e6 + latency * peers
            at = int(time.argmax())
            loads.append((float(time[at]), f"device {at} {verb}, {kind}"))
    time_us, busiest = max(loads)
    most = max(float(volume.sum(axis=1).max()), float(volume.sum(axis=0).max()))
    return Exchange(
        bytes=round(float(volume.sum())),
        payload_bytes=round(float(sent.sum()) * bytes_per_token),
        busiest_bytes=round(most),
        busiest=busiest if time_us else "none",
        time_us=time_us,
    )


def step(
    flows: np.ndarray,
    hidden_size: int,
    *,
    nodes: int = 1,
    padded: bool = False,
    payload: Payload = "bf16",
    links: Links | None = None,
) -> tuple[Exchange, ...]:
    """Return dispatch and combine of every layer in turn, of tokens [layer, from, to] in one step.

    Combining sends each result back, in bf16 whatever the payload of the dispatch.
    """
    exchanges = []
    for layer in flows:
        exchanges.append(exchange(layer, token_bytes(hidden_size, payload), nodes=nodes, padded=padded, links=links))
        exchanges.append(exchange(layer.T, token_bytes(hidden_size), nodes=nodes, padded=padded, links=links))
    return tuple(exchanges)


def _checked(tokens: np.ndarray, nodes: int) -> np.ndarray:
    counts = np.asarray(tokens, dtype=np.float64)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or not len(counts):
        raise ArgumentError(f"Tokens of shape {counts.shape} are no exchange. Give [from, to], one row per device.")
    if not np.isfinite(counts).all() or counts.min() < 0:
        raise ArgumentError("The tokens hold a negative number or NaN. Give numbers from zero.")
    if nodes < 1 or len(counts) % nodes:
        raise ArgumentError(f"{len(counts)} devices do not divide into {nodes} nodes. Give a divisor.")
    return counts
