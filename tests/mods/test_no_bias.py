import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize, prune

import loka.mods
from loka.errors import ArgumentError, LokaWarning, ModError
from loka.mods import NoBias


def biased(model: nn.Module) -> set[str]:
    return {name.removesuffix(".bias") for name, _ in model.named_parameters() if name.endswith("bias")}


def without_biases(model: nn.Module) -> nn.Module:
    """The independent reference: the same model with its biases set to zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name.rpartition(".")[2]:
                parameter.zero_()
    return model


def test_every_bias_goes_but_those_of_the_small_heads():
    model = nn.ModuleDict(
        {
            "conv": nn.Conv1d(4, 4, 3),
            "up": nn.ConvTranspose2d(4, 4, 3),
            "norm": nn.LayerNorm(16),
            "group": nn.GroupNorm(2, 16),
            "batch": nn.BatchNorm1d(16),
            "mix": nn.Bilinear(4, 4, 16),
            "body": nn.Linear(16, 8),
            "click": nn.Linear(8, 1),
            "dwell": nn.Linear(8, 7),
        }
    )
    applied = loka.mods.apply(model, [NoBias()])
    assert biased(model) == {"click", "dwell"}
    assert len(applied.replacements) == 7
    assert "kept: 'click', 'dwell', found as prediction heads" in applied.replacements[0].reason


def test_without_a_small_head_the_last_linear_keeps_its_bias():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 1000), nn.LayerNorm(1000))
    loka.mods.apply(model, [NoBias()])
    assert biased(model) == {"1"}


def test_weights_stay_the_same_objects():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 1))
    weights = [model[0].weight, model[1].weight]
    loka.mods.apply(model, [NoBias()])
    assert model[0].weight is weights[0]
    assert model[1].weight is weights[1]
    assert "bias=False" in repr(model[0])


@pytest.mark.parametrize(
    "keep", [["head*"], ["head"], "head", ["head.0", "head.1"], ["head.*.bias"], [r"re:head\.\d"], ["head", "head.0"]]
)
def test_keep_names_modules_containers_or_parameters(keep):
    model = nn.ModuleDict({"body": nn.Linear(8, 8), "head": nn.ModuleList([nn.Linear(8, 64), nn.Linear(8, 64)])})
    loka.mods.apply(model, [NoBias(keep=keep)])
    assert biased(model) == {"head.0", "head.1"}


def test_an_empty_keep_keeps_nothing():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
    applied = loka.mods.apply(model, [NoBias(keep=[])])
    assert biased(model) == set()
    assert applied.replacements[0].reason == "bias removed, kept: none"


def test_keep_with_a_typing_error_names_the_nearest_module():
    model = nn.ModuleDict({"body": nn.Linear(8, 8), "head": nn.Linear(8, 1)})
    with pytest.raises(ArgumentError, match=r"'haed\*' matches no module with a bias. Nearest: 'head"):
        loka.mods.apply(model, [NoBias(keep=["haed*"])])
    assert biased(model) == {"body", "head"}


def test_keep_may_name_a_head_that_has_no_bias_anyway():
    model = nn.ModuleDict({"body": nn.Linear(8, 8), "head": nn.Linear(8, 1, bias=False)})
    loka.mods.apply(model, [NoBias(keep=["head"])])
    assert biased(model) == set()


@pytest.mark.parametrize("keep", [["re:("], [""]])
def test_malformed_keep_is_refused_at_once(keep):
    with pytest.raises(ArgumentError):
        NoBias(keep=keep)


def test_the_outputs_are_those_of_zero_biases():
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 16), nn.LayerNorm(16)
    )
    x = torch.randn(4, 3, 4, 4)
    loka.mods.apply(model, [NoBias(keep=[])])
    actual = model(x)
    reference = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 16), nn.LayerNorm(16)
    )
    reference.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(actual, without_biases(reference)(x))


def encoder(layers: int, **options) -> nn.TransformerEncoder:
    torch.manual_seed(2)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, **options)
    model = nn.TransformerEncoder(layer, layers, enable_nested_tensor=not options.get("norm_first", False))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_transformer_encoder_runs_on_as_if_its_biases_were_zero(norm_first, training, padded):
    model, reference = encoder(2, norm_first=norm_first), without_biases(encoder(2, norm_first=norm_first))
    loka.mods.apply(model, [NoBias(keep=[])])
    assert biased(model) == set()
    assert not any("bias" in name for name, _ in model.named_parameters())
    x = torch.randn(3, 5, 16)
    mask = torch.arange(5) >= torch.tensor([5, 3, 4])[:, None] if padded else None
    with torch.no_grad():
        actual = model.train(training)(x, src_key_padding_mask=mask)
        expected = reference.train(training)(x, src_key_padding_mask=mask)
    if mask is not None:  # the reference zeroes padded rows on its fused path only
        actual, expected = actual[~mask], expected[~mask]
    torch.testing.assert_close(actual, expected)


def test_a_transformer_encoder_of_which_only_the_ffn_is_rewritten_runs_on():
    model = encoder(2).eval()
    reference = encoder(2).eval()
    with torch.no_grad():
        for layer in reference.layers:
            layer.linear1.bias.zero_()
            layer.linear2.bias.zero_()
    applied = loka.mods.apply(model, [NoBias(keep=[])], filter_fn=lambda module, fqn: ".linear" in fqn)
    x = torch.randn(3, 5, 16)
    with torch.no_grad():
        torch.testing.assert_close(model(x), reference(x))
    switches = [r for r in applied.replacements if not r.fqn.endswith("bias")]
    assert [r.fqn for r in switches] == [
        "use_nested_tensor",
        "layers.0.activation_relu_or_gelu",
        "layers.1.activation_relu_or_gelu",
    ]
    applied.undo()
    assert model.use_nested_tensor
    assert model.layers[0].activation_relu_or_gelu == 1


def test_attention_keeps_both_of_its_biases_or_none():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2, batch_first=True), "ffn": nn.Linear(16, 16)})
    with pytest.raises(ModError, match=r"'attention\.out_proj\.bias' alone.*MultiheadAttention 'attention'"):
        loka.mods.apply(model, [NoBias(keep=["attention.in_proj_bias"])])
    loka.mods.apply(model, [NoBias(keep=["attention.out_proj"])])
    assert model["attention"].in_proj_bias is None
    x = torch.randn(2, 3, 16)
    with torch.no_grad():
        model.eval()["attention"](x, x, x)


def test_attention_keeps_its_extra_key_and_value_tokens():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2, add_bias_kv=True), "ffn": nn.Linear(16, 16)})
    loka.mods.apply(model, [NoBias(keep=[])])
    assert model["attention"].bias_k is not None
    x = torch.randn(3, 2, 16)
    model["attention"](x, x, x)


def test_a_bias_it_does_not_know_stays_and_is_named():
    model = nn.ModuleDict({"rnn": nn.GRU(8, 8), "head": nn.Linear(8, 1), "body": nn.Linear(8, 8)})
    with pytest.warns(LokaWarning, match=r"'rnn\.bias_ih_l0', 'rnn\.bias_hh_l0'") as caught:
        loka.mods.apply(model, [NoBias()])
    assert caught[0].filename == __file__
    assert model["rnn"].bias_ih_l0 is not None


class Derived(nn.LayerNorm):
    """A class of a library's own, with the forward that it was derived with."""


class Apart(nn.Module):
    """A weight and a bias that the model's own code reads, as selective state spaces do with their step."""

    def __init__(self):
        super().__init__()
        self.up, self.norm, self.step, self.head = nn.Linear(8, 16), Derived(16), nn.Linear(16, 16), nn.Linear(16, 9)

    def forward(self, x):
        x = self.norm(self.up(x))
        x = F.softplus(x @ self.step.weight.T + self.step.bias + torch.ones(16))
        return self.head(x) + torch.zeros(9)  # constants of the trace


def test_a_bias_that_other_code_reads_stays_and_is_named():
    model = Apart()
    with pytest.warns(LokaWarning, match=r"leaves 'step\.bias': code outside of its layer") as caught:
        applied = loka.mods.apply(model, [NoBias()])
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert model.step.bias is not None
    assert model.head.bias is not None
    assert [each.fqn for each in applied.replacements] == ["up.bias", "norm.bias"]
    assert "no product lies between" in applied.replacements[0].reason
    model(torch.randn(3, 8)).sum().backward()


@pytest.mark.parametrize(
    ("bias", "said"),
    [
        (
            True,
            r"All 2 biases there are kept: 'step\.bias', 'head\.bias'\. Code outside of its layer reads 'step\.bias'; "
            r"the others are those of layers found as prediction heads",
        ),
        (False, r"'step\.bias'; the other 1 have none\. Code outside of its layer reads 'step\.bias'\. Name in `keep`"),
    ],
)
def test_a_bias_that_other_code_reads_is_not_said_to_be_one_of_a_head(bias, said):
    class Read(nn.Module):
        def __init__(self):
            super().__init__()
            self.step, self.head = nn.Linear(8, 16), nn.Linear(16, 9, bias=bias)

        def forward(self, x):
            return self.head(F.linear(x, self.step.weight, self.step.bias))

    with pytest.warns(LokaWarning, match=r"leaves 'step\.bias'"), pytest.raises(ModError, match=said):
        loka.mods.apply(Read(), [NoBias()])


def test_naming_an_unknown_bias_in_keep_silences_the_warning():
    model = nn.ModuleDict({"rnn": nn.GRU(8, 8), "head": nn.Linear(8, 1), "body": nn.Linear(8, 8)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loka.mods.apply(model, [NoBias(keep=["rnn", "head"])])


def test_a_global_bias_of_the_prediction_counts_as_a_head():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
    model.register_parameter("bias", nn.Parameter(torch.zeros(1)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loka.mods.apply(model, [NoBias()])
    assert model.bias is not None


def test_a_parametrized_or_pruned_bias_is_refused_by_name():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 1))
    parametrize.register_parametrization(model[0], "bias", nn.Tanh())
    with pytest.raises(ModError, match=r"'0\.bias'.*parametrized or pruned"):
        loka.mods.apply(model, [NoBias(keep=["2"])], filter_fn=lambda module, fqn: fqn != "1")
    prune.l1_unstructured(model[1], "bias", amount=2)
    with pytest.raises(ModError, match=r"'1\.bias'.*parametrized or pruned"):
        loka.mods.apply(model, [NoBias(keep=["2", "0"])])


def test_a_parametrized_weight_is_no_obstacle():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
    parametrize.register_parametrization(model[0], "weight", nn.Tanh())
    loka.mods.apply(model, [NoBias()])
    assert model[0].bias is None
    model(torch.randn(2, 8))


def test_a_linear_with_a_forward_of_its_own_is_refused_by_name():
    class Shifted(nn.Linear):
        def forward(self, input):
            return input @ self.weight.T + self.bias

    model = nn.ModuleDict({"body": Shifted(8, 8), "other": nn.Linear(8, 8), "head": nn.Linear(8, 1)})
    with pytest.raises(ModError, match=r"'body\.bias'.*Shifted has a forward of its own"):
        loka.mods.apply(model, [NoBias()])
    loka.mods.apply(model, [NoBias(keep=["body", "head"])])
    assert biased(model) == {"body", "head"}


def test_a_lazy_linear_loses_its_bias_before_it_is_made():
    model = nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 1))
    loka.mods.apply(model, [NoBias()])
    model(torch.randn(2, 4))
    assert model[0].weight.shape == (8, 4)
    assert model[0].bias is None


@pytest.mark.parametrize(
    ("lazy", "shape"),
    [
        (lambda: nn.LazyLinear(8), (4, 6)),
        (lambda: nn.LazyConv1d(8, 3), (4, 6, 5)),
        (lambda: nn.LazyConvTranspose1d(8, 3), (4, 6, 5)),
    ],
    ids=["linear", "conv", "transposed"],
)
@pytest.mark.parametrize("ran", [True, False])
def test_the_bias_of_a_lazy_layer_comes_back_as_the_layer_is_by_then(lazy, shape, ran):
    model, x = nn.Sequential(lazy()), torch.randn(shape)
    bias = model[0].bias
    applied = loka.mods.apply(model, [NoBias(keep=[])])
    before = model(x) if ran else None
    applied.undo()
    assert model[0].bias is bias
    after = model(x)
    assert bias.numel() == model[0](x).shape[1]
    if before is not None:
        assert torch.equal(after, before)
    after.sum().backward()
    assert bias.grad is not None


class Cross(nn.Module):
    """Biases in a list, as cross networks keep them: the parameter itself is called `0`."""

    def __init__(self):
        super().__init__()
        self.kernels = nn.ParameterList(torch.randn(16, 16) for _ in range(2))
        self.bias = nn.ParameterList(torch.zeros(16) for _ in range(2))
        self.up, self.head = nn.Linear(16, 24), nn.Linear(24, 1)


def test_biases_in_a_list_are_named_too():
    with pytest.warns(LokaWarning, match=r"'bias\.0', 'bias\.1'"):
        applied = loka.mods.apply(Cross(), [NoBias()])
    assert [each.fqn for each in applied.replacements] == ["up.bias"]


def test_where_only_heads_are_left_it_says_so_and_how_to_take_them_too():
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(8, 16), nn.Linear(8, 16)

        def forward(self, x):
            return torch.tanh(self.left(x)) * torch.tanh(self.right(x))

    model = TwoHeads()
    words = (
        r"All 2 biases there are kept: 'left\.bias', 'right\.bias'\. They are those of layers found as prediction "
        r"heads: no product lies between them and the output\. Name in `keep` those that are heads, \[\] if none is"
    )
    with pytest.raises(ModError, match=words):
        loka.mods.apply(model, [NoBias()])
    with pytest.raises(ModError, match=r"'left\.bias', 'right\.bias'\. Narrow `keep`"):
        loka.mods.apply(model, [NoBias(keep=["left", "right"])])
    loka.mods.apply(model, [NoBias(keep=[])])
    assert biased(model) == set()
