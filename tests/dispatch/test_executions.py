"""What ran is what is counted: eager, compiled, in both passes; and a kernel that fails is replaced and not counted."""

import logging

import pytest
import torch
import torch._inductor.compile_fx as compile_fx
import torch.distributed as dist
from torch import nn
from torch._dynamo.backends.debugging import aot_eager

import loka
from loka.dispatch.running import linear as dispatch_linear
from loka.dispatch.running.convert import convert
from loka.dispatch.running.executions import HIGH_PRECISION_PRODUCTS, kernel_executions, reset_kernel_executions
from loka.dispatch.running.linear import linear
from loka.hardware import device_info
from loka.kernel_registry import registry as registry_module
from loka.kernel_registry.builtin import KERNELS
from loka.kernel_registry.registry import Registry
from loka.kernel_registry.spec import GemmRequest, KernelSpec
from tests.dispatch.made_conversion import needs_a_compiler, plan_for
from tests.dispatch.made_converted import Mlp

FAULTY = "faulty.linear.rowwise"
ROWWISE, TENSORWISE, BLOCKWISE = (f"emulated.linear.{name}" for name in ("rowwise", "tensorwise", "blockwise"))


@pytest.fixture(autouse=True)
def _from_zero():
    reset_kernel_executions()
    yield
    reset_kernel_executions()


@pytest.fixture
def faulty_registry(monkeypatch):
    """A default registry with a kernel that imports and cannot run, and a table of loaded kernels of its own."""
    registry = Registry()
    for spec in KERNELS:
        registry.add(spec, owner="loka")
    where = "tests.dispatch.faulty_kernels:fails_when_called"
    registry.add(KernelSpec(name=FAULTY, op="linear", recipe="rowwise", implementation=where), owner="a test")
    monkeypatch.setattr(dispatch_linear, "default_registry", lambda: registry)
    monkeypatch.setattr(dispatch_linear, "_loaded", {})
    return registry


def two_layers():
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


def test_every_pass_of_every_planned_layer_is_counted_in_an_eager_step():
    model = two_layers()
    convert(model, plan_for(model, ["0", "2"]))
    for _ in range(3):
        model(torch.randn(4, 16)).sum().backward()
    # The input needs no gradient, so the first layer has no dgrad.
    assert kernel_executions() == {BLOCKWISE: 6, ROWWISE: 6, TENSORWISE: 3}


def test_buckets_of_a_distributed_model_are_counted_when_they_run(monkeypatch):
    """Dynamo compiles a graph per bucket, and asks each for its shapes on the way."""
    monkeypatch.setattr(compile_fx, "compile_fx", lambda gm, inputs, **_: aot_eager(gm, inputs))
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 1024)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = Mlp()
        plan = plan_for(model, ["up", "down", "head"])
        compiled = torch.compile(
            nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.004), backend="loka", options={"plan": plan}
        )
        for _ in range(2):
            compiled(torch.randn(4, 16)).sum().backward()
    finally:
        dist.destroy_process_group()
    assert kernel_executions() == {BLOCKWISE: 6, ROWWISE: 6, TENSORWISE: 4}


@needs_a_compiler
def test_a_compiled_graph_counts_what_an_eager_model_counts():
    model = two_layers()
    plan = plan_for(model, {"0": {"fprop": "rowwise", "wgrad": "blockwise"}, "2": {"dgrad": "tensorwise"}})
    compiled = torch.compile(model, backend="loka", options={"plan": plan}, fullgraph=True)
    batches = [torch.randn(rows, 16) for rows in (4, 6, 9, 5)]
    for x in batches:
        torch._dynamo.mark_dynamic(x, 0)  # one graph for all of them, and one without gradients
    for x in batches[:3]:
        compiled(x).sum().backward()
    with torch.no_grad():
        compiled(batches[3])
    in_graphs = kernel_executions()
    reset_kernel_executions()
    convert(model, plan)
    for x in batches[:3]:
        model(x).sum().backward()
    with torch.no_grad():
        model(batches[3])
    assert in_graphs == kernel_executions()
    assert in_graphs[HIGH_PRECISION_PRODUCTS] == 3 * 2 + 1
    assert (in_graphs[ROWWISE], in_graphs[BLOCKWISE], in_graphs[TENSORWISE]) == (4, 3, 3)


@needs_a_compiler
def test_a_forward_without_its_backward_counts_no_gradient():
    model = two_layers()
    compiled = torch.compile(model, backend="loka", options={"plan": plan_for(model, ["0", "2"])})
    compiled(torch.randn(4, 16))
    assert kernel_executions() == {ROWWISE: 2}


def test_another_compiler_is_not_disturbed():
    model = two_layers()
    convert(model, plan_for(model, ["0", "2"]))
    x = torch.randn(4, 16)
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), expected)


def test_a_kernel_that_raises_is_replaced_by_high_precision_and_not_called_again(faulty_registry, caplog):
    x, weight = torch.randn(4, 16, requires_grad=True), torch.randn(8, 16)
    with caplog.at_level(logging.ERROR, "loka.dispatch"):
        for _ in range(3):
            out = linear(x, weight, None, FAULTY, ROWWISE, "")
            torch.testing.assert_close(out, x @ weight.t())
            out.sum().backward()
    assert kernel_executions() == {ROWWISE: 3, HIGH_PRECISION_PRODUCTS: 3}
    assert [record.message for record in caplog.records if FAULTY in record.message] == [
        f"{FAULTY} failed on (4, 16) x (8, 16) and is out of use from here on, high precision takes over: "
        "no kernel image is available for execution on the device"
    ]
    reason = faulty_registry.unavailable(faulty_registry.get(FAULTY), device_info())
    assert reason is not None
    assert reason.startswith("quarantined, it failed in use: RuntimeError: no kernel image")


def test_operands_that_do_not_fit_are_the_callers_fault_and_quarantine_nothing(faulty_registry):
    with pytest.raises(RuntimeError, match="no kernel image"):
        linear(torch.randn(4, 16), torch.randn(8, 17), None, FAULTY, "", "")
    assert faulty_registry.unavailable(faulty_registry.get(FAULTY), device_info()) is None
    assert kernel_executions() == {}


def test_a_failure_on_one_shape_keeps_a_kernel_from_that_shape_alone(faulty_registry):
    here, spec = device_info(), faulty_registry.get(FAULTY)
    tried = GemmRequest(site="up", product="fprop", op="linear", m=8, n=8, k=8, dtype="float32")
    other = GemmRequest(site="up", product="fprop", op="linear", m=8, n=8, k=16, dtype="float32")
    faulty_registry.failed(FAULTY, tried, here, ValueError("k is too short"))
    elsewhere = GemmRequest(site="down", product="fprop", op="linear", m=8, n=8, k=8, dtype="float32")
    for request in (tried, elsewhere):
        assert faulty_registry.cannot(spec, request, here) == (
            "failed on this shape when it was tried: ValueError: k is too short"
        )
    assert faulty_registry.cannot(spec, other, here) is None


def test_the_front_door_tells_what_ran():
    linear(torch.randn(2, 16), torch.randn(3, 16), None, ROWWISE, "", "")
    assert loka.kernel_executions() == {ROWWISE: 1}
    assert registry_module.default_registry().get(ROWWISE).name == ROWWISE
