"""The errors of a run over its steps, and the magnitudes of its operands, thin enough to travel inside a page.

A history shows the samples of a product that the verdicts rest on and those before them: all of them where a run is
short, else evenly chosen ones with the newest among them; how many there are is told. A histogram is the energy of an
operand by octaves below the largest element of its scaling group, in dB of the whole.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Engine

from loka.errors import ArgumentError
from loka.formats import PASS_OPERANDS, Pass, Role
from loka.probes.distributions.closed_form import ProductStatistics
from loka.probes.distributions.histograms import (
    AMAX_BIN,
    BELOW,
    BINS_PER_OCTAVE,
    OCTAVES,
    EnergyHistogram,
    GroupKind,
    OperandHistograms,
)
from loka.probes.judging.series import RunSeries, load_series, over_ranks
from loka.probes.records import LearnedRecord
from loka.probes.sampling.learning import STATISTICS, restore
from loka.probes.storing.database import find_run, read_learned, transaction
from loka.probes.storing.schema import METRICS

logger = logging.getLogger("loka.reports")

# Numbers that all histories of a page hold together: about 3 MB of text before it is compressed.
_MOST_VALUES: Final[int] = 400_000
_FEWEST_STEPS, _MOST_STEPS = 12, 160
# Bins of a page's histogram in an octave; a database has eight.
BINS_OF_AN_OCTAVE: Final[int] = 2
# Below this a share is no more to be seen.
_FLOOR_DB: Final[float] = -120.0
# The forward product has both of its operands; the gradient of the result is first seen in dgrad. wgrad has no operand
# of its own.
_SEEN_IN: Final[tuple[Pass, ...]] = ("fprop", "dgrad")
_ROW_ERROR, _RELATIVE = METRICS.index("row_error"), METRICS.index("relative_error")

Gates = Mapping[tuple[str, str], str]


def histories(engine: Engine, run_id: str, gates: Gates) -> dict[str, dict[str, Any]]:
    """Return site -> pass -> {"steps", "of", "recipes": {name: [error or null]}}.

    gates: the error that decides about each (site, pass), `row_error` or `relative_error`; others are left out. `of`
    is how many sampled steps there are.
    """
    with transaction(engine) as connection:
        run = find_run(connection, run_id)
        series = load_series(connection, run.number, run.info.recipes)
    merged = _by_step(series, gates)
    width = len(series.recipes)
    number, step, value = merged.key[:, 0], merged.key[:, 1], merged.value[:, 0]
    rows = np.unique(number // width)
    most = max(_FEWEST_STEPS, min(_MOST_STEPS, _MOST_VALUES // max(len(np.unique(number)), 1)))
    begin, end = (np.searchsorted(number // width, rows, side=side) for side in ("left", "right"))
    result: dict[str, dict[str, Any]] = {}
    for row, first, last in zip(rows.tolist(), begin.tolist(), end.tolist(), strict=True):
        site, product = series.rows[row]
        if (site, product) not in gates:
            continue
        steps = np.unique(step[first:last])
        shown = steps[_chosen(len(steps), most)]
        curves: dict[str, list[float | None]] = {}
        for at in np.unique(number[first:last]).tolist():
            mine = first + np.flatnonzero(number[first:last] == at)
            curves[series.recipes[at % width]] = _on(shown, step[mine], value[mine])
        result.setdefault(site, {})[product] = {"steps": shown.tolist(), "of": len(steps), "recipes": curves}
    return result


def _by_step(series: RunSeries, gates: Gates) -> Any:
    """Return the gated errors by (series number, step), the ranks as one."""
    by_row = np.array([gates.get(name) != "relative_error" for name in series.rows], dtype=bool)
    row = series.row[series.error_sample]
    error = np.where(by_row[row], series.metrics[:, _ROW_ERROR], series.metrics[:, _RELATIVE])
    number = row * len(series.recipes) + series.error_recipe
    return over_ranks(
        np.stack([number, series.step[series.error_sample]], axis=1),
        series.rank[series.at[series.error_sample]],
        series.error_rows.astype(np.float64),
        error,
        error[:, None],
    )


def _chosen(count: int, most: int) -> NDArray[np.int64]:
    """Return which of `count` samples are shown: evenly spaced, the first and the newest among them."""
    found = np.arange(count) if count <= most else np.unique(np.linspace(0, count - 1, most).round())
    return found.astype(np.int64)


def _on(wanted: NDArray[np.int64], steps: NDArray[np.int64], values: NDArray[np.float64]) -> list[float | None]:
    """Return the values on the wanted steps, in four digits; null where there is none or it is no number."""
    at = np.searchsorted(steps, wanted).clip(max=len(steps) - 1)
    known = np.where(steps[at] == wanted, values[at], np.nan)
    return [float(f"{value:.4g}") if math.isfinite(value) else None for value in known.tolist()]


def histograms(engine: Engine, run_id: str, sites: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Return site -> role -> {"samples", "groups": {words: [dB of the energy by bin, null where there is none]}}.

    sites: those that are wanted; None is all. The first bin is the largest element of each group, then
    BINS_OF_AN_OCTAVE to an octave downwards, the last all below. Empty bins at the end are left out.
    """
    result: dict[str, dict[str, Any]] = {}
    for record in _statistics(engine, run_id, sites):
        if record.product not in _SEEN_IN:
            continue
        try:
            statistics: ProductStatistics = restore(record)
        except ArgumentError as error:
            logger.warning("no histograms of %s %s: %s", record.site, record.product, error)
            continue
        seen = result.setdefault(record.site, {})
        roles: tuple[Role, Role] = PASS_OPERANDS[record.product]
        for role, operand in zip(roles, (statistics.a, statistics.b), strict=True):
            if role not in seen and operand.rows:
                seen[role] = {"samples": statistics.samples, "groups": _groups(operand)}
    return result


def _statistics(engine: Engine, run_id: str, sites: Sequence[str] | None) -> Iterator[LearnedRecord]:
    """Yield what was learned of the products of some sites, a site at a time: of thousands it is more than fits."""
    for site in (None,) if sites is None else sites:
        yield from read_learned(engine, run_id, kind=STATISTICS, site=site)


def _groups(operand: OperandHistograms) -> dict[str, list[int | None]]:
    """Return the histograms of an operand; kinds of groups that come to the same, as all wider than K do, are one."""
    named: dict[tuple[int | None, ...], list[str]] = {}
    for kind, each in operand.by_group.items():
        named.setdefault(tuple(_decibels(each)), []).append(_words(kind))
    return {", ".join(kinds): list(levels) for levels, kinds in named.items()}


def _words(kind: GroupKind) -> str:
    """Return a kind of group in words: `tensor`, `row`, `128 x 128`."""
    rows, width = kind
    if rows is None and width is None:
        return "tensor"
    return "row" if (rows, width) == (1, None) else f"{rows or 'all'} x {width or 'all'}"


def _decibels(histogram: EnergyHistogram) -> list[int | None]:
    energy = histogram.energy
    body = energy[AMAX_BIN + 1 : BELOW].reshape(OCTAVES * BINS_OF_AN_OCTAVE, BINS_PER_OCTAVE // BINS_OF_AN_OCTAVE)
    shares = np.concatenate([energy[[AMAX_BIN]], body.sum(axis=1), energy[[BELOW]]]) / (energy.sum() or 1.0)
    with np.errstate(divide="ignore"):
        levels = 10.0 * np.log10(shares)
    result = [round(level) if level > _FLOOR_DB else None for level in levels.tolist()]
    while result and result[-1] is None:
        result.pop()
    return result
