"""Differentiating twice through a product in FP8 is an error, on every way there is, and never a wrong number."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import loka
from loka.dispatch.running.convert import convert, revert
from loka.dispatch.running.executions import kernel_executions
from loka.formats import PASSES
from loka.probes.capturing.layer_facts import LayerFacts
from loka.reports.build import report_of
from loka.reports.words import notes
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


class Pair(nn.Module):
    """A critic whose slopes are penalised, and a generator."""

    def __init__(self):
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16))
        self.critic = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 1))

    def forward(self, noise, real):
        fake = self.generator(noise)
        middle = (0.5 * (real + fake.detach())).requires_grad_()
        (slope,) = torch.autograd.grad(self.critic(middle).sum(), middle, create_graph=self.training)
        penalty = (slope.norm(dim=1) - 1).square().mean()
        return self.critic(fake).mean() - self.critic(real).mean() + penalty


def pair_trained(model, steps, probe=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    with probe or nullcontext():
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(64, 8, generator=generator), torch.randn(64, 16, generator=generator)).backward()
            optimizer.step()


def test_a_plan_leaves_what_is_differentiated_twice_in_high_precision(tmp_path):
    torch.manual_seed(0)
    model = Pair()
    pair_trained(model, 40, loka.probe(model, tmp_path / "run.db", every=2, overhead=100.0))
    plan = loka.plan(tmp_path / "run.db", loka.Bound(row_error=0.2), assume_speedup=1.5)
    low = {each.request.site for each in plan.decisions if each.recipe is not None}
    assert low == {"generator.0", "generator.2"}
    kept = [each for each in plan.decisions if each.request.site.startswith("critic")]
    assert kept
    assert all("create_graph=True" in each.why for each in kept)
    assert any("2 of 4 sites stay in high precision" in note for note in plan.notes)
    report = report_of(tmp_path / "run.db", loka.Bound(row_error=0.2))
    assert report["run"]["differentiated_twice"] == ["critic.0", "critic.2"]
    assert any(note.startswith("2 sites in high precision whatever the verdict") for note in notes(report))
    loka.convert(model, plan, emulate=True)
    pair_trained(model, 3)  # and raises nothing
    assert kernel_executions()
    with pytest.raises(RuntimeError, match=WORDS):
        penalty(model.generator, torch.randn(4, 8, requires_grad=True)).backward()


def test_facts_of_a_layer_are_kept_merged_and_read_from_runs_that_do_not_tell():
    plain, twice = LayerFacts(), LayerFacts(twice=True)
    assert LayerFacts.from_arrays(twice.arrays()) == plain.merge(twice) == twice.merge(plain) == twice
    assert "twice" not in plain.arrays()
    assert LayerFacts.from_arrays(plain.arrays()) == plain
