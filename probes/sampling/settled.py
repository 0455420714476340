"""Which products need no more samples for their verdict, so that the overhead budget goes to those that do.

A product is settled when the newest samples of every recipe lie so far on one side of the default bound that neither
their spread nor the drift of a training run can carry them across. It is still sampled, at a quarter of the rate, and
is unsettled by the first sample that comes near.
"""

import math
import statistics
from collections import deque
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Final

from loka.bounds import DEFAULT_ROW_ERROR
from loka.numerics import ProductError, gate_for

# Samples that are looked at; a log-normal tolerance bound of so many, family-wise over 600 rows, is mean + 9.3 sd.
_SAMPLES: Final[int] = 10
_DEVIATIONS: Final[float] = 9.3
# Room for drift: an error in training moves by up to a third in a hundred steps.
_MARGIN: Final[float] = 1.33


@dataclass(slots=True)
class Settled:
    """The newest errors of every product, as logarithms."""

    _newest: dict[tuple[Hashable, str], deque[float]] = field(default_factory=dict)

    def saw(self, job: Hashable, errors: Mapping[str, ProductError], columns: int) -> bool:
        """Take one sample of a product; return whether its verdict is settled."""
        gate = gate_for(columns)
        far = [self._is_far(job, recipe, error.gated(gate)) for recipe, error in errors.items()]
        return all(far)

    def _is_far(self, job: Hashable, recipe: str, error: float) -> bool:
        if math.isnan(error):
            return False
        newest = self._newest.setdefault((job, recipe), deque(maxlen=_SAMPLES))
        newest.append(math.log(error) if 0 < error < math.inf else math.copysign(math.inf, error - 1))
        if len(newest) < _SAMPLES or not all(map(math.isfinite, newest)):
            return False
        reach = _DEVIATIONS * statistics.stdev(newest) + math.log(_MARGIN)
        return abs(statistics.fmean(newest) - math.log(DEFAULT_ROW_ERROR)) > reach
