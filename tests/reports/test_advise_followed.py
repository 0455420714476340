"""Advice, followed to the letter: every line that is told applies, on models that hold what mods do not take."""

import ast

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import loka
from tests.reports.made_advice import normal


class OwnLinear(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight, self.bias) * 1.0


class T5LayerNorm(nn.Module):
    """Scales by the rms and subtracts no mean, whatever it is called."""

    def __init__(self, features):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class SteepSwish(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.7 * x)


class Unusual(nn.Module):
    """Odd widths in a tied head, in layers of one's own and in attention; norms and a Swish that mods do not know."""

    def __init__(self):
        super().__init__()
        self.table, self.inp, self.own = nn.Embedding(101, 29), nn.Linear(29, 40), OwnLinear(40, 40)
        self.rms, self.plane, self.norm = T5LayerNorm(40), nn.LayerNorm((6, 40)), nn.LayerNorm(40)
        self.steep, self.swish = SteepSwish(), nn.SiLU()
        self.attention, self.rnn = nn.MultiheadAttention(40, 4, batch_first=True), nn.GRU(40, 29, batch_first=True)
        self.task, self.tied = nn.Linear(29, 20), nn.Linear(29, 101)
        self.tied.weight = self.table.weight

    def forward(self, ids):
        x = self.rms(self.inp(self.table(ids)) + 7)
        x = self.own(self.steep(self.plane(x + 9) * 8 - 4))
        x = self.swish(8 * self.norm(x + 9) - 4)
        x = self.rnn(self.attention(x, x, x, need_weights=False)[0])[0]
        return self.task(x), self.tied(x)


class Spiky(nn.Module):
    """Outlier features in the raw input, and behind a norm, of which a projection in attention is one reader."""

    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(64, 96), nn.LayerNorm(96), nn.Linear(96, 33)
        self.attention = nn.MultiheadAttention(96, 4, batch_first=True)
        with torch.no_grad():
            self.norm.weight[7] = 1e4
            self.down.weight[:, 7] = 0
            self.attention.in_proj_weight[:, 7] = 0

    def forward(self, x):
        x = self.norm(self.up(x))
        return self.down(x), self.attention(x[None], x[None], x[None], need_weights=False)[0]


def tokens(generator):
    return torch.randint(0, 101, (8, 6), generator=generator)


def spiked(generator):
    x = normal(generator)
    x[:, 5] *= 1e4
    return x


MODELS = pytest.mark.parametrize("case", [(Unusual, tokens), (Spiky, spiked)], ids=["unusual", "spiky"], indirect=True)


@pytest.fixture(scope="module")
def case(request, tmp_path_factory):
    """Return a model with biases that keep growing, its data and the database of its run."""
    kind, data = request.param
    torch.manual_seed(0)
    model, path = kind(), tmp_path_factory.mktemp("followed") / "run.db"
    with loka.probe(model, path, every=1, overhead=1e6):
        for step in range(12):
            sum(part.square().mean() for part in model(data(torch.Generator().manual_seed(step)))).backward()
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "bias" in name:
                        parameter += 0.05
    return model, data, path


@pytest.mark.filterwarnings("ignore:NoBias leaves 'rnn.bias_ih_l0'")
@pytest.mark.parametrize("bound", [0.05, 0.015])
@MODELS
def test_every_line_of_advice_applies_as_it_is_written(case, bound):
    model, data, path = case
    advice = loka.advise(path, loka.Bound(row_error=bound), device="cpu")
    assert advice.suggestions
    inputs = [data(torch.Generator().manual_seed(seed)) for seed in (50, 51)]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for each in advice.suggestions:
        given = {"inputs": inputs} if each.kind == "equivalent" else {"filter_fn": passes(each.use)}
        applied = loka.mods.apply(model, [made(each)], **given)
        assert applied.replacements or all(refusal.reason for refusal in applied.refused), each.use
        if each.kind == "architectural":
            assert {replaced.fqn for replaced in applied.replacements} >= set(each.targets), each.use
        applied.undo()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def made(suggestion):
    """Make the mod of a suggestion as its line says, without running it as code."""
    call = ast.parse(suggestion.use, mode="eval").body
    arguments = {each.arg: ast.literal_eval(each.value) for each in call.keywords}
    return getattr(loka.mods, suggestion.mod)(*map(ast.literal_eval, call.args), **arguments)


def passes(line):
    """Return the filter that a line names behind it, if it does."""
    _, found, text = line.partition("filter_fn=")
    if not found:
        return None
    test = ast.parse(text, mode="eval").body.body
    named = ast.literal_eval(test.comparators[0])
    names = [named] if isinstance(named, str) else named
    return lambda module, fqn: fqn in names


@pytest.mark.parametrize("case", [(Unusual, tokens)], ids=["unusual"], indirect=True)
def test_what_no_mod_takes_is_set_aside_with_the_reason(case):
    advice = loka.advise(case[2], loka.Bound(row_error=0.05), device="cpu")
    aside = "\n".join(line for each in advice.checked for line in each.set_aside)
    told = {target for each in advice.suggestions for target in each.targets}
    assert "tied: " in aside
    assert "its weight is that of table.weight as well" in aside
    assert f"it is a {OwnLinear.__module__}.OwnLinear, and mods rewrite nn.Linear" in aside
    assert "plane: " in aside
    assert "over 2 dimensions" in aside
    assert "HardSwish knows no SteepSwish" in aside
    assert "tied.bias: " in aside
    assert "task.bias: " in aside
    assert aside.count("a prediction head keeps its bias") == 2
    assert "NoBias knows no bias_ih_l0 of a GRU" in aside
    assert not told & {"tied", "own", "plane", "rms", "steep", "task.bias", "tied.bias", "rnn.bias_ih_l0"}
    lines = [each.use for each in advice.suggestions if each.targets == ("inp.bias",)]
    line = "loka.mods.NoBias(keep=['task', 'tied'])  # for inp.bias alone: filter_fn=lambda module, fqn: fqn == 'inp'"
    assert lines == [line]
