"""One plan per job, in real processes over gloo: the same bytes on every rank, and no rank that waits for ever."""

import json

import pytest
import torch
import torch.distributed as dist
from torch import nn

import loka
from loka.dispatch.deciding import job, planner
from loka.errors import LokaError, PlanError
from tests.made_processes import ranks

LIMIT_S = 240


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(24, 32)
        self.down = nn.Linear(32, 8)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def probed(folder, rank, group):
    """Train a model on data of this rank's own, under a probe of all ranks; return it and the database."""
    torch.manual_seed(0)
    model, generator = Model(), torch.Generator().manual_seed(1 + rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    db = folder / "run.db"
    with loka.probe(model, db, every=1, overhead=100.0, process_group=group):
        for _ in range(12):
            optimizer.zero_grad()
            model(torch.randn(16 + 8 * rank, 24, generator=generator) * (1 + rank)).square().mean().backward()
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad, group=group)
            optimizer.step()
    dist.barrier(group)
    return model, db


def plan_all(folder, rank, group):
    """Probe, plan with measured times, convert: what every rank holds in the end."""
    model, db = probed(folder, rank, group)
    plan = loka.plan(db, loka.Bound(row_error=0.5), assume_speedup=1.3, process_group=group)
    loka.convert(model, plan, process_group=group)
    return {"hash": plan.hash, "fp8": plan.fp8_share(), "text": plan.text()}


def plan_with_times(folder, rank, group):
    """Plan with times measured in turn: only rank 0 measures."""
    _, db = probed(folder, rank, group)
    if rank:
        planner.measure_products = None
    return {"hash": loka.plan(db, budget_s=2.0, process_group=group).hash}


def be_wrong(folder, rank, group):
    """Let one rank after another be wrong in one way; return what each was told."""
    model, db = probed(folder, rank, group)
    wrong = {
        "no run": lambda: loka.plan(folder / "missing.db", process_group=group),
        "versions": lambda: _with_another_version(rank, lambda: loka.plan(db, process_group=group)),
        "other plan": lambda: loka.convert(
            model, loka.plan(db, loka.Bound(row_error=0.5 + rank / 10), assume_speedup=1.3), process_group=group
        ),
        "other model": lambda: loka.convert(
            nn.Sequential(nn.Linear(3, 3)) if rank else model,
            loka.plan(db, loka.Bound(row_error=0.5), assume_speedup=1.3, process_group=group),
            process_group=group,
        ),
    }
    found = {name: _error_of(act) for name, act in wrong.items()}
    assert type(model.up) is nn.Linear  # nothing is converted
    return found


def _with_another_version(rank, act):
    original = job.environment_facts
    job.environment_facts = lambda: original() | ({"triton": "9.9"} if rank == 1 else {})
    try:
        act()
    finally:
        job.environment_facts = original


def _error_of(act):
    try:
        act()
    except LokaError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("count", [2, 4])
def test_ranks_with_different_data_hold_one_plan_byte_for_byte(tmp_path, count):
    found = ranks(count, plan_all, tmp_path, limit_s=LIMIT_S)
    assert len({each["text"] for each in found}) == len({each["hash"] for each in found}) == 1
    assert found[0]["fp8"] > 0


def test_times_are_measured_on_one_rank(tmp_path):
    first, second = ranks(2, plan_with_times, tmp_path, limit_s=LIMIT_S)
    assert first["hash"] == second["hash"]


def test_what_is_wrong_on_one_rank_is_an_error_on_all_of_them_and_converts_nothing(tmp_path):
    first, second = ranks(2, be_wrong, tmp_path, limit_s=LIMIT_S)
    assert "missing.db" in first["no run"]
    assert second["no run"].startswith("Rank 0 could not make the plan: ")
    for told in (first, second):
        assert "rank 1 has 9.9" in told["versions"]
        assert "hold different plans" in told["other plan"]
    assert first["other model"].startswith("Rank 1 failed, so no rank goes on: This plan was made for another model")
    assert second["other model"].startswith("This plan was made for another model")


def test_the_odd_rank_is_named(monkeypatch):
    facts = [{"torch": "2.13", "platform": str(rank), "triton": "3.6" if rank else "3.4"} for rank in range(4)]
    monkeypatch.setattr(job, "gather_bytes", lambda payload, group: [json.dumps(each).encode() for each in facts])
    with pytest.raises(PlanError, match=r"triton is 3\.6 on most, and rank 0 has 3\.4\. A kernel"):
        job.check_environments({}, None)
