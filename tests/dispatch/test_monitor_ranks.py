"""Two processes monitor together: they sample the same steps, see the same numbers and change kernels alike."""

import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Join

import loka
from loka.dispatch.monitoring import plan_watch
from loka.dispatch.running.convert import planned_sites
from loka.kernel_registry.registry import default_registry
from loka.kernel_registry.spec import KernelSpec
from loka.probes.sampling.budget import Budget
from loka.probes.storing.database import open_database, read_run
from tests.dispatch.kernels_that_fail_late import Faults
from tests.dispatch.made_conversion import decision, plan_for
from tests.dispatch.made_monitor import TENSORWISE, Model, batches
from tests.made_processes import ranks
from tests.probes.made_probe import places

# Between two monitored steps of a run that looks at one in eight.
BREAKS_AT = places(8, 40)[1] + 2


def trained(rank, group, steps, *, db=None, grows_at=None, **options):
    """Train data-parallel on this rank's own data, of which that of rank 1 grows; return what this rank holds."""
    torch.manual_seed(0)
    model = Model()
    plan = plan_for(model, TENSORWISE)
    loka.convert(model, plan, process_group=group)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    options = {"every": 5, "overhead": 100.0, "process_group": group, **options}
    with warnings.catch_warnings(record=True) as told, loka.monitor(model, plan, db, **options) as monitor:
        warnings.simplefilter("always")
        for x in batches(steps, grows_at=grows_at if rank == 1 else None, times=100.0, seed=rank):
            optimizer.zero_grad()
            (model(x)[1:] - x[1:, :16]).square().mean().backward()
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad, group=group)
            optimizer.step()
    return {
        "kernels": planned_sites(model)["up"].as_tuple(),
        "moves": [(event.step, event.message) for event in monitor.events if event.kind in ("demoted", "promoted")],
        "events": [(event.kind, event.message) for event in monitor.events],
        "sampled": monitor.progress.sampled_steps,
        "told": [str(each.message) for each in told],
        "weights": float(sum(parameter.sum() for parameter in model.parameters())),
    }


def work_growth(folder, rank, group):
    """Outliers grow on one rank."""
    return trained(rank, group, 100, db=folder / "run.db", grows_at=50)


def work_budget(folder, rank, group):
    """One rank can afford every third sample only."""
    asked = []
    allowed = Budget.begin_sample

    def sometimes(budget, wall_s, **urgent):
        asked.append(rank == 0 or len(asked) % 3 == 0)
        return asked[-1] and allowed(budget, wall_s, **urgent)

    Budget.begin_sample = sometimes
    try:
        return trained(rank, group, 60)
    finally:
        Budget.begin_sample = allowed


def work_failure(folder, rank, group):
    """Something in the monitor fails on one rank, half-way."""
    read, seen = plan_watch.reading_of, []

    def fails(guard, record):
        seen.append(record)
        if rank == 1 and len(seen) > 8:
            raise ValueError("made to fail")
        return read(guard, record)

    plan_watch.reading_of = fails
    try:
        return trained(rank, group, 60, grows_at=0)
    finally:
        plan_watch.reading_of = read


def work_uneven(folder, rank, group):
    """One rank has half of the other's batches, inside torch's Join; with and without the monitor."""
    found = {}
    for watched in (False, True):
        torch.manual_seed(0)
        model = Model()
        plan = plan_for(model, TENSORWISE)
        loka.convert(model, plan, process_group=group)
        call = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        monitor = loka.monitor(call, plan, every=2, overhead=100.0, process_group=group)
        with warnings.catch_warnings(record=True) as told, monitor if watched else nullcontext(), Join([call]):
            warnings.simplefilter("always")
            for x in batches(12 if rank else 6, seed=rank):
                optimizer.zero_grad()
                (call(x)[1:] - x[1:, :16]).square().mean().backward()
                optimizer.step()
        found[watched] = [parameter.detach().tolist() for parameter in model.parameters()]
    return {"same": found[True] == found[False], "told": [str(each.message) for each in told]}


def work_fault(folder, rank, group):
    """A kernel begins to give NaN on one rank, and the gradients of all of them are NaN."""
    where = "tests.dispatch.kernels_that_fail_late:gives_nan"
    spec = KernelSpec(name="late.linear.gives_nan", op="linear", recipe="tensorwise", implementation=where)
    default_registry().add(spec, owner="a test")
    torch.manual_seed(0)
    model = Model()
    decisions = tuple(decision("up", each, "tensorwise", kernel=spec.name) for each in ("fprop", "dgrad", "wgrad"))
    plan = plan_for(model, {}, decisions=decisions)
    loka.convert(model, plan, process_group=group)
    call = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with loka.monitor(call, plan, every=8, overhead=1e-9, process_group=group) as monitor:
        for at, x in enumerate(batches(40, seed=rank, loud=1.0)):
            Faults.on = rank == 1 and at >= BREAKS_AT
            optimizer.zero_grad()
            (call(x)[1:] - x[1:, :16]).square().mean().backward()
            optimizer.step()
    Faults.on = False
    return {
        "events": [(event.step, event.kind) for event in monitor.events],
        "weights": [parameter.detach().tolist() for parameter in model.parameters()],
        "finite": all(bool(parameter.isfinite().all()) for parameter in model.parameters()),
    }


def work(folder, rank, group):
    """One piece after the other."""
    each = {
        "growth": work_growth,
        "budget": work_budget,
        "failure": work_failure,
        "uneven": work_uneven,
        "fault": work_fault,
    }
    return {name: piece(folder, rank, group) for name, piece in each.items()}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What both ranks hold after each piece of work, which two processes do one after the other."""
    folder = tmp_path_factory.mktemp("ranks")
    return folder, ranks(2, work, folder)


def test_what_grows_on_one_rank_is_demoted_on_both_at_the_same_step(found):
    folder, both = found
    first, second = (rank["growth"] for rank in both)
    assert first["kernels"] == second["kernels"] == ("", "", "")
    assert first["moves"] == second["moves"]
    assert len(first["moves"]) == 2
    assert first["moves"][0][0] <= [step for step in places(5, 100) if step >= 50][2]
    assert first["weights"] == second["weights"]
    engine = open_database(folder / "run.db", create=False)
    run = read_run(engine)
    engine.dispose()
    assert [(event.kind, event.message) for event in run.events] == first["events"]  # written once, by the first rank


def test_a_step_is_monitored_where_all_ranks_can_afford_it(found):
    first, second = (rank["budget"] for rank in found[1])
    assert first["sampled"] == second["sampled"] == 4
    assert [kind for kind, _ in second["events"]] == ["over_budget", "monitored"]


def test_a_failure_on_one_rank_ends_the_monitor_on_both_and_the_training_on_none(found):
    first, second = (rank["failure"] for rank in found[1])
    for rank in (first, second):
        (ended,) = [message for kind, message in rank["events"] if kind == "monitor_ended"]
        assert ended.startswith("rank 1: Looking into step")
        assert "made to fail" in ended
        assert any("made to fail" in message for message in rank["told"])
    assert first["kernels"] == second["kernels"]


def test_ranks_that_may_take_different_numbers_of_steps_are_not_waited_for(found):
    for rank in found[1]:
        assert rank["uneven"]["same"]
        assert any("ranks inside torch's Join may take different" in told for told in rank["uneven"]["told"])


def test_what_a_kernel_spoils_on_one_rank_is_held_back_on_all_until_it_is_found(found):
    first, second = (rank["fault"] for rank in found[1])
    assert first["finite"]
    assert first["weights"] == second["weights"]
    assert first["events"] == second["events"]
    looked = next(step for step in places(8, 40) if step >= BREAKS_AT)
    told = [(step, "step_held") for step in range(BREAKS_AT, looked)]
    told += [(looked, "kernel_fault"), *[(looked, "demoted")] * 3]
    assert [each for each in first["events"] if each[1] != "monitored"] == told
