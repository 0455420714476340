"""Products of experts under torch.compile: found in the graph, in one graph, the same numbers as eager conversion."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

from loka.dispatch.running.convert import convert, unreached
from loka.dispatch.running.executions import HIGH_PRECISION_PRODUCTS, kernel_executions, reset_kernel_executions
from loka.kernel_registry import grouped as definition
from loka.kernel_registry import torch_grouped
from tests.dispatch.made_conversion import needs_a_compiler, plan_for
from tests.dispatch.made_experts import FORMS, GROUPED, Experts, K, N, experts_plan, offsets_of
from tests.loka.made_compiled import Backend

COUNTS = (5, 0, 14, 2)
ENDS = offsets_of(COUNTS)
TOKENS = sum(COUNTS)
BF16 = torch.bfloat16  # Dynamo takes torch's grouped product in no other dtype


@pytest.fixture(autouse=True)
def _from_zero():
    reset_kernel_executions()
    counters.clear()
    yield
    reset_kernel_executions()
    torch._dynamo.reset()


def step(model, x, ends=ENDS):
    """Return the result and both gradients."""
    x = x.clone().requires_grad_()
    out = model(x, ends)
    weight = next(model.parameters())
    return [out.detach(), *torch.autograd.grad(out.square().sum(), (x, weight))]


def converted_step(model, plan, x):
    other = convert(copy.deepcopy(model), plan)
    return step(other, x)


@pytest.mark.parametrize("form", [name for name in FORMS if "cast" not in name])
def test_every_form_of_a_grouped_product_is_found_and_is_the_planned_one(form):
    model, x = Experts(form, dtype=BF16), torch.randn(TOKENS, K).to(BF16)
    plan = experts_plan(model, ["w"])
    backend = Backend(plan)
    got = step(torch.compile(model, backend=backend, fullgraph=True), x)
    assert backend.found == [("w",)]
    assert kernel_executions() == {}  # this backend runs what was traced without counting
    for one, right in zip(got, converted_step(model, plan, x), strict=True):
        torch.testing.assert_close(one, right)


@pytest.mark.parametrize(
    "product",
    [
        lambda m, x, ends: F.grouped_mm(x.expand(4, TOKENS, K), m.w.mT),
        lambda m, x, ends: F.grouped_mm(x, m.w.mT, offs=ends, out_dtype=BF16),
        lambda m, x, ends: F.linear(x, m.w[1]),
    ],
    ids=["without offsets", "another dtype of the result", "one expert"],
)
def test_another_product_with_the_same_weight_is_left_and_named(product, caplog):
    model, x = Experts(dtype=BF16), torch.randn(TOKENS, K).to(BF16)
    model.product = product
    backend = Backend(experts_plan(model, ["w"]))
    with torch.no_grad():
        got = torch.compile(model, backend=backend, fullgraph=True)(x, ENDS)
        assert torch.equal(got, model(x, ENDS))
    assert backend.sites == []
    assert "w is planned in FP8, but its product in this graph" in caplog.text


def test_experts_planned_one_by_one_are_left_where_they_run_in_one_call():
    model, x = Experts(dtype=BF16), torch.randn(TOKENS, K).to(BF16)
    backend = Backend(plan_for(model, ["w"]))
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(model, backend=backend, fullgraph=True)(x, ENDS)[: ENDS[-1]], model(x, ENDS)[: ENDS[-1]]
        )
    assert backend.sites == []


class Layer(nn.Module):
    """A router, experts and a shared expert, as a transformer's layer has them; every token goes to one expert."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(K, 4, bias=False)
        self.shared = nn.Linear(K, K)
        self.up, self.down = nn.Parameter(torch.randn(4, N, K) / 4), nn.Parameter(torch.randn(4, N, K) / 4)

    def forward(self, x):
        score, expert = self.router(x).softmax(-1).max(-1)
        expert, order = torch.sort(expert)
        ends = torch.histc(expert.float(), bins=4, min=0, max=3).cumsum(0).to(torch.int32)
        hidden = F.silu(F.grouped_mm(x[order], self.up.mT, offs=ends))
        out = F.grouped_mm(hidden, self.down, offs=ends)
        return x + self.shared(x) + torch.empty_like(out).index_copy(0, order, out) * score.unsqueeze(-1)


@needs_a_compiler
def test_a_layer_trains_in_one_graph_for_any_number_of_tokens_and_counts_its_kernels():
    model = nn.Sequential(Layer()).to(BF16)
    plan = experts_plan(model, ["0.up", "0.down"], {"fprop": "rowwise", "wgrad": "blockwise"})
    eager = convert(copy.deepcopy(model), plan)
    compiled = torch.compile(model, backend="loka", options={"plan": plan}, fullgraph=True)
    batches = [torch.randn(rows, K).to(BF16) for rows in (12, 20, 33, 7, 64)]
    for batch in batches:
        torch._dynamo.mark_dynamic(batch, 0)
    found = []
    for one in (compiled, eager):
        reset_kernel_executions()
        optimizer = torch.optim.SGD(one.parameters(), lr=0.05)
        losses = []
        for batch in batches:
            loss = one(batch).float().square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        found.append((losses, kernel_executions()))
    (losses, ran), (right, counted) = found
    assert losses == pytest.approx(right, rel=2e-2)
    # The input needs no gradient, so `up` has no dgrad; the router and the shared expert are not planned.
    assert ran == counted == {GROUPED[0]: 10, GROUPED[2]: 10, HIGH_PRECISION_PRODUCTS: 5}
    assert unreached(eager) == ()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_another_backend_keeps_torchs_own_product_of_a_converted_model_and_it_is_named():
    model, x = Experts(dtype=BF16), torch.randn(TOKENS, K).to(BF16)
    exact = model(x, ENDS)
    convert(model, experts_plan(model, ["w"]))
    got = torch.compile(model, backend="aot_eager", fullgraph=True)(x, ENDS)
    torch.testing.assert_close(got, exact)
    assert unreached(model) == ("w",)


def test_another_backend_runs_the_operator_of_a_converted_model_as_planned():
    model, x = Experts("the operator", dtype=BF16), torch.randn(TOKENS, K).to(BF16)
    convert(model, experts_plan(model, ["w"]))
    right = step(model, x)
    got = step(torch.compile(model, backend="aot_eager", fullgraph=True), x)
    assert all(torch.equal(one, other) for one, other in zip(got, right, strict=True))


@pytest.mark.parametrize("kernel", [definition.blockwise, definition.native, torch_grouped.fp32, torch_grouped.bf16])
@pytest.mark.parametrize("product", ["fprop", "wgrad"])
def test_a_kernel_that_reads_the_offsets_is_one_operator_of_a_graph(kernel, product):
    a, b = torch.randn(TOKENS, K), torch.randn(TOKENS, N) if product == "wgrad" else torch.randn(4, N, K)

    def run(a, b, ends):
        return kernel(a, b, ends, product=product, out_dtype=torch.float32) * 2

    graphs = []

    def backend(gm, example_inputs):
        graphs.append(gm)
        return gm

    got = torch.compile(run, backend=backend, fullgraph=True, dynamic=True)(a, b, ENDS)
    assert torch.equal(got, run(a, b, ENDS))
    targets = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert sum("loka" in target for target in targets) == 1
    operator = getattr(torch.ops.loka, f"{kernel.__module__.rpartition('.')[2]}_{kernel.__name__}")
    options = {"product": product, "out_dtype": torch.float32}
    torch.library.opcheck(operator, (a, b, ENDS), options, test_utils=("test_schema", "test_faketensor"))
