"""Models whose weights are kept, and counts of what was quantised."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from loka.dispatch.running.convert import convert
from loka.kernel_registry.registry import default_registry
from tests.dispatch.made_conversion import decision, plan_for

HALVES = sorted(spec.name for spec in default_registry().candidates("linear") if spec.prepared)

HERE = [
    name
    for name in HALVES
    if name.startswith("emulated.") or name in ("torch.scaled_mm.tensorwise", "torch.scaled_mm.rowwise")
]

SITES = ["0", "2"]

BATCHES = 3


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.SiLU(), nn.Linear(24, 16))


def plan_of(model: nn.Module, sites: list[str], kernel: str):
    recipe = default_registry().get(kernel).recipe
    made = (decision(site, product, recipe, kernel=kernel) for site in sites for product in ("fprop", "dgrad", "wgrad"))
    return plan_for(model, [], decisions=tuple(made))


def converted(kernel: str = "emulated.linear.rowwise", *, cache_weights: bool = True) -> nn.Sequential:
    model = mlp()
    return convert(model, plan_of(model, SITES, kernel), cache_weights=cache_weights)


def batches(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 16, generator=generator, requires_grad=True) for _ in range(BATCHES)]


def accumulate(model: nn.Module, around: Callable[[], AbstractContextManager] = nullcontext) -> list[Tensor]:
    """Forward and backward of some micro-batches; every result and every gradient."""
    found = []
    for x in batches():
        with around():
            y = model(x)
        y.float().square().mean().backward()
        found += [y.detach().clone(), x.grad.clone()]
    found += [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    return found


def assert_equal(got: list[Tensor], want: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def accumulate_gradients(model: nn.Module) -> None:
    for x in batches(1):
        model(x).square().mean().backward()


def bf16_autocast() -> AbstractContextManager:
    return torch.autocast("cpu", torch.bfloat16)
