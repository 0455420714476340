"""KeepShareHigh: the error falls as far as is asked for, on rows that nothing was fitted to, at the least work."""

import copy
import io
import itertools
import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

import loka.mods
from loka.dispatch.running.convert import unreached
from loka.errors import ArgumentError
from loka.formats import RECIPES
from loka.mods import Hadamard, KeepShareHigh, PadToAlignment
from loka.mods.keep_share import PartedLinear, columns_to_keep
from loka.numerics import product_error
from loka.quantize import fake_quantize
from tests.dispatch.made_conversion import plan_for
from tests.mods.made_blocks import make_blocks, make_input

ROWWISE = RECIPES["rowwise"]


def relative(actual, reference):
    return float(((actual - reference).norm() / reference.norm()).detach())


def rounded(x, weight):
    return fake_quantize(x, ROWWISE.operand("input")) @ fake_quantize(weight, ROWWISE.operand("weight")).t()


def make_linear(k=96, n=64, *, bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(k, n, bias=bias))


def make_rows(rows=3200, k=96):
    """Correlated features, from loud to quiet."""
    generator = torch.Generator().manual_seed(2)
    mixed = torch.randn(rows, k // 2, generator=generator) @ torch.randn(k // 2, k, generator=generator)
    return (mixed + torch.randn(rows, k, generator=generator)) * torch.logspace(0, -2, k)


def tail(model, x):
    """Return the p99 of the site's row error with the product of `rest` rounded, against the plain product rounded."""
    layer = model[0]
    weight = torch.zeros(layer.out_features, layer.in_features)
    weight[:, layer.others] = layer.rest.weight.detach()
    weight[:, layer.columns] = layer.loud.weight.detach()
    bias = 0 if layer.bias is None else layer.bias
    handle = layer.rest.register_forward_hook(lambda module, args, output: rounded(args[0], module.weight))
    with torch.no_grad():
        after = product_error(layer(x) - bias, x @ weight.t()).row_error_p99
    handle.remove()
    return product_error(rounded(x, weight), x @ weight.t()).row_error_p99, after


@pytest.mark.parametrize(("times", "bias"), [(1.5, True), (3.0, False)])
def test_the_worst_rows_of_unseen_input_err_as_many_times_less_and_the_output_stays(times, bias):
    model, rows = make_linear(bias=bias), make_rows()
    output = model(rows)
    applied = loka.mods.apply(model, [KeepShareHigh(times=times)], inputs=list(rows[:1600].split(200)))
    assert relative(model(rows), output) < 1e-6
    before, after = tail(model, rows[1600:])
    assert times < before / after < 1.4 * times
    layer = model[0]
    high, low = layer.high_work / (96 * 64), layer.rest.in_features / 96
    assert high + low / 2 < 1
    assert f"{high:.0%} of its work in high precision and {low:.0%} in FP8" in applied.replacements[0].reason


def test_the_pair_of_columns_and_rows_is_the_cheapest_that_reaches_the_goal():
    """Every pair, tried by hand on the same rows: all of a call that is so short."""
    torch.manual_seed(0)
    model, x = make_linear(64, 48, bias=False), make_rows(2, 64)
    weight, exact = model[0].weight.detach(), x @ model[0].weight.detach().t()
    order = ((x.square() / exact.square().mean(1, keepdim=True)).mean(0) * weight.square().sum(0)).argsort().flip(0)
    wanted = product_error(rounded(x, weight), exact).row_error_p99 / (2 * 1.1)
    costs = {}
    for columns, period in itertools.product((0, 16, 32, 48), (0, 32, 16, 8)):
        quiet, loud = order[columns:], order[:columns]
        product = rounded(x[:, quiet], weight[:, quiet]) + x[:, loud] @ weight[:, loud].t()
        if period:
            ratio = (x[:, quiet].square() * weight[:, quiet].square().sum(0)).sum(1) / product.square().sum(1)
            product[ratio.argmax()] = exact[ratio.argmax()]
        if product_error(product, exact).row_error_p99 <= wanted:
            rest = 1 - columns / 64
            costs[columns, period] = 1 - rest + (rest / period if period else 0) + rest / 2
    loka.mods.apply(model, [KeepShareHigh(times=2)], inputs=[x])
    assert (len(model[0].columns), model[0].period) == min(costs, key=costs.__getitem__)
    assert set(model[0].columns.tolist()) == set(order[: len(model[0].columns)].tolist())


@torch.no_grad()
def test_the_rows_that_are_multiplied_again_are_those_that_came_out_worst():
    model, rows = make_linear(bias=False), make_rows(640)
    weight = model[0].weight.detach()
    layer = PartedLinear(model[0], None, torch.tensor([], dtype=torch.long), 16)
    layer.rest.register_forward_hook(lambda module, args, output: rounded(args[0], module.weight))
    exact, plain = rows @ weight.t(), rounded(rows, weight)
    error = (plain - exact).norm(dim=1) / exact.norm(dim=1)
    again = (layer(rows) - exact).norm(dim=1) < 1e-5 * exact.norm(dim=1)
    assert int(again.sum()) == 40
    assert error[again].mean() > 1.2 * error[~again].mean()
    assert torch.equal(layer(rows)[~again], plain[~again])


@given(
    rows=st.integers(0, 9),
    period=st.integers(0, 5),
    lead=st.sampled_from([(), (1,), (2, 3)]),
    loud=st.sampled_from([[], [1, 4], [0, 1, 2, 3, 4]]),
    bias=st.booleans(),
)
def test_a_linear_in_parts_is_the_linear_for_any_number_of_rows(rows, period, lead, loud, bias):
    torch.manual_seed(rows)
    linear, columns = nn.Linear(6, 5, bias=bias), torch.tensor(loud, dtype=torch.long)
    quiet = [column for column in range(6) if column not in loud]
    rest, kept = nn.Linear(len(quiet), 5, bias=bias), nn.Linear(len(loud), 5, bias=False) if loud else None
    rest.weight.data, rest.bias = linear.weight.detach()[:, quiet], linear.bias
    if kept is not None:
        kept.weight.data = linear.weight.detach()[:, loud]
    x = torch.randn(*lead, rows, 6)
    parts = PartedLinear(rest, kept, columns, period)
    assert torch.allclose(parts(x), linear(x), atol=1e-5)
    assert torch.allclose(parts.multiply(x), linear(x) - (linear.bias if bias else 0), atol=1e-5)


def test_a_plan_converts_the_rest_and_the_site_errs_three_times_less():
    model, rows = make_linear(), make_rows()
    plain, exact = copy.deepcopy(model), (model(rows) - model[0].bias).detach()
    loka.mods.apply(model, [KeepShareHigh(times=3)], inputs=list(rows[:1600].split(200)))
    rowwise = {"fprop": "rowwise", "dgrad": None, "wgrad": None}
    loka.convert(plain, plan_for(plain, {"0": rowwise}), emulate=True)
    loka.convert(model, plan_for(model, {"0.rest": rowwise}), emulate=True)
    with torch.no_grad():
        before, after = (product_error(each(rows) - plain[0].bias, exact).row_error_p99 for each in (plain, model))
    assert unreached(model) == ()
    assert 3 < before / after < 4.2


def test_where_it_takes_as_much_as_high_precision_the_place_stays_with_the_figure():
    model, x = make_linear(), torch.randn(400, 96, generator=torch.Generator().manual_seed(0))
    weight = model[0].weight
    for mod in (KeepShareHigh(times=40), KeepShareHigh(times=3, most=0.7)):
        applied = loka.mods.apply(model, [mod], inputs=[x])
        assert not applied.replacements
        (refusal,) = applied.refused
        assert f"{mod.times:g} times less takes" in refusal.reason
        assert f"no cheaper than most={mod.most:g} allows: error p99 under rowwise" in refusal.reason
        assert refusal.figure > mod.most
        assert model[0].weight is weight


def test_a_head_with_one_output_is_judged_as_a_whole():
    model, rows = make_linear(96, 1), make_rows()
    applied = loka.mods.apply(model, [KeepShareHigh(times=2)], inputs=list(rows[:1600].split(200)))
    assert applied.replacements
    weight = applied.replacements and model[0].rest.weight.detach()
    exact, x = model(rows).detach(), rows[:, model[0].others]
    model[0].rest.register_forward_hook(lambda module, args, output: rounded(args[0], module.weight))
    after = float((model(rows).detach() - exact).norm())
    before = float((rounded(rows, whole(model[0])) - rows @ whole(model[0]).t()).norm())
    assert before / after > 1.8
    assert weight.shape == (1, x.shape[1])


def whole(layer):
    weight = torch.zeros(layer.out_features, layer.in_features)
    weight[:, layer.others], weight[:, layer.columns] = layer.rest.weight.detach(), layer.loud.weight.detach()
    return weight


def test_gradients_are_those_of_the_linear_and_reach_both_parts():
    model, rows = make_linear(), make_rows(200)
    x, other = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    model(x).square().sum().backward()
    wanted, bias = model[0].weight.grad.clone(), model[0].bias.grad.clone()
    loka.mods.apply(model, [KeepShareHigh(times=2)], inputs=[rows])
    model[0].period = 8  # the rows that are multiplied again send theirs back, too
    model(other).square().sum().backward()
    layer = model[0]
    assert relative(other.grad, x.grad) < 1e-4
    assert relative(layer.rest.weight.grad, wanted[:, layer.others]) < 1e-4
    assert relative(layer.loud.weight.grad, wanted[:, layer.columns]) < 1e-4
    assert relative(layer.bias.grad, bias) < 1e-4


def test_an_old_checkpoint_is_split_on_the_way_and_its_own_comes_back():
    model, x = make_blocks(), make_input()
    old, output = copy.deepcopy(model.state_dict()), model(x)
    loka.mods.apply(model, [KeepShareHigh(times=1.5, only=["*up", "*.q"])], inputs=[x])
    assert isinstance(model.block0.up, PartedLinear)
    assert {"block0.q.rest.weight", "block0.q.loud.weight", "block0.q.bias"} <= set(model.state_dict())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    for checkpoint in (old, torch.load(file, weights_only=True)):
        with torch.no_grad():
            for tensor in (*model.parameters(), model.block0.up.harm):
                tensor.zero_()
        model.load_state_dict(checkpoint)
        assert relative(model(x), output) < 1e-5
        assert torch.allclose(model.block0.up.harm, model.block0.up.rest.weight.square().sum(0))


def test_other_mods_rewrite_the_rest_and_leave_the_loud_part_alone():
    model, x = make_linear(100, 60), make_rows(400, 100)
    output = model(x)
    loka.mods.apply(model, [KeepShareHigh(times=1.5), Hadamard(balance="full"), PadToAlignment(32)], inputs=[x])
    names = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert names == {"0.rest.inner.inner", "0.loud"}
    assert relative(model(x), output) < 1e-5


def test_it_compiles_whole_and_for_other_numbers_of_rows():
    model, x = make_linear(), make_rows(200)
    output = model(x).detach()
    loka.mods.apply(model, [KeepShareHigh(times=2)], inputs=[x])
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for rows in (200, 50, 7):
        assert relative(compiled(x[:rows]), output[:rows]) < 1e-5
    assert len(graphs) <= 2


@pytest.mark.parametrize("k", [1, 2, 7, 16, 17, 33])
def test_odd_widths_leave_a_multiple_of_sixteen_or_are_refused_in_words(k):
    model, x = make_linear(k, 24), make_rows(400, 2 * k)[:, :k] + 1e-3
    output = model(x)
    applied = loka.mods.apply(model, [KeepShareHigh(times=1.2)], inputs=[x])
    assert relative(model(x), output) < 1e-5
    assert bool(applied.replacements) != bool(applied.refused)
    if applied.replacements and k > 16:
        rest = model[0].rest.in_features
        assert rest == k or rest % 16 == 0


def test_what_says_nothing_is_refused_in_words():
    for x in (torch.zeros(50, 96), torch.full((50, 96), math.inf)):
        applied = loka.mods.apply(make_linear(), [KeepShareHigh()], inputs=[x])
        assert not applied.replacements
        assert "all zero, or not finite" in applied.refused[0].reason


@pytest.mark.parametrize(
    "options",
    [
        {"times": 1},
        {"times": "3"},
        {"times": math.inf},
        {"times": math.nan},
        {"most": 0.5},
        {"most": 1.1},
        {"most": True},
    ],
)
def test_options_that_cannot_be_meant_are_refused(options):
    with pytest.raises(ArgumentError):
        KeepShareHigh(**options)


@given(st.lists(st.floats(0, 1e30), min_size=1, max_size=70), st.floats(1.01, 20))
@example([2.225073858507e-311], 2.0)  # subnormal
@example([5e-324] * 40, 2.0)
def test_what_is_told_without_a_trial_is_the_least_that_leaves_little_enough(terms, times):
    columns, left = columns_to_keep(torch.tensor(terms, dtype=torch.float64), times)
    falling = sorted(terms, reverse=True)
    total, rest = math.fsum(falling), len(terms) - columns
    assert 0 <= columns <= len(terms)
    assert rest % 16 == 0 or len(terms) <= 16
    wanted = 1 / (1.1 * times) ** 2
    if total == 0:
        assert columns == len(terms)
        return
    assert left == pytest.approx(math.fsum(falling[columns:]) / total, abs=1e-12)
    assert left <= wanted or columns == len(terms)
    fewer = columns - (16 if len(terms) > 16 else 1)  # one width of FP8 less would not do
    if fewer >= 0:
        assert math.fsum(falling[fewer:]) / total > wanted - 1e-12
