"""Drift: how fast an error changes while weights are trained, how sure that is, and when it would reach a bound.

One robust straight line (Theil-Sen) through the logarithms of the newest errors of each series. Its slope is a relative
change per step. The standard error comes from the residuals, widened by what neighbouring residuals share: in training
they are correlated, and a line through correlated noise looks steeper and surer than it is.
"""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# The line goes through no more samples than this, the newest: an older trend says nothing of the next steps.
TREND_SAMPLES: Final[int] = 20
# A line is not drawn further ahead than so many times the steps it was fitted on.
REACH: Final[int] = 10
# Variance of the Theil-Sen slope over that of least squares, for normal residuals (Sen 1968).
_EFFICIENCY: Final[float] = math.pi / 3
# Correlation of neighbouring residuals that is believed at most; a few samples cannot show more.
_MOST_CORRELATED: Final[float] = 0.8
_LEAST_SAMPLES: Final[int] = 3
_LARGEST: Final[float] = 690.0  # a logarithm: of 1e299
_AT_ONCE: Final[int] = 4096  # series, so that the slopes of all their pairs stay within a few megabytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Drift:
    """The trend of one error in training. Changes are relative: 0.06 is 6 % up."""

    per_100_steps: float
    low: float  # at the confidence of the evidence, family-wise
    high: float
    significant: bool  # whether the interval leaves out zero
    step: int  # of the newest sample
    error: float  # of the fitted line at `step`
    span: int  # steps between the oldest and the newest sample of the line

    def crosses_at(self, limit: float) -> int | None:
        """Return the step at which the trend reaches a bound from below.

        None where it does not: no significant rise, above it already, or further ahead than REACH times `span`.
        """
        if not self.significant or self.per_100_steps <= 0.0 or not 0.0 < self.error < limit:
            return None
        ahead = math.log(limit / self.error) * 100.0 / math.log1p(self.per_100_steps)
        return self.step + math.ceil(ahead) if ahead <= REACH * self.span else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Trends:
    """One line per series through its log errors, each [num_series]; NaN where there are fewer than three samples."""

    slope: Floats  # per step
    slope_error: Floats  # standard error of the slope
    level: Floats  # of the line at the newest step
    deviation: Floats  # of the residuals
    step: Ints  # the newest
    span: Ints
    samples: Ints

    def half_width(self, alpha: float) -> Floats:
        """Return the half-width of the two-sided interval of each slope at level 1 - alpha."""
        from scipy import special

        freedom = np.maximum(self.samples - 2, 1)
        width: Floats = -special.stdtrit(freedom, alpha / 2) * self.slope_error
        return width

    def drifts(self, half_width: Floats, wanted: NDArray[np.bool_]) -> list[Drift | None]:
        """Return the wanted series as records, half_width [num_series]; None where no line could be drawn."""
        result: list[Drift | None] = [None] * self.slope.size
        some = np.flatnonzero(wanted & np.isfinite(self.slope))
        slope, half = self.slope[some], half_width[some]
        columns = zip(
            some.tolist(),
            *(map(math.expm1, _per_100(each)) for each in (slope, slope - half, slope + half)),
            *(each[some].tolist() for each in (self.step, self.level, self.span)),
            strict=True,
        )
        for number, change, low, high, step, level, span in columns:
            result[number] = Drift(
                per_100_steps=change,
                low=low,
                high=high,
                significant=low > 0.0 or high < 0.0,
                step=step,
                error=math.exp(min(level, _LARGEST)),
                span=span,
            )
        return result


def fit_trends(of: Ints, step: Ints, log_error: Floats, num_series: int) -> Trends:
    """Fit the newest TREND_SAMPLES of each series; entries are sorted by series and step, steps differ, all finite."""
    total = np.bincount(of, minlength=num_series)
    end = np.cumsum(total)
    count = np.minimum(total, TREND_SAMPLES)
    slope, slope_error, level, deviation = (np.full(num_series, np.nan) for _ in range(4))
    newest, span = np.zeros(num_series, dtype=np.int64), np.zeros(num_series, dtype=np.int64)
    for samples in np.unique(count[count >= _LEAST_SAMPLES]).tolist():
        members = np.flatnonzero(count == samples)
        for begin in range(0, members.size, _AT_ONCE):
            some = members[begin : begin + _AT_ONCE]
            entries = end[some, None] + np.arange(-samples, 0)
            at = step[entries]
            newest[some], span[some] = at[:, -1], at[:, -1] - at[:, 0]
            ahead = (at - at[:, -1:]).astype(np.float64)
            slope[some], slope_error[some], level[some], deviation[some] = _lines(ahead, log_error[entries])
    return Trends(
        slope=slope,
        slope_error=slope_error,
        level=level,
        deviation=deviation,
        step=newest,
        span=span,
        samples=count,
    )


def _lines(x: Floats, y: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """Return slope, its standard error, level at x = 0 and deviation of the lines through x, y [series, samples]."""
    samples = x.shape[1]
    first, second = np.triu_indices(samples, 1)
    slope = np.median((y[:, second] - y[:, first]) / (x[:, second] - x[:, first]), axis=1)
    rest = y - slope[:, None] * x
    level = np.median(rest, axis=1)
    rest -= level[:, None]
    squares = np.einsum("ij,ij->i", rest, rest)
    shared = np.einsum("ij,ij->i", rest[:, 1:], rest[:, :-1])
    correlation = np.clip(shared / np.where(squares > 0, squares, 1.0), 0.0, _MOST_CORRELATED)
    deviation = np.sqrt(squares / (samples - 2))
    spread = np.sqrt(np.square(x - x.mean(axis=1, keepdims=True)).sum(axis=1))
    widened = np.sqrt(_EFFICIENCY * (1 + correlation) / (1 - correlation))
    return slope, deviation * widened / spread, level, deviation


def _per_100(slope: Floats) -> list[float]:
    """Return the change of the logarithm over 100 steps; at most that to 1e300, which is more than any error can do."""
    change: list[float] = np.minimum(100.0 * slope, _LARGEST).tolist()
    return change
