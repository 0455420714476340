"""HardSwish: Swish without the exponential.

    x * relu6(x + 3) / 6        0 below -3, x above 3, a parabola between

The sigmoid of Swish stretches outliers and squeezes small entries, both of which FP8 pays for; the hard form has the
same shape within 0.15 and fuses into a GEMM epilogue.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
import torch.nn.functional as F
from torch import nn

from loka.mods.activations import ActivationMod

# Names that Swish goes by in classes of users and libraries.
_NAMES: Final[frozenset[str]] = frozenset({"swish", "silu", "siluactivation", "memoryefficientswish"})


@dataclass(frozen=True, slots=True)
class HardSwish(ActivationMod):
    """Replace nn.SiLU, and parameter-free modules of classes named Swish or SiLU, by nn.Hardswish.

    `only`: patterns (see `loka.selection`) of the modules to replace, all by default. A Swish with a learned slope is
    left alone, and so are calls of F.silu: where no module is found, the error names them.

    Checkpoints: activations have no keys, so every old checkpoint loads; the model has to be trained further.
    """

    looks_for: ClassVar[str] = "nn.SiLU or Swish"
    functions: ClassVar[Collection[object]] = (F.silu, torch._C._nn.silu)
    replacement: ClassVar[type[nn.Module]] = nn.Hardswish

    def takes(self, module: nn.Module) -> bool:
        """Return whether the module is a Swish without state."""
        if isinstance(module, nn.SiLU):
            return type(module).forward is nn.SiLU.forward
        state = (*module.parameters(), *module.buffers(), *module.children())
        return type(module).__name__.lower() in _NAMES and len(state) == 0

    def build(self, module: nn.Module) -> nn.Module:
        """Return an nn.Hardswish, in place where the module was."""
        return nn.Hardswish(inplace=bool(getattr(module, "inplace", False)))
