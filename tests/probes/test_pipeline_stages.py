"""Stages of a pipeline, each of them a model of its own: probed by step, planned, converted and monitored."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, schedules

import loka
from loka.dispatch.running.convert import unreached
from loka.errors import PlanError
from tests.dispatch.made_conversion import plan_for
from tests.made_processes import ranks
from tests.probes.made_probe import assert_nothing_attached, recorded, seen

STEPS, MICRO_BATCHES, RANKS, LAYERS = 10, 4, 2, 4
# name -> which layers each rank has, one stage per layer or all in one
SCHEDULES = {
    "Schedule1F1B": [[0, 1], [2, 3]],
    "ScheduleInterleavedZeroBubble": [[0, 2], [1, 3]],  # gradients of inputs and weights by themselves
    "ScheduleZBVZeroBubble": [[0, 3], [1, 2]],
}


def made(name, rank):
    """Return this rank's part of a model, and the schedule that runs it."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(LAYERS)]
    own, device = SCHEDULES[name][rank], torch.device("cpu")
    part = nn.ModuleDict({str(at): layers[at] for at in own})
    if name == "Schedule1F1B":
        stages = PipelineStage(nn.Sequential(*part.values()), rank, RANKS, device)
    else:
        stages = [PipelineStage(part[str(at)], at, LAYERS, device) for at in own]
    return part, getattr(schedules, name)(stages, MICRO_BATCHES, loss_fn=nn.functional.mse_loss), own


def trained(name, rank, prepare=None, watch=None):
    """Train; return the losses and weights of this rank, and what watched."""
    part, schedule, own = made(name, rank)
    if prepare is not None:
        prepare(part)
    optimizer, found = torch.optim.SGD(part.parameters(), 0.2), []

    def step(seed):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(seed))
        losses = []
        last = {"target": x.flip(1), "losses": losses} if LAYERS - 1 in own else {}
        schedule.step(*([x] if 0 in own else []), **last)
        optimizer.step()
        optimizer.zero_grad()
        found.extend(loss.item() for loss in losses)

    step(0)  # which learns shapes from memory that holds nothing yet
    if watch is None:
        for seed in range(1, STEPS + 1):
            step(seed)
        return (found, [parameter.detach().tolist() for parameter in part.parameters()]), part, None
    with watch(part) as watching:
        for seed in range(1, STEPS + 1):
            with watching.step():
                step(seed)
    return (found, [parameter.detach().tolist() for parameter in part.parameters()]), part, watching


def work(folder, rank, group, name):
    own = [dist.new_group([each]) for each in range(RANKS)][rank]
    db = folder / f"{rank}.db"
    plain, *_ = trained(name, rank)
    probed, part, _ = trained(
        name, rank, watch=lambda part: loka.probe(part, db, every=1, overhead=100.0, process_group=own)
    )
    assert probed == plain
    assert_nothing_attached(part)
    plan = loka.plan(db, loka.Bound(row_error=1.0), assume_speedup=1.3, process_group=own)
    assert plan.fp8_share() > 0.5
    converted, part, _ = trained(name, rank, lambda part: loka.convert(part, plan, process_group=own))
    assert unreached(part) == ()
    assert converted[1] != plain[1]
    assert converted[0] == pytest.approx(plain[0], rel=0.1)
    _, _, monitor = trained(
        name,
        rank,
        lambda part: loka.convert(part, plan, process_group=own),
        lambda part: loka.monitor(part, plan, every=2, overhead=100.0, process_group=own),
    )
    assert monitor.progress.sampled_steps == STEPS // 2
    assert not monitor.changed


@pytest.mark.parametrize("name", SCHEDULES)
def test_each_stage_is_probed_and_runs_a_plan_of_its_own(tmp_path, name):
    ranks(RANKS, work, tmp_path, name)
    for rank, own in enumerate(SCHEDULES[name]):
        run, steps = recorded(tmp_path / f"{rank}.db")
        assert run.events == ()
        assert run.progress.unattributed == 0
        passes = {(f"{at}.0", product): MICRO_BATCHES for at in own for product in ("fprop", "dgrad", "wgrad")}
        passes.pop(("0.0", "dgrad"), None)  # the input of the first layer needs no gradient
        assert [dict(seen(step)) for step in steps] == [passes] * STEPS


def test_a_plan_of_all_stages_together_says_that_each_needs_its_own():
    part = nn.Sequential(nn.Linear(8, 8))
    plan = plan_for(part, ["0", "1"])
    with pytest.raises(PlanError, match="of a pipeline each stage by itself, with process_group= its ranks"):
        loka.convert(part, plan)
    assert type(part[0]) is nn.Linear
