"""Models whose weights are kept, and counts of what was quantised."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor, nn

from loka.dispatch.running.convert import convert
from loka.hardware import multiplies_bf16
from loka.kernel_registry import halves, held
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


def converted(kernel: str = "emulated.linear.rowwise", *, cache_weights: bool | None = True) -> nn.Sequential:
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


class Counted:
    """Counts how often weights of a model are quantised, wherever it happens."""

    def __init__(
        self,
        model: nn.Module,
        monkeypatch: pytest.MonkeyPatch,
        of: Callable[[nn.Module], Iterable[Tensor]] = nn.Module.parameters,
    ) -> None:
        self.model, self.count, self.of = model, 0, of
        found = [(held, name) for name in ("fake_quantize", "held_codes", "values_and_scale")]
        found.append((halves, "quantize_operand"))
        for module, name in found:
            monkeypatch.setattr(module, name, self._counting(getattr(module, name)))

    def _counting(self, quantize: Callable[..., object]) -> Callable[..., object]:
        def counting(x: Tensor, *args: object, **kwargs: object) -> object:
            self.count += any(x.data_ptr() == weight.data_ptr() for weight in self.of(self.model))
            return quantize(x, *args, **kwargs)

        return counting

    def taken(self) -> int:
        count, self.count = self.count, 0
        return count


def kept_of(weight: Tensor) -> int:
    """Bytes of a weight for fprop and for dgrad, emulated rowwise: fp32 values or, to be multiplied in bf16, codes."""
    scales = sum(weight.shape) if multiplies_bf16("cpu") else 0
    return 4 * (2 * weight.numel() + scales)
