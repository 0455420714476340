"""Recurrent layers of torch, whose products a CPU shows and no kernel can take: measured, and left as they are."""

import pytest
import torch
from torch import Tensor, nn

import loka
from loka.bounds import Bound
from loka.dispatch.running.convert import unreached


class Recurrent(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.layer, nn.RNNBase):
            return self.head(self.layer(x)[0])
        state = x.new_zeros(x.shape[0], 24)
        for at in range(x.shape[1]):
            state = self.layer(x[:, at], state)
        return self.head(state)


class OwnCell(nn.RNNCellBase):
    """A cell that multiplies by itself, as users write them: its products are linear layers like any other."""

    def __init__(self) -> None:
        super().__init__(16, 24, bias=False, num_chunks=1)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        return torch.tanh(nn.functional.linear(x, self.weight_ih) + nn.functional.linear(state, self.weight_hh))


LAYERS = {
    "GRU": lambda: nn.GRU(16, 24, batch_first=True),
    "RNN": lambda: nn.RNN(16, 24, batch_first=True),
    "GRUCell": lambda: nn.GRUCell(16, 24),
    "OwnCell": OwnCell,
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_plan_leaves_what_no_kernel_can_take_and_reaches_the_rest(name, tmp_path):
    torch.manual_seed(0)
    model = Recurrent(LAYERS[name]())
    with loka.probe(model, db=tmp_path / "run.db", every=1, overhead=1000.0):
        for _ in range(12):
            model(torch.randn(32, 4, 16)).square().mean().backward()
    plan = loka.plan(tmp_path / "run.db", Bound(row_error=0.9), assume_speedup=2.0, measure=False)
    seen = {decision.request.site: decision.request.op for decision in plan.decisions}
    weights = {site for site in seen if site.startswith("layer.weight")}
    assert weights
    own = name == "OwnCell"
    assert {seen[site] for site in weights} == {"linear" if own else "other"}
    planned = {decision.request.site for decision in plan.decisions if decision.recipe is not None}
    assert planned == ({"head", *weights} if own else {"head"})
    loka.convert(model, plan, emulate=True)
    model(torch.randn(32, 4, 16)).square().mean().backward()
    assert not unreached(model)
