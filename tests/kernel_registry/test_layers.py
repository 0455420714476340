"""A layer's three passes with shared casts: the operands of the three kernels apart, bit for bit, and fewer casts."""

import pytest
import torch

from loka.dispatch.running import linear as dispatch_linear
from loka.dispatch.running.executions import kernel_executions, reset_kernel_executions
from loka.dispatch.running.linear import linear
from loka.hardware import DeviceInfo
from loka.kernel_registry import emulated, held
from loka.kernel_registry import operands as operands_module
from loka.kernel_registry.builtin import KERNELS
from loka.kernel_registry.registry import default_registry
from loka.kernel_registry.spec import GemmRequest
from tests.cases import heavy_tailed
from tests.kernel_registry.made_devices import interprets_triton

LAYERS = {spec.name: spec for spec in KERNELS if spec.op == "linear_layer"}
# The kernel that a layer's passes are, one by one.
APART = {"emulated": "emulated.linear", "torch": "torch.scaled_mm", "triton": "triton.gemm"}
HERE = [name for name in LAYERS if not name.startswith("triton.") or interprets_triton()]
SHAPES = [(32, 48, 64), (17, 13, 13), (1, 40, 429), (130, 131, 257)]


def operands(m, n, k, dtype=torch.float32):
    generator = torch.Generator().manual_seed(m)
    x, weight, grad = (heavy_tailed(generator, shape).to(dtype) for shape in ((m, k), (n, k), (m, n)))
    return x.requires_grad_(), weight.requires_grad_(), grad


def step(name, x, weight, grad):
    """Run a layer forward and backward, all passes on one kernel; return the result and both gradients."""
    x.grad = weight.grad = None
    out = linear(x, weight, None, name, name, name)
    out.backward(grad)
    return out.detach(), x.grad, weight.grad


def apart(name):
    library, _, recipe = name.split(".")
    return f"{APART[library]}.{recipe}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", HERE)
def test_a_layer_computes_what_its_passes_compute_apart(name, dtype):
    for m, n, k in SHAPES if not name.startswith("triton.") else SHAPES[:2]:
        x, weight, grad = operands(m, n, k, dtype)
        for together, one in zip(step(name, x, weight, grad), step(apart(name), x, weight, grad), strict=True):
            # The same operands, whose strides may differ, and with them the order of the sums.
            torch.testing.assert_close(together, one, rtol=0, atol=1e-6 * float(one.abs().max()) + 1e-30)


@pytest.mark.parametrize("name", HERE)
def test_a_pass_of_a_layer_alone_is_its_own_kernel(name):
    x, weight, _ = operands(17, 13, 13)
    with torch.no_grad():
        assert torch.equal(linear(x, weight, None, name, name, name), linear(x, weight, None, apart(name), "", ""))
    mixed = linear(x, weight, None, name, "", name)
    assert torch.equal(mixed, linear(x, weight, None, apart(name), "", ""))


def counting(monkeypatch, module, *functions):
    calls = []
    for function in functions:
        original = getattr(module, function)
        monkeypatch.setattr(module, function, lambda *args, to=original: calls.append(args[0].shape) or to(*args))
    return calls


@pytest.mark.parametrize(
    ("name", "together"), [("emulated.linear_layer.tensorwise", 3), ("emulated.linear_layer.blockwise", 5)]
)
def test_an_operand_with_symmetric_groups_is_quantised_once(monkeypatch, name, together):
    calls = counting(monkeypatch, held, "fake_quantize", "held_codes")
    tensors = operands(32, 48, 64)
    step(name, *tensors)
    assert len(calls) == together
    calls.clear()
    step(apart(name), *tensors)
    assert len(calls) >= 5  # six, or five where the weight is kept for a second pass


def test_codes_of_one_scale_are_made_once(monkeypatch):
    calls = counting(monkeypatch, operands_module, "quantize")
    step("torch.linear_layer.tensorwise", *operands(32, 48, 64))
    assert len(calls) == 3


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_only_what_a_gradient_needs_is_kept_and_computed(needs):
    name = "emulated.linear_layer.tensorwise"
    x, weight, grad = operands(32, 48, 64)
    expected = step(name, x, weight, grad)
    x, weight = (tensor.detach().requires_grad_(need) for tensor, need in zip((x, weight), needs, strict=True))
    reset_kernel_executions()
    out = linear(x, weight, None, name, name, name)
    assert len(out.grad_fn.saved_tensors) == 2  # one operand: its values, and its scale
    out.backward(grad)
    assert kernel_executions() == {name: 2}
    got = weight.grad if needs[1] else x.grad
    assert torch.equal(got, expected[2] if needs[1] else expected[1])


def test_every_pass_is_counted():
    reset_kernel_executions()
    step("emulated.linear_layer.tensorwise", *operands(8, 8, 16))
    assert kernel_executions() == {"emulated.linear_layer.tensorwise": 3}


def test_nothing_in_and_nothing_out():
    name = "emulated.linear_layer.tensorwise"
    x, weight, grad = operands(0, 4, 8)
    out, grad_x, grad_weight = step(name, x, weight, grad)
    assert out.shape == (0, 4)
    assert grad_x.shape == (0, 8)
    assert torch.equal(grad_weight, torch.zeros(4, 8))


def test_a_layer_that_raises_is_replaced_by_high_precision(monkeypatch):
    name = "emulated.linear_layer.tensorwise"
    monkeypatch.setattr(dispatch_linear, "_layers", {})
    monkeypatch.setattr(dispatch_linear, "_loaded", {})
    registry = default_registry()
    monkeypatch.setattr(registry, "_unavailable", {})

    def fails(*_):
        raise RuntimeError("no such library")

    monkeypatch.setattr(emulated, "quantise", fails)
    x, weight, grad = operands(8, 4, 16)
    out, grad_x, _ = step(name, x, weight, grad)
    torch.testing.assert_close(out, x.detach() @ weight.detach().t())
    torch.testing.assert_close(grad_x, grad @ weight.detach())
    here = DeviceInfo(type="cpu", name="any")
    assert any("no such library" in reason for reason in registry._unavailable.values())
    assert registry.get(name).unavailable(here) is None  # the row itself is as it was


@pytest.mark.parametrize("name", ["emulated.linear_layer.tensorwise", "torch.linear_layer.tensorwise"])
def test_layers_compile_in_one_graph(name):
    x, weight, grad = operands(32, 48, 64)
    expected = step(name, x, weight, grad)
    x.grad = weight.grad = None
    compiled = torch.compile(lambda a, b: linear(a, b, None, name, name, name), backend="aot_eager", fullgraph=True)
    out = compiled(x, weight)
    out.backward(grad)
    for got, want in zip((out.detach(), x.grad, weight.grad), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def test_a_layer_serves_a_linear_request_and_no_other():
    spec = LAYERS["emulated.linear_layer.tensorwise"]
    request = GemmRequest(site="up", product="dgrad", op="linear", m=8, n=8, k=8, dtype="float32")
    assert spec.cannot(request) is None
    assert "computes linear_layer" in spec.cannot(
        GemmRequest(**{**{f: getattr(request, f) for f in request.__slots__}, "op": "bmm"})
    )
    assert spec not in default_registry().candidates("linear")
