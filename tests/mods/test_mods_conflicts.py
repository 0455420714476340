"""Places that two mods want, that several names share, or that something else holds on to."""

import pytest
import torch
from torch import nn

import loka.mods
from loka.errors import ModError
from loka.mods import BlockNorm, HardSwish, NoBias
from tests.mods.made_models import Swap, assert_same, make_model, snapshot


def test_two_mods_on_one_place_are_a_conflict_that_names_both():
    model = make_model()
    before = snapshot(model)
    with pytest.raises(ModError, match=r"HardSwish and Swap both want to replace 'act'"):
        loka.mods.apply(model, [HardSwish(), Swap(("act",), lambda module: nn.Tanh())])
    assert_same(snapshot(model), before)


def test_a_claim_inside_a_replaced_module_is_a_conflict():
    model = nn.Sequential(make_model(), nn.Linear(1, 4))
    with pytest.raises(ModError, match=r"Swap and HardSwish both want to replace '0', and with it '0\.act'"):
        loka.mods.apply(model, [HardSwish(), Swap(("0",), lambda module: nn.Identity())])
    with pytest.raises(ModError, match=r"'0', and with it '0\.up\.bias'"):
        loka.mods.apply(model, [NoBias(), Swap(("0",), lambda module: nn.Identity())])


def test_removing_a_bias_agrees_with_a_replacement_only_if_that_has_none():
    model = make_model()
    with pytest.raises(ModError, match=r"'norm', and with it 'norm\.bias'"):
        loka.mods.apply(model, [NoBias(), Swap(("norm",), lambda module: nn.LayerNorm(32))])
    loka.mods.apply(model, [NoBias(), Swap(("norm",), lambda module: nn.LayerNorm(32, bias=False))])
    assert model.norm.bias is None


def test_a_replacement_may_wrap_what_it_replaces_without_calling_its_hooks_twice():
    class Halved(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) / 2

    model = make_model()
    model.down.eval()
    calls = []
    model.down.register_forward_hook(lambda module, args, output: calls.append(type(module)))
    x = torch.randn(2, 32)
    expected = model.down(x) / 2
    calls.clear()
    applied = loka.mods.apply(model, [Swap(("down",), Halved)])
    assert torch.equal(model.down(x), expected)
    assert calls == [nn.Linear]
    applied.undo()
    assert isinstance(model.down, nn.Linear)


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.act = nn.SiLU()
        self.first = nn.Sequential(nn.Linear(4, 4), self.act)
        self.second = nn.Sequential(nn.Linear(4, 4), self.act)

    def forward(self, x):
        return self.act(self.second(self.first(x)))


def test_a_shared_module_is_replaced_by_one_module_under_all_its_names():
    model = Shared()
    before = snapshot(model)
    applied = loka.mods.apply(model, [HardSwish()])
    assert isinstance(model.act, nn.Hardswish)
    assert model.act is model.first[1]
    assert model.act is model.second[1]
    assert len(applied.replacements) == 1
    applied.undo()
    assert_same(snapshot(model), before)


def test_a_shared_module_selected_under_some_of_its_names_is_refused_with_both():
    model = Shared()
    before = snapshot(model)
    with pytest.raises(ModError, match=r"'first\.1'.*'act'"):
        loka.mods.apply(model, [HardSwish(only=["first*"])])
    with pytest.raises(ModError, match=r"registered as 'act', 'second\.1' and as 'first\.1'"):
        loka.mods.apply(model, [HardSwish()], filter_fn=lambda module, fqn: fqn != "first.1")
    assert_same(snapshot(model), before)


def test_tied_parameters_leave_together_or_not_at_all():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 1))
    model[1].bias = model[0].bias
    with pytest.raises(ModError, match=r"'1\.bias', which is tied to '0\.bias'"):
        loka.mods.apply(model, [NoBias(keep=["0", "2"])])
    applied = loka.mods.apply(model, [NoBias(keep=["2"])])
    assert model[0].bias is None
    assert model[1].bias is None
    applied.undo()
    assert model[1].bias is model[0].bias


def test_a_norm_whose_scale_is_tied_to_something_else_is_not_replaced():
    model = nn.Sequential(nn.LayerNorm(16), nn.LayerNorm(16))
    model[1].weight = model[0].weight
    model.register_parameter("scale", model[0].weight)
    with pytest.raises(ModError, match=r"tied to 'scale'"):
        loka.mods.apply(model, [BlockNorm(8)])
    model.scale = None
    loka.mods.apply(model, [BlockNorm(8)])
    assert list(model.parameters()) == []


def test_a_replacement_may_go_on_using_a_tied_weight():
    def reuse(module):
        linear = nn.Linear(4, 4, bias=False)
        linear.weight = module.weight
        return linear

    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    loka.mods.apply(model, [Swap(("0",), reuse)])
    assert model[0].weight is model[1].weight


@pytest.mark.parametrize("hide", [lambda act: act, lambda act: [act], lambda act: {"a": act}, lambda act: act.forward])
def test_a_module_that_is_also_held_in_a_plain_attribute_is_refused(hide):
    model = make_model()
    object.__setattr__(model, "shortcut", hide(model.act))
    with pytest.raises(ModError, match=r"'act'.*plain attribute 'shortcut'"):
        loka.mods.apply(model, [HardSwish()])
