"""The axes of the plots in reports: from values to places in an SVG, with ticks at round values."""

import math
from dataclasses import dataclass
from typing import Final

_TICKS: Final[tuple[float, ...]] = (1.0, 2.0, 5.0)
_FEWEST_TICKS: Final[int] = 3


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis: from values to places, and where its ticks are."""

    low: float
    high: float
    begin: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the place of a value."""
        low, high, at = (math.log10(each) if self.log else each for each in (self.low, self.high, value))
        return round(self.begin + (at - low) / ((high - low) or 1.0) * (self.end - self.begin), 2)

    def ticks(self) -> list[tuple[float, str]]:
        """Return (place, label) of round values along the axis."""
        values = self._decades() if self.log else []
        if len(values) < _FEWEST_TICKS:
            values = self._even()
        return [(self(value), f"{value:.4g}") for value in values]

    def _decades(self) -> list[float]:
        """Return 1, 2 and 5 of every decade, over a wide range 1 alone."""
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        wide = self.high > 1000 * self.low
        values = [float(f"{tick}e{decade}") for decade in decades for tick in (_TICKS[:1] if wide else _TICKS)]
        return [value for value in values if self.low <= value <= self.high]

    def _even(self) -> list[float]:
        raw = (self.high - self.low) / 5 or 1.0
        decade = 10.0 ** math.floor(math.log10(raw))
        step = next((tick * decade for tick in _TICKS if tick * decade >= raw), 10 * decade)
        return [step * at for at in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
