"""Advice: each rule fires on a model that was trained to have its condition, tells the truth, and else is silent."""

import ast
import functools
import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console
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
from loka.reports.advise.detect import pace_words
from loka.reports.advise.rules import RULES
from loka.reports.advise.text import advice_json, advice_markdown, advice_plain, advice_text
from tests.probes.made_records import made_product, made_step, write_run

CPU = str(device_info("cpu"))


def trained(path, model, data, *, steps=14, lr=1e-3, after=lambda step: None):
    """Train a model a little under the probe: every second step sampled, unhurried by the budget."""
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    with loka.probe(model, path, every=1, overhead=100):
        for step in range(steps):
            optimizer.zero_grad()
            model(data(torch.Generator().manual_seed(step))).square().mean().backward()
            optimizer.step()
            after(step)
    return path


def normal(generator, rows=128, width=64):
    return torch.randn(rows, width, generator=generator)


@functools.cache
def advised(path):
    """Advise at the default bound, once per run."""
    return loka.advise(path, device="cpu")


def of(advice, mod):
    return [each for each in advice.suggestions if each.mod == mod]


def checked(advice, mod):
    return next(each for each in advice.checked if each.mod == mod)


class Healthy(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.norm, self.act, self.down = nn.Linear(64, 96), nn.LayerNorm(96), nn.SiLU(), nn.Linear(96, 32)

    def forward(self, x):
        return self.down(self.act(self.norm(self.up(x))))


class Ill(nn.Module):
    """Mean cancellation before the norm, a Swish far below zero, three linears on one input, and k = 13."""

    def __init__(self):
        super().__init__()
        self.inp, self.norm = nn.Linear(13, 64, bias=False), nn.LayerNorm(64)
        self.q, self.k, self.v = (nn.Linear(64, 48, bias=False) for _ in range(3))
        self.act, self.out = nn.SiLU(), nn.Linear(48, 32, bias=False)

    def forward(self, x):
        h = self.norm(self.inp(x) + 8.0)
        return self.out(self.act(8 * self.q(h) * self.k(h) + 8 * self.v(h) - 4))


class Outliers(nn.Module):
    """A raw count among normalised features, which the weight makes up for."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 96, bias=False), nn.Linear(96, 32, bias=False)
        with torch.no_grad():
            self.up.weight[:, 5] *= 1e-5

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def with_outliers(generator):
    x = normal(generator)
    x[:, 5] *= 1e5
    return x


def with_loud_row(generator):
    x = normal(generator)
    x[0] *= 3e4
    return x


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("healthy") / "run.db", Healthy(), normal, lr=1e-2)


@pytest.fixture(scope="module")
def ill(tmp_path_factory):
    path, model = tmp_path_factory.mktemp("ill") / "run.db", Ill()
    return trained(path, model, lambda generator: normal(generator, width=13), lr=1e-4)


@pytest.fixture(scope="module")
def outliers(tmp_path_factory):
    model = Outliers()
    return trained(tmp_path_factory.mktemp("outliers") / "run.db", model, with_outliers, lr=1e-15), model


@pytest.fixture(scope="module")
def loud(tmp_path_factory):
    model = nn.Sequential(nn.Linear(64, 96, bias=False), nn.ReLU(), nn.Linear(96, 32, bias=False))
    return trained(tmp_path_factory.mktemp("loud") / "run.db", model, with_loud_row, lr=1e-15), model


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
    assert not of(advised(healthy), "FoldNorm")


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
    x = with_outliers(torch.Generator().manual_seed(999))
    error, underflow = found.predictions.row_error, found.predictions.underflow
    before, after = errors(model, x)[error.recipe], errors(model, x, really_smoothed)[error.recipe]
    assert error.before == pytest.approx(before[0], rel=0.15)
    assert error.after == pytest.approx(after[0], rel=0.15)
    assert error.after < 0.5 * error.before
    assert underflow.before == pytest.approx(before[1], rel=0.15)
    assert underflow.after == pytest.approx(after[1], abs=0.01)
    assert found.use == f"loka.mods.Smooth(recipe={error.recipe!r}, only=['up'])"
    assert "no norm was seen to write its input" in found.predictions.time_us.how


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


# --- rendering ---


def test_every_format_tells_the_same(ill):
    advice = advised(ill)
    document = json.loads(advice_json(advice))
    assert document["schema"] == 1
    assert [each["mod"] for each in document["suggestions"]] == [each.mod for each in advice.suggestions]
    time = document["suggestions"][0]["predictions"]["time_us"]
    assert time["after"] is None
    assert time["how"]
    for text in (advice_plain(advice), advice_markdown(advice)):
        for each in advice.suggestions:
            assert each.mod in text
            assert f"{each.figure.value:.3g}" in text


def test_names_cannot_break_out_of_a_rendering(ill):
    advice = advised(ill)
    names = ("\x1b[31mred", "a|b", "[bold]x[/]", "`x`", "<script>")
    hostile = replace(advice, suggestions=(replace(advice.suggestions[0], targets=names),))
    console = Console(file=io.StringIO(), width=200)
    console.print(advice_text(hostile))
    assert "\x1b[31mred" not in console.file.getvalue()
    assert "[bold]x[/]" in console.file.getvalue()
    rows = [line for line in advice_markdown(hostile).splitlines() if line.startswith("| BlockNorm")]
    assert all("<script>" not in row.replace("`", "") or "&" in row or "`" in row for row in rows)


def test_infinite_figures_are_null_in_json(ill):
    advice = advised(ill)
    figure = replace(advice.suggestions[0].figure, value=math.inf)
    document = json.loads(advice_json(replace(advice, suggestions=(replace(advice.suggestions[0], figure=figure),))))
    assert document["suggestions"][0]["figure"]["value"] is None


# --- the command line, and what reports show of the dynamics ---


def run_cli(*arguments):
    from typer.testing import CliRunner

    from loka.cli import app

    result = CliRunner().invoke(app, [str(each) for each in arguments])
    return result.exit_code, result.output


def test_the_command_writes_every_format(ill, tmp_path):
    code, text = run_cli("advise", ill, "--device", "cpu")
    assert code == 0
    assert "BlockNorm" in text
    code, text = run_cli("advise", ill, "--device", "cpu", "--format", "json", "--bound", "0.1")
    assert json.loads(text)["bound"] == "row_error <= 0.1 at 95 % confidence"
    for name, mark in (("md", "# FP8 advice"), ("table", "The evidence calls for")):
        target = tmp_path / f"advice.{name}"
        assert run_cli("advise", ill, "--device", "cpu", "--format", name, "-o", target)[0] == 0
        assert mark in target.read_text(encoding="utf-8")
    code, text = run_cli("advise", tmp_path / "none.db")
    assert code == 2
    assert "There is no probe database" in text


def test_explain_ends_with_the_dynamics_around_the_site(ill):
    code, text = run_cli("explain", ill, "out", "--device", "cpu")
    assert code == 0
    assert "dynamics: input from act (SiLU)" in text
    code, text = run_cli("explain", ill, "q", "--device", "cpu")
    assert "dynamics: input from norm (LayerNorm)" in text


def test_a_report_holds_the_dynamics_and_the_page_draws_them(ill, healthy):
    code, text = run_cli("report", ill, "--device", "cpu", "--format", "json")
    assert code == 0
    parts = {part["name"]: part for part in json.loads(text)["dynamics"]["parts"]}
    assert parts["norm"]["feeds"] == ["q", "k", "v"]
    assert parts["norm"]["values"]["cancellation"][-1] > 0.9
    assert len(parts["norm.bias"]["steps"]) == len(parts["norm.bias"]["values"]["norm"])
    code, page = run_cli("report", healthy, "--device", "cpu", "--format", "html")
    assert "Training dynamics" in page
    assert page.count('<path class="series') == 3  # up, norm and down have a bias
    assert "none grows without settling" in page
    assert "<td>act</td>" in page


def test_a_report_without_dynamics_says_nothing_of_them(tmp_path):
    write_run(tmp_path / "run.db", [made_step(100 * index, made_product()) for index in range(10)])
    assert "Training dynamics" not in run_cli("report", tmp_path / "run.db", "--device", "cpu", "--format", "html")[1]


def test_a_bias_that_turned_or_sped_up_is_told_in_words_and_not_as_a_huge_share():
    assert "kept 40% of the pace" in pace_words(0.4)
    for faster in (370.1, math.inf):
        assert "%" not in pace_words(faster)
        assert "faster in its second half" in pace_words(faster)
