"""KeepRowsHigh and PadToAlignment: a linear in parts, and one that is filled up."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import loka.mods
from loka.dispatch.running.convert import unreached
from loka.errors import ArgumentError, ModError
from loka.formats import RECIPES
from loka.mods import Hadamard, KeepRowsHigh, PadToAlignment, SplitOutlierRows
from loka.mods.keep_rows import SplitLinear
from loka.mods.pad import PaddedLinear
from loka.mods.trial.gain import rounding_error
from loka.numerics import product_error
from loka.quantize import quantize
from tests.dispatch.made_conversion import plan_for
from tests.mods.made_blocks import make_blocks, make_input


def relative(actual, reference):
    return float(((actual - reference).norm() / reference.norm()).detach())


def rest_of(module):
    """Record what reaches the part that may go to FP8."""
    seen = []
    module.rest.register_forward_pre_hook(lambda inner, args: seen.append(args[0].detach()))
    return seen


def test_loud_columns_and_rows_never_reach_the_part_that_may_go_to_fp8():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 48)), make_input(loud_rows=2)
    output = model(x)
    mod = KeepRowsHigh(columns=2, rows=8.0, recipe="tensorwise")
    applied = loka.mods.apply(model, [mod], inputs=[x])
    assert "2 columns and one row in 48 kept high: error under tensorwise" in applied.replacements[0].reason
    seen = rest_of(model[0])
    assert relative(model(x), output) < 1e-6
    assert set(model[0].columns.tolist()) >= {3}
    assert not seen[0][:2].any()
    assert not seen[0][:, model[0].columns].any()
    assert not model[0].rest.weight[:, model[0].columns].any()
    assert bool(seen[0][2:].any())


def test_the_quiet_rows_gain_what_the_loud_ones_took_from_them():
    torch.manual_seed(0)
    weight, x = torch.randn(48, 32), make_input(loud_rows=1) * torch.logspace(0, -3, 96).unsqueeze(1)
    model = nn.Sequential(nn.Linear(32, 48, bias=False))
    model[0].weight.data = weight
    tensorwise = RECIPES["tensorwise"]
    before = rounding_error(x, weight, tensorwise)
    loka.mods.apply(model, [KeepRowsHigh(columns=0, rows=8.0, recipe="tensorwise")], inputs=[x])
    seen = rest_of(model[0])
    model(x)
    assert model[0].loud is None
    after = rounding_error(seen[0][seen[0].any(1)], weight, tensorwise)
    assert after < 0.6 * before


def test_columns_are_chosen_by_what_they_add_to_the_output():
    model, x = nn.Sequential(nn.Linear(32, 48)), make_input()
    with torch.no_grad():
        model[0].weight[:, 3] = 0  # loud, and read by nobody
        model[0].weight[:, 17] *= 100
    loka.mods.apply(model, [KeepRowsHigh(columns=1, rows=None)], inputs=[x])
    assert model[0].columns.tolist() == [17]


@given(rows=st.integers(0, 9), period=st.integers(1, 5), lead=st.sampled_from([(), (1,), (2, 3)]))
def test_a_split_linear_is_the_linear_for_any_number_of_rows(rows, period, lead):
    torch.manual_seed(rows)
    linear = nn.Linear(6, 5)
    columns = torch.tensor([1, 4])
    rest, loud = nn.Linear(6, 5), nn.Linear(2, 5, bias=False)
    rest.weight.data, rest.bias = linear.weight.detach().index_fill(1, columns, 0), linear.bias
    loud.weight.data = linear.weight.detach()[:, columns]
    x = torch.randn(*lead, rows, 6)
    for split in (SplitLinear(rest, loud, columns, period), SplitLinear(rest, loud, columns, 0)):
        assert torch.allclose(split(x), linear(x), atol=1e-5)
        assert torch.allclose(split.multiply(x), linear(x) - linear.bias, atol=1e-5)


def test_the_parts_are_sites_of_their_own_and_gradients_reach_them():
    model, x = make_blocks(), make_input(loud_rows=1)
    loka.mods.apply(model, [KeepRowsHigh(recipe="tensorwise", only="*down")], inputs=[x])
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert {"block0.down.rest", "block0.down.loud"} <= set(names)
    model(x).square().sum().backward()
    assert not model.block0.down.rest.weight.grad[:, model.block0.down.columns].any()
    assert bool(model.block0.down.loud.weight.grad.any())


def test_a_plan_converts_the_rest_and_the_quiet_rows_gain():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 48)), make_input(loud_rows=1) * torch.logspace(0, -3, 96).unsqueeze(1)
    plain, exact = copy.deepcopy(model), (model(x) - model[0].bias).detach()
    loka.mods.apply(model, [KeepRowsHigh(recipe="tensorwise")], inputs=[x])
    tensorwise = {"fprop": "tensorwise", "dgrad": None, "wgrad": None}
    loka.convert(plain, plan_for(plain, {"0": tensorwise}), emulate=True)
    loka.convert(model, plan_for(model, {"0.rest": tensorwise}), emulate=True)
    with torch.no_grad():
        before, after = (product_error(each(x) - model[0].rest.bias, exact).row_error for each in (plain, model))
    assert unreached(model) == ()
    assert 0 < after < 0.5 * before


def test_other_mods_rewrite_the_rest_and_leave_the_loud_part_alone():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(30, 50)), make_input(400, 30, loud_rows=2)
    output = model(x)
    mods = [KeepRowsHigh(columns=2), Hadamard(balance="full"), PadToAlignment()]
    loka.mods.apply(model, mods, inputs=[x])
    names = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert names == {"0.rest.inner.inner", "0.loud"}
    assert model[0].period > 0
    assert relative(model(x), output) < 1e-5


def test_an_old_checkpoint_is_split_on_the_way():
    model, x = make_blocks(), make_input(loud_rows=1)
    old, output = copy.deepcopy(model.state_dict()), model(x)
    loka.mods.apply(model, [KeepRowsHigh(recipe="tensorwise"), PadToAlignment(24)], inputs=[x])
    for checkpoint in (old, copy.deepcopy(model.state_dict())):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        model.load_state_dict(checkpoint)
        assert relative(model(x), output) < 1e-5


def test_the_other_name_is_the_same_mod():
    assert SplitOutlierRows is KeepRowsHigh


@pytest.mark.parametrize(
    "options", [{"columns": -1}, {"columns": 1.5}, {"columns": "4"}, {"rows": 1}, {"columns": 0, "rows": None}]
)
def test_options_that_keep_nothing_or_everything_are_refused(options):
    with pytest.raises(ArgumentError):
        KeepRowsHigh(**options)


def test_inputs_of_zeros_are_refused_in_words():
    model = nn.Sequential(nn.Linear(8, 8))
    applied = loka.mods.apply(model, [KeepRowsHigh(), Hadamard(balance="full")], inputs=[torch.zeros(5, 8)])
    assert not applied.replacements
    assert len(applied.refused) == 2


def test_a_linear_that_gets_no_row_is_refused_in_words():
    model = nn.Sequential(nn.Linear(8, 8))
    applied = loka.mods.apply(model, [KeepRowsHigh()], inputs=[torch.zeros(0, 8)])
    assert applied.refused[0].reason == "it was not called on the inputs, or with no row"


# --- PadToAlignment ---


@pytest.mark.parametrize(("k", "n"), [(13, 429), (429, 13), (10413, 16), (7, 17)])
@pytest.mark.parametrize("bias", [True, False])
def test_odd_sizes_are_filled_up_inside_and_the_state_dict_is_what_it_was(k, n, bias):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(k, n, bias=bias)), torch.randn(5, k)
    old, output = copy.deepcopy(model.state_dict()), model(x)
    applied = loka.mods.apply(model, [PadToAlignment(only="0")], inputs=[x])
    inner = model[0].inner
    assert (inner.in_features % 16, inner.out_features % 16) == (0, 0)
    assert relative(model(x), output) < 1e-6
    assert model(x).shape == output.shape
    new = model.state_dict()
    assert list(new) == list(old)
    assert all(torch.equal(new[key], old[key]) for key in old)
    with torch.no_grad():
        inner.weight.zero_()
    model.load_state_dict(old)
    assert relative(model(x), output) < 1e-6
    applied.undo()
    model.load_state_dict(new)


def test_padding_stays_zero_in_training_and_enters_no_scale():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(13, 19), nn.Tanh(), nn.Linear(19, 19)), torch.randn(64, 13)
    loka.mods.apply(model, [PadToAlignment()], inputs=[x])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (model(x) - 1).square().sum().backward()
        optimizer.step()
    for layer in (model[0], model[2]):
        weight, (n, k) = layer.inner.weight.detach(), (layer.out_features, layer.in_features)
        assert not weight[n:].any()
        assert not weight[:, k:].any()
        assert not layer.inner.bias[n:].any()
        for recipe in ("tensorwise", "rowwise"):
            spec = RECIPES[recipe].operand("weight")
            scale, plain = quantize(weight, spec)[1], quantize(weight[:n, :k], spec)[1]
            assert torch.equal(scale.flatten()[: plain.numel()], plain.flatten())


def test_small_heads_are_padded_only_where_they_are_named():
    model, x = nn.Sequential(nn.Linear(13, 32), nn.Linear(32, 1)), torch.randn(5, 13)
    assert [each.fqn for each in loka.mods.apply(model, [PadToAlignment()], inputs=[x]).replacements] == ["0"]
    assert [each.fqn for each in loka.mods.apply(model, [PadToAlignment(only="1")], inputs=[x]).replacements] == ["1"]
    with pytest.raises(ModError, match="multiple of 16"):
        loka.mods.apply(nn.Sequential(nn.Linear(32, 16)), [PadToAlignment()], inputs=[torch.randn(2, 32)])


def test_an_input_of_another_width_is_refused():
    layer = PaddedLinear(nn.Linear(16, 16), 13, 16)
    with pytest.raises(ArgumentError, match="its last dimension has to be 13"):
        layer(torch.randn(2, 16))


def test_a_checkpoint_of_another_shape_is_refused():
    model, x = nn.Sequential(nn.Linear(13, 32)), torch.randn(5, 13)
    loka.mods.apply(model, [PadToAlignment()], inputs=[x])
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({"0.weight": torch.zeros(32, 14), "0.bias": torch.zeros(32)})


@pytest.mark.parametrize("multiple", [1, 0, 16.0, True])
def test_a_multiple_that_cannot_be_meant_is_refused(multiple):
    with pytest.raises(ArgumentError, match="multiple="):
        PadToAlignment(multiple)
