"""What can be asked of a placement, in one record."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from loka.dispatch.placement.grouping import SLACK
from loka.errors import ArgumentError

_MOST_DEVICES: Final[int] = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class PlaceOptions:
    """How experts are placed. Raises ArgumentError for what cannot be."""

    devices: int
    nodes: int = 1
    replicas: int = 0  # more experts per device than it must hold
    layers: Sequence[int] | None = None  # the model's numbers; all by default
    max_load: float = 1.2  # most tokens of a device over the mean, in total over layers
    caution: float = 2.0  # standard deviations of a batch's mix by which max_load is kept from afar
    slack: float = SLACK  # of group sizes, around equal
    intra_cost: float = 1 / 9  # of a byte within a node, in bytes between nodes; counts with several nodes only
    busiest: float = 0.0  # weight of the bytes that each layer's busiest device receives, in bytes in all
    clusters: int | None = None  # of the paper's K-means; as many as devices by default
    expert_groups: int = 1  # of group-limited routing, for EPLB's hierarchical form
    # Cost of moving one expert, in tokens of this trace: its bytes / bytes per token, times the share of the time until
    # the next placement that the trace stands for.
    move_tokens: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what no placement can be made for."""
        limits = {
            "devices": (1, _MOST_DEVICES),
            "nodes": (1, _MOST_DEVICES),
            "replicas": (0, 2**20),
            "max_load": (1.0, math.inf),
            "caution": (0.0, 10.0),
            "slack": (0.0, 1.0),
            "intra_cost": (0.0, 1.0),
            "busiest": (0.0, 1.0),
            "clusters": (1, 2**20),
            "expert_groups": (1, 2**20),
            "move_tokens": (0.0, 1e15),
            "seed": (0, 2**32 - 1),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not (name == "clusters" and value is None) and not low <= value <= high:
                raise ArgumentError(f"{name} is {value}; it must lie in {low:.15g} to {high:.15g}. Correct it.")
