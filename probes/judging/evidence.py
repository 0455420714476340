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

import numpy as np
from sqlalchemy import Engine

from loka.collecting import uncollected
from loka.errors import ArgumentError, EvidenceError
from loka.numerics import gate_for
from loka.probes.judging.assembly import Errors, Measure, operands_of, products_of
from loka.probes.judging.drift import Drift
from loka.probes.judging.intervals import MIN_SAMPLES, Floats, Ints, intervals, select_window, window_mean
from loka.probes.judging.loss_evidence import LossEvidence, loss_evidence
from loka.probes.judging.predictions import read_epilogues, read_experts, read_families, read_flows, read_layers
from loka.probes.judging.series import SHAPE, Merged, RunSeries, load_series, load_shares, over_ranks
from loka.probes.judging.verdicts import (
    ErrorInterval,
    GatedError,
    ProductEvidence,
    RecipeEvidence,
    RunEvidence,
    Verdict,
)
from loka.probes.records import RunInfo, RunProgress
from loka.probes.storing.database import find_run, open_database, transaction
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


def collect_evidence(engine: Engine, run_id: str | None = None, *, confidence: float = 0.95) -> RunEvidence:
    """Condense one run, by default the latest, into evidence at `confidence`, family-wise over its rows.

    Raises EvidenceError when there is no such run or it saw nothing, ArgumentError for a confidence outside [0.5, 1).
    """
    return read_and_condense(engine, run_id, confidence=confidence)[0]


@uncollected()
def read_and_condense(
    engine: Engine, run_id: str | None = None, *, confidence: float = 0.95
) -> tuple[RunEvidence, RunSeries]:
    """Return the evidence of `collect_evidence` and all samples that it was condensed from: they are read once."""
    if not 0.5 <= confidence < 1.0:
        raise ArgumentError(f"confidence={confidence!r}: confidence lies in [0.5, 1), e.g. 0.95.")
    with transaction(engine) as connection:
        run = find_run(connection, run_id)
        series = load_series(connection, run.number, run.info.recipes)
        if not series.rows:
            raise _nothing_seen(run.info, run.progress)
        newest_operands = _newest_with_operands(series)
        shares = load_shares(connection, series.place[newest_operands[newest_operands >= 0]])
    frozen = not run.progress.weights_changed
    errors = _judge(series, frozen=frozen, confidence=confidence)
    loss = loss_evidence(series, frozen=frozen, confidence=confidence)
    layers = read_layers(engine, run.info.id)
    evidence = RunEvidence(
        info=run.info,
        progress=run.progress,
        events=run.events,
        confidence=confidence,
        family=errors.gated.interval.family,
        products=products_of(series, errors, loss, operands_of(series, newest_operands, shares)),
        mean_loss=loss.mean,
        experts=read_experts(engine, run.info.id),
        families=read_families(engine, run.info.id, steps=_forward_steps(series)),
        epilogues=read_epilogues(engine, run.info.id),
        flows=read_flows(engine, run.info.id),
        outsides={site: facts.outside for site, facts in layers.items() if facts.outside},
        twice=frozenset(site for site, facts in layers.items() if facts.twice),
    )
    return evidence, series


def _nothing_seen(info: RunInfo, progress: RunProgress) -> EvidenceError:
    ended = f" ({progress.reason})" if progress.reason else ""
    if progress.sampled_steps >= MIN_SAMPLES:
        return EvidenceError(
            f"Run {info.id} saw no matrix product in any of {progress.sampled_steps} sampled steps{ended}. Fused "
            "operators, such as a recurrent layer's, hide theirs; give loka.probe the model that does the work."
        )
    return EvidenceError(
        f"Run {info.id} saw no matrix product in a sampled step: it made {progress.steps} steps{ended} and samples one "
        f"in {info.every}. Train for longer inside `loka.probe`, or lower `every`; it takes {MIN_SAMPLES} sampled "
        "steps to judge."
    )


def _forward_steps(series: RunSeries) -> dict[str, int]:
    """Return how many samples each site has of its forward product, over all ranks."""
    count = np.bincount(series.row, minlength=len(series.rows)).tolist()
    return {site: count[row] for row, (site, product) in enumerate(series.rows) if product == "fprop"}


_ROW_ERROR, _RELATIVE = METRICS.index("row_error"), METRICS.index("relative_error")
_N, _K = SHAPE.index("n"), SHAPE.index("k")
_ERRORS = 2  # columns of an entry before its metrics: the gated error, and that of the whole tensor


def _judge(series: RunSeries, *, frozen: bool, confidence: float) -> Errors:
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
    values = np.column_stack([gated, whole, series.metrics])
    first = _entries(series, gated, values)
    second = first if first.alone else _entries(series, whole, values)
    total = len(series.rows) * len(series.recipes)
    of_gated = _measure(first, 0, total, frozen=frozen, confidence=confidence)
    same = first is second and np.array_equal(np.isnan(first.value[:, 0]), np.isnan(first.value[:, 1]))
    like = of_gated if same else None
    return Errors(
        frozen=frozen,
        gates=gates,
        reduces=reduces,
        gated=of_gated,
        whole=_measure(second, 1, total, frozen=frozen, confidence=confidence, like=like),
    )


def _entries(series: RunSeries, decides: Floats, values: Floats) -> Merged:
    """Make one entry of each step and series: the ranks as one, of several products that where `decides` is largest."""
    reduces = series.shape[series.error_sample, _K] > 1
    sums = slice(None) if reduces.all() else reduces  # all of them, as a rule, without a copy
    sample = series.error_sample[sums]
    number = series.row[sample] * len(series.recipes) + series.error_recipe[sums]
    return over_ranks(
        np.stack([number, series.step[sample]], axis=1),
        series.rank[series.at[sample]],
        series.error_rows[sums].astype(np.float64),
        decides[sums],
        values[sums],
    )


def _measure(
    entries: Merged, column: int, total: int, *, frozen: bool, confidence: float, like: Measure | None = None
) -> Measure:
    """Bound the error in one column of the entries of `total` series; `like` is that of another over the same ones."""
    (number, step), value = entries.key.T, entries.value[:, column]
    known = ~np.isnan(value)
    if like is not None:
        window, metrics = like.window, like.metrics
    else:
        window = select_window(number[known], step[known], value[known], total, frozen=frozen)
        metrics = tuple(window_mean(window, each) for each in entries.value[known, _ERRORS:].T)
    return Measure(
        window=window,
        interval=intervals(window, step[known], value[known], frozen=frozen, confidence=confidence),
        metrics=metrics,
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
