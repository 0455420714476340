"""Differentiating twice through a product in FP8 is an error, on every way there is, and never a wrong number."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from loka.dispatch.running.convert import convert, revert
from loka.formats import PASSES
from tests.dispatch.made_conversion import MIXED, decision, plan_for

WORDS = "differentiate twice a product in FP8"
# A kernel per pass, which saves the operands; and one of all passes, which saves their casts.
APART, TOGETHER = "emulated.linear.{}", "emulated.linear_layer.tensorwise"
KERNELS = pytest.mark.parametrize("kernel", [APART, TOGETHER], ids=["apart", "together"])


def critic(sites, kernel, act=nn.SiLU):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), act(), nn.Linear(32, 4))
    recipes = dict.fromkeys(PASSES, "tensorwise") if kernel == TOGETHER else MIXED
    made = [
        decision(site, which, recipes[which], kernel=kernel.format(recipes[which]))
        for site in sites
        for which in PASSES
    ]
    return convert(model, plan_for(model, {}, decisions=tuple(made)))


def penalty(model, x):
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return (slope.norm() - 1).square()


def by_backward(model, x):
    penalty(model, x).backward()


def beside_a_loss(model, x):
    loss = model(x).square().mean() + penalty(model, x)  # each weight is also reached through the loss
    torch.autograd.grad(loss, list(model.parameters()))


def with_inputs_named(model, x):
    (model(x).square().mean() + penalty(model, x)).backward(inputs=list(model.parameters()))


def hessian(model, x):
    torch.autograd.functional.hessian(lambda each: model(each).square().sum(), x.detach())


def of_weight_gradients(model, x):
    gradients = torch.autograd.grad(model(x).square().mean(), list(model.parameters()), create_graph=True)
    torch.autograd.grad(sum(each.square().sum() for each in gradients), list(model.parameters()), allow_unused=True)


WAYS = (by_backward, beside_a_loss, with_inputs_named, hessian, of_weight_gradients)


@KERNELS
@pytest.mark.parametrize("sites", [["0"], ["2"], ["0", "2"]], ids="+".join)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_every_second_derivative_is_an_error(way, sites, kernel):
    model, x = critic(sites, kernel), torch.randn(3, 16, requires_grad=True)
    with pytest.raises(RuntimeError, match=WORDS):
        way(model, x)
    way(revert(model), x)  # in high precision it is one as ever


@KERNELS
def test_first_derivatives_with_a_graph_are_those_without_one(kernel):
    model, x = critic(["0", "2"], kernel, nn.ReLU), torch.randn(3, 16, requires_grad=True)
    wanted = [x, *model.parameters()]
    plain = torch.autograd.grad(model(x).square().sum(), wanted)
    found = torch.autograd.grad(model(x).square().sum(), wanted, create_graph=True)
    assert all(torch.equal(one, other) for one, other in zip(plain, found, strict=True))
    assert all(each.requires_grad for each in found)
    assert not any(each.requires_grad for each in plain)


def test_an_input_that_is_gone_is_missed_at_once_where_no_other_way_leads_to_it():
    model = critic(["2"], TOGETHER)
    out = model(torch.randn(3, 16)).sum()  # the gradient that comes in is a constant
    model(torch.randn(3, 16))  # nobody holds the input of "2" any more
    with pytest.raises(RuntimeError, match=WORDS):
        torch.autograd.grad(out, [model[2].weight], create_graph=True)


def test_what_has_no_source_that_trains_needs_no_error():
    model, x = critic(["0", "2"], APART).requires_grad_(False), torch.randn(3, 16, requires_grad=True)
    (slope,) = torch.autograd.grad(model[2](model[0](x)), x, torch.ones(3, 4), create_graph=True)
    assert not slope.requires_grad


@KERNELS
def test_a_checkpoint_may_lie_around_it(kernel):
    model, x = critic(["0", "2"], kernel, nn.ReLU), torch.randn(3, 16, requires_grad=True)
    (plain,) = torch.autograd.grad(model(x).square().sum(), x)
    out = checkpoint(model, x, use_reentrant=False).square().sum()
    (slope,) = torch.autograd.grad(out, x, create_graph=True)
    assert torch.equal(slope, plain)
    with pytest.raises(RuntimeError, match=WORDS):
        slope.sum().backward()
