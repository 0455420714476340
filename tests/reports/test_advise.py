"""Advice: each rule fires on a model that was trained to have its condition, tells the truth, and else is silent."""

import ast

import numpy as np
import pytest
import torch
from torch import nn

import loka
from loka.errors import DatabaseError, EvidenceError
from loka.formats import DEFAULT_RECIPES, PASS_OPERANDS, RECIPES
from loka.hardware import device_info
from loka.kernel_registry.emulated import emulate
from loka.kernel_registry.registry import default_registry
from loka.kernel_registry.spec import GemmRequest
from loka.mods.rotation import Mixing, Rotation, channel_scale
from loka.mods.smooth import scales
from loka.numerics import product_error
from loka.probes.records import Timing
from loka.probes.storing.database import open_database, write_timings
from loka.quantize import fake_quantize
from loka.reports.advise.rules import RULES
from loka.reports.advise.text import advice_json
from tests.probes.made_records import made_product, made_step, write_run
from tests.reports.made_advice import Ill, advised, normal, trained, with_loud_row

CPU = str(device_info("cpu"))


def of(advice, mod):
    return [each for each in advice.suggestions if each.mod == mod]


def checked(advice, mod):
    return next(each for each in advice.checked if each.mod == mod)


# --- nothing is called for ---


def test_a_healthy_model_needs_nothing_and_is_told_so(healthy):
    advice = advised(healthy)
    assert advice.suggestions == ()
    assert advice.headline.startswith("Nothing is called for: ")
    assert len(advice.checked) == len(RULES)
    for each in advice.checked:
        assert each.largest is None or each.largest < each.threshold or each.set_aside
    # Every rule had something to look at, but those of linears on one input and of norms right before a linear.
    assert [each.mod for each in advice.checked if not each.evidence] == ["FuseParallelLinears", "FoldNorm"]
    assert "not called for" in checked(advice, "NoBias").outcome


def test_outliers_that_every_recipe_bears_are_no_reason(outliers):
    advice = loka.advise(outliers[0], loka.Bound(row_error=10.0), device="cpu")
    assert not of(advice, "Smooth")
    assert not of(advice, "Hadamard")
    assert "within the bound" in checked(advice, "Smooth").outcome


# --- what calls for a mod ---


def test_a_growing_bias_calls_for_no_bias_and_a_head_keeps_its_own(tmp_path):
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))

    def grow(step):
        with torch.no_grad():
            model[0].bias += 0.01
            model[2].bias += 0.1

    advice = loka.advise(trained(tmp_path / "run.db", model, normal, lr=1e-5, after=grow), device="cpu")
    (found,) = of(advice, "NoBias")
    assert found.targets == ("0.bias",)
    assert found.kind == "architectural"
    assert found.figure.value >= 0.1
    assert [state.site for state in found.sites] == ["0"]
    assert found.predictions.row_error.after is None
    assert "not told" in found.predictions.row_error.how
    assert any("2.bias" in words and "head" in words for words in checked(advice, "NoBias").set_aside)


def test_a_norm_that_subtracts_a_large_mean_calls_for_block_norm(ill):
    (found,) = of(advised(ill), "BlockNorm")
    assert found.targets == ("norm",)
    assert {state.site for state in found.sites} == {"q", "k", "v"}
    assert found.figure.value > 5  # rms / standard deviation of inputs with a mean of 8 and a deviation near 1
    assert found.use == "loka.mods.BlockNorm(256, only=['norm'])"


def test_a_stretched_swish_calls_for_hard_swish_with_the_underflow_it_saves(ill):
    (found,) = of(advised(ill), "HardSwish")
    underflow = found.predictions.underflow
    assert found.targets == ("act",)
    assert found.figure.value > 0.05
    assert 0 <= underflow.after < underflow.before < 1
    assert found.predictions.time_us.after is None


def test_misaligned_extents_call_for_padding_whose_time_is_told_where_it_was_measured(ill, tmp_path):
    (found,) = of(advised(ill), "PadToAlignment")
    assert found.targets == ("inp",)
    assert "k = 13 and n = 64: padded to 16 and 64" in found.figure.words
    error = found.predictions.row_error
    assert error.after == error.before > 0
    assert found.predictions.time_us.after is None
    assert "128x13x64 float32 was never timed here" in found.predictions.time_us.how


@pytest.fixture
def ill_and_timed(ill, tmp_path):
    """Copy a database and add made-up times of high-precision kernels."""

    def add(times):
        path = tmp_path / "timed.db"
        path.write_bytes(ill.read_bytes())
        engine = open_database(path, create=False)
        write_timings(engine, [_timing(*shape, time) for shape, time in times.items()])
        engine.dispose()
        return path

    return add


def _timing(m, k, n, time):
    request = GemmRequest(site="", product="fprop", op="linear", m=m, n=n, k=k, dtype="float32")
    kernel = default_registry().baseline(request).name
    shape = {"batch": 1, "m": m, "n": n, "k": k, "dtype": "float32", "device": CPU}
    told = {"median_us": time, "spread_us": 0.1, "repetitions": 9, "values": "normal", "created": "2026"}
    return Timing(kernel=kernel, product="fprop", **shape, **told)


def test_times_of_the_new_shape_decide_whether_padding_and_fusing_are_advised(ill_and_timed):
    path = ill_and_timed({(128, 13, 64): 9.0, (128, 16, 64): 6.0, (128, 64, 48): 5.0, (128, 64, 144): 20.0})
    advice = loka.advise(path, device="cpu")
    time = of(advice, "PadToAlignment")[0].predictions.time_us
    assert (time.before, time.after) == (9.0, 6.0)
    assert not of(advice, "FuseParallelLinears")  # 3 x 5 us apart, 20 us together
    assert "15 us would be 20 us" in checked(advice, "FuseParallelLinears").outcome


def test_three_small_linears_on_one_input_call_for_fusing(ill, ill_and_timed):
    (found,) = of(advised(ill), "FuseParallelLinears")
    assert set(found.targets) == {"q", "k", "v"}
    assert found.figure.value == 3
    assert "128x64x48 float32 was never timed here" in found.predictions.time_us.how
    path = ill_and_timed({(128, 64, 48): 5.0, (128, 64, 144): 8.0})
    (found,) = of(loka.advise(path, device="cpu"), "FuseParallelLinears")
    time = found.predictions.time_us
    assert (time.before, time.after) == (15.0, 8.0)


def test_alike_linears_on_other_inputs_are_not_fused(tmp_path):
    class Towers(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(64, 32, bias=False), nn.Linear(64, 32, bias=False)

        def forward(self, x):
            return self.left(x) + self.right(x.square())

    advice = loka.advise(trained(tmp_path / "run.db", Towers(), normal, steps=10), device="cpu")
    assert not of(advice, "FuseParallelLinears")


def test_a_norm_scale_is_folded_only_where_that_makes_way_for_another_mod(ill, healthy):
    (found,) = of(advised(ill), "FoldNorm")
    assert found.targets == ("norm",)
    assert "BlockNorm on norm" in found.figure.words
    order = [each.mod for each in advised(ill).suggestions if "norm" in each.targets]
    assert order == ["FoldNorm", "BlockNorm"]  # lines are copied in this order, and BlockNorm drops the scale
    assert not of(advised(healthy), "FoldNorm")


def test_the_filter_that_is_told_lets_a_norm_and_the_linears_behind_it_pass(ill):
    (found,) = of(advised(ill), "FoldNorm")
    line, _, remark = found.use.partition("  # for norm alone: filter_fn=lambda module, fqn: fqn in ")
    assert line == "loka.mods.FoldNorm()"
    passed = ast.literal_eval(remark)
    model, x = Ill(), normal(torch.Generator().manual_seed(0), width=13)
    with torch.no_grad():
        model.norm.weight.copy_(torch.linspace(0.5, 2.0, len(model.norm.weight)))
    expected = model(x)
    applied = loka.mods.apply(model, [loka.mods.FoldNorm()], inputs=[x], filter_fn=lambda module, fqn: fqn in passed)
    assert "norm" in {each.fqn for each in applied.replacements}
    assert {each.fqn.removesuffix(".weight").removesuffix(".bias") for each in applied.replacements} == set(passed)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


# --- outliers: the prediction is held against the real thing ---


def errors(model, x, transform=lambda x, w: (x, w)):
    """Really transform the operands of the first linear; return error and underflow by recipe."""
    with torch.no_grad():
        weight = next(model.parameters())
        changed_x, changed_w = transform(x, weight)
        result = {}
        for name in DEFAULT_RECIPES:
            recipe = RECIPES[name]
            y = emulate(recipe, changed_x, changed_w, product="fprop", out_dtype=torch.float32)
            cast_x = fake_quantize(changed_x, recipe.operand(PASS_OPERANDS["fprop"][0]))
            lost = 1 - int(torch.count_nonzero(cast_x)) / int(torch.count_nonzero(changed_x))
            result[name] = product_error(y, x @ weight.T).row_error, lost
    return result


def really_smoothed(x, weight):
    scale = scales(x.abs().amax(0), weight.abs().amax(0), 0.5, power_of_two=True)
    return x / scale, weight * scale


def really_rotated(x, weight):
    rotation = Rotation(Mixing(x.shape[1]), scale=channel_scale(x.square().mean(0), weight))
    return rotation(x), rotation.of_weight(weight).float()


def test_channel_outliers_call_for_smoothing_which_does_what_was_predicted(outliers):
    path, model = outliers
    advice = advised(path)
    (found,) = of(advice, "Smooth")
    assert found.targets == ("up",)
    assert found.figure.value > 1e4
    assert found.sites[0].status in ("unsafe", "undecided")
    x = model.first(normal(torch.Generator().manual_seed(999))).detach()
    error, underflow = found.predictions.row_error, found.predictions.underflow
    before, after = errors(model, x)[error.recipe], errors(model, x, really_smoothed)[error.recipe]
    assert error.before == pytest.approx(before[0], rel=0.15)
    assert error.after == pytest.approx(after[0], rel=0.15)
    assert error.after < 0.5 * error.before
    assert underflow.before == pytest.approx(before[1], rel=0.15)
    assert underflow.after == pytest.approx(after[1], abs=0.01)
    assert found.use == f"loka.mods.Smooth(recipe={error.recipe!r}, only=['up'])"
    assert found.predictions.time_us.how == "unchanged: the scales go into first"


def test_a_feature_that_makes_the_result_calls_for_a_rotation_which_does_what_was_predicted(tmp_path):
    model = nn.Sequential(nn.Linear(64, 96, bias=False), nn.ReLU(), nn.Linear(96, 32, bias=False))
    with torch.no_grad():
        model[0].weight[:, 5] *= 60

    def data(generator):  # the result is little else than one product of rounded numbers; rotated, it is 64 of them
        x = normal(generator)
        x[:, 5] *= 60
        return x

    path = trained(tmp_path / "run.db", model, data, lr=1e-18)
    advice = loka.advise(path, loka.Bound(row_error=0.02), device="cpu")
    (found,) = [each for each in of(advice, "Hadamard") if each.targets == ("0",)]
    error = found.predictions.row_error
    x = data(torch.Generator().manual_seed(999))
    before = errors(model, x)[error.recipe][0]
    after = errors(model, x, really_rotated)[error.recipe][0]
    assert error.before == pytest.approx(before, rel=0.1)
    assert error.after == pytest.approx(after, rel=0.35)
    assert error.after < 0.3 * error.before


def test_loud_rows_call_for_keeping_them_high_and_the_prediction_is_what_that_does(loud):
    path, model = loud
    (found,) = [each for each in of(advised(path), "KeepRowsHigh") if each.targets == ("0",)]
    assert found.figure.value > 0.99
    error = found.predictions.row_error
    assert error.recipe == "tensorwise"  # the others give every row a scale of its own
    fresh = [with_loud_row(torch.Generator().manual_seed(seed)) for seed in range(900, 930)]
    assert error.before == pytest.approx(np.mean([errors(model, x)["tensorwise"][0] for x in fresh]), rel=0.15)
    assert error.after == pytest.approx(np.mean([errors(model, x[1:])["tensorwise"][0] for x in fresh]), rel=0.15)
    assert found.predictions.underflow.after < 0.1 * found.predictions.underflow.before


def test_an_error_without_a_cause_is_paid_for_with_as_large_a_share_as_was_predicted(tmp_path):
    model = nn.Sequential(nn.Linear(256, 96, bias=False))
    loudness = torch.logspace(0, -1.5, 256)

    def data(generator):
        return normal(generator, rows=256, width=256) * loudness

    advice = loka.advise(trained(tmp_path / "run.db", model, data, lr=1e-18), loka.Bound(row_error=0.02), device="cpu")
    (found,) = of(advice, "KeepShareHigh")
    error, fresh = found.predictions.row_error, data(torch.Generator().manual_seed(999))
    assert found.kind == "equivalent"
    assert error.before == pytest.approx(errors(model, fresh)[error.recipe][0], rel=0.1)
    weight = model[0].weight.detach().clone()
    applied = loka.mods.apply(model, [mods_of(found)], inputs=[data(torch.Generator().manual_seed(998))])
    recipe, layer = RECIPES[error.recipe], model[0]
    layer.rest.register_forward_hook(
        lambda module, args, output: emulate(recipe, args[0], module.weight, product="fprop", out_dtype=torch.float32)
    )
    with torch.no_grad():
        after = product_error(layer(fresh), fresh @ weight.T).row_error
    assert after <= 0.02
    assert error.after == pytest.approx(after, rel=0.2)
    (told,) = (int(word) for word in error.how.split() if word.isdigit())
    assert len(layer.columns) <= told <= len(layer.columns) + 32  # the mod also looks for rows, which spare columns
    high, low = layer.high_work / (256 * 96), layer.rest.in_features / 256
    assert high + low / 2 < 1
    assert applied.replacements[0].mod == "KeepShareHigh"


def test_a_share_that_costs_more_than_high_precision_is_not_advised(tmp_path):
    model = nn.Sequential(nn.Linear(64, 32, bias=False))  # all features alike: none can be left out
    advice = loka.advise(
        trained(tmp_path / "run.db", model, normal, lr=1e-18), loka.Bound(row_error=0.005), device="cpu"
    )
    assert not of(advice, "KeepShareHigh")
    assert "no cheaper than all in high precision" in checked(advice, "KeepShareHigh").outcome


def mods_of(suggestion):
    """Make the mod of a suggestion as its line says, without running it as code."""
    call = ast.parse(suggestion.use, mode="eval").body
    assert ast.unparse(call.func) == f"loka.mods.{suggestion.mod}"
    arguments = [ast.literal_eval(each) for each in call.args]
    return getattr(loka.mods, suggestion.mod)(
        *arguments, **{each.arg: ast.literal_eval(each.value) for each in call.keywords}
    )


def test_the_line_that_is_told_is_a_mod_and_does_what_it_says(ill, outliers, loud):
    made = {each.mod: mods_of(each) for path in (ill, outliers[0], loud[0]) for each in advised(path).suggestions}
    assert {"BlockNorm", "HardSwish", "PadToAlignment", "FuseParallelLinears", "FoldNorm", "Smooth"} <= made.keys()
    assert "KeepRowsHigh" in made
    model, x = Ill(), normal(torch.Generator().manual_seed(0), width=13)
    expected = model(x)
    mods = [made[name] for name in ("PadToAlignment", "FuseParallelLinears")]
    changed = loka.mods.apply(model, mods, inputs=[x]).replacements
    assert {each.fqn for each in changed} >= {"inp", "q", "k", "v"}
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    kept = loka.mods.apply(loud[1], [made["KeepRowsHigh"]], inputs=[with_loud_row(torch.Generator().manual_seed(1))])
    assert {each.fqn for each in kept.replacements} == set(made["KeepRowsHigh"].only)
    kept.undo()


# --- what is not known is said ---


def test_the_same_run_gives_the_same_advice(outliers):
    first, second = (loka.advise(outliers[0], device="cpu") for _ in range(2))
    assert advice_json(first) == advice_json(second)


def test_what_the_run_does_not_tell_is_named_with_what_to_probe(tmp_path):
    products = [made_product(value={"rowwise": 0.2}, op="addmm")]
    path = tmp_path / "run.db"
    write_run(path, [made_step(100 * index, *products) for index in range(12)])
    advice = loka.advise(path, device="cpu")
    missing = "\n".join(advice.missing)
    assert "no training dynamics" in missing
    assert "nothing was learned of the input of 1 sites over the bound, e.g. up" in missing
    assert f"no kernel was timed on {CPU}" in missing
    assert "no backward product was seen" in missing
    assert {each.mod for each in advice.checked if not each.evidence} >= {"NoBias", "BlockNorm", "HardSwish", "Smooth"}


def test_bad_arguments_are_refused_in_words(tmp_path, healthy):
    with pytest.raises(DatabaseError, match="There is no probe database"):
        loka.advise(tmp_path / "none.db")
    with pytest.raises(EvidenceError, match="is no run"):
        loka.advise(healthy, run="nothing", device="cpu")
