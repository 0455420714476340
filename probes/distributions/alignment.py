"""How coherent the output rows of a product are: the one scalar that histograms and synthetic draws cannot see.

Rounding errors add up as if independent; the products themselves do not. A_i = |y_i|^2 / sum_k x_ik^2 G_kk, with G_kk
the squared column norms of the second operand, is 1 for independent terms, above where they reinforce each other and
below where they cancel. `row_error` is the operand error times the mean of A_i^-1/2; without, it is off by up to 5x.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from loka.probes.distributions.moments import Arrays, pieces
from loka.probes.distributions.stored import Stored


@dataclass(frozen=True, kw_only=True, slots=True)
class Alignment:
    """Sums over the rows of a product, so parts add."""

    count: int = 0  # rows that entered
    total: float = 0.0  # sum of A^-1/2
    squares: float = 0.0  # sum of A^-1
    zero_rows: int = 0  # rows whose reference is exactly zero, left out
    skipped: int = 0  # rows with a non-finite operand or reference, left out

    @classmethod
    def empty(cls) -> "Alignment":
        """Return the neutral element of `merge`."""
        return cls()

    @classmethod
    def of(cls, a_rows: Tensor, b_col_energy: Tensor, y_rows: Tensor) -> "Alignment":
        """Take rows a [R, K], the squared column norms [K] of the whole b, and rows y = a b^T [R, N] without bias."""
        return cls.of_factors(row_factors(weighted_energy(a_rows, b_col_energy), weighted_energy(y_rows)))

    @classmethod
    def of_factors(cls, factors: Tensor) -> "Alignment":
        """Take A^-1/2 of every row, as `row_factors` gives it."""
        some = factors[factors.isfinite()]
        return cls(
            count=some.numel(),
            total=float(some.sum()),
            squares=float(some.square().sum()),
            zero_rows=int(factors.isinf().sum()),
            skipped=int(factors.isnan().sum()),
        )

    @property
    def factor(self) -> float:
        """Mean of A^-1/2; NaN where no row entered."""
        return self.total / self.count if self.count else math.nan

    @property
    def spread(self) -> float:
        """Standard deviation of A^-1/2 over rows; NaN where no row entered."""
        return math.sqrt(max(0.0, self.squares / self.count - self.factor**2)) if self.count else math.nan

    @property
    def uncertainty(self) -> float:
        """Standard error of `factor` as a share of it: how well the rows seen tell the mean; NaN below two rows.

        Rows that nearly cancel have an A^-1/2 without bound, and a few of them can be most of the mean.
        """
        if self.count < 2 or self.total == 0:
            return math.nan
        return self.spread / math.sqrt(self.count - 1) / self.factor

    def merge(self, other: "Alignment") -> "Alignment":
        """Return the alignment of both sets of rows."""
        return Alignment(
            count=self.count + other.count,
            total=self.total + other.total,
            squares=self.squares + other.squares,
            zero_rows=self.zero_rows + other.zero_rows,
            skipped=self.skipped + other.skipped,
        )

    def arrays(self) -> Arrays:
        """Return the state as arrays that `.npy` stores without pickle."""
        return {
            "counts": np.array((self.count, self.zero_rows, self.skipped), dtype=np.int64),
            "sums": np.array((self.total, self.squares), dtype=np.float64),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> "Alignment":
        """Restore what `arrays` gave. Raises ArgumentError where parts are missing or do not fit."""
        stored = Stored("Alignment", arrays)
        count, zero_rows, skipped = stored.counts("counts", 3)
        total, squares = (float(value) for value in stored.energies("sums", (2,)))
        if count == 0 and (total or squares):
            raise stored.damaged("sums", "has sums of no rows")
        return cls(count=count, total=total, squares=squares, zero_rows=zero_rows, skipped=skipped)


def weighted_energy(rows: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return the sum over k of x_k^2 w_k of every row [R], float64, without a float64 copy of all rows."""
    total = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    for part in pieces(rows.shape[1], len(rows)):
        square = rows[:, part].detach().double().square()
        total += square.sum(dim=1) if weight is None else square @ weight[part].double()
    return total


def row_factors(terms: Tensor, reference: Tensor) -> Tensor:
    """Return A^-1/2 of rows with this energy of terms and of result: Inf where the result is 0, NaN if not finite."""
    finite = terms.isfinite() & reference.isfinite()
    factors = torch.where(reference > 0, (terms / reference).sqrt(), math.inf)
    return torch.where(finite, factors, math.nan)
