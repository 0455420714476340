"""Plans on models that stray from layers and batches: jagged tensors, torch.func, cells, weights that are computed."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils.parametrizations import spectral_norm

import loka
from loka.dispatch.freezing.freeze import freeze
from loka.dispatch.running.convert import convert, revert, unreached
from loka.dispatch.running.executions import kernel_executions, reset_kernel_executions
from loka.errors import KernelError, PlanError
from loka.formats import DEFAULT_RECIPES, RECIPES
from loka.quantize import fake_quantize
from tests.dispatch.made_conversion import decision, plan_for

SHARED = dict.fromkeys(("fprop", "dgrad", "wgrad"), "rowwise")  # all passes on one kernel, which shares their casts


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 8))


def plan_of(model):
    return plan_for(model, {"0": SHARED, "2": {"fprop": "rowwise", "dgrad": "tensorwise", "wgrad": "rowwise"}})


# --- nested tensors ---


def nested(layout):
    rows = [torch.randn(length, 16, generator=torch.Generator().manual_seed(length)) for length in (3, 1, 7)]
    return torch.nested.nested_tensor(rows, layout=layout, requires_grad=True)


def test_a_jagged_tensor_has_the_numbers_and_gradients_of_its_values():
    model = mlp()
    convert(model, plan_of(model))
    x = nested(torch.jagged)
    out = model(x)
    assert (out + out).offsets() is x.offsets()
    out.values().square().sum().backward()
    mine = [each.grad.clone() for each in model.parameters()]
    model.zero_grad()
    values = x.detach().values().requires_grad_()
    want = model(values)
    want.square().sum().backward()
    assert torch.equal(out.values(), want)
    assert torch.equal(x.grad.values(), values.grad)
    assert all(torch.equal(one, each.grad) for one, each in zip(mine, model.parameters(), strict=True))


def test_a_frozen_model_takes_jagged_tensors():
    model, x = mlp(), nested(torch.jagged).detach()
    plan = plan_of(model)
    converted = convert(copy.deepcopy(model), plan)
    freeze(model, plan)
    with torch.no_grad():
        assert torch.equal(model(x).values(), converted(x).values())


def test_a_jagged_dimension_may_be_any_but_the_last():
    model = mlp()
    convert(model, plan_of(model))
    x = torch.nested.nested_tensor([torch.randn(n, 2, 16) for n in (3, 5)], layout=torch.jagged).transpose(1, 2)
    with torch.no_grad():
        out = model(x)
        assert out.shape[1:3] == x.shape[1:3]
        for one, rows in zip(out.unbind(), x.unbind(), strict=True):
            assert torch.equal(one, model(rows))


def test_a_jagged_tensor_may_come_while_aot_autograd_makes_a_graph(monkeypatch):
    model, x = mlp(), nested(torch.jagged).detach()
    convert(model, plan_of(model))
    with torch.no_grad():
        want = model(x).values()
        monkeypatch.setattr("torch.fx._symbolic_trace._is_fx_tracing_flag", True)  # as under backend="loka"
        assert torch.equal(model(x).values(), want)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_strided_nested_tensor_is_refused_in_words():
    model = mlp()
    convert(model, plan_of(model))
    with pytest.raises(KernelError, match=r"layout=torch\.jagged"):
        model(nested(torch.strided))


# --- dtypes ---


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.bfloat16])
def test_an_input_that_the_plain_layer_refuses_is_refused_by_the_converted_one(dtype):
    model = mlp()
    convert(model, plan_of(model))
    with pytest.raises(RuntimeError, match="same dtype"):
        model(torch.ones(4, 16, dtype=dtype))


def test_integers_are_refused_by_a_frozen_layer_in_words():
    model = mlp()
    freeze(model, plan_of(model))
    with pytest.raises(KernelError, match=r"'0' is frozen .* got torch\.int64"):
        model(torch.ones(4, 16, dtype=torch.int64))


# --- torch.func ---


def squared(model):
    return lambda parameters, x: functional_call(model, parameters, (x,)).square().mean()


@pytest.mark.parametrize("transform", ["grad", "per example", "jvp"])
def test_derivatives_by_torch_func_are_those_of_high_precision_and_cost_no_kernel(transform):
    model, x = mlp(), torch.randn(4, 1, 16)
    parameters = {name: each.detach() for name, each in model.named_parameters()}
    tangents = {name: torch.ones_like(each) for name, each in parameters.items()}

    def derived():
        if transform == "grad":
            return grad(squared(model))(parameters, x[:, 0])
        if transform == "per example":
            return vmap(grad(squared(model)), (None, 0))(parameters, x)
        return {"tangent": jvp(lambda each: squared(model)(each, x[:, 0]), (parameters,), (tangents,))[1]}

    want = derived()
    convert(model, plan_of(model))
    reset_kernel_executions()
    got = derived()
    assert kernel_executions() == {"high precision": 2}
    assert all(torch.equal(got[name], want[name]) for name in want)
    model(x[:, 0]).square().mean().backward()  # the kernels have not been taken out of use
    assert kernel_executions()["emulated.linear.rowwise"] == 4


@pytest.mark.parametrize("recipe", DEFAULT_RECIPES)
def test_batched_gradients_cost_no_kernel(recipe):
    model, x = mlp(), torch.randn(4, 16)
    want = torch.autograd.functional.jacobian(copy.deepcopy(model), x, vectorize=True)
    convert(model, plan_for(model, dict.fromkeys("02", dict.fromkeys(("fprop", "dgrad", "wgrad"), recipe))))
    got = torch.autograd.functional.jacobian(model, x, vectorize=True)
    assert (got - want).norm() < 0.1 * want.norm()
    reset_kernel_executions()
    model(x).square().mean().backward()  # the kernels have not been taken out of use
    assert kernel_executions() == {f"emulated.linear.{recipe}": 5}


# --- what a frozen model cannot do without ---


@pytest.mark.parametrize("cell", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
def test_cells_keep_their_weights_when_a_model_is_frozen(cell):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.head = cell(16, 24), nn.Linear(24, 8)

        def forward(self, x):
            state = self.cell(x)
            return self.head(state[0] if isinstance(state, tuple) else state)

    model, x = Recurrent(), torch.randn(4, 16)
    sizes = {"cell.weight_ih": model.cell.weight_ih.shape, "cell.weight_hh": model.cell.weight_hh.shape}
    made = [(decision(site, "fprop", "blockwise"), n, k) for site, (n, k) in {**sizes, "head": (8, 24)}.items()]
    decisions = tuple(replace(one, request=replace(one.request, n=n, k=k)) for one, n, k in made)
    plan = plan_for(model, [], decisions=decisions)
    want = convert(copy.deepcopy(model), plan)(x)
    frozen = freeze(model, plan)
    assert frozen.kernels.keys() == {"head"}
    reason = f"{cell.__name__} reads its weight itself"
    assert frozen.left == {"cell.weight_ih": reason, "cell.weight_hh": reason}
    assert torch.equal(model(x), want.detach())


@pytest.mark.parametrize("how", [spectral_norm, nn.utils.spectral_norm])
def test_what_a_weight_is_computed_from_is_left(how):
    model, x = nn.Sequential(how(nn.Linear(16, 24)), nn.Linear(24, 8)).eval(), torch.randn(4, 16)
    source = next(name for name, each in model.named_parameters() if each.shape == (24, 16))
    want = convert(model, plan_for(model, {"1": SHARED}))(x)
    revert(model)
    frozen = freeze(model, plan_for(model, {source: SHARED, "1": SHARED}))
    assert frozen.left == {source: "a weight is computed from it, which takes its numbers"}
    assert torch.equal(model(x), want.detach())


@pytest.mark.parametrize("layout", ["coo", "csr", "csc"])
@pytest.mark.filterwarnings("ignore:Sparse")
def test_a_sparse_buffer_is_counted_by_what_it_holds(layout):
    model = mlp()
    plan = plan_of(model)
    dense = freeze(copy.deepcopy(model), plan)
    links = torch.eye(6).to_sparse() if layout == "coo" else getattr(torch.eye(6), f"to_sparse_{layout}")()
    model.register_buffer("links", links)
    frozen = freeze(model, plan)
    indices = 2 * 6 if layout == "coo" else 7 + 6
    assert frozen.bytes_before - dense.bytes_before == indices * 8 + 6 * 4
    assert frozen.bytes_after - dense.bytes_after == indices * 8 + 6 * 4


# --- TorchScript ---


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_layers_of_torchscript_stay_as_they_are_and_are_named():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.head = nn.Linear(16, 24), nn.Linear(24, 8)
            self.fixed = torch.jit.script(nn.Sequential(nn.Linear(24, 24), nn.ReLU()))

        def forward(self, x):
            return self.head(self.fixed(self.up(x)))

    torch.manual_seed(0)
    model, x = Mixed(), torch.randn(4, 16)
    want = model(x)
    model(x).sum().backward()
    plan = plan_for(model, dict.fromkeys(("up", "fixed.0", "head"), SHARED))
    reset_kernel_executions()
    got = convert(model, plan)(x)
    got.sum().backward()
    assert kernel_executions() == {"emulated.linear.rowwise": 5}  # x wants no gradient
    assert 0 < float(((got - want).norm() / want.norm()).detach()) < 0.1
    assert unreached(model) == ("fixed.0",)
    assert torch.equal(revert(model)(x), want)
    convert(model, plan)
    frozen = freeze(model, plan)
    assert frozen.kernels.keys() == {"up", "head"}
    assert frozen.left == {"fixed.0": "it runs in TorchScript, whose code is fixed"}
    assert torch.equal(model(x), got)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("change", [convert, freeze])
def test_a_model_of_torchscript_is_refused_in_words_and_left_as_it_is(change):
    model = torch.jit.script(mlp())
    with pytest.raises(PlanError, match="TorchScript, whose code is fixed"):
        change(model, plan_for(model, {"0": SHARED}))
    model(torch.randn(4, 16)).sum().backward()


# --- a vector that takes the place of a weight ---


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.gate = nn.Linear(16, 32), nn.Parameter(torch.randn(32) / 4)
        self.flat = nn.Parameter(torch.randn(32 * 8) / 4)

    def forward(self, x):
        hidden = self.up(x)
        return (hidden * torch.sigmoid(hidden @ self.gate).unsqueeze(-1)) @ self.flat.view(32, 8)


def test_a_product_with_a_vector_of_the_model_stays_as_written(tmp_path):
    torch.manual_seed(0)
    model, x = Gated(), torch.randn(24, 16)
    with loka.probe(model, tmp_path / "run.db", every=1, overhead=1e6):
        for _ in range(12):
            model(x).square().mean().backward()
    plan = loka.plan(tmp_path / "run.db", loka.Bound(row_error=0.9), assume_speedup=1.3)
    assert {each.request.site for each in plan.decisions if each.recipe} == {"up", "flat"}
    gates = {each.request.product: each.request.op for each in plan.decisions if each.request.site == "gate"}
    assert gates == {"fprop": "other", "wgrad": "other"}
    convert(model, plan)
    found = model(x)
    assert unreached(model) == ()
    hidden = model.up(x)
    gated, recipe = hidden * torch.sigmoid(hidden @ model.gate).unsqueeze(-1), plan.decision("flat", "fprop").recipe
    input, weight = (
        fake_quantize(values, RECIPES[recipe].operand(role)).double()
        for values, role in ((gated, "input"), (model.flat.view(32, 8).mT, "weight"))
    )
    torch.testing.assert_close(found.double(), input @ weight.mT, rtol=1e-5, atol=1e-5)
