"""What the page reads from a database: the errors of single steps, where operands lie, advice; of the run asked for."""

import math
import sys

import numpy as np
import pytest
import torch
from torch import nn

import loka
from loka.bounds import Bound
from loka.probes.judging.evidence import read_and_condense
from loka.probes.storing.database import open_database
from loka.reports import build, html_report, json_report
from loka.reports.build import built_of, report_of
from loka.reports.page import histories as module
from loka.reports.page.histories import histories
from loka.reports.page.levels import BINS_OF_AN_OCTAVE, levels_of
from loka.reports.words import ordered
from tests.reports.pages import Page

BOUND = Bound(row_error=0.05)
STEPS = 20


def train(model, path, seed):
    torch.manual_seed(seed)
    with loka.probe(model, path, every=1, overhead=100.0, recipes=["rowwise", "tensorwise"]):
        for _ in range(STEPS):
            model(torch.randn(48, 40)).square().mean().backward()


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """Two runs of two models in one database."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("runs") / "run.db"
    train(nn.Sequential(nn.Linear(40, 32), nn.Tanh(), nn.Linear(32, 24)), path, seed=1)
    first = report_of(path, BOUND)["run"]["id"]
    train(nn.Sequential(nn.Linear(40, 16)), path, seed=2)
    return path, first


@pytest.fixture(scope="module")
def built(database):
    path, first = database
    return built_of(path, BOUND, run=first)


def test_a_history_is_what_the_verdict_was_made_of(built):
    for row in built.report["sites"]:
        history = built.material.histories[row["site"]][row["pass"]]
        for recipe in row["recipes"]:
            errors = history["recipes"][recipe["recipe"]]
            assert len(errors) == len(history["steps"]) == history["of"] == recipe["n"] == STEPS
            assert np.mean(errors) == pytest.approx(recipe["row_error"]["mean"], rel=1e-3)


def test_a_long_history_is_thinned_evenly_and_keeps_its_ends(database, monkeypatch):
    path, first = database
    monkeypatch.setattr(module, "_FEWEST_STEPS", 5)
    monkeypatch.setattr(module, "_MOST_STEPS", 5)
    engine = open_database(path, create=False)
    _, series = read_and_condense(engine, first)
    engine.dispose()
    found = histories(series, {("0", "fprop"): "row_error"})
    assert list(found) == ["0"]
    assert found["0"]["fprop"]["steps"] == [0, 5, 10, 14, 19]
    assert found["0"]["fprop"]["of"] == STEPS
    assert all(len(errors) == 5 for errors in found["0"]["fprop"]["recipes"].values())


def test_recipes_that_were_measured_on_other_steps_keep_their_own():
    def shown(steps, values):
        return module._on(np.array([0, 10, 20]), np.array(steps), np.array(values))

    assert shown([0, 20], [0.1, 0.3]) == [0.1, None, 0.3]
    assert shown([10], [math.inf]) == [None, None, None]


def test_histograms_hold_all_of_the_energy_of_both_operands_and_of_the_gradient(built):
    found = built.material.histograms
    assert set(found) == {"0", "2"}
    # The first layer reads data: nothing asks for the gradient of that, so its dgrad is never seen.
    assert set(found["0"]) == {"input", "weight"}
    assert set(found["2"]) == {"input", "weight", "grad_output"}
    for role in found["2"].values():
        assert {name for group in role["groups"] for name in group.split(", ")} > {"tensor", "row"}
        for levels in map(levels_of, role["groups"].values()):
            assert len(levels) <= 2 + 24 * BINS_OF_AN_OCTAVE
            shares = [10 ** (level / 10) for level in levels if level is not None]
            assert sum(shares) == pytest.approx(1.0, rel=0.13)  # whole decibels


def test_a_large_model_has_histograms_of_what_needs_attention_and_says_so(database, monkeypatch):
    path, first = database
    monkeypatch.setattr(build, "MOST_SITES", 1)
    found = built_of(path, BOUND, run=first)
    (worst, *_) = ordered(found.report)
    assert list(found.material.histograms) == [worst["site"]]
    assert found.material.partial
    assert found.material.advice is None
    assert "loka advise DB says it" in html_report.render(found.report, found.material)


def test_advice_that_would_take_too_long_is_left_to_its_command(database, monkeypatch):
    path, first = database
    assert built_of(path, Bound(row_error=1e-4), run=first).material.advice is not None
    monkeypatch.setattr(build, "MOST_READ", 0)
    found = built_of(path, Bound(row_error=1e-4), run=first)
    assert found.material.advice is None
    assert not found.material.partial
    assert set(found.material.histograms) == {"0", "2"}
    assert "loka advise DB says it" in html_report.render(found.report, found.material)


def test_the_page_shows_the_run_that_was_asked_for(database):
    path, first = database
    sites = {}
    for run in (first, None):
        built = built_of(path, BOUND, run=run)
        page = Page(html_report.render(built.report, built.material))
        material = page.data("material")
        sites[run] = {entry["site"] for entry in material["histories"]}
        assert sites[run] == {row["site"] for row in page.data("report")["sites"]}
    assert sites[first] == {"0", "2"}
    assert sites[None] == {"0"}


def test_material_stays_out_of_the_json_and_is_read_for_the_page_alone(database, built):
    path, first = database
    document = json_report.render(built.report)
    assert document == json_report.render(report_of(path, BOUND, run=first))
    assert "histories" not in document
    assert built_of(path, BOUND, material=False).material.histories == {}


def test_a_page_is_made_without_importing_plotly(built):
    known = set(sys.modules)
    html_report.render(built.report, built.material)
    assert not {name for name in set(sys.modules) - known if name.split(".")[0] == "plotly"}
