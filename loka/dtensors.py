"""Which tensors are DTensors, and what a rank has of one.

Asked in every call of a planned layer, so that it costs little and imports nothing where there is none.
"""

import sys
from dataclasses import dataclass
from typing import Any, Final, Self

from torch import Tensor, nn

_PLAIN: Final = frozenset({Tensor, nn.Parameter})


def is_sharded(tensor: object) -> bool:
    """Whether a tensor is a DTensor, of which a rank has its part."""
    if type(tensor) in _PLAIN:
        return False
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


@dataclass(frozen=True, slots=True)
class Part:
    """Which entries of the first dimension a rank multiplies with, where ranks share them out, as experts are."""

    first: int
    count: int
    whole: int  # on all ranks

    @classmethod
    def of(cls, tensor: Any) -> Self | None:
        """Return that of a DTensor, of any other tensor None. What FSDP has apart it gathers before it is used."""
        if not is_sharded(tensor):
            return None
        from torch.distributed.tensor import Replicate
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
        from torch.distributed.tensor.placement_types import _StridedShard

        # Strided is how FSDP2 shards what is sharded already.
        placements = [Replicate() if isinstance(each, _StridedShard) else each for each in tensor.placements]
        shape, first = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, placements)
        return cls(first[0], shape[0], tensor.shape[0]) if shape else None


def first_among(part: Part | None, count: int) -> int:
    """Return which entry is the first of `count`: that of the part, where it has as many, else that of the whole."""
    return part.first if part is not None and part.count == count else 0
