"""Layers with norm and activation in compiled code: graphs of our backend, of others, and of converted models."""

import copy

import pytest
import torch
from torch import nn

import loka
from loka.dispatch.running.convert import convert, unreached
from loka.dispatch.running.executions import kernel_executions, reset_kernel_executions
from loka.mods import BlockNorm, FuseEpilogue, HardSwish
from tests.dispatch.made_conversion import needs_a_compiler, plan_for
from tests.dispatch.made_fused import fused_model, fused_plan, named
from tests.loka.made_compiled import Backend

RECIPES = {"fprop": "rowwise", "dgrad": "tensorwise", "wgrad": "rowwise"}
X = torch.randn(6, 13, generator=torch.Generator().manual_seed(1))


def stepped(model, run, x=X):
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = run(x)
    out.square().sum().backward()
    return [out.detach(), x.grad, *(each.grad.clone() for each in model.parameters())]


def assert_same(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() <= 5e-3 * other.norm() + 1e-6


def plans(model):
    return {"fused": fused_plan(model, RECIPES), "product": plan_for(model, {"0": RECIPES})}


@pytest.mark.parametrize("planned", ["fused", "product"])
def test_the_backend_finds_the_layer_and_runs_it_as_a_converted_model_does(planned):
    model = fused_model()
    plan = plans(model)[planned]
    twin = convert(copy.deepcopy(model), plan)
    backend = Backend(plan)
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    graphs = set()
    for rows in (6, 9, 14) if planned == "fused" else (6,):
        x = torch.randn(rows, 13)
        assert_same(stepped(model, compiled, x), stepped(twin, twin, x))
        graphs.add(len(backend.found))
    assert set(backend.found) == {("0",)}
    assert len(graphs) == 1  # one for all batches
    assert unreached(twin) == ()


@pytest.mark.parametrize("planned", ["fused", "product"])
def test_a_converted_model_compiles_whole_under_another_backend(planned):
    model = fused_model()
    plan = plans(model)[planned]
    convert(model, plan)
    wanted = stepped(model, model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same(stepped(model, compiled), wanted)
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), wanted[0], rtol=1e-4, atol=1e-4)


def test_in_autocast_it_is_compiled_with_the_types_of_the_three_ops():
    model = fused_model()
    plan = fused_plan(model, RECIPES)
    twin = convert(copy.deepcopy(model), plan)

    def run(function):
        with torch.autocast("cpu", torch.bfloat16):
            return function(X)

    compiled = torch.compile(model, backend=Backend(plan), fullgraph=True)
    found, wanted = run(compiled), run(twin)
    assert found.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05)


@needs_a_compiler
def test_kernels_are_counted_where_inductor_runs_them():
    model = fused_model(features=40, head=False)
    plan = fused_plan(model, RECIPES)
    twin = convert(copy.deepcopy(model), plan)
    wanted = stepped(twin, twin)
    compiled = torch.compile(model, backend="loka", fullgraph=True, options={"plan": plan})
    compiled(X)
    reset_kernel_executions()
    assert_same(stepped(model, compiled), wanted)
    assert kernel_executions() == dict.fromkeys(named(*RECIPES.values()), 1)


class Tied(nn.Module):
    """A table whose rows are looked up and multiplied by, and a layer with norm and activation that shares it."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(300, 13)
        self.layer = nn.Sequential(nn.Linear(13, 300, bias=False), nn.LayerNorm(300), nn.SiLU())
        self.layer[0].weight = self.table.weight

    def forward(self, ids):
        return self.layer(self.table(ids))


def test_a_tied_weight_is_found_in_the_layer():
    torch.manual_seed(0)
    model, ids = Tied(), torch.arange(7)
    loka.mods.apply(model, [BlockNorm(256), HardSwish(), FuseEpilogue()])
    plan = fused_plan(model, RECIPES, site="layer.0")
    compiled = torch.compile(copy.deepcopy(model), backend=Backend(plan), fullgraph=True)
    convert(model, plan)
    torch.testing.assert_close(compiled(ids), model(ids), rtol=1e-3, atol=1e-3)
    assert unreached(model) == ()


def test_a_layer_whose_forward_is_hidden_is_reached_through_the_module_above_it():
    model = fused_model()
    wanted = convert(copy.deepcopy(model), plans(model)["product"])(X)
    layer = model[0]
    layer.forward = lambda input: type(layer).forward(layer, input)
    convert(model, plans(model)["product"])
    assert type(model).__name__ == "RoutedSequential"
    assert torch.equal(model(X), wanted)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(X), wanted)


def test_a_model_without_the_epilogue_keeps_its_product_and_is_told(caplog):
    model = fused_model()
    plain = nn.Sequential(nn.Linear(13, 300), nn.SiLU(), nn.Identity(), nn.Linear(300, 5))
    wanted = plain(X)
    backend = Backend(fused_plan(model, RECIPES))
    assert torch.equal(torch.compile(plain, backend=backend, fullgraph=True)(X), wanted)
    assert backend.sites == []
    assert "0 is planned in FP8, but its product in this graph is of a form that stays as written" in caplog.text


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_other_backends_trace_into_a_layer_that_is_not_planned(backend):
    model = fused_model()
    wanted = stepped(model, model)
    for one, other in zip(stepped(model, torch.compile(model, backend=backend, fullgraph=True)), wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_an_exported_model_holds_no_operator_of_ours():
    model = fused_model().requires_grad_(False)
    for strict in (True, False):
        exported = torch.export.export(model, (X,), strict=strict)
        assert not any("loka" in str(node.target) for node in exported.graph.nodes)
        torch.testing.assert_close(exported.module()(X), model(X))


def test_a_kernel_that_cannot_run_here_is_an_error_before_anything_runs():
    model = fused_model()
    plan = fused_plan(model, kernel="triton.linear_norm_act.rowwise")
    with pytest.raises(Exception, match="needs cuda"):
        torch.compile(model, backend=Backend(plan), fullgraph=True)(X)
