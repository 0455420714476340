"""Two models in their ordinary form, before any mod: DCN-v2, and a language model of the older kind.

DCN-v2: embeddings and the dense features, put through a small MLP, are concatenated into x0; every cross layer is

    x' = x0 * (W x + b) + x

with a Parameter as W, as torchrec's CrossNet has it; the last x enters a tower that ends in one logit. Source: Wang et
al., "DCN V2: Improved Deep & Cross Network", 2021 (arXiv 2008.13535), full-rank crosses, stacked form. The tower is
Linear, LayerNorm, SiLU like that of our Wukong.

The language model predicts the next byte: pre-norm blocks of LayerNorm, causal attention and Linear, SiLU, Linear,
everything with biases, which today's models no longer have and the mods take away.

Shapes: B samples or sequences, T positions, d = dim.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from loka.workloads.transformer import VOCABULARY, ByteTransformerConfig, CausalAttention
from loka.workloads.wukong import FeatureEmbedding, Mlp, WukongConfig


class CrossNet(nn.Module):
    """Full-rank cross layers on [B, width]. Kernels and biases are bare Parameters."""

    def __init__(self, width: int, num_layers: int) -> None:
        super().__init__()
        kernels = [nn.Parameter(nn.init.xavier_normal_(torch.empty(width, width))) for _ in range(num_layers)]
        self.kernels = nn.ParameterList(kernels)
        self.bias = nn.ParameterList([nn.Parameter(torch.zeros(width)) for _ in range(num_layers)])

    def forward(self, x0: Tensor) -> Tensor:
        """Return [B, width]."""
        x = x0
        for kernel, bias in zip(self.kernels, self.bias, strict=True):
            x = x0 * functional.linear(x, kernel, bias) + x
        return x


class DcnV2(nn.Module):
    """Predicts a label from categorical ids and dense features; of the config it reads embeddings and `head_hidden`."""

    def __init__(self, config: WukongConfig, *, num_crosses: int = 3) -> None:
        super().__init__()
        self.embedding = FeatureEmbedding(config)
        width = config.num_embeddings * config.embedding_dim
        self.cross = CrossNet(width, num_crosses)
        self.head = Mlp(width, config.head_hidden, 1)
        nn.init.normal_(self.head.out.weight, std=0.01)
        nn.init.constant_(self.head.out.bias, float(torch.logit(torch.tensor(config.base_rate))))

    def forward(self, categorical: Tensor, dense: Tensor) -> Tensor:
        """Return logits [B] from int64 ids [B, fields] and float features [B, num_dense]."""
        x = self.cross(self.embedding(categorical, dense).flatten(1))
        logits: Tensor = self.head(x)
        return logits.squeeze(-1)


class Block(nn.Module):
    """Attention, then MLP, each on the normalised input and added to it."""

    def __init__(self, config: ByteTransformerConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.dim)
        self.attention = CausalAttention(config)
        self.attention.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.attention.out = nn.Linear(config.dim, config.dim)
        self.mlp_norm = nn.LayerNorm(config.dim)
        self.mlp = nn.Sequential(
            nn.Linear(config.dim, config.mlp_hidden), nn.SiLU(), nn.Linear(config.mlp_hidden, config.dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, T, d]."""
        x = x + self.attention(self.attention_norm(x))
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class ByteLanguageModel(nn.Module):
    """Predicts the next byte; of the config's choices `tied_head` is not one here."""

    def __init__(self, config: ByteTransformerConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, config.dim)
        self.positions = nn.Embedding(config.context, config.dim)
        self.blocks = nn.Sequential(*(Block(config) for _ in range(config.num_layers)))
        self.norm = nn.LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, VOCABULARY)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)  # as GPT-2

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits [B, T, 256] of the byte after each position, from int64 bytes [B, T] with T <= context."""
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits
