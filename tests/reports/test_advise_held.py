"""Advice held to what `apply` does: by what the run has seen of the model, and by the model where it is given."""

import ast
import copy
import sqlite3

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import loka
from loka.bounds import parse_bound
from loka.errors import ArgumentError, LokaError, ModError
from loka.probes.judging.evidence import collect_evidence
from loka.probes.storing.database import open_database
from loka.reports.advise.line import Line
from loka.reports.advise.on_model import OnModel
from tests.reports.made_advice import normal, trained

BOUND = loka.Bound(row_error=0.02)


class Mixed(nn.Module):
    """A loud feature before every linear; its scale can leave the inputs of q, k and down, and no other."""

    def __init__(self):
        super().__init__()
        self.raw = nn.Linear(64, 64)
        self.norm, self.q, self.k = nn.LayerNorm(64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.post, self.ff = nn.LayerNorm(64), nn.Linear(64, 64)
        self.act_norm, self.after_act = nn.LayerNorm(64), nn.Linear(64, 64)
        self.gate, self.up, self.down = nn.Linear(64, 96), nn.Linear(64, 96), nn.Linear(96, 64)
        self.shown, self.head = nn.LayerNorm(64), nn.Linear(64, 32)
        self.tied_norm, self.table, self.tied = nn.LayerNorm(64), nn.Embedding(48, 64), nn.Linear(64, 48, bias=False)
        self.tied.weight = self.table.weight
        with torch.no_grad():
            for norm in (self.norm, self.post, self.act_norm, self.shown, self.tied_norm):
                norm.weight[5] = 1e4
            for linear in (self.q, self.k, self.ff, self.after_act, self.head, self.tied):
                linear.weight[:, 5] *= 1e-4
            self.raw.weight[:, 5] *= 1e-4
            self.up.weight[3] *= 1e4
            self.down.weight[:, 3] *= 1e-4

    def forward(self, x):
        y = self.raw(x)
        h = self.norm(y)
        y = y + torch.tanh(self.q(h)) * self.k(h)
        h = self.post(y)
        y = torch.tanh(h) + self.ff(h)
        y = y + self.after_act(F.silu(self.act_norm(y)))
        y = y + self.down(F.silu(self.gate(y)) * self.up(y))
        shown = self.shown(y)
        return self.head(shown), self.tied(self.tied_norm(y)), shown


REASONS = {
    "raw": "its input is written by no norm and no linear whose output only linears read",
    "ff": "post writes its input, and of that its output is also read by tanh in the model's own forward",
    "after_act": "its input is written by no norm and no linear whose output only linears read",
    "head": "shown writes its input, and of that its output is also read by the model's caller",
    "tied": "its weight is that of table.weight as well",
}


def data(generator):
    x = normal(generator)
    x[:, 5] *= 1e4
    return x


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    torch.manual_seed(0)
    model, path = Mixed(), tmp_path_factory.mktemp("mixed") / "run.db"
    with loka.probe(model, path, every=1, overhead=1e6):
        for step in range(10):
            sum(part.square().mean() for part in model(data(torch.Generator().manual_seed(step)))).backward()
    return path, model, [data(torch.Generator().manual_seed(seed)) for seed in (50, 51)]


def aside(advice, mod):
    return {line.partition(":")[0]: line for each in advice.checked if each.mod == mod for line in each.set_aside}


def of(advice, mod):
    return [each for each in advice.suggestions if each.mod == mod]


def smooth(model, only, inputs):
    return loka.mods.apply(model, [loka.mods.Smooth(only=only)], inputs=inputs)


def test_a_scale_is_moved_only_where_the_run_has_seen_that_it_can_leave_the_input(mixed):
    path, model, inputs = mixed
    advice = loka.advise(path, BOUND, device="cpu")
    told = {target for each in of(advice, "Smooth") for target in each.targets}
    assert told == {"q", "k", "down"}
    left = aside(advice, "Smooth")
    assert {site: why in left[site] for site, why in REASONS.items()} == dict.fromkeys(REASONS, True)
    # The run's word against that of apply, place by place.
    for site in (*told, *REASONS):
        applied = smooth(model, [site], inputs)
        assert bool(applied.replacements) == (site in told), applied
        applied.undo()


def test_a_run_that_does_not_tell_is_taken_at_its_word_and_the_line_fails_in_no_error(mixed, tmp_path):
    path, model, inputs = mixed
    older = tmp_path / "older.db"
    older.write_bytes(path.read_bytes())
    with sqlite3.connect(older) as connection:
        assert connection.execute("DELETE FROM distributions WHERE kind = 'source'").rowcount > len(REASONS)
    advice = loka.advise(older, BOUND, device="cpu")
    assert any("what writes the inputs of linears is not known" in line for line in advice.missing)
    told = {each.targets: each for each in of(advice, "Smooth")}
    assert {("ff",), ("after_act",)} <= told.keys()
    assert "the run does not say what writes its input" in told[("after_act",)].predictions.time_us.how
    applied = loka.mods.apply(model, [_made(told[("ff",)])], inputs=inputs)
    assert str(applied) == (
        "post: stays as it was (Smooth: its output is also read by tanh in the model's own forward)"
    )


def test_what_reads_one_norm_is_smoothed_in_one_line_and_the_prediction_is_of_all_its_readers(mixed):
    path, model, inputs = mixed
    (found,) = [each for each in of(loka.advise(path, BOUND, device="cpu"), "Smooth") if "q" in each.targets]
    assert set(found.targets) == {"q", "k"}
    assert "only=['" in found.use
    assert found.predictions.time_us.how == "unchanged: the scales go into norm"
    applied = smooth(model, ["q", "k"], inputs)
    assert {each.fqn for each in applied.replacements} == {"norm.weight", "norm.bias", "q.weight", "k.weight"}
    applied.undo()


def test_no_place_that_apply_refuses_is_advised_where_the_model_is_given(mixed):
    path, model, inputs = mixed
    before, parameters = copy.deepcopy(model.state_dict()), list(model.parameters())
    advice = loka.advise(path, BOUND, device="cpu", on=(model, inputs))
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {each.mod for each in advice.suggestions} >= {"Smooth", "Hadamard"}
    for each in advice.suggestions:
        only = list(each.targets)
        recipe = {} if each.predictions.row_error.recipe is None else {"recipe": each.predictions.row_error.recipe}
        options = {"times": float(each.use.partition("times=")[2].partition(",")[0])} if "times=" in each.use else {}
        options |= recipe if "recipe=" in each.use else {}
        applied = loka.mods.apply(model, [getattr(loka.mods, each.mod)(**options, only=only)], inputs=inputs)
        assert applied.replacements, f"{each.use}: {applied}"
        applied.undo()


def test_what_gains_nothing_on_the_model_is_set_aside_with_the_figure_that_apply_gives(tmp_path):
    model = nn.Sequential(nn.Linear(64, 96, bias=False), nn.ReLU(), nn.Linear(96, 32, bias=False))
    with torch.no_grad():
        model[0].weight[:, 5] *= 60

    def loud(generator):
        x = normal(generator)
        x[:, 5] *= 60
        return x

    path = trained(tmp_path / "run.db", model, loud, lr=1e-18)
    quiet = [normal(torch.Generator().manual_seed(seed)) for seed in (70, 71)]
    with torch.no_grad():
        model[0].weight[:, 5] /= 60  # by now the model has settled, and its inputs are quiet
    bound = loka.Bound(row_error=0.02)
    assert "0" in {target for each in of(loka.advise(path, bound, device="cpu"), "Hadamard") for target in each.targets}
    held = loka.advise(path, bound, device="cpu", on=(model, quiet))
    assert "0" not in {target for each in of(held, "Hadamard") for target in each.targets}
    assert (
        "apply leaves it as it is on this model: 0: stays as it was (Hadamard: nothing is gained there: error"
        in (aside(held, "Hadamard")["0"])
    )


@pytest.mark.parametrize("bound", [0.05, 0.02])
@pytest.mark.parametrize("name", ["mixed", "outliers"])
def test_all_lines_copied_in_the_order_they_are_told_apply_together(request, name, bound):
    path, model, *rest = request.getfixturevalue(name)
    inputs = rest[0] if rest else [normal(torch.Generator().manual_seed(50))]
    advice = loka.advise(path, loka.Bound(row_error=bound), device="cpu")
    expected = model(inputs[0])
    mods = [_made(each) for each in advice.suggestions]
    applied = loka.mods.apply(model, mods, inputs=inputs)
    assert applied.replacements
    # Of alternatives at one place the second gains nothing more; nothing else keeps a line from being followed.
    assert all(refusal.figure is not None for refusal in applied.refused), str(applied)
    got = model(inputs[0])
    for one, other in zip(*((x if isinstance(x, tuple) else (x,)) for x in (got, expected)), strict=True):
        assert (one - other).norm() <= 1e-3 * other.norm()
    applied.undo()


def _made(suggestion):
    """Make the mod that a line names, without running it as code."""
    call = ast.parse(suggestion.use, mode="eval").body
    options = {each.arg: ast.literal_eval(each.value) for each in call.keywords}
    return getattr(loka.mods, suggestion.mod)(*map(ast.literal_eval, call.args), **options)


def test_lines_that_differ_in_places_alone_are_tried_as_one():
    one = Line(mod="Smooth", options={"recipe": "rowwise", "only": ["a"]})
    other = Line(mod="Smooth", options={"recipe": "rowwise", "only": ["b", "a"]})
    assert str(one.with_all([other])) == "loka.mods.Smooth(recipe='rowwise', only=['a', 'b'])"
    assert one.with_all([Line(mod="Smooth", options={"recipe": "mxfp8", "only": ["b"]})]) is None
    bias = Line(mod="NoBias", options={"keep": ["h"]}, alone="a.bias", passes="a")
    assert bias.with_all([bias]) is None
    assert bias.filter_fn()(None, "a")
    assert not bias.filter_fn()(None, "b")


def test_a_model_that_cannot_be_tried_is_refused_in_words(mixed, tmp_path):
    path, model, inputs = mixed
    with pytest.raises(ArgumentError, match=r"on=\(model, \[batch, ...\]\)"):
        loka.advise(path, device="cpu", on=model)
    with pytest.raises(ArgumentError, match="has no batch"):
        loka.advise(path, device="cpu", on=(model, []))
    with pytest.raises(ArgumentError, match=r"does not fit Mixed.forward"):
        loka.advise(path, device="cpu", on=(model, [(inputs[0], inputs[0])]))
    with loka.probe(model, tmp_path / "run.db"):
        model(inputs[0])
        with pytest.raises(ModError, match="watched by a probe"):
            loka.advise(path, device="cpu", on=(model, inputs))


def test_what_one_place_raises_stops_no_other(mixed):
    _, model, inputs = mixed
    known = Line(mod="PadToAlignment", options={"multiple": 48, "only": ["q"]})
    unknown = Line(mod="PadToAlignment", options={"multiple": 48, "only": ["nowhere"]})
    why = OnModel((model, inputs)).refusals([(known, ("q",)), (unknown, ("nowhere",)), (known, ("q",))])
    assert why[0] == why[2] == ""
    assert "'nowhere' matches no nn.Linear" in why[1]
    with pytest.raises(LokaError):
        loka.mods.apply(model, [unknown.made()], inputs=inputs)


def test_what_stays_of_a_product_that_was_parted_is_judged_by_the_bound_that_is_told(tmp_path):
    model, loudness = nn.Sequential(nn.Linear(256, 96, bias=False)), torch.logspace(0, -1.5, 256)

    def fading(generator):
        return normal(generator, rows=256, width=256) * loudness

    bound = loka.Bound(row_error=0.02)
    advice = loka.advise(trained(tmp_path / "run.db", model, fading, lr=1e-18), bound, device="cpu")
    (found,) = of(advice, "KeepShareHigh")
    recipe, how = found.predictions.row_error.recipe, found.predictions.row_error.how
    told = parse_bound("row_error=0.02", [how.partition("--bound-for '")[2].partition("'")[0]])
    x = fading(torch.Generator().manual_seed(50))
    loka.mods.apply(model, [_made(found)], inputs=[x])
    error = _error_of(trained(tmp_path / "again.db", model, fading, lr=1e-18), "0.rest", recipe)
    # By its own result it errs as the whole did before, and what is told is where the whole meets the bound.
    assert error == pytest.approx(found.predictions.row_error.before, rel=0.1)
    assert told.limit("fprop", "0").most == 0.02
    limit = told.limit("fprop", "0.rest").most
    layer, rows = model[0], fading(torch.Generator().manual_seed(999))
    with torch.no_grad():
        quiet = rows[:, layer.others]
        ratio = (rows @ layer.weight.T).norm(dim=1).mean() / (quiet @ layer.rest.weight.T).norm(dim=1).mean()
    assert limit / 0.02 == pytest.approx(float(ratio), rel=0.1)
    assert 0.02 < error < limit


def _error_of(path, site, recipe):
    engine = open_database(path, create=False)
    try:
        evidence = collect_evidence(engine, None, confidence=0.95)
    finally:
        engine.dispose()
    (product,) = [each for each in evidence.products if (each.site, each.product) == (site, "fprop")]
    return next(each.error.mean for each in product.recipes if each.recipe == recipe)
