"""FuseEpilogue: which linear layers it takes with their norm and activation, and what it leaves as it was."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import loka.mods
from loka.errors import ArgumentError, ModError
from loka.mods import BlockNorm, FusedLinearNormAct, FuseEpilogue, HardSwish, NoBias, SquaredReLU
from loka.workloads.wukong import Wukong, WukongConfig

THREE = (BlockNorm(256), HardSwish(), FuseEpilogue())


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.norm, self.act, self.down = nn.Linear(8, 300), nn.LayerNorm(300), nn.SiLU(), nn.Linear(300, 8)

    def forward(self, x):
        return x + self.down(self.act(self.norm(self.up(x))))


class InSteps(Nested):
    def forward(self, x):
        kept = x
        x = self.up(x)
        x = self.norm(x)
        x = self.act(x)
        return kept + self.down(x)


class OwnVariables(Nested):
    def forward(self, x):
        y = self.up(x)
        z = self.norm(y)
        return self.down(self.act(z))


class CalledActivation(Nested):
    def forward(self, x):
        return self.down(F.silu(self.norm(self.up(x))))


class TwoCalledActivations(Nested):
    def __init__(self):
        super().__init__()
        self.norm2 = nn.LayerNorm(8)

    def forward(self, x):
        return F.silu(self.norm2(self.down(F.silu(self.norm(self.up(x)))))) * F.silu(x)


class UsedTwice(Nested):
    def forward(self, x):
        y = self.up(x)
        z = self.norm(y)
        return self.down(self.act(z)) + y.sum()


class OnOnePathOnly(Nested):
    def forward(self, x):
        x = self.up(x)
        if self.training:
            x = self.norm(x)
        return self.down(self.act(x))


class NormElsewhereToo(Nested):
    def forward(self, x):
        return self.down(self.act(self.norm(self.up(x))) + self.norm(torch.ones(300)))


class ReadsTheWeight(Nested):
    def forward(self, x):
        return self.down(self.act(self.norm(self.up(x)))) + self.up.weight.sum()


class TakenApart(nn.Module):
    def __init__(self):
        super().__init__()
        self.stack = nn.Sequential(nn.Linear(8, 20), nn.LayerNorm(20), nn.SiLU())

    def forward(self, x):
        outputs = []
        for layer in self.stack:
            x = layer(x)
            outputs.append(x.sum())
        return x + sum(outputs)


def stacked(*tail):
    return nn.Sequential(nn.Linear(8, 300), nn.LayerNorm(300), nn.SiLU(), *tail)


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
FUSED = {
    "sequence": (stacked, ["0"]),
    "nested calls": (lambda: nn.Sequential(Nested()), ["0.up"]),
    "steps": (lambda: nn.Sequential(InSteps()), ["0.up"]),
    "variables": (lambda: nn.Sequential(OwnVariables()), ["0.up"]),
    "called activation": (lambda: nn.Sequential(CalledActivation(), nn.SiLU()), ["0.up"]),
    "two called activations": (lambda: nn.Sequential(TwoCalledActivations()), ["0.up", "0.down"]),
    "two in a row": (lambda: stacked(nn.Linear(300, 20), nn.LayerNorm(20)), ["0", "3"]),
}
LEFT = {kind.__name__: kind for kind in (UsedTwice, OnOnePathOnly, NormElsewhereToo, ReadsTheWeight, TakenApart)}


@pytest.mark.parametrize("name", FUSED)
def test_a_fused_model_computes_what_the_parts_did_and_comes_back(name):
    torch.manual_seed(0)
    make, expected = FUSED[name]
    model = make()
    before = model(X)
    parts = loka.mods.apply(model, THREE[:2])
    unfused, keys = model(X), list(model.state_dict())
    parts.undo()
    applied = loka.mods.apply(model, THREE)
    assert [fqn for fqn, module in model.named_modules() if isinstance(module, FusedLinearNormAct)] == expected
    assert torch.equal(model(X), unfused)
    assert list(model.state_dict()) == keys
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(X), unfused)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), unfused)
    applied.undo()
    assert torch.equal(model(X), before)
    assert not any(isinstance(module, FusedLinearNormAct | nn.Identity) for module in model.modules())


@pytest.mark.parametrize("name", LEFT)
def test_a_product_that_somebody_else_sees_stays_apart(name):
    torch.manual_seed(0)
    model = nn.Sequential(LEFT[name]())
    loka.mods.apply(model, THREE[:2])
    before = model(X)
    with pytest.raises(ModError, match="behind none of its linears alone"):
        loka.mods.apply(model, [FuseEpilogue()])
    assert torch.equal(model(X), before)


def test_hooks_parametrizations_shared_modules_and_other_widths_are_left_alone():
    hooked, normed, shared = stacked(), stacked(), stacked()
    hooked[1].register_forward_hook(lambda *_: None)
    weight_norm(normed[0])
    shared.append(nn.Linear(300, 300))
    shared.append(shared[1])
    grouped = nn.Sequential(nn.Linear(8, 300), nn.Unflatten(-1, (3, 100)), nn.LayerNorm(100))
    for model in (hooked, normed, shared, grouped):
        loka.mods.apply(model, [BlockNorm(256)])
        with pytest.raises(ModError, match="FuseEpilogue found nothing"):
            loka.mods.apply(model, [FuseEpilogue()])


def test_a_shared_stack_is_fused_under_all_its_names():
    model = nn.ModuleDict({"a": stacked(), "b": nn.Linear(2, 2)})
    model["c"] = model["a"]
    applied = loka.mods.apply(model, THREE)
    assert isinstance(model["c"][0], FusedLinearNormAct)
    applied.undo()
    assert type(model["a"][0]) is nn.Linear


def test_parameters_stay_the_same_objects_with_their_gradients_and_flags():
    model = stacked()
    model[0].weight.requires_grad_(False)
    weight, bias = model[0].weight, model[0].bias
    applied = loka.mods.apply(model, THREE)
    assert model[0].weight is weight
    model(X).sum().backward()
    assert weight.grad is None
    applied.undo()
    assert model[0].weight is weight
    assert model[0].bias is bias
    assert bias.grad is not None


def test_old_checkpoints_load_into_the_fused_model_and_back():
    model, other = stacked(), stacked()
    old = {key: value.clone() for key, value in other.state_dict().items()}
    loka.mods.apply(model, THREE)
    loka.mods.apply(other, THREE[:2])
    assert model.load_state_dict(old, strict=False).missing_keys == []
    assert torch.equal(model(X), other(X))
    other.load_state_dict(model.state_dict())


def test_only_and_filter_fn_choose_linears_and_a_part_alone_is_refused():
    model = nn.ModuleDict({"a": stacked(), "b": stacked()})
    loka.mods.apply(model, THREE[:2])
    with pytest.raises(ArgumentError, match="matches no linear with a BlockNorm"):
        loka.mods.apply(model, [FuseEpilogue(only=["zz"])])
    with pytest.raises(ModError, match=r"'a\.0\.forward' without 'a\.1', which filter_fn refused"):
        loka.mods.apply(model, [FuseEpilogue(only=["a"])], filter_fn=lambda module, fqn: fqn != "a.1")
    assert type(model["a"][0]) is nn.Linear
    loka.mods.apply(model, [FuseEpilogue(only=["a"])])
    assert isinstance(model["a"][0], FusedLinearNormAct)
    assert type(model["b"][0]) is nn.Linear


def test_a_second_time_is_refused_and_without_a_norm_too():
    model = stacked()
    with pytest.raises(ModError, match="has no BlockRMSNorm: apply BlockNorm first"):
        loka.mods.apply(model, [FuseEpilogue()])
    loka.mods.apply(model, THREE)
    for mod in THREE:
        with pytest.raises(ModError, match=r"applied already(:|, in) '0'"):
            loka.mods.apply(model, [mod])


def test_when_it_finds_nothing_the_mods_before_it_are_taken_back():
    model = nn.Sequential(nn.LayerNorm(8), nn.SiLU())
    before = list(model)
    with pytest.raises(ModError, match="FuseEpilogue found nothing"):
        loka.mods.apply(model, THREE)
    assert list(model) == before


def test_squared_relu_is_fused_too():
    model = nn.Sequential(nn.Linear(8, 20), nn.RMSNorm(20), nn.ReLU())
    loka.mods.apply(model, [BlockNorm(8), SquaredReLU(), FuseEpilogue()])
    assert model[0].activation == "squared_relu"
    assert isinstance(model[2], nn.Identity)


def test_a_wukong_has_each_of_its_hidden_layers_fused():
    torch.manual_seed(0)
    model = Wukong(WukongConfig(cardinalities=(10, 20), num_dense=5, num_layers=2))
    ids, dense = torch.randint(0, 10, (8, 2)), torch.randn(8, 5)
    before = model(ids, dense)
    applied = loka.mods.apply(model, [NoBias(), *THREE])
    fused = [fqn for fqn, module in model.named_modules() if isinstance(module, FusedLinearNormAct)]
    assert len(fused) == 4
    assert all(fqn.endswith("linear0") for fqn in fused)
    model(ids, dense).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    applied.undo()
    assert torch.equal(model(ids, dense), before)


def test_an_activation_that_is_called_becomes_a_part_of_the_layer_before_it():
    torch.manual_seed(0)
    model = nn.Sequential(TwoCalledActivations())
    applied = loka.mods.apply(model, [BlockNorm(256), HardSwish()])
    expected = model(X)
    second = loka.mods.apply(model, [FuseEpilogue(only=["0.up"])])
    assert model[0].up.activation == "hard_swish"
    assert type(model[0].down) is nn.Linear
    assert torch.equal(model(X), expected)
    third = loka.mods.apply(model, [FuseEpilogue()])
    assert model[0].down.activation == "hard_swish"
    assert torch.equal(model(X), expected)
    for each in (third, second):
        each.undo()
        assert torch.equal(model(X), expected)
    with pytest.raises(ModError, match=r"'0\.up\.forward' without '0\.forward', which filter_fn refused"):
        loka.mods.apply(model, [FuseEpilogue(only=["0.up"])], filter_fn=lambda module, fqn: fqn != "0")
    applied.undo()
    assert type(model[0]) is TwoCalledActivations
