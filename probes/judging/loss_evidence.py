"""Loss evidence: what each recipe of a forward product does to the loss, with how sure that is, relative to the loss.

Per sampled step the probe leaves a curvature term (kl, never negative, stable), a first-order term (exact for its own
batch, of either sign for the next) and the spread of the latter. Everything here is a mean over steps divided by the
mean loss, never a mean of ratios: a batch with few clicks has a tiny loss. A sample meets one call of its product; each
call of a step counts, as of a weight that is shared: their errors add up as those of different products do.

    kl          mean, with a lower and an upper bound, each one-sided
    first_order mean, and the lower bound of it: an increase counts once it is established, a decrease never
    low, high   where the change of the loss lies on one more batch of the same size

Bounds hold at the confidence of the report, each on its own. A budget is spent by a sum of products, and the upper
bounds of a sum's parts, added up, bound the sum at least as surely as each bounds its part. With frozen weights the
upper bound of kl is that of its mean. In training it is the next model that is asked about, of which the mean over past
ones says little: only recent samples count, the bound is that of one more sample, and a kl that surely rises is drawn
to the horizon. Either gets a margin, since what products do together is not quite the sum of what each does alone.
"""

import math
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from loka.probes.judging.drift import fit_trends
from loka.probes.judging.intervals import RISE_LEVEL, Floats, Ints, Window, select_window, window_mean
from loka.probes.judging.series import SHAPE, RunSeries, over_ranks
from loka.probes.sampling.losses import Labels
from loka.probes.storing.schema import IMPACTS

# In the order of series.LABELS; what is not known counts as the least sure.
_LABELS: Final[tuple[Labels, ...]] = ("empirical", "closed", "sampled", "empirical")
# Over the bound of kl. Measured on Wukong, forward products rounded together: 0.86 to 1.11 times the sum of each alone,
# held-out batches included; and a model still in its first steps moves within the horizon.
TOGETHER: Final[float] = 1.25
_CALLS = SHAPE.index("calls")
_KL, _FIRST, _SPREAD = (IMPACTS.index(name) for name in ("kl", "first_order", "spread"))


@dataclass(frozen=True, kw_only=True, slots=True)
class LossEvidence:
    """What one recipe of a forward product does to the loss, as shares of the mean loss; NaN: too few samples."""

    kl: float  # mean
    kl_low: float
    kl_high: float  # with the margin TOGETHER
    first_order: float  # mean
    first_order_low: float
    spread: float  # of first_order over batches
    low: float
    high: float
    samples: int  # sampled steps that took it and are evidence
    labels: Labels  # whose labels the curvature rests on, the least sure over steps

    @property
    def cost(self) -> float:
        """What it spends of a budget: the upper bound of kl, and an established first-order increase."""
        return self.kl_high + max(self.first_order_low, 0.0)

    def verdict(self, budget: float) -> Literal["safe", "unsafe", "undecided"]:
        """Judge the product alone against a budget: `safe` fits it, `unsafe` surely exceeds it."""
        if self.cost <= budget:
            return "safe"
        return "unsafe" if self.kl_low > budget else "undecided"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunLoss:
    """The loss of a run and what rounding does to it."""

    mean: float  # per item, in the loss' own unit, over the steps that are evidence; NaN: not known, or one is negative
    by_series: tuple[LossEvidence | None, ...]  # number = row * recipes + recipe


def loss_evidence(series: RunSeries, *, frozen: bool, confidence: float) -> RunLoss:
    """Condense the impacts of a run at `confidence`; None for a series whose impact on a known loss was never taken."""
    num_recipes = len(series.recipes)
    total = len(series.rows) * num_recipes
    mean_loss = _mean_loss(series, frozen=frozen)
    if not mean_loss > 0:
        return RunLoss(mean=mean_loss, by_series=(None,) * total)
    sample = series.impact_sample
    number = series.row[sample] * num_recipes + series.impact_recipe
    calls = series.shape[sample, _CALLS].astype(np.float64)
    kl = calls * series.impacts[:, _KL]
    merged = over_ranks(
        np.stack([number, series.step[sample]], axis=1),
        series.rank[series.at[sample]],
        np.ones(number.size),
        kl,
        np.stack([kl, calls * series.impacts[:, _FIRST], calls * np.square(series.impacts[:, _SPREAD])], axis=1),
    )
    known = np.isfinite(merged.value).all(axis=1)
    (of, step), ranks = merged.key[known].T, merged.ranks[known]
    kl, first, square = merged.value[known].T
    # The batches of several ranks are one batch, so much larger.
    square = square / ranks
    window = select_window(of, step, kl, total, frozen=frozen)
    found = _Moments.of(window, of, kl, first, square)
    bounds = _bounds(found, confidence)
    if not frozen:
        risen = _risen(window, step, kl, total, confidence)
        bounds["kl_high"] = np.fmax(_of_next(found, confidence), risen) * TOGETHER
    worst = np.zeros(total, dtype=np.int64)
    np.maximum.at(worst, number, series.labels[series.at[sample]])
    return RunLoss(mean=mean_loss, by_series=_records(bounds, mean_loss, window, worst))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Moments:
    """Means and deviations of every series over its window, in the loss' own unit."""

    samples: Ints
    kl: Floats
    kl_deviation: Floats
    log: Floats  # of kl; NaN where some kl is zero
    log_deviation: Floats
    first: Floats
    deviation: Floats  # of the change on one batch: the larger of the predicted and that of the samples
    spread: Floats  # predicted

    @classmethod
    def of(cls, window: Window, of: Ints, kl: Floats, first: Floats, square: Floats) -> "_Moments":
        samples = window.samples

        def moments(value: Floats) -> tuple[Floats, Floats]:
            mean = window_mean(window, value)
            squares = window_mean(window, np.square(value - mean[of]))
            with np.errstate(invalid="ignore", divide="ignore"):
                return mean, np.sqrt(squares * samples / (samples - 1.0))

        has_zero = np.bincount(of, weights=kl <= 0, minlength=samples.size) > 0
        log, log_deviation = moments(np.log(np.where(kl > 0, kl, 1.0)))
        kl_mean, kl_deviation = moments(kl)
        first_mean, _ = moments(first)
        _, change_deviation = moments(kl + first)
        spread = np.sqrt(window_mean(window, square))
        return cls(
            samples=samples,
            kl=kl_mean,
            kl_deviation=kl_deviation,
            log=np.where(has_zero, np.nan, log),
            log_deviation=log_deviation,
            first=first_mean,
            deviation=np.fmax(spread, change_deviation),
            spread=spread,
        )


def _bounds(found: _Moments, confidence: float) -> dict[str, Floats]:
    """Return the numbers of LossEvidence by name, [num_series], in the loss' own unit; NaN below two samples."""
    from scipy import special

    count = found.samples.astype(np.float64)
    freedom = np.where(count > 1, count - 1, np.nan)
    one_sided, two_sided = (-special.stdtrit(freedom, level) for level in (1.0 - confidence, (1.0 - confidence) / 2))
    root = np.sqrt(np.maximum(count, 1))
    half = one_sided * found.kl_deviation / root
    variance = np.square(found.log_deviation)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        # The upper limits of both parts of a log-normal's mean, log-mean + variance / 2, combined (Zou, Huo and Taleban
        # 2009): a few steps of very different kl bound nothing. Student's t alone misses twice as often as it says.
        part = variance / 2 * (freedom / special.chdtri(freedom, confidence) - 1)
        upper = np.exp(found.log + variance / 2 + np.hypot(one_sided * found.log_deviation / root, part))
    upper = np.where(np.isnan(found.log), found.kl + half, upper)
    change = found.kl + found.first
    reach = two_sided * found.deviation * np.sqrt(1 + 1 / np.maximum(count, 1))
    return {
        "kl": found.kl,
        "kl_low": np.maximum(found.kl - half, 0.0),
        "kl_high": upper * TOGETHER,
        "first_order": found.first,
        "first_order_low": found.first - one_sided * found.deviation / root,
        "spread": found.spread,
        "low": change - reach,
        "high": change + reach,
    }


def _of_next(found: _Moments, confidence: float) -> Floats:
    """Return the upper bound of the kl of one more sample, one-sided; NaN below two samples."""
    from scipy import special

    count = found.samples.astype(np.float64)
    reach = -special.stdtrit(np.where(count > 1, count - 1, np.nan), 1.0 - confidence)
    reach *= np.sqrt(1 + 1 / np.maximum(count, 1))
    with np.errstate(over="ignore", invalid="ignore"):
        of_log: Floats = np.exp(found.log + reach * found.log_deviation)
    return np.where(np.isnan(found.log), found.kl + reach * found.kl_deviation, of_log)


def _risen(window: Window, step: Ints, kl: Floats, total: int, confidence: float) -> Floats:
    """Return where the kl of a model in training gets to at the horizon where it surely rises, else NaN."""
    if not window.index.size:
        return np.full(total, np.nan)
    found, at, of = kl[window.index], step[window.index], window.series
    usable = found > 0
    trends = fit_trends(of[usable], at[usable], np.log(found[usable]), total)
    oldest = np.full(total, np.iinfo(np.int64).max)
    np.minimum.at(oldest, of, at)
    ahead = np.maximum((trends.step - oldest) // 2, 1)
    # The slope at its upper bound: unlike an error, a mean has no tolerance that would cover where it goes.
    slope = trends.slope + trends.half_width(2 * (1.0 - confidence))
    with np.errstate(over="ignore", invalid="ignore"):
        risen = np.exp(trends.level + slope * ahead)
    return np.where(trends.slope > trends.half_width(2 * RISE_LEVEL), risen, np.nan)


def _mean_loss(series: RunSeries, *, frozen: bool) -> float:
    """Return the mean loss per item over the sampled steps that are evidence and know it.

    NaN where one is negative: a share of what passes through zero says nothing.
    """
    zeros = np.zeros(series.step_at.size, dtype=np.int64)
    merged = over_ranks(
        series.step_at[:, None], series.rank, np.ones(zeros.size), zeros, np.stack([series.loss], axis=1)
    )
    loss, step = merged.value[:, 0], merged.key[:, 0]
    known = np.isfinite(loss)
    if not known.any():
        return math.nan
    window = select_window(zeros[: int(known.sum())], step[known], loss[known], 1, frozen=frozen)
    return math.nan if (loss[known][window.index] < 0).any() else float(window_mean(window, loss[known])[0])


def _records(
    bounds: dict[str, Floats], mean_loss: float, window: Window, labels: Ints
) -> tuple[LossEvidence | None, ...]:
    relative = {name: (value / mean_loss).tolist() for name, value in bounds.items()}
    return tuple(
        LossEvidence(
            **{name: column[number] for name, column in relative.items()},
            samples=samples,
            labels=_LABELS[labels[number]],
        )
        if samples
        else None
        for number, samples in enumerate(window.samples.tolist())
    )
