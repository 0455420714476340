"""A planned layer with norm and activation: its numbers, what it keeps, and what it does when something goes wrong."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from loka.dispatch.deciding.plan import Plan
from loka.dispatch.running import linear as op
from loka.dispatch.running.convert import convert, planned_sites, revert, unreached
from loka.dispatch.running.executions import kernel_executions, reset_kernel_executions
from loka.dispatch.running.linear import linear
from loka.dispatch.running.norm_act import linear_norm_act
from loka.errors import PlanError
from loka.kernel_registry import norm_act
from loka.kernel_registry.norm_act import block_norm, norm_act_backward
from loka.stepping_aside import stepping_aside
from tests.dispatch.made_conversion import emulated, plan_for
from tests.dispatch.made_evidence import built_in
from tests.dispatch.made_fused import FUSED, fused_decision, fused_model, fused_plan, named
from tests.kernel_registry.made_devices import interprets_triton

# (m, k, n): ragged tail and odd everything; one block; two blocks and more; one short block; one row; one column.
SHAPES = [(7, 13, 300), (5, 429, 256), (9, 40, 520), (3, 8, 20), (1, 13, 257), (6, 5, 1)]
KERNELS = [
    *FUSED.values(),
    *([name.replace("emulated", "triton") for name in FUSED.values()] if interprets_triton() else []),
]


def operands(m, k, n, dtype=torch.float32, bias=True):
    x, weight, shift, grad = (torch.randn(shape) for shape in ((m, k), (n, k), (n,), (m, n)))
    x, weight, shift = (each.to(dtype).requires_grad_() for each in (x, weight, shift))
    return x, weight, shift if bias else None, grad.to(dtype)


def unfused(x, weight, bias, eps, kernels):
    """The definition: the planned linear layer in FP8, then norm and activation, op by op."""
    return F.hardswish(block_norm(linear(x, weight, bias, *kernels), eps=eps))


def gradients(function, x, weight, bias, grad, *rest):
    present = [each for each in (x, weight, bias) if each is not None]
    out = function(x, weight, bias, *rest)
    return out, *torch.autograd.grad(out, present, grad)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_fused_and_unfused_are_the_same_layer(kernel, shape):
    x, weight, bias, grad = operands(*shape)
    recipe = kernel.rpartition(".")[2]
    backward = emulated("tensorwise"), emulated("blockwise")
    wanted = gradients(unfused, x, weight, bias, grad, 1e-3, (emulated(recipe), *backward))
    found = gradients(linear_norm_act, x, weight, bias, grad, 1e-3, (kernel, *backward))
    # A sum in another order may move an element of dY across the border between two FP8 codes: one of many.
    for one, other in zip(found[:1] + found[3:], wanted[:1] + wanted[3:], strict=True):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-4)
    for one, other in zip(found[1:3], wanted[1:3], strict=True):
        assert (one - other).norm() <= 5e-3 * other.norm()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models_keep_their_type_and_round_once(kernel, dtype):
    x, weight, bias, grad = operands(9, 40, 300, dtype)
    recipe = kernel.rpartition(".")[2]
    found = gradients(linear_norm_act, x, weight, bias, grad, None, (kernel, "", ""))
    wanted = gradients(unfused, x, weight, bias, grad, None, (emulated(recipe), "", ""))
    assert {each.dtype for each in found} == {dtype}
    exact = [None if each is None else each.detach().float() for each in (x, weight, bias)]
    once = unfused(*exact, None, (emulated(recipe), "", "")).to(dtype)
    # Half an ulp around what fp32 sums in another order give.
    torch.testing.assert_close(found[0], once, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).float().norm() <= 4 * torch.finfo(dtype).eps * other.float().norm()


@pytest.mark.parametrize("features", [1, 20, 256, 300, 512])
def test_the_gradient_of_norm_and_activation_is_that_of_autograd(features):
    y = (3 * torch.randn(7, features)).requires_grad_()
    grad = torch.randn(7, features)
    for eps in (None, 1e-2):
        (wanted,) = torch.autograd.grad(F.hardswish(block_norm(y, eps=eps)), y, grad)
        torch.testing.assert_close(norm_act_backward(grad, y.detach(), eps), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", [(2, 3, 13), (13,), (0, 13), (2, 0, 13)], ids=str)
def test_leading_dimensions_are_rows_and_there_may_be_none(kernel, shape):
    x = torch.randn(shape, requires_grad=True)
    weight, bias = torch.randn(20, 13, requires_grad=True), torch.randn(20)
    kernels = (kernel, emulated("rowwise"), emulated("rowwise"))
    out = linear_norm_act(x, weight, bias, None, kernels)
    out.sum().backward()
    assert out.shape == (*shape[:-1], 20)
    wanted = linear_norm_act(x.detach().reshape(-1, 13), weight, bias, None, kernels)
    torch.testing.assert_close(out.reshape(-1, 20), wanted)
    assert x.grad.shape == x.shape
    assert weight.grad.shape == weight.shape


def test_it_keeps_the_product_alone_and_only_for_the_gradients_that_are_wanted():
    x, weight, bias, grad = operands(8, 16, 300)
    kept = []

    def run():
        kept.clear()
        reset_kernel_executions()
        with saved_tensors_hooks(lambda t: (kept.append(tuple(t.shape)), t)[1], lambda t: t):
            out = linear_norm_act(x, weight, bias, None, named("rowwise"))
        if out.requires_grad:
            out.backward(grad)
        return set(kernel_executions()), list(kept)

    fprop, dgrad, wgrad = named("rowwise")
    assert run() == ({fprop, dgrad, wgrad}, [(8, 16), (300, 16), (8, 300)])
    weight.requires_grad_(False)
    assert run() == ({fprop, dgrad}, [(300, 16), (8, 300)])
    x.requires_grad_(False)
    assert run() == ({fprop}, [(8, 300)])
    assert bias.grad is not None
    with torch.no_grad():
        assert run() == ({fprop}, [])


@pytest.mark.parametrize("outside", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_gives_the_types_of_the_three_ops(outside):
    def run(function, *rest):
        x, weight, bias, _ = operands(6, 13, 300, outside)
        with torch.autocast("cpu", torch.bfloat16):
            out = function(x, weight, bias, None, *rest)
        out.float().sum().backward()
        return [each.dtype for each in (out, x.grad, weight.grad, bias.grad)]

    def plain(x, weight, bias, eps):
        return F.hardswish(block_norm(F.linear(x, weight, bias), eps=eps))

    assert run(linear_norm_act, named("rowwise")) == run(plain)


def test_with_a_kernel_of_the_product_alone_norm_and_activation_follow():
    x, weight, bias, grad = operands(7, 13, 300)
    kernels = emulated("rowwise"), emulated("tensorwise"), ""
    found = gradients(linear_norm_act, x, weight, bias, grad, None, kernels)
    wanted = gradients(unfused, x, weight, bias, grad, None, kernels)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_kernel_that_raises_is_replaced_and_out_of_use(monkeypatch, where):
    class Broken(norm_act.Defined):
        pass

    def fails(*_, **__):
        raise RuntimeError("no such instruction")

    name = FUSED["rowwise"]
    x, weight, bias, grad = operands(7, 13, 300)
    quarantined = []
    monkeypatch.setattr(op, "quarantine", lambda kernel, device, error: quarantined.append(kernel))
    monkeypatch.setattr(Broken, where, fails)
    monkeypatch.setitem(op._fused, name, Broken(norm_act.rowwise_layer.recipe))
    reset_kernel_executions()
    found = gradients(linear_norm_act, x, weight, bias, grad, None, (name, "", ""))
    assert quarantined == [name]
    assert kernel_executions().get(name, 0) == (where == "backward")
    wanted = gradients(
        unfused, x, weight, bias, grad, None, ("" if where == "forward" else emulated("rowwise"), "", "")
    )
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_a_quarantined_kernel_gives_way_to_high_precision_with_the_same_saved_tensors(monkeypatch):
    name = FUSED["blockwise"]
    for table in (op._fused, op._loaded, op._layers):
        monkeypatch.setitem(table, name, None)
        monkeypatch.delitem(table, name)
    registry = built_in()
    monkeypatch.setattr(op, "default_registry", lambda: registry)
    op.load(name)
    op.quarantine(name, torch.device("cpu"), RuntimeError("no more"))
    x, weight, bias, grad = operands(7, 13, 300)
    reset_kernel_executions()
    found = gradients(linear_norm_act, x, weight, bias, grad, None, (name, "", ""))
    assert set(kernel_executions()) == {"high precision"}
    wanted = gradients(unfused, x, weight, bias, grad, None, ("", "", ""))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", [(7, 13, 300), (5, 429, 256), (0, 13, 20)], ids=str)
def test_a_weight_that_was_quantised_before_gives_the_same(kernel, shape):
    op.load(kernel)
    layer = op.load_fused(kernel)
    x, weight, bias, _ = (each.detach() for each in operands(*shape))
    for dtype in (torch.float32, torch.bfloat16):
        options = {"eps": None, "out_dtype": dtype, "save": True}
        wanted = layer.forward(x.to(dtype), weight.to(dtype), bias.to(dtype), **options)
        found = layer.forward(x.to(dtype), layer.prepare(weight.to(dtype)), bias.to(dtype), **options)
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


# --- models ---


X = torch.randn(6, 13, generator=torch.Generator().manual_seed(1))


def stepped(model, x=X):
    """The output of a model, and its gradients."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = model(x)
    out.square().sum().backward()
    return [out.detach(), x.grad, *(each.grad.clone() for each in model.parameters() if each.grad is not None)]


def by_hand(model, kernels, x=X):
    twin = copy.deepcopy(model)
    layer = twin[0]
    layer.forward = lambda input: unfused(input, layer.weight, layer.bias, layer.eps, kernels)
    return stepped(twin, x)


def test_a_converted_model_runs_the_layer_in_one_kernel_and_comes_back():
    model = fused_model()
    keys, plain = list(model.state_dict()), model(X)
    wanted = by_hand(model, tuple(map(emulated, ("rowwise", "tensorwise", "blockwise"))))
    plan = fused_plan(model)
    convert(model, Plan.parse(plan.text().encode(), "a plan"))
    reset_kernel_executions()
    found = stepped(model)
    assert kernel_executions() == dict.fromkeys(named("rowwise"), 1)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    assert unreached(model) == ()
    assert planned_sites(model)["0"].as_tuple() == named("rowwise")
    assert list(model.state_dict()) == keys
    assert torch.equal(copy.deepcopy(model)(X), found[0])
    revert(model)
    assert torch.equal(model(X), plain)
    assert type(model[0]).__name__ == "FusedLinearNormAct"


def test_weights_are_quantised_once_per_step_of_the_optimiser(monkeypatch):
    model, twin = fused_model(), fused_model()
    plan = fused_plan(model)
    convert(model, plan, cache_weights=True)
    convert(twin, plan, cache_weights=False)
    made = []
    prepare = norm_act.Defined.prepare
    monkeypatch.setattr(norm_act.Defined, "prepare", lambda self, weight: made.append(1) or prepare(self, weight))
    optimizers = [torch.optim.SGD(each.parameters(), 0.1) for each in (model, twin)]
    for step in (1, 2):
        for each, optimizer in zip((model, twin), optimizers, strict=True):
            for rows in (6, 4, 5):
                each(torch.ones(rows, 13)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert len(made) == step
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), twin.parameters(), strict=True))
    with torch.no_grad():
        assert torch.equal(model(X), twin(X))


def test_a_kernel_that_fails_with_a_kept_weight_is_replaced(monkeypatch):
    class Broken(norm_act.Defined):
        def forward(self, *_, **__):
            raise RuntimeError("no such instruction")

    model = fused_model()
    plain = model(X)
    convert(model, fused_plan(model), cache_weights=True)
    model(X)
    monkeypatch.setattr(op, "quarantine", lambda *_: None)
    monkeypatch.setitem(op._fused, FUSED["rowwise"], Broken(norm_act.rowwise_layer.recipe))
    torch.testing.assert_close(model(X), plain)


def test_a_kernel_of_this_plan_that_is_not_here_is_emulated_where_that_is_allowed():
    model = fused_model()
    plan = fused_plan(model, kernel="triton.linear_norm_act.rowwise")
    with pytest.raises(PlanError, match=r"runs triton.linear_norm_act.rowwise on 0.fprop, and on cpu .* it cannot"):
        convert(model, plan)
    convert(model, plan, emulate=True)
    assert planned_sites(model)["0"].fprop == FUSED["rowwise"]


def test_a_model_without_the_epilogue_is_refused_and_untouched():
    plan = fused_plan(fused_model())
    plain = torch.nn.Sequential(torch.nn.Linear(13, 300), torch.nn.LayerNorm(300, elementwise_affine=False))
    plain.append(torch.nn.SiLU()).append(torch.nn.Linear(300, 5))
    with pytest.raises(PlanError, match=r"in one kernel, and in this model it is Linear, without both.*FuseEpilogue"):
        convert(plain, plan)
    assert type(plain[0]) is torch.nn.Linear

    class Doubled(type(fused_model()[0])):
        def forward(self, input):
            return 2 * super().forward(input)

    model = fused_model()
    model[0].__class__ = Doubled
    with pytest.raises(PlanError, match="it is Doubled, without both"):
        convert(model, plan)


def test_a_plan_that_asks_for_what_no_layer_runs_is_refused():
    model = fused_model()
    plan = plan_for(model, {"0": {"fprop": "rowwise", "dgrad": "rowwise"}})
    first, *others = plan.decisions
    gradient = fused_decision(others[0], FUSED["rowwise"])
    with pytest.raises(PlanError, match="serves fprop, not dgrad"):
        convert(model, Plan(**{**fields(plan), "decisions": (fused_decision(first, FUSED["rowwise"]), gradient)}))


@pytest.mark.parametrize(
    "kernel", [FUSED["rowwise"], "triton.gemm.rowwise", "torch.native.linear_norm_act", "none.at.all"]
)
def test_what_a_plan_calls_high_precision_is_high_precision(kernel):
    model = fused_model()
    plan = plan_for(model, {"0": {"wgrad": "rowwise"}})
    first, *others = plan.decisions
    first = replace(fused_decision(first, kernel), baseline=kernel)
    convert(model, Plan(**{**fields(plan), "decisions": (first, *others)}))
    assert planned_sites(model)["0"].fprop == ""
    assert torch.equal(model(X), fused_model()(X))


def fields(plan):
    return {name: getattr(plan, name) for name in ("created", "model", "fingerprint", "environment", "bound")}


def test_a_plan_of_the_product_alone_still_runs_a_fused_layer():
    model = fused_model()
    recipes = {"fprop": "rowwise", "dgrad": "tensorwise", "wgrad": "blockwise"}
    wanted = by_hand(model, tuple(map(emulated, recipes.values())))
    convert(model, plan_for(model, {"0": recipes}))
    assert unreached(model) == ("0",)
    for one, other in zip(stepped(model), wanted, strict=True):
        assert torch.equal(one, other)
    assert unreached(model) == ()


def test_a_sampled_step_shows_the_models_own_product():
    model = fused_model()
    plain = stepped(model)
    convert(model, fused_plan(model))
    reset_kernel_executions()
    with stepping_aside():
        found = stepped(model)
    assert kernel_executions() == {}
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("aside", [False, True])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_recomputes_the_same_and_may_be_sampled_half_way(reentrant, aside):
    model = convert(fused_model(), fused_plan(fused_model()))
    wanted = stepped(model)
    model.zero_grad()
    x = X.clone().requires_grad_()
    out = checkpoint(model, x, use_reentrant=reentrant)
    loss = out.square().sum()
    if aside:
        with stepping_aside():
            loss.backward()
    else:
        loss.backward()
        for one, other in zip([out, x.grad, *(each.grad for each in model.parameters())], wanted, strict=True):
            assert torch.equal(one, other)
    assert all(each.grad is not None for each in model.parameters())
