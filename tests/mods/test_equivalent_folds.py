"""FoldNorm and Smooth: scales that move from where they are to where they are read."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import loka.mods
from loka.errors import ArgumentError
from loka.formats import RECIPES
from loka.mods import FoldNorm, Smooth
from loka.mods.smooth import scales
from loka.mods.trial.gain import rounding_error
from tests.mods.made_blocks import RMSNormOfALibrary, make_blocks, make_input


def relative(actual, reference):
    return float(((actual - reference).norm() / reference.norm()).detach())


def test_a_folded_norm_is_the_arithmetic_in_its_docstring():
    model, x = make_blocks(), make_input()
    q, norm, q_weight = model.block0.q, model.block0.norm, model.block0.q.weight
    applied = loka.mods.apply(model, [FoldNorm()], inputs=[x])
    assert model.block0.norm.weight is None
    assert model.block0.norm.bias is None
    wanted = q_weight.double() * norm.weight.double()
    assert torch.equal(q.weight, wanted.float())
    assert relative(q.bias.double(), applied._edits[2].before.double() + q_weight.double() @ norm.bias.double()) < 1e-6
    assert not [refusal for refusal in applied.refused if refusal.figure]


def test_an_rms_norm_of_a_library_is_folded_and_becomes_torchs_own():
    model, x = make_blocks(), make_input()
    loka.mods.apply(model, [FoldNorm()], inputs=[x])
    assert isinstance(model.block0.mlp_norm, nn.RMSNorm)
    assert model.block0.mlp_norm.eps == 1e-6
    assert not list(model.block0.mlp_norm.parameters())


def test_a_norm_with_another_scale_than_it_looks_like_is_refused():
    class GemmaRMSNorm(RMSNormOfALibrary):
        def forward(self, hidden):
            return super().forward(hidden) + hidden * 0.01

    model = nn.Sequential(GemmaRMSNorm(32), nn.Linear(32, 16))
    applied = loka.mods.apply(model, [FoldNorm(), Smooth()], inputs=[make_input()])
    assert not applied.replacements
    assert all("computes something else" in refusal.reason for refusal in applied.refused)


class LayerNormOfALibrary(nn.LayerNorm):
    """As timm derives it: a forward of its own, the same arithmetic."""

    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class Conditioned(LayerNormOfALibrary):
    """Takes more than its input."""

    def forward(self, x, scale=None):
        return super().forward(x) * (2 if scale is None else scale)


class Shaped(nn.RMSNorm):
    """Needs what it cannot be given alone."""

    def forward(self, x, shape):
        return super().forward(x).reshape(shape)


@pytest.mark.parametrize("mod", [FoldNorm(), Smooth()], ids=lambda mod: mod.name)
def test_a_layer_norm_derived_from_torchs_is_taken_for_what_it_computes(mod):
    torch.manual_seed(0)
    model = nn.Sequential(LayerNormOfALibrary(32, eps=1e-3), nn.Linear(32, 48, bias=False))
    with torch.no_grad():
        model[0].weight.uniform_(0.1, 30)
        model[0].bias.normal_()
    x = torch.randn(64, 32)
    scale, shift, weight = (each.detach().double() for each in model.parameters())
    want = (F.layer_norm(x.double(), (32,), eps=1e-3) * scale + shift) @ weight.T
    applied = loka.mods.apply(model, [mod], inputs=[x])
    assert applied.replacements
    assert (model[0].weight is None) == (mod.name == "FoldNorm")
    assert relative(model(x).double(), want) < 1e-6
    applied.undo()
    assert type(model[0]) is LayerNormOfALibrary


@pytest.mark.parametrize("norm", [Conditioned, Shaped])
def test_a_derived_norm_that_computes_something_else_is_refused(norm):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.up = norm(32), nn.Linear(32, 16)

        def forward(self, x):
            return self.up(self.norm(x, x.shape) if norm is Shaped else self.norm(x))

    applied = loka.mods.apply(Model(), [FoldNorm()], inputs=[torch.randn(64, 32)])
    assert not applied.replacements
    words = f"{norm.__name__} computes something else than a norm times its weight"
    assert [each.reason for each in applied.refused] == [words]


def test_a_shift_becomes_a_bias_where_there_was_none():
    model, x = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 16, bias=False)), make_input()
    nn.init.normal_(model[0].bias)
    output = model(x)
    with loka.mods.apply(model, [FoldNorm()], inputs=[x]):
        assert relative(model(x), output) < 1e-6
        assert list(model.state_dict()) == ["1.weight", "1.bias"]
    assert model[1].bias is None


class Post(nn.Module):
    """A residual stream after the norm, as BERT has it."""

    def __init__(self, *, inplace=False):
        super().__init__()
        self.norm, self.linear, self.inplace = nn.LayerNorm(32), nn.Linear(32, 32), inplace

    def forward(self, x):
        h = self.norm(x)
        return F.relu_(h) if self.inplace else h + self.linear(h)


class Returned(Post):
    def forward(self, x):
        h = self.norm(x)
        return self.linear(h), h


class Unread(Post):
    def forward(self, x):
        return self.linear(x) + 0 * self.norm.eps


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Post(), "its output is also read by add in the model's own forward"),
        (Post(inplace=True), "its output is also read by relu_ in the model's own forward"),
        (Returned(), "its output is also read by the model's caller"),
        (Unread(), "it was not called on the inputs"),
    ],
)
def test_a_norm_with_another_reader_stays_and_the_reader_is_named(model, words):
    applied = loka.mods.apply(model, [FoldNorm()], inputs=[make_input()])
    assert not applied.replacements
    assert applied.refused[0].fqn == "norm"
    assert words in applied.refused[0].reason


def test_a_norm_that_trains_is_not_folded_into_a_frozen_linear():
    model = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 16))
    model[1].weight.requires_grad_(False)
    applied = loka.mods.apply(model, [FoldNorm()], inputs=[make_input()])
    assert "frozen" in applied.refused[0].reason


def test_a_linear_that_reads_two_norms_by_turns_is_left_alone():
    class Turns(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.linear = nn.LayerNorm(32), nn.LayerNorm(32), nn.Linear(32, 16)

        def forward(self, x):
            return self.linear(self.a(x)) + self.linear(self.b(x))

    applied = loka.mods.apply(Turns(), [FoldNorm(), Smooth()], inputs=[make_input()])
    assert not applied.replacements
    assert all("also reads other modules' outputs" in refusal.reason for refusal in applied.refused)


def test_a_norm_read_through_views_is_folded():
    class Viewed(Post):
        def forward(self, x):
            return self.linear(self.norm(x).view(2, -1, 32))

    assert loka.mods.apply(Viewed(), [FoldNorm()], inputs=[make_input()]).replacements


# --- Smooth ---


def test_scales_of_smooth_are_those_of_smoothquant_up_to_their_median():
    loud, weight = torch.tensor([1.0, 16.0, 4.0, 0.0, torch.inf]), torch.tensor([4.0, 1.0, 4.0, 1.0, 1.0])
    assert torch.allclose(scales(loud, weight, 0.5, False), torch.tensor([0.5, 4.0, 1.0, 1.0, 1.0]))
    assert torch.equal(scales(loud * 1.3, weight, 0.5, True), torch.tensor([0.5, 4.0, 1.0, 1.0, 1.0]))
    assert torch.equal(scales(torch.zeros(3), torch.ones(3), 0.5, True), torch.ones(3))


def test_smoothing_by_powers_of_two_leaves_fp32_output_the_same_bit_for_bit_and_lowers_the_error():
    model, x = make_blocks(2), make_input()
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    output = model(x)
    applied = loka.mods.apply(model, [Smooth(alpha=None, recipe="tensorwise")], inputs=[x], tolerance=0.0)
    assert torch.equal(model(x), output)
    assert "block1.mlp_norm.weight" in {each.fqn for each in applied.replacements}
    h = []
    model.block1.gate.register_forward_pre_hook(lambda module, args: h.append(args[0]))
    model(x)
    ratio = weights["block1.mlp_norm.weight"] / model.block1.mlp_norm.weight
    assert torch.equal(ratio.log2(), ratio.log2().round())
    pairs = [(h[0], model.block1.gate.weight), (h[0] * ratio, weights["block1.gate.weight"])]
    after, before = (rounding_error(x, weight, RECIPES["tensorwise"]) for x, weight in pairs)
    assert after < before


def test_scales_pass_through_the_gate_of_an_mlp():
    torch.manual_seed(0)
    model, x = make_blocks(), make_input()
    with torch.no_grad():
        model.block0.up.weight[5] *= 3000
        model.block0.down.weight[:, 5] /= 3000
    output = model(x)
    applied = loka.mods.apply(model, [Smooth(recipe="tensorwise", only="*down")], inputs=[x])
    assert [each.fqn for each in applied.replacements] == ["block0.up.weight", "block0.down.weight"]
    assert torch.equal(model(x), output)


def test_where_nothing_is_gained_the_place_stays_with_both_figures():
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 16))
    applied = loka.mods.apply(model, [Smooth()], inputs=[torch.randn(200, 32)])
    assert not applied.replacements
    assert "nothing is gained there: error under rowwise 0.0" in applied.refused[0].reason
    assert applied.refused[0].figure > 0


@pytest.mark.parametrize("alpha", [-0.1, 1.1, "half", True])
def test_an_alpha_out_of_range_is_refused(alpha):
    with pytest.raises(ArgumentError, match="alpha="):
        Smooth(alpha=alpha)


def test_an_unknown_recipe_is_refused():
    with pytest.raises(ArgumentError, match="rowise"):
        Smooth(recipe="rowise")


def test_an_old_checkpoint_loaded_as_a_whole_brings_the_old_scales_back():
    model, x = make_blocks(), make_input()
    old, output = {name: value.clone() for name, value in model.state_dict().items()}, model(x)
    loka.mods.apply(model, [Smooth(alpha=None)], inputs=[x])
    model.load_state_dict(old)
    assert torch.equal(model(x), output)


class TwoNorms(Post):
    """A norm whose output a residual stream adds as well, another that one linear alone reads, and a raw input."""

    def __init__(self):
        super().__init__()
        self.other, self.behind, self.raw = nn.LayerNorm(32), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        return super().forward(self.raw(x)) + self.behind(self.other(x))


@pytest.mark.parametrize(
    ("only", "where", "words"),
    [
        ("linear", "norm", "its output is also read by add in the model's own forward"),
        ("raw", "raw", "its input is written by no norm and no linear whose output only linears read"),
    ],
)
def test_what_keeps_a_linear_that_was_asked_for_from_being_smoothed_is_all_that_is_told(only, where, words):
    applied = loka.mods.apply(TwoNorms(), [Smooth(only=[only])], inputs=[make_input()])
    assert [(refusal.fqn, words in refusal.reason) for refusal in applied.refused] == [(where, True)]
