"""Weights that another module's forward multiplies with: a run sees who does, its plan says it, conversion follows."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import loka
from loka.dispatch.deciding.plan import Plan
from loka.dispatch.running.convert import convert, revert, unreached
from loka.dispatch.running.executions import kernel_executions, reset_kernel_executions
from loka.errors import PlanError
from tests.dispatch.made_conversion import needs_a_compiler

BOUND = loka.Bound(row_error=0.5)


class Block(nn.Module):
    """Multiplies with the weight of one layer that it never calls, calls another, and lends a third to its child."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj, self.lent = nn.Linear(16, 48, bias=False), nn.Linear(16, 16), nn.Linear(16, 16)
        self.borrower = Borrower()

    def forward(self, x):
        q, k, v = F.linear(x, self.qkv.weight).chunk(3, dim=-1)
        return self.borrower(self.proj(q * torch.tanh(k) + v), self.lent.weight)


class Borrower(nn.Module):
    def forward(self, x, weight):
        return x + F.linear(x, weight)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.blocks, self.last = nn.Linear(13, 16), nn.ModuleList([Block(), Block()]), nn.Linear(16, 4)
        self.table = nn.Linear(16, 16)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x @ self.table.weight.t())


OUTSIDES = {
    "blocks.0.lent": "blocks.0.borrower",
    "blocks.0.qkv": "blocks.0",
    "blocks.1.lent": "blocks.1.borrower",
    "blocks.1.qkv": "blocks.1",
    "table": "Model",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    torch.manual_seed(0)
    model, path = Model(), tmp_path_factory.mktemp("outside") / "run.db"
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with loka.probe(model, db=path, every=1, overhead=1.0):
        for _ in range(10):
            optimizer.zero_grad()
            model(torch.randn(32, 13)).square().mean().backward()
            optimizer.step()
    plan = loka.plan(path, BOUND, device="cpu", assume_speedup=1.3)
    return model, plan, path


def step(model, x):
    model.zero_grad()
    out = model(x)
    out.square().mean().backward()
    return [out.detach(), *(parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None)]


def test_the_plan_says_which_module_multiplies_and_keeps_it_in_its_file(made, tmp_path):
    _, plan, _ = made
    assert dict(plan.outsides) == OUTSIDES
    plan.save(tmp_path / "plan.json")
    read = Plan.load(tmp_path / "plan.json")
    assert read == plan
    assert read.hash == plan.hash != replace(plan, outsides={}).hash


def test_every_product_is_reached_and_has_its_numbers_and_the_way_back(made):
    model, plan, _ = made
    model, twin, x = copy.deepcopy(model), copy.deepcopy(model), torch.randn(32, 13)
    high = step(twin, x)
    convert(model, plan, emulate=True)
    reset_kernel_executions()
    found = step(model, x)
    assert unreached(model) == ()
    planned = [decision for decision in plan.decisions if decision.recipe is not None]
    assert len({decision.request.site for decision in planned}) == 9
    ran = kernel_executions()
    assert sum(count for name, count in ran.items() if "mm" not in name) >= len(planned)
    for got, want in zip(found, high, strict=True):
        assert 0 < (got - want).norm() < 0.3 * want.norm()
    revert(model)
    assert all(torch.equal(got, want) for got, want in zip(step(model, x), high, strict=True))


def test_without_that_they_stay_in_high_precision_and_are_named(made):
    model, plan, _ = made
    model = copy.deepcopy(model)
    convert(model, replace(plan, outsides={}), emulate=True)
    step(model, torch.randn(32, 13))
    assert set(unreached(model)) == set(OUTSIDES)


def test_a_name_that_the_model_has_not_means_the_model_itself(made):
    model, plan, _ = made
    model = copy.deepcopy(model)
    convert(model, replace(plan, outsides=dict.fromkeys(OUTSIDES, "no.such.module")), emulate=True)
    step(model, torch.randn(32, 13))
    assert unreached(model) == ()


def test_a_plan_says_it_of_sites_that_it_decides(made):
    _, plan, _ = made
    with pytest.raises(PlanError, match="nowhere"):
        replace(plan, outsides={"nowhere": "blocks.0"})
    text = plan.text().replace('"blocks.0.qkv":"blocks.0"', '"blocks.0.qkv":7')
    with pytest.raises(PlanError):
        Plan.parse(text.encode(), "plan.json")


@needs_a_compiler
def test_converted_and_compiled_code_agree(made):
    model, plan, _ = made
    converted, compiled, x = copy.deepcopy(model), copy.deepcopy(model), torch.randn(32, 13)
    convert(converted, plan, emulate=True)
    torch._dynamo.reset()
    call = torch.compile(compiled, backend="loka", options={"plan": plan, "emulate": True})
    with torch.no_grad():
        torch.testing.assert_close(call(x), converted(x), rtol=1e-3, atol=1e-4)
