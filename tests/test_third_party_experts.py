"""Mixture-of-experts models of transformers, unchanged, from a probe to their experts on planned kernels.

Most families keep the experts of a layer in two 3-d Parameters and run them in one grouped product: stored [experts, n,
k], or, in GPT-OSS, transposed, interleaved and biased. Llama 4 sends every token through every expert in a `bmm`;
Switch has a linear layer per expert.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import loka
from loka.compiler import rewrite
from loka.dispatch.deciding.plan import Plan
from loka.dispatch.running.convert import planned_sites, unreached
from loka.dispatch.running.executions import kernel_executions, reset_kernel_executions
from loka.formats import PASSES
from tests.loka.made_compiled import Backend
from tests.made_moe_families import EXPERTS, GROUPED, batches, experts_of, train, trained

pytestmark = pytest.mark.third_party("transformers")

# Of a few steps of training, and of experts with a token or two, no narrow bound is shown to hold. What is judged here
# is what runs, not whether it may: `test_third_party_expert_errors` judges the errors.
BOUND = loka.Bound(row_error=1000.0)


@pytest.fixture(autouse=True)
def _from_zero() -> Iterator[None]:
    reset_kernel_executions()
    yield
    reset_kernel_executions()
    torch._dynamo.reset()


def planned(model: nn.Module, folder: Path, bound: loka.Bound = BOUND, steps: int = 8, **options: Any) -> Plan:
    """Probe a copy of a model and plan it."""
    with loka.probe(probed := copy.deepcopy(model), folder / "run.db", every=1, overhead=100.0, **options):
        train(probed, steps)
    return loka.plan(folder / "run.db", bound, device="cpu", assume_speedup=1.3)


def of_experts(executions: Any) -> dict[str, int]:
    return {name: times for name, times in executions.items() if ".grouped_linear." in name}


@pytest.mark.parametrize("family", GROUPED)
def test_the_experts_of_a_family_train_on_planned_kernels(family: str, tmp_path: Path) -> None:
    experts, model = experts_of(family), trained(family)
    plan = planned(model, tmp_path)
    sites = {f"{experts}.gate_up_proj", f"{experts}.down_proj"}
    for site in sites:
        for product in PASSES:
            decision = plan.decision(site, product)
            assert decision.request.op == "grouped_linear"
            assert decision.request.batch == EXPERTS
            assert decision.kernel.startswith("emulated.grouped_linear."), decision.why

    high = train(copy.deepcopy(model), 4)
    converted = copy.deepcopy(model)
    keys = {key: value.shape for key, value in converted.state_dict().items()}
    loka.convert(converted, plan)
    assert {key: value.shape for key, value in converted.state_dict().items()} == keys
    assert sites <= planned_sites(converted).keys()
    eager = train(converted, 4)
    assert eager != high  # FP8 really ran
    assert eager == pytest.approx(high, rel=0.02)
    assert unreached(converted) == ()
    assert sum(of_experts(kernel_executions()).values()) == len(sites) * len(PASSES) * 4

    found: list[str] = []

    def rewritten(graph: torch.fx.GraphModule, example_inputs: Any) -> torch.fx.GraphModule:
        found.extend(rewrite(graph, plan))
        return graph

    compiled = train(torch.compile(copy.deepcopy(model), backend=rewritten, fullgraph=True), 4)
    assert sorted(found) == sorted(planned_sites(converted))
    assert compiled == pytest.approx(eager, rel=2e-3)


def test_a_family_in_bf16_is_traced_whole_with_its_experts_as_planned(tmp_path: Path) -> None:
    experts, model = experts_of("GPT-OSS"), trained("GPT-OSS").to(torch.bfloat16)
    plan = planned(model, tmp_path)
    eager = train(loka.convert(copy.deepcopy(model), plan), 3)
    backend = Backend(plan)  # through AOT autograd, in which the kernels of all passes are traced
    assert train(torch.compile(model, backend=backend, fullgraph=True), 3) == pytest.approx(eager, rel=1e-2)
    assert {f"{experts}.gate_up_proj", f"{experts}.down_proj"} <= set(backend.sites)


def test_checkpointed_layers_recompute_their_experts_as_planned(tmp_path: Path) -> None:
    model = trained("Mixtral")
    plan = planned(model, tmp_path)
    found = []
    for checkpointed in (False, True):
        one = loka.convert(copy.deepcopy(model), plan)
        if checkpointed:
            one.gradient_checkpointing_enable()
        reset_kernel_executions()
        found.append((train(one, 3), sum(of_experts(kernel_executions()).values())))
    (losses, count), (again, more) = found
    assert again == losses
    assert (count, more) == (2 * 3 * 3, 2 * 4 * 3)  # the forward products run twice


@pytest.mark.parametrize(
    ("implementation", "op"), [("eager", "linear"), ("batched_mm", "bmm")], ids=["expert by expert", "batched"]
)
def test_experts_that_run_in_another_way_are_planned_in_that_way(implementation: str, op: str, tmp_path: Path) -> None:
    model: Any = trained("Mixtral")
    model.set_experts_implementation(implementation)
    plan = planned(model, tmp_path, steps=12)  # of the products of single experts, a step in a few has none to measure
    experts = [each for each in plan.decisions if "mlp.experts" in each.request.site]
    assert {each.request.op for each in experts} == {op}
    assert {each.recipe is None for each in experts} == {op == "bmm"}
    if op == "bmm":
        reasons = {each.reason for decision in experts for each in decision.rejected if "emulated" in each.kernel}
        assert reasons == {"dispatch runs linear products and those of experts; this one stays as written"}
    converted = loka.convert(copy.deepcopy(model), plan)
    assert train(converted, 3) == pytest.approx(train(model, 3), rel=0.02)
    assert unreached(converted) == ()


def test_a_plan_of_another_implementation_leaves_the_experts_and_names_them(tmp_path: Path) -> None:
    model: Any = trained("Mixtral")
    plan = planned(model, tmp_path)
    model.set_experts_implementation("batched_mm")
    converted = loka.convert(model, plan)
    train(converted, 2)
    experts = "model.layers.0.mlp.experts"
    assert unreached(converted) == (f"{experts}.down_proj", f"{experts}.gate_up_proj")
    assert not of_experts(kernel_executions())


@pytest.mark.parametrize("family", ["Mixtral", "GPT-OSS"])
def test_the_registered_implementation_is_reached_by_a_plan_whatever_the_model_ran_before(
    family: str, tmp_path: Path
) -> None:
    model: Any = trained(family)
    batch = batches(1)[0]
    grouped = model(input_ids=batch).logits
    model.set_experts_implementation("batched_mm")
    model.set_experts_implementation(loka.register_experts())
    assert loka.register_experts() == "loka" == model.config._experts_implementation
    assert torch.equal(model(input_ids=batch).logits, grouped)
    converted = loka.convert(copy.deepcopy(model), planned(model, tmp_path))
    train(converted, 2)
    assert unreached(converted) == ()
    assert sum(of_experts(kernel_executions()).values()) == 2 * len(PASSES) * 2


def test_experts_in_one_batched_product_stay_as_written_with_the_reason(tmp_path: Path) -> None:
    model = trained("Llama 4")
    plan = planned(model, tmp_path)
    for site in ("gate_up_proj", "down_proj"):
        decision = plan.decision(f"model.layers.0.feed_forward.experts.{site}", "fprop")
        assert (decision.request.op, decision.kernel) == ("bmm", "torch.native.bmm")
        assert any("this one stays as written" in each.reason for each in decision.rejected)
    assert plan.fp8_share() > 0.1  # attention and the shared expert
    converted = loka.convert(copy.deepcopy(model), plan)
    assert train(converted, 3) == pytest.approx(train(model, 3), rel=0.02)
    assert unreached(converted) == ()


def test_experts_that_are_linear_layers_are_linear_sites_each(tmp_path: Path) -> None:
    model = trained("Switch")
    plan = planned(model, tmp_path)
    experts = [each for each in plan.decisions if ".experts." in each.request.site and each.recipe is not None]
    assert len({each.request.site for each in experts}) >= 2
    assert {each.request.op for each in experts} == {"linear"}
    converted = loka.convert(copy.deepcopy(model), plan)
    assert train(converted, 4) == pytest.approx(train(model, 4), rel=0.02)
    # An expert to which the router has sent no token yet is waiting for one.
    assert all(".experts." in site for site in unreached(converted))


def test_under_a_budget_of_loss_the_forward_products_of_experts_stay_with_the_reason(tmp_path: Path) -> None:
    plan = planned(trained("Mixtral"), tmp_path, loka.Bound(loss=0.05), loss="cross_entropy")
    decision = plan.decision("model.layers.0.mlp.experts.down_proj", "fprop")
    assert decision.kernel == decision.baseline == "torch.grouped_mm.fp32"
    reasons = [each.reason for each in decision.rejected if each.kernel == "emulated.grouped_linear.rowwise"]
    assert len(reasons) == 1
    assert "no step takes what batches of matrices, experts and convolutions do to it" in reasons[0]
    assert plan.decision("lm_head", "fprop").recipe is not None
