"""Norms that are no nn.LayerNorm: recognised by their numbers, or by the function that a method calls."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import loka.mods
from loka.errors import ModError
from loka.mods import BlockNorm, HardSwish
from loka.mods.block_norm import BlockRMSNorm, block_norm
from loka.mods.norms import feature_norm
from tests.mods import called_norms as made


@pytest.mark.parametrize("features", [1, 7, 64])
@pytest.mark.parametrize("eps", [1e-3, 1e-5, 1e-6, 0.0])
@pytest.mark.parametrize("kind", [made.OwnRms, made.RmsAroundOne, made.OwnLayerNorm, made.InFloat])
def test_a_norm_of_ones_own_is_recognised_with_its_eps(kind, features, eps):
    if features == 1:
        kind = made.OwnRms  # one feature less its mean is nothing, whatever eps is
    norm = feature_norm(kind(features, eps=eps))
    assert norm is not None
    assert (norm.features, norm.eps) == (features, pytest.approx(eps))


@pytest.mark.parametrize(
    "module",
    [
        made.Scale(8),
        made.EpsOutside(8),
        made.OverTheBatch(8),
        made.ChannelsFirst(8),
        nn.PReLU(8),
        nn.LayerNorm([4, 8]),
        nn.BatchNorm1d(8),
        nn.Linear(8, 8),
        nn.Sequential(made.OwnRms(8)),
        nn.ParameterList([torch.ones(8)]),
        nn.LazyLinear(8),
    ],
    ids=lambda module: type(module).__name__,
)
def test_what_is_no_norm_over_features_is_not_taken_for_one(module):
    assert feature_norm(module) is None


def test_trying_a_norm_leaves_its_parameters_hooks_and_the_random_state_alone():
    module = made.OwnRms(8).to(torch.bfloat16)
    weight, calls = module.weight, []
    module.register_forward_hook(lambda *_: calls.append(1))
    state = torch.get_rng_state()
    assert feature_norm(module) is not None
    assert feature_norm(made.OwnRms(8).to("meta")) is not None
    assert module.weight is weight
    assert weight.eq(1).all()
    assert not calls
    assert torch.equal(torch.get_rng_state(), state)


def test_a_norm_of_ones_own_becomes_block_norm():
    model = nn.Sequential(made.OwnRms(20, eps=1e-4))
    applied = loka.mods.apply(model, [BlockNorm(8)])
    assert repr(model[0]) == "BlockRMSNorm(20, block=8, eps=0.0001)"
    applied.undo()
    assert isinstance(model[0], made.OwnRms)


def test_called_norms_go_to_block_norm_and_unread_parameters_leave():
    torch.manual_seed(0)
    model = nn.Sequential(made.Called(20)).double()
    x = torch.randn(4, 20, dtype=torch.float64)
    before = model(x)
    applied = loka.mods.apply(model, [BlockNorm(8)])
    assert list(model.state_dict()) == ["0.used", "0.fc.weight", "0.fc.bias"]
    inner = block_norm(model[0].fc(x), 8, 1e-4)
    torch.testing.assert_close(model(x), F.silu(block_norm(inner, 8, 1e-3)) * model[0].used)
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with pytest.raises(ModError, match=r"applied already: '0'"):
        loka.mods.apply(model, [BlockNorm(8)])
    applied.undo()
    assert torch.equal(model(x), before)
    assert list(model.state_dict())[:3] == ["0.scale", "0.shift", "0.used"]


@pytest.mark.parametrize("together", [True, False])
def test_two_mods_share_one_method_at_once_or_one_after_the_other(together):
    torch.manual_seed(0)
    model = nn.Sequential(made.Called(20)).double()
    x = torch.randn(4, 20, dtype=torch.float64)
    mods = [BlockNorm(8), HardSwish()]
    applied = [loka.mods.apply(model, group) for group in ([mods] if together else [[mod] for mod in mods])]
    normal = block_norm(block_norm(model[0].fc(x), 8, 1e-4), 8, 1e-3)
    torch.testing.assert_close(model(x), F.hardswish(normal) * model[0].used)
    if together:
        assert applied[0].replacements[0].mod == "BlockNorm and HardSwish"
    for each in reversed(applied):
        each.undo()
    assert type(model[0]) is made.Called


def test_a_called_norm_with_other_dimensions_first():
    model = nn.Sequential(made.ChannelsFirst(20)).double()
    loka.mods.apply(model, [BlockNorm(8)])
    x = torch.randn(3, 20, 5, dtype=torch.float64)
    torch.testing.assert_close(model(x), block_norm(x.mT, 8, 1e-5).mT)
    assert list(model.parameters()) == []


def test_a_called_norm_without_parameters():
    model = nn.Sequential(made.Bare()).double()
    loka.mods.apply(model, [BlockNorm(8)])
    x = torch.randn(3, 20, dtype=torch.float64)
    torch.testing.assert_close(model(x), block_norm(x, 8))


def test_a_call_over_several_dimensions_stays():
    model = nn.Sequential(made.OverTwo(), nn.LayerNorm(4))
    applied = loka.mods.apply(model, [BlockNorm(2)])
    assert [r.fqn for r in applied.replacements] == ["1"]
    told = nn.ModuleList([made.ToldInRunning()])
    loka.mods.apply(told, [BlockNorm(2)])
    x = torch.randn(3, 4)
    torch.testing.assert_close(told[0](x, (3, 4)), F.layer_norm(x, (3, 4)))
    torch.testing.assert_close(told[0](x, (4,)), block_norm(x, 2, 1e-5))


def test_called_norms_compile_into_one_graph():
    model = nn.Sequential(made.Called(20), made.ChannelsFirst(20))
    loka.mods.apply(model, [BlockNorm(8), HardSwish()])
    x = torch.randn(3, 20, 20)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


def test_only_selects_the_module_that_calls_a_norm():
    model = nn.ModuleDict({"a": made.Bare(), "b": made.Bare(), "c": nn.LayerNorm(4)})
    applied = loka.mods.apply(model, [BlockNorm(2, only=["b", "c"])])
    assert [r.fqn for r in applied.replacements] == ["b.forward", "c"]
    assert isinstance(model["c"], BlockRMSNorm)


def test_a_scale_that_is_tied_to_something_else_stops_the_rewrite():
    model = nn.Sequential(made.Called(8))
    model.register_parameter("tied", model[0].scale)
    with pytest.raises(ModError, match=r"'0\.scale', which is tied to 'tied'"):
        loka.mods.apply(model, [BlockNorm(8)])
    assert type(model[0]) is made.Called


def test_a_norm_whose_weight_another_module_reads_is_left_alone():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.other = nn.LayerNorm(8), nn.LayerNorm(8)

        def forward(self, x):
            return self.other(self.norm(x.to(self.norm.weight.dtype)))

    model = nn.Sequential(Reader())
    applied = loka.mods.apply(model, [BlockNorm(4)])
    assert [r.fqn for r in applied.replacements] == ["0.other"]
    assert "left alone: '0.norm (LayerNorm)'" in applied.replacements[0].reason
    model(torch.randn(3, 8))
    with pytest.raises(ModError, match=r"'0\.norm': its parameter 'weight' is read in Reader\.forward"):
        loka.mods.apply(model, [BlockNorm(4, only=["0.norm"])])
