"""A small model, and frozen ones."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loka.dispatch.deciding.decide import Decision
from loka.dispatch.freezing.freeze import Frozen, freeze
from loka.formats import PASSES
from loka.kernel_registry.registry import default_registry
from tests.dispatch.made_conversion import decision, plan_for

ON_A_CPU = ("torch.scaled_mm.tensorwise", "torch.scaled_mm.rowwise")
WITH_HALVES = (spec for spec in default_registry().candidates("linear") if spec.prepared)
HERE = sorted(spec.name for spec in WITH_HALVES if spec.library == "emulated" or spec.name in ON_A_CPU)
KERNEL = "torch.scaled_mm.rowwise"


class Mlp(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.up, self.norm = nn.Linear(width, 2 * width), nn.LayerNorm(2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(F.silu(self.norm(self.up(x)))) + x).squeeze(-1)


def plan_of(model: nn.Module, sites: list[str], kernel: str = KERNEL):
    recipe = default_registry().get(kernel).recipe
    made = tuple(decision(site, product, recipe, kernel=kernel) for site in sites for product in PASSES)
    return plan_for(model, [], decisions=made)


def sized(made: Decision, n: int, k: int) -> Decision:
    """The same decision on a product with these features."""
    return replace(made, request=replace(made.request, n=n, k=k))


def frozen_mlp(kernel: str = KERNEL, seed: int = 0) -> tuple[Mlp, Frozen]:
    torch.manual_seed(seed)
    model = Mlp()
    return model, freeze(model, plan_of(model, ["up", "down"], kernel))
