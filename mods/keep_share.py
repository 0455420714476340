"""KeepShareHigh: as much of a product stays in high precision as it takes to lower its error by a given factor.

    y = rest(x of quiet columns) + loud(x of loud columns),    and the rows that came out worst once more, exactly

FP8 rounds every element relative to itself, so a row's squared error is about

    c^2 sum over k of x_k^2 |w_k|^2  /  |y|^2

(c is 0.037 for two operands in e4m3). It is spread over columns and rows: the 99th percentile is some 1.5 times the
median, so no few rows carry it, and to have a third of it left, columns that make 8/9 of that sum have to leave FP8. A
rotation needs fewer directions than columns for that, but its own product, k x k, is as long as the site's where n is
no larger than k; columns cost nothing. The rows are found where they arise: the sum is known from the input, |y| from
the product in FP8, and the rows with the largest ratio are multiplied again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from loka.errors import ArgumentError
from loka.formats import Recipe
from loka.mods.claims import Claim
from loka.mods.trial.equivalent import Refusal, checked_recipe, make_linear
from loka.mods.trial.gain import rounded_product
from loka.mods.trial.observe import LinearTraffic
from loka.mods.trial.splitting import SplittingMod, kept_columns
from loka.mods.trial.wrapping import LinearWrapper, multiply
from loka.numerics import gate_for, product_error
from loka.selection import Selection

# One row in so many is multiplied again: what is tried, 0 for none.
_PERIODS: Final[tuple[int, ...]] = (0, 32, 16, 8)
# What kernels want the width of a product to be a multiple of.
_MULTIPLE: Final[int] = 16
# Work in FP8 counts half: that is how much faster the arithmetic of every GPU with FP8 is, against bf16.
_LOW: Final[float] = 0.5
# The sample has to show this much more than what is asked for: its own 99th percentile is known to several percent.
_MARGIN: Final[float] = 1.1


class PartedLinear(LinearWrapper):
    """A linear in two: `rest` for the quiet columns, which a plan may convert, and `loud` for the others.

    `period`: of so many rows the one with the largest error is multiplied again, past any conversion; 0 for none. Their
    number depends on the number of rows alone, so nothing waits for the device and torch.compile sees fixed shapes.
    `harm` [k of rest]: |w_k|^2, by which the error of a row is told from its input.
    """

    columns: Tensor
    others: Tensor
    harm: Tensor

    def __init__(self, rest: nn.Linear, loud: nn.Linear | None, columns: Tensor, period: int) -> None:
        super().__init__()
        width = rest.in_features + len(columns)
        self.in_features, self.out_features, self.period = width, rest.out_features, period
        others = torch.ones(width, dtype=torch.bool, device=columns.device).index_fill(0, columns, False)
        self.register_buffer("columns", columns)
        self.register_buffer("others", others.nonzero().squeeze(1))
        self.register_buffer("harm", _harm(rest.weight))
        self.bias = rest.bias  # added last: what tells a bad row is the product without it
        rest.register_parameter("bias", None)
        self.rest, self.loud = rest, loud

    def forward(self, input: Tensor) -> Tensor:
        """Return what the linear returns for [..., in_features]."""
        rows = input.reshape(-1, self.in_features)
        quiet = rows.index_select(1, self.others)
        high = None if self.loud is None else self.loud(rows.index_select(1, self.columns))
        output: Tensor = self.rest(quiet) if high is None else self.rest(quiet) + high
        if self.period:
            ratio = noise_to_signal(quiet.detach(), self.harm, output.detach())
            worst = ratio.topk((ratio.shape[0] + self.period - 1) // self.period).indices
            exact = multiply(self.rest, quiet.index_select(0, worst))
            exact = exact if high is None else exact + high.index_select(0, worst)
            output = output.index_copy(0, worst, exact.to(output.dtype))
        output = output if self.bias is None else output + self.bias.to(output.dtype)
        return output.reshape(*input.shape[:-1], self.out_features)

    def multiply(self, x: Tensor) -> Tensor:
        """Return the product of [..., in_features] without bias."""
        product = multiply(self.rest, x.index_select(-1, self.others))
        return product if self.loud is None else product + multiply(self.loud, x.index_select(-1, self.columns))

    def held(self, weight: Tensor, bias: Tensor | None) -> Mapping[str, Tensor]:
        """Split a weight from before the rewrite at the columns that are loud here."""
        rest = weight.index_select(1, self.others.to(weight.device))
        parts = {"columns": self.columns, "others": self.others, "harm": _harm(rest), "rest.weight": rest}
        if self.loud is not None:
            parts["loud.weight"] = weight.index_select(1, self.columns.to(weight.device))
        return parts if bias is None else {**parts, "bias": bias}

    @property
    def high_work(self) -> float:
        """Multiply-adds of one row that stay in high precision."""
        again = (self.in_features - len(self.columns)) / self.period if self.period else 0.0
        return (len(self.columns) + again) * self.out_features

    def extra_repr(self) -> str:
        """Return the sizes, and what is kept."""
        rows = f"one row in {self.period}" if self.period else "no rows"
        return f"{super().extra_repr()}, high: {len(self.columns)} columns, {rows}"


def _harm(weight: Tensor) -> Tensor:
    return weight.detach().float().square().sum(0)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Choice:
    """So many columns and one row in `period` stay high; what that costs and leaves."""

    columns: int
    period: int
    high: float  # work in high precision, in units of the product
    low: float  # work in FP8, likewise
    after: float

    @property
    def cost(self) -> float:
        return self.high + _LOW * self.low


@dataclass(frozen=True, slots=True)
class KeepShareHigh(SplittingMod):
    """Keep as many columns and rows in high precision as make the error of a product `times` times lower.

    What is lowered is the 99th percentile over rows of `row_error` (with fewer than 8 outputs `relative_error`) under
    `recipe`, measured on rows that the moments leave out. Columns are kept in the order of E[x_k^2] |w_k|^2; of the
    rows, one in 32, 16, 8 or none, those whose product came out worst. Place by place the cheapest pair is taken.
    `most`: what that may cost, as a share of the product in high precision, work in FP8 counted half. At 1, the
    default, a place stays as it was where it would be no cheaper to leave it in high precision altogether. The reason
    of a replacement says which shares of the work are done in which precision; rows that are done twice are in both.
    `only`: patterns of the linears; name those that need it, for the share is large, about two thirds for `times=3`.
    What is multiplied again is chosen among the rows of one call: in FP8 a row then depends on those beside it, as it
    does under one scale per tensor.

    A linear `x` becomes a module with `x.rest`, of the quiet columns, whose number is a multiple of 16, and `x.loud`,
    of the others; both are nn.Linear and sites of their own. The bias stays where it was. To keep `x.loud` out of FP8
    whatever a bound allows, probe and plan with a `filter_fn` that leaves it out. An old checkpoint loads, strictly,
    and is split on the way. A probe counts the rows that are done again as one more, small call of `x.rest`.
    """

    times: float = 3.0
    most: float = 1.0
    recipe: str = "rowwise"
    only: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        """Refuse options that cannot be meant."""
        Selection(self.only or ())
        checked_recipe(self.recipe)
        times, most = self.times, self.most
        if not isinstance(times, int | float) or isinstance(times, bool) or not 1 < times < float("inf"):
            raise ArgumentError(f"times={times!r}: give by what factor the error should be lower, above 1, e.g. 3.")
        if not isinstance(most, int | float) or isinstance(most, bool) or not _LOW < most <= 1:
            raise ArgumentError(
                f"most={most!r}: give what it may cost as a share of the product in high precision, above {_LOW}, "
                "which is what FP8 alone costs, and up to 1."
            )

    def split(self, fqn: str, linear: nn.Linear, seen: LinearTraffic) -> Claim | Refusal:
        """Split it where its error falls as far as is asked for, at less than the cost of high precision."""
        loudness = (seen.energy * _harm(linear.weight)).nan_to_num()
        trial = _Trial(seen.rows, linear.weight.detach().float(), loudness.argsort(descending=True), self.recipe)
        before = trial.error(0, 0)
        if not 0 < before < float("inf"):
            return self.refused(fqn, "its product is all zero, or not finite, or exact in FP8")
        choice = min((trial.least(period, before / (self.times * _MARGIN)) for period in _PERIODS), key=_cost)
        work = f"{choice.high:.0%} of its work in high precision and {choice.low:.0%} in FP8"
        figures = f"error p99 under {self.recipe} {before:.4f} -> {choice.after:.4f}"
        if choice.cost > self.most:
            reason = f"{self.times:g} times less takes {work}, no cheaper than most={self.most:g} allows: {figures}"
            return self.refused(fqn, reason, figure=choice.cost)
        columns = trial.order[: choice.columns].sort().values

        def build() -> PartedLinear:
            now, outputs = linear.weight.detach(), linear.out_features
            others = torch.ones(linear.in_features, dtype=torch.bool, device=now.device).index_fill(0, columns, False)
            rest = make_linear(linear, now[:, others], linear.bias, (linear.in_features - len(columns), outputs))
            return PartedLinear(rest, kept_columns(linear, columns), columns, choice.period)

        rows = f"one row in {choice.period}" if choice.period else "no rows"
        reason = f"{choice.columns} columns and {rows} kept high, {work}: {figures}"
        return Claim(mod=self.name, fqn=fqn, module=linear, build=build, reason=reason)


def _cost(choice: _Choice) -> float:
    return choice.cost


def columns_to_keep(terms: Tensor, times: float) -> tuple[int, float]:
    """Return how many columns have to be kept for an error so many times lower, and what share of `terms` is left.

    terms: [k], E[x_k^2] |w_k|^2. By their sum alone, without a trial; columns that FP8 keeps are a multiple of 16.
    """
    falling = terms.double().nan_to_num().sort(descending=True).values
    total = falling.sum()
    total = torch.where(total > 0, total, 1.0)
    left = torch.cat([total.new_ones(1), 1.0 - falling.cumsum(0) / total])
    enough = min(int((left > 1.0 / (times * _MARGIN) ** 2).sum()), len(terms))  # it falls
    rest = (len(terms) - enough) // _MULTIPLE * _MULTIPLE if len(terms) > _MULTIPLE else len(terms) - enough
    return len(terms) - rest, max(float(left[len(terms) - rest]), 0.0)


class _Trial:
    """The error of one product for so many columns and rows that are kept, each number of columns computed once."""

    def __init__(self, x: Tensor, weight: Tensor, order: Tensor, recipe: str) -> None:
        self.x, self.weight, self.order = x, weight, order
        self.recipe: Recipe = checked_recipe(recipe)
        self.reference = x @ weight.t()
        self.k = weight.shape[1]
        self._known: dict[int, dict[int, float]] = {}

    def widths(self) -> list[int]:
        """Return how many columns may be kept: what is left is a multiple of 16, where k has room for that."""
        step = _MULTIPLE if self.k > _MULTIPLE else 1
        return [0, *(self.k - rest for rest in range((self.k - 1) // step * step, 0, -step))]

    def least(self, period: int, wanted: float) -> _Choice:
        """Return the fewest columns with which the error is as low as wanted; the most there are where none is."""
        widths = self.widths()
        low, high = 0, len(widths) - 1
        while low < high:
            middle = (low + high) // 2
            if self.error(widths[middle], period) <= wanted:
                high = middle
            else:
                low = middle + 1
        columns, after = widths[low], self.error(widths[low], period)
        rest = 1 - columns / self.k
        share = (1 - rest + (rest / period if period else 0)) if after <= wanted else 1.0
        return _Choice(columns=columns, period=period, high=share, low=rest, after=after)

    def error(self, columns: int, period: int) -> float:
        """Return the tail of the error with so many columns, and one row in `period`, kept high."""
        if columns not in self._known:
            self._known[columns] = self._errors(columns)
        return self._known[columns][period]

    def _errors(self, columns: int) -> dict[int, float]:
        loud, quiet = self.order[:columns], self.order[columns:]
        x, weight = self.x.index_select(1, quiet), self.weight.index_select(1, quiet)
        high = self.x.index_select(1, loud) @ self.weight.index_select(1, loud).t()
        product = rounded_product(x, weight, self.recipe) + high
        by_harm = noise_to_signal(x, _harm(weight), product).argsort(descending=True)
        found = {}
        for period in _PERIODS:
            worst = by_harm[: -(-len(x) // period)] if period else by_harm[:0]
            error = product_error(product.index_copy(0, worst, self.reference.index_select(0, worst)), self.reference)
            by_rows = gate_for(len(weight)) == "row_error"
            found[period] = error.row_error_p99 if by_rows else error.relative_error
        return found


def noise_to_signal(x: Tensor, harm: Tensor, product: Tensor) -> Tensor:
    """Return what the squared error of each row of X W^T [m, n] is proportional to, from |w_k|^2 [k]."""
    noise = x.float().square() @ harm.float()
    return (noise / product.float().square().sum(1).clamp_min(torch.finfo(torch.float32).tiny)).nan_to_num()
