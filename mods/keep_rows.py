"""KeepRowsHigh: the few loud rows and columns of an input stay in high precision, the rest goes to FP8.

    y = rest(x without loud columns and rows) + loud(x of loud columns) + (loud rows) W^T

In trained transformers one token in a thousand, often the first, may have nearly all of the energy, and a few features
hold most of what every token says. Under one scale per tensor the loud tokens silence all others; and the error of a
product is made where x_k^2 |w_k|^2 is, so a sixteenth of the columns can account for a large share of it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loka.errors import ArgumentError
from loka.mods.claims import Claim
from loka.mods.trial.equivalent import MIN_GAIN_AT_A_COST, Refusal, checked_recipe, make_linear
from loka.mods.trial.gain import error_of, rounded_product, rounding_error
from loka.mods.trial.observe import LinearTraffic
from loka.mods.trial.splitting import SplittingMod, kept_columns
from loka.mods.trial.wrapping import LinearWrapper, multiply
from loka.selection import Selection

# X W^T in some precision.
Product = Callable[[Tensor, Tensor], Tensor]


class SplitLinear(LinearWrapper):
    """A linear in parts: `rest`, which a plan may convert, `loud` for a few columns, and the loudest rows.

    `period`: of so many rows the loudest one is kept, rounded up; 0 keeps none. Their number depends on the number of
    rows alone, so nothing waits for the device and torch.compile sees fixed shapes.
    """

    columns: Tensor
    is_loud: Tensor

    def __init__(self, rest: nn.Linear, loud: nn.Linear | None, columns: Tensor, period: int) -> None:
        super().__init__()
        self.in_features, self.out_features = rest.in_features, rest.out_features
        self.rest = rest
        self.loud = loud
        self.period = period
        is_loud = torch.zeros(rest.in_features, dtype=torch.bool, device=columns.device)
        self.register_buffer("columns", columns)
        self.register_buffer("is_loud", is_loud.index_fill(0, columns, True), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """Return what the linear returns for [..., in_features]."""
        x = input if self.loud is None else input.masked_fill(self.is_loud, 0)
        output: Tensor = self._by_rows(x) if self.period else self.rest(x)
        return output if self.loud is None else output + self.loud(input.index_select(-1, self.columns))

    def _by_rows(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        count = (rows.shape[0] + self.period - 1) // self.period
        loudest = rows.detach().abs().amax(-1).topk(count).indices
        output: Tensor = self.rest(rows.index_fill(0, loudest, 0))
        exact = multiply(self.rest, rows.index_select(0, loudest))
        return output.index_add(0, loudest, exact.to(output.dtype)).reshape(*x.shape[:-1], self.out_features)

    @property
    def bias(self) -> Tensor | None:
        """The bias of the linear that stood here."""
        held: Tensor | None = self.rest.bias
        return held

    def multiply(self, x: Tensor) -> Tensor:
        """Return the product of [..., in_features] without bias."""
        if self.loud is None:
            return multiply(self.rest, x)
        rest = multiply(self.rest, x.masked_fill(self.is_loud, 0))
        return rest + F.linear(x.index_select(-1, self.columns), self.loud.weight)

    @property
    def high_work(self) -> float:
        """Multiply-adds of one row that stay in high precision."""
        return (len(self.columns) + (self.in_features / self.period if self.period else 0)) * self.out_features

    def held(self, weight: Tensor, bias: Tensor | None) -> Mapping[str, Tensor]:
        """Split a weight from before the rewrite at the columns that are loud here."""
        columns = self.columns.to(weight.device)
        parts = {"columns": self.columns, "rest.weight": weight.index_fill(1, columns, 0)}
        if self.loud is not None:
            parts["loud.weight"] = weight.index_select(1, columns)
        return parts if bias is None else {**parts, "rest.bias": bias}

    def extra_repr(self) -> str:
        """Return the sizes, and what is kept."""
        rows = f"one row in {self.period}" if self.period else "no rows"
        return f"{super().extra_repr()}, high: {len(self.columns)} columns, {rows}"


@dataclass(frozen=True, slots=True)
class KeepRowsHigh(SplittingMod):
    """Split nn.Linear so that loud columns and rows of its input stay out of the product that goes to FP8.

    `columns`: how many, or which share of them, the ones with the largest E[x_k^2] |w_k|^2; 0 for none. `rows`: rows
    whose amax is so many times the median are loud; as large a share of the rows as was loud on the inputs is kept,
    the loudest ones; None for none. `recipe`: under which the error is measured, on rows that the linear got. A place
    stays as it was where the error does not fall by 5 %.

    A linear `x` becomes a module with `x.rest`, of the same shape, whose loud columns are zero, and `x.loud`, of the
    loud columns alone; both are nn.Linear and sites of their own. To keep `x.loud` out of FP8 whatever a bound allows,
    probe and plan with a `filter_fn` that leaves it out. An old checkpoint loads, strictly, and is split on the way.
    Loud rows are multiplied with the weight of `x.rest`, so a probe counts them as one more, small call of that site.
    """

    columns: int | float = 1 / 16
    rows: float | None = 8.0
    recipe: str = "rowwise"
    only: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        """Refuse options that cannot be meant."""
        Selection(self.only or ())
        checked_recipe(self.recipe)
        columns, rows = self.columns, self.rows
        if not isinstance(columns, int | float) or isinstance(columns, bool) or not columns >= 0:
            raise ArgumentError(f"columns={columns!r}: give a number of columns, or a share of them below 1.")
        if isinstance(columns, float) and columns >= 1:
            raise ArgumentError(f"columns={columns!r}: a share is below 1; write {int(columns)} for that many columns.")
        if rows is not None and (not isinstance(rows, int | float) or isinstance(rows, bool) or not rows > 1):
            raise ArgumentError(f"rows={rows!r}: give how many times the median a loud row exceeds, above 1, or None.")
        if not columns and rows is None:
            raise ArgumentError("KeepRowsHigh(columns=0, rows=None) keeps nothing. Give one of the two.")

    def split(self, fqn: str, linear: nn.Linear, seen: LinearTraffic) -> Claim | Refusal:
        """Split off its loud columns and rows, where the error falls with them."""
        columns = self._columns(linear, seen)
        period, limit = self._rows(seen)
        if not len(columns) and not period:
            return self.refused(fqn, "none of its rows is loud, and no column is to be kept")
        recipe, x, weight = checked_recipe(self.recipe), seen.rows, linear.weight.detach().float()
        before = rounding_error(x, weight, recipe)
        after = error_of(_product(x, weight, columns, limit, lambda x, w: rounded_product(x, w, recipe)), x, weight)
        figures = f"error under {self.recipe} {before:.4f} -> {after:.4f}"
        if not after <= (1 - MIN_GAIN_AT_A_COST) * before:
            return self.refused(fqn, f"nothing is gained there: {figures}", figure=after)

        def build() -> SplitLinear:
            now, sizes = linear.weight.detach(), (linear.in_features, linear.out_features)
            rest = make_linear(linear, now.index_fill(1, columns, 0), linear.bias, sizes)
            return SplitLinear(rest, kept_columns(linear, columns), columns, period)

        kept = f"{len(columns)} columns and {f'one row in {period}' if period else 'no rows'} kept high"
        return Claim(mod=self.name, fqn=fqn, module=linear, build=build, reason=f"{kept}: {figures}")

    def _columns(self, linear: nn.Linear, seen: LinearTraffic) -> Tensor:
        k = linear.in_features
        count = round(self.columns * k) if isinstance(self.columns, float) else self.columns
        if isinstance(self.columns, float) and self.columns > 0:
            count = max(count, 1)
        loudness = seen.energy * linear.weight.detach().float().square().sum(0)
        return loudness.nan_to_num().topk(min(count, k - 1)).indices.sort().values

    def _rows(self, seen: LinearTraffic) -> tuple[int, float]:
        """Return in how many rows one is loud, 0 where none is, and above which amax."""
        if self.rows is None:
            return 0, math.inf
        peaks = torch.cat(seen.peaks)
        limit = float(peaks.median()) * self.rows
        # The busiest call counts: another one with as many loud rows must not find too little room.
        counts = [(len(peak), int((peak > limit).sum())) for peak in seen.peaks]
        periods = [rows // loud for rows, loud in counts if loud]
        return (max(min(periods), 1), limit) if periods else (0, math.inf)


def _product(x: Tensor, weight: Tensor, columns: Tensor, limit: float, low: Product) -> Tensor:
    """Return X W^T as a `SplitLinear` computes it, with `low` in place of what goes to FP8."""
    loud = x.abs().amax(1, keepdim=True) > limit
    rest = x.index_fill(1, columns, 0).masked_fill(loud, 0)
    exact = x.masked_fill(~loud, 0).index_fill(1, columns, 0) @ weight.t()
    few = x.index_select(1, columns) @ weight.index_select(1, columns).t()
    return low(rest, weight.index_fill(1, columns, 0)) + exact + few
