"""A learned operand: drawn like the real one, for kernels and shapes that did not exist when it was probed.

The copula joins two things that are learned apart: how each feature is distributed (its quantile grid) and how features
vary together (the correlation of their normal scores). Normal numbers with that correlation are looked up in the grids.
Kept beside it, because the comparison is the point: the Gaussian of the same mean and covariance, and N(0, 1).

No draw has the coherence of the real product. `predict` measures the drawn one and corrects it by both alignments.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy.typing as npt
import torch
from torch import Tensor

from loka.accumulation import reduced_product
from loka.amax import finite_amax
from loka.errors import ArgumentError
from loka.formats import PASS_OPERANDS, OperandSpec, Pass, Recipe
from loka.numerics import product_errors
from loka.probes.distributions.alignment import Alignment
from loka.probes.distributions.closed_form import ProductStatistics
from loka.probes.distributions.covariance import Covariance
from loka.probes.distributions.histograms import Survey
from loka.probes.distributions.moments import Arrays
from loka.probes.distributions.quantiles import EXTENT, POINTS, Quantiles
from loka.probes.distributions.stored import Stored
from loka.quantize import fake_quantize

Kind = Literal["copula", "gaussian", "normal"]

# Elements drawn at a time: the temporaries of a block stay in the cache.
_BLOCK: Final[int] = 2**18


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class OperandDistribution:
    """What was learned of one operand [*, K]; parts merge."""

    quantiles: Quantiles
    scores: Covariance  # of the normal scores of the sampled rows
    raw: Covariance

    @classmethod
    def empty(cls, features: int, *, rank: int | None = None) -> "OperandDistribution":
        """Return the neutral element of `merge`; `rank` as in `of`."""
        nothing = Covariance.empty(features, rank=rank)
        return cls(quantiles=Quantiles.empty(features), scores=nothing, raw=nothing)

    @classmethod
    def of(cls, rows: Tensor, *, seed: int, rank: int | None = None) -> "OperandDistribution":
        """Learn from rows [n, K], any floating dtype; n may be 0. Give every part of one operand another `seed`.

        rank: of both covariances, as in `Covariance.of`; parts that are merged have the same.
        """
        quantiles = Quantiles.of(rows, seed=seed)
        scores = Covariance.of(quantiles.scores(), rank=rank)
        return cls(quantiles=quantiles, scores=scores, raw=Covariance.of(rows, rank=rank))

    @property
    def features(self) -> int:
        """K."""
        return self.quantiles.features

    @property
    def count(self) -> int:
        """Rows that entered."""
        return self.quantiles.count

    @property
    def nbytes(self) -> int:
        """Bytes that the state holds."""
        return self.quantiles.nbytes + self.scores.nbytes + self.raw.nbytes

    def merge(self, other: "OperandDistribution") -> "OperandDistribution":
        """Return the distribution of both sets of rows.

        Scores are ranks within a part: their merged correlation is that of the parts, not of a shift between them.
        """
        return OperandDistribution(
            quantiles=self.quantiles.merge(other.quantiles),
            scores=self.scores.merge(other.scores),
            raw=self.raw.merge(other.raw),
        )

    def sample(self, rows: int, generator: torch.Generator, *, kind: Kind = "copula") -> Tensor:
        """Draw rows [rows, K] fp32 on the CPU; the same generator state gives the same rows. Zeros if none was seen.

        To draw again and again, keep the `sampler`: the factor of a covariance is most of the work of a small draw.
        """
        return self.sampler(kind).draw(rows, generator)

    def sampler(self, kind: Kind = "copula") -> "Sampler":
        """Return what draws rows of this kind."""
        if kind == "normal":
            return Sampler(features=self.features)
        if self.count == 0:
            nothing = torch.zeros(self.features, 0, dtype=torch.float32, device="cpu")
            return Sampler(features=self.features, factor=nothing)
        if kind == "gaussian":
            factor, diagonal = _raw_factor(self.raw)
            return Sampler(features=self.features, factor=factor, diagonal=diagonal, mean=self.raw.mean.float().cpu())
        factor, diagonal = _unit_factor(self.scores)
        return Sampler(features=self.features, factor=factor, diagonal=diagonal, grid=self.quantiles.grid())

    def arrays(self, *, keep_rows: bool = False) -> Arrays:
        """Return the state as arrays that `.npy` stores without pickle; raw rows only where asked for."""
        quantiles = self.quantiles.arrays(keep_rows=keep_rows)
        parts = {"quantiles": quantiles, "scores": self.scores.arrays(), "raw": self.raw.arrays()}
        return {f"{part}.{name}": array for part, arrays in parts.items() for name, array in arrays.items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> "OperandDistribution":
        """Restore what `arrays` gave. Raises ArgumentError where parts are missing."""
        stored = Stored("OperandDistribution", arrays)
        result = cls(
            quantiles=Quantiles.from_arrays(stored.part("quantiles.")),
            scores=_checked(stored, "scores."),
            raw=_checked(stored, "raw."),
        )
        if not result.features == result.scores.features == result.raw.features or result.raw.count != result.count:
            raise stored.damaged("raw.mean", "is over other features or rows than the quantiles")
        return result


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Sampler:
    """A kind of draw with its factors ready: mean + factor z + diagonal e, looked up in the grid where there is one."""

    features: int
    factor: Tensor | None = None  # [K, r]; None: independent standard normal numbers
    diagonal: Tensor | None = None  # [K]; None: zero
    mean: Tensor | None = None  # [K]
    grid: Tensor | None = None  # [POINTS, K]

    def draw(self, rows: int, generator: torch.Generator) -> Tensor:
        """Return rows [rows, K] fp32 on the CPU; the same generator state gives the same rows."""
        result = torch.empty(rows, self.features, dtype=torch.float32, device="cpu")
        if self.factor is None:
            return result.normal_(generator=generator)
        step = max(1, _BLOCK // max(1, self.features))
        for start in range(0, rows, step):
            block = result[start : start + step]
            noise = result.new_empty(len(block), self.factor.shape[1]).normal_(generator=generator)
            torch.mm(noise, self.factor.T, out=block)
            if self.diagonal is not None:
                block += torch.empty_like(block).normal_(generator=generator).mul_(self.diagonal)
            if self.mean is not None:
                block += self.mean
            if self.grid is not None:
                block.copy_(_looked_up(block, self.grid))
        return result


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Draw:
    """How `predict` draws its operands."""

    kind: Kind = "copula"
    rows: int = 256
    seed: int = 0
    # The second operand [N, K] as the product reads it: the real weight, or one drawn from its matrix normal.
    weight: Tensor | None = None


def predict(
    a: OperandDistribution,
    b: OperandDistribution | None,
    statistics: ProductStatistics,
    recipe: Recipe,
    draw: Draw = Draw(),
) -> float:
    """Return the `row_error` of a recipe on drawn operands; see `predictions`, which draws once for many recipes."""
    return predictions(a, b, statistics, (recipe,), draw)[recipe.name]


def predictions(
    a: OperandDistribution,
    b: OperandDistribution | None,
    statistics: ProductStatistics,
    recipes: Iterable[Recipe],
    draw: Draw = Draw(),
) -> dict[str, float]:
    """Return the `row_error` of recipes on drawn operands, corrected by the alignment of the real product.

    a, b: distributions over the features of the operands as the model has them, rows being tokens or samples; b may be
    None where draw.weight is given. For wgrad, whose operands are transposed, both are drawn over the tokens of the
    statistics and independently of each other: a joint rank copula would invent a gradient that has averaged out.
    NaN where the real or the drawn product has no row to compare with.
    """
    generator = torch.Generator().manual_seed(draw.seed)
    with torch.autocast("cpu", enabled=False):
        return _measured(_operands(a, b, statistics, draw, generator), statistics, recipes, draw)


def _measured(
    operands: tuple[Tensor, Tensor], statistics: ProductStatistics, recipes: Iterable[Recipe], draw: Draw
) -> dict[str, float]:
    """Return the `row_error` of recipes on these operands, corrected by the alignment."""
    first, second = operands
    reference = first @ second.T
    drawn = Alignment.of(first, Survey.of(second).energy, reference)
    ratio = statistics.alignment.factor / drawn.factor if drawn.count else math.nan
    roles = PASS_OPERANDS[statistics.product]
    result = {}
    for recipe in recipes:
        rounded = [
            fake_quantize(x, spec := recipe.operand(role), _amax(x, spec, known, draw.kind))
            for x, role, known in zip(operands, roles, statistics.amax, strict=True)
        ]
        product = rounded[0] @ rounded[1].T if recipe.accumulation == "fp32" else reduced_product(*rounded)
        result[recipe.name] = product_errors(product.unsqueeze(0), reference)[0].row_error * ratio
    return result


def _operands(
    a: OperandDistribution,
    b: OperandDistribution | None,
    statistics: ProductStatistics,
    draw: Draw,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    product: Pass = statistics.product
    if draw.weight is None and b is None:
        raise ArgumentError(
            "predict was given neither a distribution nor a matrix for the second operand: one of them is needed. "
            "Pass b, or Draw(weight=...) with the matrix [N, K] as the product reads it."
        )
    tokens = statistics.reduction
    if product == "wgrad":
        first = a.sample(tokens, generator, kind=draw.kind).T
        # Evenly spread: neighbouring features, of one head say, are alike.
        spread = torch.linspace(0, len(first) - 1, min(draw.rows, len(first)), dtype=torch.float32, device="cpu")
        first = first[spread.long()].contiguous()
    else:
        first = a.sample(draw.rows, generator, kind=draw.kind)
    if draw.weight is not None:
        return first, draw.weight.detach().float()
    assert b is not None
    if product == "wgrad":
        return first, b.sample(tokens, generator, kind=draw.kind).T.contiguous()
    return first, b.sample(statistics.columns, generator, kind=draw.kind)


def _amax(x: Tensor, spec: OperandSpec, known: float, kind: Kind) -> Tensor | None:
    """Return the tensor amax: that of the whole operand, of which a few drawn rows need not hold the largest."""
    if not spec.per_tensor or kind == "normal":
        return None
    return finite_amax(x, (0, 1)).clamp_min(known)


def _checked(stored: Stored, prefix: str) -> Covariance:
    """Restore a covariance of an untrusted state."""
    part = Stored(stored.owner, stored.part(prefix))
    for name in ("count", "skipped", "rank"):
        part.counts(name, 1)
    features = len(part.numbers("mean", (None,)))
    part.energies("m2", (features,))
    part.singles("matrix", (features, None))
    return Covariance.from_arrays(part.arrays)


def _raw_factor(covariance: Covariance) -> tuple[Tensor, Tensor | None]:
    """Return the factor F [K, r] and the diagonal's root [K], None where it is all zero, in fp32 on the CPU."""
    factor, diagonal = (part.cpu() for part in covariance.factor())
    root = diagonal.clamp_min(0).sqrt().float()
    return factor.float(), root if bool((root > 0).any()) else None


def _unit_factor(covariance: Covariance) -> tuple[Tensor, Tensor | None]:
    """Return the same for a unit variance of every feature; one without spread in its ranks is independent."""
    factor, diagonal = (part.cpu() for part in covariance.factor())
    spread = covariance.variance.sqrt().cpu()
    inverse = torch.where(spread > 0, 1 / spread, torch.zeros_like(spread))
    root = torch.where(spread > 0, diagonal.clamp_min(0).sqrt() * inverse, 1.0).float()
    # What rounding leaves, 1e-4 of the variance, is not worth a second normal number per element.
    return (factor * inverse[:, None]).float(), root if bool((root > 1e-2).any()) else None


def _looked_up(scores: Tensor, grid: Tensor) -> Tensor:
    """Return the quantiles at normal scores [n, K], linear between the points of grid [POINTS, K]."""
    features = grid.shape[1]
    position = scores.add(EXTENT).mul_((POINTS - 1) / (2 * EXTENT)).clamp_(0, POINTS - 1)
    low = position.to(torch.int32).clamp_(max=POINTS - 2)
    share = position.sub_(low)
    index = low.mul_(features).add_(torch.arange(features, dtype=torch.int32, device="cpu"))
    left = grid.flatten().index_select(0, index.flatten()).view_as(share)
    right = grid.flatten()[features:].index_select(0, index.flatten()).view_as(share)
    return torch.lerp(left, right, share)
