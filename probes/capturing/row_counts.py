"""How many rows a product has: not one number but a distribution over its calls.

The last batch is smaller, sequences differ in length, a server has 8 rows when it decodes and thousands when it
prefills. What varies is m of fprop and dgrad, and k of wgrad, which sums over the same rows: `rows` is either. A run
may see hundreds of counts; what stands for them is at most five, each with its share of the calls. Calls without any
row compute nothing, and are not counted.

The five are the least and the most rows, the number that the product is known by (its median), and those that halve
what lies between. A count in between is shared out to its two neighbours, the nearer one getting more. So the mean
number of rows is kept, and the expectation of a time that is straight between two points is exact.
"""

import bisect
import itertools
import math
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Self

import numpy as np

from loka.errors import ArgumentError

MOST_POINTS: Final[int] = 5
# A run keeps this many different row counts of a product apart; beyond, all but the ends in this many binary digits.
_MOST_VALUES: Final[int] = 1024
_DIGITS: Final[int] = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class RowCount:
    """One number of rows, and its share of the calls in 0..1."""

    rows: int
    weight: float


@dataclass(frozen=True, kw_only=True, slots=True)
class RowCounts:
    """The row counts that stand for all calls of a product, in order; none where only its own number is known."""

    points: tuple[RowCount, ...] = ()
    left_out: int = 0  # points of the distribution that are not among these
    # Share of the calls with more rows than a point and fewer than the next, gap by gap: shared out to the two.
    between: tuple[float, ...] = field(default=(), compare=False)

    @property
    def share(self) -> float:
        """The share of the calls that the points stand for."""
        return min(1.0, math.fsum(point.weight for point in self.points)) if self.left_out else 1.0

    def only(self, wanted: Container[int]) -> "RowCounts":
        """Return those points whose rows are `wanted`; they keep their weights."""
        at = [index for index, point in enumerate(self.points) if point.rows in wanted]
        if len(at) == len(self.points):
            return self
        kept = tuple(self.points[index] for index in at)
        gaps = tuple(self.in_gap(low, high) for low, high in itertools.pairwise(at))
        return RowCounts(points=kept, left_out=self._of - len(kept), between=gaps)

    def in_gap(self, low: int, high: int) -> float:
        """Return the share of the calls between two points, given by position; all that points there stand for, too."""
        inside = self.points[low + 1 : high]
        return min(1.0, math.fsum((*self.between[low:high], *(point.weight for point in inside))))

    def covers(self, other: "RowCounts", share: float) -> bool:
        """Whether these, some of the points of `other`, carry this share of its calls and of its rows.

        Of its rows too: a few calls with many rows may take most of the time.
        """
        calls = [math.fsum(point.weight for point in each.points) for each in (self, other)]
        rows = [math.fsum(point.weight * point.rows for point in each.points) for each in (self, other)]
        return calls[0] >= share * calls[1] > 0 and rows[0] >= share * rows[1]

    @property
    def _of(self) -> int:
        return len(self.points) + self.left_out

    @property
    def words(self) -> str:
        """Say which they are: `3 row counts, 8 to 2048`; where points are left out, how many and what they carry."""
        if not self.points:
            return "no row count"
        first, last = self.points[0].rows, self.points[-1].rows
        which = f"{first} to {last}" if last > first else f"{first}"
        if not self.left_out:
            return f"{len(self.points)} row count{'' if len(self.points) == 1 else 's'}, {which}"
        return f"{len(self.points)} of {self._of} row counts, {which}, that carry {self.share:.0%} of the calls"


@dataclass(slots=True)
class CallRows:
    """The calls of one product by their rows, as a run counts them. `mixed`: those of one step have differed."""

    calls: Counter[int] = field(default_factory=Counter)
    mixed: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes that it takes when it is kept."""
        return 16 * len(self.calls)

    def saw(self, step: Mapping[int, int]) -> None:
        """Count the calls of one step."""
        self.mixed = self.mixed or len(step) > 1
        self.calls.update(step)
        if len(self.calls) > _MOST_VALUES:
            self.calls = _coarser(self.calls)

    def merge(self, other: "CallRows") -> "CallRows":
        """Return the calls of both; the order does not matter."""
        result = CallRows(calls=Counter(self.calls), mixed=self.mixed)
        result.saw(other.calls)
        return result

    def arrays(self, **_: object) -> dict[str, Any]:
        """Return the state as plain arrays."""
        items = np.array(sorted(self.calls.items()), dtype=np.int64).reshape(-1, 2)
        return {"rows": items[:, 0], "calls": items[:, 1]}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any]) -> Self:
        """Read it back; raise ArgumentError for arrays that are none of ours."""
        rows, calls = arrays.get("rows"), arrays.get("calls")
        if rows is None or calls is None or rows.ndim != 1 or rows.shape != calls.shape or not rows.size:
            raise ArgumentError("Row counts are two arrays of one length, `rows` and `calls`; these are not.")
        if not all(each.dtype.kind in "iu" for each in (rows, calls)) or rows.min() < 0 or calls.min() < 1:
            raise ArgumentError("Row counts are whole numbers, and each was seen at least once; these are not.")
        return cls(calls=Counter(dict(zip(rows.tolist(), calls.tolist(), strict=True))), mixed=True)


def _coarser(calls: Mapping[int, int]) -> Counter[int]:
    """Return the calls by their rows in fewer digits; the ends stay as they are."""
    ends, result = (min(calls), max(calls)), Counter[int]()
    for rows, count in calls.items():
        shift = max(rows.bit_length() - _DIGITS, 0)
        result[rows if rows in ends else max(rows >> shift << shift, ends[0])] += count
    return result


def row_counts(calls: Mapping[int, int], known_by: int) -> RowCounts:
    """Return the points that stand for calls by their rows; `known_by` is one of them where it occurs."""
    values = sorted(rows for rows, count in calls.items() if rows > 0 and count > 0)
    points = values if len(values) <= MOST_POINTS else _chosen(values, calls, known_by)
    shares: dict[int, list[float]] = {point: [] for point in points}
    for rows in values:
        at = bisect.bisect_left(points, rows)
        above = points[at]
        if above == rows:
            shares[above].append(calls[rows])
            continue
        below = points[at - 1]
        nearness = (rows - below) / (above - below)
        shares[above].append(calls[rows] * nearness)
        shares[below].append(calls[rows] * (1.0 - nearness))
    total = sum(calls[rows] for rows in values)
    return RowCounts(
        points=tuple(RowCount(rows=each, weight=math.fsum(shares[each]) / total) for each in points),
        between=tuple(
            sum(calls[rows] for rows in values if low < rows < high) / total for low, high in itertools.pairwise(points)
        ),
    )


def median_rows(calls: Mapping[int, int]) -> int:
    """Return the number of rows that half of the calls with any do not exceed; 0 where none has."""
    return _median(sorted(rows for rows, count in calls.items() if rows > 0 and count > 0), calls)


def _chosen(values: Sequence[int], calls: Mapping[int, int], known_by: int) -> list[int]:
    """Return MOST_POINTS of more values: the ends, `known_by`, and again the median of the heaviest gap."""
    points = sorted({values[0], values[-1], known_by} & set(values))
    while len(points) < MOST_POINTS:
        gaps = [
            values[bisect.bisect_right(values, low) : bisect.bisect_left(values, high)]
            for low, high in itertools.pairwise(points)
        ]
        heaviest = max(gaps, key=lambda gap: sum(calls[rows] for rows in gap))
        bisect.insort(points, _median(heaviest, calls))
    return points


def _median(values: Sequence[int], calls: Mapping[int, int]) -> int:
    left = sum(calls[rows] for rows in values)
    half = left / 2
    for rows in values:
        left -= calls[rows]
        if left <= half:
            return rows
    return 0
