"""Optimizers, their hooks and closures, around a step that is left out."""

import math

import pytest
import torch
from torch import nn

import loka
from tests.dispatch.kernels_that_fail_late import Faults
from tests.dispatch.made_conversion import decision, plan_for
from tests.dispatch.made_held import (
    BREAKS_AT,
    NAME,
    PASSES,
    converted,
    is_finite,
    plain_step,
    trained,
)
from tests.dispatch.made_monitor import Model, batches, kinds
from tests.probes.made_probe import places

pytestmark = pytest.mark.usefixtures("late_registry")


def test_gradients_are_there_behind_the_step_and_the_weights_as_before():
    seen = []

    def step(model, optimizer, x):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        loss = plain_step(model, optimizer, x)
        same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        seen.append((same, [parameter.grad for parameter in model.parameters()]))
        return loss

    trained(["fprop"], step=step)
    assert [at for at, (same, _) in enumerate(seen) if same] == [BREAKS_AT]
    assert all(gradient is not None for _, gradients in seen for gradient in gradients)
    assert any(bool(gradient.isnan().any()) for gradient in seen[BREAKS_AT][1])


def test_a_step_of_every_optimizer_is_left_out():
    """The gradient of an embedding is all that a dgrad that gives NaN reaches."""
    torch.manual_seed(0)
    table, model = nn.Embedding(8, 32), Model()
    whole = nn.Sequential(table, model)
    decisions = [
        decision("1.up", each, "tensorwise" if each == "dgrad" else None, kernel=NAME if each == "dgrad" else None)
        for each in PASSES
    ]
    plan = plan_for(whole, {}, decisions=tuple(decisions))
    loka.convert(whole, plan)
    optimizers = torch.optim.Adam(model.parameters(), lr=1e-2), torch.optim.SGD(table.parameters(), lr=1e-2)
    with loka.monitor(whole, plan, every=1000, overhead=1e-9) as monitor:
        for at in range(8):
            Faults.on = at == 4
            whole(torch.arange(8)).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    assert kinds(monitor) == ["step_held"]
    assert monitor.events[0].message.startswith("the gradients of 0.weight are not finite")
    assert is_finite(whole)


@pytest.mark.parametrize("shares", [False, True])
def test_steps_of_another_optimizer_do_not_excuse_what_came_before_them(shares):
    """A discriminator's, or that of the head, steps in each micro-batch; the model's own in each third one."""
    (model, plan), last = converted("fprop"), places(8, 40)[-1]
    other = model.down if shares else nn.Linear(4, 4)
    often = torch.optim.SGD(other.parameters(), lr=1e-2)
    seldom = torch.optim.SGD(model.up.parameters(), lr=1e-2)
    with loka.monitor(model, plan, every=8, overhead=100.0) as monitor:
        for at, x in enumerate(batches(last + 1, loud=1.0)):
            Faults.on = at == last - 2
            (model(x)[1:] - x[1:, :16]).square().mean().backward()
            often.step()
            often.zero_grad()
            if (last - at) % 3 == 0:
                seldom.step()
                seldom.zero_grad()
    assert kinds(monitor) == ["step_held"] * (1 + shares)
    assert monitor.events[-2].step == last
    assert is_finite(model)


def test_an_optimizer_whose_gradients_are_finite_holds_back_no_other():
    model, plan = converted("fprop")
    one, other = (torch.optim.SGD(part.parameters(), lr=1e-2) for part in (model.up, model.down))
    with loka.monitor(model, plan, every=1000, overhead=1e-9) as monitor:
        for x in batches(8, loud=1.0):
            plain_step(model, one, x)
            model.down.bias.grad[0] = math.inf  # the training's own, in each step
            other.step()
            other.zero_grad()
            nn.init.zeros_(model.down.bias)
    assert kinds(monitor) == ["nonfinite_gradients"]


@pytest.mark.parametrize("lasts", [True, False])
def test_an_optimizer_that_gets_the_model_later_is_looked_at(lasts):
    """As in a fine-tuning that thaws the model behind its head; or it is made anew in each step."""
    (model, plan), head = converted("fprop"), nn.Linear(16, 4)
    optimizer = torch.optim.SGD(head.parameters(), lr=1e-2)
    with loka.monitor(model, plan, every=1000, overhead=1e-9) as monitor:
        for at, x in enumerate(batches(8, loud=1.0)):
            if at == 2 and lasts:
                optimizer.add_param_group({"params": list(model.parameters())})
            if not lasts:
                optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
            Faults.on = at == 5
            model.zero_grad()
            head.zero_grad()
            head(model(x)).square().mean().backward()
            optimizer.step()
    assert kinds(monitor) == ["step_held"]
    assert is_finite(model)


def held_once(make, *, closure=False, seen=lambda optimizer: None):
    """Train under a monitor with a NaN in one step; return the model, the monitor and the weights by which it moved."""
    model, plan = converted("fprop")
    optimizer = make(model)
    moved = []
    with loka.monitor(model, plan, every=1000, overhead=1e-9) as monitor:
        for at, x in enumerate(batches(12, loud=1.0)):
            before = [parameter.detach().clone() for parameter in model.parameters()]

            def gradients(x=x, *, backward=True):
                loss = (model(x)[1:] - x[1:, :16]).square().mean()
                if backward:
                    loss.backward()
                return loss

            Faults.on = at == 5
            gradients()
            optimizer.step(gradients) if closure else optimizer.step()
            seen(optimizer)
            Faults.on = False
            moved.append(not all(map(torch.equal, before, model.parameters())))
            optimizer.zero_grad()
    assert kinds(monitor) == ["step_held"]
    assert is_finite(model)
    assert moved == [at != 5 for at in range(12)]
    return model


def test_a_hook_of_the_users_behind_the_step_finds_gradients_and_clears_them():
    """Or the next backward pass would add to what was held, and that pass as the training's own."""
    norms = []

    def make(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        optimizer.register_step_post_hook(lambda *_: norms.append(float(model.up.weight.grad.norm())))
        optimizer.register_step_post_hook(lambda optimizer, *_: optimizer.zero_grad())
        return optimizer

    def seen(optimizer):
        assert all(each.grad is None for group in optimizer.param_groups for each in group["params"])
        assert len(optimizer._optimizer_step_post_hooks) == 2

    held_once(make, seen=seen)
    assert [math.isnan(norm) for norm in norms] == [at == 5 for at in range(12)]


def test_what_a_hook_of_the_users_before_the_step_leaves_is_looked_at():
    model, plan = converted("fprop")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)

    def without_nan(*_):
        for parameter in model.parameters():
            parameter.grad.nan_to_num_(0.0, 0.0, 0.0)

    optimizer.register_step_pre_hook(without_nan)
    with loka.monitor(model, plan, every=1000, overhead=1e-9) as monitor:
        for at, x in enumerate(batches(8, loud=1.0)):
            Faults.on = at == 5
            plain_step(model, optimizer, x)
            assert len(optimizer._optimizer_step_pre_hooks) == 1
    assert kinds(monitor) == []
    assert is_finite(model)


class Regularised(torch.optim.SGD):
    """An optimizer that reads gradients behind the step of its class, which torch takes for a step as well."""

    def step(self, closure=None):
        loss = super().step(closure)
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad, alpha=-1e-4)
        return loss


@pytest.mark.parametrize("closure", [False, True])
def test_a_step_inside_of_a_step_gives_nothing_back(closure):
    def make(model):
        torch.optim.SGD(model.parameters(), lr=1e-2)  # torch hooks a class with its first instance
        return Regularised(model.parameters(), lr=1e-2)

    held_once(make, closure=closure)


class Sharpness(torch.optim.Optimizer):
    """Sharpness-aware minimisation as its authors' code has it: up, gradients there, back, and a step with those."""

    def __init__(self, params, base=None):
        super().__init__(params, {"lr": 1e-2})
        if base is not None:
            self.base = base(self.param_groups)

    @torch.no_grad()
    def step(self, closure):
        parameters = self.param_groups[0]["params"]
        norm = torch.stack([each.grad.norm() for each in parameters]).norm()
        before = [each.clone() for each in parameters]
        for each in parameters:
            each.add_(each.grad * 0.05 / norm)
        self.zero_grad()
        with torch.enable_grad():
            loss = closure()
        for each, old in zip(parameters, before, strict=True):
            if each.grad is not None:
                each.copy_(old)
        if hasattr(self, "base"):
            self.base.step()
        return loss


def test_weights_that_a_step_has_moved_are_moved_back():
    held_once(
        lambda model: Sharpness(model.parameters(), lambda groups: torch.optim.SGD(groups, lr=1e-2)), closure=True
    )


def test_gradients_of_a_step_on_its_way_are_left_to_it():
    """Weights that were moved without a step of an optimizer that could be looked at are moved back all the same."""
    model, plan = converted("fprop")
    optimizer = Sharpness(model.parameters())
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with loka.monitor(model, plan, every=1000, overhead=1e-9):
        for x in batches(3, loud=1.0):
            Faults.on = False
            (model(x)[1:] - x[1:, :16]).square().mean().backward()
            Faults.on = True
            optimizer.step(lambda x=x: (model(x)[1:] - x[1:, :16]).square().mean().backward())
            optimizer.zero_grad()
    assert all(map(torch.equal, before, model.parameters()))


def test_a_closure_may_take_arguments():
    class Searches(torch.optim.SGD):
        def step(self, closure):
            loss = super().step(lambda: closure(backward=True))
            assert closure(backward=False).item() != loss.item()
            return loss

    model, plan = converted("fprop")
    optimizer = Searches(model.parameters(), lr=1e-2)
    with loka.monitor(model, plan, every=1000, overhead=1e-9), torch.enable_grad():
        for x in batches(3, loud=1.0):

            def closure(backward, x=x):
                loss = (model(x)[1:] - x[1:, :16]).square().mean()
                if backward:
                    optimizer.zero_grad()
                    loss.backward()
                return loss

            assert math.isfinite(optimizer.step(closure))


def test_an_optimizer_for_each_parameter_steps_inside_of_the_backward_pass():
    model, plan = converted(*PASSES)
    optimizers = {parameter: torch.optim.SGD([parameter], lr=1e-2) for parameter in model.parameters()}

    def steps(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(steps)
    moved = []
    with loka.monitor(model, plan, every=1000, overhead=1e-9) as monitor:
        for at, x in enumerate(batches(12, loud=1.0)):
            Faults.on = at == 5
            before = model.down.bias.detach().clone()
            (model(x)[1:] - x[1:, :16]).square().mean().backward()
            Faults.on = False
            moved.append(not torch.equal(before, model.down.bias))
    assert kinds(monitor) == ["step_held"]
    assert is_finite(model)
    assert moved == [at != 5 for at in range(12)]
