"""The `torch.compile` backend: the planned products found in the graph, the same numbers as eager conversion."""

import copy
import functools
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch._inductor.compile_fx as inductor
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters

from loka.compiler import rewrite
from loka.dispatch.convert import convert, unreached
from loka.dispatch.linear import linear
from loka.dispatch.plan import Plan
from loka.errors import ArgumentError, PlanError
from loka.formats import RECIPES
from loka.quantize import fake_quantize
from tests.dispatch.made_conversion import MIXED, emulated, needs_a_compiler, plan_for
from tests.dispatch.test_convert import FORMS, KN, Bypassing, Form, Mlp, TiedByFunction, TiedByModule, Written

KERNELS = tuple(emulated(recipe) for recipe in MIXED.values())


class Backend:
    """Rewrites as the real backend does, keeps the sites it found, and runs what AOT autograd traces, uncompiled."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.found: list[tuple[str, ...]] = []

    def __call__(self, gm, example_inputs):
        self.found.append(rewrite(gm, self.plan))
        return aot_eager(gm, example_inputs)

    @property
    def sites(self) -> list[str]:
        return [site for graph in self.found for site in graph]


def root_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return getattr(error, "inner_exception", error)


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


# --- refusals, in clear words inside of what Dynamo raises ---


def compile_with(model: nn.Module, x: Tensor, **arguments) -> BaseException:
    with pytest.raises(BackendCompilerFailed) as caught:
        torch.compile(model, backend="loka", **arguments)(x)
    return caught.value


@pytest.mark.parametrize("arguments", [{}, {"options": {"max_autotune": False}}, {"mode": "max-autotune"}], ids=str)
def test_without_a_plan_it_says_how_to_give_one(arguments: dict) -> None:
    error = compile_with(Mlp(), torch.randn(3, 16), **arguments)
    assert isinstance(error.inner_exception, ArgumentError)
    assert 'options={"plan": "plan.json"}' in str(error)


def test_a_plan_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    error = compile_with(Mlp(), torch.randn(3, 16), options={"plan": tmp_path / "plam.json"})
    assert isinstance(error.inner_exception, PlanError)
    assert "plam.json could not be read" in str(error)


@pytest.mark.parametrize(
    ("other", "site", "words"),
    [
        (nn.Sequential(nn.Linear(16, 4)), "0", "The plan for Sequential names none of the 3 weights of this graph"),
        (nn.ModuleDict({"up": nn.Linear(16, 64)}), "up", "made for up.weight of shape .64, 16.; in this graph it has"),
    ],
    ids=["model", "shape"],
)
def test_a_plan_for_another_model_or_shape_is_refused(other: nn.Module, site: str, words: str) -> None:
    error = compile_with(Mlp(), torch.randn(3, 16), options={"plan": plan_for(other, [site])})
    assert isinstance(error.inner_exception, PlanError)
    with pytest.raises(PlanError, match=words):
        raise error.inner_exception


def test_two_models_that_fit_the_plan_are_refused() -> None:
    class Distilled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student, self.teacher = Mlp(), Mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.student(x) - self.teacher(x)

    model = Distilled()
    error = compile_with(model, torch.randn(3, 16), options={"plan": plan_for(model.student, ["up"])})
    assert "fits 2 modules of this graph" in str(error)
    assert "student" in str(error)
    assert "teacher" in str(error)


def test_a_kernel_that_cannot_run_here_is_refused_unless_emulated() -> None:
    model, x = Mlp(), torch.randn(3, 16)
    plan = plan_for(model, {"up": {"fprop": "rowwise"}})
    decisions = tuple(replace(d, kernel="hopper.linear.rowwise") if d.recipe else d for d in plan.decisions)
    plan = replace(plan, decisions=decisions)
    assert "The plan runs hopper.linear.rowwise on up.fprop" in str(compile_with(model, x, options={"plan": plan}))
    graph = torch.fx.symbolic_trace(model)
    with pytest.raises(PlanError):
        rewrite(graph, plan)
    assert rewrite(graph, plan, emulate=True) == ()  # no placeholders with sources here, but no refusal either


def test_an_unknown_option_or_mode_is_refused_with_the_nearest_one() -> None:
    model, x = Mlp(), torch.randn(3, 16)
    plan = plan_for(model, ["up"])
    error = compile_with(model, x, options={"plan": plan, "max_autotne": True})
    assert "'max_autotne'" in str(error)
    assert "'max_autotune'" in str(error)
    assert "'plan'" in str(compile_with(model, x, options={"plam": plan, "plan": plan}))
    assert "mode='max-autotun'" in str(compile_with(model, x, options={"plan": plan, "mode": "max-autotun"}))


# --- the way to Inductor ---


def test_the_backend_is_known_by_its_name() -> None:
    assert "loka" in torch.compiler.list_backends()
    assert "loka" in torch._dynamo.list_backends(None)


def test_mode_and_other_options_reach_inductor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    received = []

    def spy(gm, inputs, *, config_patches=None):
        received.append(config_patches)
        return gm.forward

    monkeypatch.setattr(inductor, "compile_fx", spy)
    model, x = Mlp(), torch.randn(3, 16)
    plan = plan_for(model, ["up"])
    plan.save(tmp_path / "plan.json")
    for arguments in (
        {"options": {"plan": plan}},
        {"options": {"plan": str(tmp_path / "plan.json"), "emulate": True, "epilogue-fusion": False}},
        {"options": {"plan": tmp_path / "plan.json", "mode": "max-autotune-no-cudagraphs"}},
    ):
        torch._dynamo.reset()
        torch.testing.assert_close(
            torch.compile(model, backend="loka", **arguments)(x), convert(copy.deepcopy(model), plan)(x)
        )
    assert received[:2] == [None, {"epilogue_fusion": False}]
    assert received[2]["max_autotune"] is True


class SmallWukong(nn.Module):
    """Linear, LayerNorm, SiLU and bare Parameters, as in the recommendation models that LoKA is for."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.Linear(24, 40), nn.LayerNorm(40)
        self.mix = nn.Parameter(torch.randn(40, 24) / 6)
        self.head = nn.Linear(24, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.norm(self.up(x))) @ self.mix
        return self.head(h + x).squeeze(-1)


SITES = ["up", "mix"]
# Sizes on both sides of 128, multiples of it and not.
SIZES = (64, 40, 128, 256, 100)


@functools.cache
def small_plan() -> Plan:
    return plan_for(SmallWukong(), SITES)


def batches(sizes: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(size, 24, generator=generator) for size in sizes]
    return [(x, (x[:, :3].sum(1) > 0).float()) for x in inputs]


def train(model: Callable, data: list[tuple[Tensor, Tensor]], rate: float = 0.01) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), rate)
    losses = []
    for x, y in data:
        optimizer.zero_grad()
        out = model(x)
        loss = (
            F.binary_cross_entropy_with_logits(out.float(), y)
            if isinstance(unwrapped(model), SmallWukong)
            else (out - y).square().mean()
        )
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def unwrapped(model: nn.Module) -> nn.Module:
    return getattr(model, "_orig_mod", model)


def difference(a: list[float], b: list[float]) -> float:
    """Largest relative difference of the losses.

    Two correct programs differ by 1e-7 until a sum in another order puts one element on the other side of an FP8
    rounding boundary; from then on by 1e-4 and more, the sooner the higher the learning rate.
    """
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


@needs_a_compiler
def test_a_hundred_steps_of_training_agree_with_eager_conversion(record_property) -> None:
    start, data = SmallWukong(), batches((64,) * 100)
    eager = train(convert(copy.deepcopy(start), small_plan()), data)
    exact = train(copy.deepcopy(start), data)
    counters.clear()
    runs = []
    for _ in range(2):
        model = copy.deepcopy(start)
        compiled = torch.compile(model, backend="loka", options={"plan": small_plan()}, fullgraph=True)
        runs.append(train(compiled, data))
    assert runs[0] == runs[1]  # deterministic
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    record_property(
        "compiled against eager, 100 steps, largest relative difference of the loss", difference(*runs[:1], eager)
    )
    assert difference(runs[0], eager) < 1e-3
    assert difference(eager, exact) > 1e-4  # FP8 is really there


@needs_a_compiler
def test_batch_sizes_do_not_recompile(tmp_path: Path) -> None:
    """wgrad's groups run along the batch: neither a multiple of a group nor a ragged end may become a guard."""
    start = SmallWukong()
    plan = plan_for(start, {"up": {"wgrad": "mxfp8"}, "mix": {"wgrad": "blockwise"}})
    plan.save(tmp_path / "plan.json")
    data = batches(tuple(size for size in SIZES for _ in range(2)))
    eager = train(convert(copy.deepcopy(start), plan), data)
    counters.clear()
    options = {"plan": tmp_path / "plan.json"}
    compiled = torch.compile(start, backend="loka", options=options, fullgraph=True)
    assert difference(train(compiled, data), eager) < 1e-3
    assert counters["stats"]["unique_graphs"] <= 2


@needs_a_compiler
def test_a_dynamic_batch_compiles_once_and_serves_inference() -> None:
    model = SmallWukong().eval()
    converted = convert(copy.deepcopy(model), small_plan())
    counters.clear()
    compiled = torch.compile(model, backend="loka", options={"plan": small_plan()}, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for x, _ in batches(SIZES):
            torch.testing.assert_close(compiled(x), converted(x), rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1


@needs_a_compiler
def test_autocast_inside_the_graph_is_followed() -> None:
    class Autocast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = SmallWukong()

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.net(x)

    model = Autocast()
    plan = plan_for(model, ["net.up"])
    converted = convert(copy.deepcopy(model), plan)
    (x, y), *_ = batches((64,))
    results = []
    for each in (torch.compile(model, backend="loka", options={"plan": plan}, fullgraph=True), converted):
        out = each(x)
        F.binary_cross_entropy_with_logits(out.float(), y).backward()
        results.append(out)
    assert results[0].dtype == results[1].dtype == torch.bfloat16
    # Inductor keeps fp32 between fused ops where eager rounds to bf16, and a rounding moved is an FP8 step elsewhere.
    assert (results[0] - results[1]).norm() / results[1].norm() < 0.05
    for got, want in zip(model.parameters(), converted.parameters(), strict=True):
        assert got.grad.dtype == torch.float32
        assert (got.grad - want.grad).norm() / want.grad.norm() < 0.1


@needs_a_compiler
def test_a_converted_model_compiles_without_the_backend_and_equals_it() -> None:
    start, data = SmallWukong(), batches((64,) * 10)
    eager = train(convert(copy.deepcopy(start), small_plan()), data)
    model = convert(copy.deepcopy(start), small_plan())
    counters.clear()
    assert difference(train(torch.compile(model, fullgraph=True), data), eager) < 1e-3
    assert counters["stats"]["unique_graphs"] == 1
    assert unreached(model) == ()


@needs_a_compiler
@pytest.mark.parametrize("recipe", ["rowwise", "mxfp8"])
def test_a_compiled_cast_is_the_cast(recipe: str) -> None:
    """Inductor may rewrite arithmetic, and the rounding lives on an addition and a subtraction that cancel."""
    x = torch.randn(40, 96) * torch.exp(4 * torch.randn(40, 96))
    x[0], x[1, 3], x[2, 5], x[3, 7], x[4] = 0, math.nan, math.inf, -math.inf, 1e-41
    specs = [RECIPES[recipe].operand(role) for role in ("input", "grad_output")]
    specs.append(RECIPES["tensorwise"].operand("grad_output"))  # e5m2, which has an infinity
    compiled = torch.compile(lambda t: [fake_quantize(t, spec) for spec in specs], fullgraph=True)
    for got, spec in zip(compiled(x), specs, strict=True):
        torch.testing.assert_close(got, fake_quantize(x, spec), rtol=0, atol=0, equal_nan=True)


def test_decisions_are_logged_when_a_graph_is_rewritten(caplog: pytest.LogCaptureFixture) -> None:
    model = Mlp()
    with caplog.at_level(logging.INFO, logger="loka.dispatch"):
        torch.compile(model, backend=Backend(plan_for(model, ["up"])))(torch.randn(3, 16))
    assert "up fprop: emulated.linear.rowwise (made by hand)" in caplog.text
