"""The backend `loka` where layers share a weight: Dynamo has one name for it, and each layer its own plan."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loka.compiler import unreached
from loka.dispatch.running.convert import convert
from loka.dispatch.running.linear import linear
from tests.dispatch.made_conversion import MIXED, emulated, plan_for
from tests.loka.made_compiled import Backend

HIGH = dict.fromkeys(MIXED)
OTHER = {"fprop": "mxfp8", "dgrad": "rowwise", "wgrad": "tensorwise"}


class Low(nn.Linear):
    """A layer that adds a product with parameters of its own, as LoRA's: its weight is not the only one it runs."""

    def __init__(self) -> None:
        super().__init__(16, 16)
        self.down, self.up = nn.Parameter(torch.randn(4, 16)), nn.Parameter(torch.randn(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(F.linear(x, self.down), self.up)


class Tied(nn.Module):
    """Two layers on one weight, as the layers that Zamba's blocks share."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.low = nn.Linear(16, 16), nn.Linear(16, 16), Low()
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.low(self.second(torch.relu(self.first(x))))


@pytest.mark.parametrize(("first", "second"), [(MIXED, HIGH), (HIGH, OTHER), (MIXED, OTHER)])
def test_layers_that_share_a_weight_run_each_as_planned(first: dict[str, str], second: dict[str, str]) -> None:
    torch.manual_seed(0)
    model, x = Tied(), torch.randn(8, 16)
    plan = plan_for(model, {"first": first, "second": second, "low": HIGH, "low.down": OTHER})
    converted = convert(copy.deepcopy(model), plan)
    expected = converted(x)
    expected.square().sum().backward()

    outcome = torch.compile(model, backend=Backend(plan), fullgraph=True)(x)
    outcome.square().sum().backward()
    assert torch.equal(outcome, expected)
    for ours, theirs in zip(model.parameters(), converted.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-6)
    assert unreached(plan) == ()


class Scores(nn.Module):
    """Multiplies with a weight that is handed in, and what comes of it with itself: a product of its own name."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        y = F.linear(x, weight)
        return y @ y.t()


class HandsIn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.scores = nn.Parameter(torch.randn(16, 16)), Scores()

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(x, self.mix)


@pytest.mark.parametrize("scores", [HIGH, OTHER])
def test_a_weight_that_is_handed_in_runs_by_its_own_plan(scores: dict[str, str]) -> None:
    torch.manual_seed(0)
    model, x = HandsIn(), torch.randn(8, 16)
    plan = plan_for(model, {"mix": MIXED, "scores": scores})
    y = linear(x, model.mix, None, *(emulated(recipe) for recipe in MIXED.values()))
    backend = Backend(plan)
    outcome = torch.compile(model, backend=backend, fullgraph=True)(x)
    assert torch.equal(outcome, y @ y.t())
    assert backend.sites == ["mix"]
