"""Listeners of a run, and steps that are left out or marked by hand."""

import time

import pytest
import torch
from torch import nn

import loka
from loka.errors import ArgumentError
from loka.probes.storing.database import open_database, read_run, read_steps
from tests.dispatch.made_conversion import plan_for
from tests.dispatch.made_monitor import TENSORWISE, Model, batches
from tests.dispatch.made_monitor import train as train_monitored
from tests.probes.made_probe import places

OPTIONS = {"every": 2, "overhead": 100.0}


class Ear:
    """Keeps what it hears."""

    def __init__(self):
        self.heard = []

    def begin(self, info):
        self.heard.append(("begin", info))

    def write(self, step, progress):
        self.heard.append(("write", (step, progress)))

    def event(self, event):
        self.heard.append(("event", event))

    def finish(self, progress):
        self.heard.append(("finish", progress))

    def of(self, kind):
        return [what for name, what in self.heard if name == kind]


def stored(db):
    engine = open_database(db, create=False)
    try:
        return read_run(engine), list(read_steps(engine))
    finally:
        engine.dispose()


def numbers(step):
    """What a step has shown, NaN equal to NaN, whatever the order of recipes."""
    return step.step, [(each.site, each.product, repr(sorted(each.errors.items()))) for each in step.products]


def train(model, steps=6):
    for _ in range(steps):
        model(torch.randn(8, 16)).sum().backward()


def test_a_listener_hears_what_the_database_keeps(tmp_path):
    model, ear, late = nn.Linear(16, 8), Ear(), Ear()
    probe = loka.probe(model, tmp_path / "run.db", **OPTIONS)
    probe.subscribe(ear)
    with probe:
        train(model, 3)
        probe.subscribe(late)
        train(model, 3)
    run, steps = stored(tmp_path / "run.db")
    assert list(map(numbers, [step for step, _ in ear.of("write")])) == list(map(numbers, steps))
    assert [info.id for info in ear.of("begin")] == [info.id for info in late.of("begin")] == [run.info.id]
    assert [step.step for step, _ in late.of("write")] == [3, 4]
    assert ear.of("finish") == [run.progress]
    with pytest.raises(ArgumentError, match="The run is over"):
        probe.subscribe(Ear())
    assert next(name for name, _ in ear.heard) == "begin"
    assert [name for name, _ in ear.heard][-1] == "finish"


def test_a_listener_that_raises_is_told_nothing_more_and_training_goes_on(tmp_path):
    class Breaks(Ear):
        def write(self, step, progress):
            super().write(step, progress)
            raise OSError("no space left")

    model, breaks, ear = nn.Linear(16, 8), Breaks(), Ear()
    with loka.probe(model, tmp_path / "run.db", **OPTIONS) as probe:
        probe.subscribe(breaks)
        probe.subscribe(ear)
        train(model)
    run, steps = stored(tmp_path / "run.db")
    assert len(breaks.of("write")) == 1
    assert len(ear.of("write")) == len(steps) == 3
    (event,) = [event for event in run.events if event.kind == "listener_left"]
    assert "Breaks" in event.message
    assert "no space left" in event.message
    assert event in ear.of("event")


def test_a_listener_that_cannot_begin_is_an_error_before_the_first_step(tmp_path):
    class Refuses(Ear):
        def begin(self, info):
            raise ArgumentError("not here")

    model = nn.Linear(16, 8)
    probe = loka.probe(model, tmp_path / "run.db", **OPTIONS)
    probe.subscribe(Refuses())
    with pytest.raises(ArgumentError, match="not here"), probe:
        train(model)
    assert "_compiled_call_impl" not in model.__dict__
    assert stored(tmp_path / "run.db")[0].progress.status == "failed"


def test_what_cannot_hear_is_refused(tmp_path):
    probe = loka.probe(nn.Linear(16, 8), tmp_path / "run.db", **OPTIONS)
    with pytest.raises(ArgumentError, match=r"begin, write, event, finish.*wandb\.Sink"):
        probe.subscribe(print)


def test_what_listeners_take_is_the_probe_s_own_time(tmp_path):
    class Slow(Ear):
        def write(self, step, progress):
            time.sleep(0.05)

    model = nn.Linear(16, 8)
    with loka.probe(model, tmp_path / "run.db", **OPTIONS) as probe:
        probe.subscribe(Slow())
        train(model)
    assert probe.progress.probe_s >= 3 * 0.05


def test_a_pause_is_no_part_of_the_run(tmp_path):
    model = nn.Linear(16, 8)
    with loka.probe(model, tmp_path / "run.db", **OPTIONS) as probe:
        train(model, 3)
        with probe.paused(), probe.paused():
            train(model, 5)
        with probe.paused(), probe.step():
            train(model, 1)
        train(model, 3)
    _, steps = stored(tmp_path / "run.db")
    assert probe.progress.steps == 6
    assert [step.step for step in steps] == [0, 3, 4]
    assert all({product.calls for product in step.products} == {1} for step in steps)


def test_a_pause_inside_a_step_is_an_error(tmp_path):
    model = nn.Linear(16, 8)
    with loka.probe(model, tmp_path / "run.db", **OPTIONS) as probe:
        train(model)
        with probe.step(), pytest.raises(ArgumentError, match="a step is open"), probe.paused():
            pass


@pytest.mark.parametrize("backward", ["after", "inside"])
def test_a_forward_marked_by_hand_is_a_step_and_others_are_not(tmp_path, backward):
    model, twin = nn.Sequential(nn.Linear(16, 8)), nn.Sequential(nn.Linear(16, 8))
    twin.load_state_dict(model.state_dict())
    batches = torch.randn(6, 8, 16)
    with loka.probe(model, tmp_path / "marked.db", **OPTIONS) as probe:
        for batch in batches:
            with probe.forward():
                loss = model.forward(batch).square().mean()  # goes past the call that is watched
                if backward == "inside":
                    loss.backward()
            if backward == "after":
                loss.backward()
            with torch.no_grad():
                model(batch)  # an evaluation
            model(batch).sum().backward()  # another loss, not marked
    with loka.probe(twin, tmp_path / "called.db", **OPTIONS) as called:
        for batch in batches:
            twin(batch).square().mean().backward()
    assert probe.progress.steps == called.progress.steps == 6
    marked, plain = stored(tmp_path / "marked.db")[1], stored(tmp_path / "called.db")[1]
    assert [step.step for step in marked] == [0, 3, 4]
    for one, other in zip(marked, plain, strict=True):
        assert repr([product.errors for product in one.products]) == repr(
            [product.errors for product in other.products]
        )
        assert [(product.product, product.calls) for product in one.products] == [("fprop", 1), ("wgrad", 1)]


def test_a_monitor_tells_its_listeners_of_samples_and_of_what_it_does(tmp_path):
    model, ear = Model(), Ear()
    plan = plan_for(model, TENSORWISE)
    loka.convert(model, plan)
    with loka.monitor(model, plan, every=5, overhead=100.0) as monitor:
        monitor.subscribe(ear)
        train_monitored(model, batches(60, grows_at=30))
    assert [step.step for step, _ in ear.of("write")] == places(5, 60)
    assert any("tensorwise" in product.errors for product in ear.of("write")[0][0].products)
    demoted = [event for event in monitor.events if event.kind == "demoted"]
    assert demoted
    assert [event for event in ear.of("event") if event.kind == "demoted"] == demoted
    assert len(ear.of("finish")) == 1
