"""Two processes: who records, under which names, and that every rank computes what it would without the probe."""

import os
import subprocess
import sys
from collections import Counter
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import loka
from tests.probes.made_probe import PASSES_OF_TWO, Two, assert_nothing_attached, product, recorded, seen

ROOT = Path(__file__).parents[2]
STEPS = 6


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


def work(rank, folder, kind):
    """The body of one process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", timedelta(seconds=60), world_size=2, rank=rank)
    plain = train(wrapped(kind), rank, kind)
    model = wrapped(kind)
    path = Path(folder) / "run.db" if rank == 0 else Path(folder) / "missing" / "run.db"
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
                both = [torch.empty_like(gradient) for _ in range(2)]
                dist.all_gather(both, gradient)
                assert torch.equal(*both)
    dist.barrier()
    del model, probe, train_one  # a DDP model freed after its process group may hang in the reducer
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["ddp", "ddp-compiled", "fsdp", "fsdp-root-only", "tensor-parallel"])
def test_rank_0_records_under_the_users_names_and_no_rank_is_disturbed(tmp_path, kind):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.probes.test_capture_distributed", str(rank), str(tmp_path), kind],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [child.communicate(timeout=120)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0, 0], "\n".join(outputs)
    assert not (tmp_path / "missing").exists()
    run, steps = recorded(tmp_path / "run.db")
    assert run.progress.status == "complete", run.progress.reason
    assert (run.info.world_size, run.info.model) == (2, "FSDPTwo" if kind.startswith("fsdp") else "Two")
    assert run.info.fingerprint == {name: tuple(p.shape) for name, p in Two().named_parameters()}
    assert run.progress.weights_changed
    assert run.progress.unattributed == 0
    assert [seen(step) for step in steps[:3]] == [PASSES_OF_TWO] * 3
    up = product(steps[0], "up")
    assert (up.parameter, up.m, up.n, up.k) == ("up.weight", 8, 16 if kind == "tensor-parallel" else 32, 16)
    assert all(0.005 < error.row_error < 0.1 for error in up.errors.values())
    assert seen(steps[-1]) == Counter({("up", "fprop"): 1, ("down", "fprop"): 1})  # the step marked by hand


if __name__ == "__main__":
    work(int(sys.argv[1]), sys.argv[2], sys.argv[3])
