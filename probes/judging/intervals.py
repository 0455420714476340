"""From series of per-step errors to intervals: many series at once, as arrays.

Two questions per series. Where is the mean over steps: Student's t, two-sided. Below what do 99 % of steps lie: a
one-sided tolerance bound of a log-normal, whose factor is a quantile of the noncentral t. Both levels are divided by
the number of series that get an interval (Bonferroni), so that all of them hold at once.

With frozen weights steps are exchangeable and every one counts. In training the error drifts, no stationary interval
covers later steps, and older samples make it worse. So only recent samples count; the bound is the largest of the
tolerance of the window, that of its newest ten (at the confidence of one series), and, where the error rises, the trend
drawn to the horizon; it gets a margin and holds for half the observed window ahead. An untrained model misleads in both
directions, so its first steps count only when there is nothing else, with a wider margin.
"""

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from loka.probes.judging.drift import Floats, Ints, Trends, fit_trends

__all__ = [
    "CONTENT",
    "MARGIN",
    "MIN_SAMPLES",
    "RECENT_SAMPLES",
    "WARMUP_MARGIN",
    "WARMUP_STEPS",
    "Floats",
    "Intervals",
    "Ints",
    "Window",
    "intervals",
    "mean_factor",
    "select_window",
    "tolerance_factor",
    "window_mean",
]

# Fewer sampled steps than this are no evidence: the tolerance factor explodes below it.
MIN_SAMPLES: Final[int] = 8
# Of a training run, steps before this are not evidence when MIN_SAMPLES later ones exist.
WARMUP_STEPS: Final[int] = 100
# Of a training run, no more samples than this, the newest.
RECENT_SAMPLES: Final[int] = 50
# The share of steps that `upper` covers.
CONTENT: Final[float] = 0.99
# In training, the tolerance bound times this covers drift within the horizon; measured: 0.3 % of fprop series exceeded
# it, against 20 % without.
MARGIN: Final[float] = 1.05
WARMUP_MARGIN: Final[float] = 1.25
# The newest samples that have to be bounded on their own as well: a wide window hides where the error is now.
NEWEST_SAMPLES: Final[int] = 10
# A rise this sure, one-sided and for one series, is drawn to the horizon. Not family-wise: missing one is the risk.
RISE_LEVEL: Final[float] = 0.05
# Below this p-value a series is not taken for log-normal, and its tolerance bound is said to be doubtful.
NORMALITY_LEVEL: Final[float] = 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """The entries that are evidence, sorted by series and step, and which series had to take warm-up steps."""

    index: Ints  # [kept], into the entries
    series: Ints  # [kept]
    samples: Ints  # [num_series]
    late: Ints  # [num_series], samples after the warm-up
    warmup: NDArray[np.bool_]  # [num_series], whether the window had to reach into the warm-up


@dataclass(frozen=True, kw_only=True, slots=True)
class Intervals:
    """One interval per series, each [num_series]; NaN where there are fewer than MIN_SAMPLES samples."""

    mean: Floats  # with any number of samples
    low: Floats
    high: Floats
    upper: Floats
    infinite: Ints  # samples in the window with an infinite error
    horizon: Ints  # steps; of no meaning with frozen weights
    log_mean: Floats  # of the finite, positive errors; NaN where an error is zero or infinite
    log_deviation: Floats
    irregular: NDArray[np.bool_]  # log-normality is rejected; in training, of the residuals around the trend
    trends: Trends | None  # None: frozen weights
    slope_half_width: Floats  # of the trends, family-wise
    family: int  # series that share the confidence


def mean_factor(samples: int, alpha: float) -> float:
    """Return the half-width of a two-sided interval for the mean, in standard deviations of the sample."""
    from scipy import special

    return -float(special.stdtrit(samples - 1, alpha / 2)) / math.sqrt(samples)


@functools.cache
def tolerance_factor(samples: int, alpha: float) -> float:
    """Return k: mean + k * sd of a normal sample exceeds the CONTENT quantile with probability 1 - alpha."""
    from scipy import special, stats  # takes half a second to import, and only reports need it

    root = math.sqrt(samples)
    return float(stats.nct.isf(alpha, samples - 1, float(special.ndtri(CONTENT)) * root)) / root


def select_window(series: Ints, step: Ints, value: Floats, num_series: int, *, frozen: bool) -> Window:
    """Choose the entries that are evidence. Of several entries of one step the largest counts; none may be NaN."""
    same = series[1:] == series[:-1]
    order = np.arange(series.size)
    if not ((series[1:] > series[:-1]) | (same & (step[1:] > step[:-1]))).all():
        order = np.lexsort((value, step, series))
        last = np.ones(order.size, dtype=bool)
        last[:-1] = (series[order][1:] != series[order][:-1]) | (step[order][1:] != step[order][:-1])
        order = order[last]
    of, at = series[order], step[order]
    total = np.bincount(of, minlength=num_series)
    is_late = at >= WARMUP_STEPS
    late = np.bincount(of[is_late], minlength=num_series)
    warmup = np.zeros(num_series, dtype=bool) if frozen else (late < MIN_SAMPLES) & (total > 0)
    keep = np.ones(order.size, dtype=bool)
    if not frozen:
        from_newest = np.cumsum(total)[of] - np.arange(order.size) - 1
        newest_half = np.maximum((total + 1) // 2, MIN_SAMPLES)
        keep = from_newest < np.minimum(np.where(warmup, newest_half, late), RECENT_SAMPLES)[of]
    kept = of[keep]
    samples = np.bincount(kept, minlength=num_series)
    return Window(index=order[keep], series=kept, samples=samples, late=late, warmup=warmup)


def window_mean(window: Window, value: Floats) -> Floats:
    """Return the mean of `value` over each series' window, NaN entries left out; NaN where nothing is left."""
    found = value[window.index]
    known = ~np.isnan(found)
    count = np.bincount(window.series, weights=known, minlength=window.samples.size)
    total = np.bincount(window.series[known], weights=found[known], minlength=window.samples.size)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean: Floats = total / count
    return mean


def intervals(window: Window, step: Ints, value: Floats, *, frozen: bool, confidence: float) -> Intervals:
    """Return the intervals of all series; `confidence` is that of all of them together."""
    num_series = window.samples.size
    enough = window.samples >= MIN_SAMPLES
    family = int(enough.sum())
    alpha = (1.0 - confidence) / max(family, 1)
    found, at, of = value[window.index], step[window.index], window.series
    finite = np.isfinite(found)
    infinite = np.bincount(of, weights=~finite, minlength=num_series).astype(np.int64)
    low, high = _mean_interval(found[finite], of[finite], num_series, alpha)
    low = np.where(infinite == window.samples, np.inf, low)
    upper = _tolerance(found[finite], of[finite], num_series, alpha)
    first = _extreme(np.minimum, at.astype(np.float64), of, num_series, np.inf)
    newest = _extreme(np.maximum, at.astype(np.float64), of, num_series, -np.inf)
    span = np.where(window.samples > 0, newest - first, 0.0)
    horizon = np.where(window.samples > 0, np.maximum(span // 2, 1), 0).astype(np.int64)
    log_mean, log_deviation = _log_moments(found, of, num_series)
    trends = None if frozen else _trends(found, at, of, num_series)
    if trends is not None:
        near = finite & _newest(of, num_series)
        upper = np.fmax(upper, _tolerance(found[near], of[near], num_series, 1.0 - confidence))
        upper = np.fmax(upper, _risen(trends, horizon, 1.0 - confidence))
        upper = upper * np.where(window.warmup, WARMUP_MARGIN, MARGIN)
    upper = np.fmax(upper, _extreme(np.maximum, found, of, num_series, -np.inf))
    return Intervals(
        mean=window_mean(window, value),
        low=np.where(enough, low, np.nan),
        high=np.where(enough, np.where(infinite > 0, np.inf, high), np.nan),
        upper=np.where(enough, upper, np.nan),
        infinite=infinite,
        horizon=horizon,
        log_mean=np.where(enough, log_mean, np.nan),
        log_deviation=np.where(enough, log_deviation, np.nan),
        irregular=enough & _irregular(found, at, of, trends, num_series),
        trends=trends,
        slope_half_width=np.full(num_series, np.nan) if trends is None else trends.half_width(alpha),
        family=family,
    )


def _newest(of: Ints, num_series: int) -> NDArray[np.bool_]:
    """Return which entries are among the NEWEST_SAMPLES of their series; entries are sorted by series and step."""
    end = np.cumsum(np.bincount(of, minlength=num_series))
    near: NDArray[np.bool_] = end[of] - np.arange(of.size) <= NEWEST_SAMPLES
    return near


def _trends(value: Floats, step: Ints, of: Ints, num_series: int) -> Trends:
    """Fit the finite, positive errors: others have no logarithm, and their series are bounded by other means."""
    usable = np.isfinite(value) & (value > 0)
    return fit_trends(of[usable], step[usable], np.log(value[usable]), num_series)


def _risen(trends: Trends, horizon: Ints, alpha: float) -> Floats:
    """Return where a surely rising error gets to at the horizon, with its noise; NaN where it does not surely rise."""
    rising = trends.slope > trends.half_width(2 * RISE_LEVEL)
    factor = _by_count(tolerance_factor, trends.samples, alpha)
    with np.errstate(over="ignore", invalid="ignore"):
        risen = np.exp(trends.level + trends.slope * horizon + factor * trends.deviation)
    return np.where(rising, risen, np.nan)


def _log_moments(value: Floats, of: Ints, num_series: int) -> tuple[Floats, Floats]:
    """Return mean and deviation of the log errors; NaN for a series with an error that has no logarithm."""
    usable = np.isfinite(value) & (value > 0)
    unusable = np.bincount(of, weights=~usable, minlength=num_series) > 0
    count, mean, deviation = _moments(np.log(value[usable]), of[usable], num_series)
    known = ~unusable & (count > 1)
    return np.where(known, mean, np.nan), np.where(known, deviation, np.nan)


def _irregular(value: Floats, step: Ints, of: Ints, trends: Trends | None, num_series: int) -> NDArray[np.bool_]:
    """Return which series skewness and kurtosis (D'Agostino and Pearson) say are not log-normal."""
    from scipy import stats

    usable = np.isfinite(value) & (value > 0)
    of, logs = of[usable], np.log(value[usable])
    if trends is not None:
        logs = logs - np.nan_to_num(trends.slope)[of] * (step[usable] - trends.step[of])
    count, mean, deviation = _moments(logs, of, num_series)
    # A spread that is no more than rounding has no shape.
    testable = (count >= MIN_SAMPLES) & (deviation > 1e-9 * np.maximum(np.abs(mean), 1.0))
    irregular = np.zeros(num_series, dtype=bool)
    begin = np.cumsum(count) - count
    for samples in np.unique(count[testable]).tolist():
        members = np.flatnonzero(testable & (count == samples))
        chosen = logs[begin[members, None] + np.arange(samples)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # below 20 samples the p-value is approximate, as is what it is used for
            irregular[members] = stats.normaltest(chosen, axis=1).pvalue < NORMALITY_LEVEL
    return irregular


def _mean_interval(value: Floats, of: Ints, num_series: int, alpha: float) -> tuple[Floats, Floats]:
    count, mean, deviation = _moments(value, of, num_series)
    half = _by_count(mean_factor, count, alpha) * deviation
    # An error is never negative. A single finite step says nothing of where the mean lies.
    return np.where(count > 1, np.maximum(mean - half, 0.0), 0.0), mean + half


def _tolerance(value: Floats, of: Ints, num_series: int, alpha: float) -> Floats:
    """Return the tolerance bound of each series, without margin; 0 for a series of zeros."""
    positive = value > 0
    smallest = _extreme(np.minimum, value[positive], of[positive], num_series, np.inf)
    some_zero = np.bincount(of, weights=~positive, minlength=num_series) > 0
    # An exact zero has no logarithm. It counts as the smallest error seen; the normal bound below sees the zero itself.
    raised = np.where(positive, value, smallest[of])
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        logs = np.where(np.isfinite(raised), np.log(raised), 0.0)
        count, mean, deviation = _moments(logs, of, num_series)
        factor = _by_count(tolerance_factor, count, alpha)
        bound = np.where(np.isfinite(smallest), np.exp(mean + factor * deviation), 0.0)
        _, mean, deviation = _moments(value, of, num_series)
        return np.where(some_zero, np.fmax(bound, mean + factor * deviation), bound)


def _moments(value: Floats, of: Ints, num_series: int) -> tuple[Ints, Floats, Floats]:
    """Return count, mean and standard deviation of each series, in two passes."""
    count = np.bincount(of, minlength=num_series)
    divisor = np.maximum(count, 1)
    # Around one of the values, so that a constant series has a deviation of exactly zero.
    pivot = np.zeros(num_series)
    pivot[of] = value
    mean = pivot + np.bincount(of, weights=value - pivot[of], minlength=num_series) / divisor
    squares = np.bincount(of, weights=(value - mean[of]) ** 2, minlength=num_series)
    return count, mean, np.sqrt(squares / np.maximum(count - 1, 1))


def _by_count(factor: Callable[[int, float], float], count: Ints, alpha: float) -> Floats:
    """Return the factor of each series: computed once per number of samples, NaN below two."""
    result = np.full(count.size, np.nan)
    for samples in np.unique(count[count > 1]):
        result[count == samples] = factor(int(samples), alpha)
    return result


def _extreme(which: np.ufunc, value: Floats, of: Ints, num_series: int, start: float) -> Floats:
    result = np.full(num_series, start)
    which.at(result, of, value)
    return result
