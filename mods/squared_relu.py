"""SquaredReLU: relu(x)^2, which leaves most hidden activations exactly zero.

Zeros are exact in every format and can be skipped; squaring makes up for the lost capacity of plain ReLU.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loka.mods.activations import ActivationMod


class ReLUSquared(nn.Module):
    """relu(x)^2, element by element; the derivative is 2 relu(x)."""

    def forward(self, input: Tensor) -> Tensor:
        """Return relu(input)^2, same shape and dtype."""
        return F.relu(input).square()


@dataclass(frozen=True, slots=True)
class SquaredReLU(ActivationMod):
    """Replace nn.ReLU by relu(x)^2.

    `only`: patterns (see `loka.selection`) of the modules to replace, all by default. Calls of F.relu are left alone:
    where no module is found, the error names them.

    Checkpoints: activations have no keys, so every old checkpoint loads; the model has to be trained further.
    """

    looks_for: ClassVar[str] = "nn.ReLU"
    functions: ClassVar[Collection[object]] = (F.relu, F.relu_, torch.relu, torch.relu_)
    replacement: ClassVar[type[nn.Module]] = ReLUSquared

    def takes(self, module: nn.Module) -> bool:
        """Return whether the module is a plain ReLU."""
        return isinstance(module, nn.ReLU) and type(module).forward is nn.ReLU.forward

    def build(self, module: nn.Module) -> nn.Module:
        """Return the new activation; it never works in place."""
        return ReLUSquared()
