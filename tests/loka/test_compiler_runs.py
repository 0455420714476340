"""The backend `loka` as it is called: options, refusals, training, batch sizes, logs."""

import copy
import functools
import logging
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch._inductor.compile_fx as inductor
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters

from loka.compiler import rewrite
from loka.dispatch.deciding.plan import Plan
from loka.dispatch.running.convert import convert, unreached
from loka.errors import ArgumentError, PlanError
from loka.formats import PASSES, RECIPES
from loka.quantize import fake_quantize
from tests.dispatch.made_conversion import MIXED, needs_a_compiler, plan_for
from tests.dispatch.made_converted import Mlp
from tests.loka.made_compiled import Backend, SmallWukong, train

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


class Experts(nn.Module):
    """A matrix for each expert, and the rows that it gets: how many, only data say."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 40, 32) / 6)

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        parts = x.split(counts.tolist())
        return torch.cat([F.linear(part, self.w[expert]) for expert, part in enumerate(parts)])


@pytest.mark.parametrize(
    ("recipe", "by_hand"),
    [
        *((recipe, True) for recipe in (None, "tensorwise", "rowwise", "blockwise", "mxfp8")),
        *((recipe, False) for recipe in (None, "blockwise")),  # the same layers, found in the graph
    ],
)
def test_experts_of_as_many_rows_as_data_say_are_one_graph(recipe: str | None, by_hand: bool) -> None:
    model, x = Experts(), torch.randn(12, 32)
    passes = dict.fromkeys(PASSES, recipe) if recipe else MIXED
    plan = plan_for(model, {"w": passes})
    converted = convert(copy.deepcopy(model), plan)
    plain = copy.deepcopy(model)
    backend = Backend(plan)
    counters.clear()
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = torch.compile(
            convert(model, plan) if by_hand else model, backend="aot_eager" if by_hand else backend, fullgraph=True
        )
        for counts in (torch.tensor([5, 3, 4]), torch.tensor([12, 0, 0]), torch.tensor([0, 11, 1])):
            for each in (compiled, converted, plain):
                each.zero_grad()
            outs = [each(x, counts) for each in (compiled, converted, plain)]
            for out in outs:
                out.square().sum().backward()
            torch.testing.assert_close(outs[0], outs[1], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(model.w.grad, converted.w.grad, rtol=1e-5, atol=1e-5)
            assert 0.005 < (outs[0] - outs[2]).norm() / outs[2].norm() < 0.1  # FP8 it was
            assert not model.w.grad[counts == 0].any()
    assert counters["stats"]["unique_graphs"] == 1
    assert by_hand or backend.found == [("w",) * 3]


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
