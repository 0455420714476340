"""All samples of one run as arrays: a few bulk reads instead of a hundred thousand records.

Rows are the (site, pass) pairs of the run, in the order in which their sites were first seen. Samples are sorted by row
and step, so the last sample of a row is its newest. In a distributed run every rank has samples of the same step;
`over_ranks` makes one entry of what the ranks measured.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, Select, Table, case, select

from loka.errors import ArgumentError
from loka.formats import PASSES, ROLES, Pass
from loka.probes.judging.intervals import Floats, Ints
from loka.probes.records import LearnedRecord
from loka.probes.sampling.learning import ROWS, restore
from loka.probes.storing.checked import DamagedError, Row, checked, checked_rows, looked_up, numbers, whole
from loka.probes.storing.rows import recipe_names
from loka.probes.storing.schema import (
    COUNTS,
    IMPACTS,
    METRICS,
    distributions,
    errors,
    impacts,
    operand_recipes,
    operands,
    products,
    samples,
    steps,
)

logger = logging.getLogger("loka.probes")

OPERAND_VALUES: Final = ("amax", "rms", "zeros", "nan", "inf", "elements")
SHAPE: Final = ("batch", "m", "n", "k", "calls")
# Where whole numbers are in a row of operands, which begins with step, position and slot.
_OPERAND_COUNTS: Final = [3 + OPERAND_VALUES.index(name) for name in ("nan", "inf", "elements")]
# Whose labels a curvature rests on, from none at all to the least sure.
LABELS: Final = ("", "closed", "sampled", "empirical")
# The rows of a product that an error is over, among the counts of a comparison.
_ROWS: Final[str] = COUNTS[0]
# Samples of one step whose operands are asked for by name; of more, the whole step is read.
_FEW: Final = 200
_LARGEST_CODE: Final = 2**62

# (recipe, underflow, saturation) by (steps.number, position, slot).
Shares = Mapping[tuple[int, int, int], list[tuple[str, float, float]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSeries:
    """One run: R rows, T steps of a rank, S samples, E errors, I impacts, O operands.

    A `_sample` array points into the samples, `at` from the samples into the steps of a rank.
    """

    rows: tuple[tuple[str, Pass], ...]  # [R]: (site, pass)
    recipes: tuple[str, ...]  # those of the run, then any other that occurs
    num_steps: int  # sampled steps in which anything was seen
    static: Mapping[int, Row]  # the run's rows of `products`, by key
    step_at: Ints  # [T], as counted by the run
    rank: Ints  # [T]
    loss: Floats  # [T], mean per item; NaN: not known
    labels: Ints  # [T], index into LABELS
    row: Ints  # [S]
    at: Ints  # [S], index into the steps of a rank
    step: Ints  # [S], as counted by the run
    place: Ints  # [S, 2]: steps.number and position, the key of a sample
    product: Ints  # [S], key into `static`
    shape: Ints  # [S, 5], in the order of SHAPE
    error_sample: Ints  # [E]
    error_recipe: Ints  # [E], index into `recipes`
    metrics: Floats  # [E, 6], in the order of schema.METRICS
    error_rows: Ints  # [E], rows that entered
    impact_sample: Ints  # [I]
    impact_recipe: Ints  # [I], index into `recipes`
    impacts: Floats  # [I, 3], in the order of schema.IMPACTS
    operand_sample: Ints  # [O]
    operand_slot: Ints  # [O]
    operand_role: Ints  # [O], index into ROLES
    operand_values: Floats  # [O, 6], in the order of OPERAND_VALUES
    # Calls by their rows, of products whose calls differed within a step: the shape of a sample is then their mean.
    mixed: Mapping[tuple[str, Pass], Mapping[int, int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Merged:
    """One entry per key, sorted by it."""

    key: Ints  # [n, keys]
    value: Floats  # [n, columns]
    ranks: Ints  # [n], that have an entry
    alone: bool  # no rank had several entries of one key: nothing was decided


def load_series(connection: Connection, run: int, run_recipes: tuple[str, ...]) -> RunSeries:
    """Read everything measured in the run of this key, apart from the shares of `operand_recipes`."""
    found = connection.execute(select(products).where(products.c.run == run))
    static: dict[int, Row] = {one["number"]: one for one in checked_rows(products, found)}
    places = [samples.c[name] for name in ("step", "position", "product", *SHAPE)]
    table = whole(_numbers(connection, _of_run(select(steps.c.step.label("at"), *places), samples, run)))
    table = table[np.lexsort((table[:, 1], table[:, 2], table[:, 0]))]  # by step, then as it saw them, then by rank
    rows = _row_names(table[:, 3], static)
    row_of = {name: index for index, name in enumerate(rows)}
    row = _looked_up(table[:, 3], lambda key: row_of[_name(static, key)])
    order = np.argsort(row, kind="stable")
    row, table = row[order], table[order]
    measured = _of_recipes(connection, errors, (*METRICS, _ROWS), run)
    taken = _of_recipes(connection, impacts, IMPACTS, run)
    names = recipe_names(connection)
    used = {key: looked_up(names, key, "recipes") for key in whole(np.union1d(measured[:, 2], taken[:, 2])).tolist()}
    known = tuple(dict.fromkeys((*run_recipes, *sorted(used.values()))))
    of_recipe = {key: known.index(name) for key, name in used.items()}
    inputs = _inputs(connection, run)
    of_step = _numbers(connection, _steps_query(run))
    return RunSeries(
        rows=rows,
        recipes=known,
        num_steps=np.unique(table[:, 1]).size,
        static=static,
        step_at=whole(of_step[:, 1]),
        rank=whole(of_step[:, 2]),
        loss=of_step[:, 3],
        labels=whole(of_step[:, 4]),
        row=row,
        at=np.searchsorted(of_step[:, 0], table[:, 1]),
        step=table[:, 0],
        place=table[:, 1:3],
        product=table[:, 3],
        shape=table[:, 4:],
        error_sample=_locate(table[:, 1:3], measured[:, :2]),
        error_recipe=_looked_up(whole(measured[:, 2]), of_recipe.__getitem__),
        metrics=measured[:, 3:-1],
        error_rows=whole(measured[:, -1]),
        impact_sample=_locate(table[:, 1:3], taken[:, :2]),
        impact_recipe=_looked_up(whole(taken[:, 2]), of_recipe.__getitem__),
        impacts=taken[:, 3:],
        operand_sample=_locate(table[:, 1:3], inputs[:, :2]),
        operand_slot=whole(inputs[:, 2]),
        operand_role=whole(inputs[:, -1]),
        operand_values=inputs[:, 3:-1],
        mixed=_mixed(connection, run),
    )


def _inputs(connection: Connection, run: int) -> Floats:
    """Return the operands of a run: step, position and slot, OPERAND_VALUES, and the index of the role in ROLES."""
    role = case({name: index for index, name in enumerate(ROLES)}, value=operands.c.role)
    values = [operands.c[name] for name in ("step", "position", "slot", *OPERAND_VALUES)]
    found = _numbers(connection, _of_run(select(*values, role), operands, run))
    if np.isnan(found[:, _OPERAND_COUNTS]).any():
        raise DamagedError("it holds an operand without its number of elements")
    return found


def _mixed(connection: Connection, run: int) -> dict[tuple[str, Pass], Mapping[int, int]]:
    table = distributions.c
    query = select(*(table[name] for name in ("site", "product", "kind", "samples", "step", "data")))
    found = connection.execute(query.where(table.run == run, table.kind == ROWS)).mappings()
    result: dict[tuple[str, Pass], Mapping[int, int]] = {}
    for record in (LearnedRecord(**checked(distributions, row)) for row in found):
        try:
            result[record.site, record.product] = restore(record).calls
        except ArgumentError as error:
            logger.warning("%s %s is known by the mean rows of its steps: %s", record.site, record.product, error)
    return result


def load_shares(connection: Connection, place: Ints) -> Shares:
    """Return the shares of all operands of the samples at `place` [n, 2]."""
    shares: dict[tuple[int, int, int], list[tuple[str, float, float]]] = {}
    table, names = operand_recipes.c, recipe_names(connection)
    for step in np.unique(place[:, 0]).tolist():
        wanted = place[place[:, 0] == step, 1]
        query = select(table.position, table.slot, table.recipe, table.underflow, table.saturation)
        query = query.where(table.step == step).order_by(table.position, table.slot, table.recipe)
        if wanted.size <= _FEW:
            query = query.where(table.position.in_(wanted.tolist()))
        found = _numbers(connection, query)
        found = found[np.isin(whole(found[:, 0]), wanted)]
        keys = whole(found[:, :3])
        named = {key: looked_up(names, key, "recipes") for key in np.unique(keys[:, 2]).tolist()}
        columns = map(_one_nan, found[:, 3:].T)
        entries = list(zip(map(named.__getitem__, keys[:, 2].tolist()), *columns, strict=True))
        begin = np.flatnonzero(_changes(keys[:, :2]))  # of each operand
        ends = [*begin[1:].tolist(), len(entries)]
        for (at, of), first, last in zip(keys[begin, :2].tolist(), begin.tolist(), ends, strict=False):
            shares[step, at, of] = entries[first:last]
    return shares


def _one_nan(values: Floats) -> list[float]:
    """Return stored floats; there is one NaN, so that records read twice are equal."""
    found: list[float] = values.tolist()
    for at in np.flatnonzero(np.isnan(values)).tolist():
        found[at] = math.nan
    return found


def over_ranks(key: Ints, rank: Ints, weight: Floats, decides: Ints | Floats, value: Floats) -> Merged:
    """Make one entry of all those with the same `key` [n, keys]: `value` [n, columns] averaged over ranks by `weight`.

    NaN does not enter a mean. Of several entries of one rank that with the largest `decides` counts. Entries come back
    sorted by key; one that stands alone comes back as it is.
    """
    order, alone = _order(key, rank, decides)
    key, rank = key[order], rank[order]
    new_key = _changes(key)
    last = np.append((new_key | _changes(rank[:, None]))[1:], True)[: order.size]
    kept = order[last]
    group = (np.cumsum(new_key) - 1)[last]
    ranks = np.bincount(group)
    begin = np.cumsum(ranks) - ranks
    merged = value[kept[begin]]
    shared = np.flatnonzero(ranks[group] > 1)
    if shared.size:
        several = np.flatnonzero(ranks > 1)
        found, weights = value[kept[shared]], weight[kept[shared], None]
        weights = np.where(np.isnan(found), 0.0, weights)
        sums, totals = np.zeros_like(merged), np.zeros_like(merged)
        np.add.at(sums, group[shared], np.where(weights > 0, found, 0.0) * weights)
        np.add.at(totals, group[shared], weights)
        with np.errstate(invalid="ignore"):
            merged[several] = (sums / np.where(totals > 0, totals, np.nan))[several]
    return Merged(key=key[new_key], value=merged, ranks=ranks, alone=alone)


def _order(key: Ints, rank: Ints, decides: Ints | Floats) -> tuple[Ints, bool]:
    """Return the order by key, rank and what decides; and whether it takes no more than key and rank."""
    columns = [*key.T, rank]
    extents = [int(column.max(initial=0)) + 1 for column in columns]
    if math.prod(extents) <= _LARGEST_CODE:  # one number for each: sorted in a fraction of the time
        code = np.zeros(len(rank), dtype=np.int64)
        for column, extent in zip(columns, extents, strict=True):
            code = code * extent + column
        order = np.argsort(code)
        ordered = code[order]
        if (ordered[1:] != ordered[:-1]).all():
            return order, True
    return np.lexsort((np.nan_to_num(decides, nan=-np.inf), *columns[::-1])), False


def _changes(sorted_key: Ints) -> NDArray[np.bool_]:
    """Return which rows of a sorted array differ from the row before; the first does."""
    changed = np.ones(len(sorted_key), dtype=bool)
    changed[1:] = (sorted_key[1:] != sorted_key[:-1]).any(axis=1)
    return changed


def _looked_up(keys: Ints, index: Callable[[int], int]) -> Ints:
    """Return the index of every key [n], each of the few that differ asked for once."""
    different, which = np.unique(keys, return_inverse=True)
    return np.array([index(key) for key in different.tolist()], dtype=np.int64)[which.reshape(-1)]


def _steps_query(run: int) -> Select[Any]:
    labels = case({name: index for index, name in enumerate(LABELS)}, value=steps.c.labels, else_=0)
    columns = (steps.c.number, steps.c.step, steps.c.rank, steps.c.loss, labels)
    return select(*columns).where(steps.c.run == run).order_by(steps.c.number)


def _of_recipes(connection: Connection, table: Table, columns: Sequence[str], run: int) -> Floats:
    """Return a table of numbers per recipe as [rows, 3 + columns]: steps.number, position, recipe, then the columns."""
    chosen = (table.c[name] for name in ("step", "position", "recipe", *columns))
    return _numbers(connection, _of_run(select(*chosen), table, run))


def _of_run(query: Select[Any], table: Table, run: int) -> Select[Any]:
    """Restrict a query on a table that is clustered by step to the steps of a run."""
    return query.select_from(steps).join(table, table.c.step == steps.c.number).where(steps.c.run == run)


def _numbers(connection: Connection, query: Select[Any]) -> Floats:
    """Return a query of numbers as an array [rows, columns]; NULL is NaN, integers are exact below 2**53."""
    return numbers(connection.execute(query))


def _name(static: Mapping[int, Row], key: int) -> tuple[str, Pass]:
    row = looked_up(static, key, "products")
    return row["site"], cast(Pass, row["product"])


def _row_names(product: Ints, static: Mapping[int, Row]) -> tuple[tuple[str, Pass], ...]:
    """Order the rows: sites as they were first seen, and each site's passes as in PASSES."""
    _, first = np.unique(product, return_index=True)
    seen = dict.fromkeys(_name(static, key) for key in product[np.sort(first)].tolist())
    sites = {site: index for index, site in enumerate(dict.fromkeys(site for site, _ in seen))}
    return tuple(sorted(seen, key=lambda name: (sites[name[0]], PASSES.index(name[1]))))


def _locate(place: Ints, wanted: Floats) -> Ints:
    """Return the index in `place` [n, 2] of every row of `wanted` [m, 2]; raise DamagedError where one is not there."""
    width = int(place[:, 1].max(initial=0)) + 1
    keys, searched = place[:, 0] * width + place[:, 1], whole(wanted)
    order = np.argsort(keys)
    found = np.searchsorted(keys, searched[:, 0] * width + searched[:, 1], sorter=order)
    at = order[np.minimum(found, len(order) - 1)] if len(order) else found
    if len(searched) and (not len(order) or (place[at] != searched).any()):
        raise DamagedError("it holds numbers of a sample that is not there")
    return at
