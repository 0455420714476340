"""How the features of an operand vary together, in memory that 123,200 features fit into.

Up to FULL_FEATURES, the whole matrix is kept. Above, its product with a fixed random matrix of signs is: a linear
function of the covariance, so parts still merge exactly and in any order. From that sketch Nystrom's formula recovers
the strongest directions, F F^T, and the exact variances say what is left for the diagonal. The signs are a hash of the
feature's number and are never stored, so states written years apart, by other versions or on other devices, merge.

What is stored is free of units: every feature is divided by its own spread, which the moments hold in float64. Values
of 1e30 or 1e-30 lose nothing in fp32. The sums themselves run in float64, out of reach of autocast and TF32.
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
from loka.probes.distributions.moments import Arrays, Moments, check_arrays, finite_rows, pieces, row_blocks

# Above this many features the K x K matrix (4 MB at 1,024) gives way to the sketch.
FULL_FEATURES: Final[int] = 1024
# Columns of the sketch: 64 make 32 MB at K = 123,200, and one 64-bit hash per feature.
RANK: Final[int] = 64
# Directions below this share of the strongest are rounding noise of the fp32 state.
NEGLIGIBLE: Final[float] = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Covariance:
    """Covariance of rows [*, K]. Merging any parts in any order gives the whole, up to the rounding of fp32."""

    moments: Moments
    # fp32; with s = sqrt(m2) and S = sum (x - mean)(x - mean)^T: full [K, K], S_ij / (s_i s_j);
    # sketched [K, rank], (S Omega)_i / (s_i |s|). Zero where s_i is.
    matrix: Tensor
    rank: int | None = None  # None: full

    @classmethod
    def empty(cls, features: int, *, rank: int | None = None) -> "Covariance":
        """Return the neutral element of `merge`; `rank` as in `of`."""
        rank = _chosen(features, rank)
        matrix = torch.zeros(features, features if rank is None else rank, dtype=torch.float32, device="cpu")
        return cls(moments=Moments.empty(features), matrix=matrix, rank=rank)

    @classmethod
    def of(cls, rows: Tensor, *, rank: int | None = None) -> "Covariance":
        """Take the covariance of rows [n, K], of any floating dtype with values in the range of fp32; n may be 0.

        Without `rank` it is full up to FULL_FEATURES and of RANK above; with it, low rank at any K (from about 8 on:
        few random signs may coincide). Rows with a non-finite element are left out and counted in `skipped`. Raises
        ArgumentError on other shapes.
        """
        rows, skipped = finite_rows(rows)
        rank = _chosen(rows.shape[1], rank)
        total: Covariance | None = None  # an empty one would take the memory of a whole one
        for block in row_blocks(rows):
            moments = Moments.of(block)
            matrix = _gram(block, moments) if rank is None else _sketch(block, moments, rank)
            part = cls(moments=moments, matrix=matrix, rank=rank)
            total = part if total is None else total.merge(part)
        if total is None:
            total = cls.empty(rows.shape[1], rank=rank)
        return replace(total, moments=replace(total.moments, skipped=skipped))

    @property
    def count(self) -> int:
        """Rows that entered."""
        return self.moments.count

    @property
    def skipped(self) -> int:
        """Rows left out for an element that is NaN or infinite."""
        return self.moments.skipped

    @property
    def features(self) -> int:
        """K."""
        return self.moments.features

    @property
    def mean(self) -> Tensor:
        """[K] float64."""
        return self.moments.mean

    @property
    def variance(self) -> Tensor:
        """Sample variance [K] float64, exact in the full and in the sketched form."""
        return self.moments.variance

    @property
    def nbytes(self) -> int:
        """Bytes that the state holds."""
        return self.moments.nbytes + self.matrix.nbytes

    def merge(self, other: "Covariance") -> "Covariance":
        """Return the covariance of both sets of rows together. Raises ArgumentError where features or ranks differ."""
        moments = self.moments.merge(other.moments)
        if self.rank != other.rank:
            raise ArgumentError(
                f"A covariance in {_form(self.rank)} cannot be merged with one in {_form(other.rank)}: what one "
                "dropped, the other has. Take both with the same rank=."
            )
        if not (self.count and other.count):
            return replace(self if self.count else other, moments=moments)
        return replace(self, moments=moments, matrix=_merged(self, other, moments))

    def factor(self) -> tuple[Tensor, Tensor]:
        """Return F [K, r] and d [K] >= 0, float64, such that the covariance is about F F^T + diag(d).

        The diagonal of the result is the exact variance. r is at most K (full) or the rank, less where the rows span
        less, 0 without variance. To draw: mean + F z + sqrt(d) e with standard normal z [r] and e [K].
        """
        unit = square_root(self.matrix.double()) if self.rank is None else self._nystrom()
        norm = unit.square().sum(dim=1)
        # Rounding may put a row above its variance, and the weak directions are missing: the diagonal makes it exact.
        unit *= norm.clamp_min(1.0).rsqrt().unsqueeze(1)
        spread = self.variance.sqrt()
        return unit * spread.unsqueeze(1), self.variance * (1.0 - norm).clamp_(0.0, 1.0)

    def dense(self) -> Tensor:
        """Return the covariance [K, K] float64, for K small enough to want it."""
        spread = self.variance.sqrt()
        return self.correlation() * spread.unsqueeze(1) * spread

    def correlation(self) -> Tensor:
        """Return the correlation [K, K] float64; rows and columns of constant features are zero."""
        varies = (self.variance > 0).double()
        if self.rank is None:
            result = self.matrix.double() if self.count > 1 else torch.zeros_like(self.matrix, dtype=torch.float64)
        else:
            unit = self._nystrom()
            unit *= unit.square().sum(dim=1, keepdim=True).clamp_min(1.0).rsqrt()
            result = unit @ unit.T
        result.diagonal().copy_(varies)
        return result

    def arrays(self) -> Arrays:
        """Return the state as arrays that `.npy` stores without pickle."""
        rank = np.array(self.rank or 0, dtype=np.int64)
        return {**self.moments.arrays(), "rank": rank, "matrix": self.matrix.cpu().numpy()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> "Covariance":
        """Restore what `arrays` gave, on the CPU. Raises ArgumentError where parts are missing or do not fit."""
        check_arrays("Covariance", arrays, ("rank", "matrix"))
        moments, rank = Moments.from_arrays(arrays), int(arrays["rank"]) or None
        matrix = torch.tensor(arrays["matrix"], dtype=torch.float32, device="cpu")
        expected = (moments.features, moments.features if rank is None else rank)
        if tuple(matrix.shape) != expected:
            raise ArgumentError(
                f"A stored covariance in {_form(rank)} over {moments.features} features has a matrix of shape "
                f"{tuple(matrix.shape)} instead of {expected}. The record is damaged; probe again."
            )
        return cls(moments=moments, matrix=matrix, rank=rank)

    def _nystrom(self) -> Tensor:
        """Return unit rows f [K, r] with f_i . f_j about the correlation and |f_i|^2 <= 1, up to rounding."""
        rank = self.matrix.shape[1]
        share = _shares(self.moments)
        core = torch.zeros(rank, rank, dtype=torch.float64, device=self.matrix.device)
        for part in pieces(self.features, rank):
            core += (signs(part, rank, self.matrix.device) * share[part, None]).T @ self.matrix[part].double()
        values, vectors = torch.linalg.eigh((core + core.T) / 2)
        kept = values > NEGLIGIBLE * values.max().clamp_min(0.0)
        project = vectors[:, kept] * values[kept].rsqrt()
        result = torch.empty(self.features, project.shape[1], dtype=torch.float64, device=self.matrix.device)
        for part in pieces(self.features, rank):
            result[part] = self.matrix[part].double() @ project
        return result


def square_root(matrix: Tensor) -> Tensor:
    """Return F [K, r] float64 with F F^T about a positive semi-definite matrix [K, K] that may be singular.

    Cholesky where the part with a positive diagonal allows it, else eigenvectors without the negligible ones.
    """
    kept = matrix.diagonal() > 0
    core = matrix[kept][:, kept]
    lower, failed = torch.linalg.cholesky_ex(core)
    if core.numel() and (int(failed) or not lower.isfinite().all()):
        values, vectors = torch.linalg.eigh(core)
        large = values > NEGLIGIBLE * values.max()
        lower = vectors[:, large] * values[large].sqrt()
    result = torch.zeros(len(matrix), lower.shape[1], dtype=matrix.dtype, device=matrix.device)
    result[kept] = lower
    return result


def signs(part: slice, rank: int, device: torch.device) -> Tensor:
    """Return rows `part` of Omega [K, rank], +1 or -1, float64: the bits of a hash (splitmix64) of feature numbers.

    Signs do what a Gaussian does in a sketch. A hash is the same for ever and everywhere; no library promises that of
    its normal random numbers.
    """
    words = math.ceil(rank / 64)
    state = np.arange(part.start * words, part.stop * words, dtype=np.uint64)
    state = (state + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    state ^= state >> np.uint64(31)
    octets = state.astype("<u8").view(np.uint8).reshape(part.stop - part.start, 8 * words)
    bits = torch.from_numpy(np.unpackbits(octets, axis=1, count=rank))
    return bits.to(device, torch.float64).mul_(2.0).sub_(1.0)


def _chosen(features: int, rank: int | None) -> int | None:
    if rank is not None and rank < 1:
        raise ArgumentError(f"A covariance of rank {rank} was asked for: it keeps at least 1 direction; omit rank=.")
    return RANK if rank is None and features > FULL_FEATURES else rank


def _form(rank: int | None) -> str:
    return "full form" if rank is None else f"low-rank form (rank {rank})"


def _inverse(values: Tensor) -> Tensor:
    """1 / values, and 0 where a value is 0."""
    return torch.where(values > 0, 1.0 / values, 0.0)


def _shares(moments: Moments) -> Tensor:
    """Return s / |s| [K]: how much of the whole spread is a feature's."""
    spread = moments.m2.sqrt()
    return spread * _inverse(spread.norm())


def _standardised(rows: Tensor, moments: Moments, part: slice) -> Tensor:
    """(x - mean) / s of some features [n, part], float64; columns have norm 1, or 0 where constant."""
    return (rows[:, part].double() - moments.mean[part]).mul_(_inverse(moments.m2[part].sqrt()))


def _gram(rows: Tensor, moments: Moments) -> Tensor:
    unit = _standardised(rows, moments, slice(0, moments.features))
    return _with_diagonal(unit.T @ unit, moments)


def _with_diagonal(matrix: Tensor, moments: Moments) -> Tensor:
    """Set the diagonal to what it is by definition, then round to fp32."""
    matrix.diagonal().copy_(moments.m2 > 0)
    return matrix.float()


def _sketch(rows: Tensor, moments: Moments, rank: int) -> Tensor:
    """S Omega as X^T (X Omega), X the centred rows: two passes over pieces of the features."""
    features, device = moments.features, rows.device
    share, width = _shares(moments), max(len(rows), rank)
    inner = torch.zeros(len(rows), rank, dtype=torch.float64, device=device)
    for part in pieces(features, width):
        inner += _standardised(rows, moments, part).mul_(share[part]) @ signs(part, rank, device)
    matrix = torch.empty(features, rank, dtype=torch.float32, device=device)
    for part in pieces(features, width):
        matrix[part] = (_standardised(rows, moments, part).T @ inner).float()
    return matrix


def _merged(one: Covariance, two: Covariance, whole: Moments) -> Tensor:
    """Chan's rule on the stored form: S = S_one + S_two + (n_one n_two / n) delta delta^T."""
    device = one.matrix.device
    spread = whole.m2.sqrt()
    scale = _inverse(spread)
    weights = [state.moments.m2.to(device).sqrt() * scale for state in (one, two)]
    delta = (two.mean.to(device) - one.mean) * math.sqrt(one.count * two.count / whole.count)
    if one.rank is None:
        result = torch.outer(delta * scale, delta * scale)
        for state, weight in zip((one, two), weights, strict=True):
            result += torch.outer(weight, weight).mul_(state.matrix.to(device))
        return _with_diagonal(result, whole)
    rank, norm = one.rank, _inverse(spread.norm())
    inner = torch.zeros(rank, dtype=torch.float64, device=device)
    for part in pieces(one.features, rank):
        inner += (delta[part] * norm) @ signs(part, rank, device)
    weights = [
        weight * (state.moments.m2.to(device).sqrt().norm() * norm)
        for state, weight in zip((one, two), weights, strict=True)
    ]
    matrix = torch.empty_like(one.matrix)
    for part in pieces(one.features, rank):
        piece = torch.outer((delta * scale)[part], inner)
        for state, weight in zip((one, two), weights, strict=True):
            piece += state.matrix[part].to(device) * weight[part, None]
        matrix[part] = piece.float()
    return matrix
