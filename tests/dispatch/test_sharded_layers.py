"""Planned layers on DTensors, in real processes over gloo: tensor parallelism, alone and under FSDP, and experts."""

import contextlib
import copy
import functools
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import loka
from loka.dispatch.running.convert import unreached
from loka.dispatch.running.executions import reset_kernel_executions
from loka.dispatch.running.grouped import grouped
from loka.dispatch.running.linear import linear
from loka.dispatch.running.norm_act import linear_norm_act
from loka.formats import PASSES, RECIPES
from loka.kernel_registry.norm_act import block_norm
from loka.quantize import fake_quantize
from tests.dispatch.made_conversion import MIXED, emulated, plan_for
from tests.dispatch.made_experts import GROUPED, K, N, experts_plan, offsets_of
from tests.made_processes import ranks

# --- the op, against whole tensors ---

X_PLACEMENTS = {2: (Replicate(), Shard(0), Shard(1), Partial()), 3: (Shard(0), Shard(1), Shard(2))}
WEIGHT_PLACEMENTS = (Replicate(), Shard(0), Shard(1))


def as_given(whole, mesh, placements):
    """Return a leaf that lies as given; where it is to be summed, the first rank has all of it."""
    if not any(each.is_partial() for each in placements):
        return distribute_tensor(whole, mesh, placements).requires_grad_()
    own = whole if dist.get_rank() == 0 else torch.zeros_like(whole)
    return DTensor.from_local(own.clone(), mesh, placements, run_check=False).requires_grad_()


def work_op(folder, rank, group):
    """Run layers of all placements in high precision; return how far each is from the layer on whole tensors."""
    found = {}
    line, grid = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    cases = [(line, (x,), (weight,)) for dim in (2, 3) for x in X_PLACEMENTS[dim] for weight in WEIGHT_PLACEMENTS]
    cases += [
        (grid, (Shard(0), x), (Replicate(), weight)) for x in (Replicate(), Shard(1)) for weight in (Shard(0), Shard(1))
    ]
    for number, (mesh, x_placed, weight_placed) in enumerate(cases):
        torch.manual_seed(number)
        dim = 3 if mesh is line and number >= 12 else 2
        x = torch.randn(*((6,) if dim == 2 else (2, 5)), 7, dtype=torch.float64)  # 6, 5 and 7 over four: uneven
        weight, bias = torch.randn(6, 7, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
        placed = [
            as_given(x, mesh, x_placed),
            as_given(weight, mesh, weight_placed),
            as_given(bias, mesh, [Replicate()] * mesh.ndim),
        ]
        whole = [each.clone().requires_grad_() for each in (x, weight, bias)]
        outs = linear(*placed, "", "", ""), F.linear(*whole)
        upstream = torch.randn(outs[1].shape, dtype=torch.float64)
        outs[1].backward(upstream)
        (outs[0] * distribute_tensor(upstream, mesh, [Replicate()] * mesh.ndim)).sum().full_tensor().backward()
        pairs = [
            (outs[0].full_tensor(), outs[1]),
            *((got.grad.full_tensor(), want.grad) for got, want in zip(placed, whole, strict=True)),
        ]
        found[str((x_placed, weight_placed, dim))] = max(float((got - want).abs().max()) for got, want in pairs)
    return found


def test_layers_on_shards_are_the_layers_on_whole_tensors(tmp_path):
    for found in ranks(4, work_op, tmp_path):
        assert len(found) == 12 + 9 + 4
        assert max(found.values()) < 1e-12, found


# --- a plan, as tensor parallelism runs it ---


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(24, 32)
        self.down = nn.Linear(32, 16)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def tensor_parallel(model, mesh):
    return parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def rounded(operand, product, role):
    """Return what the recipe that MIXED has for a pass makes of an operand, in fp64."""
    return fake_quantize(operand.float(), RECIPES[MIXED[product]].operand(role)).double()


def by_hand(model, x, upstream, part):
    """Return the result of the first rank's shards, and what the gradients of all of them come to, from definitions."""
    up, down = (layer.weight.detach().double() for layer in (model.up, model.down))
    out, grad_x, grads = model.down.bias.detach().double(), torch.zeros_like(x).double(), {}
    for rank, rows in enumerate(torch.arange(32).chunk(2)):
        w, v, bias = up[rows], down[:, rows], model.up.bias.detach().double()[rows]
        y = rounded(x, "fprop", "input") @ rounded(w, "fprop", "weight").T + bias
        h = y.relu()
        out = out + rounded(h, "fprop", "input") @ rounded(v, "fprop", "weight").T
        grad_y = rounded(upstream, "dgrad", "grad_output") @ rounded(v.T, "dgrad", "weight").T * (y > 0)
        grad_x = grad_x + rounded(grad_y, "dgrad", "grad_output") @ rounded(w.T, "dgrad", "weight").T
        if rank == part:
            grads["up"] = rounded(grad_y.T, "wgrad", "grad_output") @ rounded(x.T, "wgrad", "input").T
            grads["down"] = rounded(upstream.T, "wgrad", "grad_output") @ rounded(h.T, "wgrad", "input").T
    return out, grad_x, grads


def work_plan(folder, rank, group):
    """Convert a model before or after it is sharded; return its distance from the definitions, on the shards."""
    found = []
    for convert_first in (True, False):
        torch.manual_seed(0)
        whole = Model()
        model, mesh = copy.deepcopy(whole), init_device_mesh("cpu", (2,))
        plan = plan_for(model, ["up", "down"])
        for step in (0, 1) if convert_first else (1, 0):
            if step:
                tensor_parallel(model, mesh)
            else:
                loka.convert(model, plan, process_group=group)
        x, upstream = torch.randn(20, 24, requires_grad=True), torch.randn(20, 16)
        reset_kernel_executions()
        out = model(x)
        out.backward(upstream)
        want, grad_x, grads = by_hand(whole, x.detach(), upstream, rank)
        pairs = [(out, want), (x.grad, grad_x)]
        pairs += [(getattr(model, name).weight.grad.to_local(), grad) for name, grad in grads.items()]
        found.append(max(float((a.double() - b).norm() / b.norm()) for a, b in pairs))
        assert unreached(model) == ()
        assert dict(loka.kernel_executions()) == {emulated(MIXED[product]): 2 for product in PASSES}
        loka.revert(model)
        plain = tensor_parallel(copy.deepcopy(whole), mesh)
        assert torch.equal(model(x), plain(x))
    return found


def test_a_plan_runs_on_the_shards_of_tensor_parallelism(tmp_path):
    for found in ranks(2, work_plan, tmp_path):
        assert max(found) < 1e-5


def work_training(folder, rank, group):
    """Train under FSDP2 over tensor parallelism: alone, probed, converted, and monitored."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))

    def trained(*, convert=False, watch=None):
        torch.manual_seed(0)
        model = tensor_parallel(Model(), mesh["tensor"])
        if convert:
            loka.convert(model, plan_for(Model(), ["up", "down"]), process_group=group)
        fully_shard(model, mesh=mesh["data"])
        optimizer, losses = torch.optim.SGD(model.parameters(), 0.1), []
        with contextlib.nullcontext() if watch is None else watch(model):
            for step in range(10):
                generator = torch.Generator().manual_seed(2 * step + rank // 2)
                loss = (model(torch.randn(20, 24, generator=generator)) - 1).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        return losses

    plain = trained()
    probed = trained(watch=lambda model: loka.probe(model, folder / "run.db", every=2, overhead=100.0))
    assert probed == plain
    reset_kernel_executions()
    converted = trained(convert=True)
    assert dict(loka.kernel_executions()) == {
        emulated(MIXED[product]): 20 for product in PASSES if product != "dgrad"
    } | {emulated(MIXED["dgrad"]): 10}
    plan, monitors = plan_for(Model(), ["up", "down"]), []

    def monitored(model):
        monitors.append(loka.monitor(model, plan, every=2, overhead=100.0, process_group=group))
        return monitors[-1]

    watched = trained(convert=True, watch=monitored)
    assert monitors[0].progress.sampled_steps == 5
    assert not monitors[0].changed
    return [plain, converted, watched]


def test_a_plan_runs_under_fsdp_over_tensor_parallelism(tmp_path):
    for plain, *planned in ranks(4, work_training, tmp_path):
        for losses in planned:
            assert losses != plain
            assert losses == pytest.approx(plain, rel=0.05)


# --- experts on a mesh of their own, as expert parallelism has them ---


class Experts(nn.Module):
    """Multiplies with what this rank has of its weight, as torchtitan and transformers do."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, N, K) / 4)

    def forward(self, x, ends):
        own = self.w.to_local() if isinstance(self.w, DTensor) else self.w
        return F.grouped_mm(x, own.mT, offs=ends)


def swapped(experts, x, ends):
    """Let what is here stand for the weight meanwhile, as transformers does."""
    whole = experts.w
    experts._parameters["w"] = whole.to_local()
    try:
        return Experts.forward(experts, x, ends)
    finally:
        experts._parameters["w"] = whole


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(K)
        self.experts = Experts()

    def forward(self, x, ends):
        return self.experts(self.norm(x), ends)


KEPT = ((1, 2), (2,), (0, 3))  # fprop, dgrad, wgrad; each of two ranks has two experts
KEPT_HERE = (((1,), (), (0,)), ((0,), (0,), (1,)))


def keeping(plan):
    made = [replace(each, kept_experts=kept) for each, kept in zip(plan.decisions, KEPT, strict=True)]
    return replace(plan, decisions=tuple(made))


def work_experts(folder, rank, group, wrapped, sharded):
    """Run experts of which each of two ranks has half, and half of that under FSDP2, as one planned product."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "experts"))
    torch.manual_seed(0)
    model = Block()
    plan = keeping(experts_plan(model, ["experts.w"]))
    whole = model.experts.w.detach().clone()
    model.experts.w = nn.Parameter(distribute_tensor(whole, mesh["experts"], [Shard(0)]))
    if wrapped is not None:  # on the instance: products are rerouted from the block
        model.experts.forward = functools.partial(wrapped, model.experts)
    if sharded:
        fully_shard(model.experts, mesh=mesh["data"])
    loka.convert(model, plan, process_group=group)
    x, ends = torch.randn(12, K), offsets_of((7, 3))
    out = model(x, ends)
    out.square().sum().backward()
    own = whole.chunk(2)[mesh["experts"].get_local_rank()].clone().requires_grad_()
    want = grouped(model.norm(x), own, ends, *GROUPED, KEPT_HERE[mesh["experts"].get_local_rank()])
    want.square().sum().backward()
    grad = model.experts.w.grad
    parts = grad.full_tensor().chunk(2) if sharded else [grad.to_local()] * 2
    assert torch.equal(out, want)
    torch.testing.assert_close(parts[mesh["experts"].get_local_rank()], own.grad)
    assert unreached(model) == ()


@pytest.mark.parametrize("wrapped", [None, Experts.forward, swapped])
@pytest.mark.parametrize("sharded", [False, True])
def test_experts_run_as_planned_on_what_a_rank_has_of_them(tmp_path, wrapped, sharded):
    ranks(4, work_experts, tmp_path, wrapped, sharded)


def work_compiled_experts(folder, rank, group):
    """Compile a layer of which this rank has half of the experts, whose offsets and kept ones are its own."""
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    model = Block().bfloat16()  # Dynamo has torch's grouped product in bf16 alone
    plan = keeping(experts_plan(model, ["experts.w"]))
    whole = model.experts.w.detach().clone()
    model.experts.w = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
    x, ends = torch.randn(10, K, dtype=torch.bfloat16), offsets_of((7, 3))
    out = torch.compile(model, backend="loka", options={"plan": plan}, fullgraph=True)(x, ends)
    out.float().square().sum().backward()
    own = whole.chunk(2)[rank].clone().requires_grad_()
    want = grouped(model.norm(x), own, ends, *GROUPED, KEPT_HERE[rank])
    want.float().square().sum().backward()
    torch.testing.assert_close(out, want, rtol=0.01, atol=0.01)
    torch.testing.assert_close(model.experts.w.grad.to_local(), own.grad, rtol=0.02, atol=0.02)
    exact = F.grouped_mm(model.norm(x), own.mT, offs=ends)
    return [torch.equal(ours, theirs) for ours, theirs in zip(out.split([7, 3]), exact.split([7, 3]), strict=True)]


def test_compiled_experts_of_a_rank_run_as_planned(tmp_path):
    assert ranks(2, work_compiled_experts, tmp_path) == [[False, True], [True, False]]


# --- what else runs planned layers ---


def work_compiled(folder, rank, group):
    """Compile a converted model as one graph, for several numbers of rows."""
    mesh, graphs = init_device_mesh("cpu", (2,)), CompileCounterWithBackend("aot_eager")
    torch.manual_seed(0)
    whole = Model()
    eager, model = (
        loka.convert(tensor_parallel(copy.deepcopy(whole), mesh), plan_for(whole, ["up", "down"])) for _ in range(2)
    )
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    for rows in (20, 12, 7):
        x = torch.randn(rows, 24)
        for call in (eager, compiled):
            call.zero_grad()
            call(x).square().sum().backward()
        for one, other in zip(eager.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(one.grad.to_local(), other.grad.to_local())
    return graphs.frame_count


def test_a_sharded_plan_is_compiled_without_a_break(tmp_path):
    assert ranks(2, work_compiled, tmp_path) == [2, 2]  # the second one for any number of rows


def work_norm_act(folder, rank, group):
    """Run a layer with norm and activation, whose features two ranks have; and a whole one."""
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    x, weight = torch.randn(6, 13), torch.randn(512, 13)
    sharded = distribute_tensor(x, mesh, [Replicate()]), distribute_tensor(weight, mesh, [Shard(0)])
    kernels = ("emulated.linear_norm_act.rowwise", "", "")
    with torch.no_grad():
        out = linear_norm_act(*sharded, None, None, kernels)
        torch.testing.assert_close(out.full_tensor(), F.hardswish(block_norm(F.linear(x, weight))))
        reset_kernel_executions()
        linear_norm_act(x, weight, None, None, kernels)
    assert dict(loka.kernel_executions()) == {kernels[0]: 1}  # it is still in use


def test_a_layer_with_norm_and_activation_stays_in_high_precision_on_shards(tmp_path):
    ranks(2, work_norm_act, tmp_path)
