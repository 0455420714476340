"""Plans with a kernel for few rows and one for many, running: eager, compiled, monitored and frozen."""

import copy
import io
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

import loka
from loka.dispatch.deciding.by_rows import by_rows
from loka.dispatch.deciding.decide import Candidate
from loka.dispatch.freezing.freeze import freeze
from loka.dispatch.monitoring.effect import put_into_effect
from loka.dispatch.monitoring.guard import Guard, Patience, Reading
from loka.dispatch.monitoring.kernel_check import KernelCheck
from loka.dispatch.monitoring.ladder import ladders
from loka.dispatch.running.convert import convert, planned_sites, unreached
from loka.dispatch.running.executions import HIGH_PRECISION_PRODUCTS, kernel_executions, reset_kernel_executions
from loka.dispatch.running.grouped import grouped
from loka.dispatch.running.linear import linear
from loka.hardware import DeviceInfo
from loka.kernel_registry.registry import default_registry
from loka.probes.capturing.products import Gemm
from loka.stepping_aside import stepping_aside
from tests.dispatch.made_conversion import emulated, needs_a_compiler
from tests.dispatch.made_experts import Experts, K, N, offsets_of
from tests.dispatch.made_ranges import few_and_many, plan_of
from tests.loka.made_compiled import Backend

CPU = DeviceInfo(type="cpu", name="test")
FEW, MANY = emulated("tensorwise"), emulated("rowwise")


@pytest.fixture(autouse=True)
def _from_zero():
    reset_kernel_executions()
    counters.clear()
    yield
    reset_kernel_executions()
    torch._dynamo.reset()


class Body(nn.Module):
    """Two layers that a server calls with a batch of sequences, prefilled or decoded."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return x + self.down(F.silu(self.up(x)))


def alone(model, x, recipe, site):
    """The same with one kernel for all rows of a site."""
    made = few_and_many(site, recipe, recipe)
    single = replace(made, kernel=emulated(recipe), recipe=recipe, ranges=None)
    return convert(copy.deepcopy(model), plan_of(model, single))(x)


# --- eager ---


@pytest.mark.parametrize(
    ("shape", "few"), [((16, 16), True), ((17, 16), False), ((2, 8, 16), True), ((3, 6, 16), False), ((16,), True)]
)
def test_a_call_runs_on_the_kernel_of_its_rows(shape, few):
    model, x = Body(), torch.randn(shape)
    converted = convert(copy.deepcopy(model), plan_of(model, few_and_many("up", "tensorwise", "rowwise")))
    with torch.no_grad():
        out = converted(x)
        assert kernel_executions() == {FEW if few else MANY: 1}
        assert torch.equal(out, alone(model, x, "tensorwise" if few else "rowwise", "up"))
        assert not torch.equal(out, alone(model, x, "rowwise" if few else "tensorwise", "up"))
    assert unreached(converted) == ()


def test_no_rows_are_few():
    model = Body()
    convert(model, plan_of(model, few_and_many("up", "tensorwise", "rowwise")))
    with torch.no_grad():
        assert model(torch.randn(0, 16)).shape == (0, 16)
    assert set(kernel_executions()) == {FEW}


def test_a_range_in_high_precision_runs_in_it():
    model, x = Body(), torch.randn(8, 16)
    converted = convert(copy.deepcopy(model), plan_of(model, few_and_many("up", None, "rowwise")))
    with torch.no_grad():
        torch.testing.assert_close(converted(x), model(x))
        converted(torch.randn(80, 16))
    assert kernel_executions() == {HIGH_PRECISION_PRODUCTS: 1, MANY: 1}


def test_gradients_are_those_of_the_passes_that_are_not_planned():
    x, weight = torch.randn(4, 16, requires_grad=True), torch.randn(8, 16, requires_grad=True)
    out = linear(x, weight, None, by_rows(FEW, 4, MANY), "", "")
    for got, right in zip(
        torch.autograd.grad(out.sum(), (x, weight)), (weight.sum(0).expand(4, 16), x.sum(0).expand(8, 16)), strict=True
    ):
        torch.testing.assert_close(got, right)
    assert kernel_executions() == {FEW: 1, HIGH_PRECISION_PRODUCTS: 2}


def test_a_sampled_step_shows_the_models_own_product():
    model, x = Body(), torch.randn(8, 16)
    converted = convert(copy.deepcopy(model), plan_of(model, few_and_many("up", "tensorwise", "rowwise")))
    with stepping_aside(), torch.no_grad():
        assert torch.equal(converted(x), model(x))
    assert kernel_executions() == {}


def test_the_kernel_of_few_rows_that_fails_leaves_that_of_many():
    model, x = Body(), torch.randn(8, 16)
    plan = plan_of(model, few_and_many("up", "tensorwise", "rowwise"))
    converted = convert(copy.deepcopy(model), plan)
    put_into_effect(converted, plan, {("up", "fprop"): by_rows("", 16, MANY)})
    assert planned_sites(converted)["up"].fprop == f" <= 16 < {MANY}"
    with torch.no_grad():
        torch.testing.assert_close(converted(x), model(x))
        converted(torch.randn(20, 16))
    assert kernel_executions() == {HIGH_PRECISION_PRODUCTS: 1, MANY: 1}


def test_weights_are_kept_for_both_kernels():
    model = Body()
    plan = plan_of(model, few_and_many("up", "tensorwise", "rowwise"))
    plain, cached = (convert(copy.deepcopy(model), plan, cache_weights=flag) for flag in (False, True))
    for rows in (8, 80, 8):
        x = torch.randn(rows, 16)
        assert torch.equal(plain(x), cached(x))


def test_a_converted_model_survives_a_copy_and_a_file():
    model, x = Body(), torch.randn(8, 16)
    converted = convert(model, plan_of(model, few_and_many("up", "tensorwise", "rowwise")))
    stream = io.BytesIO()
    torch.save(converted, stream)
    stream.seek(0)
    for other in (copy.deepcopy(converted), torch.load(stream, weights_only=False)):
        assert torch.equal(other(x), converted(x))


def test_experts_run_on_the_kernel_of_the_tokens_of_a_call():
    few, many = "emulated.grouped_linear.tensorwise", "emulated.grouped_linear.rowwise"
    model = Experts(experts=4)
    decision = few_and_many("w", "tensorwise", "rowwise", op="grouped_linear")
    converted = convert(copy.deepcopy(model), plan_of(model, decision))
    for counts, kernel in (((4, 0, 12, 0), few), ((4, 0, 13, 0), many), ((0, 0, 0, 1), few)):
        reset_kernel_executions()
        x, ends = torch.randn(sum(counts), K), offsets_of(counts)
        with torch.no_grad():
            out = converted(x, ends)
            assert kernel_executions() == {kernel: 1}
            assert torch.equal(out, grouped(x, model.w, ends, kernel, "", ""))


# --- compiled ---

SIZES = (2048, 8, 100, 5, 1024, 12, 300)


def plan_of_body(model):
    return plan_of(model, few_and_many("up", "tensorwise", "rowwise"), few_and_many("down", None, "rowwise"))


@pytest.mark.parametrize(
    ("how", "dynamic", "graphs"), [("rewritten", True, 2), ("converted", True, 2), ("rewritten", None, 3)]
)
def test_all_batch_sizes_take_a_graph_for_few_rows_and_one_for_many(how, dynamic, graphs):
    """Torch makes the first graph for one size alone where nobody tells it that sizes differ."""
    model = Body()
    plan = plan_of_body(model)
    eager = convert(copy.deepcopy(model), plan)
    backend = "aot_eager" if how == "converted" else Backend(plan)
    one = eager if how == "converted" else copy.deepcopy(model)
    compiled = torch.compile(one, backend=backend, fullgraph=True, dynamic=dynamic)
    with torch.no_grad():
        for rows in SIZES:
            x = torch.randn(rows, 16)
            torch.testing.assert_close(compiled(x), eager(x))
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


@needs_a_compiler
def test_inductor_compiles_two_graphs_that_count_their_kernels():
    model = Body()
    plan = plan_of_body(model)
    eager = convert(copy.deepcopy(model), plan)
    compiled = torch.compile(model, backend="loka", options={"plan": plan}, fullgraph=True, dynamic=True)
    found = []
    for one in (compiled, eager):
        reset_kernel_executions()
        with torch.no_grad():
            results = [one(torch.linspace(-1, 1, rows * 16).view(rows, 16)) for rows in SIZES[:5]]
        found.append((results, kernel_executions()))
    for got, right in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(got, right, rtol=2e-2, atol=2e-2)
    assert found[0][1] == found[1][1] == {FEW: 2, MANY: 6, HIGH_PRECISION_PRODUCTS: 2}
    assert counters["stats"]["unique_graphs"] == 2


def test_experts_in_a_graph_take_the_kernel_of_their_tokens():
    model = Experts(dtype=torch.bfloat16, experts=4)  # Dynamo takes torch's grouped product in no other dtype
    plan = plan_of(model, few_and_many("w", "tensorwise", "rowwise", op="grouped_linear", dtype="bfloat16"))
    eager = convert(copy.deepcopy(model), plan)
    compiled = torch.compile(model, backend=Backend(plan), fullgraph=True, dynamic=True)
    with torch.no_grad():
        for counts in ((4, 0, 11, 0), (40, 0, 12, 3), (1, 1, 1, 0), (16, 16, 16, 16), (2, 2, 1, 0)):
            x, ends = torch.randn(sum(counts), K).bfloat16(), offsets_of(counts)
            assert torch.equal(compiled(x, ends), eager(x, ends))
    assert counters["stats"]["unique_graphs"] == 2


def test_of_a_number_of_rows_that_data_decide_the_kernel_of_many_serves_all():
    weight = torch.randn(8, 16)

    def chosen(x):
        return linear(x[x[:, 0] > 0], weight, None, by_rows(FEW, 28, ""), "", "")

    x = torch.randn(30, 16)
    with torch.no_grad(), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        got = torch.compile(chosen, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(got, F.linear(x[x[:, 0] > 0], weight))
    assert not torch.equal(got, chosen(x))


# --- monitored ---

PATIENCE = Patience(clean_steps=1, max_flips=1)


def gemm(a, b):
    return Gemm(op="linear", batch=1, m=a.shape[1], n=b.shape[1], k=a.shape[2], a=a, b=b)


def candidate(kernel, code, error=0.02):
    name = kernel.rpartition(".")[2]
    return Candidate(kernel=kernel, recipe=name, code=code, reason="made by hand", time_us=1.0, error_upper=error)


def ladder_of(few, many, rejected_few=(), rejected_many=()):
    made = few_and_many("up", few, many)
    ranges = (replace(made.ranges[0], rejected=rejected_few), replace(made.ranges[1], rejected=rejected_many))
    (ladder,) = ladders(plan_of(Body(), replace(made, ranges=ranges)), CPU)
    return ladder


def test_a_ladder_begins_on_both_kernels_and_goes_on_with_one_for_all_rows():
    third = emulated("blockwise")
    ladder = ladder_of(
        "tensorwise",
        "rowwise",
        (candidate(MANY, "no_gain"), candidate(third, "over_bound")),
        (candidate(FEW, "slower"), candidate(third, "slower")),
    )
    assert [rung.kernel for rung in ladder.rungs] == [by_rows(FEW, 16, MANY), MANY, FEW, ""]
    assert ladder.rungs[0].recipes == ("tensorwise", "rowwise")
    assert ladder.rungs[0].words == f"{FEW} for up to 16 rows and {MANY} for more"
    assert ladder.rungs[0].limit == ladder.rungs[1].limit == 0.05


def test_a_ladder_of_one_range_stays_on_its_rows():
    few = ladder_of("tensorwise", None, (candidate(MANY, "slower"),))
    assert [rung.kernel for rung in few.rungs] == [by_rows(FEW, 16, ""), by_rows(MANY, 16, ""), ""]
    many = ladder_of(None, "rowwise", (), (candidate(FEW, "tie"),))
    assert [rung.kernel for rung in many.rungs] == [by_rows("", 16, MANY), by_rows("", 16, FEW), ""]


def test_a_guard_asks_for_the_recipes_of_both_and_goes_by_the_worse():
    guard = Guard(ladder_of("tensorwise", "rowwise", (candidate(MANY, "slower"),)), PATIENCE)
    assert guard.wanted == ("tensorwise", "rowwise")
    step = 0
    while not guard.position and step < 50:
        step += 1
        list(guard.saw(step, Reading(errors={"tensorwise": 0.2, "rowwise": 0.01}, operands={})))
    assert 1 < step < 50
    assert guard.rung.kernel == MANY  # which is within its limit


def test_a_fault_of_either_kernel_leaves_the_rung_of_both():
    for broken, left in ((FEW, MANY), (MANY, FEW)):
        guard = Guard(
            ladder_of("tensorwise", "rowwise", (candidate(MANY, "slower"),), (candidate(FEW, "slower"),)),
            PATIENCE,
        )
        (event,) = guard.fault(3, broken, "it broke")
        assert guard.rung.kernel == left
        assert "for up to 16 rows" in event.message


def test_the_check_of_a_kernel_looks_at_that_of_the_rows_of_the_call(monkeypatch):
    few, many = "torch.scaled_mm.tensorwise", "emulated.linear.rowwise"
    made = ladder_of("tensorwise", "rowwise")
    rung = replace(made.rungs[0], kernel=by_rows(few, 16, many))
    seen = []
    monkeypatch.setattr("loka.dispatch.monitoring.kernel_check.load", lambda name: seen.append(name))
    for rows in (8, 80):
        a, b = torch.randn(1, rows, 16), torch.randn(1, 32, 16)
        KernelCheck().look(made, rung, gemm(a, b))
    assert seen == [few]  # an emulated kernel is the definition itself


def test_a_monitored_model_is_moved_from_both_kernels_to_one_that_works():
    model = Body()
    made = few_and_many("up", "tensorwise", "rowwise")
    ranges = (replace(made.ranges[0], rejected=(candidate(MANY, "slower"),)), made.ranges[1])
    plan = plan_of(model, replace(made, ranges=ranges))
    convert(model, plan)
    with loka.monitor(model, plan, every=1, overhead=100.0) as monitor, torch.no_grad():
        for step in range(12):
            x = torch.randn(8 if step % 2 else 80, 16)
            x[0] *= 1e5  # lost under one scale for all rows
            model(x)
    assert planned_sites(model)["up"].fprop == MANY
    assert monitor.changed == {"up.fprop": MANY}


# --- frozen ---


@pytest.fixture
def second(monkeypatch):
    """Put a kernel into the registry once more, by another name: a second one under the same recipe."""

    def put(name):
        registry = default_registry()
        spec = replace(registry.get(name), name=name.replace("emulated", "other"))
        monkeypatch.setitem(registry._specs, spec.name, spec)
        return spec.name

    return put


def test_a_weight_that_both_kernels_read_alike_is_stored_once(second):
    alike, model = second(MANY), Body().eval()
    made = few_and_many("up", "rowwise", "rowwise")
    few = replace(made.ranges[0], kernel=alike)
    plan = plan_of(model, replace(made, kernel=by_rows(alike, 16, MANY), ranges=(few, made.ranges[1])))
    converted = convert(copy.deepcopy(model), plan)
    frozen = freeze(copy.deepcopy(model), plan)
    assert frozen.kernels == {"up": by_rows(alike, 16, MANY)}
    assert frozen.bytes_after < frozen.bytes_before
    with torch.no_grad():
        for rows, kernel in ((8, alike), (80, MANY)):
            x = torch.randn(rows, 16)
            right = converted(x)
            reset_kernel_executions()
            assert torch.equal(frozen.model(x), right)
            assert kernel_executions() == {kernel: 1}
        compiled = torch.compile(frozen.model, backend="aot_eager", fullgraph=True, dynamic=True)
        for rows in SIZES[:5]:
            x = torch.randn(rows, 16)
            torch.testing.assert_close(compiled(x), frozen.model(x))
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize(
    ("few", "many", "reason"),
    [
        ("tensorwise", "rowwise", "read its weight in two forms, and one is stored"),
        (None, "rowwise", "the plan keeps its calls with few rows in high precision"),
        ("rowwise", None, "the plan keeps its calls with many rows in high precision"),
    ],
)
def test_a_layer_that_would_need_its_weight_twice_is_left_with_the_reason(few, many, reason):
    model, x = Body().eval(), torch.randn(8, 16)
    right = model(x)
    frozen = freeze(model, plan_of(model, few_and_many("up", few, many)))
    assert frozen.kernels == {}
    assert reason in frozen.left["up"]
    assert "by_rows=False" in frozen.left["up"]
    assert torch.equal(frozen.model(x), right)


def test_experts_that_both_kernels_read_alike_are_stored_once(second):
    many = "emulated.grouped_linear.rowwise"
    few, model = second(many), Experts(experts=4)
    made = few_and_many("w", "rowwise", "rowwise", op="grouped_linear")
    ranges = tuple(
        replace(each, kernel=kernel, request=replace(each.request, n=N, k=K))
        for each, kernel in zip(made.ranges, (few, many), strict=True)
    )
    request = replace(made.request, n=N, k=K)
    plan = plan_of(model, replace(made, request=request, kernel=by_rows(few, 16, many), ranges=ranges))
    converted, frozen = convert(copy.deepcopy(model), plan), freeze(copy.deepcopy(model), plan)
    assert frozen.left == {}
    assert frozen.bytes_after < frozen.bytes_before
    with torch.no_grad():
        for counts, kernel in (((4, 0, 12, 0), few), ((4, 0, 13, 0), many)):
            x, ends = torch.randn(sum(counts), K), offsets_of(counts)
            right = converted(x, ends)
            reset_kernel_executions()
            assert torch.equal(frozen.model(x, ends), right)
            assert kernel_executions() == {kernel: 1}


def test_experts_that_would_need_their_weights_twice_are_left_with_the_reason():
    model = Experts(experts=4)
    made = few_and_many("w", "tensorwise", "blockwise", op="grouped_linear")
    assert "read its weight in two forms" in freeze(copy.deepcopy(model), plan_of(model, made)).left["w"]
