"""Models, and a backend that remembers the sites it found, for the tests of compilation."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager

from loka.compiler import rewrite
from loka.dispatch.deciding.plan import Plan


class Backend:
    """Rewrites as the real backend does, keeps the sites it found, and runs what AOT autograd traces, uncompiled."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.found: list[tuple[str, ...]] = []

    def __call__(self, gm, example_inputs):
        self.found.append(rewrite(gm, self.plan))
        return aot_eager(gm, example_inputs)

    @property
    def sites(self) -> list[str]:
        return [site for graph in self.found for site in graph]


class SmallWukong(nn.Module):
    """Linear, LayerNorm, SiLU and bare Parameters, as in the recommendation models that LoKA is for."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.Linear(24, 40), nn.LayerNorm(40)
        self.mix = nn.Parameter(torch.randn(40, 24) / 6)
        self.head = nn.Linear(24, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.norm(self.up(x))) @ self.mix
        return self.head(h + x).squeeze(-1)


def train(model: Callable, data: list[tuple[Tensor, Tensor]], rate: float = 0.01) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), rate)
    losses = []
    for x, y in data:
        optimizer.zero_grad()
        out = model(x)
        loss = (
            F.binary_cross_entropy_with_logits(out.float(), y)
            if isinstance(unwrapped(model), SmallWukong)
            else (out - y).square().mean()
        )
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def unwrapped(model: nn.Module) -> nn.Module:
    return getattr(model, "_orig_mod", model)
