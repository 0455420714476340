"""Experts in a report: the part of each site, tokens and errors of single experts, a note on those that differ."""

import json

import pytest
import torch

import loka
from loka.reports.build import report_of
from loka.reports.markdown import render as as_markdown
from loka.reports.words import notes
from tests.probes.made_fragile_experts import EXPERTS, FRAGILE, TOKENS, Grouped, train_probed


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("runs") / "experts.db"
    train_probed(Grouped(), path, steps=60, recipes=["tensorwise"])
    return path


def row_of(report, product="fprop"):
    return next(row for row in report["sites"] if row["pass"] == product)


def test_a_report_tells_the_experts_of_a_layer_apart(database):
    row = row_of(report_of(database, loka.Bound(row_error=0.075)))
    experts = row["experts"]
    assert experts["experts"] == EXPERTS
    assert experts["idle"] == [1]
    assert experts["tokens"] == list(TOKENS)
    (found,) = experts["recipes"]
    assert found["unsafe"] == [FRAGILE]
    assert found["worst"]["expert"] == FRAGILE
    assert found["safe"] + found["undecided"] + 1 == EXPERTS
    assert found["worst"]["row_error"]["mean"] > 0.075
    json.dumps(experts, allow_nan=False)


def test_a_note_names_the_unsafe_and_the_idle(database):
    report = report_of(database, loka.Bound(row_error=0.075))
    said = "\n".join(notes(report))
    assert f"weight_of fprop: 1 ({FRAGILE}) of {EXPERTS} experts exceed the bound under tensorwise" in said
    assert f"weight_of fprop: 1 (1) of {EXPERTS} experts got no token" in said
    assert "experts exceed the bound" in as_markdown(report)


def test_a_bound_on_something_else_judges_no_expert(database):
    row = row_of(report_of(database, loka.Bound(sqnr_db=20)))
    assert row["experts"]["recipes"][0]["unsafe"] == []
    assert row["experts"]["recipes"][0]["safe"] == 0


def test_other_products_have_no_experts(tmp_path):
    model = torch.nn.Linear(16, 16)
    with loka.probe(model, db=tmp_path / "run.db", every=1, overhead=10.0), torch.no_grad():
        for _ in range(4):
            model(torch.randn(8, 16))
    (row,) = report_of(tmp_path / "run.db", loka.Bound(row_error=0.05))["sites"]
    assert "experts" not in row
    assert row["part"] is None
