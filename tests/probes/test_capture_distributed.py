"""Several processes: who records, under which names, what a dead rank leaves, and that no rank is disturbed."""

import math
import os
import signal
import time
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import loka
from loka.probes.judging.evidence import load_evidence
from loka.probes.sampling.learning import STATISTICS, restore
from loka.probes.storing.database import open_database, read_learned
from tests.made_processes import job, ranks
from tests.probes.made_probe import PASSES_OF_TWO, Two, assert_nothing_attached, product, recorded, seen

STEPS = 7


def wrapped(kind):
    """The model as a distributed job holds it."""
    torch.manual_seed(0)
    model = Two()
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if kind == "ddp-compiled":
        return torch.compile(nn.parallel.DistributedDataParallel(model), backend="aot_eager")
    if kind == "fsdp":
        for layer in (model.up, model.down):
            fully_shard(layer)
        return fully_shard(model)
    if kind == "fsdp-root-only":
        return fully_shard(model)
    mesh = init_device_mesh("cpu", (2,))
    return parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def train(model, rank, kind):
    """Train, each rank on its own data (the same under tensor parallelism); return what to compare."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trace = []
    for step in range(STEPS):
        seed = step if kind == "tensor-parallel" else 10 * step + rank
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(seed))
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        local = [getattr(gradient, "_local_tensor", gradient).clone() for gradient in gradients]
        optimizer.step()
        trace.append((loss.item(), local))
    return trace


ROWS_OF_RANK = (8, 0, 3, 17)


def work_uneven(folder, rank, group, kind):
    """Ranks with different amounts of data, one of them with none, under gradients averaged by hand."""
    group = dist.new_group([1, 3]) if kind == "subgroup" else None
    torch.manual_seed(0)
    model = Two()
    rows = ROWS_OF_RANK[rank]
    with loka.probe(model, folder / "run.db", every=2, overhead=100.0, process_group=group):
        for _ in range(STEPS):
            model.zero_grad()
            model(torch.randn(rows, 16)).square().sum().backward()
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)
    assert_nothing_attached(model)


def work_killed(folder, rank, group, kind):
    """One rank dies in the middle of the run; the other meets that in its collective, as a training job does."""
    dies = rank == (0 if kind == "writer killed" else 1)
    torch.manual_seed(0)
    model = Two()
    gone = False
    try:
        with loka.probe(model, folder / "run.db", every=2, overhead=100.0):
            for step in range(20):
                model.zero_grad()
                model(torch.randn(8, 16)).square().sum().backward()
                time.sleep(0.1)  # the writer is asynchronous
                if dies and step == 4:
                    os.kill(os.getpid(), signal.SIGKILL)
                for parameter in model.parameters():
                    dist.all_reduce(parameter.grad)
    except RuntimeError:
        gone = True
    assert gone
    assert_nothing_attached(model)
    os._exit(0)  # the broken process group cannot be taken down in order


def work(folder, rank, group, kind):
    """All ranks, with and without the probe."""
    plain = train(wrapped(kind), rank, kind)
    model = wrapped(kind)
    path = folder / "run.db" if rank == 0 else folder / "missing" / "run.db"
    with loka.probe(model, path, every=2, overhead=100.0) as probe:
        probed = train(model, rank, kind)
        with probe.step():  # on every rank, recording or not
            train_one = model(torch.ones(2, 16)).sum()
        train_one.backward()
    assert_nothing_attached(model)
    for (loss, gradients), (other_loss, other_gradients) in zip(plain, probed, strict=True):
        assert loss == other_loss
        assert all(map(torch.equal, gradients, other_gradients))
    if kind.startswith("ddp"):
        for _, gradients in probed:
            for gradient in gradients:
                everyone = [torch.empty_like(gradient) for _ in range(dist.get_world_size())]
                dist.all_gather(everyone, gradient)
                assert all(torch.equal(gradient, other) for other in everyone)
    dist.barrier()
    del model, probe, train_one  # a DDP model freed after its process group may hang in the reducer


@pytest.mark.parametrize("kind", ["ddp", "ddp-compiled", "fsdp", "fsdp-root-only", "tensor-parallel"])
def test_one_rank_writes_for_all_under_the_users_names_and_none_is_disturbed(tmp_path, kind):
    ranks(2, work, tmp_path, kind)
    assert not (tmp_path / "missing").exists()
    run, steps = recorded(tmp_path / "run.db")
    assert run.progress.status == "complete", run.progress.reason
    assert (run.info.world_size, run.info.model) == (2, "FSDPTwo" if kind.startswith("fsdp") else "Two")
    assert run.info.fingerprint == {name: tuple(p.shape) for name, p in Two().named_parameters()}
    assert run.progress.weights_changed
    assert run.progress.unattributed == 0
    assert [(step.step, step.rank) for step in steps] == [(at, rank) for at in (0, 3, 4, 7) for rank in (0, 1)]
    assert [seen(step) for step in steps[:6]] == [PASSES_OF_TWO] * 6
    ups = [product(step, "up") for step in steps[:2]]
    for up in ups:
        assert (up.parameter, up.m, up.n, up.k) == ("up.weight", 8, 16 if kind == "tensor-parallel" else 32, 16)
        assert all(0.005 < error.row_error < 0.1 for error in up.errors.values())
    assert ups[0].errors != ups[1].errors  # its own data, or its own shard
    for step in steps[-2:]:
        assert seen(step) == Counter({("up", "fprop"): 1, ("down", "fprop"): 1})  # the step marked by hand
    evidence = load_evidence(tmp_path / "run.db")
    assert {(one.site, one.product): one.calls for one in evidence.products} == pytest.approx(
        {key: calls * (1.0 if key[1] == "fprop" else 0.75) for key, calls in PASSES_OF_TWO.items()}
    )


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_four_ranks_are_one_run_with_one_report(tmp_path, kind):
    ranks(4, work, tmp_path, kind)
    run, steps = recorded(tmp_path / "run.db")
    assert (run.progress.status, run.info.world_size) == ("complete", 4)
    assert run.info.fingerprint == {name: tuple(p.shape) for name, p in Two().named_parameters()}
    assert [(step.step, step.rank) for step in steps] == [(at, rank) for at in (0, 3, 4, 7) for rank in range(4)]
    assert [seen(step) for step in steps[:12]] == [PASSES_OF_TWO] * 12
    evidence = load_evidence(tmp_path / "run.db")
    assert {(one.site, one.product) for one in evidence.products} == set(PASSES_OF_TWO)
    assert {recipe.samples for one in evidence.products for recipe in one.recipes} <= {3, 4}  # a step, not a rank


@pytest.mark.parametrize("kind", ["uneven", "subgroup"])
def test_four_ranks_with_uneven_and_empty_shards_are_one_run(tmp_path, kind):
    ranks(4, work_uneven, tmp_path, kind)
    run, steps = recorded(tmp_path / "run.db")
    members = (1, 3) if kind == "subgroup" else range(4)
    assert run.info.world_size == len(members)
    assert [(step.step, step.rank) for step in steps] == [(at, rank) for at in (0, 3, 4) for rank in members]
    rows = {step.rank: product(step, "up").m for step in steps}
    assert rows == {rank: ROWS_OF_RANK[rank] for rank in members}
    empty = [product(step, "up") for step in steps if step.rank == 1]
    assert all(math.isnan(error.row_error) for one in empty for error in one.errors.values())
    assert run.events == ()
    learned = {(one.site, one.product, one.kind): restore(one) for one in learned_by(tmp_path / "run.db")}
    assert learned["up", "fprop", STATISTICS].a.rows == sum(rows.values())
    assert learned["up", "fprop", "input"].count == sum(rows.values())
    assert learned["down", "dgrad", "grad_output"].count == sum(rows.values())


def learned_by(path):
    engine = open_database(path, create=False)
    try:
        return read_learned(engine)
    finally:
        engine.dispose()


def test_a_rank_that_dies_leaves_a_database_that_says_what_is_missing(tmp_path):
    ended = job(2, work_killed, tmp_path, "killed")
    assert [one.code for one in ended] == [0, -signal.SIGKILL], ended
    run, steps = recorded(tmp_path / "run.db")
    assert run.progress.status == "failed"  # the first rank met the broken connection in its own training loop
    (event,) = run.events
    assert event.kind == "rank_missing"
    assert "rank 1: it did not close its part of the run; its last sample is that of step 3" in event.message
    assert [(step.step, step.rank) for step in steps if step.rank == 1] == [(0, 1), (3, 1)]
    assert [step.step for step in steps if step.rank == 0][:2] == [0, 3]


def test_the_death_of_the_writing_rank_leaves_what_it_wrote(tmp_path):
    ended = job(2, work_killed, tmp_path, "writer killed")
    assert [one.code for one in ended] == [-signal.SIGKILL, 0], ended
    run, steps = recorded(tmp_path / "run.db")
    assert run.progress.status == "incomplete"
    assert [(step.step, step.rank) for step in steps if step.rank == 0] == [(0, 0), (3, 0)]
