"""The whole way: probe, plan, convert, monitor; what the monitor did is in the report on the run, in every format."""

import json

import pytest
import torch

import loka
from loka.dispatch.running.convert import planned_sites
from tests.dispatch.made_monitor import Model, batches, train

FORMATS = ("table", "md", "html", "json")


@pytest.fixture(scope="module")
def monitored(tmp_path_factory):
    """The database of a run, and the monitor of a training on the plan that was made from it."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("monitored") / "run.db"
    model = Model()
    with loka.probe(model, path, every=1, overhead=100.0, recipes=["tensorwise", "rowwise"]):
        train(model, batches(130), lr=1e-3)
    plan = loka.plan(path, loka.Bound(row_error=0.06), assume_speedup=1.3)
    loka.convert(model, plan)
    assert planned_sites(model)["up"].fprop == "emulated.linear.rowwise"
    with loka.monitor(model, plan, path, every=5, overhead=100.0) as monitor:
        train(model, batches(60), lr=1e-3)
        assert monitor.changed == {}
        with torch.no_grad():
            model.up.weight[:, 0] = 0  # from here on, a loud feature that counts for nothing
        loud = torch.where(torch.arange(32) < 1, 1e6, 1.0)
        train(model, (x * loud for x in batches(40, loud=1.0)), lr=0.0)
    return path, monitor


def test_the_plan_s_own_evidence_is_what_the_product_is_held_to(monitored):
    _, monitor = monitored
    demoted = [event for event in monitor.events if event.kind == "demoted"]
    assert [event.message.split(":")[0] for event in demoted if event.message.startswith("up.fprop")] == ["up.fprop"]
    assert 60 <= demoted[0].step < 60 + 3 * 5
    assert monitor.changed["up.fprop"] == "high precision"


@pytest.mark.parametrize("format", FORMATS)
def test_events_are_shown_with_the_training_they_belong_to(monitored, format, capsys):
    from typer.testing import CliRunner

    from loka.cli import app

    path, monitor = monitored
    result = CliRunner().invoke(app, ["report", str(path), "--format", format])
    assert result.exit_code == 0, result.output
    demoted = next(event for event in monitor.events if event.kind == "demoted")
    if format == "json":
        events = json.loads(result.stdout)["events"]
        assert {"step": demoted.step, "kind": "demoted", "message": demoted.message} in events
    else:
        text = " ".join(result.stdout.split())
        assert f"step {demoted.step} of a monitored training, demoted" in text
        assert "from emulated.linear.rowwise to high precision" in text.replace("\\_", "_")


def test_the_run_keeps_the_totals_of_the_probe(monitored):
    path, _ = monitored
    from loka.probes.storing.database import open_database, read_run

    engine = open_database(path, create=False)
    run = read_run(engine)
    engine.dispose()
    assert run.progress.steps == 130
    assert run.progress.status == "complete"
