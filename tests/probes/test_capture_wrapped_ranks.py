"""Several processes: models whose backward pass talks to other ranks, and what FSDP1 makes of their parameters."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

import loka
from loka.dispatch.running.convert import unreached
from loka.errors import PlanError
from loka.probes.sampling.budget import Budget
from tests.dispatch.made_conversion import plan_for
from tests.made_processes import ranks
from tests.probes.made_probe import PASSES_OF_TWO, Two, recorded, seen

STEPS = 14


class SummedGradient(torch.autograd.Function):
    """What tensor parallelism by hand puts in front of its layers: nothing forward, a sum over ranks backward."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


class Talking(Two):
    def forward(self, x):
        return self.down(SummedGradient.apply(torch.relu(self.up(x))))


def trained(model, rank, watch=None):
    """Train with gradients averaged by DDP, or by hand; return losses and weights."""
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.1), []
    by_hand = not isinstance(model, nn.parallel.DistributedDataParallel | FullyShardedDataParallel)
    with watch or contextlib.nullcontext():
        for step in range(STEPS):
            x = torch.randn(8, 16, generator=torch.Generator().manual_seed(2 * step + rank))
            loss = nn.functional.cross_entropy(model(x), torch.arange(8))
            optimizer.zero_grad()
            loss.backward()
            for parameter in model.parameters() if by_hand else ():
                dist.all_reduce(parameter.grad)
            optimizer.step()
            losses.append(loss.item())
    return losses, [parameter.detach().tolist() for parameter in model.parameters()]


def work_talking(folder, rank, group, kind):
    """Weigh errors by the loss, where one rank samples every step and the other one can afford every third."""

    def made():
        torch.manual_seed(0)
        return Talking() if kind == "talking" else nn.parallel.DistributedDataParallel(Two())

    plain, model = trained(made(), rank), made()
    asked, allowed = [], Budget.begin_sample

    def sometimes(budget, wall_s, **urgent):
        asked.append(rank == 0 or len(asked) % 3 == 0)
        return asked[-1] and allowed(budget, wall_s, **urgent)

    Budget.begin_sample = sometimes
    try:
        watch = loka.probe(model, folder / "run.db", every=1, overhead=100.0, loss="cross_entropy")
        assert trained(model, rank, watch) == plain
    finally:
        Budget.begin_sample = allowed


@pytest.mark.parametrize("kind", ["talking", "ddp"])
def test_no_second_backward_runs_where_the_first_one_talks_to_ranks_that_may_not_sample(tmp_path, kind):
    ranks(2, work_talking, tmp_path, kind, limit_s=60)
    run, steps = recorded(tmp_path / "run.db")
    assert sum(step.rank == 0 for step in steps) == STEPS > 2 * sum(step.rank == 1 for step in steps)
    told = [event.message for event in run.events if event.kind == "loss_hook"]
    weighed = [step for step in steps if step.labels == "sampled"]
    if kind == "talking":
        assert len(told) == 2  # one of each rank
        assert all("talks to other ranks" in message for message in told)
        assert not weighed
    else:
        assert not told
        assert weighed


# --- FSDP1, which makes one flat parameter of many ---


class Branches(nn.Module):
    """Two layers and a parameter of the root's own, in memory that is one when it is gathered."""

    def __init__(self):
        super().__init__()
        self.two = Two()
        self.w = nn.Parameter(torch.randn(16, 16) / 4)

    def forward(self, x):
        return self.two(x @ self.w)


def flat(model, original, wrapped):
    policy = ModuleWrapPolicy(wrapped)
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=original, device_id=torch.device("cpu")
    )


def work_flat(folder, rank, group, original, wrapped):
    """Probe, convert before and after, and monitor a model that FSDP1 has wrapped."""

    def made():
        torch.manual_seed(0)
        return Branches()

    plain = trained(flat(made(), original, wrapped), rank)
    model = flat(made(), original, wrapped)
    watch = loka.probe(model, folder / "run.db", every=1, overhead=100.0)
    assert trained(model, rank, watch) == plain

    plan, losses = plan_for(made(), ["two.up", "two.down", "w"]), []
    for first in (True, False):
        model = loka.convert(made(), plan) if first else made()
        model = flat(model, original, wrapped)
        if not first:
            loka.convert(model, plan, process_group=group)
        losses.append(trained(model, rank)[0])
        assert unreached(model) == ()
    assert losses[0] == losses[1] != plain[0]
    assert losses[0] == pytest.approx(plain[0], rel=0.05)
    with loka.monitor(model, plan, every=2, overhead=100.0, process_group=group) as monitor:
        trained(model, rank)
    assert monitor.progress.sampled_steps == STEPS // 2
    with pytest.raises(PlanError, match="made for another model"):
        loka.convert(flat(Two(), original, wrapped), plan)


@pytest.mark.parametrize("wrapped", [set(), {nn.Linear}], ids=["whole", "layer by layer"])
@pytest.mark.parametrize("original", [True, False], ids=["original parameters", "flat parameters"])
def test_fsdp1_is_probed_and_runs_plans_under_the_names_and_shapes_of_the_model(tmp_path, original, wrapped):
    ranks(2, work_flat, tmp_path, original, wrapped)
    run, steps = recorded(tmp_path / "run.db")
    assert run.info.fingerprint == {name: tuple(p.shape) for name, p in Branches().named_parameters()}
    expected = {(f"two.{site}", product): calls for (site, product), calls in PASSES_OF_TWO.items()}
    expected |= {("two.up", "dgrad"): 1, ("w", "fprop"): 1, ("w", "wgrad"): 1}
    assert [dict(seen(step)) for step in steps] == [expected] * len(steps)
    assert {each.parameter for step in steps for each in step.products} == {"two.up.weight", "two.down.weight", "w"}
