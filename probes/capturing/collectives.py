"""Which operators talk to other ranks, and whether it is the model's own backward pass that does.

A backward pass that has collectives of its own (an all-to-all of experts, a reduction of tensor parallelism) can run
only where all ranks run it. Those that store gradients, as DDP's do, come with the storing and not with the graph.
"""

from typing import Any, Final

import torch

_NAMES: Final[dict[str, tuple[str, ...]]] = {
    "c10d": (
        *("allreduce_", "allreduce_coalesced_", "reduce_", "broadcast_", "gather_", "scatter_", "barrier"),
        *("allgather_", "_allgather_base_", "allgather_coalesced_", "allgather_into_tensor_coalesced_"),
        *("reduce_scatter_", "_reduce_scatter_base_", "reduce_scatter_tensor_coalesced_"),
        *("alltoall_", "alltoall_base_", "send", "recv_", "recv_any_source_"),
    ),
    "_c10d_functional": (
        *("all_reduce", "all_reduce_", "all_reduce_coalesced", "all_reduce_coalesced_", "broadcast", "broadcast_"),
        *("all_gather_into_tensor", "all_gather_into_tensor_out", "all_gather_into_tensor_coalesced"),
        *("reduce_scatter_tensor", "reduce_scatter_tensor_out", "reduce_scatter_tensor_coalesced", "all_to_all_single"),
    ),
}


def _packets() -> tuple[Any, ...]:
    """Return those that this torch has: a build without torch.distributed has none."""
    spaces = ((getattr(torch.ops, space), name) for space, names in _NAMES.items() for name in names)
    return tuple(getattr(space, name) for space, name in spaces if hasattr(space, name))


# By identity, as `capture` knows operators.
COLLECTIVES: Final[frozenset[int]] = frozenset(map(id, _packets()))


def belongs_to_backward(node: Any) -> bool:
    """Whether what runs under this node of autograd, None outside of a backward pass, is part of the graph."""
    return node is not None and not str(node.name()).endswith("AccumulateGrad")
