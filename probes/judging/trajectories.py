"""Training dynamics as they went: each bias, norm and Swish of a run over its sampled steps, and which biases diverge.

The ranks of a distributed run are averaged per step. Replicated biases are read by one rank only.

A bias that settles grows ever slower; one that diverges grows as fast in the second half of what was seen as in the
first, or faster. Both are judged by straight lines through the halves, and by a test for a trend that takes no line.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final, cast

import numpy as np
from sqlalchemy import Connection, Engine, select

from loka.probes.judging.intervals import MIN_SAMPLES, WARMUP_STEPS, Floats
from loka.probes.records import DynamicsKind
from loka.probes.sampling.dynamics import QUANTITIES
from loka.probes.storing.checked import looked_up, numbers, whole
from loka.probes.storing.database import find_run, has_dynamics, transaction
from loka.probes.storing.rows import PART_FIELDS, part_names
from loka.probes.storing.schema import DYNAMICS, dynamics, parts, steps


@dataclass(frozen=True, kw_only=True, slots=True)
class Trajectory:
    """One bias, norm or Swish over the sampled steps that looked at it; NaN where a step had no number."""

    name: str
    kind: DynamicsKind
    module: str
    parameters: tuple[str, ...]
    feeds: tuple[str, ...]
    steps: tuple[int, ...]
    values: Mapping[str, tuple[float, ...]]  # quantity -> one number per step

    def recent(self, quantity: str) -> float:
        """Return the mean of a quantity over the later half of the steps; NaN where there is none."""
        found = np.array(self.values[quantity][len(self.steps) // 2 :])
        found = found[np.isfinite(found)]
        return float(found.mean()) if found.size else math.nan


@dataclass(frozen=True, kw_only=True, slots=True)
class Growth:
    """How the norm of a bias went over the steps that are evidence; from straight lines, slopes in norm per step."""

    samples: int
    begin: float
    end: float
    first_slope: float
    second_slope: float
    trend: float  # Mann and Kendall's z: beyond 2.33 a rise of this many samples is no chance, 99 times in 100

    @property
    def settling(self) -> float:
        """Slope of the second half over that of the first: 1 a straight line, below it settles; Inf: it has turned."""
        if self.first_slope > 0:
            return self.second_slope / self.first_slope
        return math.inf if self.second_slope > 0 else 0.0

    @property
    def relative(self) -> float:
        """Growth over the steps seen, relative to where it began."""
        return (self.end - self.begin) / self.begin if self.begin > 0 else math.inf if self.end > 0 else 0.0


def read_trajectories(engine: Engine, run_id: str | None = None) -> tuple[Trajectory, ...]:
    """Return the dynamics of a run, by default the latest, in the order in which they were first seen; empty of none.

    Raises EvidenceError where there is no such run, DatabaseError.
    """
    with transaction(engine) as connection:
        run = find_run(connection, run_id)
        return trajectories(connection, run.number)


def trajectories(connection: Connection, run: int) -> tuple[Trajectory, ...]:
    """Return the dynamics of the run of this key."""
    if not has_dynamics(connection):
        return ()
    columns = [parts.c[name] for name in PART_FIELDS]
    found = connection.execute(select(parts.c.number, *columns).where(parts.c.run == run).order_by(parts.c.number))
    static = {row["number"]: part_names(row) for row in found.mappings()}
    of_name: dict[tuple[str, str], int] = {}
    for part in static.values():
        of_name.setdefault((part["name"], part["kind"]), len(of_name))
    index = {number: of_name[part["name"], part["kind"]] for number, part in static.items()}
    step, which, values = _averaged(*_numbers(connection, run, index))
    result = []
    for position, (name, kind) in enumerate(of_name):
        same = [part for part in static.values() if (part["name"], part["kind"]) == (name, kind)]
        mine = which == position
        known = {each: tuple(values[mine, column].tolist()) for column, each in enumerate(DYNAMICS)}
        result.append(
            Trajectory(
                name=name,
                kind=cast(DynamicsKind, kind),
                module=same[-1]["module"],
                parameters=same[-1]["parameters"],
                feeds=tuple(dict.fromkeys(chain.from_iterable(part["feeds"] for part in same))),
                steps=tuple(step[mine].tolist()),
                values={each: known[each] for each in QUANTITIES[cast(DynamicsKind, kind)]},
            )
        )
    return tuple(result)


def _numbers(connection: Connection, run: int, index: Mapping[int, int]) -> tuple[Any, Any, Floats]:
    """Return of every row of `dynamics` of a run its step, which part it is of, and its numbers; NULL is NaN."""
    columns = (dynamics.c[name] for name in DYNAMICS)
    query = select(steps.c.step, dynamics.c.part, *columns).join_from(
        dynamics, steps, dynamics.c.step == steps.c.number
    )
    rows = connection.execute(query.where(steps.c.run == run))
    table = numbers(rows)
    which = np.array([looked_up(index, part, "parts") for part in whole(table[:, 1]).tolist()], dtype=np.int64)
    return whole(table[:, 0]), which, table[:, 2:]


def _averaged(step: Any, which: Any, values: Floats) -> tuple[Any, Any, Floats]:
    """Return one row per part and step, sorted by both: the mean of all that have a number."""
    if not step.size:
        return step, which, values
    order = np.lexsort((step, which))
    step, which, values = step[order], which[order], values[order]
    begins = np.flatnonzero(np.append(True, (step[1:] != step[:-1]) | (which[1:] != which[:-1])))
    known = ~np.isnan(values)
    counts = np.add.reduceat(known, begins, axis=0, dtype=np.int64)
    sums = np.add.reduceat(np.where(known, values, 0.0), begins, axis=0)
    return step[begins], which[begins], np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def growth_of(trajectory: Trajectory) -> Growth | None:
    """Return how a bias grew; None where fewer than MIN_SAMPLES steps tell.

    The first WARMUP_STEPS steps count only where too little comes after them.
    """
    step = np.array(trajectory.steps, dtype=np.float64)
    norm = np.array(trajectory.values["norm"])
    step, norm = step[np.isfinite(norm)], norm[np.isfinite(norm)]
    if (late := step >= WARMUP_STEPS).sum() >= MIN_SAMPLES:
        step, norm = step[late], norm[late]
    if len(step) < MIN_SAMPLES:
        return None
    half = len(step) // 2
    first, second = np.polyfit(step[: half + 1], norm[: half + 1], 1), np.polyfit(step[half:], norm[half:], 1)
    return Growth(
        samples=len(step),
        begin=float(np.polyval(first, step[0])),
        end=float(np.polyval(second, step[-1])),
        first_slope=float(first[0]),
        second_slope=float(second[0]),
        trend=_mann_kendall(norm),
    )


def _mann_kendall(series: Floats) -> float:
    """Return the z score of the number of rising pairs over falling ones, corrected for continuity."""
    count = len(series)
    score = float(np.sign(series[None, :] - series[:, None])[np.triu_indices(count, 1)].sum())
    closer = score - math.copysign(min(abs(score), 1.0), score)
    return closer / math.sqrt(count * (count - 1) * (2 * count + 5) / 18)


# Growth of the norm, relative growth, share of the first half's speed that is kept, and trend from which a bias is said
# to diverge. The first is the size that the LoKA paper reports of biases that never settle.
DIVERGED_BY: Final[float] = 0.1
_RELATIVE: Final[float] = 0.1
_UNSETTLED: Final[float] = 0.75
_TREND: Final[float] = 2.33


def diverges(growth: Growth) -> bool:
    """Whether a bias grows without settling."""
    grown = growth.end - growth.begin >= DIVERGED_BY and growth.relative >= _RELATIVE
    return grown and growth.settling >= _UNSETTLED and growth.trend >= _TREND
