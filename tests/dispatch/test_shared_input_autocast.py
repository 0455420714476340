"""Layers that read one input under autocast: its casts to that type and to FP8 are made once, and no number tells."""

import weakref
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.profiler import ProfilerActivity, profile

from loka.dispatch.running import linear as op
from loka.dispatch.running.linear import linear
from loka.dispatch.running.shared_input import forget_input
from loka.kernel_registry import bf16_units
from loka.kernel_registry.layers import Layer, Needs, emulated_blockwise
from tests.dispatch.test_shared_input import LAYERS, Attention, Checkpointed, K, M, converted

BLOCKWISE = LAYERS[0]
HALF = [torch.bfloat16, torch.float16]


def autocast(dtype=torch.bfloat16, *, enabled=True):
    return torch.autocast("cpu", dtype, enabled=enabled)


@pytest.fixture
def casts(monkeypatch):
    """Types of the inputs that were really cast to FP8, and what became of them."""
    seen = Casts()
    cast = Layer.input_sides

    def noting(self, x, needs):
        seen.append(x.dtype)
        seen.alive.append(weakref.ref(x))
        return cast(self, x, needs)

    monkeypatch.setattr(Layer, "input_sides", noting)
    forget_input()
    return seen


class Casts(list):
    def __init__(self):
        super().__init__()
        self.alive = []


def apart(layer, x, kernel, dtype):
    """The layer under autocast to `dtype`, by casts of its own that nobody shares: outside of autocast."""
    forget_input()
    weight, bias = layer.weight.to(dtype), layer.bias.to(dtype)
    out = linear(x.to(dtype, copy=True), weight, bias, kernel, kernel, kernel)
    forget_input()
    return out


def apart_from_each_other(model, x, kernel, dtype):
    q, k, v = (apart(each, x, kernel, dtype) for each in (model.q, model.k, model.v))
    return apart(model.o, q + torch.cat([k, v, k[..., :8]], -1), kernel, dtype)


def gradients(model, out, x):
    found = torch.linspace(-1, 1, out.numel()).view(out.shape)
    return torch.autograd.grad((out.float() * found).sum(), [x, *model.parameters()])


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("outside", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("shape", [(M, K), (3, 8, K)], ids=str)
@pytest.mark.parametrize("kernel", LAYERS)
def test_an_input_is_cast_once_and_numbers_and_gradients_stay(kernel, shape, dtype, outside, casts):
    torch.manual_seed(0)
    model, x = converted(Attention(), kernel), torch.randn(shape).to(outside).requires_grad_()
    with autocast(dtype):
        out = model(x)
    found = [out, *gradients(model, out, x)]
    assert casts == [dtype, dtype]  # of q, k and v together, and of o
    out = apart_from_each_other(model, x, kernel, dtype)
    assert_same(found, [out, *gradients(model, out, x)])


def conversions(run):
    """Count conversions of a whole input, as torch's operators are called: a dispatch mode would be seen."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        run()
    return sum(event.name == "aten::_to_copy" and event.input_shapes[0] == [M, K] for event in seen.events())


def test_autocasts_own_cast_is_made_once_too_and_nobody_holds_it(casts):
    model, x = converted(Attention(), BLOCKWISE), torch.randn(M, K)

    def layers():
        with autocast():
            return model.k(x), model.v(x)

    by_itself = conversions(lambda: emulated_blockwise.input_sides(x.to(torch.bfloat16), Needs(x=False, weight=True)))
    assert by_itself >= 1
    assert casts == [torch.bfloat16]
    casts.clear()
    assert conversions(layers) == by_itself
    assert casts == [torch.bfloat16]
    assert [each() for each in casts.alive] == [None, None]


def test_an_input_that_was_written_to_is_another_one(casts):
    torch.manual_seed(0)
    model, x = converted(Attention(), BLOCKWISE), torch.randn(M, K)
    with autocast():
        model.q(x)
        x.mul_(2)
        found = model.k(x)
        x[0] = 0
        again = model.v(x)
    assert len(casts) == 3
    assert torch.equal(again, apart(model.v, x, BLOCKWISE, torch.bfloat16))
    assert not torch.equal(found[0], model.k.bias.bfloat16())
    assert torch.equal(found[1:], apart(model.k, x, BLOCKWISE, torch.bfloat16)[1:])


def test_what_is_written_after_a_layer_does_not_reach_its_gradient(casts):
    torch.manual_seed(0)
    model, x = converted(Attention(), BLOCKWISE), torch.randn(M, K)
    right = torch.autograd.grad(apart(model.q, x, BLOCKWISE, torch.bfloat16).float().square().sum(), model.q.weight)
    with autocast():
        out = model.q(x)
    x.zero_()
    assert_same(torch.autograd.grad(out.float().square().sum(), model.q.weight), right)


def test_regions_of_other_types_and_none_do_not_meet(casts):
    torch.manual_seed(0)
    model, x = converted(Attention(), BLOCKWISE), torch.randn(M, K, requires_grad=True)
    with autocast():
        q = model.q(x)
        with autocast(enabled=False):
            k, another = model.k(x), model.q(x)
        with autocast(torch.float16):
            v = model.v(x)
        last, shared = model.k(x), model.v(x)
    assert casts == [torch.bfloat16, torch.float32, torch.float16, torch.bfloat16]
    types = (torch.bfloat16, torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.bfloat16)
    layers = (model.q, model.k, model.q, model.v, model.k, model.v)
    for found, layer, dtype in zip((q, k, another, v, last, shared), layers, types, strict=True):
        expected = apart(layer, x, BLOCKWISE, dtype)
        assert_same([found], [expected])
        assert_same(
            torch.autograd.grad(found.float().square().sum(), [x, layer.weight], retain_graph=True),
            torch.autograd.grad(expected.float().square().sum(), [x, layer.weight], retain_graph=True),
        )


@pytest.mark.parametrize("kernel", LAYERS)
def test_checkpointed_layers_come_to_the_same(kernel, casts):
    torch.manual_seed(0)
    model, x = converted(Attention(), kernel), torch.randn(M, K, requires_grad=True)
    plain = apart_from_each_other(model, x, kernel, torch.bfloat16)
    expected = [plain, *gradients(model, plain, x)]
    casts.clear()
    with autocast():
        out = Checkpointed(model)(x)
    assert len(casts) == 2
    assert_same([out, *gradients(model, out, x)], expected)


def test_micro_batches_accumulate_to_the_same(casts):
    torch.manual_seed(0)
    model = converted(Attention(), BLOCKWISE)
    batches = torch.randn(3, M, K)
    expected = [torch.zeros_like(each) for each in model.parameters()]
    for x in batches:
        with autocast():
            model(x).float().square().sum().backward()
        x.requires_grad_()
        out = apart_from_each_other(model, x, BLOCKWISE, torch.bfloat16)
        for total, each in zip(
            expected, torch.autograd.grad(out.float().square().sum(), [*model.parameters()]), strict=True
        ):
            total += each
    assert_same([each.grad for each in model.parameters()], expected)


@pytest.mark.parametrize("turn", [lambda x: x.transpose(0, 1), lambda x: x[..., ::2]], ids=["transposed", "strided"])
def test_an_input_whose_rows_are_a_copy_gives_the_same_numbers(turn, casts):
    torch.manual_seed(0)
    x = turn(torch.randn(8, 3, 2 * K if turn(torch.empty(1, 1, 4)).shape[-1] == 2 else K)).requires_grad_()
    model = converted(Attention(), BLOCKWISE)
    with autocast():
        out = model(x)
    found = [out, *gradients(model, out, x)]
    out = apart_from_each_other(model, x, BLOCKWISE, torch.bfloat16)
    assert_same(found, [out, *gradients(model, out, x)])


@pytest.mark.parametrize("x", [torch.randn(M, K, dtype=torch.float64), torch.randn(M, K + 1)], ids=["fp64", "too wide"])
def test_what_autocast_does_not_cast_is_torchs_error(x, casts):
    model = converted(Attention(), BLOCKWISE)
    with autocast(), pytest.raises(RuntimeError):
        model.q(x)


def test_a_kernel_that_fails_leaves_the_layer_autocasts_high_precision(monkeypatch):
    torch.manual_seed(0)
    model, x = converted(Attention(), BLOCKWISE), torch.randn(M, K, requires_grad=True)

    def fails(self, x, needs):
        raise ValueError("no such cast")

    monkeypatch.setattr(Layer, "input_sides", fails)
    monkeypatch.setattr(op, "_layers", dict(op._layers))
    monkeypatch.setattr(op, "quarantine", lambda *_: None)
    forget_input()
    results = []
    for run in (model.q, lambda x: linear(x, model.q.weight, model.q.bias, "", "", "")):
        with autocast():
            out = run(x)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), [x, model.q.weight])])
    assert_same(*results)


class Fan(nn.Module):
    """Layers that all read one input."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(K, 16) for _ in range(layers))

    def forward(self, x):
        return torch.stack([layer(x) for layer in self.layers]).float().square().sum()


def read_in_graphs(layers, kernel, around):
    """Maxima, of which a cast to FP8 takes its scales, and casts of the type, of the input: as a compiler has them."""
    found = Counter()

    def note(graph, _):
        for node in graph.graph.nodes:
            value = node.meta.get("val")
            made = node.op == "call_function" and isinstance(value, torch.Tensor)
            found["maxima"] += made and "amax" in str(node.target) and of_the_input(node)
            found["casts"] += made and "_to_copy" in str(node.target) and value.shape == (M, K)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    model = converted(Fan(layers), kernel, tuple(f"layers.{at}" for at in range(layers)))
    backend = aot_autograd(fw_compiler=note, bw_compiler=note, partition_fn=min_cut_rematerialization_partition)
    with around():
        out = torch.compile(model, backend=backend)(torch.randn(M, K))
    out.backward()
    return found


def of_the_input(node):
    """Whether a node's numbers are those of the input, in its order or turned, and of nothing else."""
    while node.op == "call_function":
        node = node.all_input_nodes[0]
    return node.op == "placeholder" and sorted(node.meta["val"].shape) == sorted((M, K))


@pytest.mark.parametrize("around", [nullcontext, autocast], ids=["plain", "autocast"])
@pytest.mark.parametrize("kernel", LAYERS)
def test_a_compiler_merges_the_casts_of_one_input(kernel, around, monkeypatch):
    monkeypatch.setitem(bf16_units._AVAILABLE, "cpu", False)  # with such units, casts by groups are inside an operator
    one, three = (read_in_graphs(layers, kernel, around) for layers in (1, 3))
    assert one["maxima"] == 2  # along its rows, and along its columns for the gradient of a weight
    assert three == one
