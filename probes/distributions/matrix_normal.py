"""A weight as a matrix normal, W ~ MN(mean, U, V): rows vary together as U says, columns as V says.

The paper keeps U [N, N] and V [K, K] by flip-flop: each is estimated from the weight whitened by the other, and the
estimates are averaged over the steps, the recent ones more. U and V are defined up to a factor that one can hand to the
other, so both are kept at a mean diagonal of one and the variance is a number of its own.

Whitening by any fixed matrix leaves the expected estimate proportional to the truth, for E[W A W^T] = U tr(A V). So the
whitener is drawn towards the identity without bias, and a singular U or V never has to be inverted. Each update whitens
with the state before it, which does not depend on the new weight. The mean is one number, not a matrix: a matrix would
be the weight itself. A side longer than FULL_FEATURES keeps the diagonal of its covariance only.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from loka.errors import ArgumentError
from loka.probes.distributions.covariance import FULL_FEATURES, square_root
from loka.probes.distributions.moments import Arrays, check_arrays, pieces

# The paper's range is 0.9 to 0.99.
MOMENTUM: Final[float] = 0.99
# Share of the identity in the whitener. It costs precision, never bias; at 1 the estimate would be W W^T alone.
SHRINKAGE: Final[float] = 0.1


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MatrixNormal:
    """Distribution of a weight [N, K]; cov(W_ij, W_kl) = variance * U_ik * V_jl."""

    mean: float
    variance: float  # of an element, on average
    rows: Tensor  # U, fp32: [N, N], or its diagonal [N] above FULL_FEATURES; trace N
    columns: Tensor  # V, fp32: [K, K], or its diagonal [K] above FULL_FEATURES; trace K
    momentum: float = MOMENTUM
    updates: int = 0
    skipped: int = 0  # weights left out for an element that is NaN or infinite

    @classmethod
    def empty(cls, shape: tuple[int, int], *, momentum: float = MOMENTUM) -> "MatrixNormal":
        """Start for weights of `shape` [N, K]. Raises ArgumentError unless 0 <= momentum < 1."""
        if not 0.0 <= momentum < 1.0:
            raise ArgumentError(f"A momentum of {momentum} was asked for: it lies in [0, 1), e.g. {MOMENTUM}.")
        rows, columns = (_identity(length) for length in shape)
        return cls(mean=0.0, variance=0.0, rows=rows, columns=columns, momentum=momentum)

    @classmethod
    def of(cls, weight: Tensor) -> "MatrixNormal":
        """Take the distribution of a single weight [N, K]."""
        return cls.empty(_shape(weight)).update(weight)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return len(self.rows), len(self.columns)

    @property
    def nbytes(self) -> int:
        """Bytes that the state holds."""
        return self.rows.nbytes + self.columns.nbytes

    def update(self, weight: Tensor) -> "MatrixNormal":
        """Return the state after one more weight [N, K]; this one stays as it is.

        The first updates are averaged evenly, until the momentum's window is full. A weight with a non-finite element
        is counted in `skipped`, an empty one changes nothing. Raises ArgumentError on another shape.
        """
        if _shape(weight) != self.shape:
            raise ArgumentError(
                f"A weight of shape {tuple(weight.shape)} was given to the statistics of one of {self.shape}: they "
                "describe one parameter. Start anew with MatrixNormal.empty(shape)."
            )
        if weight.numel() == 0:
            return self
        weight = weight.detach()
        center = _mean(weight)
        if not math.isfinite(center):
            return replace(self, skipped=self.skipped + 1)
        rate = max(1.0 - self.momentum, 1.0 / (self.updates + 1))
        mean = self.mean + rate * (center - self.mean)
        seen = _mean_square(weight, mean)
        variance = self.variance + rate * (seen - self.variance)
        state = replace(self, mean=mean, variance=variance, updates=self.updates + 1)
        if not seen > 0:  # constant: it says how much the weight varies, and nothing about how
            return state
        part = rate * seen / variance
        return replace(
            state,
            rows=_mixed(self.rows, _estimate(weight, mean, self.rows, self.columns), part),
            columns=_mixed(self.columns, _estimate(weight.T, mean, self.columns, self.rows), part),
        )

    def sample(self, generator: torch.Generator) -> Tensor:
        """Draw a weight [N, K], fp32, on the generator's device."""
        left, right = (_root(side.to(generator.device)) for side in (self.rows, self.columns))
        shape = _width(left), _width(right)
        noise = torch.randn(shape, generator=generator, dtype=torch.float32, device=generator.device)
        drawn = _times(_times(noise.T, right).T, left)
        return drawn.mul_(math.sqrt(self.variance)).add_(self.mean)

    def merge(self, other: "MatrixNormal") -> "MatrixNormal":
        """Return the average of two states of the same parameter, by their updates.

        For replicas (data parallel), where it changes nothing, and for independent runs. Ranks that hold different rows
        of one weight use `stack`. Raises ArgumentError where shape or momentum differ.
        """
        if (self.shape, self.momentum) != (other.shape, other.momentum):
            raise ArgumentError(
                f"Statistics of a weight of {self.shape} at momentum {self.momentum} cannot be merged with those of "
                f"{other.shape} at {other.momentum}: only one parameter has a common distribution. For row shards, "
                "use stack()."
            )
        updates, skipped = self.updates + other.updates, self.skipped + other.skipped
        if not (self.updates and other.updates):
            return replace(self if self.updates else other, skipped=skipped)
        share = other.updates / updates
        variance = self.variance + share * (other.variance - self.variance)
        part = share * other.variance / variance if variance > 0 else share
        return replace(
            self,
            mean=self.mean + share * (other.mean - self.mean),
            variance=variance,
            rows=_mixed(self.rows, other.rows.to(self.rows.device), part),
            columns=_mixed(self.columns, other.columns.to(self.columns.device), part),
            updates=updates,
            skipped=skipped,
        )

    def stack(self, below: "MatrixNormal") -> "MatrixNormal":
        """Return the distribution of the weight whose upper rows are this one's and whose lower rows are `below`'s.

        For weights sharded by rows (FSDP, column-parallel linears), in rank order. Rows of different shards never met,
        so their covariance is zero. A shard may have no rows. Raises ArgumentError where the columns differ.
        """
        if self.shape[1] != below.shape[1]:
            raise ArgumentError(
                f"Shards of {self.shape} and {below.shape} cannot be stacked: shards of rows have the same columns. "
                "Transpose shards of columns before their statistics are taken."
            )
        heights = [self.shape[0], below.shape[0]]
        if not (all(heights) and self.updates and below.updates):
            if all(heights):
                raise ArgumentError(
                    "A shard without a weight cannot be stacked with one that has seen some: nothing is known of its "
                    "rows. Update every shard first."
                )
            return self if heights[0] else below
        mean = (self.mean * heights[0] + below.mean * heights[1]) / sum(heights)
        variances = [state.variance + (state.mean - mean) ** 2 for state in (self, below)]
        energies = [height * variance for height, variance in zip(heights, variances, strict=True)]
        total = sum(energies)
        part = energies[1] / total if total > 0 else heights[1] / sum(heights)
        return replace(
            self,
            mean=mean,
            variance=total / sum(heights),
            rows=_stacked(self.rows, below.rows.to(self.rows.device), variances),
            columns=_mixed(self.columns, below.columns.to(self.columns.device), part),
            updates=min(self.updates, below.updates),
            skipped=max(self.skipped, below.skipped),
        )

    def arrays(self) -> Arrays:
        """Return the state as arrays that `.npy` stores without pickle."""
        return {
            "numbers": np.array([self.mean, self.variance, self.momentum], dtype=np.float64),
            "counts": np.array([self.updates, self.skipped], dtype=np.int64),
            "rows": self.rows.cpu().numpy(),
            "columns": self.columns.cpu().numpy(),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> "MatrixNormal":
        """Restore what `arrays` gave, on the CPU. Raises ArgumentError where parts are missing or do not fit."""
        check_arrays("MatrixNormal", arrays, ("numbers", "counts", "rows", "columns"))
        rows, columns = (torch.tensor(arrays[name], dtype=torch.float32, device="cpu") for name in ("rows", "columns"))
        for side in (rows, columns):
            if side.ndim not in (1, 2) or side.shape != _identity(len(side)).shape:
                raise ArgumentError(
                    f"A stored side of a matrix normal has shape {tuple(side.shape)}: it is square up to "
                    f"{FULL_FEATURES}, a diagonal above. The record is damaged; probe again."
                )
        mean, variance, momentum = (float(value) for value in arrays["numbers"])
        updates, skipped = (int(value) for value in arrays["counts"])
        return cls(
            mean=mean,
            variance=variance,
            rows=rows,
            columns=columns,
            momentum=momentum,
            updates=updates,
            skipped=skipped,
        )


def _shape(weight: Tensor) -> tuple[int, int]:
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ArgumentError(
            f"A matrix normal was asked of a {weight.dtype} tensor of shape {tuple(weight.shape)}: it describes a "
            "floating-point weight [N, K]. Take one expert, or reshape, first."
        )
    return weight.shape[0], weight.shape[1]


def _identity(length: int) -> Tensor:
    shape = torch.eye if length <= FULL_FEATURES else torch.ones
    return shape(length, dtype=torch.float32, device="cpu")


def _mean(weight: Tensor) -> float:
    """Mean of all elements; NaN where one is not finite."""
    total = torch.zeros((), dtype=torch.float64, device=weight.device)
    origin = weight[0, 0].double()  # a constant weight has exactly that mean
    for part in pieces(len(weight), weight.shape[1]):
        total += (weight[part].double() - origin).sum()
    return float(origin + total / weight.numel())


def _mean_square(weight: Tensor, mean: float) -> float:
    total = torch.zeros((), dtype=torch.float64, device=weight.device)
    for part in pieces(len(weight), weight.shape[1]):
        total += (weight[part].double() - mean).square_().sum()
    return float(total) / weight.numel()


def _estimate(weight: Tensor, mean: float, side: Tensor, other: Tensor) -> Tensor:
    """Return (W - mean) A (W - mean)^T float64, or its diagonal, in the form of `side`; A whitens the `other` side."""
    device = weight.device
    length, width = weight.shape
    side, other = side.to(device), other.to(device)
    result = torch.zeros(side.shape, dtype=torch.float64, device=device)
    if other.ndim == 1:
        whitener = 1.0 / ((1.0 - SHRINKAGE) * other.double() + SHRINKAGE)
        for part in pieces(width, length):
            block = weight[:, part].double() - mean
            scaled = block * whitener[part]
            result += (scaled @ block.T) if side.ndim == 2 else (scaled * block).sum(dim=1)
        return result
    whitener = (1.0 - SHRINKAGE) * other.double()
    whitener.diagonal().add_(SHRINKAGE)
    lower = torch.linalg.cholesky(whitener)
    for part in pieces(length, width) if side.ndim == 1 else (slice(0, length),):
        white = torch.linalg.solve_triangular(lower, (weight[part].double() - mean).T, upper=False)
        result[part] = white.T @ white if side.ndim == 2 else white.square().sum(dim=0)
    return result


def _mixed(old: Tensor, new: Tensor, rate: float) -> Tensor:
    """Average two sides of trace `length` each, the new one rescaled to it, and rescale the result."""
    return _rescaled(old.to(new.device).double().mul_(1.0 - rate).add_(_rescaled(new.double()), alpha=rate)).float()


def _rescaled(side: Tensor) -> Tensor:
    """Bring the mean of the diagonal to one."""
    diagonal = side if side.ndim == 1 else side.diagonal()
    return side * (len(side) / diagonal.sum())


def _stacked(upper: Tensor, lower: Tensor, variances: list[float]) -> Tensor:
    """Join two row sides, each weighted by the variance of its shard, as a block diagonal or as a diagonal."""
    weights = variances if sum(variances) > 0 else [1.0, 1.0]
    scaled = [side.double() * weight for side, weight in zip((upper, lower), weights, strict=True)]
    if len(upper) + len(lower) <= FULL_FEATURES:
        joined = torch.block_diag(*scaled)  # type: ignore[no-untyped-call]  # torch does not annotate it
        return _rescaled(joined).float()
    return _rescaled(torch.cat([side if side.ndim == 1 else side.diagonal() for side in scaled])).float()


def _root(side: Tensor) -> Tensor:
    """Square root of a side: a factor [length, r], or the roots of the diagonal [length]."""
    return side.sqrt() if side.ndim == 1 else square_root(side.double()).float()


def _width(root: Tensor) -> int:
    return root.shape[-1]


def _times(noise: Tensor, root: Tensor) -> Tensor:
    """Apply a root to the rows of `noise`."""
    return root @ noise if root.ndim == 2 else noise * root.unsqueeze(1)
