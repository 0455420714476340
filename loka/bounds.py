"""What the user allows: an error bound, and the confidence at which it has to hold.

A bound on the loss is one budget, relative to the loss, that all forward products of a plan spend together. What
rounding does to a backward product changes no loss in the same step, so under such a bound dgrad and wgrad are judged
by what their gradients lose: the default bound on the row error, and a bound on the bias along the gradient.
"""

import math
from dataclasses import dataclass
from typing import Final

from loka.errors import ArgumentError
from loka.formats import Pass

DEFAULT_ROW_ERROR: Final[float] = 0.05
# Under a bound on the loss, the most that a gradient may shrink or grow on average. Rounding to nearest leaves a few
# thousandths; flushing to zero, which does train differently, is far above it.
GRADIENT_BIAS: Final[float] = 0.01
_EXAMPLES: Final[dict[str, str]] = {"row_error": "row_error=0.05", "loss": "loss=2e-4"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Bound:
    """An accuracy bound: `row_error` per GEMM, or `loss`, a share of the model's loss to spend over all sites.

    Exactly one of the two is given. `confidence` is family-wise over all rows of a report; of a budget of loss, it is
    that of the sum. Raises ArgumentError.
    """

    row_error: float | None = None
    loss: float | None = None
    confidence: float = 0.95

    def __post_init__(self) -> None:
        """Refuse a bound that says nothing, or two things."""
        limits = {"row_error": self.row_error, "loss": self.loss}
        given = {name: value for name, value in limits.items() if value is not None}
        if len(given) != 1:
            raise ArgumentError(
                f"A bound limits exactly one thing, this one limits {' and '.join(given) or 'nothing'}. "
                "Write Bound(row_error=0.05) or Bound(loss=2e-4)."
            )
        for name, value in given.items():
            if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
                raise ArgumentError(f"Bound({name}={value!r}): a bound is a positive number, e.g. {_EXAMPLES[name]}.")
        if not 0.5 <= self.confidence < 1.0:
            raise ArgumentError(f"Bound(confidence={self.confidence!r}): confidence lies in [0.5, 1), e.g. 0.95.")

    def row_error_of(self, product: Pass) -> float | None:
        """Return the limit on the gated error of a product; None for fprop under a bound on the loss."""
        if self.row_error is not None:
            return self.row_error
        return None if product == "fprop" else DEFAULT_ROW_ERROR

    def bias_of(self, product: Pass) -> float | None:
        """Return the limit on the absolute bias of a product; None where there is none."""
        return None if self.row_error is not None or product == "fprop" else GRADIENT_BIAS

    def __str__(self) -> str:
        """Return e.g. `row_error <= 0.05 at 95 % confidence`."""
        name, value = ("row_error", self.row_error) if self.row_error is not None else ("loss", self.loss)
        return f"{name} <= {value:g} at {100 * self.confidence:g} % confidence"


def parse_bound(text: str) -> Bound:
    """Parse `0.05`, `row_error=0.05` or `loss=2e-4`; raise ArgumentError otherwise."""
    name, separator, value = text.partition("=")
    if not separator:
        name, value = "row_error", text
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    name = name.strip()
    if name not in ("row_error", "loss") or math.isnan(number):
        raise ArgumentError(f"--bound {text!r} is not a bound. Write --bound 0.05, row_error=0.05 or loss=2e-4.")
    return Bound(row_error=number) if name == "row_error" else Bound(loss=number)
