"""From samples to evidence: an interval per (site, pass, recipe) and what it says about a bound.

`row_error.low` and `.high` bound the mean over steps. `upper_tolerance` bounds the error of 99 % of steps; it is what a
verdict compares with the bound. Both hold at `confidence`, family-wise over all rows of a report (Bonferroni). With
frozen weights steps are exchangeable and that is all; in training the error drifts, so the tolerance gets a margin and
the evidence a horizon, after which it is no longer valid; `drift` says how fast it changes, and where to.

    safe        upper_tolerance <= bound
    unsafe      low > bound
    undecided   anything else, fewer than MIN_SAMPLES sampled steps included: never safe for lack of evidence

Under a bound on the loss, forward products are judged by their `LossEvidence`, backward products by the default bound
on the error and by their bias. The ranks of a distributed run make one sample per step.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Engine

from loka.bounds import Bound
from loka.errors import ArgumentError, EvidenceError
from loka.formats import RECIPES, ROLES, Pass, Role
from loka.numerics import Gate, gate_for
from loka.probes.database import find_run, open_database, transaction
from loka.probes.drift import Drift
from loka.probes.intervals import (
    MIN_SAMPLES,
    WARMUP_STEPS,
    Floats,
    Intervals,
    Ints,
    Window,
    intervals,
    select_window,
    window_mean,
)
from loka.probes.loss_evidence import LossEvidence, RunLoss, loss_evidence
from loka.probes.records import Event, OperandRecord, RunInfo, RunProgress
from loka.probes.rows import operand_record
from loka.probes.schema import METRICS
from loka.probes.series import OPERAND_VALUES, SHAPE, RunSeries, Shares, load_series, load_shares, over_ranks

__all__ = [
    "MIN_SAMPLES",
    "Drift",
    "ErrorInterval",
    "LossEvidence",
    "ProductEvidence",
    "RecipeEvidence",
    "RunEvidence",
    "Verdict",
    "collect_evidence",
    "load_evidence",
]

Verdict = Literal["safe", "unsafe", "undecided"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ErrorInterval:
    """The gated error of one recipe over the steps that are evidence; NaN where there are too few."""

    mean: float
    low: float
    high: float
    p99: float  # mean over steps of the 99th percentile over rows
    upper_tolerance: float


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

    def judge(self, bound: Bound, product: Pass) -> Verdict:
        """Judge as a recipe of `product`; under a bound on the loss, fprop alone against the whole budget."""
        limit = bound.row_error_of(product)
        if limit is None:
            return "undecided" if self.loss is None or bound.loss is None else self.loss.verdict(bound.loss)
        verdict, most = self.verdict(limit), bound.bias_of(product)
        if most is None or abs(self.bias) <= most:
            return verdict
        return "undecided" if math.isnan(self.bias) and verdict != "unsafe" else "unsafe"

    def upper(self, bound: Bound, product: Pass) -> float:
        """Return what a verdict compares with the bound: the tolerance of the error, or the cost in loss."""
        if bound.row_error_of(product) is not None:
            return self.error.upper_tolerance
        return math.nan if self.loss is None else self.loss.cost

    def verdict(self, limit: float) -> Verdict:
        """Judge against a bound on the gated error."""
        if self.error.upper_tolerance <= limit:
            return "safe"
        if self.error.low > limit:
            return "unsafe"
        return "undecided"


@dataclass(frozen=True, kw_only=True, slots=True)
class ProductEvidence:
    """Everything known of one (site, pass) of a run."""

    site: str
    product: Pass
    op: str  # aten name, e.g. "addmm"
    batch: int
    m: int  # median over sampled steps
    m_min: int
    m_max: int
    n: int
    k: int
    calls: float  # per step
    dtype: str
    parameter: str
    flops: float  # per step
    flop_share: float  # of all products of the run
    operands: Mapping[Role, OperandRecord]  # of the newest measured step; nan and inf summed over steps
    recipes: tuple[RecipeEvidence, ...]
    unmeasured: str = ""


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

    @property
    def has_loss(self) -> bool:
        """Whether any step took the impact of a product on the loss."""
        return any(recipe.loss is not None for product in self.products for recipe in product.recipes)


def load_evidence(db: str | os.PathLike[str], run_id: str | None = None, *, confidence: float = 0.95) -> RunEvidence:
    """Open a probe database and collect the evidence of one run. Raises DatabaseError, EvidenceError, ArgumentError."""
    engine = open_database(db, create=False)
    try:
        return collect_evidence(engine, run_id, confidence=confidence)
    finally:
        engine.dispose()


def collect_evidence(engine: Engine, run_id: str | None = None, *, confidence: float = 0.95) -> RunEvidence:
    """Condense one run, by default the latest, into evidence at `confidence`, family-wise over its rows.

    Raises EvidenceError when there is no such run or it saw nothing, ArgumentError for a confidence outside [0.5, 1).
    """
    if not 0.5 <= confidence < 1.0:
        raise ArgumentError(f"confidence={confidence!r}: confidence lies in [0.5, 1), e.g. 0.95.")
    with transaction(engine) as connection:
        run = find_run(connection, run_id)
        series = load_series(connection, run.number, run.info.recipes)
        if not series.rows:
            ended = f" ({run.progress.reason})" if run.progress.reason else ""
            raise EvidenceError(
                f"Run {run.info.id} saw no matrix product in a sampled step: it made {run.progress.steps} steps{ended} "
                f"and samples one in {run.info.every}. Train for longer inside `loka.probe`, or lower `every`; "
                f"it takes {MIN_SAMPLES} sampled steps to judge."
            )
        newest_operands = _newest_with_operands(series)
        shares = load_shares(connection, series.place[newest_operands[newest_operands >= 0]])
    frozen = not run.progress.weights_changed
    errors = _judge(series, frozen=frozen, confidence=confidence)
    loss = loss_evidence(series, frozen=frozen, confidence=confidence)
    return RunEvidence(
        info=run.info,
        progress=run.progress,
        events=run.events,
        confidence=confidence,
        family=errors.interval.family,
        products=_products(series, errors, loss, _operands(series, newest_operands, shares)),
        mean_loss=loss.mean,
    )


_ROW_ERROR, _ROW_P99, _RELATIVE, _SQNR, _MERE, _BIAS = (
    METRICS.index(name) for name in ("row_error", "row_error_p99", "relative_error", "sqnr_db", "mere", "bias")
)
_BATCH, _M, _N, _K, _CALLS = (SHAPE.index(name) for name in ("batch", "m", "n", "k", "calls"))
_AMAX, _NAN, _INF = (OPERAND_VALUES.index(name) for name in ("amax", "nan", "inf"))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Errors:
    """Every (row, recipe) of a run; series number = row * recipes + recipe."""

    frozen: bool
    gates: tuple[Gate, ...]  # [rows]
    reduces: NDArray[np.bool_]  # [rows], whether any sample sums over more than one element
    window: Window
    interval: Intervals
    metrics: tuple[Floats, ...]  # mean over the window, in the order of METRICS
    missing: Ints  # sampled steps in which no error could be computed


def _judge(series: RunSeries, *, frozen: bool, confidence: float) -> _Errors:
    num_rows, num_recipes = len(series.rows), len(series.recipes)
    # The fewest output columns seen decide: a row that is ever too short to be stable is judged as such.
    columns = np.full(num_rows, np.iinfo(np.int64).max)
    np.minimum.at(columns, series.row, series.shape[:, _N])
    reduces = np.zeros(num_rows, dtype=bool)
    sums = series.shape[:, _K] > 1
    np.logical_or.at(reduces, series.row, sums)
    row = series.row[series.error_sample]
    number = row * num_recipes + series.error_recipe
    gates = tuple(gate_for(count) for count in columns.tolist())
    by_row = np.array([gate == "row_error" for gate in gates])
    gated = np.where(by_row[row], series.metrics[:, _ROW_ERROR], series.metrics[:, _RELATIVE])
    sums = sums[series.error_sample]
    sample = series.error_sample[sums]
    merged = over_ranks(
        np.stack([number[sums], series.step[sample]], axis=1),
        series.rank[series.at[sample]],
        series.error_rows[sums].astype(np.float64),
        gated[sums],
        np.column_stack([gated, series.metrics])[sums],
    )
    (number, step), gated = merged.key.T, merged.value[:, 0]
    known = ~np.isnan(gated)
    total = num_rows * num_recipes
    window = select_window(number[known], step[known], gated[known], total, frozen=frozen)
    return _Errors(
        frozen=frozen,
        gates=gates,
        reduces=reduces,
        window=window,
        interval=intervals(window, step[known], gated[known], frozen=frozen, confidence=confidence),
        metrics=tuple(window_mean(window, column) for column in merged.value[known, 1:].T),
        missing=np.bincount(number[~known], minlength=total),
    )


def _newest_with_operands(series: RunSeries) -> Ints:
    """Return per row its newest sample whose operands were recorded, one that was measured if there is any; else -1."""
    num_samples = series.row.size
    measured = np.zeros(num_samples, dtype=np.int64)
    measured[series.error_sample] = 1
    sample = np.unique(series.operand_sample)
    rank = np.full(len(series.rows), -1, dtype=np.int64)
    np.maximum.at(rank, series.row[sample], sample + num_samples * measured[sample])
    return np.where(rank >= 0, rank % max(num_samples, 1), -1)


def _operands(series: RunSeries, newest: Ints, shares: Shares) -> list[dict[Role, OperandRecord]]:
    """Return per row its operands: the newest, with the largest amax and all NaN and Inf of the run."""
    row, role, values = series.row[series.operand_sample], series.operand_role, series.operand_values
    shape = (len(series.rows), len(ROLES))
    amax, bad = np.full(shape, np.nan), np.zeros((*shape, 2), dtype=np.int64)
    np.fmax.at(amax, (row, role), values[:, _AMAX])
    np.add.at(bad, (row, role), values[:, (_NAN, _INF)].astype(np.int64))
    result: list[dict[Role, OperandRecord]] = [{} for _ in series.rows]
    for index in np.flatnonzero(series.operand_sample == newest[row]).tolist():
        sample, at, which = series.operand_sample[index], int(row[index]), int(role[index])
        step, position = series.place[sample].tolist()
        found = dict(zip(OPERAND_VALUES, values[index].tolist(), strict=True))
        known = {"amax": float(amax[at, which]), "nan": int(bad[at, which, 0]), "inf": int(bad[at, which, 1])}
        stored = found | known | {"role": ROLES[which], "elements": int(found["elements"])}
        result[at][ROLES[which]] = operand_record(
            stored, shares.get((step, position, int(series.operand_slot[index])), [])
        )
    return result


def _products(
    series: RunSeries, errors: _Errors, loss: RunLoss, operands: list[dict[Role, OperandRecord]]
) -> tuple[ProductEvidence, ...]:
    num_rows = len(series.rows)
    batch, m, n, k, calls = (series.shape[:, column] for column in (_BATCH, _M, _N, _K, _CALLS))
    flops = np.bincount(series.row, weights=2.0 * batch * m * n * k * calls, minlength=num_rows) / series.num_steps
    mean_calls = np.bincount(series.row, weights=calls, minlength=num_rows) / series.num_steps
    share = flops / (flops.sum() or 1.0)
    count = np.bincount(series.row, minlength=num_rows)
    end = np.cumsum(count)
    sorted_m = m[np.lexsort((m, series.row))]
    median_m, min_m, max_m = sorted_m[end - count + (count - 1) // 2], sorted_m[end - count], sorted_m[end - 1]
    result = []
    for row, (site, product) in enumerate(series.rows):
        newest = end[row] - 1
        static = series.static[int(series.product[newest])]
        result.append(
            ProductEvidence(
                site=site,
                product=product,
                op=static["op"],
                batch=int(batch[newest]),
                m=int(median_m[row]),
                m_min=int(min_m[row]),
                m_max=int(max_m[row]),
                n=int(n[newest]),
                k=int(k[newest]),
                calls=float(mean_calls[row]),
                dtype=static["dtype"],
                parameter=static["parameter"],
                flops=float(flops[row]),
                flop_share=float(share[row]),
                operands=operands[row],
                recipes=_recipes(series, errors, loss, row, static["unmeasured"]),
                unmeasured=static["unmeasured"],
            )
        )
    return tuple(result)


def _recipes(
    series: RunSeries, errors: _Errors, loss: RunLoss, row: int, unmeasured: str
) -> tuple[RecipeEvidence, ...]:
    product = series.rows[row][1]
    interval, result = errors.interval, []
    for index, name in enumerate(series.recipes):
        number = row * len(series.recipes) + index
        result.append(
            RecipeEvidence(
                recipe=name,
                format=RECIPES[name].formats_of_pass(product) if name in RECIPES else "unknown",
                samples=int(errors.window.samples[number]),
                gate=errors.gates[row],
                error=ErrorInterval(
                    mean=float(interval.mean[number]),
                    low=float(interval.low[number]),
                    high=float(interval.high[number]),
                    p99=float(errors.metrics[_ROW_P99][number]),
                    upper_tolerance=float(interval.upper[number]),
                ),
                relative_error=float(errors.metrics[_RELATIVE][number]),
                sqnr_db=float(errors.metrics[_SQNR][number]),
                mere=float(errors.metrics[_MERE][number]),
                horizon=None if errors.frozen else int(interval.horizon[number]),
                note=_note(errors, row, number, unmeasured),
                drift=_drift(errors, number),
                log_mean=float(interval.log_mean[number]),
                log_deviation=float(interval.log_deviation[number]),
                bias=float(errors.metrics[_BIAS][number]),
                loss=loss.by_series[number] if product == "fprop" else None,
            )
        )
    return tuple(result)


def _drift(errors: _Errors, number: int) -> Drift | None:
    trends = errors.interval.trends
    if trends is None or trends.samples[number] < MIN_SAMPLES:
        return None
    return trends.drift(number, float(errors.interval.slope_half_width[number]))


def _note(errors: _Errors, row: int, number: int, unmeasured: str) -> str:
    """Say in words why the evidence of one series is missing or weak; "" when it is neither."""
    samples, infinite, missing = (
        int(counts[number]) for counts in (errors.window.samples, errors.interval.infinite, errors.missing)
    )
    if not errors.reduces[row]:
        return "reduction length 1: no evidence"
    notes = []
    if samples < MIN_SAMPLES:
        nothing = unmeasured or "not measured in any sampled step"
        notes.append(f"{samples} of {MIN_SAMPLES} sampled steps" if samples or missing else nothing)
    elif errors.window.warmup[number]:
        late = int(errors.window.late[number])
        few = f"only {late} of the samples come after" if late else "sampled only in"
        notes.append(f"{few} the first {WARMUP_STEPS} steps")
    if infinite:
        notes.append(f"infinite in {infinite} of {samples} sampled steps")
    if missing:
        notes.append(f"NaN in {missing} sampled steps, which do not count")
    if errors.interval.irregular[number]:
        notes.append("errors are not log-normal over steps: the upper tolerance is less sure than it says")
    return "; ".join(notes)
