"""Which tensors are DTensors: asked in every call of a planned layer, so it costs little and imports nothing."""

import sys
from typing import Any, Final

from torch import Tensor, nn

_PLAIN: Final = frozenset({Tensor, nn.Parameter})


def is_sharded(tensor: object) -> bool:
    """Whether a tensor is a DTensor, of which a rank has its part."""
    if type(tensor) in _PLAIN:
        return False
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)
