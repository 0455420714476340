"""The figures of benchmarks.mods.equivalent, on a model small enough to compute them by hand."""

import torch
import torch.nn.functional as F
from torch import nn

import loka.mods
from benchmarks.mods.equivalent import RECIPES, Subject, divergence, judge_output, judge_sites
from benchmarks.truth.materials import Material
from loka.formats import RECIPES as KNOWN
from loka.mods import Hadamard, KeepRowsHigh
from loka.mods.trial.gain import rounded_product
from loka.numerics import product_error
from tests.mods.made_blocks import make_input


def make_subject(model):
    material = Material(name="small", model=model, loss=lambda model, batch: model(batch).sum(), splits={})
    return Subject(material=material, call=lambda batch: {"input": batch}, logits=lambda model, batch: model(batch))


def test_the_divergence_is_that_of_kullback_and_leibler():
    exact, rounded = torch.randn(300, 7, dtype=torch.float64), torch.randn(300, 7, dtype=torch.float64)
    wanted = F.kl_div(rounded.log_softmax(-1), exact.log_softmax(-1), log_target=True, reduction="batchmean")
    assert abs(divergence(exact, rounded) - float(wanted)) < 1e-9


@torch.no_grad()
def test_a_site_is_judged_with_its_products_rounded_and_all_before_it_exact():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 16)), make_input(64)
    sites = judge_sites(model, ["0", "2"], make_subject(model), [x])
    hidden = model[1](model[0](x))
    for name in RECIPES:
        product = hidden @ model[2].weight.t()
        wanted = product_error(rounded_product(hidden, model[2].weight, KNOWN[name]), product)
        assert abs(sites.mean["2", name][0] - wanted.row_error) < 1e-4
        assert abs(sites.p99["2", name][0] - wanted.row_error_p99) < 1e-4
    assert not model[0]._forward_hooks


@torch.no_grad()
def test_what_a_mod_keeps_high_is_not_rounded():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 24)), make_input(1000)
    subject, exact = make_subject(model), [model(x)]
    before = judge_sites(model, ["0"], subject, [x])
    plain = judge_output(model, ["0"], subject, [x], exact)
    assert plain["moved"] == 0
    for mod in (KeepRowsHigh(columns=8), Hadamard(balance="full", keep=0.5)):
        with loka.mods.apply(model, [mod], inputs=[x]):
            after = judge_sites(model, ["0"], subject, [x])
            output = judge_output(model, ["0"], subject, [x], exact)
        assert output["moved"] < 1e-5
        assert after.mean["0", "rowwise"][0] < 0.7 * before.mean["0", "rowwise"][0]
        assert output["rowwise"] < plain["rowwise"]
