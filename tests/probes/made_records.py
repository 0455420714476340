"""Hand-made records for tests of the database, the writer and the evidence, and strategies that make any record."""

import dataclasses
import math
import sqlite3
from collections.abc import Iterable
from pathlib import Path

from hypothesis import strategies as st

from loka.formats import DEFAULT_RECIPES, PASS_OPERANDS, PASSES, ROLES
from loka.numerics import ProductError
from loka.probes.records import Environment, OperandRecord, ProductRecord, RunInfo, RunProgress, StepRecord, Timing
from loka.probes.storing.writer import RunWriter

NAN, INF = math.nan, math.inf


def made_info(**changes):
    values = {
        "created": "2026-03-01T12:00:00+00:00",
        "environment": Environment(device="cpu (made up)", torch="2.13.0", python="3.11.7", loka="0.1.0"),
        "model": "Wukong",
        "fingerprint": {"up.weight": (256, 768), "scale": ()},
        "every": 100,
        "overhead_budget": 0.01,
        "recipes": DEFAULT_RECIPES,
    }
    return RunInfo(**(values | changes))


def made_progress(sampled, **changes):
    values = {"steps": 100 * sampled, "sampled_steps": sampled, "skipped_samples": 1, "wall_s": 10.0, "probe_s": 0.05}
    return RunProgress(**(values | {"unattributed": 0, "weights_changed": True} | changes))


def made_error(value, **changes):
    decibels = -20 * math.log10(value) if 0 < value < INF else NAN
    values = {"row_error": value, "row_error_p99": 1.3 * value, "relative_error": 0.9 * value, "sqnr_db": decibels}
    return ProductError(**(values | {"mere": 5 * value, "rows": 64, "zero_rows": 0, "bad_rows": 0} | changes))


def made_operand(role, **changes):
    values = {"amax": 3.0, "rms": 1.0, "zeros": 0.25, "nan": 0, "inf": 0, "elements": 1024}
    return OperandRecord(role=role, **(values | changes))


def made_product(site="up", product="fprop", value=0.03, **changes):
    """One product; `value` is its error under every recipe, or the errors by recipe, or None."""
    by_recipe = dict.fromkeys(DEFAULT_RECIPES, value) if isinstance(value, float) else value or {}
    shares = dict.fromkeys(by_recipe, 0.01)
    values = {
        **{"op": "addmm", "batch": 1, "m": 64, "n": 256, "k": 768, "calls": 1, "dtype": "bfloat16"},
        "parameter": f"{site}.weight",
        "operands": tuple(
            made_operand(role, underflow=shares, saturation=dict.fromkeys(shares, 0.0))
            for role in PASS_OPERANDS[product]
        ),
        "errors": {name: made_error(one) if isinstance(one, float) else one for name, one in by_recipe.items()},
    }
    return ProductRecord(site=site, product=product, **(values | changes))


def made_step(step, *products):
    return StepRecord(step=step, products=products)


def write_run(db, steps: Iterable[StepRecord], info=None, progress=None):
    """Write a whole run through the writer and return its id."""
    steps = list(steps)
    info = info or made_info()
    writer = RunWriter(db, info)
    for count, step in enumerate(steps, start=1):
        writer.write(step, made_progress(count))
    writer.finish(progress or made_progress(len(steps), status="complete"))
    assert writer.failure is None
    assert writer.dropped == 0
    return info.id


def foreign_database(path: Path):
    """Make somebody else's SQLite file."""
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("CREATE TABLE runs (id TEXT, loss REAL)")
        connection.execute("INSERT INTO runs VALUES ('mine', 0.5)")
    connection.close()


def contents(folder: Path):
    """Return every file of a folder with its bytes."""
    return {entry.name: entry.read_bytes() for entry in folder.iterdir() if entry.is_file()}


def plain(value):
    """Turn records into values that are equal also where they hold NaN: since Python 3.13 such records are not."""
    if dataclasses.is_dataclass(value):
        return {one.name: plain(getattr(value, one.name)) for one in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(plain(one) for one in value)
    return "NaN" if isinstance(value, float) and math.isnan(value) else value


# Any text that a column can hold, any float at all, any integer of 63 bits.
texts = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=12)
floats = st.floats()
counts = st.integers(0, 2**63 - 1)
shares = st.floats(0, 1) | st.just(NAN)
by_recipe = st.sampled_from((*DEFAULT_RECIPES, "somebody's own"))

any_error = st.builds(
    ProductError,
    **dict.fromkeys(("row_error", "row_error_p99", "relative_error", "sqnr_db", "mere"), floats),
    **dict.fromkeys(("rows", "zero_rows", "bad_rows"), counts),
)
any_operand = st.builds(
    OperandRecord,
    role=st.sampled_from(ROLES),
    **dict.fromkeys(("amax", "rms", "zeros"), floats),
    **dict.fromkeys(("nan", "inf", "elements"), counts),
    **dict.fromkeys(("underflow", "saturation"), st.dictionaries(by_recipe, shares, max_size=3)),
)
any_product = st.builds(
    ProductRecord,
    product=st.sampled_from(PASSES),
    **dict.fromkeys(("site", "op", "dtype", "parameter", "unmeasured"), texts),
    **dict.fromkeys(("batch", "m", "n", "k", "calls"), counts),
    operands=st.lists(any_operand, max_size=3).map(tuple),
    errors=st.dictionaries(by_recipe, any_error, max_size=3),
)
any_step = st.builds(StepRecord, step=counts, products=st.lists(any_product, max_size=3).map(tuple))
any_timing = st.builds(
    Timing,
    product=st.sampled_from(PASSES),
    device=st.just("cpu"),
    **dict.fromkeys(("kernel", "dtype", "values", "created"), texts),
    **dict.fromkeys(("batch", "m", "n", "k", "repetitions"), counts),
    **dict.fromkeys(("median_us", "spread_us"), floats),
)
any_info = st.builds(
    RunInfo,
    environment=st.builds(Environment, **dict.fromkeys(("device", "torch", "python", "loka"), texts)),
    fingerprint=st.dictionaries(texts, st.lists(counts, max_size=3).map(tuple), max_size=3),
    recipes=st.lists(texts, max_size=3).map(tuple),
    overhead_budget=floats,
    **dict.fromkeys(("created", "model"), texts),
    **dict.fromkeys(("every", "world_size"), counts),
)
any_progress = st.builds(
    RunProgress,
    status=st.sampled_from(("complete", "failed", "detached", "incomplete")),
    weights_changed=st.booleans(),
    reason=texts,
    **dict.fromkeys(("wall_s", "probe_s"), floats),
    **dict.fromkeys(("steps", "sampled_steps", "skipped_samples", "unattributed"), counts),
)
