import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import loka.mods
from loka.errors import ArgumentError, ModError
from loka.mods import BlockNorm
from loka.mods.block_norm import BlockRMSNorm, block_norm


def reference(x: torch.Tensor, block: int, eps: float) -> torch.Tensor:
    """The definition, one element at a time, in float64."""
    rows = x.double().reshape(-1, x.shape[-1]).tolist()
    out = []
    for row in rows:
        result = []
        for start in range(0, len(row), block):
            group = row[start : start + block]
            mean_square = math.fsum(value * value for value in group) / len(group)
            result += [value / math.sqrt(mean_square + eps) for value in group]
        out.append(result)
    return torch.tensor(out, dtype=torch.float64).reshape(x.shape)


@given(
    features=st.integers(1, 40),
    block=st.integers(1, 48),
    rows=st.integers(0, 3),
    eps=st.sampled_from([0.0, 1e-5, 0.1]),
    seed=st.integers(0, 10),
)
@settings(max_examples=80, deadline=None)
def test_every_width_and_block_agrees_with_the_definition(features, block, rows, eps, seed):
    x = torch.randn(rows, features, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(block_norm(x, block, eps), reference(x, block, eps), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
@pytest.mark.parametrize("features", [512, 600, 100])
def test_low_precision_input_is_normalised_in_fp32_and_rounded_once(dtype, rtol, features):
    torch.manual_seed(0)
    # Large enough that squares leave the range of fp16.
    x = (300 * torch.randn(4, 3, features)).to(dtype)
    actual = block_norm(x, 256, 1e-5)
    assert actual.dtype == dtype
    assert actual.shape == x.shape
    torch.testing.assert_close(actual.double(), reference(x, 256, 1e-5), rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("eps", [None, 1e-6])
def test_whole_blocks_are_rms_norms(eps):
    x = torch.randn(5, 64)
    expected = nn.RMSNorm(16, eps=eps, elementwise_affine=False)(x.view(-1, 16)).view(5, 64)
    torch.testing.assert_close(block_norm(x, 16, eps), expected, rtol=0, atol=0)


@pytest.mark.parametrize(("features", "block"), [(8, 4), (7, 3), (3, 5)])
def test_gradients_are_right_with_and_without_a_tail(features, block):
    x = torch.randn(2, features, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: block_norm(x, block, 1e-5), (x,))


def test_a_loud_feature_silences_its_own_block_only():
    x = torch.ones(1, 32)
    x[0, 3] = 1e4
    y = block_norm(x, 8, 1e-5)
    assert y[0, 4] < 1e-3
    torch.testing.assert_close(y[0, 8:], torch.ones(24), rtol=1e-4, atol=0)


def test_strided_input_and_any_leading_shape_are_fine():
    x = torch.randn(6, 20, 3).transpose(1, 2)
    torch.testing.assert_close(block_norm(x, 8, 1e-5).double(), reference(x, 8, 1e-5), rtol=1e-5, atol=1e-6)
    assert block_norm(torch.randn(20), 8).shape == (20,)


def test_the_module_has_no_parameters_and_refuses_another_width():
    module = BlockRMSNorm(20, 8, 1e-5)
    assert list(module.parameters()) == []
    assert module.state_dict() == {}
    with pytest.raises(ArgumentError, match="20"):
        module(torch.randn(2, 16))


@pytest.mark.parametrize("block", [0, -1, 2.0, True, None])
def test_a_block_is_a_positive_number_of_features(block):
    for make in (BlockNorm, lambda block: BlockRMSNorm(4, block)):
        with pytest.raises(ArgumentError, match="block="):
            make(block)


def test_norms_over_the_last_dimension_are_replaced_with_their_eps():
    model = nn.Sequential(nn.LayerNorm(32, eps=1e-3), nn.RMSNorm(20, eps=1e-6), nn.RMSNorm([12]))
    applied = loka.mods.apply(model, [BlockNorm(16)])
    assert [repr(layer) for layer in model] == [
        "BlockRMSNorm(32, block=16, eps=0.001)",
        "BlockRMSNorm(20, block=16, eps=1e-06)",
        "BlockRMSNorm(12, block=16, eps=None)",
    ]
    assert [r.reason for r in applied.replacements] == [
        "RMS per block of features: 2 of 16",
        "RMS per block of features: 1 of 16 and one of 4, too short for a stable RMS",
        "RMS per block of features: one of 12",
    ]


def test_other_norms_are_left_alone_and_listed():
    model = nn.ModuleList([nn.LayerNorm(16), nn.LayerNorm([4, 16]), nn.BatchNorm1d(16), nn.GroupNorm(2, 16)])
    kept = list(model)[1:]
    applied = loka.mods.apply(model, [BlockNorm(8)])
    assert isinstance(model[0], BlockRMSNorm)
    assert list(model)[1:] == kept
    assert "left alone: '1 (LayerNorm)', '2 (BatchNorm1d)', '3 (GroupNorm)'" in applied.replacements[0].reason


@pytest.mark.parametrize(
    ("norm", "words"),
    [
        (nn.BatchNorm1d(16), "unsupported norm: BatchNorm1d takes its statistics over the batch"),
        (nn.GroupNorm(2, 16), "unsupported norm: GroupNorm"),
        (nn.LayerNorm([4, 16]), "unsupported norm: it spans the last 2 dimensions"),
    ],
)
def test_other_norms_are_refused_when_they_are_selected(norm, words):
    model = nn.ModuleDict({"good": nn.LayerNorm(16), "other": norm})
    with pytest.raises(ModError, match=rf"'other': {words}"):
        loka.mods.apply(model, [BlockNorm(8, only=["other"])])
    loka.mods.apply(model, [BlockNorm(8, only=["good"])])
    assert model["other"] is norm


def test_a_selection_with_a_typing_error_names_the_nearest_norm():
    model = nn.ModuleDict({"norm_in": nn.LayerNorm(16)})
    with pytest.raises(ArgumentError, match="'norm_in'"):
        loka.mods.apply(model, [BlockNorm(8, only=["nrom_in"])])


def test_a_compiled_block_norm_serves_every_batch_size_with_one_graph():
    module = BlockRMSNorm(20, 8, 1e-5)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(module, backend=count, fullgraph=True, dynamic=True)
    for rows in (2, 5, 9):
        x = torch.randn(rows, 20)
        torch.testing.assert_close(compiled(x), module(x))
    assert len(graphs) == 1


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_norms_of_a_transformer_encoder_are_used_in_inference_too(training):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    loka.mods.apply(model, [BlockNorm(8)])
    x = torch.randn(3, 5, 16)
    mask = torch.arange(5) >= torch.tensor([5, 3, 4])[:, None]
    expected = model.train()(x, src_key_padding_mask=mask)  # training runs through the modules
    with torch.no_grad():
        actual = model.train(training)(x, src_key_padding_mask=mask)
    torch.testing.assert_close(actual[~mask], expected.detach()[~mask])
