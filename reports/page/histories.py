"""The errors of a run over its steps, thin enough to travel inside a page.

A history shows the samples of a product that the verdicts rest on and those before them: all of them where a run is
short, else evenly chosen ones with the newest among them; how many there are is told.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loka.probes.judging.series import RunSeries, over_ranks
from loka.probes.storing.schema import METRICS

# Numbers that all histories of a page hold together: about 3 MB of text before it is compressed.
_MOST_VALUES: Final[int] = 400_000
_FEWEST_STEPS, _MOST_STEPS = 12, 160
_ROW_ERROR, _RELATIVE = METRICS.index("row_error"), METRICS.index("relative_error")

Gates = Mapping[tuple[str, str], str]
Steps = NDArray[np.int64]
Values = NDArray[np.float64]
# Of one curve: the steps that are shown, how many there are, and the errors on those that are shown.
_Shown = tuple[list[int], int, list[float | None]]


def histories(series: RunSeries, gates: Gates) -> dict[str, dict[str, Any]]:
    """Return site -> pass -> {"steps", "of", "recipes": {name: [error or null]}}.

    gates: the error that decides about each (site, pass), `row_error` or `relative_error`; others are left out. `of`
    is how many sampled steps there are.
    """
    merged = _by_step(series, gates)
    width = len(series.recipes)
    number, step, value = merged.key[:, 0], merged.key[:, 1], _four_digits(merged.value[:, 0])
    curves = np.flatnonzero(np.append(number[:1] >= 0, number[1:] != number[:-1]))  # where each begins
    most = max(_FEWEST_STEPS, min(_MOST_STEPS, _MOST_VALUES // max(len(curves), 1)))
    at, ends = number[curves].tolist(), np.append(curves[1:], len(number)).tolist()
    shown = _alike(step, value, len(curves), most)
    parts = zip(curves.tolist(), ends, strict=True)
    found = shown or _apart([each // width for each in at], [(step[a:b], value[a:b]) for a, b in parts], most)
    result: dict[str, dict[str, Any]] = {}
    for each, (steps, count, errors) in zip(at, found, strict=True):
        site, product = series.rows[each // width]
        if (site, product) in gates:
            passes = result.setdefault(site, {})
            history = passes.setdefault(product, {"steps": steps, "of": count, "recipes": {}})
            history["recipes"][series.recipes[each % width]] = errors
    return result


def _alike(step: Steps, value: Values, curves: int, most: int) -> list[_Shown] | None:
    """Return what is shown of every curve where all of them were measured on the same steps, as most runs do."""
    if not curves or len(step) % curves:
        return None
    grid = step.reshape(curves, -1)
    if (grid != grid[0]).any() or (grid[0, 1:] <= grid[0, :-1]).any():
        return None
    chosen = _chosen(grid.shape[1], most)
    errors: Any = value.reshape(curves, -1)[:, chosen]
    errors = errors.tolist() if np.isfinite(errors).all() else list(map(_numbers, errors))
    return [(grid[0, chosen].tolist(), grid.shape[1], each) for each in errors]


def _apart(rows: Sequence[int], parts: Sequence[tuple[Steps, Values]], most: int) -> list[_Shown]:
    """Return what is shown of every curve, each of a row, on the steps that any curve of its row has."""
    by_row: dict[int, list[Steps]] = {}
    for row, (step, _) in zip(rows, parts, strict=True):
        by_row.setdefault(row, []).append(step)
    steps = {row: np.unique(np.concatenate(found)) for row, found in by_row.items()}
    shown = {row: found[_chosen(len(found), most)] for row, found in steps.items()}
    return [
        (shown[row].tolist(), len(steps[row]), _on(shown[row], *part)) for row, part in zip(rows, parts, strict=True)
    ]


def _four_digits(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the values in four digits, NaN where one is no number."""
    with np.errstate(divide="ignore", invalid="ignore"):
        exponent = np.floor(np.log10(np.abs(values)))
        scale = 10.0 ** (3 - exponent)
        rounded = np.round(values * scale) / scale
    return np.where(values == 0, 0.0, np.where(np.isfinite(rounded), rounded, np.nan))


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
    """Return the values on the wanted steps; null where there is none or it is no number."""
    at = np.searchsorted(steps, wanted).clip(max=len(steps) - 1)
    return _numbers(np.where(steps[at] == wanted, values[at], np.nan))


def _numbers(values: NDArray[np.float64]) -> list[float | None]:
    """Return values as JSON has them: what is no number is null."""
    found: list[float] = values.tolist()
    return [value if math.isfinite(value) else None for value in found]
