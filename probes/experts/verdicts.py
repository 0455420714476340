"""Verdicts on single experts: what the sums of `experts` say about a bound on the row error.

    safe        99 % of steps are within it
    unsafe      the mean is not
    undecided   anything else, fewer than MIN_SAMPLES measured steps included

Both at a confidence that all experts of one product and recipe share. The bounds are those of an error that is normal
over steps: nothing finer can be said of sums.
"""

import math

from loka.bounds import Limit
from loka.probes.experts.statistics import ExpertError, ExpertStatistics
from loka.probes.judging.intervals import MIN_SAMPLES, mean_factor, tolerance_factor
from loka.probes.judging.verdicts import Verdict


def judge_experts(statistics: ExpertStatistics, recipe: str, limit: Limit, confidence: float) -> dict[int, Verdict]:
    """Return the verdict on every expert that has a figure of its own; under a limit on another error, none is made."""
    errors = statistics.errors(recipe)
    if limit.metric != "row_error" or not errors:
        return dict.fromkeys((each.expert for each in errors), "undecided")
    alpha = (1.0 - confidence) / len(errors)
    return {each.expert: _verdict(each, limit.value, alpha) for each in errors}


def unsafe_experts(statistics: ExpertStatistics, recipe: str, limit: Limit, confidence: float) -> tuple[int, ...]:
    """Return the experts whose own error is above the limit under a recipe, in ascending order."""
    verdicts = judge_experts(statistics, recipe, limit, confidence)
    return tuple(sorted(expert for expert, verdict in verdicts.items() if verdict == "unsafe"))


def _verdict(error: ExpertError, most: float, alpha: float) -> Verdict:
    if error.samples < MIN_SAMPLES or math.isnan(error.deviation):
        return "undecided"
    if error.mean + tolerance_factor(error.samples, alpha) * error.deviation <= most:
        return "safe"
    return "unsafe" if error.mean - mean_factor(error.samples, alpha) * error.deviation > most else "undecided"
