"""Mean and variance of every feature of an operand, merged over steps and ranks without ever holding the rows.

Two parts of the data merge by Chan's rule: their sums of squared deviations add, plus what the distance of their means
contributes. Deviations are taken from the first row before anything is summed, so that a mean 10^4 standard deviations
away costs no digits, and a constant feature has a variance of exactly zero. Everything is float64: of 10^9 rows, the
last one still counts.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from loka.errors import ArgumentError

Arrays = dict[str, npt.NDArray[Any]]

# Bounds of the temporary memory: a piece of rows x features in float64 takes 2 MB.
BLOCK_ROWS: Final[int] = 1024
PIECE_ELEMENTS: Final[int] = 2**18


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Moments:
    """Count, mean and sum of squared deviations of rows [*, K]. Merging any parts in any order gives the whole."""

    count: int  # rows that entered
    mean: Tensor  # [K] float64
    m2: Tensor  # [K] float64: sum over rows of (x - mean)^2
    skipped: int = 0  # rows left out for an element that is NaN or infinite

    @classmethod
    def empty(cls, features: int) -> "Moments":
        """Return the neutral element of `merge`."""
        zeros = torch.zeros(features, dtype=torch.float64, device="cpu")
        return cls(count=0, mean=zeros, m2=zeros.clone())

    @classmethod
    def of(cls, rows: Tensor) -> "Moments":
        """Take the moments of rows [n, K], of any floating dtype with values in the range of fp32; n may be 0.

        Rows with a non-finite element are left out and counted in `skipped`. Raises ArgumentError on other shapes.
        """
        rows, skipped = finite_rows(rows)
        total = cls.empty(rows.shape[1])
        for block in row_blocks(rows):
            total = total.merge(_of_block(block)) if total.count else _of_block(block)
        return replace(total, skipped=skipped)

    @property
    def features(self) -> int:
        """K."""
        return self.mean.numel()

    @property
    def variance(self) -> Tensor:
        """Sample variance [K] (divided by count - 1); zero below two rows."""
        return self.m2 / (self.count - 1) if self.count > 1 else torch.zeros_like(self.m2)

    @property
    def nbytes(self) -> int:
        """Bytes that the state holds."""
        return self.mean.nbytes + self.m2.nbytes

    def merge(self, other: "Moments") -> "Moments":
        """Return the moments of both sets of rows together. Raises ArgumentError where the features differ."""
        if self.features != other.features:
            raise ArgumentError(
                f"Statistics over {self.features} features cannot be merged with statistics over {other.features}: "
                "only parts of one operand have a common whole. Merge per site, pass and operand."
            )
        count, skipped = self.count + other.count, self.skipped + other.skipped
        if not (self.count and other.count):
            return replace(self if self.count else other, skipped=skipped)
        delta = other.mean.to(self.mean.device) - self.mean
        return Moments(
            count=count,
            mean=self.mean + delta * (other.count / count),
            m2=self.m2 + other.m2.to(self.m2.device) + delta.square() * (self.count * other.count / count),
            skipped=skipped,
        )

    def arrays(self) -> Arrays:
        """Return the state as arrays that `.npy` stores without pickle."""
        return {
            "count": np.array(self.count, dtype=np.int64),
            "skipped": np.array(self.skipped, dtype=np.int64),
            "mean": self.mean.cpu().numpy(),
            "m2": self.m2.cpu().numpy(),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> "Moments":
        """Restore what `arrays` gave, on the CPU. Raises ArgumentError where parts are missing or do not fit."""
        check_arrays("Moments", arrays, ("count", "skipped", "mean", "m2"))
        mean, m2 = (torch.tensor(arrays[name], dtype=torch.float64, device="cpu") for name in ("mean", "m2"))
        if mean.ndim != 1 or mean.shape != m2.shape:
            raise ArgumentError(
                f"Stored moments have a mean of shape {tuple(mean.shape)} and an m2 of {tuple(m2.shape)}: both must "
                "be one vector over the features. The record is damaged; probe again."
            )
        return cls(count=int(arrays["count"]), mean=mean, m2=m2, skipped=int(arrays["skipped"]))


def finite_rows(rows: Tensor) -> tuple[Tensor, int]:
    """Return the rows [n, K] without those that hold a NaN or infinity, and how many those were."""
    if rows.ndim != 2 or not rows.is_floating_point():
        raise ArgumentError(
            f"Statistics were asked of a {rows.dtype} tensor of shape {tuple(rows.shape)}: they are taken of "
            "floating-point rows [n, K]. Flatten the leading dimensions, e.g. rows.reshape(-1, rows.shape[-1])."
        )
    rows = rows.detach()
    good = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    for part in pieces(rows.shape[1], len(rows)):
        good &= rows[:, part].isfinite().all(dim=1)
    skipped = int((~good).sum())
    return (rows[good] if skipped else rows), skipped


def row_blocks(rows: Tensor) -> Iterator[Tensor]:
    """Yield at most BLOCK_ROWS rows at a time; nothing of no rows."""
    for start in range(0, len(rows), BLOCK_ROWS):
        yield rows[start : start + BLOCK_ROWS]


def pieces(length: int, width: int) -> Iterator[slice]:
    """Cut `length` into slices whose product with `width` stays within PIECE_ELEMENTS."""
    step = max(1, PIECE_ELEMENTS // max(1, width))
    for start in range(0, length, step):
        yield slice(start, min(length, start + step))


def check_arrays(owner: str, arrays: Mapping[str, npt.NDArray[Any]], names: tuple[str, ...]) -> None:
    """Raise ArgumentError where a stored state lacks one of its arrays."""
    missing = [name for name in names if name not in arrays]
    if missing:
        raise ArgumentError(
            f"{owner} was to be restored without {', '.join(missing)}: it needs {', '.join(names)}, as its arrays() "
            "gives them. The record is of another kind or damaged; probe again."
        )


def _of_block(rows: Tensor) -> Moments:
    """Moments of at least one row, a piece of the features at a time."""
    count, features = rows.shape
    mean = torch.empty(features, dtype=torch.float64, device=rows.device)
    m2 = torch.empty_like(mean)
    for part in pieces(features, count):
        piece = rows[:, part].double()
        origin = piece[0].clone()
        piece = piece - origin  # a copy: of float64 rows, `piece` is a view
        shift = piece.mean(dim=0)
        mean[part] = origin + shift
        m2[part] = piece.sub_(shift).square_().sum(dim=0)
    return Moments(count=count, mean=mean, m2=m2)
