"""The monitor in a training: it finds what grows, moves products down and up, and never stops a step."""

import copy
import gc
import logging
import math
import sqlite3
import weakref

import pytest
import torch
from torch import nn

import loka
from loka.dispatch.monitoring import plan_watch
from loka.dispatch.monitoring.guard import Patience
from loka.dispatch.monitoring.plan_watch import PlanWatch
from loka.dispatch.monitoring.sequential import FALSE_ALARMS
from loka.dispatch.monitoring.team_watch import Team
from loka.dispatch.running.convert import planned_sites
from loka.dispatch.running.executions import kernel_executions, reset_kernel_executions
from loka.probes.records import MONITOR_EVENTS
from loka.probes.storing.database import open_database, read_run
from tests.dispatch.made_conversion import plan_for
from tests.dispatch.made_monitor import (
    LOUD,
    TENSORWISE,
    Model,
    batches,
    kinds,
    monitored,
    of_kind,
    train,
    with_next,
)
from tests.probes.made_probe import assert_nothing_attached, places

EVERY = 5
GROWS_AT = 100
SINCE = [step for step in places(EVERY, 300) if step >= GROWS_AT]  # monitored, of those that have grown


def test_a_tenfold_growth_of_outliers_demotes_within_three_monitored_steps_and_the_loss_stays():
    exact = Model()
    unguarded, guarded = copy.deepcopy(exact), copy.deepcopy(exact)
    inputs = list(batches(200, grows_at=GROWS_AT))
    _, monitor, losses = monitored(inputs, model=guarded, every=EVERY)
    demoted = of_kind(monitor, "demoted")
    assert {event.message.split(":")[0] for event in demoted} == {"up.fprop", "up.wgrad"}
    assert all(event.step <= SINCE[2] < GROWS_AT + 3 * EVERY for event in demoted)
    assert {event.step for event in of_kind(monitor, "outliers")} == {SINCE[2]}
    assert monitor.changed == {"up.fprop": "high precision", "up.wgrad": "high precision"}
    assert not planned_sites(guarded)["up"].planned
    plain = train(exact, inputs)
    rounded = train(loka.convert(unguarded, plan_for(unguarded, TENSORWISE)), inputs)
    late = slice(GROWS_AT + 3 * EVERY, None)
    off = [abs(a - b) for a, b in zip(losses[late], plain[late], strict=True)]
    off_unguarded = [abs(a - b) for a, b in zip(rounded[late], plain[late], strict=True)]
    assert max(off) < 0.005 * max(plain)
    assert max(off) < 0.5 * max(off_unguarded)


def test_what_is_under_suspicion_is_measured_first_from_then_on():
    for grows_at, waits in ((100, True), (None, False)):
        inputs = batches(SINCE[1] + 1, grows_at=grows_at)  # two monitored steps since, and the third will tell
        _, monitor, _ = monitored(inputs, every=EVERY)
        assert not of_kind(monitor, "demoted")
        assert monitor._watch.waits_for("up", "fprop") == waits
        assert not monitor._watch.waits_for("down", "fprop")


def test_a_demotion_says_what_was_seen():
    _, monitor, _ = monitored(batches(140, grows_at=100))
    (event,) = (event for event in of_kind(monitor, "demoted") if event.message.startswith("up.fprop"))
    for part in (
        "from emulated.linear.tensorwise to high precision: row_error",
        "times its limit of 0.05",
        "% of it rounds to zero",
        "alignment",
        "Back after 20 clean monitored steps",
    ):
        assert part in event.message
    outliers = of_kind(monitor, "outliers")[0]
    assert "the largest value of input is" in outliers.message


def test_a_growth_that_the_recipe_stands_is_told_and_demotes_nothing():
    _, monitor, _ = monitored(batches(140, grows_at=100, loud=10.0))
    assert set(kinds(monitor)) == {"outliers"}
    assert monitor.changed == {}


def test_a_stationary_training_goes_on_without_any_alarm(record_property):
    _, monitor, _ = monitored(batches(300), {"up": dict.fromkeys(("fprop", "dgrad", "wgrad"), "tensorwise")}, every=1)
    record_property("alarms in 300 monitored steps", len(kinds(monitor)))
    assert kinds(monitor) == []
    (summary,) = monitor.events
    assert "300 of 300 steps monitored, 600 readings of 3 products" in summary.message  # the input has no gradient
    assert f"at most {600 * FALSE_ALARMS:.2g} false alarms" in summary.message


def test_steps_that_are_not_monitored_run_as_planned_and_monitored_ones_in_high_precision():
    reset_kernel_executions()
    monitored(batches(20))
    counts = kernel_executions()
    reset_kernel_executions()
    assert counts["emulated.linear.tensorwise"] == 16 * 2


# --- down the ladder, and up ---


def test_a_product_goes_to_the_next_admissible_recipe_that_stands_its_operands():
    model = Model()
    plan = with_next(model, "up", "fprop", "tensorwise", "tensorwise", "rowwise")
    _, monitor, _ = monitored(batches(200, grows_at=100), model=model, plan=plan)
    assert monitor.changed == {"up.fprop": "emulated.linear.rowwise"}
    assert planned_sites(model)["up"].fprop == "emulated.linear.rowwise"
    assert len(of_kind(monitor, "demoted")) == 1


def test_a_next_recipe_that_is_as_bad_is_passed_over():
    model = Model()
    with torch.no_grad():
        model.up.weight[:, 0] = 0  # a loud feature that counts for nothing: it ruins the scale of every row
    plan = with_next(model, "up", "fprop", "tensorwise", "rowwise")
    loka.convert(model, plan)
    loud = torch.where(torch.arange(32) < 1, 1e6, 1.0)
    with loka.monitor(model, plan, every=5, overhead=100.0) as monitor:
        train(model, (x * loud if step >= 100 else x for step, x in enumerate(batches(140, loud=1.0))), lr=0.0)
    assert monitor.changed == {"up.fprop": "high precision"}


def _waves(periods, length):
    """Outliers that come and go."""
    for period in range(periods):
        yield from batches(length, times=10.0, grows_at=0 if period % 2 else None, seed=period)


def test_it_comes_back_after_so_many_clean_steps_and_so_often():
    _, monitor, _ = monitored(_waves(8, 100), {"up": {"fprop": "tensorwise"}}, clean_steps=5, max_flips=2)
    moves = [(event.kind, event.step) for event in monitor.events if event.kind in ("demoted", "promoted")]
    assert [kind for kind, _ in moves] == ["demoted", "promoted", "demoted", "promoted", "demoted"]
    down, up = moves[0][1], moves[1][1]
    assert 100 <= down < 115
    assert up == 200 + 4 * EVERY == [step for step in SINCE if step >= 200][4]  # the fifth clean one
    assert "It stays there: it has come back 2 times" in of_kind(monitor, "demoted")[-1].message
    assert monitor.changed == {"up.fprop": "high precision"}


def test_without_flips_nothing_comes_back():
    _, monitor, _ = monitored(_waves(4, 60), {"up": {"fprop": "tensorwise"}}, clean_steps=1, max_flips=0)
    assert kinds(monitor).count("demoted") == 1
    assert "promoted" not in kinds(monitor)


# --- the limit ---


def test_under_a_bound_on_the_loss_the_limit_is_the_planned_error_and_a_margin():
    model = Model()
    plan = plan_for(model, TENSORWISE, bound=loka.Bound(loss=2e-4))
    watch = PlanWatch(model, plan, Patience(clean_steps=1, max_flips=0), Team(), lambda event: None)
    limits = {guard.key[1]: guard.rung.limit for guard in watch.guards.values()}
    assert limits == {"fprop": pytest.approx(0.01 * math.sqrt(2)), "wgrad": 0.05}


# --- nothing in the monitor stops a training ---


def test_an_exception_in_the_loop_leaves_nothing_installed():
    model = loka.convert(Model(), plan_for(Model(), TENSORWISE))
    monitor = loka.monitor(model, plan_for(model, TENSORWISE), every=1, overhead=100.0)
    with pytest.raises(ZeroDivisionError), monitor:
        train(model, batches(3))
        model(next(batches(1)))
        raise ZeroDivisionError
    assert_nothing_attached(model)
    assert kinds(monitor) == ["monitor_ended"]
    assert "ZeroDivisionError" in of_kind(monitor, "monitor_ended")[0].message


def test_a_failure_inside_the_monitor_ends_it_and_not_the_training(monkeypatch):
    model = loka.convert(Model(), plan_for(Model(), TENSORWISE))

    def fails(*args):
        raise ValueError("made to fail")

    with (
        pytest.warns(loka.LokaWarning, match="made to fail"),
        loka.monitor(model, plan_for(model, TENSORWISE), every=5, overhead=100.0) as monitor,
    ):
        train(model, batches(10))
        monkeypatch.setattr(plan_watch, "together", fails)
        losses = train(model, batches(40))
    assert all(map(math.isfinite, losses))
    assert kinds(monitor) == ["monitor_ended"]
    assert_nothing_attached(model)


def test_the_model_can_be_freed():
    model, monitor, _ = monitored(batches(20))
    found = weakref.ref(model.up)
    del model, monitor
    gc.collect()
    assert found() is None


# --- the database ---


@pytest.fixture
def probed(tmp_path):
    """A model, the database of its run, and a plan that names the run."""
    model, path = Model(), tmp_path / "run.db"
    with loka.probe(model, path, every=2, overhead=100.0):
        train(model, batches(12))
    engine = open_database(path, create=False)
    run = read_run(engine)
    engine.dispose()
    return model, path, plan_for(model, TENSORWISE, environment={"run": run.info.id})


def events_in(path):
    engine = open_database(path, create=False)
    try:
        run = read_run(engine)
    finally:
        engine.dispose()
    return run, [event for event in run.events if event.kind in MONITOR_EVENTS]


def test_events_are_added_to_the_run_that_the_plan_was_made_from(probed):
    model, path, plan = probed
    before, _ = events_in(path)
    _, monitor, _ = monitored(batches(140, grows_at=100), model=model, plan=plan, db=path)
    run, events = events_in(path)
    assert events == monitor.events
    assert {"demoted", "outliers", "monitored"} == {event.kind for event in events}
    assert (run.info, run.progress) == (before.info, before.progress)


def test_a_database_without_that_run_gets_one(tmp_path, probed):
    model, _, plan = probed
    _, monitor, _ = monitored(batches(10), model=model, plan=plan, db=tmp_path / "other.db")
    run, events = events_in(tmp_path / "other.db")
    assert events == monitor.events
    assert run.progress.status == "complete"
    assert run.progress.steps == 10


def _remove(path):
    path.unlink()


def _destroy(path):
    for each in path.parent.glob(path.name + "*"):
        each.write_bytes(b"no database" * 1000)


def _drop_table(path):
    with sqlite3.connect(path) as connection:
        connection.execute("DROP TABLE events")


@pytest.mark.parametrize("harm", [_remove, _destroy, _drop_table])
def test_a_database_that_goes_away_stops_neither_the_training_nor_the_monitor(probed, harm, caplog):
    model, path, plan = probed
    loka.convert(model, plan)
    with (
        pytest.warns(loka.LokaWarning, match="Training goes on"),
        caplog.at_level(logging.WARNING, "loka.monitor"),
        loka.monitor(model, plan, path, every=5, overhead=100.0) as monitor,
    ):
        train(model, batches(50))
        harm(path)
        losses = train(model, batches(150, grows_at=50))
    assert all(map(math.isfinite, losses))
    assert set(monitor.changed) == {"up.fprop", "up.wgrad"}
    assert {"demoted", "outliers", "monitored"} <= {event.kind for event in monitor.events}


def test_a_database_that_cannot_be_written_is_refused_before_the_first_step(tmp_path):
    model = loka.convert(Model(), plan_for(Model(), TENSORWISE))
    with pytest.raises(loka.LokaError), loka.monitor(model, plan_for(model, TENSORWISE), tmp_path / "no" / "such.db"):
        pass
    assert_nothing_attached(model)


# --- what is refused ---


def test_what_cannot_be_monitored_is_an_error_that_says_what_to_do():
    model = Model()
    plan = plan_for(model, TENSORWISE)
    with pytest.raises(loka.LokaError, match="neither converted nor compiled"):
        loka.monitor(model, plan)
    with pytest.raises(loka.LokaError, match="made for another model"):
        loka.monitor(nn.Linear(3, 3), plan)
    loka.convert(model, plan)
    for wrong in ({"every": 0}, {"overhead": 0}, {"clean_steps": 0}, {"max_flips": -1}, {"max_flips": True}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            loka.monitor(model, plan, **wrong)


def test_a_plan_that_gains_nothing_is_monitored_with_a_warning_and_stops_no_script(tmp_path):
    model = Model()
    plan = plan_for(model, {"up": {}})
    loka.convert(model, plan)
    with pytest.warns(loka.LokaWarning, match="nothing to monitor"):
        monitor = loka.monitor(model, plan, tmp_path / "run.db", every=1)
    with monitor:
        for _ in range(3):
            model(torch.randn(4, 32)).sum().backward()
    assert {event.kind for event in monitor.events} == {"monitored"}
    assert not monitor.changed
    assert_nothing_attached(model)


def test_a_loop_that_calls_something_else_is_told():
    model = loka.convert(Model(), plan_for(Model(), TENSORWISE))
    plan = plan_for(model, TENSORWISE)
    with pytest.warns(loka.LokaWarning, match="Nothing was monitored"), loka.monitor(model, plan):
        model.up(torch.randn(2, 32))


def test_loud_rows_are_within_the_limit_at_first():
    """The made training is what the other tests take it for."""
    _, monitor, _ = monitored(batches(50, loud=LOUD))
    assert kinds(monitor) == []
