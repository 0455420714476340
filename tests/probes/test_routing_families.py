"""The routing of mixture-of-experts models of transformers: batched and padded, against every prompt run alone.

The reference knows nothing of padding, batches or caches: it runs one prompt at a time and counts what the routers
give, family by family. The first call of a router is its prefill.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import loka
from loka.probes.routing.sites import routing_sites
from loka.probes.routing.trace import RoutingTrace

pytestmark = pytest.mark.third_party("transformers")

VOCABULARY, EXPERTS = 64, 8
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
ENCODER_DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "num_experts": EXPERTS,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 2,
}
SWITCH = {"d_kv": 16, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2, "expert_capacity": 64}
SPARSE = {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 2}
NLLB = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in
        (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32), ("sparse_step", 1))}  # fmt: skip
SCALE = {"moe_eval_capacity_token_fraction": 1.0, "max_position_embeddings": 128}

Chosen = Callable[[Any], Tensor]  # of a router's output: how many tokens each expert got
_index: Chosen = lambda output: torch.bincount(output[2].flatten(), minlength=EXPERTS)  # noqa: E731
_scores: Chosen = lambda output: (output[0] > 0).sum(0)  # noqa: E731
_one_hot: Chosen = lambda output: output[0].sum((0, 1))  # noqa: E731
_weights: Chosen = lambda output: (output[1] > 0).sum(0)  # noqa: E731
_sizes: Chosen = lambda output: torch.tensor(output[3])  # noqa: E731

# name -> (class without "Config", class of the model, what else it needs, router, how it tells, layer numbers)
FAMILIES: dict[str, tuple[str, str, dict[str, Any], str, Chosen, tuple[int, ...]]] = {
    "Mixtral": ("Mixtral", "MixtralForCausalLM", SIZES, "Router", _index, (0, 1)),
    "Qwen2-MoE": (
        "Qwen2Moe",
        "Qwen2MoeForCausalLM",
        {**SIZES, "shared_expert_intermediate_size": 16},
        "Router",
        _index,
        (0, 1),
    ),
    "Qwen3-MoE": ("Qwen3Moe", "Qwen3MoeForCausalLM", {**SIZES, "head_dim": 16}, "Router", _index, (0, 1)),
    "OLMoE": ("Olmoe", "OlmoeForCausalLM", SIZES, "Router", _index, (0, 1)),
    "GPT-OSS": ("GptOss", "GptOssForCausalLM", {**SIZES, "head_dim": 16}, "Router", _index, (0, 1)),
    "DeepSeek-V3": (
        "DeepseekV3",
        "DeepseekV3ForCausalLM",
        {**SIZES, **LATENT, "num_hidden_layers": 3, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1},
        "Router",
        _index,
        (1, 2),
    ),
    "Llama 4": (
        "Llama4Text",
        "Llama4ForCausalLM",
        {
            **SIZES,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 1,
            "intermediate_size_mlp": 32,
            "head_dim": 16,
        },
        "Router",
        _scores,
        (0, 1),
    ),
    "JetMoE": ("JetMoe", "JetMoeForCausalLM", {**SIZES, "kv_channels": 16}, "TopKGating", _sizes, (0, 1, 2, 3)),
    "Switch": (
        "SwitchTransformers",
        "SwitchTransformersForConditionalGeneration",
        {**ENCODER_DECODER, **SWITCH, **SPARSE},
        "Router",
        _one_hot,
        (0, 1, 2),
    ),
    "NLLB-MoE": (
        "NllbMoe",
        "NllbMoeForConditionalGeneration",
        {**ENCODER_DECODER, **NLLB, **SCALE},
        "Router",
        _weights,
        (0, 1),
    ),
}


def build(name: str) -> nn.Module:
    import transformers

    config, model, sizes, *_ = FAMILIES[name]
    torch.manual_seed(0)
    made: nn.Module = getattr(transformers, model)(getattr(transformers, f"{config}Config")(**sizes)).double().eval()
    for parameter in made.parameters():  # several families start with routers of zeros
        nn.init.normal_(parameter, std=0.3)
    if FAMILIES[name][4] is _index:
        made.set_experts_implementation("eager")  # grouped products take no float64
    return made


def alone(model: nn.Module, name: str, run: Callable[[], object]) -> np.ndarray:
    """Counts [phase, layer, expert] of one prompt, from what the routers give."""
    suffix, chosen = FAMILIES[name][3:5]
    routers = [module for module in model.modules() if type(module).__name__.rstrip("12").endswith(suffix)]
    found = np.zeros((2, len(routers), EXPERTS), np.int64)
    calls = [0] * len(routers)

    def counter(at: int) -> Callable[..., None]:
        def saw(module: nn.Module, args: Any, output: Any) -> None:
            found[int(calls[at] > 0), at] += chosen(output).numpy().astype(np.int64)
            calls[at] += 1

        return saw

    handles = [router.register_forward_hook(counter(at)) for at, router in enumerate(routers)]
    run()
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_a_padded_batch_counts_as_its_prompts_alone(name, tmp_path):
    model = build(name)
    prompt = torch.randint(3, VOCABULARY, (3, 7))
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, :3] = 0
    prompt[1, :3] = 0
    first = model.generate(input_ids=prompt, attention_mask=mask, max_new_tokens=5, do_sample=False)
    start = first.shape[1] - 5
    # A token that a row makes on its way ends it there, and the others go on.
    on_the_way = [token for token in first[0, start + 1 :].tolist() if token not in first[:, start].tolist()]
    model.generation_config.eos_token_id = on_the_way[0] if on_the_way else None
    with loka.trace_routing(model, tmp_path / "t.npz") as trace:
        model.generate(input_ids=prompt, attention_mask=mask, max_new_tokens=5, do_sample=False)
        with torch.no_grad():
            decoder = {"decoder_input_ids": prompt[:1]} if "decoder_start_token_id" in FAMILIES[name][2] else {}
            model(input_ids=prompt[:1], **decoder)
    found = RoutingTrace.load(tmp_path / "t.npz")
    assert found.layers == FAMILIES[name][5]
    assert (found.requests, found.experts, found.hidden_size) == (4, EXPERTS, 32)
    assert trace.requests == 4
    for row in range(3):
        ids = prompt[row : row + 1, mask[row].bool()]
        counts = alone(model, name, lambda ids=ids: model.generate(input_ids=ids, max_new_tokens=5, do_sample=False))
        assert np.array_equal(found.counts[row], counts), row
    assert (found.decode_steps[0] < 4) == bool(on_the_way)
    assert found.decode[:3].sum() > 0
    assert np.array_equal(found.counts[3], alone(model, name, lambda: model(input_ids=prompt[:1], **decoder)))


@pytest.mark.parametrize("rows", [1, 3])
def test_encoder_and_decoder_of_one_forward_may_differ_in_length(rows, tmp_path):
    name = "Switch"
    model = build(name)
    prompt, answer = torch.randint(3, VOCABULARY, (rows, 7)), torch.randint(3, VOCABULARY, (rows, 5))
    mask = torch.ones(rows, 7, dtype=torch.long)
    mask[1:2, :3] = 0
    with loka.trace_routing(model, tmp_path / "t.npz"):
        model(input_ids=prompt, attention_mask=mask, decoder_input_ids=answer)
    found = RoutingTrace.load(tmp_path / "t.npz")
    assert found.requests == rows
    for row in range(rows):
        ids, made = prompt[row : row + 1, mask[row].bool()], answer[row : row + 1]
        counts = alone(model, name, lambda ids=ids, made=made: model(input_ids=ids, decoder_input_ids=made))
        assert np.array_equal(found.counts[row], counts), row


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_every_way_to_run_the_experts_is_traced_alike(implementation, tmp_path):
    model = build("Mixtral").float()
    model.set_experts_implementation(implementation)
    prompt = torch.randint(3, VOCABULARY, (2, 5))
    with loka.trace_routing(model, tmp_path / "t.npz"), torch.no_grad():
        model(input_ids=prompt)
    found = RoutingTrace.load(tmp_path / "t.npz")
    for row in range(2):
        assert np.array_equal(found.counts[row], alone(model, "Mixtral", lambda row=row: model(prompt[row : row + 1])))


def test_a_static_cache_is_followed(tmp_path):
    import transformers

    model = build("Mixtral")
    model.generation_config.eos_token_id = None
    prompt = torch.randint(3, VOCABULARY, (2, 5))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    cache = transformers.StaticCache(config=model.config, max_cache_len=16)
    with loka.trace_routing(model, tmp_path / "t.npz"):
        settings = {"max_new_tokens": 4, "do_sample": False, "past_key_values": cache, "disable_compile": True}
        made = model.generate(input_ids=prompt, attention_mask=mask, **settings)
    found = RoutingTrace.load(tmp_path / "t.npz")
    assert found.requests == 2
    for row in range(2):
        ids = prompt[row : row + 1, mask[row].bool()]
        counts = alone(model, "Mixtral", lambda ids=ids: model.generate(input_ids=ids, max_new_tokens=4))
        assert np.array_equal(found.counts[row], counts)
    assert made.shape == (2, 9)


def test_a_cache_of_whose_layers_not_the_first_counts_tokens_is_followed(tmp_path):
    import transformers

    # The layers of linear attention keep their state beside the cache's layers.
    sizes = {**SIZES, "head_dim": 16, "layer_types": ["linear_attention", "full_attention"], "block_size": 8}
    torch.manual_seed(0)
    model = transformers.MiniMaxForCausalLM(transformers.MiniMaxConfig(**sizes)).double().eval()
    model.set_experts_implementation("eager")
    model.generation_config.eos_token_id = None
    prompt = torch.randint(3, VOCABULARY, (2, 5))
    with loka.trace_routing(model, tmp_path / "t.npz", stop_tokens=()):
        model.generate(input_ids=prompt, max_new_tokens=4, do_sample=False)
    found = RoutingTrace.load(tmp_path / "t.npz")
    assert found.requests == 2
    for row in range(2):
        one = prompt[row : row + 1]
        counts = alone(model, "Mixtral", lambda one=one: model.generate(one, max_new_tokens=4, do_sample=False))
        assert np.array_equal(found.counts[row], counts)
        assert counts[1].sum() == 2 * 3 * 2  # layers, decode steps, experts of a token


def test_the_inner_model_alone_is_traced(tmp_path):
    model = build("Qwen3-MoE")
    prompt = torch.randint(3, VOCABULARY, (2, 5))
    with loka.trace_routing(model, tmp_path / "t.npz"), torch.no_grad():
        cache = model.model(input_ids=prompt, use_cache=True).past_key_values
        model.model(input_ids=prompt[:, :1], past_key_values=cache)
        model.model(input_ids=prompt[:1], use_cache=False)
    found = RoutingTrace.load(tmp_path / "t.npz")
    assert found.counts.sum((2, 3)).tolist() == [[20, 4], [20, 4], [20, 0]]


def test_the_table_of_routers_covers_every_family_that_hands_on_no_index():
    sites = {name: {site.name.rpartition(".")[2] for site in routing_sites(build(name))} for name in FAMILIES}
    by_router = {name for name, leaves in sites.items() if leaves == {"router"}}
    assert by_router == {"Llama 4", "JetMoE", "Switch", "NLLB-MoE"}
    assert all(leaves == {"experts"} for name, leaves in sites.items() if name not in by_router)
