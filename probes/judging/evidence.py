"""From samples to evidence: an interval per (site, pass, recipe) and what it says about a bound.

`row_error.low` and `.high` bound the mean over steps. `upper_tolerance` bounds the error of 99 % of steps; it is what a
verdict compares with the bound. Both hold at `confidence`, family-wise over all rows of a report (Bonferroni). With
frozen weights steps are exchangeable and that is all; in training the error drifts, so the tolerance gets a margin and
the evidence a horizon, after which it is no longer valid; `drift` says how fast it changes, and where to.

Two errors have intervals: the gated one, and the relative error of the whole tensor, which a bound on the
signal-to-noise ratio is about; a product is judged by one of them, so the family is one of products. What they say
about a bound is in `verdicts`. The ranks of a distributed run make one sample per step. How many rows the calls of a
product have is a distribution (`row_counts`), and a product is known by its median.
"""

import os
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Engine

from loka.collecting import uncollected
from loka.errors import ArgumentError, EvidenceError
from loka.formats import RECIPES, ROLES, Role
from loka.numerics import Gate, gate_for
from loka.probes.capturing.row_counts import RowCounts, median_rows, row_counts
from loka.probes.judging.drift import Drift
from loka.probes.judging.intervals import (
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
from loka.probes.judging.loss_evidence import LossEvidence, RunLoss, loss_evidence
from loka.probes.judging.predictions import read_epilogues, read_experts, read_families
from loka.probes.judging.series import OPERAND_VALUES, SHAPE, RunSeries, Shares, load_series, load_shares, over_ranks
from loka.probes.judging.verdicts import (
    ErrorInterval,
    GatedError,
    ProductEvidence,
    RecipeEvidence,
    RunEvidence,
    Verdict,
)
from loka.probes.records import OperandRecord
from loka.probes.storing.database import find_run, open_database, transaction
from loka.probes.storing.rows import operand_record
from loka.probes.storing.schema import METRICS

__all__ = [
    "MIN_SAMPLES",
    "Drift",
    "ErrorInterval",
    "GatedError",
    "LossEvidence",
    "ProductEvidence",
    "RecipeEvidence",
    "RunEvidence",
    "Verdict",
    "collect_evidence",
    "load_evidence",
]


def load_evidence(db: str | os.PathLike[str], run_id: str | None = None, *, confidence: float = 0.95) -> RunEvidence:
    """Open a probe database and collect the evidence of one run. Raises DatabaseError, EvidenceError, ArgumentError."""
    engine = open_database(db, create=False)
    try:
        return collect_evidence(engine, run_id, confidence=confidence)
    finally:
        engine.dispose()


@uncollected()
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
        family=errors.gated.interval.family,
        products=_products(series, errors, loss, _operands(series, newest_operands, shares)),
        mean_loss=loss.mean,
        experts=read_experts(engine, run.info.id),
        families=read_families(engine, run.info.id, steps=_forward_steps(series)),
        epilogues=read_epilogues(engine, run.info.id),
    )


def _forward_steps(series: RunSeries) -> dict[str, int]:
    """Return how many samples each site has of its forward product, over all ranks."""
    count = np.bincount(series.row, minlength=len(series.rows)).tolist()
    return {site: count[row] for row, (site, product) in enumerate(series.rows) if product == "fprop"}


_ROW_ERROR, _ROW_P99, _RELATIVE, _SQNR, _MERE, _BIAS = (
    METRICS.index(name) for name in ("row_error", "row_error_p99", "relative_error", "sqnr_db", "mere", "bias")
)
_BATCH, _M, _N, _K, _CALLS = (SHAPE.index(name) for name in ("batch", "m", "n", "k", "calls"))
_AMAX, _NAN, _INF = (OPERAND_VALUES.index(name) for name in ("amax", "nan", "inf"))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Measure:
    """One error of every series: the samples that are evidence, and where it lies."""

    window: Window
    interval: Intervals
    metrics: tuple[Floats, ...]  # mean over the window, in the order of METRICS
    missing: Ints  # sampled steps in which no error could be computed


@dataclass(frozen=True, kw_only=True, slots=True)
class _Errors:
    """Every (row, recipe) of a run; series number = row * recipes + recipe."""

    frozen: bool
    gates: tuple[Gate, ...]  # [rows]
    reduces: NDArray[np.bool_]  # [rows], whether any sample sums over more than one element
    gated: _Measure
    whole: _Measure  # the relative error of the whole tensor


def _judge(series: RunSeries, *, frozen: bool, confidence: float) -> _Errors:
    num_rows = len(series.rows)
    # The fewest output columns seen decide: a row that is ever too short to be stable is judged as such.
    columns = np.full(num_rows, np.iinfo(np.int64).max)
    np.minimum.at(columns, series.row, series.shape[:, _N])
    reduces = np.zeros(num_rows, dtype=bool)
    np.logical_or.at(reduces, series.row, series.shape[:, _K] > 1)
    gates = tuple(gate_for(count) for count in columns.tolist())
    by_row = np.array([gate == "row_error" for gate in gates])[series.row[series.error_sample]]
    whole = series.metrics[:, _RELATIVE]
    gated = np.where(by_row, series.metrics[:, _ROW_ERROR], whole)
    return _Errors(
        frozen=frozen,
        gates=gates,
        reduces=reduces,
        gated=_measure(series, gated, frozen=frozen, confidence=confidence),
        whole=_measure(series, whole, frozen=frozen, confidence=confidence),
    )


def _measure(series: RunSeries, error: Floats, *, frozen: bool, confidence: float) -> _Measure:
    """Bound one error [E], one entry of each step and series: the ranks as one, of several products the worst."""
    total = len(series.rows) * len(series.recipes)
    sums = series.shape[series.error_sample, _K] > 1
    sample = series.error_sample[sums]
    number = series.row[sample] * len(series.recipes) + series.error_recipe[sums]
    merged = over_ranks(
        np.stack([number, series.step[sample]], axis=1),
        series.rank[series.at[sample]],
        series.error_rows[sums].astype(np.float64),
        error[sums],
        np.column_stack([error, series.metrics])[sums],
    )
    (number, step), value = merged.key.T, merged.value[:, 0]
    known = ~np.isnan(value)
    window = select_window(number[known], step[known], value[known], total, frozen=frozen)
    return _Measure(
        window=window,
        interval=intervals(window, step[known], value[known], frozen=frozen, confidence=confidence),
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
    end = np.cumsum(np.bincount(series.row, minlength=num_rows))
    seen = _extents(series)
    result = []
    for row, (site, product) in enumerate(series.rows):
        newest = end[row] - 1
        static = series.static[int(series.product[newest])]
        extent = seen[row]
        result.append(
            ProductEvidence(
                site=site,
                product=product,
                op=static["op"],
                batch=int(batch[newest]),
                m=extent.m,
                m_min=extent.m_min,
                m_max=extent.m_max,
                n=int(n[newest]),
                k=int(k[newest]) if extent.k is None else extent.k,
                calls=float(mean_calls[row]),
                dtype=static["dtype"],
                parameter=static["parameter"],
                flops=float(flops[row]),
                flop_share=float(share[row]),
                operands=operands[row],
                recipes=_recipes(series, errors, loss, row, static["unmeasured"]),
                unmeasured=static["unmeasured"],
                rows=extent.rows,
            )
        )
    return tuple(result)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Extent:
    """How large the calls of one product were."""

    m: int
    m_min: int
    m_max: int
    k: int | None  # of wgrad, whose rows it is
    rows: RowCounts


def _extents(series: RunSeries) -> list[_Extent]:
    """Return per row how large its calls were; where the calls of one step differed, from what was counted of them."""
    by_m = _calls_by(series, _M)
    by_k = _calls_by(series, _K)
    result = []
    for row, (site, product) in enumerate(series.rows):
        is_wgrad = product == "wgrad"
        sampled = by_k[row] if is_wgrad else by_m[row]
        # A sample holds the mean of calls that differed. It may be newer than the counts.
        counted = series.mixed.get((site, product), sampled)
        median = median_rows(counted)
        m = by_m[row] if is_wgrad else {**by_m[row], **counted}
        result.append(
            _Extent(
                m=median_rows(by_m[row]) if is_wgrad else median,
                m_min=min(m),
                m_max=max(m),
                k=median if is_wgrad else None,
                rows=row_counts(counted, median),
            )
        )
    return result


def _calls_by(series: RunSeries, column: int) -> list[dict[int, int]]:
    """Return per row its calls, over all steps and ranks, by one of their extents."""
    value, calls = series.shape[:, column], series.shape[:, _CALLS]
    key, inverse = np.unique(np.stack([series.row, value], axis=1), axis=0, return_inverse=True)
    total = np.zeros(len(key), dtype=np.int64)
    np.add.at(total, inverse.reshape(-1), calls)
    result: list[dict[int, int]] = [{} for _ in series.rows]
    for (row, extent), count in zip(key.tolist(), total.tolist(), strict=True):
        result[row][extent] = count
    return result


def _recipes(
    series: RunSeries, errors: _Errors, loss: RunLoss, row: int, unmeasured: str
) -> tuple[RecipeEvidence, ...]:
    product, gate = series.rows[row][1], errors.gates[row]
    measure, result = errors.gated, []
    interval = measure.interval
    for index, name in enumerate(series.recipes):
        number = row * len(series.recipes) + index
        found = _gated(errors, measure, gate, (row, number), unmeasured)
        by_row = gate == "row_error"
        whole = _gated(errors, errors.whole, "relative_error", (row, number), unmeasured) if by_row else found
        result.append(
            RecipeEvidence(
                recipe=name,
                format=RECIPES[name].formats_of_pass(product) if name in RECIPES else "unknown",
                samples=int(measure.window.samples[number]),
                gate=gate,
                error=found.error,
                relative_error=float(measure.metrics[_RELATIVE][number]),
                sqnr_db=float(measure.metrics[_SQNR][number]),
                mere=float(measure.metrics[_MERE][number]),
                horizon=None if errors.frozen else int(interval.horizon[number]),
                note=found.note,
                drift=found.drift,
                log_mean=float(interval.log_mean[number]),
                log_deviation=float(interval.log_deviation[number]),
                bias=float(measure.metrics[_BIAS][number]),
                loss=loss.by_series[number] if product == "fprop" else None,
                whole=whole,
            )
        )
    return tuple(result)


def _gated(errors: _Errors, measure: _Measure, gate: Gate, at: tuple[int, int], unmeasured: str) -> GatedError:
    """Return one error of one series, `at` its (row, number)."""
    row, number = at
    interval = measure.interval
    return GatedError(
        gate=gate,
        error=ErrorInterval(
            mean=float(interval.mean[number]),
            low=float(interval.low[number]),
            high=float(interval.high[number]),
            p99=float(measure.metrics[_ROW_P99][number]),
            upper_tolerance=float(interval.upper[number]),
        ),
        drift=_drift(interval, number),
        note=_note(measure, number, unmeasured) if errors.reduces[row] else "reduction length 1: no evidence",
    )


def _drift(interval: Intervals, number: int) -> Drift | None:
    trends = interval.trends
    if trends is None or trends.samples[number] < MIN_SAMPLES:
        return None
    return trends.drift(number, float(interval.slope_half_width[number]))


def _note(measure: _Measure, number: int, unmeasured: str) -> str:
    """Say in words why the evidence of one series is missing or weak; "" when it is neither."""
    samples, infinite, missing = (
        int(counts[number]) for counts in (measure.window.samples, measure.interval.infinite, measure.missing)
    )
    notes = []
    if samples < MIN_SAMPLES:
        nothing = unmeasured or "not measured in any sampled step"
        notes.append(f"{samples} of {MIN_SAMPLES} sampled steps" if samples or missing else nothing)
    elif measure.window.warmup[number]:
        late = int(measure.window.late[number])
        few = f"only {late} of the samples come after" if late else "sampled only in"
        notes.append(f"{few} the first {WARMUP_STEPS} steps")
    if infinite:
        notes.append(f"infinite in {infinite} of {samples} sampled steps")
    if missing:
        notes.append(f"NaN in {missing} sampled steps, which do not count")
    if measure.interval.irregular[number]:
        notes.append("errors are not log-normal over steps: the upper tolerance is less sure than it says")
    return "; ".join(notes)
