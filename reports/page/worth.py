"""What a decision is worth on this device: the speed of all GEMMs of a step together, and how sure its times are.

The value is the ratio of two sums over products: calls times the baseline's time, and calls times the chosen kernel's.
Its interval comes from the spread of the repetitions that each time is the median of. The standard error of a median is
that of a normal sample, 1.2533 sigma / sqrt(n), with sigma from the interquartile range; times of different kernels and
shapes are measured apart and their errors are independent, a time that several products share errs once for all of
them. To first order that gives the error of the ratio's logarithm. It says how well these runs of the kernels were
timed; what another day, another clock or another load would change is not in it.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from loka.dispatch.deciding.decide import Decision
from loka.dispatch.measuring.profile import at_rows, newest, time_key
from loka.probes.records import Timing

CONFIDENCE: Final[float] = 0.95
# Two-sided normal quantile at CONFIDENCE.
_DEVIATIONS: Final[float] = 1.959964
# Half an interquartile range is so many standard deviations of a normal sample.
_HALF_IQR: Final[float] = 0.6744898
# Asymptotic standard error of a median over that of a mean: sqrt(pi / 2).
_MEDIAN: Final[float] = math.sqrt(math.pi / 2)
# Fewer repetitions have no spread.
_LEAST_REPETITIONS: Final[int] = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Worth:
    """The speed of one step's GEMMs under the decisions, all on their baselines = 1, and its interval."""

    speed: float
    low: float
    high: float


def worth_of(
    decisions: Mapping[tuple[str, str], Decision], calls: Mapping[tuple[str, str], float], timings: Iterable[Timing]
) -> Worth | None:
    """Return what decisions are worth; `calls` per step by (site, pass).

    None where no product was timed, or where a time among them does not come from one of `timings` alone: a sum over
    some of its terms would have an interval that is too narrow.
    """
    timed = [
        (calls[key], each)
        for key, each in decisions.items()
        if each.baseline_time_us is not None and each.time_us is not None and key in calls
    ]
    before = math.fsum(count * (each.baseline_time_us or 0.0) for count, each in timed)
    after = math.fsum(count * (each.time_us or 0.0) for count, each in timed)
    if not before or not after:
        return None
    known = {time_key_of(timing): timing for timing in newest(timings)}
    influence: defaultdict[Any, float] = defaultdict(float)  # of each time on the logarithm of the ratio
    for count, each in timed:
        for kernel, total in ((each.baseline, before), (each.kernel, -after)):
            for key, weight in _keys(kernel, each):
                if key not in known or known[key].repetitions < _LEAST_REPETITIONS:
                    return None
                influence[key] += count * weight / total
    error = math.sqrt(math.fsum((share * _standard_error(known[key])) ** 2 for key, share in influence.items()))
    factor = math.exp(_DEVIATIONS * error)
    return Worth(speed=before / after, low=before / after / factor, high=before / after * factor)


def time_key_of(timing: Timing) -> Any:
    """Return what `time_key` returns for the kernel and shape of a timing."""
    return (timing.kernel, timing.product, timing.batch, timing.m, timing.n, timing.k, timing.dtype)


def _keys(kernel: str, decision: Decision) -> Iterator[tuple[Any, float]]:
    """Yield the times that a kernel's time at a product is the mean of, each with its weight."""
    if not decision.times:
        yield time_key(kernel, decision.request), 1.0
        return
    total = math.fsum(point.weight for point in decision.times)
    for point in decision.times:
        yield time_key(kernel, at_rows(decision.request, point.rows)), point.weight / total


def _standard_error(timing: Timing) -> float:
    return _MEDIAN * timing.spread_us / _HALF_IQR / math.sqrt(timing.repetitions)
