"""The figures of benchmarks.mods.equivalent, on a model small enough to compute them by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import loka.mods
from benchmarks.mods.anatomy import anatomy
from benchmarks.mods.equivalent import (
    RECIPES,
    Sites,
    Subject,
    divergence,
    judge_output,
    judge_sites,
    work_of,
    worst_sites,
)
from benchmarks.truth.materials import Material
from loka.formats import RECIPES as KNOWN
from loka.mods import Hadamard, KeepRowsHigh, KeepShareHigh
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


def test_work_is_counted_in_products_of_the_site_a_full_basis_and_rows_done_twice_among_it():
    wanted = {
        KeepRowsHigh(columns=8, rows=None): (8 / 32, 1.0),  # the rest keeps its shape
        Hadamard(balance="full", keep=0.5): ((32 * 32 + 16 * 24) / (32 * 24), 0.5),
        Hadamard(): (0.0, 1.0),
    }
    for mod, (high, low) in wanted.items():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 24))
        loka.mods.apply(model, [mod], inputs=[make_input(1000)])
        found = work_of({"0": model[0]}, ["0"])
        assert (found["work in high precision"], found["work in FP8"]) == (round(high, 3), low)
    model = nn.Sequential(nn.Linear(32, 24), nn.Linear(24, 24))
    loka.mods.apply(model, [KeepShareHigh(times=1.2, only="0")], inputs=[make_input(1000)])
    model[0].period = 8
    rest = model[0].rest.in_features
    found = work_of({"0": model[0], "1": model[1]}, ["0"])
    assert found["work in high precision, in FP8"] == {"0": [round(1 - rest / 32 + rest / 32 / 8, 3), rest / 32]}
    assert found["work in FP8"] == round((rest + 24) / (32 + 24), 3)


def test_the_worst_sites_are_those_with_the_largest_p99_the_worst_first():
    sites = Sites(p99={(name, known): [0.01 * index] for known in RECIPES for index, name in enumerate("abc")})
    assert worst_sites(sites, "abc", 2) == {"rowwise": ["c", "b"], "tensorwise": ["c", "b"]}


def test_the_anatomy_of_an_error_finds_the_rows_and_the_operands_that_make_it():
    torch.manual_seed(0)
    x, weight = torch.randn(1600, 64), torch.randn(48, 64)
    noisy = torch.arange(0, 1600, 32)
    x[noisy] -= 0.9 * x[noisy] @ torch.linalg.pinv(weight) @ weight  # what is left the product hardly reads
    found = anatomy(x[:800], x[800:], weight)
    assert found["correlation of error and root of noise to signal"] > 0.8
    assert set(found["p99 by recipe"]) == {"tensorwise", "rowwise", "blockwise", "mxfp8"}
    rows, plain = found["p99, a sixteenth of the rows exact"], found["p99 by recipe"]["rowwise"]
    assert rows["the largest noise to signal"] < 0.7 * plain
    assert rows["the loudest"] > 0.9 * plain
    alone = found["p99, this operand alone rounded"]
    assert abs(alone["input"] ** 2 + alone["weight"] ** 2 - plain**2) < 0.3 * plain**2


def test_the_anatomy_of_an_error_finds_the_columns_that_make_it_and_what_a_basis_costs():
    torch.manual_seed(0)
    x, weight = torch.randn(1600, 64), torch.randn(48, 64)
    x[:, 20:36] *= 100
    found = anatomy(x[:800], x[800:], weight)
    assert found["least kept for a third: columns"] == {"share": 0.25, "work": 0.25}
    basis = found["least kept for a third: directions of a full basis"]
    assert basis["work"] == pytest.approx(basis["share"] + 64 / 48, abs=1e-3)
    assert basis["share"] <= 0.25
