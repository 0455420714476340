"""Hadamard: rotations of every size, what they do to the error, and how they are kept."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import loka.mods
from loka.errors import ArgumentError
from loka.formats import RECIPES
from loka.mods import Hadamard
from loka.mods.hadamard import RotatedLinear
from loka.mods.rotation import Mixing, Rotation, balanced_basis, channel_scale, hadamard, hartley
from loka.mods.trial.gain import rounding_error
from tests.mods.made_blocks import make_blocks, make_input


def relative(actual, reference):
    return float(((actual - reference).norm() / reference.norm()).detach())


def test_the_fast_transform_is_sylvesters_matrix():
    wanted = torch.ones(1, 1, dtype=torch.float64)
    for width in (1, 2, 4, 8, 16):
        assert torch.equal(hadamard(torch.eye(width, dtype=torch.float64)), wanted)
        wanted = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), wanted)


@pytest.mark.parametrize("width", [3, 13, 429])
def test_a_hartley_matrix_is_orthogonal_and_flat(width):
    matrix = hartley(width)
    assert torch.allclose(matrix @ matrix.t(), torch.eye(width, dtype=torch.float64), atol=1e-10)
    assert float(matrix.abs().max()) <= (2 / width) ** 0.5 + 1e-12


@given(width=st.sampled_from([1, 2, 12, 13, 48, 429, 576]), block=st.sampled_from([None, 1, 8, 64, 1000]))
def test_every_width_is_rotated_orthogonally(width, block):
    mixing = Mixing(width, block).double()
    turned = mixing(torch.eye(width, dtype=torch.float64))
    assert torch.allclose(turned @ turned.t(), torch.eye(width, dtype=torch.float64), atol=1e-5)


def test_blocks_do_not_mix_with_each_other_and_the_tail_is_a_block_of_its_own():
    turned = Mixing(13, 4)(torch.eye(13))
    blocks = [slice(0, 4), slice(4, 8), slice(8, 12), slice(12, 13)]
    for one in blocks:
        for other in blocks:
            assert bool((turned[one, other] != 0).all()) == (one == other)


def test_a_whole_width_spreads_one_loud_feature_over_all():
    for width in (13, 429, 576):
        spread = Mixing(width)(torch.eye(width)[5])
        assert float(spread.abs().max()) <= 2.01 / width**0.5


@pytest.mark.parametrize("width", [13, 429, 576])
@pytest.mark.parametrize("balance", ["none", "channel", "full"])
def test_a_rotated_linear_computes_what_the_linear_did(width, balance):
    torch.manual_seed(0)
    linear, x = nn.Linear(width, 24), torch.randn(64, width) * torch.logspace(2, -2, width)
    rotation = Rotation(Mixing(width))
    if balance == "channel":
        rotation = Rotation(Mixing(width), scale=channel_scale(x.square().mean(0), linear.weight))
    elif balance == "full":
        rotation = Rotation(Mixing(width), basis=balanced_basis(x.t() @ x / 64, linear.weight, Mixing(width)).float())
    inner = nn.Linear(width, 24)
    inner.weight.data, inner.bias = rotation.of_weight(linear.weight).float(), linear.bias
    assert relative(RotatedLinear(rotation, inner)(x), linear(x)) < 1e-5
    assert relative(x.double() @ rotation.matrix(x), rotation(x.double())) < 1e-6


def test_a_balanced_basis_makes_both_moments_the_same_diagonal():
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    weight = torch.randn(40, 12, generator=generator, dtype=torch.float64)
    plain = Mixing(12, 1).double()  # blocks of one: no mixing
    basis = balanced_basis(mixed @ mixed.t(), weight, plain)
    inputs, outputs = mixed @ mixed.t(), weight.t() @ weight
    for moments in (inputs, outputs):
        moments.diagonal().add_(1e-2 * moments.diagonal().mean())
    first = basis.t() @ inputs @ basis
    inverse = torch.linalg.inv(basis)
    second = inverse @ outputs @ inverse.t()
    assert torch.allclose(first, second, atol=1e-8 * float(first.max()))
    assert float((first - first.diagonal().diag()).abs().max()) < 1e-8 * float(first.max())


def correlated(rows, width=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(width, width, generator=torch.Generator().manual_seed(7)) * torch.logspace(0, -2.5, width)
    return torch.randn(rows, width, generator=generator) @ basis.t()


def test_each_balance_lowers_the_error_on_rows_it_was_not_fitted_to():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96))
    x, later = correlated(4000), correlated(1000, seed=1)
    x, later = (each * torch.logspace(1, -1, 64) for each in (x, later))
    recipe = RECIPES["rowwise"]
    errors = [rounding_error(later, model[0].weight, recipe)]
    for balance in ("channel", "full"):
        with loka.mods.apply(model, [Hadamard(balance=balance)], inputs=[x]):
            rotation, inner = model[0].rotation, model[0].inner
            change = lambda x, w, rotation=rotation, inner=inner: (rotation(x), inner.weight)  # noqa: E731
            errors.append(rounding_error(later, torch.zeros_like(inner.weight) + _weight(model), recipe, change))
    assert errors[1] < 0.95 * errors[0]
    assert errors[2] < 0.5 * errors[0]


def _weight(model):
    """The weight that stood there: what turns back into the one inside."""
    rotated = model[0]
    unit = rotated.rotation.matrix(rotated.inner.weight)
    return (rotated.inner.weight.detach().double() @ unit.t()).float()


def test_directions_kept_high_lower_the_error_further_and_are_the_leading_ones():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 96)), correlated(4000)
    output, errors = model(x), []
    for keep in (0.0, 0.25):
        with loka.mods.apply(model, [Hadamard(balance="full", keep=keep)], inputs=[x]) as applied:
            errors.append(float(applied.replacements[0].reason.rpartition("-> ")[2]))
            assert relative(model(x), output) < 1e-5
            assert relative(model[0].multiply(x), output - model[0].inner.bias) < 1e-5
    assert errors[1] < 0.5 * errors[0]
    loka.mods.apply(model, [Hadamard(balance="full", keep=0.25)], inputs=[x])
    layer = model[0]
    assert (layer.inner.in_features, layer.loud.in_features, layer.in_features) == (48, 16, 64)
    turned = layer.rotation(x).square().mean(0)
    assert float(turned[48:].min()) > float(turned[:48].max())


def test_the_figure_in_the_reason_is_that_of_the_rows_kept():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 96)), correlated(60)
    applied = loka.mods.apply(model, [Hadamard(balance="full")], inputs=[x])
    assert applied.replacements or "nothing is gained there" in applied.refused[0].reason
    assert "error under rowwise 0.0" in (applied.replacements or applied.refused)[0].reason


def test_without_a_gain_the_linear_stays():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96))
    applied = loka.mods.apply(model, [Hadamard(balance="none")], inputs=[torch.randn(500, 64)])
    assert not applied.replacements
    assert "nothing is gained there" in applied.refused[0].reason


def test_off_line_the_rotation_is_folded_into_the_linear_before_at_no_cost():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 96), nn.ReLU(), nn.Linear(96, 8)), correlated(1000)
    output, keys = model(x), list(model.state_dict())
    applied = loka.mods.apply(model, [Hadamard(online=False, balance="full")], inputs=[x])
    assert [each.fqn for each in applied.replacements] == ["0.weight", "0.bias", "1.weight"]
    assert relative(model(x), output) < 1e-5
    assert list(model.state_dict()) == keys


def test_off_line_nothing_is_folded_through_a_nonlinearity():
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 96))
    with pytest.raises(loka.errors.ModError, match="online=False"):
        loka.mods.apply(model, [Hadamard(online=False)], inputs=[correlated(100)])


@pytest.mark.parametrize(("balance", "keep"), [("channel", 0), ("full", 0), ("full", 0.5)])
def test_checkpoints_from_before_and_after_load(balance, keep):
    model, x = make_blocks(), make_input(800)
    old, output = copy.deepcopy(model.state_dict()), model(x)
    applied = loka.mods.apply(model, [Hadamard(balance=balance, keep=keep)], inputs=[x])
    assert applied.replacements
    new = copy.deepcopy(model.state_dict())
    for checkpoint in (old, new):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        model.load_state_dict(checkpoint)
        assert relative(model(x), output) < 1e-5


def test_dtypes_of_inputs_are_dtypes_of_outputs():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        x = torch.randn(4, 12).to(dtype)
        assert Mixing(12)(x).dtype == dtype
        assert Rotation(Mixing(12), scale=torch.ones(12), basis=torch.eye(12))(x).dtype == dtype
    assert Mixing(12)(torch.zeros(0, 12)).shape == (0, 12)


@pytest.mark.parametrize(
    "options",
    [
        {"block": 0},
        {"block": "8"},
        {"balance": "some"},
        {"balance": "full", "block": 8},
        {"recipe": "fp8"},
        {"keep": 0.1},
        {"balance": "full", "keep": 1.0},
        {"balance": "full", "keep": 0.1, "online": False},
    ],
)
def test_options_that_cannot_be_meant_are_refused(options):
    with pytest.raises(ArgumentError):
        Hadamard(**options)
