import pytest
import torch
import torch.nn.functional as F
from torch import nn

import loka.mods
from loka.errors import ArgumentError, LokaWarning, ModError
from loka.mods import HardSwish, SquaredReLU
from loka.mods.functional import callers


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


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(self.fc(x))

    def inner(self, x):
        return F.silu(x)


class Nested(Functional):
    def inner(self, x):
        return (lambda value: torch.nn.functional.silu(value))(x)


class Held(nn.Module):
    def __init__(self):
        super().__init__()
        self.act = F.silu


class CallsModule(nn.Module):
    """`self.silu(x)` is a module, not F.silu."""

    def __init__(self):
        super().__init__()
        self.silu = nn.Identity()

    def forward(self, x):
        return self.silu(x)


@pytest.mark.parametrize("kind", [Functional, Nested, Held])
def test_functional_calls_are_named_when_no_module_matches(kind):
    model = nn.Sequential(kind())
    with pytest.raises(ModError, match=rf"Functional calls are not matched yet.*'0' \(class {kind.__name__}\)"):
        loka.mods.apply(model, [HardSwish()])


def test_functional_calls_next_to_modules_are_a_warning():
    model = nn.Sequential(Functional(), nn.SiLU())
    with pytest.warns(LokaWarning, match=r"'0' \(class Functional\)") as caught:
        loka.mods.apply(model, [HardSwish()])
    assert caught[0].filename == __file__
    assert isinstance(model[1], nn.Hardswish)


def test_a_module_of_the_same_name_is_no_functional_call():
    assert callers(nn.Sequential(CallsModule(), nn.SiLU()), HardSwish.functions) == ()
    with pytest.raises(ModError) as caught:
        loka.mods.apply(nn.Sequential(CallsModule()), [HardSwish()])
    assert "unctional" not in str(caught.value)


def test_the_activation_of_a_transformer_layer_is_used_in_inference_too():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, activation=nn.ReLU(), batch_first=True)
    x = torch.randn(3, 5, 16)
    loka.mods.apply(nn.Sequential(model), [SquaredReLU()])
    expected = model.train()(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), expected)


def test_the_functional_activation_of_a_transformer_layer_is_named():
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    with pytest.raises(ModError, match=r"the model \(class TransformerEncoderLayer\)"):
        loka.mods.apply(model, [SquaredReLU()])
