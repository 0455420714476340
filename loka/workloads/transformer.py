"""A small decoder-only transformer over bytes, and real text for it that every Python has: its own standard library.

Pre-norm blocks of causal attention and a SwiGLU MLP, no biases, as in today's language models. A token is a byte, so
no tokenizer is needed.

Shapes: B sequences, T positions, d = config.dim.
"""

import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from loka.errors import ArgumentError

VOCABULARY = 256
# Not the standard library itself: installed packages, and tests, which on some systems are a separate download.
_FOREIGN_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})


@dataclass(frozen=True, kw_only=True, slots=True)
class ByteTransformerConfig:
    """The sizes of a ByteTransformer. The defaults make 0.95 million parameters."""

    dim: int = 128
    num_layers: int = 4
    num_heads: int = 4
    mlp_hidden: int = 384
    context: int = 256  # longest sequence
    tied_head: bool = False  # whether the head shares the weight of the token embedding

    def __post_init__(self) -> None:
        """Refuse sizes that make no model."""
        sizes = (self.dim, self.num_layers, self.num_heads, self.mlp_hidden, self.context)
        if min(sizes) < 1 or self.dim % self.num_heads:
            raise ArgumentError(
                f"{self} is no model. Sizes are at least 1, and dim must be a multiple of num_heads. "
                "Correct the size that breaks this."
            )


class CausalAttention(nn.Module):
    """Multi-head attention over earlier positions, [B, T, d] -> [B, T, d]."""

    def __init__(self, config: ByteTransformerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, T, d]."""
        batch, length, dim = x.shape
        heads = self.qkv(x).view(batch, length, 3, self.num_heads, dim // self.num_heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, dim))
        return out


class SwiGlu(nn.Module):
    """down(SiLU(gate(x)) * up(x)), [B, T, d] -> [B, T, d]."""

    def __init__(self, config: ByteTransformerConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.dim, config.mlp_hidden, bias=False)
        self.up = nn.Linear(config.dim, config.mlp_hidden, bias=False)
        self.act = nn.SiLU()
        self.down = nn.Linear(config.mlp_hidden, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, T, d]."""
        out: Tensor = self.down(self.act(self.gate(x)) * self.up(x))
        return out


class Block(nn.Module):
    """Attention, then MLP, each on the normalised input and added to it."""

    def __init__(self, config: ByteTransformerConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim)
        self.attention = CausalAttention(config)
        self.mlp_norm = nn.RMSNorm(config.dim)
        self.mlp = SwiGlu(config)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, T, d]."""
        x = x + self.attention(self.attention_norm(x))
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class ByteTransformer(nn.Module):
    """Predicts the next byte."""

    def __init__(self, config: ByteTransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(VOCABULARY, config.dim)
        self.positions = nn.Embedding(config.context, config.dim)
        self.blocks = nn.Sequential(*(Block(config) for _ in range(config.num_layers)))
        self.norm = nn.RMSNorm(config.dim)
        self.head = nn.Linear(config.dim, VOCABULARY, bias=False)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)  # as GPT-2
        if config.tied_head:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits [B, T, 256] of the byte after each position, from int64 bytes [B, T] with T <= context."""
        length = tokens.shape[1]
        if length > self.config.context:
            raise ArgumentError(
                f"A sequence of {length} bytes was given to a model of context {self.config.context}. "
                "Cut the sequence, or build the model with a longer context."
            )
        x = self.tokens(tokens) + self.positions(torch.arange(length, device=tokens.device))
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


def stdlib_text(num_bytes: int) -> bytes:
    """Return the first `num_bytes` bytes of Python's standard library, its .py files one after another by path.

    The same for one Python version; several tens of megabytes exist. ArgumentError where there is less than asked.
    """
    if num_bytes < 0:
        raise ArgumentError(f"stdlib_text was asked for {num_bytes} bytes. Ask for 0 or more.")
    root = Path(sysconfig.get_paths()["stdlib"])
    text = bytearray()
    for path in _sources(root):
        if len(text) >= num_bytes:
            break
        text += path.read_bytes()
    if len(text) < num_bytes:
        raise ArgumentError(
            f"stdlib_text was asked for {num_bytes} bytes, and the .py files under {root} hold {len(text)}. "
            "Ask for at most that, or run a Python that has its library as files."
        )
    return bytes(text[:num_bytes])


@cache
def _sources(root: Path) -> tuple[Path, ...]:
    """Return the .py files under a library's folder by path, found once: installed packages may lie there, too."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = set(folders) - _FOREIGN_FOLDERS
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return tuple(sorted(found, key=lambda path: path.relative_to(root).as_posix()))


def text_batches(text: bytes, *, batch_size: int, length: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield, without end, (bytes, next bytes), int64 [batch_size, length] each, from random places of `text`."""
    if batch_size < 1 or length < 1 or len(text) <= length:
        raise ArgumentError(
            f"text_batches got batch_size={batch_size}, length={length} and a text of {len(text)} bytes. Sizes are at "
            "least 1, and the text must be longer than one sequence. Pass more text or a shorter length."
        )
    return _text_batches(torch.frombuffer(bytearray(text), dtype=torch.uint8), batch_size, length, seed)


def _text_batches(text: Tensor, batch_size: int, length: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(length + 1)
    while True:
        starts = torch.randint(len(text) - length, (batch_size, 1), generator=generator)
        window = text[starts + offsets].long()
        yield window[:, :-1], window[:, 1:]
