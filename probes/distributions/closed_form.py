"""The FP8 error of a product in closed form: energy histograms times the error per bin, times the alignment.

The relative squared error of a bin is the true cast of `loka.quantize`, averaged over log-uniform values in the bin, so
the closed form cannot drift from what kernels are held to. It needs no operand and no product, and answers for
any format and scale rule whose kind of groups was probed.

It is the root of a mean square where `row_error` is a mean of norms, so it errs upwards: not at all where a result has
many directions, by 5 % where it has six, by up to a quarter where one column carries it.

It holds for rounding that averages out over the reduction. Saturation is a biased shrinkage that adds up instead, and
reduced accumulation loses bits of the sum, which no operand shows: such recipes are refused and must be measured.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from loka.errors import ArgumentError, EvidenceError
from loka.formats import FORMATS, PASS_OPERANDS, PASSES, OperandSpec, Pass, Recipe, ScaleRule
from loka.probes.distributions.alignment import Alignment, row_factors, weighted_energy
from loka.probes.distributions.histograms import (
    BINS,
    BINS_PER_OCTAVE,
    OCTAVES,
    PHASES,
    OperandHistograms,
    Survey,
    group_kinds,
)
from loka.probes.distributions.moments import Arrays, pieces
from loka.probes.distributions.stored import Stored
from loka.quantize import fake_quantize

# Values per bin, and amax mantissas per phase, over which the cast is averaged.
_VALUES: Final[int] = 64
_MANTISSAS: Final[int] = 4
# Energy under the histogram's range is spread over this many octaves.
_OCTAVES_BELOW: Final[int] = 8
# Rows of an operand that its histograms are taken of.
SAMPLED_ROWS: Final[int] = 64
# Elements of the second operand that are multiplied at a time, in PIECE_ELEMENTS: 16 MiB in fp32.
_COPIES: Final[int] = 16


class NoClosedFormError(EvidenceError):
    """A closed form was asked for a recipe whose error is not that of rounding its operands; measure it directly."""


@lru_cache(maxsize=32)
def bin_errors(format_name: str, scale_rule: ScaleRule) -> npt.NDArray[np.float64]:
    """Return the relative squared error [PHASES, BINS] of the true cast, by mantissa of amax and bin of the ratio."""
    ratio = _ratios()
    steps = torch.arange(PHASES * _MANTISSAS, dtype=torch.float64, device="cpu")
    mantissa = 1 + (steps + 0.5) / (PHASES * _MANTISSAS)
    spec = OperandSpec(format=FORMATS[format_name], group_rows=1, group_k=None, scale_rule=scale_rule)
    x = (mantissa[:, None] * ratio.flatten()).float()
    error = (fake_quantize(x, spec, mantissa.float().reshape(-1, 1, 1, 1)).double() - x.double()).square()
    shape = (PHASES, _MANTISSAS, *ratio.shape)
    relative = error.reshape(shape).sum(dim=(1, 3)) / x.double().square().reshape(shape).sum(dim=(1, 3))
    result: npt.NDArray[np.float64] = relative.numpy()
    result.setflags(write=False)  # every caller gets the same one
    return result


def operand_error(operand: OperandHistograms, spec: OperandSpec) -> float:
    """Return the relative rms error of an operand under a spec: square root of lost energy over energy."""
    histogram = operand.histogram(spec)
    total = float(histogram.energy.sum())
    if total == 0:
        return 0.0
    errors = bin_errors(spec.format.name, spec.scale_rule)
    return math.sqrt(float((histogram.phase / histogram.phase.sum()) @ errors @ (histogram.energy / total)))


def expected_row_error(
    a: OperandHistograms, b: OperandHistograms, alignment: Alignment, recipe: Recipe, product: Pass
) -> float:
    """Return the expected `row_error` of a product under a recipe; NaN where no row had a reference.

    Raises NoClosedFormError for a recipe without one (`Recipe.has_closed_form`) and ArgumentError where its kind of
    groups was not probed.
    """
    if not recipe.has_closed_form:
        raise _refusal(recipe)
    if alignment.count == 0:
        return math.nan
    roles = PASS_OPERANDS[product]
    errors = [operand_error(operand, recipe.operand(role)) for operand, role in zip((a, b), roles, strict=True)]
    return math.hypot(*errors) * alignment.factor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ProductStatistics:
    """What the closed form needs to know of one product out[m, n] = sum_k a[m, k] b[n, k].

    Rows weigh by their A^-1/2 in the histograms: `row_error` is a mean over rows of operand error times A^-1/2, and the
    rows where one is large may be those where the other is.
    """

    product: Pass
    a: OperandHistograms
    b: OperandHistograms
    alignment: Alignment
    columns: int  # N
    reduction: int  # K; for wgrad the most tokens seen
    amax: tuple[float, float]  # of the whole operands
    samples: int = 1

    @classmethod
    def empty(cls, product: Pass, columns: int) -> "ProductStatistics":
        """Return the neutral element of `merge`, for a rank that saw no rows."""
        nothing = OperandHistograms.empty()
        return cls(
            product=product,
            a=nothing,
            b=nothing,
            alignment=Alignment.empty(),
            columns=columns,
            reduction=0,
            amax=(0.0, 0.0),
            samples=0,
        )

    @classmethod
    def of(
        cls, a: Tensor, b: Tensor, product: Pass, *, y: Tensor | None = None, a_amax: Tensor | float | None = None
    ) -> "ProductStatistics":
        """Take sampled rows a [R, K] and the whole b [N, K], which is read a block at a time and never copied.

        y = a b^T [R, N] in fp32 without bias, where it is known; a_amax: of all rows of a, where these are a part. A
        row with a non-finite result or operand is left out; a non-finite b leaves none.
        """
        kinds_a, kinds_b = group_kinds(product)
        a, b = a.detach(), b.detach()
        survey = Survey.of(b)
        terms = weighted_energy(a, survey.energy)
        factors = row_factors(terms, product_energy(a, b) if y is None else weighted_energy(y.detach()))
        weight = torch.where(factors.isfinite(), factors, 0.0)
        largest = Survey.of(a).largest if a_amax is None else float(a_amax)
        first, second = OperandHistograms.empty(), OperandHistograms.empty()
        if bool((weight > 0).any()):
            # Evenly spread rows: operands have structure along their rows, e.g. heads, and it costs no randomness.
            rows = _spread((weight > 0).nonzero().flatten())
            first = OperandHistograms.of(
                a, kinds_a, column_weight=survey.energy, per_row=weight, amax=largest, sample=rows
            )
            mean_energy = _mean_energy(a[rows], weight[rows] / terms[rows])
            every = _spread(torch.arange(len(b), device=b.device))
            second = OperandHistograms.of(
                b, kinds_b, column_weight=mean_energy, per_row=False, amax=survey.amax, sample=every
            )
        return cls(
            product=product,
            a=first,
            b=second,
            alignment=Alignment.of_factors(factors),
            columns=len(b),
            reduction=b.shape[1],
            amax=(largest, survey.largest),
        )

    @property
    def nbytes(self) -> int:
        """Bytes that the state holds, its few numbers aside."""
        return self.a.nbytes + self.b.nbytes

    def row_error(self, recipe: Recipe) -> float:
        """Return the expected `row_error` under a recipe; see `expected_row_error`."""
        return expected_row_error(self.a, self.b, self.alignment, recipe, self.product)

    def merge(self, other: "ProductStatistics") -> "ProductStatistics":
        """Return the statistics of both samples. Raises ArgumentError where they are of different products."""
        if (self.product, self.columns) != (other.product, other.columns):
            raise ArgumentError(
                f"Statistics of a {self.product} with {self.columns} columns cannot be merged with those of a "
                f"{other.product} with {other.columns}: only samples of one product can. Merge per site and pass."
            )
        return ProductStatistics(
            product=self.product,
            a=self.a.merge(other.a),
            b=self.b.merge(other.b),
            alignment=self.alignment.merge(other.alignment),
            columns=self.columns,
            reduction=max(self.reduction, other.reduction),
            amax=(max(self.amax[0], other.amax[0]), max(self.amax[1], other.amax[1])),
            samples=self.samples + other.samples,
        )

    def arrays(self) -> Arrays:
        """Return the state as arrays that `.npy` stores without pickle."""
        parts = {"a": self.a.arrays(), "b": self.b.arrays(), "alignment": self.alignment.arrays()}
        shape = (PASSES.index(self.product), self.columns, self.reduction, self.samples)
        return {
            "shape": np.array(shape, dtype=np.int64),
            "amax": np.array(self.amax, dtype=np.float64),
            **{f"{part}.{name}": array for part, arrays in parts.items() for name, array in arrays.items()},
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> "ProductStatistics":
        """Restore what `arrays` gave. Raises ArgumentError where parts are missing or do not fit."""
        stored = Stored("ProductStatistics", arrays)
        number, columns, reduction, samples = stored.counts("shape", 4)
        if number >= len(PASSES):
            raise stored.damaged("shape", f"names pass number {number} of {len(PASSES)}")
        first, second = (float(value) for value in stored.energies("amax", (2,)))
        return cls(
            product=PASSES[number],
            a=OperandHistograms.from_arrays(stored.part("a.")),
            b=OperandHistograms.from_arrays(stored.part("b.")),
            alignment=Alignment.from_arrays(stored.part("alignment.")),
            columns=columns,
            reduction=reduction,
            amax=(first, second),
            samples=samples,
        )


def product_energy(a: Tensor, b: Tensor) -> Tensor:
    """Return the squared norm [R] float64 of every row of a b^T, without holding the product."""
    total = torch.zeros(len(a), dtype=torch.float64, device=a.device)
    a = a.float()
    with torch.autocast(a.device.type, enabled=False):
        for part in pieces(len(b), max(len(a), b.shape[1] // _COPIES)):
            total += (a @ b[part].float().T).double().square_().sum(dim=1)
    return total


def _mean_energy(a: Tensor, weight: Tensor) -> Tensor:
    """Return the sum [K] float64 over rows of a [R, K] of x^2 times the weight [R] of the row."""
    result = torch.empty(a.shape[1], dtype=torch.float64, device=a.device)
    for part in pieces(a.shape[1], len(a)):
        result[part] = weight @ a[:, part].double().square()
    return result


def _spread(index: Tensor) -> Tensor:
    """Return at most SAMPLED_ROWS of these, evenly spread."""
    step = len(index) / SAMPLED_ROWS
    if step <= 1:
        return index
    place = torch.arange(SAMPLED_ROWS, dtype=torch.float32, device=index.device)
    return index[((place + 0.5) * step).long()]


def _refusal(recipe: Recipe) -> NoClosedFormError:
    reason = (
        "it saturates by design, and the loss of clipped values does not average out"
        if recipe.saturating
        else "it adds up with reduced precision, and what the sum loses does not show in its operands"
    )
    return NoClosedFormError(
        f"The error of recipe {recipe.name!r} was asked in closed form, but {reason}. Measure it directly, with the "
        "recipe among those of the probe."
    )


def _ratios() -> Tensor:
    """Return log-uniform ratios [BINS, _VALUES] float64 in the bins of a histogram."""
    within = (torch.arange(_VALUES, dtype=torch.float64, device="cpu") + 0.5) / _VALUES
    place = torch.arange(OCTAVES * BINS_PER_OCTAVE, device="cpu")
    exponent = -(place // BINS_PER_OCTAVE).double() - 1
    low = 1 + (BINS_PER_OCTAVE - 1 - place % BINS_PER_OCTAVE).double() / BINS_PER_OCTAVE
    high = low + 1 / BINS_PER_OCTAVE
    inside = torch.exp2(exponent)[:, None] * low[:, None] * (high / low)[:, None] ** within
    below = torch.exp2(-OCTAVES - _OCTAVES_BELOW * within)
    result = torch.cat((torch.ones_like(below[None]), inside, below[None]))
    assert len(result) == BINS
    return result
