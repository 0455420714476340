"""The ways of training that are compared: which mods, and in which numerics.

    fp32            as the model is
    nudged          the same from weights moved by one rounding: how far apart two equal trainings end by chance
    tensorwise      every product with a weight, heads and bare Parameters too, all passes, from the first step on:
                    e4m3 operands, e5m2 gradients, as torchao's tensorwise recipe
    tensorwise e4m3 the same with gradients in e4m3
    plan            the first steps in fp32 under the probe, then LoKA's plan under Bound(row_error=0.05)

All FP8 numerics are emulated. The biases of DCN's cross layers belong to no module that NoBias knows: it leaves them,
with a warning.
"""

import tempfile
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

import loka
from loka.dispatch.deciding.plan import Plan
from loka.errors import LokaWarning
from loka.formats import RECIPES, Pass
from loka.kernel_registry.emulated import emulate
from loka.kernel_registry.registry import default_registry
from loka.kernel_registry.spec import KernelSpec
from loka.mods.claims import Mod

Numerics = Literal["fp32", "nudged", "tensorwise", "tensorwise e4m3", "plan"]
SPEEDUP: Final[float] = 1.3  # what emulated kernels count as, so that whatever is admissible is chosen
BOUND: Final = loka.Bound(row_error=0.05)
MODS: Final[dict[str, tuple[Mod, ...]]] = {
    "": (),
    "NoBias": (loka.mods.NoBias(),),
    "BlockNorm": (loka.mods.BlockNorm(),),
    "HardSwish": (loka.mods.HardSwish(),),
    "all mods": (loka.mods.NoBias(), loka.mods.BlockNorm(), loka.mods.HardSwish()),
}
_E4M3: Final = replace(RECIPES["tensorwise"], grad_output="e4m3")
_KERNELS: Final[dict[str, str]] = {
    "tensorwise": "emulated.linear.tensorwise",
    "tensorwise e4m3": "study.linear.tensorwise_e4m3",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One way of training."""

    numerics: Numerics
    mods: str = ""  # a key of MODS
    turn: int = 0  # those of turn 0 are trained first, with all seeds

    @property
    def name(self) -> str:
        """E.g. `tensorwise + NoBias`."""
        return f"{self.numerics} + {self.mods}" if self.mods else self.numerics


ARMS: Final[tuple[Arm, ...]] = (
    Arm(numerics="fp32"),
    Arm(numerics="nudged", turn=2),
    Arm(numerics="tensorwise"),
    Arm(numerics="tensorwise e4m3", turn=2),
    Arm(numerics="tensorwise", mods="NoBias", turn=1),
    Arm(numerics="tensorwise", mods="BlockNorm", turn=1),
    Arm(numerics="tensorwise", mods="HardSwish", turn=1),
    Arm(numerics="tensorwise", mods="all mods"),
    Arm(numerics="plan", mods="all mods"),
    Arm(numerics="fp32", mods="NoBias", turn=2),
    Arm(numerics="fp32", mods="BlockNorm", turn=2),
    Arm(numerics="fp32", mods="HardSwish", turn=2),
    Arm(numerics="fp32", mods="all mods"),
)


def modified(model: nn.Module, arm: Arm) -> nn.Module:
    """Apply an arm's mods, in place, and nudge its weights where it is the arm for that."""
    if arm.mods:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LokaWarning)  # NoBias names the biases that it leaves: those of the crosses
            loka.mods.apply(model, MODS[arm.mods])
    if arm.numerics == "nudged":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + torch.finfo(parameter.dtype).eps)
    return model


def uniform(plan: Plan, kernel: str) -> Plan:
    """Return the plan with one kernel for all passes of all products with a weight, and the baseline for the rest."""
    decisions = []
    for each in plan.decisions:
        chosen = each.request.op == "linear"
        decisions.append(
            replace(each, kernel=kernel, recipe="tensorwise")
            if chosen
            else replace(each, kernel=each.baseline, recipe=None)
        )
    return replace(plan, decisions=tuple(decisions))


def naive_plan(numerics: Numerics, model: nn.Module, step: Any) -> Plan:
    """Return the plan that puts all of a model on tensorwise FP8; `step()` runs the model forward and backward."""
    kernel = _KERNELS[numerics]
    registry = default_registry()
    if kernel not in registry:
        place = f"{__name__}:tensorwise_e4m3"
        spec = KernelSpec(name=kernel, op="linear", recipe="tensorwise", implementation=place, device_types=("cpu",))
        registry.add(spec, owner=__name__)
    with tempfile.TemporaryDirectory() as folder:
        db = Path(folder) / "shapes.db"
        with loka.probe(model, db, every=1, overhead=1e6, recipes=["tensorwise"]):
            step()
        return uniform(loka.plan(db, BOUND, assume_speedup=SPEEDUP, measure=False), kernel)


def tensorwise_e4m3(a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply a [m, k] and b [n, k] with one scale per operand, all operands in e4m3."""
    return emulate(_E4M3, a, b, product=product, out_dtype=out_dtype)
