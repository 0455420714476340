"""Two ways of training, compared seed by seed: the mean difference, its interval, and what could have been seen at all.

Seeds differ far more from one another than ways of training do, so only differences within a seed are looked at. Few
seeds make no normal distribution: everything is Student's t with one degree of freedom less than there are seeds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from scipy import stats

CONFIDENCE: Final[float] = 0.95
POWER: Final[float] = 0.8
# A relative change of the log loss that recommendation teams call significant, in percent (arXiv 2605.10886).
SIGNIFICANT_PERCENT: Final[float] = 0.02
_MANY: Final[int] = 10_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Paired:
    """A paired difference in percent; None where the seeds are too few to tell."""

    seeds: int
    mean: float
    low: float | None  # of the 95 % interval
    high: float | None
    p: float | None  # of no difference, two-sided
    smallest_seen: float | None  # the smallest true difference that these seeds find in four of five studies
    seeds_for_0_02: int | None  # as many would find one of 0.02 %; None beyond ten million


def paired(changes: Sequence[float]) -> Paired | None:
    """Return what finite differences, one per seed, in percent, say together; None where there are none."""
    count = len(changes)
    if count == 0:
        return None
    mean = math.fsum(changes) / count
    if count == 1:
        return Paired(seeds=1, mean=mean, low=None, high=None, p=None, smallest_seen=None, seeds_for_0_02=None)
    deviation = math.sqrt(math.fsum((change - mean) ** 2 for change in changes) / (count - 1))
    error = deviation / math.sqrt(count)
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * error
    return Paired(
        seeds=count,
        mean=mean,
        low=mean - reach,
        high=mean + reach,
        p=float(2 * stats.t.sf(abs(mean) / error, count - 1)) if error > 0 else float(mean == 0),
        smallest_seen=smallest_seen(deviation, count),
        seeds_for_0_02=seeds_needed(deviation, SIGNIFICANT_PERCENT),
    )


def smallest_seen(deviation: float, count: int) -> float:
    """Return the difference that a two-sided test at 95 % finds with 80 % power, by the sum of the two t quantiles."""
    quantiles = stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) + stats.t.ppf(POWER, count - 1)
    return float(quantiles) * deviation / math.sqrt(count)


def seeds_needed(deviation: float, difference: float) -> int | None:
    """Return how many seeds make `smallest_seen` no larger than a difference; None where ten million do not."""
    if smallest_seen(deviation, _MANY) > difference:
        return None
    few, enough = 1, _MANY
    while enough - few > 1:
        middle = (few + enough) // 2
        few, enough = (few, middle) if smallest_seen(deviation, middle) <= difference else (middle, enough)
    return enough
