"""The sequential test of the monitor: has an error left its limit for good, and not by the noise of single steps?

A cumulative sum (Page's CUSUM) of how far the logarithm of the error lies above the logarithm of its limit, in units of
SCALE, cut at CLIP, never below zero. It alarms at ALARM. So:

    at least three monitored steps beyond the limit are needed, however far: no single outlier of a heavy tail alarms;
    three are enough where the error is 3.2 times its limit; 20 % beyond it alarms after 19, 50 % after nine;
    below the limit nothing adds up: an error may drift there as it likes.

False alarms: where at most one step in a hundred lies beyond the limit, which is what a plan's evidence promises, at
most FALSE_ALARMS per monitored step of one product, for log-normal noise with a standard deviation of up to 1/3 and a
lag-1 autocorrelation of up to 0.8, of up to 0.05 and 0.98, and for tails as heavy as Student's t of 2 degrees. The
tests simulate this. (Measured in training: 0.8 % with 0.96 in fprop and dgrad, up to 33 % with 0.08 in wgrad.)
"""

import math
import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt

# What the test promises: false alarms per monitored step of one product.
FALSE_ALARMS: Final[float] = 1e-5
# Unit of the sum, in natural logarithms; the most that one step adds; where it alarms.
SCALE: Final[float] = 0.3
CLIP: Final[float] = 4.2
ALARM: Final[float] = 11.5

# A jump is a value this many times the median of the last so many that were none; fewer than the least say nothing.
JUMP: Final[float] = 2.5
_REFERENCE: Final[int] = 8
_LEAST: Final[int] = 4

Number = TypeVar("Number", float, npt.NDArray[np.float64])


def advance(total: Number, excess: Number) -> Number:
    """Return the sum after one step; `excess` is log(error / limit). Works on arrays of sums, too."""
    advanced: Number = np.maximum(total + np.minimum(excess / SCALE, CLIP), 0.0)
    return advanced


@dataclass(slots=True)
class LimitTest:
    """Whether the errors of one product have left their limit."""

    total: float = 0.0
    steps: int = 0  # since the sum last left zero
    last: float = math.nan  # error over limit of the last step that showed one

    def saw(self, error: float, limit: float) -> bool:
        """Take the error of one step; return whether to alarm. NaN, nothing measured, changes nothing."""
        if math.isnan(error):
            return False
        self.last = error / limit
        excess = math.log(self.last) if 0 < self.last < math.inf else math.copysign(math.inf, self.last - 1)
        self.total = float(advance(self.total, excess))
        self.steps = self.steps + 1 if self.total > 0 else 0
        return self.total >= ALARM

    @property
    def suspects(self) -> bool:
        """Whether the last step has left something in the sum."""
        return self.total > 0

    def clear(self) -> None:
        """Start again."""
        self.total, self.steps = 0.0, 0


@dataclass(slots=True)
class Jumps:
    """Whether a magnitude, such as an operand's largest value, has left what it was lately: the same test against it.

    Slow changes move the reference along: 10 % from one monitored step to the next is no jump.
    """

    test: LimitTest = field(default_factory=LimitTest)
    _reference: deque[float] = field(default_factory=lambda: deque(maxlen=_REFERENCE))  # logarithms

    def saw(self, value: float) -> float | None:
        """Take the value of one step; return how many times its reference it is where it has jumped, else None.

        A jump is told once: what comes after it is the new reference.
        """
        if not 0 < value < math.inf:
            return None
        usual = self.usual
        jumped = not math.isnan(usual) and self.test.saw(value, JUMP * usual)
        if jumped:
            self.test.clear()
            self._reference.clear()
        if not self.test.suspects:
            self._reference.append(math.log(value))
        return value / usual if jumped else None

    @property
    def usual(self) -> float:
        """What the value was lately; NaN until that is known."""
        return math.exp(statistics.median(self._reference)) if len(self._reference) >= _LEAST else math.nan
