"""What is known of each product of a run, as records, and what that says about a bound.

    safe        upper_tolerance <= bound
    unsafe      low > bound
    undecided   anything else, fewer than MIN_SAMPLES sampled steps included: never safe for lack of evidence

A bound on the row error is compared with the gated error of a product, one on the signal-to-noise ratio with the
relative error of its whole tensor, which it is in other units. Under a bound on the loss, forward products are judged
by their `LossEvidence`, backward products by the default bound on the error and by their bias.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from loka.bounds import Limit
from loka.formats import Pass, Role
from loka.numerics import Gate, decibels
from loka.probes.capturing.row_counts import RowCounts
from loka.probes.experts.statistics import ExpertStatistics
from loka.probes.judging.drift import Drift
from loka.probes.judging.loss_evidence import LossEvidence
from loka.probes.records import Event, OperandRecord, RunInfo, RunProgress

Verdict = Literal["safe", "unsafe", "undecided"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ErrorInterval:
    """One error of one recipe over the steps that are evidence; NaN where there are too few."""

    mean: float
    low: float
    high: float
    p99: float  # mean over steps of the 99th percentile over rows
    upper_tolerance: float

    def verdict(self, most: float) -> Verdict:
        """Judge against the most that the error may be."""
        if self.upper_tolerance <= most:
            return "safe"
        return "unsafe" if self.low > most else "undecided"


@dataclass(frozen=True, kw_only=True, slots=True)
class GatedError:
    """One error of a recipe that can be held to a bound, and which one it is."""

    gate: Gate
    error: ErrorInterval
    drift: Drift | None = None  # None: frozen weights, or too few samples
    note: str = ""  # why evidence is missing or weak, in words

    @property
    def sqnr_low_db(self) -> float:
        """The tolerance of a relative error as a ratio in dB: that of 99 % of steps lies above it."""
        return decibels(self.error.upper_tolerance)


_NOT_KNOWN: Final[ErrorInterval] = ErrorInterval(
    mean=math.nan, low=math.nan, high=math.nan, p99=math.nan, upper_tolerance=math.nan
)
_NO_WHOLE: Final[GatedError] = GatedError(
    gate="relative_error", error=_NOT_KNOWN, note="the error of its whole tensor was not bounded"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RecipeEvidence:
    """What is known of one recipe at one (site, pass)."""

    recipe: str
    format: str
    samples: int  # sampled steps that are evidence
    gate: Gate
    error: ErrorInterval
    relative_error: float
    sqnr_db: float
    mere: float
    horizon: int | None  # steps ahead of the last sample for which it holds; None: frozen weights
    note: str = ""  # why evidence is missing or weak, in words
    drift: Drift | None = None  # None: frozen weights, or too few samples
    # Mean and deviation of the log errors over the same steps, what two runs are compared by; NaN: not all have one.
    log_mean: float = math.nan
    log_deviation: float = math.nan
    bias: float = math.nan  # mean over steps of the part of the error along the result
    loss: LossEvidence | None = None  # fprop; None: no step took it
    whole: GatedError | None = None  # the relative error of the whole tensor, over the same steps

    def judge(self, limit: Limit) -> Verdict:
        """Judge against what the product is held to; under a bound on the loss, fprop alone against the budget."""
        if limit.metric == "loss":
            return "undecided" if self.loss is None else self.loss.verdict(limit.value)
        error = self.error if limit.metric == "row_error" else self.gated(limit).error
        verdict = error.verdict(limit.most)
        if limit.bias is None or abs(self.bias) <= limit.bias:
            return verdict
        return "undecided" if math.isnan(self.bias) and verdict != "unsafe" else "unsafe"

    def gated(self, limit: Limit) -> GatedError:
        """Return the error that this limit is compared with; one on the loss, as any on the row error."""
        if limit.metric != "sqnr_db" or self.gate == "relative_error":
            return GatedError(gate=self.gate, error=self.error, drift=self.drift, note=self.note)
        return _NO_WHOLE if self.whole is None else self.whole

    def upper(self, limit: Limit) -> float:
        """Return what a verdict compares with the bound: the tolerance of the error, or the cost in loss."""
        if limit.metric != "loss":
            return self.gated(limit).error.upper_tolerance
        return math.nan if self.loss is None else self.loss.cost

    def verdict(self, limit: float) -> Verdict:
        """Judge the gated error against the most that it may be."""
        return self.error.verdict(limit)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProductEvidence:
    """Everything known of one (site, pass) of a run."""

    site: str
    product: Pass
    op: str  # aten name, e.g. "addmm"
    batch: int
    m: int  # median over the calls of sampled steps
    m_min: int
    m_max: int
    n: int
    k: int  # of wgrad the median, its rows
    calls: float  # per step
    dtype: str
    parameter: str
    flops: float  # per step
    flop_share: float  # of all products of the run
    operands: Mapping[Role, OperandRecord]  # of the newest measured step; nan and inf summed over steps
    recipes: tuple[RecipeEvidence, ...]
    unmeasured: str = ""
    rows: RowCounts = field(default_factory=RowCounts)  # the distribution of m, of wgrad of k, over the calls


@dataclass(frozen=True, kw_only=True, slots=True)
class RunEvidence:
    """One run, read back and condensed."""

    info: RunInfo
    progress: RunProgress
    events: tuple[Event, ...]
    confidence: float
    family: int  # rows that share the confidence
    products: tuple[ProductEvidence, ...]
    mean_loss: float = math.nan  # per item, over the steps that are evidence, in the loss' own unit
    experts: Mapping[tuple[str, Pass], ExpertStatistics] = field(default_factory=dict)  # by (site, pass)
    families: tuple[tuple[str, ...], ...] = ()  # sites whose forward products read one input
    epilogues: tuple[str, ...] = ()  # sites that are one module with their norm and activation
    flows: Mapping[str, str] = field(default_factory=dict)  # such sites -> the one that alone reads their result
    outsides: Mapping[str, str] = field(default_factory=dict)  # sites -> another module that multiplies by their weight
    twice: frozenset[str] = frozenset()  # sites whose gradients the loop differentiates again

    @property
    def has_loss(self) -> bool:
        """Whether any step took the impact of a product on the loss."""
        return any(recipe.loss is not None for product in self.products for recipe in product.recipes)
