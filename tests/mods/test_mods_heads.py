"""Prediction heads: found by following what the model computes, in a trace or in a run."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

import loka.mods
from loka.errors import ArgumentError, ModError
from loka.mods import FuseEpilogue, NoBias
from loka.mods.heads import find_heads
from loka.workloads.wukong import Wukong, WukongConfig


def mlp(*widths):
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())][:-1])


class Experts(nn.Module):
    """Mixture of experts with a gate and a tower per task."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([mlp(8, 16) for _ in range(3)])
        self.gates = nn.ModuleList([nn.Linear(8, 3) for _ in range(2)])
        self.towers = nn.ModuleList([mlp(16, 12, 1), mlp(16, 12, 20)])

    def forward(self, x):
        experts = torch.stack([expert(x) for expert in self.experts], dim=1)
        outputs = []
        for gate, tower in zip(self.gates, self.towers, strict=True):
            share = torch.softmax(gate(x), dim=-1).unsqueeze(-1)
            outputs.append(tower((share * experts).sum(1)))
        return torch.sigmoid(outputs[0]), F.log_softmax(outputs[1], dim=-1)


class WideAndDeep(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.deep = nn.Linear(8, 1), mlp(8, 16, 1)
        self.bias = nn.Parameter(torch.zeros(16))
        self.crossed = nn.Embedding(4, 1)

    def forward(self, x, labels=None):
        logits = self.wide(x) + self.deep(x) + self.bias.sum() + self.crossed(torch.zeros(len(x), dtype=torch.long))
        if labels is not None:
            return {"loss": F.binary_cross_entropy_with_logits(logits, labels)}
        return {"logits": logits.view(x.shape[0], -1)}


class TiedLanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.body, self.lm_head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11)
        self.lm_head.weight = self.embedding.weight

    def forward(self, ids):
        return self.lm_head(torch.tanh(self.body(self.embedding(ids))))


class BareHead(TiedLanguageModel):
    """Its head is a product with a bare weight and a bias of the user's."""

    def __init__(self):
        super().__init__()
        del self.lm_head
        self.bias = nn.Parameter(torch.zeros(11))

    def forward(self, ids):
        return F.linear(torch.tanh(self.body(self.embedding(ids))), self.embedding.weight, self.bias)


class Scored(nn.Module):
    """The last linear in the order of registration is not the head, and the head is not small."""

    def __init__(self):
        super().__init__()
        self.head, self.body, self.small = nn.Linear(16, 40), nn.Linear(8, 16), nn.Linear(16, 4)
        self.mix = nn.Linear(4, 16)

    def forward(self, x):
        x = self.body(x)
        return self.head(x + self.mix(self.small(x)))


class Convolved(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head, self.norm = nn.Conv1d(8, 4, 1), nn.Conv1d(4, 20, 1), nn.LayerNorm(3)

    def forward(self, x):
        return self.norm(self.head(self.first(x[:, :, None].expand(-1, -1, 3))))


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])
MODELS = [
    (Experts, X, {"towers.0.2", "towers.1.2"}),
    (WideAndDeep, X, {"wide", "deep.2"}),
    (TiedLanguageModel, IDS, {"lm_head"}),
    (BareHead, IDS, set()),
    (Scored, X, {"head"}),
    (Convolved, X, {"head"}),
]


@pytest.mark.parametrize("run", [False, True])
@pytest.mark.parametrize(("kind", "example", "expected"), MODELS, ids=[kind.__name__ for kind, _, _ in MODELS])
def test_heads_are_the_layers_with_no_product_behind_them(kind, example, expected, run):
    model = kind()
    heads = find_heads(model, (example,) if run else None)
    assert set(heads.layers.values()) == expected
    modules = {id(module): name for name, module in model.named_modules()}
    assert {modules[identity] for identity in heads.layers} == expected
    assert ("run on the example" in heads.how) is run


@pytest.mark.parametrize("example", [None, (IDS,)])
def test_the_bias_of_a_bare_product_at_the_output_stays_without_a_word(example, recwarn):
    model = BareHead()
    loka.mods.apply(model, [NoBias(example=example)])
    assert model.body.bias is None
    assert model.bias is not None
    assert not [warning for warning in recwarn if "NoBias" in str(warning.message)]


def test_a_wukong_keeps_the_bias_of_its_last_layer_alone():
    model = Wukong(WukongConfig(cardinalities=(10, 20), num_dense=5, num_layers=2))
    applied = loka.mods.apply(model, [NoBias()])
    assert [name for name, _ in model.named_parameters() if name.endswith("bias")] == ["head.out.bias"]
    assert "kept: 'head.out', found as prediction heads: no product lies between" in applied.replacements[0].reason


class Conditional(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(x) if x.sum() > 0 else x


class Inside(nn.Module):
    def __init__(self):
        super().__init__()
        self.out, self.conditional, self.first = nn.Linear(8, 40), Conditional(), nn.Linear(8, 8)

    def forward(self, x):
        self.seen = x
        return self.out(self.conditional(self.first(x)))


class Outside(Inside):
    def forward(self, x):
        return self.conditional(self.first(x))


def test_control_flow_inside_a_submodule_does_not_stop_the_trace():
    model = Inside()
    assert list(find_heads(model).layers.values()) == ["out"]
    assert not hasattr(model, "seen")
    heads = find_heads(Outside())
    assert list(heads.layers.values()) == ["conditional.linear"]
    assert "the last linear in 'conditional', which could not be traced (symbolically traced" in heads.how


def test_a_model_that_cannot_be_traced_is_guessed_and_the_reason_says_so():
    class Wholly(Scored):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else self.head(self.body(x))

    model = Wholly()
    applied = loka.mods.apply(model, [NoBias()])
    assert model.small.bias is not None
    assert model.head.bias is None
    reason = applied.replacements[0].reason
    assert "kept: 'small'," in reason
    assert "by their size alone, as the model could not be traced (symbolically traced variables" in reason
    applied.undo()
    loka.mods.apply(model, [NoBias(example=X)])
    assert model.head.bias is not None
    assert model.small.bias is None


def test_a_run_changes_nothing_and_sees_frozen_and_parametrized_heads():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 40))
    weight_norm(model[3])
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    heads = find_heads(model, X)
    assert list(heads.layers.values()) == ["3"]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())


class Counting(nn.BatchNorm1d):
    """A norm of a library's own: its forward is traced, and counts in place."""

    def forward(self, x):
        self.num_batches_tracked.add_(1)
        noise = torch.rand(1)  # drawn while it is traced
        return F.batch_norm(x + noise, self.running_mean, self.running_var, self.weight, self.bias, True)


@pytest.mark.parametrize("example", [None, X])
def test_what_a_forward_counts_and_draws_stays_out_of_the_model(example):
    model = nn.Sequential(nn.Linear(8, 8), Counting(8), nn.Linear(8, 40))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    heads = find_heads(model, example)
    assert list(heads.layers.values()) == ["2"]
    assert "size" not in heads.how  # it was followed
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_example_may_be_keyword_arguments_and_one_that_does_not_fit_is_an_error():
    model = WideAndDeep()
    heads = find_heads(model, {"x": X, "labels": torch.ones(5, 1)})
    assert set(heads.layers.values()) == {"wide", "deep.2"}
    with pytest.raises(ArgumentError, match=r"by running WideAndDeep on `example`, and that raised RuntimeError"):
        loka.mods.apply(model, [NoBias(example=X[:, :3])])
    assert model.wide.bias is not None


def test_fused_layers_are_layers():
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.SiLU(), nn.Linear(16, 40))
    loka.mods.apply(model, [loka.mods.BlockNorm(8), loka.mods.HardSwish(), FuseEpilogue()])
    loka.mods.apply(model, [NoBias()])
    assert model[0].bias is None
    assert model[3].bias is not None


class Keeping(nn.Module):
    """Keeps what it has computed, as attention does for those who plot it, and has a wide head before a narrow gate."""

    def __init__(self):
        super().__init__()
        self.gate, self.body, self.head = nn.Linear(8, 4), nn.Linear(8, 4), nn.Linear(4, 32)

    def forward(self, x):
        self.seen = self.gate(x).sigmoid()
        self.kept = {"all": [self.seen * 2]}
        return self.head(self.seen * self.body(x))


@pytest.mark.parametrize("example", [None, torch.ones(3, 8)], ids=["trace", "run"])
def test_a_model_that_keeps_what_it_computed_is_followed(example):
    model = Keeping()
    model(torch.randn(3, 8))
    seen, kept = model.seen, model.kept["all"][0]
    assert [*find_heads(model, example).layers.values()] == ["head"]
    assert model.seen is seen
    assert model.kept["all"][0] is kept


def test_a_model_that_is_one_layer_is_its_own_head():
    model = nn.Linear(16, 4)
    assert find_heads(model).layers == {id(model): ""}
    with pytest.raises(ModError, match="kept: 'bias'"):
        loka.mods.apply(model, [NoBias()])
    assert model.bias is not None


class OwnProduct(torch.autograd.Function):
    """A product as libraries write it; what is behind it must not be taken for a head."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.t() @ x


class Doubled(torch.autograd.Function):
    """An activation of one's own: it multiplies with no matrix."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def test_a_function_of_ones_own_is_a_product_where_it_takes_a_matrix():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 40, bias=False)

        def forward(self, x):
            return Doubled.apply(OwnProduct.apply(self.body(x), self.head.weight))

    assert set(find_heads(Model(), (X,)).layers.values()) == {"head"}


def test_what_a_reentrant_checkpoint_ran_is_not_followed_and_the_reason_says_so():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.small, self.head = nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(4, 40)

        def forward(self, x):
            return checkpoint(self.head, self.small(self.body(x)), use_reentrant=True)

    heads = find_heads(Model(), (X,))
    assert set(heads.layers.values()) == {"small"}  # by size: fewer than 8 outputs
    assert "CheckpointFunctionBackward cannot be followed" in heads.how


def test_a_compiled_model_is_followed_as_it_is_written():
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 40))
    model[2].compile(backend="aot_eager")
    assert set(find_heads(model, (X,)).layers.values()) == {"2"}
