"""HardSwish: Swish without the exponential.

    x * relu6(x + 3) / 6        0 below -3, x above 3, a parabola between

The sigmoid of Swish stretches outliers and squeezes small entries, both of which FP8 pays for; the hard form has the
same shape within 0.15 and fuses into a GEMM epilogue.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Final

from torch import nn

from loka.mods.activations import ActivationMod
from loka.mods.claims import Claim
from loka.mods.source.calls import Pattern
from loka.mods.source.gates import gates_of
from loka.mods.source.patterns import SwishCalls, is_swish

# Names that Swish goes by in classes of users and libraries, in lower case.
SWISHES: Final[frozenset[str]] = frozenset({"swish", "silu", "siluactivation", "memoryefficientswish"})


@dataclass(frozen=True, slots=True)
class HardSwish(ActivationMod):
    """Replace Swish by HardSwish, wherever it is: in modules, in attributes that hold the function, in calls.

    Modules are nn.SiLU and parameter-free ones of classes named Swish or SiLU. Calls are `F.silu(x)`, a function of
    yours that computes Swish, `x * torch.sigmoid(x)` in its usual spellings, and SwishNorm, which is
    `x * torch.sigmoid(norm(x))`: its gate becomes hard and keeps its norm, for BlockNorm to replace. The module that
    makes such a call gets a class made from its own (see `mods.source.calls`) and stays the same object. Where norm and
    nn.Sigmoid are one nn.Sequential, `x * self.gate(x)`, as in torchrec's SwishLayerNorm, the nn.Sigmoid is replaced. A
    Swish with a learned slope and a sigmoid that gates something else are left alone; calls in functions that are not
    methods are not followed.

    `only`: patterns (see `loka.selection`) of the modules to replace it in, all by default.

    Checkpoints: activations have no keys, so every old checkpoint loads; the model has to be trained further.
    """

    looks_for: ClassVar[str] = "nn.SiLU or Swish"
    pattern: ClassVar[Pattern] = SwishCalls()
    replacement: ClassVar[type[nn.Module]] = nn.Hardswish
    stand_ins: ClassVar[tuple[str, ...]] = ("hard_swish", "hard_sigmoid")

    def takes(self, module: nn.Module) -> bool:
        """Return whether the module is a Swish without state."""
        if isinstance(module, nn.SiLU):
            return type(module).forward is nn.SiLU.forward
        state = (*module.parameters(), *module.buffers(), *module.children())
        return type(module).__name__.lower() in SWISHES and len(state) == 0

    def takes_function(self, value: object) -> bool:
        """Return whether a function is F.silu, or one of the user's that computes the same."""
        return is_swish(value)

    def of_gates(self, model: nn.Module) -> Iterable[Claim]:
        """Claim the sigmoid of each SwishNorm whose gate is one module."""
        for fqn, (module, words) in gates_of(model, nn.Sigmoid).items():
            reason = f"the sigmoid of {words} becomes Hardsigmoid"
            yield Claim(mod=self.name, fqn=fqn, module=module, build=nn.Hardsigmoid, reason=reason)

    def hard_gates(self, model: nn.Module) -> Iterable[str]:
        """Return where such a gate is hard already."""
        return gates_of(model, nn.Hardsigmoid)

    def done(self, module: nn.Module) -> bool:
        """Return False: nothing that computes HardSwish calls a sigmoid."""
        return False

    def build(self, module: nn.Module) -> nn.Module:
        """Return an nn.Hardswish, in place where the module was."""
        return nn.Hardswish(inplace=bool(getattr(module, "inplace", False)))
