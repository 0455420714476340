"""A small training with one loud row, whose outliers can be made to grow, under the monitor."""

import torch
from torch import nn

import loka
from loka.dispatch.deciding.decide import Candidate
from tests.dispatch.made_conversion import decision, plan_for

# The loud row of every batch: at LOUD the tensorwise recipe is within 0.05 everywhere, at ten times LOUD it is not.
LOUD = 4000.0


class Model(nn.Module):
    """Two linears, of which the first has a planned fprop and wgrad."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(32, 48)
        self.down = nn.Linear(48, 16)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


TENSORWISE = {"up": {"fprop": "tensorwise", "wgrad": "tensorwise"}}


def batches(steps, *, grows_at=None, times=10.0, seed=0, loud=LOUD):
    """Yield inputs whose first row is loud, `times` louder from step `grows_at` on."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        x = torch.randn(64, 32, generator=generator)
        x[0] *= loud * (times if grows_at is not None and step >= grows_at else 1.0)
        yield x


def train(model, inputs, *, call=None, lr=1e-2):
    """Train on what a loud row does not reach; return the losses."""
    call = model if call is None else call
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    losses = []
    for x in inputs:
        optimizer.zero_grad()
        loss = (call(x)[1:] - x[1:, :16]).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def monitored(inputs, recipes=None, *, model=None, plan=None, convert=True, db=None, **options):
    """Train a converted model under the monitor, unhurried by its budget; return model, monitor and losses."""
    model = Model() if model is None else model
    plan = plan_for(model, TENSORWISE if recipes is None else recipes) if plan is None else plan
    if convert:
        loka.convert(model, plan)
    with loka.monitor(model, plan, db, **{"every": 5, "overhead": 100.0, **options}) as monitor:
        losses = train(model, inputs)
    return model, monitor, losses


def kinds(monitor):
    """What happened, without the summary at the end."""
    return [event.kind for event in monitor.events if event.kind != "monitored"]


def of_kind(monitor, kind):
    """Events of one kind."""
    return [event for event in monitor.events if event.kind == kind]


def with_next(model, site, product, recipe, *others, **changes):
    """A plan of one product, and the kernels that it rejected for their time alone."""
    rejected = tuple(
        Candidate(
            kernel=f"emulated.linear.{other}", recipe=other, code="slower", reason="made by hand", time_us=2.0 + i
        )
        for i, other in enumerate(others)
    )
    decisions = tuple(
        decision(site, each, recipe if each == product else None, rejected=rejected)
        for each in ("fprop", "dgrad", "wgrad")
    )
    return plan_for(model, {}, decisions=decisions, **changes)
