"""Error metrics: how far a computed product lies from its reference, one definition each.

`row_error` is what gates: rows, because one loud row hides the damage in all others from any whole-tensor norm. Heads
with fewer than MIN_COLUMNS outputs have rows too short to be stable and are gated by `relative_error`. `mere` is the
paper's mean element-wise relative error with a floored denominator; it is reported for parity and never gates.
"""

import math
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

Gate = Literal["row_error", "relative_error"]

# Below this many output columns a row norm is as unstable as a single element.
MIN_COLUMNS: Final[int] = 8
# Denominator floor of `mere`, as a share of rms(reference). Unfloored, it does not settle from batch to batch.
MERE_FLOOR: Final[float] = 1e-3
# Elements of all candidates together that are compared at once: copies in fp64 stay small however wide the product.
_AT_ONCE: Final[int] = 1 << 20
# The smallest normal fp32: a floor below it would divide by zero.
_TINY: Final[float] = 2.0**-126


@dataclass(frozen=True, kw_only=True, slots=True)
class ProductError:
    """Errors of one product against its reference. Ratios are dimensionless; NaN where nothing could be compared."""

    row_error: float  # mean over rows of |y_hat_i - y_i| / |y_i|
    row_error_p99: float
    relative_error: float  # |y_hat - y| / |y| over the whole tensor
    sqnr_db: float  # 20 log10 of 1 / relative_error
    mere: float
    rows: int  # rows that entered
    zero_rows: int  # rows whose reference is exactly zero, left out of row_error
    bad_rows: int  # rows whose reference is not finite, left out of everything
    bias: float = math.nan  # <y_hat - y, y> / |y|^2 over the whole tensor: the part of the error along the result

    def gated(self, gate: Gate) -> float:
        """Return the metric that decides."""
        return self.row_error if gate == "row_error" else self.relative_error


def gate_for(columns: int) -> Gate:
    """Return which metric decides for a product with this many output columns."""
    return "row_error" if columns >= MIN_COLUMNS else "relative_error"


def product_error(actual: Tensor, reference: Tensor) -> ProductError:
    """Compare a product with its reference, both [rows, columns].

    Rows with a non-finite reference are excluded and counted; a non-finite `actual` against a finite reference is an
    infinite error, never a missing one.
    """
    return product_errors(actual.unsqueeze(0), reference)[0]


def product_errors(actual: Tensor, reference: Tensor) -> list[ProductError]:
    """Compare several candidates [candidates, rows, columns] with one reference [rows, columns]; see `product_error`.

    Differences are taken in fp32, norms in fp64; two transfers to the host serve all candidates, where no row is left
    out.
    """
    reference = reference.float()
    step = max(_AT_ONCE // max(actual[:, :1].numel(), 1), 1)
    # Squares of fp32 cannot overflow fp64: a norm is infinite only where an element is.
    row_norm = torch.cat([block.double().norm(dim=-1) for block in torch.split(reference, step)])
    finite = torch.isfinite(row_norm)
    counts = torch.stack([~finite, row_norm == 0]).sum(dim=1).double()
    bad_rows, zero_rows, norm = torch.cat([counts, torch.where(finite, row_norm, 0.0).norm().view(1)]).tolist()
    if bad_rows:
        reference, actual, row_norm = reference[finite], actual[:, finite], row_norm[finite]
    if reference.numel() == 0 or norm == 0:
        nothing = _nothing_compared(zero_rows=reference.shape[0] if reference.numel() else 0, bad_rows=int(bad_rows))
        return [nothing] * actual.shape[0]
    floor = max(MERE_FLOOR * norm / math.sqrt(reference.numel()), _TINY)
    blocks = zip(torch.split(actual, step, dim=1), torch.split(reference, step), strict=True)
    by_row = [_compare_rows(some, exact, floor) for some, exact in blocks]
    row_difference, along, relative_by_row = (torch.cat(column, dim=-1) for column in zip(*by_row, strict=True))
    some = row_norm > 0 if zero_rows else slice(None)
    ratio = row_difference[:, some] / row_norm[some]
    columns = torch.stack(
        [
            ratio.mean(-1),
            _quantile(ratio, 0.99),
            row_difference.norm(dim=-1) / norm,
            relative_by_row.mean(-1),
            along.sum(-1) / norm**2,
        ],
        dim=-1,
    )
    rows = ratio.shape[-1]
    return [
        ProductError(
            row_error=row_error,
            row_error_p99=p99,
            relative_error=relative,
            sqnr_db=decibels(relative),
            mere=mere,
            rows=rows,
            zero_rows=reference.shape[0] - rows,
            bad_rows=int(bad_rows),
            bias=along,
        )
        for row_error, p99, relative, mere, along in columns.tolist()
    ]


def _compare_rows(actual: Tensor, reference: Tensor, floor: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return of every candidate and row |y_hat - y|, <y_hat - y, y> and the mean of |y_hat - y| / max(|y|, floor)."""
    difference = (actual.float() - reference).nan_to_num_(nan=math.inf, posinf=math.inf, neginf=-math.inf)
    exact = difference.double()
    along = torch.einsum("crn,rn->cr", exact, reference.double())
    norm = exact.norm(dim=-1)
    return norm, along, difference.abs_().div_(reference.abs().clamp_min_(floor)).mean(-1).double()


def _quantile(ratio: Tensor, q: float) -> Tensor:
    """Return the q-quantile over the last dimension, between two values as `torch.quantile` does; Inf stays Inf."""
    ordered = ratio.sort(dim=-1).values
    rank = q * (ratio.shape[-1] - 1)
    low, high = ordered[..., math.floor(rank)], ordered[..., math.ceil(rank)]
    return torch.where(low.isinf(), low, low + (rank - math.floor(rank)) * (high - low))


def _nothing_compared(*, zero_rows: int, bad_rows: int) -> ProductError:
    nan = math.nan
    return ProductError(
        row_error=nan,
        row_error_p99=nan,
        relative_error=nan,
        sqnr_db=nan,
        mere=nan,
        rows=0,
        zero_rows=zero_rows,
        bad_rows=bad_rows,
    )


def decibels(relative: float) -> float:
    """Return a relative error as the signal-to-noise ratio in dB; NaN stays NaN."""
    if math.isnan(relative):
        return relative
    return -20.0 * math.log10(relative) if relative > 0 else float("inf")
