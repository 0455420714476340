"""All samples of one run as arrays: a few bulk reads instead of a hundred thousand records.

Rows are the (site, pass) pairs of the run, in the order in which their sites were first seen. Samples are sorted by row
and step, so the last sample of a row is its newest.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final, cast

import numpy as np
from sqlalchemy import Connection, Select, Table, case, select

from loka.formats import PASSES, ROLES, Pass
from loka.probes.intervals import Floats, Ints
from loka.probes.rows import Row, number
from loka.probes.schema import METRICS, errors, operand_recipes, operands, products, recipes, samples, steps

OPERAND_VALUES: Final = ("amax", "rms", "zeros", "nan", "inf", "elements")
SHAPE: Final = ("batch", "m", "n", "k", "calls")
# Both databases take at least this many parameters in one statement.
_MOST_PARAMETERS: Final = 10_000

# (recipe, underflow, saturation) by (steps.number, position, slot).
Shares = Mapping[tuple[int, int, int], list[tuple[str, float, float]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSeries:
    """One run: R rows, S samples, E errors, O operands. A `_sample` array points into the samples."""

    rows: tuple[tuple[str, Pass], ...]  # [R]: (site, pass)
    recipes: tuple[str, ...]  # those of the run, then any other that occurs
    num_steps: int  # sampled steps in which anything was seen
    static: Mapping[int, Row]  # the run's rows of `products`, by key
    row: Ints  # [S]
    step: Ints  # [S], as counted by the run
    place: Ints  # [S, 2]: steps.number and position, the key of a sample
    product: Ints  # [S], key into `static`
    shape: Ints  # [S, 5], in the order of SHAPE
    error_sample: Ints  # [E]
    error_recipe: Ints  # [E], index into `recipes`
    metrics: Floats  # [E, 5], in the order of schema.METRICS
    operand_sample: Ints  # [O]
    operand_slot: Ints  # [O]
    operand_role: Ints  # [O], index into ROLES
    operand_values: Floats  # [O, 6], in the order of OPERAND_VALUES


def load_series(connection: Connection, run: int, run_recipes: tuple[str, ...]) -> RunSeries:
    """Read everything measured in the run of this key, apart from the shares of `operand_recipes`."""
    found = connection.execute(select(products).where(products.c.run == run)).mappings()
    static = {one["number"]: one for one in found}
    places = [samples.c[name] for name in ("step", "position", "product", *SHAPE)]
    table = _numbers(connection, _of_run(select(steps.c.step.label("at"), *places), samples, run)).astype(np.int64)
    table = table[np.lexsort((table[:, 2], table[:, 0]))]  # by step, then as the step saw them
    rows = _row_names(table[:, 3], static)
    row_of = {name: index for index, name in enumerate(rows)}
    row = np.array([row_of[_name(static[key])] for key in table[:, 3].tolist()], dtype=np.int64)
    order = np.argsort(row, kind="stable")
    row, table = row[order], table[order]
    names = dict(connection.execute(select(recipes.c.number, recipes.c.name)).all())
    measures = [errors.c[name] for name in ("step", "position", "recipe", *METRICS)]
    measured = _numbers(connection, _of_run(select(*measures), errors, run))
    used = {int(key): names[int(key)] for key in np.unique(measured[:, 2])}
    known = tuple(dict.fromkeys((*run_recipes, *sorted(used.values()))))
    role = case({name: index for index, name in enumerate(ROLES)}, value=operands.c.role)
    values = [operands.c[name] for name in ("step", "position", "slot", *OPERAND_VALUES)]
    inputs = _numbers(connection, _of_run(select(*values, role), operands, run))
    return RunSeries(
        rows=rows,
        recipes=known,
        num_steps=np.unique(table[:, 1]).size,
        static=static,
        row=row,
        step=table[:, 0],
        place=table[:, 1:3],
        product=table[:, 3],
        shape=table[:, 4:],
        error_sample=_locate(table[:, 1:3], measured[:, :2]),
        error_recipe=np.array([known.index(used[int(key)]) for key in measured[:, 2]], dtype=np.int64),
        metrics=measured[:, 3:],
        operand_sample=_locate(table[:, 1:3], inputs[:, :2]),
        operand_slot=inputs[:, 2].astype(np.int64),
        operand_role=inputs[:, -1].astype(np.int64),
        operand_values=inputs[:, 3:-1],
    )


def load_shares(connection: Connection, place: Ints) -> Shares:
    """Return the shares of all operands of the samples at `place` [n, 2]."""
    shares: defaultdict[tuple[int, int, int], list[tuple[str, float, float]]] = defaultdict(list)
    table = operand_recipes.c
    columns = (table.position, table.slot, recipes.c.name, table.underflow, table.saturation)
    for step in np.unique(place[:, 0]).tolist():
        positions = place[place[:, 0] == step, 1].tolist()
        for start in range(0, len(positions), _MOST_PARAMETERS):
            chosen = table.position.in_(positions[start : start + _MOST_PARAMETERS])
            query = select(*columns).join_from(operand_recipes, recipes).where(table.step == step, chosen)
            for position, slot, name, underflow, saturation in connection.execute(query):
                shares[step, position, slot].append((name, number(underflow), number(saturation)))
    return shares


def _of_run(query: Select[Any], table: Table, run: int) -> Select[Any]:
    """Restrict a query on a table that is clustered by step to the steps of a run."""
    return query.select_from(steps).join(table, table.c.step == steps.c.number).where(steps.c.run == run)


def _numbers(connection: Connection, query: Select[Any]) -> Floats:
    """Return a query of numbers as an array [rows, columns]; NULL is NaN, integers are exact below 2**53."""
    result = connection.execute(query)
    columns = len(result.keys())
    flat = np.fromiter(chain.from_iterable(result), np.float64)
    return flat.reshape(-1, columns)


def _name(static: Row) -> tuple[str, Pass]:
    return static["site"], cast(Pass, static["product"])


def _row_names(product: Ints, static: Mapping[int, Row]) -> tuple[tuple[str, Pass], ...]:
    """Order the rows: sites as they were first seen, and each site's passes as in PASSES."""
    _, first = np.unique(product, return_index=True)
    seen = dict.fromkeys(_name(static[key]) for key in product[np.sort(first)].tolist())
    sites = {site: index for index, site in enumerate(dict.fromkeys(site for site, _ in seen))}
    return tuple(sorted(seen, key=lambda name: (sites[name[0]], PASSES.index(name[1]))))


def _locate(place: Ints, wanted: Floats) -> Ints:
    """Return the index in `place` [n, 2] of every row of `wanted` [m, 2]; all of them are there."""
    width = int(place[:, 1].max(initial=0)) + 1
    keys = place[:, 0] * width + place[:, 1]
    order = np.argsort(keys)
    found = np.searchsorted(keys, wanted[:, 0].astype(np.int64) * width + wanted[:, 1].astype(np.int64), sorter=order)
    return order[found]
