"""From the arrays of a judged run to its records: thousands of products at once, a column at a time.

A number that is taken out of an array one by one costs more than the record that it goes into. So every column becomes
a list in one go, and records are made from lists; what products share, as the spread of their rows, is made once.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from loka.formats import RECIPES, ROLES, Pass, Role
from loka.numerics import Gate
from loka.probes.capturing.row_counts import RowCounts, median_rows, row_counts
from loka.probes.judging.drift import Drift
from loka.probes.judging.intervals import MIN_SAMPLES, WARMUP_STEPS, Floats, Intervals, Ints, Window
from loka.probes.judging.loss_evidence import RunLoss
from loka.probes.judging.series import OPERAND_VALUES, SHAPE, RunSeries, Shares
from loka.probes.judging.verdicts import ErrorInterval, GatedError, ProductEvidence, RecipeEvidence
from loka.probes.records import OperandRecord
from loka.probes.storing.rows import operand_record
from loka.probes.storing.schema import METRICS

_ROW_P99, _RELATIVE, _SQNR, _MERE, _BIAS = (
    METRICS.index(name) for name in ("row_error_p99", "relative_error", "sqnr_db", "mere", "bias")
)
_BATCH, _M, _N, _K, _CALLS = (SHAPE.index(name) for name in ("batch", "m", "n", "k", "calls"))
_AMAX, _NAN, _INF = (OPERAND_VALUES.index(name) for name in ("amax", "nan", "inf"))
_NO_REDUCTION: Final[str] = "reduction length 1: no evidence"


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """One error of every series: the samples that are evidence, and where it lies."""

    window: Window
    interval: Intervals
    metrics: tuple[Floats, ...]  # mean over the window, in the order of METRICS
    missing: Ints  # sampled steps in which no error could be computed


@dataclass(frozen=True, kw_only=True, slots=True)
class Errors:
    """Every (row, recipe) of a run; series number = row * recipes + recipe."""

    frozen: bool
    gates: tuple[Gate, ...]  # [rows]
    reduces: NDArray[np.bool_]  # [rows], whether any sample sums over more than one element
    gated: Measure
    whole: Measure  # the relative error of the whole tensor


def operands_of(series: RunSeries, newest: Ints, shares: Shares) -> list[dict[Role, OperandRecord]]:
    """Return per row its operands: those of its `newest` sample, with the largest amax and all NaN and Inf of the run.

    shares: of the operands of those samples.
    """
    row, role, values = series.row[series.operand_sample], series.operand_role, series.operand_values
    shape = (len(series.rows), len(ROLES))
    amax, bad = np.full(shape, np.nan), np.zeros((*shape, 2), dtype=np.int64)
    np.fmax.at(amax, (row, role), values[:, _AMAX])
    np.add.at(bad, (row, role), values[:, (_NAN, _INF)].astype(np.int64))
    index = np.flatnonzero(series.operand_sample == newest[row])
    at, which = row[index], role[index]
    place = np.column_stack([series.place[series.operand_sample[index]], series.operand_slot[index]])
    columns = dict(zip(OPERAND_VALUES, values[index].T.tolist(), strict=True))
    columns["amax"] = amax[at, which].tolist()
    columns["nan"], columns["inf"] = bad[at, which].T.tolist()
    columns["elements"] = list(map(int, columns["elements"]))
    names = ("role", *columns)
    roles = [ROLES[each] for each in which.tolist()]
    result: list[dict[Role, OperandRecord]] = [{} for _ in series.rows]
    for number, place_, *found in zip(at.tolist(), map(tuple, place.tolist()), roles, *columns.values(), strict=True):
        record = operand_record(dict(zip(names, found, strict=True)), shares.get(place_, []))
        result[number][record.role] = record
    return result


def products_of(
    series: RunSeries, errors: Errors, loss: RunLoss, operands: Sequence[dict[Role, OperandRecord]]
) -> tuple[ProductEvidence, ...]:
    """Return the record of every row, in their order."""
    newest = np.cumsum(np.bincount(series.row, minlength=len(series.rows))) - 1
    static = [series.static[key] for key in series.product[newest].tolist()]
    columns = zip(
        series.rows,
        static,
        _extents(series),
        *series.shape[newest][:, (_BATCH, _N, _K)].T.tolist(),
        *_work(series),
        operands,
        _recipes(series, errors, loss, [each["unmeasured"] for each in static]),
        strict=True,
    )
    return tuple(
        ProductEvidence(
            site=site,
            product=product,
            op=known["op"],
            batch=batch_,
            m=extent.m,
            m_min=extent.m_min,
            m_max=extent.m_max,
            n=n_,
            k=k_ if extent.k is None else extent.k,
            calls=calls_,
            dtype=known["dtype"],
            parameter=known["parameter"],
            flops=flops_,
            flop_share=share_,
            operands=operand,
            recipes=recipe,
            unmeasured=known["unmeasured"],
            rows=extent.rows,
        )
        for (site, product), known, extent, batch_, n_, k_, calls_, flops_, share_, operand, recipe in columns
    )


def _work(series: RunSeries) -> Iterator[list[float]]:
    """Yield calls, FLOPs and the share of all FLOPs, each per step and row."""
    batch, m, n, k, calls = (series.shape[:, column] for column in (_BATCH, _M, _N, _K, _CALLS))
    num_rows = len(series.rows)
    flops = np.bincount(series.row, weights=2.0 * batch * m * n * k * calls, minlength=num_rows) / series.num_steps
    yield (np.bincount(series.row, weights=calls, minlength=num_rows) / series.num_steps).tolist()
    yield flops.tolist()
    yield (flops / (flops.sum() or 1.0)).tolist()


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
    known: dict[tuple[object, ...], _Extent] = {}  # layers of a model are alike
    result = []
    for (site, product), of_m, of_k in zip(series.rows, by_m, by_k, strict=True):
        is_wgrad = product == "wgrad"
        # A sample holds the mean of calls that differed. It may be newer than the counts.
        counted = series.mixed.get((site, product), of_k if is_wgrad else of_m)
        key = (is_wgrad, *of_m.items(), None, *counted.items())
        if key not in known:
            known[key] = _extent(of_m, counted, is_wgrad=is_wgrad)
        result.append(known[key])
    return result


def _extent(of_m: Mapping[int, int], counted: Mapping[int, int], *, is_wgrad: bool) -> _Extent:
    median = median_rows(counted)
    m = of_m if is_wgrad else {**of_m, **counted}
    return _Extent(
        m=median_rows(of_m) if is_wgrad else median,
        m_min=min(m),
        m_max=max(m),
        k=median if is_wgrad else None,
        rows=row_counts(counted, median),
    )


def _calls_by(series: RunSeries, column: int) -> list[dict[int, int]]:
    """Return per row its calls, over all steps and ranks, by one of their extents."""
    value, calls = series.shape[:, column], series.shape[:, _CALLS]
    order = np.lexsort((value, series.row))
    row, value = series.row[order], value[order]
    first = np.flatnonzero(np.append(True, (row[1:] != row[:-1]) | (value[1:] != value[:-1])))
    total = np.add.reduceat(calls[order], first)
    result: list[dict[int, int]] = [{} for _ in series.rows]
    for at, extent, count in zip(row[first].tolist(), value[first].tolist(), total.tolist(), strict=True):
        result[at][extent] = count
    return result


def _recipes(
    series: RunSeries, errors: Errors, loss: RunLoss, unmeasured: Sequence[str]
) -> list[tuple[RecipeEvidence, ...]]:
    """Return the recipes of every row; `unmeasured` says of each row why it was not, where it was not."""
    measure, rows, names = errors.gated, series.rows, series.recipes
    interval, metrics = measure.interval, measure.metrics
    gates: list[Gate] = [gate for gate in errors.gates for _ in names]
    gated = _gated(errors, measure, gates, unmeasured)
    whole = gated
    if "row_error" in errors.gates:
        whole = _gated(errors, errors.whole, ["relative_error"] * len(gates), unmeasured)
    formats = {product: [_formats(name, product) for name in names] for product in {product for _, product in rows}}
    columns = zip(
        names * len(rows),
        (words for _, product in rows for words in formats[product]),
        (product == "fprop" for _, product in rows for _ in names),
        measure.window.samples.tolist(),
        gated,
        (one if gate == "relative_error" else two for gate, one, two in zip(gates, gated, whole, strict=True)),
        *(metrics[which].tolist() for which in (_RELATIVE, _SQNR, _MERE, _BIAS)),
        [None] * len(gates) if errors.frozen else interval.horizon.tolist(),
        interval.log_mean.tolist(),
        interval.log_deviation.tolist(),
        loss.by_series,
        strict=True,
    )
    result = [
        RecipeEvidence(
            recipe=name,
            format=words,
            samples=samples,
            gate=one.gate,
            error=one.error,
            relative_error=relative,
            sqnr_db=sqnr,
            mere=mere,
            horizon=ahead,
            note=one.note,
            drift=one.drift,
            log_mean=mean,
            log_deviation=spread,
            bias=bias,
            loss=felt if forward else None,
            whole=two,
        )
        for name, words, forward, samples, one, two, relative, sqnr, mere, bias, ahead, mean, spread, felt in columns
    ]
    return [tuple(result[at : at + len(names)]) for at in range(0, len(result), len(names) or 1)] or [()] * len(rows)


def _formats(name: str, product: Pass) -> str:
    return RECIPES[name].formats_of_pass(product) if name in RECIPES else "unknown"


def _gated(errors: Errors, measure: Measure, gates: Sequence[Gate], unmeasured: Sequence[str]) -> list[GatedError]:
    """Return one error of every series."""
    interval = measure.interval
    trends = interval.trends
    drifts: Sequence[Drift | None] = [None] * len(gates)
    if trends is not None:
        drifts = trends.drifts(interval.slope_half_width, trends.samples >= MIN_SAMPLES)
    numbers = (interval.mean, interval.low, interval.high, measure.metrics[_ROW_P99], interval.upper)
    columns = zip(gates, *(each.tolist() for each in numbers), drifts, _notes(errors, measure, unmeasured), strict=True)
    return [
        GatedError(
            gate=gate,
            error=ErrorInterval(mean=mean, low=low, high=high, p99=p99, upper_tolerance=upper),
            drift=drift,
            note=note,
        )
        for gate, mean, low, high, p99, upper, drift, note in columns
    ]


def _notes(errors: Errors, measure: Measure, unmeasured: Sequence[str]) -> list[str]:
    """Say in words why the evidence of a series is missing or weak; "" when it is neither."""
    samples, interval = measure.window.samples, measure.interval
    width = samples.size // max(len(unmeasured), 1)
    weak = (samples < MIN_SAMPLES) | measure.window.warmup | (interval.infinite > 0) | (measure.missing > 0)
    result = [""] * samples.size
    for number in np.flatnonzero(weak | interval.irregular).tolist():
        result[number] = _note(measure, number, unmeasured[number // width])
    for row in np.flatnonzero(~errors.reduces).tolist():
        result[row * width : (row + 1) * width] = [_NO_REDUCTION] * width
    return result


def _note(measure: Measure, number: int, unmeasured: str) -> str:
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
        notes.append(f"{missing} sampled steps do not count: results of zeros, or not finite")
    if measure.interval.irregular[number]:
        notes.append("errors are not log-normal over steps: the upper tolerance is less sure than it says")
    return "; ".join(notes)
