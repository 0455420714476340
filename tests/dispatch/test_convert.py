"""Eager conversion: every planned product on its kernels, everything else as it was."""

import copy
import io
import logging
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import loka
from loka.dispatch.convert import convert, planned_sites, unreached
from loka.dispatch.linear import linear
from loka.dispatch.routing import SiteKernels
from loka.errors import PlanError
from tests.dispatch.made_conversion import MIXED, Calls, emulated, plan_for

KERNELS = tuple(emulated(recipe) for recipe in MIXED.values())
ONE_CALL = sorted(MIXED.items())


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 16, bias=False)
        self.head = nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(F.silu(self.norm(self.up(x)))) + x).squeeze(-1)


def state_of(model: nn.Module) -> dict[str, tuple]:
    """Everything about a model that a conversion that is refused must not touch."""
    return {
        name: (type(module), "forward" in vars(module), sorted(vars(module)), list(module.state_dict()))
        for name, module in model.named_modules()
    }


# --- what is reached, and how ---


class Written(nn.Module):
    """One product with a bare Parameter, written as `product` says."""

    def __init__(self, shape: tuple[int, ...], product: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(shape))
        self.b = nn.Parameter(torch.randn(12))
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        return self.product(self, x)


@dataclass(frozen=True)
class Form:
    shape: tuple[int, ...]  # of the parameter
    product: Callable[[nn.Module, Tensor], Tensor]
    weight: Callable[[Tensor], Tensor] = torch.clone  # from the parameter to [N, K] = [12, 16]
    bias: bool = False
    x: Callable[[Tensor], Tensor] = torch.clone  # from the module's input to [.., K]
    out: Callable[[Tensor], Tensor] = torch.clone  # from [.., N] to what the module returns


NK, KN = (12, 16), (16, 12)
FORMS = {
    "F.linear": Form(NK, lambda m, x: F.linear(x, m.w)),
    "F.linear with bias": Form(NK, lambda m, x: F.linear(x, m.w, m.b), bias=True),
    "F.linear by keyword": Form(NK, lambda m, x: F.linear(input=x, weight=m.w, bias=m.b), bias=True),
    "x @ w": Form(KN, lambda m, x: x @ m.w, weight=Tensor.t),
    "x @ w.t()": Form(NK, lambda m, x: x @ m.w.t()),
    "x @ w.T": Form(NK, lambda m, x: x @ m.w.T),
    "x @ w.mT": Form(NK, lambda m, x: x @ m.w.mT),
    "x @ w.transpose": Form(NK, lambda m, x: x @ m.w.transpose(0, 1)),
    "x @ w[i]": Form((3, 16, 12), lambda m, x: x @ m.w[1], weight=lambda w: w[1].t()),
    "x @ half of w": Form((16, 24), lambda m, x: x @ m.w.chunk(2, 1)[1], weight=lambda w: w[:, 12:].t()),
    "x @ w.view": Form((16 * 12,), lambda m, x: x @ m.w.view(16, 12), weight=lambda w: w.view(16, 12).t()),
    "x @ w.to": Form(KN, lambda m, x: x @ m.w.double().float(), weight=Tensor.t),
    "torch.matmul": Form(KN, lambda m, x: torch.matmul(x, m.w), weight=Tensor.t),
    "torch.matmul by keyword": Form(KN, lambda m, x: torch.matmul(input=x, other=m.w), weight=Tensor.t),
    "x.matmul": Form(KN, lambda m, x: x.matmul(m.w), weight=Tensor.t),
    "w @ x": Form(NK, lambda m, x: m.w @ x.mT, out=lambda y: y.mT),
    "torch.mm": Form(KN, lambda m, x: torch.mm(x[0], m.w), weight=Tensor.t, x=lambda x: x[0]),
    "x.mm": Form(KN, lambda m, x: x[0].mm(mat2=m.w), weight=Tensor.t, x=lambda x: x[0]),
    "w.mm": Form(NK, lambda m, x: m.w.mm(x[0].t()), x=lambda x: x[0], out=Tensor.t),
    "torch.mv": Form(NK, lambda m, x: torch.mv(m.w, x[0, 0]), x=lambda x: x[0, 0]),
    "w @ vector": Form(NK, lambda m, x: m.w @ x[0, 0], x=lambda x: x[0, 0]),
    "vector @ w": Form(KN, lambda m, x: x[0, 0] @ m.w, weight=Tensor.t, x=lambda x: x[0, 0]),
    "torch.addmm": Form(KN, lambda m, x: torch.addmm(m.b, x[0], m.w), weight=Tensor.t, bias=True, x=lambda x: x[0]),
    "b.addmm": Form(KN, lambda m, x: m.b.addmm(x[0], m.w), weight=Tensor.t, bias=True, x=lambda x: x[0]),
    "tensordot": Form(KN, lambda m, x: torch.tensordot(x, m.w, dims=([-1], [0])), weight=Tensor.t),
    "tensordot of one axis": Form(KN, lambda m, x: torch.tensordot(x, m.w, 1), weight=Tensor.t),
    "einsum": Form(NK, lambda m, x: torch.einsum("btk,nk->btn", x, m.w)),
    "einsum of a list": Form(NK, lambda m, x: torch.einsum("btk,nk->btn", [x, m.w])),
}


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


class TiedByModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(20, 16), nn.Linear(16, 20, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids))


class TiedByFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Module()
        self.body.table = nn.Embedding(20, 16)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.body.table(ids), self.body.table.weight)


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


class Bypassing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.lin.weight, self.lin.bias)


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


def test_wrappers_around_the_model_do_not_hide_its_names(calls: Calls) -> None:
    model = Mlp()
    wrapped = nn.DataParallel(model)
    assert convert(wrapped, plan_for(model, ["up"])) is wrapped
    model(torch.randn(3, 16)).sum().backward()
    assert sorted(calls.passes()) == ["fprop", "wgrad"]


# --- autograd around it ---


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_block_trains_as_without(calls: Calls, reentrant: bool) -> None:
    class Blocks(nn.Module):
        def __init__(self, checkpointed: bool) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Written(KN, lambda m, x: F.silu(x @ m.w) @ m.w.t()), Mlp()])
            self.checkpointed = checkpointed

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=reentrant) if self.checkpointed else block(x)
            return x

    plain = Blocks(checkpointed=False)
    model = copy.deepcopy(plain)
    model.checkpointed = True
    x = torch.randn(4, 5, 16, requires_grad=True)
    plan = plan_for(plain, ["blocks.0.w", "blocks.1.up", "blocks.1.down"])
    for each in (plain, model):
        convert(each, plan)
        each(x).sum().backward()
    for got, want in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=0, atol=0)
    assert calls.passes().count("fprop") == 3 * 4  # four products, plain, then forward and recompute


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_that_begins_in_the_forward_of_a_bare_parameter_still_trains(reentrant: bool) -> None:
    """Its recompute runs outside of that forward: what it covers falls back, and is named where it never ran."""
    model = Written(KN, lambda m, x: checkpoint(lambda t: F.silu(t @ m.w), x, use_reentrant=reentrant) @ m.w.t())
    x = torch.randn(4, 5, 16, requires_grad=True)
    model(x).sum().backward()
    exact = model.w.grad.clone()
    model.w.grad = None
    convert(model, plan_for(model, ["w"]))
    model(x).sum().backward()
    assert 0 < (model.w.grad - exact).norm() / exact.norm() < 0.2


def test_frozen_weights_and_inputs_without_gradient_skip_their_products(calls: Calls) -> None:
    model = convert(model := Mlp(), plan_for(model, ["up", "down", "head"]))
    model.down.weight.requires_grad_(False)
    model(torch.randn(8, 16)).sum().backward()
    assert calls.passes().count("wgrad") == 2
    assert calls.passes().count("dgrad") == 2
    assert model.down.weight.grad is None


def test_gradient_accumulation_adds_up() -> None:
    model = convert(model := Mlp(), plan_for(model, ["up", "down", "head"]))
    batches = [torch.randn(8, 16) for _ in range(3)]
    alone = []
    for batch in batches:
        model.zero_grad()
        model(batch).sum().backward()
        alone.append([p.grad.clone() for p in model.parameters()])
    model.zero_grad()
    for batch in batches:
        model(batch).sum().backward()
    for p, *parts in zip(model.parameters(), *alone, strict=True):
        torch.testing.assert_close(p.grad, sum(parts[1:], parts[0]))


@pytest.mark.parametrize("shape", [(16,), (0, 16), (2, 0, 16), (2, 3, 16)], ids=str)
def test_any_leading_shape_passes(shape: tuple[int, ...]) -> None:
    model = Mlp()
    exact = model(torch.randn(shape))
    convert(model, plan_for(model, ["up", "down", "head"]))
    got = model(torch.randn(shape))
    got.sum().backward()
    assert got.shape == exact.shape
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_autocast_keeps_its_dtypes(calls: Calls) -> None:
    model = Written(KN, lambda m, x: torch.addmm(m.b, x[0] @ m.w, m.w.t() @ m.w))
    x = torch.randn(2, 5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        exact = model(x)
        convert(model, plan_for(model, ["w"]))
        got = model(x)
    got.float().sum().backward()
    assert got.dtype == exact.dtype == torch.bfloat16
    assert model.w.grad.dtype == torch.float32
    assert calls.log


# --- what stays as it was ---


def test_nothing_of_the_model_changes() -> None:
    model = Mlp()
    fired: list[str] = []
    model.up.register_forward_pre_hook(lambda *_: fired.append("pre"))
    model.up.register_forward_hook(lambda *_: fired.append("post"))
    model.up.weight.register_post_accumulate_grad_hook(lambda _: fired.append("grad"))
    parameters, keys = list(model.named_parameters()), list(model.state_dict())
    shapes = {key: (value.shape, value.dtype, value.data_ptr()) for key, value in model.state_dict().items()}
    convert(model, plan_for(model, ["up", "down", "head"]))
    assert all(a is b for (_, a), (_, b) in zip(model.named_parameters(), parameters, strict=True))
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in parameters]
    assert list(model.state_dict()) == keys
    assert {k: (v.shape, v.dtype, v.data_ptr()) for k, v in model.state_dict().items()} == shapes
    assert isinstance(model.up, nn.Linear)
    assert "in_features=16, out_features=32" in repr(model.up)
    model(torch.randn(3, 16)).sum().backward()
    assert fired == ["pre", "post", "grad"]


def test_an_optimizer_goes_on_with_its_state() -> None:
    model = Mlp()
    optimizer = torch.optim.Adam(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        model(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()

    step()
    before = copy.deepcopy(optimizer.state_dict())
    convert(model, plan_for(model, ["up", "down"]))
    after = optimizer.state_dict()
    assert str(after) == str(before)
    step()
    assert {int(state["step"]) for state in optimizer.state.values()} == {2}
    assert all(p in optimizer.state for p in model.parameters())


def test_a_deep_copy_is_converted_too_and_apart(calls: Calls) -> None:
    model = nn.Sequential(Mlp(), Written(KN, lambda m, x: x.unsqueeze(-1).expand(-1, 16) @ m.w))
    convert(model, plan_for(model, ["0.up", "1.w"]))
    other = copy.deepcopy(model)
    x = torch.randn(3, 16)
    assert torch.equal(other(x), model(x))
    assert planned_sites(other) == planned_sites(model)
    assert len(calls.log) == 4
    with torch.no_grad():
        other[0].up.weight.zero_()
        other[1].w.zero_()
    assert not torch.equal(other(x), model(x))
    fresh = copy.deepcopy(convert(fresh := Mlp(), plan_for(fresh, ["up"])))
    assert unreached(fresh) == ("up",)


def test_a_whole_converted_model_can_be_saved() -> None:
    model = convert(model := Mlp(), plan_for(model, ["up", "down"]))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    x = torch.randn(3, 16)
    assert torch.equal(again(x), model(x))
    assert type(again.up) is type(model.up)


def test_a_state_dict_is_pickled_without_a_word_of_loka() -> None:
    model = convert(model := Mlp(), plan_for(model, ["up", "down", "head"]))
    model(torch.randn(3, 16)).sum().backward()
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    assert b"loka" not in buffer.getvalue()
    assert b"loka" not in pickle.dumps(model.state_dict())


ELSEWHERE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "loka":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
import torch
from torch import nn
model = nn.Sequential(nn.Linear(16, 12), nn.LayerNorm(12), nn.Linear(12, 1))
model.load_state_dict(torch.load(sys.argv[1], weights_only=True))
with torch.no_grad():
    for parameter in model.parameters():
        parameter.mul_(2)
torch.save(model.state_dict(), sys.argv[2])
assert "loka" not in sys.modules
"""


def test_a_checkpoint_goes_to_a_process_without_loka_and_back(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(16, 12), nn.LayerNorm(12), nn.Linear(12, 1))
    convert(model, plan_for(model, ["0", "2"]))
    torch.save(model.state_dict(), tmp_path / "there.pt")
    doubled = {name: 2 * value for name, value in model.state_dict().items()}
    paths = [str(tmp_path / name) for name in ("there.pt", "back.pt")]
    subprocess.run([sys.executable, "-c", ELSEWHERE, *paths], check=True, capture_output=True)
    model.load_state_dict(torch.load(tmp_path / "back.pt", weights_only=True))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in doubled.items())


# --- refusals ---


def test_a_plan_for_another_model_or_shape_is_refused() -> None:
    wider = Mlp()
    wider.up = nn.Linear(16, 64)
    for other, difference in ((nn.Sequential(nn.Linear(16, 4)), "is missing"), (wider, r"up.weight is \[")):
        model = Mlp()
        state = state_of(model)
        with pytest.raises(PlanError, match=difference):
            convert(model, plan_for(other, ["up"] if other is wider else ["0"]))
        assert state_of(model) == state


def test_a_site_that_the_model_does_not_have_is_refused_before_anything_changes() -> None:
    model = Mlp()
    state = state_of(model)
    with pytest.raises(PlanError, match="has the site 'upp'"):
        convert(model, plan_for(model, ["down", "up", "upp"]))
    assert state_of(model) == state


def test_a_kernel_that_cannot_run_is_refused_before_anything_changes(caplog: pytest.LogCaptureFixture) -> None:
    model = Mlp()
    plan = plan_for(model, ["up", "down"])
    last = replace(plan.decisions[-1], kernel="hopper.linear.blockwise")
    plan = replace(plan, decisions=(*plan.decisions[:-1], last))
    state = state_of(model)
    with pytest.raises(PlanError, match=r"hopper.linear.blockwise on up.wgrad.*emulate=True"):
        convert(model, plan)
    assert state_of(model) == state
    with caplog.at_level(logging.INFO, logger="loka.dispatch"):
        convert(model, plan, emulate=True)
    assert planned_sites(model)["up"].wgrad == emulated("blockwise")
    assert "stands in" in caplog.text


def test_a_converted_model_is_not_converted_again() -> None:
    model = convert(model := Mlp(), plan_for(model, ["up"]))
    state = state_of(model)
    with pytest.raises(PlanError, match="Mlp is converted already \\(see 'up'\\)"):
        convert(model, plan_for(model, ["down"]))
    assert state_of(model) == state


@pytest.mark.parametrize("how", ["wrapped", "in place", "a part"])
def test_a_compiled_model_is_not_converted(how: str) -> None:
    model: nn.Module = Mlp()
    plan = plan_for(model, ["up"])
    if how == "wrapped":
        target = torch.compile(model, backend="eager")
    else:
        target = model
        (model if how == "in place" else model.up).compile(backend="eager")
    state = state_of(model)
    with pytest.raises(PlanError, match=r"is compiled.*Convert first"):
        convert(target, plan)
    assert state_of(model) == state


def test_a_plan_in_which_nothing_gains_changes_nothing() -> None:
    model = Mlp()
    state = state_of(model)
    convert(model, plan_for(model, {"up": {}, "down": {}}))
    assert state_of(model) == state
    assert planned_sites(model) == {}


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_a_converted_bf16_model_compiles_in_one_graph(recipe: str) -> None:
    model = Mlp().bfloat16()
    convert(model, plan_for(model, {"up": dict.fromkeys(MIXED, recipe)}))
    x = torch.randn(5, 16, dtype=torch.bfloat16)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x))


def test_the_front_door_leads_here() -> None:
    assert loka.convert is convert
