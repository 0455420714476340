"""Conversion finds a product in every form that models write it in, by its weight."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loka.dispatch.running.convert import convert, planned_sites, unreached
from loka.dispatch.running.linear import linear
from loka.dispatch.running.routing import SiteKernels
from loka.errors import PlanError
from tests.dispatch.made_conversion import MIXED, Calls, emulated, plan_for
from tests.dispatch.made_converted import (
    FORMS,
    KN,
    Bypassing,
    Form,
    Mlp,
    TiedByFunction,
    TiedByModule,
    Written,
    state_of,
)

KERNELS = tuple(emulated(recipe) for recipe in MIXED.values())

ONE_CALL = sorted(MIXED.items())


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_product_with_a_bare_parameter_is_the_planned_one(calls: Calls, form: Form) -> None:
    model, x = Written(form.shape, form.product), torch.randn(2, 5, 16, requires_grad=True)
    bias = model.b if form.bias else None
    expected = form.out(linear(form.x(x), form.weight(model.w), bias, *KERNELS))
    exact = model(x)
    expected.square().sum().backward()
    gradients = x.grad, model.w.grad
    x.grad = model.w.grad = None
    calls.log.clear()
    assert convert(model, plan_for(model, ["w"])) is model
    got = model(x)
    got.square().sum().backward()
    assert calls.taken() == ONE_CALL
    assert unreached(model) == ()
    assert got.shape == exact.shape
    torch.testing.assert_close((got, x.grad, model.w.grad), (expected, *gradients), rtol=1e-5, atol=1e-4)
    assert not torch.equal(got, exact)


@pytest.mark.parametrize(
    "product",
    [
        lambda m, x: torch.addmm(m.b, x[0], m.w, beta=2.0),
        lambda m, x: torch.mm(x[0], m.w, out=torch.empty(5, 12)),
        lambda m, x: torch.bmm(x, m.w.expand(2, 16, 12)),
        lambda m, x: torch.einsum("btk,kn->tbn", x, m.w),
        lambda m, x: torch.tensordot(x, m.w.view(2, 8, 12), dims=([0], [0])),
    ],
    ids=["beta", "out", "bmm", "einsum of another form", "tensordot of a 3-d view"],
)
def test_another_form_is_left_as_it_is_and_named(calls: Calls, product) -> None:
    model, x = Written(KN, product), torch.randn(2, 5, 16)
    with torch.no_grad():
        exact = model(x)
        convert(model, plan_for(model, ["w"]))
        assert torch.equal(model(x), exact)
    assert calls.log == []
    assert unreached(model) == ("w",)


class Holders(nn.Module):
    """Parameters in lists and dicts, a nested module's, and a linear layer of its own kind."""

    def __init__(self) -> None:
        super().__init__()
        self.ps = nn.ParameterList([nn.Parameter(torch.randn(16, 16)) for _ in range(2)])
        self.pd = nn.ParameterDict({"cross": nn.Parameter(torch.randn(16, 16))})
        self.lists = nn.ModuleList([nn.ParameterList([nn.Parameter(torch.randn(16, 16))])])
        self.own = Scaled(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        for w in self.ps:
            x = x @ w
        return self.own((x @ self.pd["cross"]) @ self.lists[0][0])


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(2 * x, self.weight, self.bias)


def test_parameters_in_containers_and_linear_layers_with_a_forward_of_their_own_are_reached(calls: Calls) -> None:
    model = Holders()
    sites = ["ps.0", "ps.1", "pd.cross", "lists.0.0", "own"]
    convert(model, plan_for(model, sites))
    model(torch.randn(3, 16)).sum().backward()
    assert unreached(model) == ()
    assert len(calls.log) == 5 * 3 - 1  # the input wants no gradient
    assert set(planned_sites(model)) == set(sites)
    assert isinstance(model.own, Scaled)


def test_only_planned_passes_and_sites_leave_high_precision(calls: Calls) -> None:
    model = Mlp()
    convert(model, plan_for(model, {"up": {"fprop": "mxfp8"}, "down": {"wgrad": "rowwise"}, "head": {}}))
    model(torch.randn(8, 16)).sum().backward()
    assert calls.taken() == [("fprop", "mxfp8"), ("wgrad", "rowwise")]
    assert planned_sites(model) == {
        "up": SiteKernels(fprop=emulated("mxfp8")),
        "down": SiteKernels(wgrad=emulated("rowwise")),
    }
    assert type(model.head) is nn.Linear


@pytest.mark.parametrize("kdim", [None, 8], ids=["packed", "separate"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_attention_runs_its_projections_as_planned(calls: Calls, training: bool, kdim: int | None) -> None:
    attention = nn.MultiheadAttention(16, 2, kdim=kdim, vdim=kdim, batch_first=True).train(training)
    projections = ["in_proj_weight"] if kdim is None else ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    q = torch.randn(3, 5, 16, requires_grad=True)
    kv = q if kdim is None else torch.randn(3, 5, kdim, requires_grad=True)
    exact = attention(q, kv, kv)[0]
    convert(attention, plan_for(attention, [*projections, "out_proj"]))
    with torch.set_grad_enabled(training):
        got = attention(q, kv, kv, need_weights=False)[0]
    if training:
        got.sum().backward()
        assert all(p.grad is not None for p in attention.parameters())
    products = len(projections) + 1
    assert calls.taken() == sorted(ONE_CALL * products if training else [("fprop", "rowwise")] * products)
    assert unreached(attention) == ()
    assert 0 < (got - exact).norm() / exact.norm() < 0.1


@pytest.mark.parametrize("padding", [False, True], ids=["", "padded"])
def test_an_encoder_does_not_slip_into_its_fused_path(calls: Calls, padding: bool) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    sites = [f"layers.{i}.{name}" for i in range(2) for name in ("linear1", "linear2", "self_attn.out_proj")]
    x = torch.randn(3, 5, 16)
    mask = torch.arange(5).expand(3, 5) >= torch.tensor([[5], [3], [4]]) if padding else None
    with torch.no_grad():
        exact = encoder(x, src_key_padding_mask=mask)
        convert(encoder, plan_for(encoder, sites))
        got = encoder(x, src_key_padding_mask=mask)
    assert calls.taken() == [("fprop", "rowwise")] * 6
    kept = slice(None) if mask is None else ~mask
    assert 0 < (got[kept] - exact[kept]).norm() / exact[kept].norm() < 0.1


@pytest.mark.parametrize(("make", "site"), [(TiedByModule, "head"), (TiedByFunction, "body.table")])
def test_a_tied_embedding_serves_as_planned_weight_and_as_table(calls: Calls, make, site: str) -> None:
    model, ids = make(), torch.randint(0, 20, (7,))
    table = next(model.parameters())
    rows = table[ids].detach()
    convert(model, plan_for(model, [site]))
    logits = model(ids)
    logits.sum().backward()
    assert torch.equal(logits, linear(rows, table, None, *KERNELS))
    assert sorted(calls.passes()) == ["dgrad", "fprop", "fprop", "wgrad"]  # one of them is the line above
    assert unreached(model) == ()


def test_a_linear_layer_whose_forward_is_bypassed_is_named_as_unreached(calls: Calls) -> None:
    model = nn.Sequential(Bypassing(), nn.Linear(12, 4))
    convert(model, plan_for(model, ["0.lin", "1"]))
    assert unreached(model) == ("0.lin", "1")  # nothing has run yet
    model(torch.randn(3, 16)).sum().backward()
    assert unreached(model) == ("0.lin",)
    assert set(calls.passes()) == {"fprop", "dgrad", "wgrad"}


@pytest.mark.parametrize("name", ["", "0"], ids=["root", "child"])
def test_a_forward_replaced_on_the_instance_is_respected(calls: Calls, name: str) -> None:
    model = nn.Sequential(nn.Linear(16, 12), nn.ReLU()) if name else nn.Linear(16, 12)
    module = model.get_submodule(name)
    before = module.forward
    module.forward = lambda x: 2 * before(x)
    plan = plan_for(model, ["0" if name else "weight"])
    x, state = torch.randn(3, 16), state_of(model)
    if not name:
        with pytest.raises(PlanError, match="`forward` is replaced on the instance of Linear"):
            convert(model, plan)
        assert state_of(model) == state
        return
    convert(model, plan)
    assert torch.equal(model(x), 2 * linear(x, module.weight, module.bias, *KERNELS).relu())


def test_the_root_may_be_a_linear_layer(calls: Calls) -> None:
    model = nn.Linear(16, 12)
    convert(model, plan_for(model, ["weight"]))
    model(torch.randn(3, 16, requires_grad=True)).sum().backward()
    assert calls.taken() == ONE_CALL


def test_a_parametrized_layer_runs_the_weight_that_it_computes(calls: Calls) -> None:
    model = nn.Sequential(nn.Linear(16, 12))
    nn.utils.parametrizations.weight_norm(model[0])
    convert(model, plan_for(model, ["0"]))
    x = torch.randn(3, 16, requires_grad=True)
    y = model(x)
    y.sum().backward()
    assert torch.equal(y, linear(x, model[0].weight, model[0].bias, *KERNELS))
    assert sorted(calls.passes()) == ["dgrad", "fprop", "fprop", "wgrad"]
    assert model[0].parametrizations.weight.original1.grad is not None
