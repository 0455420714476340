"""Layers that read one input: its casts are made once, and no number depends on it."""

import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from loka.dispatch.running import shared_input
from loka.dispatch.running.convert import convert
from loka.dispatch.running.shared_input import forget_input, reused_inputs
from loka.formats import PASSES
from loka.kernel_registry.builtin import KERNELS
from loka.kernel_registry.layers import Layer
from tests.dispatch.made_conversion import decision, plan_for

LAYERS = sorted(spec.name for spec in KERNELS if spec.op == "linear_layer" and spec.library == "emulated")
M, K = 24, 40


class Attention(nn.Module):
    """q, k and v of one input, of which k and v are narrower; o reads another one."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(K, n) for n in (K, 16, 16, 8))

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.o(q + torch.cat([k, v, k[..., :8]], -1))


def converted(model, kernel, sites=("q", "k", "v", "o")):
    plan = plan_for(model, {})
    recipe = kernel.rpartition(".")[2]
    made = tuple(decision(site, product, recipe, kernel=kernel) for site in sites for product in PASSES)
    return convert(model, plan_for(model, {}, decisions=made, environment=plan.environment))


def step(model, x):
    out = model(x)
    grads = torch.autograd.grad((out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum(), [*model.parameters()])
    return [out, *grads]


@pytest.fixture
def casts(monkeypatch):
    """Shapes of the inputs that were really cast."""
    seen = []
    cast = Layer.input_sides

    def noting(self, x, needs):
        seen.append(tuple(x.shape))
        return cast(self, x, needs)

    monkeypatch.setattr(Layer, "input_sides", noting)
    forget_input()
    return seen


@pytest.mark.parametrize("shape", [(M, K), (3, 8, K)], ids=str)
@pytest.mark.parametrize("kernel", LAYERS)
def test_one_input_is_cast_once_and_the_numbers_stay(kernel, shape, casts, monkeypatch):
    torch.manual_seed(0)
    model, x = converted(Attention(), kernel), torch.randn(shape)
    before = reused_inputs()
    found = step(model, x)
    assert casts == [(M, K)] * 2  # of q, k and v together, and of o
    assert reused_inputs() - before == 2
    with monkeypatch.context() as without:
        without.setattr(shared_input, "_values", lambda x: None)
        for got, right in zip(found, step(model, x), strict=True):
            assert torch.equal(got, right)


def test_an_input_that_was_written_to_is_another_one(casts):
    torch.manual_seed(0)
    model, x = converted(Attention(), LAYERS[0]), torch.randn(M, K)
    model.q(x)
    x.mul_(2)
    out = model.k(x)
    assert len(casts) == 2
    forget_input()
    assert torch.equal(out, model.k(x.clone()))


def test_a_view_of_other_rows_is_another_input(casts):
    model, x = converted(Attention(), LAYERS[0]), torch.randn(2 * M, K)
    first, second = model.q(x[:M]), model.q(x[M:])
    forget_input()
    assert torch.equal(second, model.q(x[M:].clone()))
    assert not torch.equal(first, second)


def test_memory_that_is_used_again_is_another_input(casts):
    model = converted(Attention(), LAYERS[0])
    for turn in range(20):
        x = torch.full((M, K), float(turn + 1))
        out = model.q(x)
        del x
        assert torch.allclose(out, model.q(torch.full((M, K), float(turn + 1))))


def test_a_frozen_weight_takes_no_turned_cast_and_a_trained_one_after_it_makes_it(casts):
    torch.manual_seed(0)
    model, x = converted(Attention(), LAYERS[0]), torch.randn(M, K).requires_grad_()
    model.q.weight.requires_grad_(False)
    out = model.q(x).sum() + model.k(x).square().sum()
    found = torch.autograd.grad(out, [x, model.k.weight])
    assert len(casts) == 2
    forget_input()
    again = model.q(x.detach().clone().requires_grad_())
    assert not torch.isnan(again).any()
    expected = torch.autograd.grad(model.k(x).square().sum(), model.k.weight)
    assert torch.equal(found[1], expected[0])


def test_layers_on_another_kernel_make_their_own(casts):
    torch.manual_seed(0)
    model = Attention()
    plan = plan_for(model, {})
    kernels = {"q": LAYERS[0], "k": LAYERS[1], "v": LAYERS[1]}
    made = tuple(
        decision(site, product, kernel.rpartition(".")[2], kernel=kernel)
        for site, kernel in kernels.items()
        for product in PASSES
    )
    convert(model, plan_for(model, {}, decisions=made, environment=plan.environment))
    model(torch.randn(M, K))
    assert len(casts) == 2


def test_backward_lets_go_and_threads_do_not_meet(casts):
    model, x = converted(Attention(), LAYERS[0]), torch.randn(M, K)
    out = model.q(x)
    others = []
    thread = threading.Thread(target=lambda: others.append(model.k(x)))
    thread.start()
    thread.join()
    assert len(casts) == 2
    out.sum().backward()
    model.v(x)
    assert len(casts) == 3


def test_checkpointed_layers_come_to_the_same(casts):
    torch.manual_seed(0)
    model, x = converted(Attention(), LAYERS[0]), torch.randn(M, K)
    plain = step(model, x)
    wrapped = step(nn.Sequential(Checkpointed(model)), x)
    for got, right in zip(wrapped, plain, strict=True):
        assert torch.equal(got, right)


class Checkpointed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


def test_under_a_dispatch_mode_every_layer_makes_its_own(casts):
    torch.manual_seed(0)
    model, x = converted(Attention(), LAYERS[0]), torch.randn(M, K)
    plain = step(model, x)
    casts.clear()
    with FlopCounterMode(display=False):
        seen = step(model, x)
    assert len(casts) == 4
    for got, right in zip(seen, plain, strict=True):
        assert torch.equal(got, right)
