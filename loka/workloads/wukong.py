"""Wukong, a recommendation model made of stacked factorization machines, as it is before any mod.

Every feature becomes an embedding, and a sample is a matrix X of n embeddings of length d. One interaction layer is

    X' = LayerNorm(concat(FMB(X), LCB(X)) + X)

- FMB, the factorization machine block: X Xt Y, all pairwise dot products seen through a learned projection Y of k
  columns, then flatten, LayerNorm and an MLP that yields new embeddings;
- LCB, the linear compress block: W X, new embeddings as linear mixtures of the old ones;
- where the number of embeddings changes, the residual is a linear mixture too.

Layer i sees interactions of up to 2^i features. The last X is flattened into an MLP that ends in one logit. Source:
Zhang et al., "Wukong: Towards a Scaling Law for Large-Scale Recommendation", 2024 (arXiv 2403.02545), section 3.
The hidden layers of its MLPs are Linear, LayerNorm, SiLU, with biases: the ordinary production form that FP8 has
trouble with.

Shapes: B samples, n embeddings, d their length, k the rank of Y.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loka.errors import ArgumentError


@dataclass(frozen=True, kw_only=True, slots=True)
class WukongConfig:
    """The sizes of a Wukong. By default 0.75 million parameters and 30 to 40 ms per step of 512 samples on one core."""

    cardinalities: tuple[int, ...]  # rows of each embedding table, one per categorical field
    num_dense: int  # dense features; 0 for none
    embedding_dim: int = 32  # d
    num_dense_embeddings: int = 4  # embeddings that the dense features become
    num_layers: int = 3
    num_fmb_embeddings: int = 8  # n_F: of a layer's output, those from the FMB
    num_lcb_embeddings: int = 8  # n_L: of a layer's output, those from the LCB
    fm_rank: int = 8  # k
    dense_hidden: tuple[int, ...] = (64,)
    fmb_hidden: tuple[int, ...] = (512,)
    head_hidden: tuple[int, ...] = (256,)
    base_rate: float = 0.5  # click rate that an untrained model predicts, through the bias of the last Linear

    def __post_init__(self) -> None:
        """Refuse sizes that make no model."""
        for name in ("cardinalities", "dense_hidden", "fmb_hidden", "head_hidden"):
            _require_positive(name, getattr(self, name))
        for name in ("embedding_dim", "num_layers", "num_fmb_embeddings", "num_lcb_embeddings", "fm_rank"):
            _require_positive(name, (getattr(self, name),))
        if self.num_dense < 0 or (self.num_dense > 0 and self.num_dense_embeddings < 1):
            raise ArgumentError(
                f"WukongConfig got num_dense={self.num_dense} and num_dense_embeddings={self.num_dense_embeddings}. "
                "num_dense is 0 or more, and dense features need at least one embedding. Change one of the two."
            )
        if not 0.0 < self.base_rate < 1.0:
            raise ArgumentError(
                f"WukongConfig got base_rate={self.base_rate}. It must lie strictly between 0 and 1. "
                "Pass the click rate of the training data."
            )

    @property
    def num_embeddings(self) -> int:
        """Embeddings that enter the first layer."""
        return len(self.cardinalities) + (self.num_dense_embeddings if self.num_dense else 0)


class Mlp(nn.Sequential):
    """Linear, LayerNorm, SiLU for every hidden width, then a plain Linear: `linear0`, `norm0`, `act0`, ..., `out`."""

    out: nn.Linear

    def __init__(self, in_features: int, hidden: Sequence[int], out_features: int) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        width = in_features
        for index, next_width in enumerate(hidden):
            layers[f"linear{index}"] = nn.Linear(width, next_width)
            layers[f"norm{index}"] = nn.LayerNorm(next_width)
            layers[f"act{index}"] = nn.SiLU()
            width = next_width
        layers["out"] = nn.Linear(width, out_features)
        super().__init__(layers)


class FeatureEmbedding(nn.Module):
    """Turns categorical ids [B, fields] and dense features [B, num_dense] into embeddings [B, n, d]."""

    def __init__(self, config: WukongConfig) -> None:
        super().__init__()
        self.dense_shape = (config.num_dense_embeddings, config.embedding_dim)
        tables = [nn.Embedding(rows, config.embedding_dim) for rows in config.cardinalities]
        for table in tables:
            # Unit-length rows on average, so that the dot products of the first FM start at order one.
            nn.init.normal_(table.weight, std=config.embedding_dim**-0.5)
        self.tables = nn.ModuleList(tables)
        self.dense_mlp: Mlp | None = None
        if config.num_dense:
            self.dense_mlp = Mlp(config.num_dense, config.dense_hidden, math.prod(self.dense_shape))

    def forward(self, categorical: Tensor, dense: Tensor) -> Tensor:
        """Return [B, n, d]."""
        rows = [table(categorical[:, index]) for index, table in enumerate(self.tables)]
        embeddings = torch.stack(rows, dim=1)
        if self.dense_mlp is None:
            return embeddings
        from_dense: Tensor = self.dense_mlp(dense)
        return torch.cat((embeddings, from_dense.view(dense.shape[0], *self.dense_shape)), dim=1)


class LinearCompressBlock(nn.Module):
    """W X: every output embedding is a learned mixture of the input embeddings, [B, n, d] -> [B, m, d]."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_out, num_in))
        _init_mixture(self.weight, num_in)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, m, d]."""
        return _mix(x, self.weight.t()).transpose(1, 2)


class FactorizationMachineBlock(nn.Module):
    """X Xt Y, flattened, normalised and put through an MLP: [B, n, d] -> [B, n_F, d]."""

    def __init__(self, num_in: int, config: WukongConfig) -> None:
        super().__init__()
        self.num_out, self.embedding_dim = config.num_fmb_embeddings, config.embedding_dim
        self.projection = nn.Parameter(torch.empty(num_in, config.fm_rank))
        _init_mixture(self.projection, num_in)
        width = num_in * config.fm_rank
        self.norm = nn.LayerNorm(width)
        self.mlp = Mlp(width, config.fmb_hidden, self.num_out * self.embedding_dim)

    def interactions(self, x: Tensor) -> Tensor:
        """Return X Xt Y, [B, n, k]. Xt Y comes first, which costs n k d a sample instead of n n (d + k)."""
        return torch.bmm(x, _mix(x, self.projection))

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, n_F, d]."""
        flat = self.interactions(x).flatten(1)
        out: Tensor = self.mlp(self.norm(flat))
        return out.view(x.shape[0], self.num_out, self.embedding_dim)


class WukongLayer(nn.Module):
    """LayerNorm(concat(FMB(X), LCB(X)) + X), [B, n, d] -> [B, n_F + n_L, d]."""

    def __init__(self, num_in: int, config: WukongConfig) -> None:
        super().__init__()
        num_out = config.num_fmb_embeddings + config.num_lcb_embeddings
        self.fmb = FactorizationMachineBlock(num_in, config)
        self.lcb = LinearCompressBlock(num_in, config.num_lcb_embeddings)
        self.residual = nn.Identity() if num_in == num_out else LinearCompressBlock(num_in, num_out)
        self.norm = nn.LayerNorm(config.embedding_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, n_F + n_L, d]."""
        out: Tensor = self.norm(torch.cat((self.fmb(x), self.lcb(x)), dim=1) + self.residual(x))
        return out


class Wukong(nn.Module):
    """Predicts a click from categorical ids and dense features."""

    def __init__(self, config: WukongConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = FeatureEmbedding(config)
        num_out = config.num_fmb_embeddings + config.num_lcb_embeddings
        inputs = [config.num_embeddings] + [num_out] * (config.num_layers - 1)
        self.interaction = nn.Sequential(*(WukongLayer(num_in, config) for num_in in inputs))
        self.head = Mlp(num_out * config.embedding_dim, config.head_hidden, 1)
        # An untrained model predicts the base rate; else the first hundred steps go into learning it.
        nn.init.normal_(self.head.out.weight, std=0.01)
        nn.init.constant_(self.head.out.bias, math.log(config.base_rate / (1.0 - config.base_rate)))

    def forward(self, categorical: Tensor, dense: Tensor) -> Tensor:
        """Return logits [B] from int64 ids [B, fields] and float features [B, num_dense]; num_dense may be 0."""
        x = self.interaction(self.embedding(categorical, dense))
        logits: Tensor = self.head(x.flatten(1))
        return logits.squeeze(-1)


def _mix(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply along the embedding axis: x [B, n, d], weight [n, m] -> [B, d, m].

    The copy makes the product one GEMM of B d rows, with and without autograd; on the transposed view, matmul would
    copy the weight B times whenever no gradient is needed.
    """
    return torch.matmul(x.transpose(1, 2).contiguous(), weight)


def _init_mixture(weight: Tensor, num_in: int) -> None:
    bound = 1.0 / math.sqrt(num_in)  # as nn.Linear
    nn.init.uniform_(weight, -bound, bound)


def _require_positive(name: str, values: Sequence[int]) -> None:
    if not all(value >= 1 for value in values) or (name == "cardinalities" and not values):
        raise ArgumentError(
            f"WukongConfig got {name}={values}. Sizes are at least 1, and there is at least one categorical field. "
            "Correct this size."
        )
