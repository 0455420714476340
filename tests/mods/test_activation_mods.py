import pytest
import torch
import torch.nn.functional as F
from torch import nn

import loka.mods
from loka.errors import ArgumentError, ModError
from loka.mods import HardSwish, SquaredReLU


class Swish(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


class LearnedSwish(nn.Module):
    def __init__(self):
        super().__init__()
        self.beta = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x * torch.sigmoid(self.beta * x)


LearnedSwish.__name__ = "Swish"


def test_hard_swish_is_the_piecewise_parabola():
    model = nn.Sequential(nn.SiLU())
    loka.mods.apply(model, [HardSwish()])
    x = torch.linspace(-5, 5, 101, dtype=torch.float64)
    expected = [0.0 if v <= -3 else v if v >= 3 else v * (v + 3) / 6 for v in x.tolist()]
    torch.testing.assert_close(model(x), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_swish_modules_of_users_are_replaced_unless_they_have_state():
    model = nn.Sequential(Swish(), LearnedSwish(), nn.GELU(), nn.SiLU(inplace=True))
    loka.mods.apply(model, [HardSwish()])
    assert [type(layer) for layer in model] == [nn.Hardswish, LearnedSwish, nn.GELU, nn.Hardswish]
    assert [model[0].inplace, model[3].inplace] == [False, True]


def test_squared_relu_squares_and_has_the_right_gradient():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.ReLU6())
    loka.mods.apply(model, [SquaredReLU()])
    assert isinstance(model[1], nn.ReLU6)
    x = torch.tensor([-2.0, -0.0, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    y = model[0](x)
    assert y.tolist() == [0.0, 0.0, 0.25, 9.0]
    y.sum().backward()
    assert x.grad.tolist() == [0.0, 0.0, 1.0, 6.0]


def test_only_selects_and_names_the_nearest():
    model = nn.ModuleDict({"gate": nn.SiLU(), "out": nn.SiLU()})
    with pytest.raises(ArgumentError, match="Nearest: 'gate'"):
        loka.mods.apply(model, [HardSwish(only=["gat"])])
    loka.mods.apply(model, [HardSwish(only=["gate"])])
    assert isinstance(model["out"], nn.SiLU)


def test_the_activation_of_a_transformer_layer_is_used_in_inference_too():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, activation=nn.ReLU(), batch_first=True)
    x = torch.randn(3, 5, 16)
    loka.mods.apply(nn.Sequential(model), [SquaredReLU()])
    expected = model.train()(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), expected)


class Held(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.act = function

    def forward(self, x):
        return self.act(x)


def swish_of_the_user(x):
    return x * x.sigmoid()


@pytest.mark.parametrize("function", [F.silu, torch._C._nn.silu, swish_of_the_user, lambda x: torch.sigmoid(x) * x])
def test_a_function_in_an_attribute_is_replaced_and_comes_back(function):
    model = nn.Sequential(Held(function))
    x = torch.linspace(-5, 5, 21)
    applied = loka.mods.apply(model, [HardSwish()])
    torch.testing.assert_close(model(x), F.hardswish(x))
    assert applied.replacements[0].fqn == "0.act"
    assert applied.replacements[0].after == "hard_swish"
    with pytest.raises(ModError, match="applied already, in '0'"):
        loka.mods.apply(model, [HardSwish()])
    applied.undo()
    assert model[0].act is function


@pytest.mark.parametrize("function", [torch.sigmoid, lambda x: x * torch.sigmoid(1.702 * x), F.gelu, len])
def test_a_function_that_is_not_swish_stays(function):
    with pytest.raises(ModError, match="found nothing"):
        loka.mods.apply(nn.Sequential(Held(function)), [HardSwish()])


@pytest.mark.parametrize("training", [False, True])
def test_the_functional_activation_of_a_transformer_layer_is_replaced(training):
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    reference = nn.TransformerEncoderLayer(16, 2, 32, 0.0, activation=lambda x: F.relu(x) ** 2, batch_first=True)
    reference.load_state_dict(model.state_dict())
    applied = loka.mods.apply(model, [SquaredReLU()])
    assert [r.fqn for r in applied.replacements] == ["activation", "activation_relu_or_gelu"]
    x = torch.randn(3, 5, 16)
    with torch.no_grad():
        torch.testing.assert_close(model.train(training)(x), reference.train(training)(x))
    applied.undo()
    assert model.activation is F.relu
    assert model.activation_relu_or_gelu == 1
