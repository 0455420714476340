"""The fused linear layer: its definition, the kernel that may run it, and what it is to those who look at models."""

import copy
import importlib
import os
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from loka.errors import ArgumentError
from loka.hardware import FP8_CAPABILITY
from loka.mods import FusedLinearNormAct, fused_linear, linear_norm_act
from loka.mods.block_norm import block_norm
from loka.stepping_aside import stepping_aside
from tests.kernel_registry.made_devices import interprets_triton

ACTIVATIONS = {
    "hard_swish": lambda x: x * (x + 3).clamp(0, 6) / 6,
    "squared_relu": lambda x: x.clamp(min=0) ** 2,
    "none": lambda x: x,
}
# (rows, n, k): ragged, one short block, whole blocks, one feature, no rows.
SHAPES = [((5,), 300, 13), ((2, 3), 20, 8), ((4,), 512, 16), ((3,), 1, 4), ((0,), 30, 4)]


def made(shape, dtype=torch.float64, bias=True):
    rows, n, k = shape
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(size, generator=generator, dtype=torch.float64) for size in ((*rows, k), (n, k), (n,))]
    x, weight, shift = (each.to(dtype).requires_grad_() for each in draw)
    return x, weight, shift if bias else None


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("block", [256, 7])
def test_it_is_the_composition_of_the_three(activation, shape, block):
    x, weight, bias = made(shape)
    out = linear_norm_act(x, weight, bias, block, activation, 1e-5)
    y = x @ weight.T + bias
    parts = [part / (part.square().mean(-1, keepdim=True) + 1e-5).sqrt() for part in y.split(block, dim=-1)]
    torch.testing.assert_close(out, ACTIVATIONS[activation](torch.cat(parts, dim=-1)))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_its_gradients_are_right(activation):
    x, weight, bias = made(((3,), 7, 4))
    assert torch.autograd.gradcheck(lambda *a: linear_norm_act(*a, 5, activation, 1e-3), (x, weight, bias))


@pytest.mark.parametrize(("block", "activation"), [(0, "none"), (8.0, "none"), (8, "swish")])
def test_options_that_cannot_be_meant_are_refused(block, activation):
    with pytest.raises(ArgumentError, match="linear_norm_act got"):
        linear_norm_act(*made(((3,), 7, 4)), block, activation)


def with_kernel(monkeypatch):
    """Let the fused kernel run here, interpreted, and count its calls."""
    if not interprets_triton():
        pytest.skip("needs Triton's interpreter")
    epilogue = importlib.import_module("loka.kernel_registry.triton.epilogue")
    calls = []
    kernel = epilogue.linear_norm_swish
    monkeypatch.setattr(fused_linear, "_fuses", lambda device: True)
    monkeypatch.setattr(epilogue, "linear_norm_swish", lambda *a, **k: calls.append(1) or kernel(*a, **k))
    return calls


# Roundings to the dtype that the composition makes and the kernel does not, times the largest value here.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-5, torch.float16: 2**-8}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", [((9,), 300, 40), ((2, 3), 256, 32)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_fused_and_unfused_agree_forward_and_backward(monkeypatch, dtype, shape, bias):
    operands = made(shape, dtype, bias)
    unfused = linear_norm_act(*operands)
    grad = torch.randn(unfused.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    present = [each for each in operands if each is not None]
    wanted = torch.autograd.grad(unfused, present, grad)
    calls = with_kernel(monkeypatch)
    fused = linear_norm_act(*operands)
    found = torch.autograd.grad(fused, present, grad)
    assert calls == [1]
    tolerance = TOLERANCES[dtype]
    for one, other in zip((fused, *found), (unfused, *wanted), strict=True):
        assert one.dtype == dtype
        scale = other.float().abs().max().item()
        torch.testing.assert_close(one.float(), other.float(), rtol=tolerance, atol=tolerance * scale)


def test_the_kernel_is_left_out_where_the_product_has_to_be_seen_or_it_does_not_fit(monkeypatch):
    calls = with_kernel(monkeypatch)
    x, weight, bias = (each.detach() for each in made(((4,), 30, 8), torch.float32))

    class Watching(torch.overrides.TorchFunctionMode):
        seen = ()

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.seen = (*self.seen, func)
            return func(*args, **(kwargs or {}))

    with Watching() as mode:
        linear_norm_act(x, weight, bias)
    assert F.linear in mode.seen
    with stepping_aside():
        linear_norm_act(x, weight, bias)
    with torch.autocast("cpu", torch.bfloat16):
        linear_norm_act(x, weight, bias)
    linear_norm_act(x[0], weight, bias)
    linear_norm_act(x, weight, bias, 16)
    linear_norm_act(x, weight, bias, activation="squared_relu")
    linear_norm_act(x.double(), weight.double(), bias.double())
    with pytest.raises(RuntimeError, match="dtype"):
        linear_norm_act(x, weight.bfloat16(), None)
    assert not calls
    linear_norm_act(x, weight, bias)
    assert calls == [1]


def test_a_cpu_runs_the_composition():
    assert not fused_linear._fuses(torch.device("cpu"))


def test_the_module_has_the_keys_of_a_linear_layer_and_is_none():
    torch.manual_seed(0)
    module, linear = FusedLinearNormAct(6, 20, block=8, activation="squared_relu", eps=1e-3), nn.Linear(6, 20)
    module.load_state_dict(linear.state_dict())
    x = torch.randn(3, 6)
    torch.testing.assert_close(module(x), F.relu(block_norm(linear(x), 8, 1e-3)) ** 2)
    assert not isinstance(module, nn.Linear)
    assert "block=8, activation=squared_relu, eps=0.001" in repr(module)
    assert FusedLinearNormAct(6, 20, bias=False).bias is None
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), module(x))


def test_it_compiles_into_one_graph():
    module = FusedLinearNormAct(6, 300)
    x = torch.randn(3, 6)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.parametrize("answer", [True, False])
def test_what_the_device_can_is_asked_and_not_traced(monkeypatch, answer):
    calls = with_kernel(monkeypatch)
    asked = []

    def has_capability(device, least):
        asked.append((device, least))
        os.listdir("/")  # nothing that could be traced
        return answer

    fused_linear._capable.cache_clear()
    monkeypatch.setattr(fused_linear, "has_capability", has_capability)
    monkeypatch.setattr(fused_linear, "_fuses", lambda device: fused_linear._has_fp8(device.index or 0))
    module = FusedLinearNormAct(6, 300).requires_grad_(False)
    x = torch.randn(3, 6)
    if not answer:
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), module(x))
    module(x)
    module(x)
    assert len(asked) == 1
    assert asked[0] == ("cuda:0", FP8_CAPABILITY)
    assert bool(calls) is answer
    fused_linear._capable.cache_clear()
