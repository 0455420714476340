"""What the scope of a module with planned Parameters sees: the model's own functions, and none of a planned product."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from loka.dispatch.running.convert import convert, unreached
from loka.dispatch.running.reroute import Reroute
from loka.formats import PASSES
from tests.dispatch.made_conversion import Calls, plan_for

SITES = ("up", "inner.mix", "mix")
RECIPE = "blockwise"


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(40, 40) / 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(x, self.mix)


class Outer(nn.Module):
    """A scope around a linear layer, and around a module with a scope of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(13, 40)
        self.inner = Inner()
        self.mix = nn.Parameter(torch.randn(40, 40) / 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.mm(self.inner(self.up(x)).relu(), self.mix)


class Forgiving(Outer):
    """Goes on where its linear layer fails."""

    def forward(self, x: Tensor) -> Tensor:
        with pytest.raises(RuntimeError):
            self.up(x[:, 1:])
        return torch.mm(self.up(x), self.mix)


def made(kind: type[Outer]) -> Outer:
    torch.manual_seed(0)
    model = kind()
    return convert(model, plan_for(model, {site: dict.fromkeys(PASSES, RECIPE) for site in SITES}), emulate=True)


# What this model calls, and what finding a product among it asks of tensors.
OF_THE_MODEL = {"matmul", "mm", "relu", "dim", "stride", "storage_offset", "__get__"}


@pytest.mark.parametrize("compiled", [False, True])
def test_scopes_see_nothing_of_a_planned_product(monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    inside = Reroute.__torch_function__

    def strict(self: Reroute, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ not in OF_THE_MODEL:
            raise AssertionError(func.__name__)
        return inside(self, func, types, args, kwargs)

    monkeypatch.setattr(Reroute, "__torch_function__", strict)
    model, x = made(Outer), torch.randn(8, 13)
    (torch.compile(model, backend="eager", fullgraph=True) if compiled else model)(x).sum().backward()
    assert unreached(model) == ()


def test_the_numbers_are_those_of_products_outside_of_any_scope(calls: Calls) -> None:
    model, x = made(Outer), torch.randn(8, 13)
    up, inner, mix = model.up, model.inner, model.mix

    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Parameter(mix.detach().clone())

        def forward(self, x: Tensor) -> Tensor:
            return torch.mm(x, self.mix)

    alone = Alone()
    convert(alone, plan_for(alone, {"mix": dict.fromkeys(PASSES, RECIPE)}), emulate=True)
    assert torch.equal(model(x), alone(inner(up(x)).relu()))
    assert calls.passes() == ["fprop"] * 6


def test_a_product_that_fails_leaves_the_scope_as_it_was(calls: Calls) -> None:
    model = made(Forgiving)
    model(torch.randn(8, 13)).sum().backward()
    assert calls.passes() == ["fprop"] * 3 + ["dgrad", "wgrad", "wgrad"]
    assert not torch.overrides._get_current_function_mode_stack()


def test_a_mode_of_the_user_s_sees_what_it_always_saw(calls: Calls) -> None:
    class Counting(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.shapes: list[tuple[int, ...]] = []

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                self.shapes.append(tuple(out.shape))
            return out

    class Watched(Outer):
        def forward(self, x: Tensor) -> Tensor:
            with Counting() as self.counting:
                return super().forward(x)

    outside, inside, x = made(Outer), made(Watched), torch.randn(8, 13)
    with Counting() as around:
        expected = outside(x)
    assert torch.equal(inside(x), expected)
    assert calls.passes() == ["fprop"] * 2 * len(SITES)
    assert (8, 40) in around.shapes
    assert (8, 40) in inside.counting.shapes
