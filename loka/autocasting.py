"""Whether autocast is on, for tensors of any device: torch's own question is an error for those without values."""

import torch
from torch import Tensor


def is_cast(x: Tensor) -> bool:
    """Whether autocast is on for the device that a tensor is on; never for the meta device, which has none."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
