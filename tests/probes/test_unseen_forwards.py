"""Loops that train a model by another way than calling it: the user is told, and others are not bothered."""

import pytest
import torch
from torch import nn

from loka.errors import EvidenceError
from tests.probes.made_probe import Two, product, recorded, train
from tests.probes.made_session import warned


class Policy(Two):
    """Plays by its forward, without gradient, and learns by another method."""

    def score(self, x):
        return self.down(torch.relu(self.up(x))).square().mean()


def play(model, steps=12):
    with torch.no_grad():
        for _ in range(steps):
            model(torch.randn(1, 16))


def test_a_model_that_only_plays_by_its_forward_is_told_of(tmp_path):
    model, told = Policy(), []

    def loop(probe):
        for _ in range(4):
            play(model)
            for _ in range(4):
                model.score(torch.randn(8, 16)).backward()

    warned(model, tmp_path, loop, told)
    assert len(told) == 1
    assert "saw forwards of Policy without gradient only" in told[0]
    assert "with probe.forward():" in told[0]
    run, _ = recorded(tmp_path / "run.db")
    assert [event.kind for event in run.events].count("unseen_forward") == 1


def test_marked_calls_of_the_method_are_what_is_seen(tmp_path):
    model, told = Policy(), []

    def loop(probe):
        for _ in range(4):
            play(model)
            for _ in range(4):
                with probe.forward():
                    score = model.score(torch.randn(8, 16))
                score.backward()

    warned(model, tmp_path, loop, told, every=1)
    assert told == []
    _, steps = recorded(tmp_path / "run.db")
    marked = [step for step in steps if any(entry.product == "wgrad" for entry in step.products)]
    assert len(marked) >= 8
    assert all(product(step, "up", "fprop").m == 8 for step in marked)


def test_a_teacher_beside_a_student_that_learns_is_nothing_to_tell_of(tmp_path):
    teacher, student, told = Two(), Two(), []

    def loop(probe):
        for _ in range(30):
            x = torch.randn(8, 16)
            with torch.no_grad():
                wanted = teacher(x)
            (student(x) - wanted).square().mean().backward()

    warned(teacher, tmp_path, loop, told)
    assert told == []


def test_a_model_that_runs_with_gradient_inside_of_backward_alone_is_nothing_to_tell_of(tmp_path):
    """A cache of gradients, as of sentence-transformers: the loss of a large batch, the model again in parts of it."""
    model, told = Two(), []

    def again(x, slope):
        for part in (slice(4), slice(4, 8)):
            with torch.enable_grad():
                (model(x[part]) * slope[part]).sum().backward()

    def loop(probe):
        for _ in range(30):
            x = torch.randn(8, 16)
            with torch.no_grad():
                slope = 2 * model(x)
            loss = slope.square().mean().requires_grad_()
            loss.register_hook(lambda _, x=x, slope=slope: again(x, slope))
            loss.backward()

    warned(model, tmp_path, loop, told, every=100)
    assert told == []


@pytest.mark.parametrize("frozen", [False, True])
def test_a_loop_that_evaluates_first_and_then_trains_is_nothing_to_tell_of(tmp_path, frozen):
    model, told = Two(), []
    model.up.weight.requires_grad_(not frozen)

    def loop(probe):
        play(model)
        for _ in range(15):
            loss = model(torch.randn(8, 16)).sum()
            loss.backward(retain_graph=True)
            (2 * loss).backward()

    warned(model, tmp_path, loop, told)
    assert told == []


def test_a_loop_of_which_nothing_is_seen_is_told_how_to_mark_a_method(tmp_path):
    model, told = Policy(), []

    def loop(probe):
        for _ in range(3):
            model.score(torch.randn(8, 16)).backward()

    with pytest.raises(EvidenceError, match=r"calls a method of the model.*with probe\.forward\(\):"):
        warned(model, tmp_path, loop, told)


def test_the_graph_is_walked_once_however_long_it_goes_on(tmp_path, monkeypatch):
    import loka.probes.sampling.session as session

    walks = []
    found = session.reaches
    monkeypatch.setattr(session, "reaches", lambda *args: walks.append(1) or found(*args))
    teacher, told = Two(), []
    student = nn.Linear(16, 16)

    def loop(probe):
        for _ in range(60):
            with torch.no_grad():
                teacher(torch.randn(8, 16))
            student(torch.randn(8, 16)).sum().backward()

    warned(teacher, tmp_path, loop, told)
    assert len(walks) == 1
    assert told == []


def test_training_the_model_itself_walks_no_graph(tmp_path, monkeypatch):
    import loka.probes.sampling.session as session

    monkeypatch.setattr(session, "reaches", lambda *args: pytest.fail("walked a graph"))
    model = Two()
    warned(model, tmp_path, lambda probe: train(model, 30), [])
