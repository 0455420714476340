"""Loops that are not one forward and one backward: every product is still counted once, in its own pass."""

import math
import warnings
from collections import Counter

import pytest
import torch
from torch import nn

from tests.probes.made_probe import PASSES_OF_TWO, Two, places, probed, product, seen, train
from tests.probes.made_situations import assert_as_eager


def test_two_forwards_and_one_backward(tmp_path):
    model = Two()

    def loop():
        for _ in range(4):
            (model(torch.randn(8, 16)) * model(torch.randn(8, 16))).sum().backward()

    run, steps = probed(model, tmp_path, loop, every=3)
    # The loop shows its rhythm in the first sample; from then on a sample holds both forwards, in one step of the loop.
    for step in steps[1:]:
        assert seen(step) == Counter(dict.fromkeys(PASSES_OF_TWO, 2))
        assert step.step % 2 == 0
    assert run.progress.unattributed == 3
    assert run.progress.steps == 8


def test_a_teachers_forward_without_gradient_is_not_taken_for_the_step(tmp_path):
    model = Two()

    def loop():
        for _ in range(10):
            with torch.no_grad():
                target = model(torch.randn(8, 16))
            (model(torch.randn(8, 16)) - target).square().sum().backward()

    _, steps = probed(model, tmp_path, loop, every=4)
    assert [seen(step) for step in steps[1:]] == [PASSES_OF_TWO] * (len(steps) - 1)
    assert len(steps) == 5


@pytest.mark.parametrize(("second_trains", "lost"), [(True, 3), (False, 1)])
def test_every_step_of_a_loop_with_two_forwards_before_a_backward_is_seen_whole(tmp_path, second_trains, lost):
    model = Two()

    def loop():
        for _ in range(6):
            first = model(torch.randn(8, 16))
            with torch.set_grad_enabled(second_trains):  # not: the reference of a preference loss, as DPO's
                second = model(torch.randn(8, 16))
            (first - second).square().sum().backward()

    run, steps = probed(model, tmp_path, loop, every=1)
    # Until the first backward nobody knows that one comes, and each forward is a sample.
    whole = Counter(dict.fromkeys(PASSES_OF_TWO, 2)) if second_trains else PASSES_OF_TWO
    assert [(step.step, seen(step)) for step in steps[2:]] == [(at, whole) for at in (2, 4, 6, 8, 10)]
    assert (run.progress.steps, run.progress.unattributed) == (12, lost)


def test_evaluation_between_training_steps(tmp_path):
    model = Two()

    def loop():
        for _ in range(3):
            train(model, 4)
            model.eval()
            with torch.inference_mode():
                for _ in range(5):
                    model(torch.randn(8, 16))
            model.train()

    run, steps = probed(model, tmp_path, loop, every=3)
    assert run.progress.unattributed == 0
    assert all(seen(step) in (PASSES_OF_TWO, Counter({("up", "fprop"): 1, ("down", "fprop"): 1})) for step in steps)
    assert sum(seen(step) == PASSES_OF_TWO for step in steps) >= 4


def test_gradient_accumulation_marked_as_one_step(tmp_path):
    model = Two()

    def loop(probe):
        for _ in range(4):
            with probe.step():
                for _ in range(3):
                    model(torch.randn(8, 16)).sum().backward()
            model(torch.randn(8, 16))  # outside of a marked step: not watched

    run, steps = probed(model, tmp_path, loop)
    assert_as_eager(run, steps, Counter(dict.fromkeys(PASSES_OF_TWO, 3)))
    assert run.progress.steps == 4


def test_gradient_accumulation_left_to_itself(tmp_path):
    model = Two()
    assert_as_eager(*probed(model, tmp_path, lambda: train(model, 4)))  # gradients are never zeroed


@pytest.mark.parametrize("imported", ["torch.autograd.grad", "from torch.autograd import grad"])
def test_autograd_grad_instead_of_backward(tmp_path, imported):
    model = Two()
    early = torch.autograd.grad

    def loop():
        for _ in range(4):
            grad = torch.autograd.grad if imported == "torch.autograd.grad" else early
            grad(model(torch.randn(8, 16)).sum(), list(model.parameters()))

    assert_as_eager(*probed(model, tmp_path, loop))


@pytest.mark.parametrize("how", ["backward", "backward-by-position", "grad", "by-hand", "inside-forward"])
def test_double_backward_is_no_recompute(tmp_path, how):
    """With create_graph, grad mode is on in backward as in a recompute, yet its products are gradients."""

    class Energy(Two):
        def forward(self, x):
            x = x.requires_grad_()
            energy = super().forward(x).sum()
            return torch.autograd.grad(energy, x, create_graph=True)[0]

    model = Energy() if how == "inside-forward" else Two()

    def penalty(x):
        y = model(x)
        if how == "inside-forward":
            return y.square().sum()
        if how == "backward":
            y.sum().backward(create_graph=True)
        elif how == "backward-by-position":
            torch.autograd.backward(y.sum(), None, None, True)
        else:
            (x.grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return x.grad.square().sum()

    def loop(probe):
        for _ in range(4):
            x = torch.randn(8, 16, requires_grad=True)
            if how == "by-hand":
                with probe.step():
                    penalty(x).backward()
            else:
                penalty(x).backward()
            model.zero_grad()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using backward.. with create_graph=True")
        run, steps = probed(model, tmp_path, loop)
    for step in steps:
        found = seen(step)
        assert found["up", "fprop"] == found["down", "fprop"] == found["down", "dgrad"] == 1
        assert found["up", "dgrad"] == 2  # the second backward comes by the first layer again, through the ReLU
    assert run.progress.status == "complete"
    assert run.progress.unattributed == 2 * 3  # the second backward's own products belong to no forward product


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(tmp_path, mode):
    model = Two()

    def loop():
        with mode():
            for _ in range(4):
                model(torch.randn(2, 8, 16))

    run, steps = probed(model, tmp_path, loop)
    assert_as_eager(run, steps, Counter({("up", "fprop"): 1, ("down", "fprop"): 1}))
    assert not run.progress.weights_changed
    assert product(steps[0], "up").m == 16


def test_model_whose_parameters_were_made_under_inference_mode(tmp_path):
    with torch.inference_mode():
        model = Two()

    def loop():
        with torch.inference_mode():
            for _ in range(4):
                model(torch.randn(8, 16))

    run, steps = probed(model, tmp_path, loop)
    assert len(steps) == 2
    assert not run.progress.weights_changed


def test_inference_without_no_grad_does_not_wait_for_a_backward_for_ever(tmp_path):
    model = Two()

    def loop():
        for _ in range(60):
            model(torch.randn(8, 16))

    run, steps = probed(model, tmp_path, loop, every=30)
    assert [step.step for step in steps] == places(30, 60) == [0, 48]
    assert [seen(step) for step in steps] == [Counter({("up", "fprop"): 1, ("down", "fprop"): 1})] * 2
    assert not run.progress.weights_changed


def test_gradients_of_frozen_weights_are_no_training(tmp_path):
    model = Two()
    run, steps = probed(model, tmp_path, lambda: train(model))
    assert_as_eager(run, steps)
    assert not run.progress.weights_changed


@pytest.mark.parametrize("how", ["in-place", "data", "embedding-only"])
def test_written_weights_are_noticed(tmp_path, how):
    class Embedded(Two):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(16))

        def forward(self, x):
            return super().forward(x + self.shift)

    model = Embedded()

    def loop():
        for _ in range(4):
            train(model, 1)
            with torch.no_grad():
                if how == "in-place":
                    model.up.weight.add_(1e-3)
                elif how == "data":
                    model.up.weight.data.add_(1e-3)
                else:
                    model.shift.add_(1e-3)

    run, _ = probed(model, tmp_path, loop)
    assert run.progress.weights_changed


def test_a_graph_run_backward_twice(tmp_path):
    model = Two(16, 16)

    def loop():
        loss = model(torch.randn(16, 16)).sum()
        loss.backward(retain_graph=True)
        loss.backward()

    _, steps = probed(model, tmp_path, loop)
    assert seen(steps[0]) == PASSES_OF_TWO + Counter({key: 1 for key in PASSES_OF_TWO if key[1] != "fprop"})


def from_complex(y):
    torch.complex(y.sum(), y.square().sum()).backward(torch.tensor(1 + 1j))


def from_nested(y):
    root = torch.nested.as_nested_tensor([y.square().mean().view(1, 1)], layout=torch.jagged)
    root.backward(torch.ones_like(root))


@pytest.mark.parametrize("run_backward", [from_complex, from_nested])
def test_backward_may_begin_at_what_has_no_number(run_backward, tmp_path):
    model, gradients = Two(), []

    def loop():
        for step in range(3):
            model.zero_grad()
            run_backward(model(torch.randn(8, 16, generator=torch.Generator().manual_seed(step))))
            gradients.extend(each.grad.clone() for each in model.parameters())

    loop()
    run, steps = probed(model, tmp_path, loop, every=1)
    assert len(gradients) == 2 * 3 * 4
    assert all(map(torch.equal, gradients[:12], gradients[12:]))
    assert (run.progress.status, [seen(step) for step in steps]) == ("complete", [PASSES_OF_TWO] * 3)
    assert all(step.loss is None or math.isnan(step.loss) for step in steps)


def test_products_of_hooks_in_backward_are_not_the_models(tmp_path):
    """An optimiser that multiplies matrices as soon as a gradient is there, as Muon and GaLore do."""
    model = Two()

    def multiply(parameter):
        parameter.grad @ parameter.grad.T

    model.up.weight.register_post_accumulate_grad_hook(multiply)
    model.down.weight.register_post_accumulate_grad_hook(multiply)
    run, steps = probed(model, tmp_path, lambda: train(model))
    assert_as_eager(run, steps)


def test_an_optimizers_products_inside_a_marked_step_are_not_the_models(tmp_path):
    model = Two()

    def loop(probe):
        for _ in range(4):
            with probe.step():
                train(model, 1)
                with torch.no_grad():
                    for parameter in model.parameters():
                        if parameter.dim() == 2:
                            parameter.grad @ parameter.grad.T @ parameter.grad

    assert_as_eager(*probed(model, tmp_path, loop))
