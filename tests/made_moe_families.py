"""Mixture-of-experts models of transformers, small, and trained here on real text: seconds each, made once.

Bytes of Python's own library are the tokens. What is judged by numbers rests on these weights, not on random ones: an
untrained router is more skewed than a trained one, by accident, and untrained weights have no outliers.
"""

import copy
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from loka.workloads.transformer import stdlib_text, text_batches

VOCABULARY, EXPERTS = 256, 8
STEPS, BATCH, LENGTH = 60, 8, 48
# Training has seen the first part of the text; what is probed lies behind.
SEEN, TEXT = 200_000, 240_000

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
SWITCH: dict[str, Any] = {
    **{"vocab_size": VOCABULARY, "d_model": 32, "d_ff": 48, "d_kv": 16, "num_heads": 2, "num_experts": EXPERTS},
    **dict.fromkeys(("num_layers", "num_decoder_layers", "num_sparse_encoder_layers", "num_sparse_decoder_layers"), 1),
    **{"dropout_rate": 0.0, "expert_capacity": 64, "router_jitter_noise": 0.0, "decoder_start_token_id": 0},
}
# name -> (class without "Config" and "ForCausalLM", what it needs, the module of its experts)
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "Mixtral": ("Mixtral", SIZES, "model.layers.0.mlp.experts"),
    "Qwen3-MoE": ("Qwen3Moe", {**SIZES, "head_dim": 16}, "model.layers.0.mlp.experts"),
    "OLMoE": ("Olmoe", SIZES, "model.layers.0.mlp.experts"),
    "DeepSeek-V3": ("DeepseekV3", {**SIZES, "n_shared_experts": 1, **DEEPSEEK}, "model.layers.1.mlp.experts"),
    "GPT-OSS": ("GptOss", {**SIZES, "head_dim": 16}, "model.layers.0.mlp.experts"),
    "Llama 4": (
        "Llama4",
        {**SIZES, "head_dim": 16, "num_experts_per_tok": 1, "intermediate_size_mlp": 48},
        "model.layers.0.feed_forward.experts",
    ),
    "Switch": ("SwitchTransformers", SWITCH, "encoder.block.0.layer.1.mlp.experts"),
}
# Those that run their experts as one grouped product.
GROUPED = tuple(name for name in FAMILIES if name not in ("Llama 4", "Switch"))


def experts_of(family: str) -> str:
    """Return the module that holds the experts."""
    return FAMILIES[family][2]


def untrained(family: str) -> nn.Module:
    """Make a model with random weights, the same each time."""
    import transformers

    name, sizes, _ = FAMILIES[family]
    torch.manual_seed(0)
    # Where a family has images, too, the configuration of its language model stands apart.
    config_class = getattr(transformers, f"{name}TextConfig", None) or getattr(transformers, f"{name}Config")
    config = config_class(**sizes)
    config._attn_implementation = "eager"
    kind = "ForConditionalGeneration" if family == "Switch" else "ForCausalLM"
    model: nn.Module = getattr(transformers, f"{name}{kind}")(config)
    return model


def batches(batch: int = 2, length: int = 12) -> list[Tensor]:
    """Batches of text that no training has seen."""
    held_out = stdlib_text(TEXT)[SEEN:]
    found = text_batches(held_out, batch_size=batch, length=length, seed=1)
    return [tokens for tokens, _ in itertools.islice(found, 4)]


def losses(model: nn.Module, steps: Iterator[Tensor], rate: float, kind: type[torch.optim.Optimizer]) -> list[float]:
    optimizer = kind(model.parameters(), lr=rate)  # type: ignore[call-arg]
    result = []
    for tokens in steps:
        loss = model(input_ids=tokens, labels=tokens.contiguous()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        result.append(float(loss.detach()))
    return result


@functools.cache
def _trained(family: str) -> tuple[nn.Module, tuple[float, ...]]:
    model = untrained(family)
    text = text_batches(stdlib_text(SEEN), batch_size=BATCH, length=LENGTH, seed=0)
    found = losses(model, (tokens for tokens, _ in itertools.islice(text, STEPS)), 3e-3, torch.optim.AdamW)
    return model, tuple(found)


def trained(family: str) -> nn.Module:
    """Return a copy of a model that was trained for STEPS steps."""
    return copy.deepcopy(_trained(family)[0])


def training_losses(family: str) -> tuple[float, ...]:
    """Return the loss of every step of that training."""
    return _trained(family)[1]


def train(model: nn.Module, steps: int) -> list[float]:
    """Train on a few batches of held-out text; return the losses."""
    return losses(model, itertools.islice(itertools.cycle(batches()), steps), 0.1, torch.optim.SGD)
