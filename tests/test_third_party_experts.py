"""Mixture-of-experts models of transformers, unchanged, from a probe to their experts on planned kernels.

Most families keep the experts of a layer in two 3-d Parameters and run them in one grouped product: stored [experts, n,
k], or, in GPT-OSS, transposed, interleaved and biased. Llama 4 sends every token through every expert in a `bmm`;
Switch has a linear layer per expert.
"""

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import loka
from loka.compiler import rewrite
from loka.dispatch.convert import planned_sites, unreached
from loka.dispatch.executions import kernel_executions, reset_kernel_executions
from loka.dispatch.plan import Plan
from loka.formats import PASSES
from tests.loka.made_compiled import Backend

pytestmark = pytest.mark.third_party("transformers")

BOUND = loka.Bound(row_error=0.3)
VOCABULARY, EXPERTS = 64, 4
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "use_cache": False,
}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
DEEPSEEK = {"num_hidden_layers": 2, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, **LATENT}
# name -> (class without "Config" and "ForCausalLM", what else it needs, the module of its experts)
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "Mixtral": ("Mixtral", {}, "model.layers.0.mlp.experts"),
    "Qwen3-MoE": ("Qwen3Moe", {"head_dim": 16}, "model.layers.0.mlp.experts"),
    "OLMoE": ("Olmoe", {}, "model.layers.0.mlp.experts"),
    "DeepSeek-V3": ("DeepseekV3", {"n_shared_experts": 1, **DEEPSEEK}, "model.layers.1.mlp.experts"),
    "GPT-OSS": ("GptOss", {"head_dim": 16}, "model.layers.0.mlp.experts"),
}


@pytest.fixture(autouse=True)
def _from_zero() -> Iterator[None]:
    reset_kernel_executions()
    yield
    reset_kernel_executions()
    torch._dynamo.reset()


def made(name: str, more: dict[str, Any]) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    # Where a family has images, too, the configuration of its language model stands apart.
    config_class = getattr(transformers, f"{name}TextConfig", None) or getattr(transformers, f"{name}Config")
    config = config_class(**{**SIZES, **more})
    config._attn_implementation = "eager"
    model: nn.Module = getattr(transformers, f"{name}ForCausalLM")(config)
    return model


def batches(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, VOCABULARY, (2, 12), generator=generator) for _ in range(count)]


def train(model: nn.Module, steps: int) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for batch in itertools.islice(itertools.cycle(batches()), steps):
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def planned(model: nn.Module, folder: Path, bound: loka.Bound = BOUND, **options: Any) -> Plan:
    """Probe a copy of a model and plan it."""
    with loka.probe(probed := copy.deepcopy(model), folder / "run.db", every=1, overhead=100.0, **options):
        train(probed, 8)
    return loka.plan(folder / "run.db", bound, device="cpu", assume_speedup=1.3)


def of_experts(executions: Any) -> dict[str, int]:
    return {name: times for name, times in executions.items() if ".grouped_linear." in name}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_experts_of_a_family_train_on_planned_kernels(family: str, tmp_path: Path) -> None:
    name, more, experts = FAMILIES[family]
    model = made(name, more)
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
    name, more, experts = FAMILIES["GPT-OSS"]
    model = made(name, more).to(torch.bfloat16)
    plan = planned(model, tmp_path)
    eager = train(loka.convert(copy.deepcopy(model), plan), 3)
    backend = Backend(plan)  # through AOT autograd, in which the kernels of all passes are traced
    assert train(torch.compile(model, backend=backend, fullgraph=True), 3) == pytest.approx(eager, rel=1e-2)
    assert {f"{experts}.gate_up_proj", f"{experts}.down_proj"} <= set(backend.sites)


def test_checkpointed_layers_recompute_their_experts_as_planned(tmp_path: Path) -> None:
    model = made("Mixtral", {})
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
    model: Any = made("Mixtral", {})
    model.set_experts_implementation(implementation)
    plan = planned(model, tmp_path)
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
    model: Any = made("Mixtral", {})
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
    name, more, _ = FAMILIES[family]
    model: Any = made(name, more)
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
    model = made("Llama4", {"head_dim": 16, "num_experts_per_tok": 1, "intermediate_size_mlp": 48})
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
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "d_ff": 48, "d_kv": 16, "num_heads": 2, "num_experts": EXPERTS}
    layers = dict.fromkeys(("num_layers", "num_decoder_layers"), 1)
    sparse = dict.fromkeys(("num_sparse_encoder_layers", "num_sparse_decoder_layers"), 1)
    config = transformers.SwitchTransformersConfig(**sizes, **layers, **sparse, dropout_rate=0.0)
    config.decoder_start_token_id = 0
    model = transformers.SwitchTransformersForConditionalGeneration(config)
    plan = planned(model, tmp_path)
    experts = [each for each in plan.decisions if ".experts." in each.request.site and each.recipe is not None]
    assert len({each.request.site for each in experts}) >= 2
    assert {each.request.op for each in experts} == {"linear"}
    converted = loka.convert(copy.deepcopy(model), plan)
    assert train(converted, 4) == pytest.approx(train(model, 4), rel=0.02)
    # An expert to which the router has sent no token yet is waiting for one.
    assert all(".experts." in site for site in unreached(converted))


def test_under_a_budget_of_loss_the_forward_products_of_experts_stay_with_the_reason(tmp_path: Path) -> None:
    plan = planned(made("Mixtral", {}), tmp_path, loka.Bound(loss=0.05), loss="cross_entropy")
    decision = plan.decision("model.layers.0.mlp.experts.down_proj", "fprop")
    assert decision.kernel == decision.baseline == "torch.grouped_mm.fp32"
    reasons = [each.reason for each in decision.rejected if each.kernel == "emulated.grouped_linear.rowwise"]
    assert len(reasons) == 1
    assert "no step takes what batches of matrices, experts and convolutions do to it" in reasons[0]
    assert plan.decision("lm_head", "fprop").recipe is not None
