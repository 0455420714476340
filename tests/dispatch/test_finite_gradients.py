"""Gradients of every kind: which are finite, and that looking leaves them as they are."""

import math

import pytest
import torch
from torch import nn

import loka
from loka.dispatch.monitoring import finite
from tests.dispatch.made_held import (
    converted,
    plain_step,
)
from tests.dispatch.made_monitor import batches, kinds

pytestmark = pytest.mark.usefixtures("late_registry")


def test_large_gradients_are_finite_ones():
    """Their norm overflows, they do not."""
    model, plan = converted("fprop")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-30)
    with loka.monitor(model, plan, every=1000, overhead=1e-9) as monitor:
        for x in batches(3, loud=1.0):
            plain_step(model, optimizer, x)
            before = model.up.weight.detach().clone()
            model.up.weight.grad.fill_(3e38)
            optimizer.step()
            assert not torch.equal(before, model.up.weight)
    assert kinds(monitor) == []


def shapes_of_gradients():
    """Gradients as optimizers meet them, by name."""
    torch.manual_seed(0)
    table = nn.Embedding(6, 4, sparse=True)
    table(torch.tensor([1, 3])).sum().backward()
    weight = torch.randn(3, requires_grad=True)
    (with_graph,) = torch.autograd.grad(weight.square().sum(), weight, create_graph=True)
    return {
        "plain": torch.randn(5, 3),
        "bf16": torch.randn(5, 3).bfloat16(),
        "fp16": torch.full((5, 3), 60000.0).half(),
        "fp64": torch.full((5, 3), 1e300, dtype=torch.float64),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "expanded": torch.ones(()).expand(5, 3),
        "complex": torch.randn(5, dtype=torch.complex64),
        "sparse": table.weight.grad,
        "with a graph": with_graph,
        "subnormal": torch.full((4,), 1e-45),
        "largest": torch.full((4,), 3.4e38),
        "empty": torch.empty(0, 3),
        "meta": torch.empty(3, device="meta"),
    }


def spoiled(gradient, value):
    """The same gradient with one element that is not finite; of an expanded one, all."""
    if gradient.is_sparse:
        values = gradient._values().clone()
        values[-1, -1] = value
        return torch.sparse_coo_tensor(gradient._indices(), values, gradient.shape, check_invariants=True)
    if gradient.dim() and not any(gradient.stride()):
        return torch.full((), value).expand(gradient.shape)
    made = gradient.detach().clone()  # with its memory format
    made[(-1,) * made.dim()] = value
    return made.requires_grad_(gradient.requires_grad)


@pytest.mark.parametrize("name", shapes_of_gradients())
def test_every_kind_of_gradient_is_told_from_one_that_is_not_finite_and_left_as_it_was(name):
    found = shapes_of_gradients()
    gradient = found[name]
    before = gradient.detach().clone() if name != "meta" else None
    assert finite.are_finite([found["plain"], gradient])
    if name in ("empty", "meta"):
        return
    assert torch.equal(gradient.to_dense(), before.to_dense())
    for value in (math.nan, math.inf, -math.inf):
        bad = spoiled(gradient, value)
        assert not finite.are_finite([found["plain"], bad, found["bf16"]])
