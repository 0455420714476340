"""Marginals of every feature: a quantile grid uniform in the normal score, from a row sample that merges in any order.

Every row gets a random 64-bit priority and the rows with the smallest survive. Whatever the order in which parts are
merged, the survivors are the same: a uniform sample of all rows seen. Minimum and maximum are kept exactly beside it.
A grid uniform in the normal score spends its points on the tails, where quantisation error is decided, and a normal
draw finds its place in it by one multiplication, without a search.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from loka.errors import ArgumentError
from loka.probes.distributions.moments import Arrays, finite_rows
from loka.probes.distributions.stored import Stored

POINTS: Final[int] = 33
# The grid spans these normal scores; its ends, 3e-5 of the probability, are the minimum and maximum seen.
EXTENT: Final[float] = 4.0
MAX_ROWS: Final[int] = 256
# With minimum and maximum this stays below 9 MB at K = 123,200 (16 rows).
MAX_BYTES: Final[int] = 8_000_000
# Features worked on at a time, so that temporaries stay small at any K.
_PIECE: Final[int] = 2048

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Quantiles:
    """Quantiles of rows [*, K]. Merging parts in any order gives the same sample, as long as their seeds differ."""

    count: int  # rows that entered
    low: FloatArray  # [K], +Inf where count is 0; the grid's first and last point where that is stored
    high: FloatArray  # [K], -Inf where count is 0
    rows: FloatArray  # [n, K], n <= capacity, by ascending priority
    priority: npt.NDArray[np.uint64]  # [n]
    stored: FloatArray | None = None  # [POINTS, K]: the grid, where rows were not kept
    skipped: int = 0  # rows left out for an element that is NaN or infinite

    @classmethod
    def empty(cls, features: int) -> "Quantiles":
        """Return the neutral element of `merge`."""
        return cls(
            count=0,
            low=np.full(features, np.inf, dtype=np.float32),
            high=np.full(features, -np.inf, dtype=np.float32),
            rows=np.empty((0, features), dtype=np.float32),
            priority=np.empty(0, dtype=np.uint64),
        )

    @classmethod
    def of(cls, rows: Tensor, *, seed: int) -> "Quantiles":
        """Take rows [n, K] of any floating dtype; n may be 0. Give every part of one operand another `seed`.

        Rows with a non-finite element are left out and counted in `skipped`.
        """
        finite, skipped = finite_rows(rows)
        count, features = finite.shape
        if count == 0:
            return replace(cls.empty(features), skipped=skipped)
        priority = np.random.default_rng(seed).integers(0, 2**64 - 1, count, dtype=np.uint64)
        chosen = np.argsort(priority, kind="stable")[: capacity(features)]
        kept = finite[torch.from_numpy(chosen).to(finite.device)].float().cpu().numpy()
        low, high = finite.amin(0).float().cpu().numpy(), finite.amax(0).float().cpu().numpy()
        return cls(count=count, low=low, high=high, rows=kept, priority=priority[chosen], skipped=skipped)

    @property
    def features(self) -> int:
        """K."""
        return len(self.low)

    @property
    def nbytes(self) -> int:
        """Bytes that the state holds."""
        if self.stored is not None:
            return self.stored.nbytes
        return self.low.nbytes + self.high.nbytes + self.rows.nbytes + self.priority.nbytes

    def merge(self, other: "Quantiles") -> "Quantiles":
        """Return the quantiles of both sets of rows. Raises ArgumentError where the features differ.

        Exact with rows on both sides. A restored grid has none left: then the two grids are mixed by their counts,
        which is approximate, and the result again holds a grid alone.
        """
        if self.features != other.features:
            raise ArgumentError(
                f"Quantiles of {self.features} features cannot be merged with quantiles of {other.features}: only "
                "parts of one operand have a common whole. Merge per site, pass and operand."
            )
        skipped = self.skipped + other.skipped
        if not (self.count and other.count):
            return replace(self if self.count else other, skipped=skipped)
        count, low, high = self.count + other.count, np.minimum(self.low, other.low), np.maximum(self.high, other.high)
        if self.stored is not None or other.stored is not None:
            mixed = _mixed((self.grid().numpy(), other.grid().numpy()), (self.count / count, other.count / count))
            mixed[0], mixed[-1] = low, high
            return _of_grid(mixed, count, skipped)
        rows, priority = np.concatenate((self.rows, other.rows)), np.concatenate((self.priority, other.priority))
        # Equal priorities are equal seeds, against the rules; the rows' first values then decide.
        chosen = np.lexsort((rows[:, 0], priority) if self.features else (priority,))[: capacity(self.features)]
        return Quantiles(count=count, low=low, high=high, rows=rows[chosen], priority=priority[chosen], skipped=skipped)

    def grid(self) -> Tensor:
        """Return the quantiles [POINTS, K] fp32 at normal scores -EXTENT .. EXTENT; zeros where no row was seen."""
        if self.stored is not None:
            return torch.from_numpy(self.stored.copy())
        result = np.zeros((POINTS, self.features), dtype=np.float32)
        if self.count == 0:
            return torch.from_numpy(result)
        seen = len(self.rows)
        position = np.clip(_probabilities() * seen - 0.5, 0, seen - 1)
        below = np.floor(position).astype(np.int64)
        above, share = np.minimum(below + 1, seen - 1), (position - below)[:, None]
        for start in range(0, self.features, _PIECE):
            part = slice(start, start + _PIECE)
            ordered = np.sort(np.ascontiguousarray(self.rows[:, part].T), axis=1).T
            result[:, part] = _between(ordered[below], ordered[above], share)
        result[0], result[-1] = self.low, self.high
        return torch.from_numpy(result)

    def scores(self) -> Tensor:
        """Return the normal scores [n, K] fp32 of the sampled rows; ties share their middle rank.

        Ties broken by position instead would correlate all features that have them. Empty for a restored grid.
        """
        seen = len(self.rows)
        result = np.empty((seen, self.features), dtype=np.float32)
        if seen == 0:
            return torch.from_numpy(result)
        halves = torch.arange(1, 2 * seen, dtype=torch.float64, device="cpu") / (2 * seen)  # (first + last + 1) / 2n
        table = torch.special.ndtri(halves).float().numpy()
        for start in range(0, self.features, _PIECE):
            part = slice(start, start + _PIECE)
            result[:, part] = table[_tied_ranks(np.ascontiguousarray(self.rows[:, part].T))].T
        return torch.from_numpy(result)

    def arrays(self, *, keep_rows: bool = False) -> Arrays:
        """Return the grid and the counts as arrays; the raw rows only where asked for and not yet given up."""
        counts: Arrays = {"counts": np.array((self.count, self.skipped), dtype=np.int64)}
        if keep_rows and self.stored is None:
            return {**counts, "low": self.low, "high": self.high, "rows": self.rows, "priority": self.priority}
        return {**counts, "grid": self.grid().numpy()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> "Quantiles":
        """Restore what `arrays` gave. Raises ArgumentError where parts are missing or do not fit."""
        stored = Stored("Quantiles", arrays)
        count, skipped = stored.counts("counts", 2)
        if "rows" in arrays:
            return _with_rows(stored, count, skipped)
        grid = stored.singles("grid", (POINTS, None))
        if (np.diff(grid, axis=0) < 0).any():
            raise stored.damaged("grid", "does not ascend")
        # Of no rows there is no grid: the neutral element stays neutral.
        return _of_grid(grid, count, skipped) if count else replace(cls.empty(grid.shape[1]), skipped=skipped)


def capacity(features: int) -> int:
    """Return how many rows are kept of an operand with this many features."""
    return max(1, min(MAX_ROWS, MAX_BYTES // (4 * max(1, features))))


def _of_grid(grid: FloatArray, count: int, skipped: int) -> Quantiles:
    """Return a state without rows; its ends are views, so that K = 123,200 stays within 16 MiB."""
    nothing = Quantiles.empty(grid.shape[1])
    return replace(nothing, count=count, skipped=skipped, low=grid[0], high=grid[-1], stored=grid)


def _with_rows(stored: Stored, count: int, skipped: int) -> Quantiles:
    """Restore a state with its rows."""
    rows = stored.singles("rows", (None, None))
    nothing = replace(Quantiles.empty(rows.shape[1]), skipped=skipped)
    if len(rows) != min(count, capacity(rows.shape[1])):
        raise stored.damaged("rows", f"holds {len(rows)} rows of {count}")
    if count == 0:
        return nothing
    priority = stored.integers("priority", (len(rows),)).astype(np.uint64)
    low, high = (stored.singles(name, (rows.shape[1],)) for name in ("low", "high"))
    if (rows < low).any() or (rows > high).any() or (priority[1:] < priority[:-1]).any():
        raise stored.damaged("rows", "holds values beyond its limits or is out of order")
    return replace(nothing, count=count, low=low, high=high, rows=rows, priority=priority)


def _between(low: npt.NDArray[Any], high: npt.NDArray[Any], share: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Interpolate in float64: two equal values give that value, and ascending ones stay ascending in fp32."""
    start = low.astype(np.float64)
    return start + (high.astype(np.float64) - start) * share


def _scores() -> npt.NDArray[np.float64]:
    """Return the normal scores of the grid's points."""
    return np.linspace(-EXTENT, EXTENT, POINTS)


def _probabilities() -> npt.NDArray[np.float64]:
    result: npt.NDArray[np.float64] = torch.special.ndtr(torch.from_numpy(_scores())).numpy()
    return result


def _tied_ranks(columns: FloatArray) -> npt.NDArray[np.int64]:
    """Return first + last rank of every element's run of equals, of columns [K, n]: twice its middle rank."""
    order = np.argsort(columns, axis=1)
    ordered = np.take_along_axis(columns, order, axis=1)
    seen = columns.shape[1]
    index = np.arange(seen)
    starts = np.ones(columns.shape, dtype=bool)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    ends = np.ones(columns.shape, dtype=bool)
    ends[:, :-1] = starts[:, 1:]
    first = np.maximum.accumulate(np.where(starts, index, 0), axis=1)
    last = np.minimum.accumulate(np.where(ends, index, seen)[:, ::-1], axis=1)[:, ::-1]
    result = np.empty(columns.shape, dtype=np.int64)
    np.put_along_axis(result, order, first + last, axis=1)
    return result


def _mixed(grids: tuple[FloatArray, FloatArray], shares: tuple[float, float]) -> FloatArray:
    """Return the quantiles of a mixture: its distribution function at all points of both grids, inverted.

    Between points, grids are linear in the normal score, as draws take them. A grid mixed with itself is unchanged,
    so mixing hundreds of parts does not spread them.
    """
    result = np.empty_like(grids[0])
    wanted = _scores()
    for start in range(0, result.shape[1], _PIECE):
        pair = [grid[:, start : start + _PIECE].astype(np.float64) for grid in grids]
        knots = np.sort(np.concatenate(pair), axis=0)
        # The limits from below and from above differ where values repeat.
        reached = [
            sum(share * _probability(grid, knots, side) for grid, share in zip(pair, shares, strict=True))
            for side in (np.less, np.less_equal)
        ]
        score = torch.special.ndtri(torch.from_numpy(np.stack(reached, axis=1).clip(1e-12, 1 - 1e-12))).numpy()
        score = np.maximum.accumulate(score.reshape(2 * len(knots), -1), axis=0)
        values = np.repeat(knots, 2, axis=0)
        for point, target in enumerate(wanted):
            above = np.clip((score < target).sum(axis=0), 1, len(values) - 1)[None]
            near, far = (np.take_along_axis(score, above - step, axis=0) for step in (1, 0))
            share = np.clip((target - near) / np.maximum(far - near, 1e-300), 0, 1)
            left, right = (np.take_along_axis(values, above - step, axis=0) for step in (1, 0))
            result[point, start : start + _PIECE] = _between(left, right, share)[0]
    return result


def _probability(grid: npt.NDArray[np.float64], values: npt.NDArray[np.float64], side: np.ufunc) -> Any:
    """Return the probability [n, K] of less than (or equal to, by `side`) values [n, K] under a grid [POINTS, K]."""
    scores = _scores()
    passed = np.zeros(values.shape, dtype=np.int64)
    for point in grid:
        passed += side(point, values)
    above = np.clip(passed, 1, POINTS - 1)
    low, high = (np.take_along_axis(grid, above - step, axis=0) for step in (1, 0))
    share = np.clip((values - low) / np.maximum(high - low, 1e-300), 0, 1)
    score = scores[above - 1] + (scores[above] - scores[above - 1]) * share
    inside = torch.special.ndtr(torch.from_numpy(score)).numpy()
    return np.where(passed == 0, 0.0, np.where(passed == POINTS, 1.0, inside))
