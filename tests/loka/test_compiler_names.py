"""The backend `loka` where modules have several names: a plan knows the first, Dynamo the one it came by."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loka.compiler import unreached
from loka.dispatch.deciding.plan import Plan
from loka.dispatch.running.convert import convert
from loka.dispatch.running.registered import first_names
from tests.dispatch.made_conversion import plan_for
from tests.loka.made_compiled import Backend


class Gated(nn.Module):
    """As a block of TabNet, which holds the layers that it shares and calls them as layers of its gates."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.fc = layer

    def forward(self, x: Tensor) -> Tensor:
        return F.glu(self.fc(x))


class Shared(nn.Module):
    """Two layers of one shape, each known by two names, and called by the second."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 32) for _ in range(2))
        self.gates = nn.ModuleList(Gated(layer) for layer in self.layers)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        for gate in (*self.gates, self.gates[0]):
            x = x + gate(x)
        return self.head(x)


class Outer(nn.Module):
    """Reaches a layer of the planned model by a name of its own."""

    def __init__(self, net: Shared) -> None:
        super().__init__()
        self.shortcut, self.net = net.layers[1], net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(F.glu(self.shortcut(x)))


def planned_apart(model: Shared) -> Plan:
    """Layers of one shape under recipes that differ, so that one in the place of the other shows."""
    return plan_for(
        model,
        {
            "layers.0": {"fprop": "rowwise", "dgrad": "tensorwise", "wgrad": "blockwise"},
            "layers.1": {"fprop": "tensorwise", "dgrad": "blockwise", "wgrad": "rowwise"},
        },
    )


def gradients(run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    run(x).square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    "wrap", [lambda model: model, Outer, lambda model: lambda x: model(x)], ids=["itself", "a wrapper", "a closure"]
)
def test_a_layer_that_is_called_by_its_second_name_runs_as_planned(wrap) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = Shared(), torch.randn(24, 16)
    expected, plan = copy.deepcopy(model), planned_apart(model)
    whole = copy.deepcopy(model)
    backend = Backend(plan)
    got = gradients(torch.compile(wrap(model), backend=backend, fullgraph=True), model, x)
    assert sorted(set(backend.sites)) == ["layers.0", "layers.1"]
    assert unreached(plan) == ()
    want = gradients(wrap(convert(expected, plan)), expected, x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    exact = gradients(wrap(whole), whole, x)
    assert (exact["layers.0.weight"] - want["layers.0.weight"]).norm() > 1e-2 * want["layers.0.weight"].norm()


def test_outside_of_a_compilation_nothing_is_known() -> None:
    assert first_names("L['self']", "") == {}
