"""Trainings with a kernel that begins to give NaN between two monitored steps."""

import torch

import loka
from tests.dispatch.kernels_that_fail_late import Faults
from tests.dispatch.made_conversion import decision, plan_for
from tests.dispatch.made_monitor import Model, batches

PASSES = ("fprop", "dgrad", "wgrad")
STEPS, BREAKS_AT = 60, 31  # no monitored step is near: every=1000
NAME = "late.linear.gives_nan"


def planned(model, *passes, kernel=NAME):
    """A plan with the kernel in these passes of both layers."""
    decisions = [
        decision(site, each, "tensorwise" if each in passes else None, kernel=kernel if each in passes else None)
        for site in ("up", "down")
        for each in PASSES
    ]
    return plan_for(model, {}, decisions=tuple(decisions))


def converted(*passes, kernel=NAME):
    """A model that runs such a plan, and the plan."""
    torch.manual_seed(0)
    model = Model()
    plan = planned(model, *passes, kernel=kernel)
    return loka.convert(model, plan), plan


def plain_step(model, optimizer, x):
    """One step as most loops write it; returns the loss."""
    optimizer.zero_grad()
    loss = (model(x)[1:] - x[1:, :16]).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


def in_a_closure(model, optimizer, x):
    """One step whose gradients the optimizer asks for, as Lightning has it."""

    def closure():
        optimizer.zero_grad()
        loss = (model(x)[1:] - x[1:, :16]).square().mean()
        loss.backward()
        return loss

    return optimizer.step(closure).item()


def trained(passes, *, step=plain_step, call=None, breaks_at=BREAKS_AT, make=torch.optim.Adam, **options):
    """Train under a monitor that looks at the first step alone; the kernel breaks at a step."""
    torch.manual_seed(0)
    model = Model()
    plan = planned(model, *passes)
    model = loka.convert(model, plan) if call is None else model
    called = model if call is None else call(model, plan)
    optimizer = make(model.parameters(), lr=1e-2)
    with loka.monitor(called, plan, every=1000, overhead=1e-9, **options) as monitor:
        losses = []
        for at, x in enumerate(batches(STEPS, loud=1.0)):
            Faults.on = at >= breaks_at
            losses.append(step(called, optimizer, x))
    return model, monitor, losses


def in_high_precision():
    """The losses of the same training without a plan."""
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    return [plain_step(model, optimizer, x) for x in batches(STEPS, loud=1.0)]


def is_finite(model):
    return all(bool(parameter.isfinite().all()) for parameter in model.parameters())
