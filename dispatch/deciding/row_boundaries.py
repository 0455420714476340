"""Where few rows end and many begin: one boundary for as many products as can share it.

Compiled code has a graph for each side of every boundary, so products whose gaps overlap share one, the median of where
each has its own best: where the straight lines through the times of its two kernels cross. Calls inside of a gap, of
which only the number is known, are charged with the most that they can lose by it.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

# Places that are looked at on either side of the best one.
_STEPS: Final[int] = 64


@dataclass(frozen=True, slots=True)
class Room:
    """Where the most rows of few may lie, both ends included, and where they lie best."""

    low: int
    high: int
    best: int


@dataclass(frozen=True, slots=True)
class Gap:
    """From the last row count of few, `low`, to the first of many, `high`; few may have from `first` to `last` rows.

    `below` is what the kernel of many takes more at `low`, in microseconds, and `above` what that of few takes more at
    `high`; both are straight in between. `share` of the calls are inside.
    """

    low: int
    high: int
    first: int
    last: int
    below: float = 0.0
    above: float = 0.0
    share: float = 0.0

    @property
    def crossing(self) -> int:
        """The most rows of few for which its kernel is no slower."""
        both = self.below + self.above
        crossing = self.low + int((self.high - self.low) * (self.below / both if both > 0 else 0.5))
        return min(max(crossing, self.first), self.last)

    def cost_us(self, most: int) -> float:
        """Return the most that the calls inside cost, on average over all calls, with `most` rows as few."""
        at = (most - self.low) / (self.high - self.low)
        return self.share * max(at * self.above, (1.0 - at) * self.below)

    def room(self, good: Callable[[int], bool]) -> Room:
        """Return how far from the crossing the boundary may move while it is `good`, as it is there."""
        best = self.crossing
        found = [most for end in (self.first, self.last) for most in _steps(best, end) if good(most)]
        return Room(min(found), max(found), best)


def _steps(start: int, end: int) -> list[int]:
    return [start + (end - start) * step // _STEPS for step in range(_STEPS + 1)]


def boundaries(rooms: Sequence[Room]) -> list[int]:
    """Return the most rows of few for each product: as few different ones as there can be."""
    result = [0] * len(rooms)
    waiting = sorted(range(len(rooms)), key=lambda at: (rooms[at].high, rooms[at].low))
    while waiting:
        end = rooms[waiting[0]].high  # of the one that ends first: no boundary serves it and one that begins after
        together = [at for at in waiting if rooms[at].low <= end]
        start = max(rooms[at].low for at in together)
        best = statistics.median_low([rooms[at].best for at in together])
        for at in together:
            result[at] = min(max(best, start), end)
        waiting = [at for at in waiting if at not in together]
    return result
