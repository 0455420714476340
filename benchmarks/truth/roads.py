"""The roads to a predicted error: each takes something of early steps and then names an error for every recipe.

    closed form x alignment          energy histograms, the cast's error per bin, the measured alignment; no product
    copula x alignment               drawn from the learned distribution, corrected by the measured alignment
    copula                           the same draw, uncorrected
    gaussian, real weight            mean and covariance of the data, the weight as it is
    gaussian, matrix normal          the paper's: the weight is drawn too
    N(0, 1)                          what a benchmark on random tensors says

For wgrad, which has no weight, both operands are drawn, independently of each other. The direct road is no entry here:
its prediction is the mean of what the probe measured. Only plain products (one matrix by one matrix) have roads.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Final, Protocol

import torch
from torch import Tensor

from benchmarks.truth.materials import STUDIED
from loka.amax import finite_amax
from loka.formats import Pass, Recipe
from loka.numerics import MIN_COLUMNS, ProductError
from loka.probes.capturing.products import Draw, Factors, Gemm, stratified
from loka.probes.capturing.products import gemm as canonical
from loka.probes.distributions import learned
from loka.probes.distributions.closed_form import ProductStatistics
from loka.probes.distributions.learned import Kind, OperandDistribution
from loka.probes.distributions.matrix_normal import MatrixNormal
from loka.probes.sampling.measure import ROWS, is_plain_product, measure

# Rows of an operand per step that a distribution learns from, and rows of a drawn product that are measured.
LEARNED_ROWS: Final[int] = 512
DRAWN_ROWS: Final[int] = 256
# Updates of the matrix normal: the weight is frozen, and more change nothing.
_FLIP_FLOPS: Final[int] = 3

Prediction = Callable[[Recipe], float | None]  # None: the road does not lead to this recipe


class Observation(Protocol):
    """What is taken of one (site, pass) in early steps, and the roads that start from it."""

    def observe(self, gemm: Gemm, generator: torch.Generator) -> None:
        """Take what is needed from one product; its operands may not be kept, but for the frozen weight."""

    def roads(self) -> Mapping[str, Prediction]:
        """Return the roads by name; none where nothing could be taken."""


class Statistics:
    """Histograms and alignment of ROWS rows a step, as a probe takes them."""

    def __init__(self, product: Pass) -> None:
        self.product = product
        self.merged: ProductStatistics | None = None

    def observe(self, gemm: Gemm, generator: torch.Generator) -> None:
        """Merge the statistics of one step."""
        if not _has_roads(gemm):
            return
        (part,) = gemm.parts(Draw(ROWS, generator))
        amax = finite_amax(gemm.a, (0, 1, 2))
        found = ProductStatistics.of(part.a[0], part.b[0], self.product, a_amax=amax)
        self.merged = found if self.merged is None else self.merged.merge(found)

    def roads(self) -> Mapping[str, Prediction]:
        """Return the closed form."""
        return {} if self.merged is None else {"closed form x alignment": self._closed_form}

    def _closed_form(self, recipe: Recipe) -> float | None:
        assert self.merged is not None
        return self.merged.row_error(recipe) if recipe.has_closed_form else None


class Distributions:
    """Learned distributions of both operands, or of one beside a weight."""

    def __init__(self, product: Pass) -> None:
        self.product = product
        self.statistics = Statistics(product)
        self.a: OperandDistribution | None = None
        self.b: OperandDistribution | None = None
        self.weight: Tensor | None = None
        self.matrix_normal: MatrixNormal | None = None
        self.rows = 0
        self._steps = 0

    def observe(self, gemm: Gemm, generator: torch.Generator) -> None:
        """Learn from one step."""
        if not _has_roads(gemm):
            return
        self.statistics.observe(gemm, generator)
        self._steps += 1
        first, second = gemm.a[0].detach(), gemm.b[0].detach()
        if self.product == "wgrad":  # the operands come transposed: their rows are features, their columns tokens
            index = stratified(gemm.k, LEARNED_ROWS, generator)
            self.a = self._learn(self.a, _rows(first.T, index))
            self.b = self._learn(self.b, _rows(second.T, index))
        else:
            self.a = self._learn(self.a, _rows(first, stratified(gemm.m, LEARNED_ROWS, generator)))
            self.weight = second  # frozen, so the last step's is as good as any
            if self._steps <= _FLIP_FLOPS:
                before = self.matrix_normal or MatrixNormal.empty((gemm.n, gemm.k))
                self.matrix_normal = before.update(second)
        self.rows = gemm.m

    def _learn(self, before: OperandDistribution | None, rows: Tensor) -> OperandDistribution:
        found = OperandDistribution.of(rows, seed=self._steps)
        return found if before is None else before.merge(found)

    def roads(self) -> Mapping[str, Prediction]:
        """Return the roads that draw operands."""
        if self.a is None:
            return {}
        result: dict[str, Prediction] = {
            "copula x alignment": self._corrected,
            "copula": _Drawn(self, "copula", self.weight),
            "gaussian, real weight": _Drawn(self, "gaussian", self.weight),
        }
        if self.matrix_normal is not None:
            drawn = self.matrix_normal.sample(torch.Generator().manual_seed(1))
            result["gaussian, matrix normal"] = _Drawn(self, "gaussian", drawn)
        generator = torch.Generator().manual_seed(2)
        random_weight = None if self.weight is None else torch.randn(self.weight.shape, generator=generator)
        return result | {"N(0, 1)": _Drawn(self, "normal", random_weight)}

    def _corrected(self, recipe: Recipe) -> float | None:
        assert self.a is not None
        assert self.statistics.merged is not None
        draw = learned.Draw(rows=DRAWN_ROWS, weight=self.weight)
        return learned.predict(self.a, self.b, self.statistics.merged, recipe, draw)


class _Drawn:
    """One synthetic product, as large as the real one, measured under all recipes when the first is asked for."""

    def __init__(self, source: Distributions, kind: Kind, weight: Tensor | None) -> None:
        self.source, self.kind, self.weight = source, kind, weight
        self._errors: Mapping[str, ProductError] | None = None

    def __call__(self, recipe: Recipe) -> float | None:
        if self._errors is None:
            generator = torch.Generator().manual_seed(0)
            draw = Draw(DRAWN_ROWS, generator)
            self._errors = measure(self._gemm(generator), self.source.product, STUDIED, draw).errors
        return self._errors[recipe.name].row_error

    def _gemm(self, generator: torch.Generator) -> Gemm:
        source = self.source
        assert source.a is not None
        assert source.statistics.merged is not None
        sample = partial(OperandDistribution.sample, generator=generator, kind=self.kind)
        if source.product == "wgrad":
            assert source.b is not None
            tokens = source.statistics.merged.reduction
            first, second = sample(source.a, tokens).T.contiguous(), sample(source.b, tokens).T.contiguous()
        else:
            assert self.weight is not None
            first, second = sample(source.a, source.rows), self.weight
        return canonical(Factors("mm", first, second.T), a_is_p=True)


OBSERVATIONS: Final[dict[str, Callable[[Pass], Observation]]] = {
    "statistics": Statistics,
    "distributions": Distributions,
}


def _has_roads(gemm: Gemm) -> bool:
    """Whether rows of this product can be predicted: a plain product with rows long enough, that reduces anything."""
    return is_plain_product(gemm) and gemm.n >= MIN_COLUMNS and gemm.k > 1


def _rows(x: Tensor, index: Tensor | None) -> Tensor:
    return x if index is None else x[index]
