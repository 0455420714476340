"""The one place where a record becomes rows of the probe database, and rows become a record again.

Columns are named like the fields of the records, so most of this is tables of names. NULL in a float column is NaN.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, Final, cast

from sqlalchemy import Connection, Table, select

from loka.formats import Role
from loka.numerics import ProductError
from loka.probes.records import (
    DynamicsRecord,
    Environment,
    Event,
    LossImpact,
    OperandRecord,
    ProductRecord,
    RunInfo,
    RunProgress,
    RunStatus,
    StepRecord,
    Timing,
)
from loka.probes.storing.checked import Row, checked, looked_up, names, shapes
from loka.probes.storing.schema import (
    ABSENT,
    COUNTS,
    DYNAMICS,
    IMPACTS,
    METRICS,
    dynamics,
    errors,
    impacts,
    operand_recipes,
    operands,
    parts,
    recipes,
    runs,
    samples,
)
from loka.probes.storing.schema import timings as timings_table

_RUN_FIELDS: Final = ("id", "created", "model", "every", "overhead_budget", "world_size")
_ENVIRONMENT_FIELDS: Final = ("device", "torch", "python", "loka")
_PROGRESS_FIELDS: Final = (
    *("steps", "sampled_steps", "skipped_samples", "unattributed", "wall_s", "probe_s"),
    *("weights_changed", "status", "reason"),
)
# What makes one row of `products`.
STATIC_FIELDS: Final = ("site", "product", "op", "dtype", "parameter", "unmeasured")
# What makes one row of `parts`.
PART_FIELDS: Final = ("name", "kind", "module", "parameters", "feeds")
# By the table that gives such a row its key.
KEY_FIELDS: Final[Mapping[str, tuple[str, ...]]] = {"products": STATIC_FIELDS, "parts": PART_FIELDS}
_SAMPLE_FIELDS: Final = ("batch", "m", "n", "k", "calls", "alignment")
_OPERAND_FIELDS: Final = ("role", "amax", "rms", "zeros", "nan", "inf", "elements")
_TIMING_FIELDS: Final = (
    *("kernel", "product", "dtype", "device", "values", "created", "batch", "m", "n", "k", "repetitions"),
    *("median_us", "spread_us"),
)


def number(value: float | None) -> float:
    """Return a stored float: NULL is NaN. There is one NaN, so that records read twice are equal."""
    return math.nan if value is None or value != value else float(value)


def _take(record: object, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(record, name) for name in names}


def run_row(info: RunInfo) -> dict[str, Any]:
    """Return the columns of `runs` that are known when a run starts."""
    return {
        **_take(info, _RUN_FIELDS),
        **_take(info.environment, _ENVIRONMENT_FIELDS),
        "fingerprint": json.dumps({name: list(shape) for name, shape in info.fingerprint.items()}),
        "recipes": json.dumps(list(info.recipes)),
    }


def progress_row(progress: RunProgress) -> dict[str, Any]:
    """Return the columns of `runs` that change while a run goes on."""
    return {**_take(progress, _PROGRESS_FIELDS), "reason": _writable(progress.reason)}


def run_info(row: Row) -> RunInfo:
    """Return what was known at the start of the run in this row, which is checked."""
    return RunInfo(
        **{**{name: row[name] for name in _RUN_FIELDS}, "overhead_budget": number(row["overhead_budget"])},
        environment=Environment(**{name: row[name] for name in _ENVIRONMENT_FIELDS}),
        fingerprint=shapes(runs, row, "fingerprint"),
        recipes=names(runs, row, "recipes"),
    )


def run_progress(row: Row) -> RunProgress:
    """Return the running totals of the run in this row, which is checked, as they were written."""
    values = {name: row[name] for name in _PROGRESS_FIELDS}
    values |= {"wall_s": number(row["wall_s"]), "probe_s": number(row["probe_s"])}
    values["weights_changed"] = bool(row["weights_changed"])
    return RunProgress(**{**values, "status": cast(RunStatus, row["status"])})


def event_row(run: int, event: Event) -> dict[str, Any]:
    """Return one row of `events`."""
    return {"run": run, "step": event.step, "kind": event.kind, "message": _writable(event.message)}


def _writable(said: str) -> str:
    """Return free text, e.g. of an exception, without what no database takes: NUL, halves of surrogate pairs."""
    return said.replace("\x00", "\ufffd").encode("utf-8", "replace").decode()


def timing_row(timing: Timing) -> dict[str, Any]:
    """Return one row of `timings`."""
    return _take(timing, _TIMING_FIELDS)


def timing(row: Row) -> Timing:
    """Return the timing in this row."""
    checked(timings_table, row)
    values = {name: row[name] for name in _TIMING_FIELDS}
    return Timing(**{**values, "median_us": number(row["median_us"]), "spread_us": number(row["spread_us"])})


def static_key(product: ProductRecord) -> tuple[str, ...]:
    """Return the values of STATIC_FIELDS: products that agree in them share a row of `products`."""
    return (product.site, product.product, product.op, product.dtype, product.parameter, product.unmeasured)


def part_key(part: DynamicsRecord) -> tuple[str, ...]:
    """Return the values of PART_FIELDS: records that agree in them share a row of `parts`."""
    return (part.name, part.kind, part.module, json.dumps(part.parameters), json.dumps(part.feeds))


def dynamics_rows(key: int, step: StepRecord, part_keys: Mapping[tuple[str, ...], int]) -> list[dict[str, Any]]:
    """Return the rows of `dynamics` that hold a step; `key` is steps.number."""
    return [
        {"step": key, "position": position, "part": part_keys[part_key(part)], **_take(part, DYNAMICS)}
        for position, part in enumerate(step.dynamics)
    ]


def dynamics_record(row: Row) -> DynamicsRecord:
    """Return the part in this row of `dynamics` joined with `parts`."""
    checked(dynamics, {name: row[name] for name in DYNAMICS})
    values: dict[str, Any] = {name: number(row[name]) for name in DYNAMICS}
    return DynamicsRecord(**part_names(row), **values)


def part_names(row: Row) -> dict[str, Any]:
    """Return what a row of `parts` says of a DynamicsRecord."""
    values = checked(parts, {name: row[name] for name in PART_FIELDS})
    return {**values, **{name: names(parts, row, name) for name in ("parameters", "feeds")}}


def step_dynamics(connection: Connection, key: int) -> tuple[DynamicsRecord, ...]:
    """Return the dynamics of the step whose steps.number is `key`."""
    columns = (*(parts.c[name] for name in PART_FIELDS), *(dynamics.c[name] for name in DYNAMICS))
    query = select(*columns).join_from(dynamics, parts).where(dynamics.c.step == key).order_by(dynamics.c.position)
    return tuple(dynamics_record(row) for row in connection.execute(query).mappings())


def recipes_of(step: StepRecord) -> set[str]:
    """Return every recipe that a step names anywhere."""
    names: set[str] = set()
    for product in step.products:
        names.update(product.errors, product.impacts)
        for operand in product.operands:
            names.update(operand.underflow, operand.saturation)
    return names


def step_rows(
    key: int, step: StepRecord, product_keys: Mapping[tuple[str, ...], int], recipe_keys: Mapping[str, int]
) -> Iterator[tuple[Table, list[dict[str, Any]]]]:
    """Yield the rows that hold a step, table by table in an order that foreign keys allow; `key` is steps.number."""
    tables = (samples, operands, operand_recipes, errors, impacts)
    rows: dict[Table, list[dict[str, Any]]] = {table: [] for table in tables}
    for position, product in enumerate(step.products):
        place = {"step": key, "position": position}
        rows[samples].append({**place, "product": product_keys[static_key(product)], **_take(product, _SAMPLE_FIELDS)})
        for slot, operand in enumerate(product.operands):
            rows[operands].append({**place, "slot": slot, **_take(operand, _OPERAND_FIELDS)})
            under, clipped = operand.underflow, operand.saturation
            for name in {**under, **clipped}:
                shares = {"underflow": under.get(name, ABSENT), "saturation": clipped.get(name, ABSENT)}
                rows[operand_recipes].append({**place, "slot": slot, "recipe": recipe_keys[name], **shares})
        for name, error in product.errors.items():
            rows[errors].append({**place, "recipe": recipe_keys[name], **_take(error, METRICS + COUNTS)})
        for name, impact in product.impacts.items():
            rows[impacts].append({**place, "recipe": recipe_keys[name], **_take(impact, IMPACTS)})
    yield from ((table, found) for table, found in rows.items() if found)


def operand_record(row: Row, shares: list[tuple[str, float, float]]) -> OperandRecord:
    """Return the operand in this row of `operands`; `shares` are (recipe, underflow, saturation) of it."""
    return OperandRecord(
        role=cast(Role, row["role"]),
        amax=number(row["amax"]),
        rms=number(row["rms"]),
        zeros=number(row["zeros"]),
        nan=row["nan"],
        inf=row["inf"],
        elements=row["elements"],
        underflow={name: under for name, under, _ in shares if under != ABSENT},
        saturation={name: clipped for name, _, clipped in shares if clipped != ABSENT},
    )


def recipe_names(connection: Connection) -> dict[int, str]:
    """Return the name of every recipe by its key."""
    found = [checked(recipes, row) for row in connection.execute(select(recipes)).mappings()]
    return {row["number"]: row["name"] for row in found}


def _product_error(row: Row) -> ProductError:
    counts: dict[str, Any] = {name: row[name] for name in COUNTS}
    return ProductError(**{**counts, **{name: number(row[name]) for name in METRICS}})


def step_products(
    connection: Connection, key: int, static: Mapping[int, Row], named: Mapping[int, str]
) -> tuple[ProductRecord, ...]:
    """Return the products of the step whose steps.number is `key`; `static` are the run's rows of `products`."""
    shares = defaultdict(list)
    for row in _rows(connection, operand_recipes, key):
        share = (_recipe(named, row), number(row["underflow"]), number(row["saturation"]))
        shares[row["position"], row["slot"]].append(share)
    found = defaultdict(list)
    for row in _rows(connection, operands, key):
        found[row["position"]].append(operand_record(row, shares[row["position"], row["slot"]]))
    measured: defaultdict[int, dict[str, ProductError]] = defaultdict(dict)
    for row in _rows(connection, errors, key):
        measured[row["position"]][_recipe(named, row)] = _product_error(row)
    felt: defaultdict[int, dict[str, LossImpact]] = defaultdict(dict)
    for row in _rows(connection, impacts, key):
        values = {name: number(row[name]) for name in IMPACTS}
        felt[row["position"]][_recipe(named, row)] = LossImpact(**values)
    return tuple(
        ProductRecord(
            **{**{name: row[name] for name in _SAMPLE_FIELDS}, "alignment": number(row["alignment"])},
            **{name: looked_up(static, row["product"], "products")[name] for name in STATIC_FIELDS},
            operands=tuple(found[row["position"]]),
            errors=measured[row["position"]],
            impacts=felt[row["position"]],
        )
        for row in _rows(connection, samples, key)
    )


def _rows(connection: Connection, table: Table, step: int) -> Iterator[Row]:
    """Yield the rows of one step, checked, in the order of their keys."""
    query = select(table).where(table.c.step == step).order_by(*table.primary_key.columns)
    for row in connection.execute(query).mappings():
        yield checked(table, row)


def _recipe(named: Mapping[int, str], row: Row) -> str:
    return looked_up(named, row["recipe"], "recipes")
