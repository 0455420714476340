"""SquaredReLU: relu(x)^2, which leaves most hidden activations exactly zero.

Zeros are exact in every format and can be skipped; squaring makes up for the lost capacity of plain ReLU.
"""

import functools
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from loka.mods.activations import ActivationMod
from loka.mods.source.calls import Pattern
from loka.mods.source.methods import written_as
from loka.mods.source.patterns import RELU, ReluCalls, computes
from loka.mods.source.stand_ins import squared_relu


class ReLUSquared(nn.Module):
    """relu(x)^2, element by element; the derivative is 2 relu(x)."""

    def forward(self, input: Tensor) -> Tensor:
        """Return relu(input)^2, same shape and dtype."""
        return squared_relu(input)


@dataclass(frozen=True, slots=True)
class SquaredReLU(ActivationMod):
    """Replace ReLU by relu(x)^2, wherever it is: nn.ReLU, in attributes that hold F.relu, in calls.

    Calls are `F.relu(x)`, `torch.relu(x)`, `x.relu()` and their forms in place. A ReLU that is squared already is left
    alone. The module that makes a call gets a class made from its own (see `loka.mods.source.calls`) and stays the same
    object; calls in functions that are not methods are not followed.

    `only`: patterns (see `loka.selection`) of the modules to replace it in, all by default.

    Checkpoints: activations have no keys, so every old checkpoint loads; the model has to be trained further.
    """

    looks_for: ClassVar[str] = "nn.ReLU"
    pattern: ClassVar[Pattern] = ReluCalls()
    replacement: ClassVar[type[nn.Module]] = ReLUSquared
    stand_ins: ClassVar[tuple[str, ...]] = ("squared_relu", "squared_relu_")

    def takes(self, module: nn.Module) -> bool:
        """Return whether the module is a plain ReLU."""
        return isinstance(module, nn.ReLU) and type(module).forward is nn.ReLU.forward

    def takes_function(self, value: object) -> bool:
        """Return whether a function is ReLU."""
        return any(value is function for function in RELU)

    def done(self, module: nn.Module) -> bool:
        """Return whether the module is without state and computes relu(x)^2: libraries have such activations."""
        kind = written_as(module)
        state = (*module.parameters(), *module.buffers(), *module.children())
        if state or kind.__module__.startswith("torch.nn"):
            return False
        return computes(functools.partial(kind.forward, module), squared_relu)

    def build(self, module: nn.Module) -> nn.Module:
        """Return the new activation; it never works in place."""
        return ReLUSquared()
