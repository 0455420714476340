"""The backend `loka`: which products of a graph it finds, by which name, and what it refuses."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from loka.dispatch.running.convert import convert
from loka.dispatch.running.linear import linear
from tests.dispatch.made_conversion import MIXED, emulated, plan_for
from tests.dispatch.made_converted import FORMS, KN, Bypassing, Form, Mlp, TiedByFunction, TiedByModule, Written
from tests.loka.made_compiled import Backend, train

KERNELS = tuple(emulated(recipe) for recipe in MIXED.values())


# --- which products are found ---


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_of_a_product_is_found_and_is_the_planned_one(form: Form) -> None:
    model, x = Written(form.shape, form.product), torch.randn(2, 5, 16, requires_grad=True)
    bias = model.b if form.bias else None
    expected = form.out(linear(form.x(x), form.weight(model.w), bias, *KERNELS))
    expected.square().sum().backward()
    gradients = x.grad, model.w.grad
    x.grad = model.w.grad = None
    backend = Backend(plan_for(model, ["w"]))
    got = torch.compile(model, backend=backend, fullgraph=True)(x)
    got.square().sum().backward()
    assert backend.found == [("w",)]
    torch.testing.assert_close((got, x.grad, model.w.grad), (expected, *gradients), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "product",
    [
        lambda m, x: torch.addmm(m.b, x[0], m.w, beta=2.0),
        lambda m, x: torch.bmm(x, m.w.expand(2, 16, 12)),
        lambda m, x: torch.einsum("btk,kn->tbn", x, m.w),
        lambda m, x: torch.tensordot(x, m.w.view(2, 8, 12), dims=([0], [0])),
        lambda m, x: x[0, :, :12] @ m.w[torch.tensor([3, 1, 2])].t(),
    ],
    ids=["beta", "bmm", "einsum of another form", "tensordot of a 3-d view", "gathered rows"],
)
def test_another_form_is_left_as_written_and_named(product, caplog: pytest.LogCaptureFixture) -> None:
    model, x = Written(KN, product), torch.randn(2, 5, 16)
    backend = Backend(plan_for(model, ["w"]))
    got = torch.compile(model, backend=backend, fullgraph=True)(x)
    torch.testing.assert_close(got, model(x))
    assert backend.sites == []
    assert "w is planned in FP8, but its product in this graph" in caplog.text


class Chain(nn.Module):
    """Products that follow each other directly, and a parameter beside a planned weight that is not planned."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.ParameterList([nn.Parameter(torch.randn(16, 16) / 4) for _ in range(3)])
        self.low_rank = LowRank()

    def forward(self, x: Tensor) -> Tensor:
        return self.low_rank((self.w[1] @ (self.w[0] @ x.t())).t() @ self.w[2])


class LowRank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16))
        self.adapter = nn.Parameter(torch.randn(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + x @ self.adapter


def test_products_of_products_are_all_found_and_an_unplanned_one_beside_them_is_not() -> None:
    model, x = Chain(), torch.randn(5, 16)
    plan = plan_for(model, {**dict.fromkeys(["w.0", "w.1", "w.2", "low_rank"], MIXED), "low_rank.adapter": {}})
    backend = Backend(plan)
    got = torch.compile(model, backend=backend, fullgraph=True)(x)
    assert backend.found == [("w.0", "w.1", "w.2", "low_rank")]
    torch.testing.assert_close(got, convert(copy.deepcopy(model), plan)(x))


@pytest.mark.parametrize(
    ("model", "sites", "x"),
    [
        (Mlp(), ["up", "down", "head"], torch.randn(3, 16)),
        (nn.Linear(16, 12), ["weight"], torch.randn(3, 16)),
        (Bypassing(), ["lin"], torch.randn(3, 16)),
        (TiedByModule(), ["head"], torch.arange(5)),
        (TiedByFunction(), ["body.table"], torch.arange(5)),
    ],
    ids=["modules", "root", "bypassed forward", "tied module", "tied function"],
)
def test_products_are_named_by_their_parameter_wherever_they_run(model: nn.Module, sites: list[str], x: Tensor) -> None:
    backend = Backend(plan_for(model, sites))
    torch.compile(model, backend=backend, fullgraph=True)(x)
    assert backend.found == [tuple(sites)]


@pytest.mark.parametrize("kdim", [None, 8], ids=["packed", "separate"])
def test_attention_runs_its_projections_as_planned(kdim: int | None) -> None:
    model = nn.MultiheadAttention(16, 2, kdim=kdim, vdim=kdim, batch_first=True)
    projections = ["in_proj_weight"] if kdim is None else ["k_proj_weight", "q_proj_weight", "v_proj_weight"]
    plan = plan_for(model, [*projections, "out_proj"])
    q, kv = torch.randn(3, 5, 16), torch.randn(3, 5, kdim or 16)
    backend = Backend(plan)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    converted = convert(copy.deepcopy(model), plan)
    outputs = []
    for each in (compiled, converted):
        out = each(q, kv, kv)[0]
        out.square().sum().backward()
        outputs.append(out)
    assert sorted(backend.sites) == sorted([*projections, "out_proj"])
    torch.testing.assert_close(outputs[0], outputs[1])
    for got, want in zip(model.parameters(), converted.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad)


def test_an_encoder_in_its_fused_path_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    with torch.no_grad():
        torch.compile(model, backend=Backend(plan_for(model, ["linear1"])))(torch.randn(3, 5, 16))
    assert "linear1 is planned in FP8, but" in caplog.text


GLOBAL = Mlp()


def in_a_wrapper(model: nn.Module) -> tuple[object, Callable]:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.scale = model, nn.Parameter(torch.randn(16, 16))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x @ self.scale)

    return Outer()


def in_a_closure(model: nn.Module) -> object:
    return lambda x: model(x).sum()


def in_a_global(model: nn.Module) -> object:
    return lambda x: GLOBAL(x).sum()


def twice_wrapped(model: nn.Module) -> object:
    return in_a_wrapper(in_a_wrapper(model))


@pytest.mark.parametrize("wrap", [in_a_wrapper, twice_wrapped, in_a_closure, in_a_global, nn.DataParallel])
def test_the_planned_model_is_found_inside_what_is_compiled(wrap) -> None:
    backend = Backend(plan_for(GLOBAL, ["up", "down", "head"]))
    torch.compile(wrap(GLOBAL), backend=backend)(torch.randn(3, 16))
    assert backend.sites == ["up", "down", "head"]


def test_a_model_compiled_in_place_is_found() -> None:
    model = Mlp()
    backend = Backend(plan_for(model, ["up", "down", "head"]))
    model.compile(backend=backend, fullgraph=True)
    model(torch.randn(3, 16))
    assert backend.sites == ["up", "down", "head"]


def test_a_tied_weight_is_found_inside_what_is_compiled() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = TiedByModule()

        def forward(self, ids: Tensor) -> Tensor:
            return self.net(ids)

    model = Outer()
    backend = Backend(plan_for(model.net, ["head"]))
    torch.compile(model, backend=backend, fullgraph=True)(torch.arange(5))
    assert backend.found == [("head",)]


def test_a_compiled_train_step_runs_as_planned() -> None:
    """Forward, backward and update in one compiled function; Dynamo may break it in two."""
    plan = plan_for(GLOBAL, ["up", "down"])
    backend, start = Backend(plan), copy.deepcopy(GLOBAL.state_dict())
    optimizer = torch.optim.SGD(GLOBAL.parameters(), 0.1)
    x, y = torch.randn(8, 16), torch.randn(8)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = (GLOBAL(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    losses = [torch.compile(step, backend=backend)() for _ in range(3)]
    reference = Mlp()
    reference.load_state_dict(start)
    GLOBAL.load_state_dict(start)
    convert(reference, plan)
    expected = train(reference, [(x, y)] * 3, rate=0.1)
    assert backend.sites == ["up", "down"]
    assert [loss.item() for loss in losses] == pytest.approx(expected, rel=1e-5)


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.blocks = nn.Linear(16, 16), nn.ModuleList([Mlp(), Mlp()])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            print(end="")  # noqa: T201 - breaks the graph in a loop: the blocks are compiled by themselves
            x = x + block(x).unsqueeze(-1)
        return x


def test_a_part_that_a_graph_break_leaves_by_itself_stays_in_high_precision_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its parameters are named from the part on, so nothing tells the first block from the second."""
    model, x = Broken(), torch.randn(3, 16)
    backend = Backend(plan_for(model, ["blocks.0.up"]))
    torch.testing.assert_close(torch.compile(model, backend=backend)(x), model(x))
    assert backend.sites == []
    assert "is a part of Broken that a graph break left by itself" in caplog.text
