"""A small mixture of experts with real weights: trained here, on text of four domains, in a few minutes.

Qwen3-MoE of transformers, 4 layers of 16 experts of which a token takes 4, 7 M parameters, on bytes. Large enough that
its router tells code from chat; the strong skew of large models it does not have.
"""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.truth.texts import DOMAINS, passages

BYTES: Final[int] = 256
CONTEXT: Final[int] = 256
SIZES: Final[dict[str, Any]] = {
    "vocab_size": BYTES,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "router_aux_loss_coef": 0.001,
    "output_router_logits": True,
    "max_position_embeddings": 2 * CONTEXT,
    "use_cache": False,
    "tie_word_embeddings": False,
    "eos_token_id": None,
    "pad_token_id": None,
}
HELD_OUT: Final[int] = 32  # passages of each domain
_BATCH: Final[int] = 8
_PEAK_LR: Final[float] = 1e-3
_WARMUP: Final[int] = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Texts:
    """Passages [count, CONTEXT + 1] of bytes, by domain."""

    train: dict[str, Tensor]
    held_out: dict[str, Tensor]


def texts(limit: int = 4000) -> Texts:
    """Cut the text of every domain into passages; the held-out ones come first and are never trained on."""
    train, held_out = {}, {}
    for domain in DOMAINS:
        found: list[Tensor] = []
        for passage in passages(domain):
            data = torch.frombuffer(bytearray(passage.encode("utf-8", errors="ignore")), dtype=torch.uint8).long()
            found += [part for part in data.split(CONTEXT + 1) if len(part) == CONTEXT + 1]
            if len(found) >= limit:
                break
        held_out[domain], train[domain] = torch.stack(found[:HELD_OUT]), torch.stack(found[HELD_OUT:])
    return Texts(train=train, held_out=held_out)


def untrained() -> Any:
    """Return the model as it is initialised."""
    transformers = importlib.import_module("transformers")
    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(**SIZES)
    config._attn_implementation = "sdpa"
    return transformers.Qwen3MoeForCausalLM(config)


def trained(data: Texts, steps: int, weights: Path | None = None) -> Any:
    """Return the model after so many steps, or as it is read from `weights` where they are."""
    model = untrained()
    if weights is not None and weights.exists():
        model.load_state_dict(load_file(weights))
        return model.eval()
    _train(model, data, steps)
    if weights is not None:
        save_file({name: value.detach().clone() for name, value in model.state_dict().items()}, weights)
    return model.eval()


def _train(model: Any, data: Texts, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=_PEAK_LR, weight_decay=0.01)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = _PEAK_LR * min((step + 1) / _WARMUP, 1.0 - 0.9 * step / steps)
        batch = _batch(data, generator)
        loss = model(input_ids=batch[:, :-1], labels=batch[:, :-1]).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: {float(loss.detach()):.3f}", flush=True)


def _batch(data: Texts, generator: torch.Generator) -> Tensor:
    """Draw as many passages of every domain."""
    each = _BATCH // len(data.train)
    return torch.cat([x[torch.randint(len(x), (each,), generator=generator)] for x in data.train.values()])


@torch.no_grad()
def passage_losses(model: Any, held_out: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the mean loss per byte, in nats, of every held-out passage [HELD_OUT], by domain."""
    result = {}
    for domain, tokens in held_out.items():
        losses = []
        for batch in tokens.split(_BATCH):
            logits = model(input_ids=batch[:, :-1]).logits.float()
            by_byte = torch.nn.functional.cross_entropy(logits.mT, batch[:, 1:], reduction="none")
            losses.append(by_byte.mean(-1))
        result[domain] = torch.cat(losses).double()
    return result
