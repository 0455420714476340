"""SwishNorms that hold norm and sigmoid as one nn.Sequential: the sigmoid becomes hard, and nothing else changes."""

import pytest
import torch
from torch import nn

import loka.mods
from loka.errors import ModError
from loka.mods import BlockNorm, HardSwish

X = 3 * torch.randn(16, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Held(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.gate = nn.Sequential(nn.LayerNorm(8), nn.Sigmoid())


class Plain(Held):
    def forward(self, x):
        x = self.fc(x)
        return x * self.gate(x)


class Turned(Held):
    def forward(self, x):
        y = self.fc(x)
        gate = self.gate(y)
        return torch.mul(gate, y)


class OfSomethingElse(Held):
    def forward(self, x):
        return self.fc(x) * self.gate(x)


class UsedAgain(Held):
    def forward(self, x):
        x = self.fc(x)
        return x * self.gate(x) + self.gate(2 * x)


class ReadAgain(Held):
    def forward(self, x):
        x = self.fc(x)
        gate = self.gate(x)
        return x * gate + gate


class WithALinear(Held):
    """A gate that is learned is none of Swish."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(8, 8), nn.Sigmoid())

    def forward(self, x):
        x = self.fc(x)
        return x * self.gate(x)


def instance(kind):
    torch.manual_seed(0)
    return nn.Sequential(kind(), nn.Linear(8, 3)).double()


@pytest.mark.parametrize("kind", [Plain, Turned])
def test_the_sigmoid_becomes_hard_keeps_its_norm_and_comes_back(kind):
    model = instance(kind)
    before, keys, soft = model(X), list(model.state_dict()), model[0].gate[1]
    applied = loka.mods.apply(model, [HardSwish()])
    assert [replacement.fqn for replacement in applied.replacements] == ["0.gate.1"]
    y = model[0].fc(X)
    normal = nn.functional.layer_norm(y, (8,))
    torch.testing.assert_close(model(X), model[1](y * (normal + 3).clamp(0, 6) / 6))
    assert list(model.state_dict()) == keys
    with pytest.raises(ModError, match=r"applied already, in '0\.gate\.1'"):
        loka.mods.apply(model, [HardSwish()])
    applied.undo()
    assert model[0].gate[1] is soft
    assert torch.equal(model(X), before)


@pytest.mark.parametrize("kind", [OfSomethingElse, UsedAgain, ReadAgain, WithALinear])
def test_a_sigmoid_that_does_something_else_as_well_is_left_alone(kind):
    with pytest.raises(ModError, match="found nothing"):
        loka.mods.apply(instance(kind), [HardSwish()])


def test_one_sigmoid_of_several_gates_is_exchanged_in_all_or_in_none():
    model = nn.Sequential(Plain(), Turned()).double()
    model[1].gate[1] = model[0].gate[1]
    applied = loka.mods.apply(model, [HardSwish()])
    assert isinstance(model[0].gate[1], nn.Hardsigmoid)
    assert isinstance(model[1].gate[1], nn.Hardsigmoid)
    applied.undo()
    model.append(model[0].gate[1])  # now it is the last activation as well
    with pytest.raises(ModError, match="found nothing"):
        loka.mods.apply(model, [HardSwish()])


def test_only_names_the_swish_norm_and_the_norm_inside_becomes_a_block_norm():
    model = nn.Sequential(Plain(), Plain()).double()
    applied = loka.mods.apply(model, [HardSwish(only="1"), BlockNorm(8, only="1")])
    assert {replacement.fqn for replacement in applied.replacements} == {"1.gate.0", "1.gate.1"}
    y = model[0](X)
    z = model[1].fc(y)
    rms = z.square().mean(-1, keepdim=True).add(model[1].gate[0].eps).sqrt()
    torch.testing.assert_close(model[1](y), z * (z / rms + 3).clamp(0, 6) / 6)


@pytest.mark.third_party("torchrec")
def test_torchrecs_swish_layer_norm_becomes_hard():
    from torchrec.modules.activation import SwishLayerNorm

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), SwishLayerNorm(8), nn.Linear(8, 1)).double()
    y = model[0](X)
    normal = model[1].norm[0](y)
    applied = loka.mods.apply(model, [HardSwish()])
    assert [replacement.fqn for replacement in applied.replacements] == ["1.norm.1"]
    torch.testing.assert_close(model[1](y), y * (normal + 3).clamp(0, 6) / 6)
