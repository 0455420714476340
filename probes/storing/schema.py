"""The tables of a probe database.

Portable SQL, schema 3. Keys are integers and everything a sampled step holds is clustered by that step, so a run is
read back by a few range scans. Names are stored once per run (`products`) or once per database (`recipes`).

    meta             application = "loka", schema = "3"
    runs             one row per run: what was known at its start, its running totals, the process that writes it
    products         one row per distinct (site, pass, op, dtype, parameter, unmeasured) of a run
    steps            one row per sampled step and rank
    samples          one row per product of a step, at `position` of the step
    operands         one row per operand of a sample, at `slot` of the sample
    operand_recipes  underflow and saturation shares of an operand per recipe
    errors           the errors of a sample per recipe
    impacts          what a sample's errors do to the loss, per recipe, on the steps that took it
    parts            one row per distinct bias, norm and Swish of a run, and which sites it feeds
    dynamics         one row per part of a step: sizes of biases, statistics of inputs
    distributions    what was learned of a product's operands so far, as .npz of plain arrays; rewritten as it grows
    events           what happened to the run
    timings          measured kernel times, of no particular run

Schema 2 had neither `parts` nor `dynamics`. It is read as a run without them, and gets them when it is next written.

Floats: infinities are kept. SQLite stores NaN as NULL, so NULL is read back as NaN in every float column.
"""

from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
)

SCHEMA_VERSION: Final[int] = 3
# The oldest schema that is read: it lacks tables, and has none that differs.
OLDEST_VERSION: Final[int] = 2
APPLICATION: Final[str] = "loka"
# "LoKA" in the header of an SQLite file: says whose it is without reading a table.
APPLICATION_ID: Final[int] = 0x4C6F4B41
# A share that was not measured. Shares lie in 0..1 and NULL already means NaN.
ABSENT: Final[float] = -1.0

metadata = MetaData()

# SQLite counts rows by itself only in a column that is exactly INTEGER, which is 64 bits wide there.
_KEY: Final = BigInteger().with_variant(Integer(), "sqlite")


class _Bytes(LargeBinary):
    """Bytes, as they are: SQLAlchemy would make a million zeros of the number of a million, in a damaged file."""

    def result_processor(self, dialect: Any, coltype: Any) -> None:
        """Leave what is read to be checked."""


class _Flag(Boolean):
    """Truth, as it is stored."""

    def result_processor(self, dialect: Any, coltype: Any) -> None:
        """Leave what is read to be checked."""


def _text(name: str) -> Column[str]:
    return Column(name, Text, nullable=False)


def _integer(name: str) -> Column[int]:
    return Column(name, BigInteger, nullable=False)


def _real(name: str) -> Column[float]:
    return Column(name, Double, nullable=True)


def _own_key() -> Column[int]:
    return Column("number", _KEY, primary_key=True)


def _key_of(name: str, target: str, *, primary: bool = False) -> Column[int]:
    return Column(name, _KEY, ForeignKey(target), primary_key=primary, nullable=False, autoincrement=False)


def _place(name: str) -> Column[int]:
    return Column(name, _KEY, primary_key=True, nullable=False, autoincrement=False)


meta = Table("meta", metadata, Column("key", Text, primary_key=True), _text("value"))

runs = Table(
    "runs",
    metadata,
    _own_key(),
    Column("id", Text, nullable=False, unique=True),
    *(_text(name) for name in ("created", "device", "torch", "python", "loka", "model", "fingerprint", "recipes")),
    *(_integer(name) for name in ("every", "world_size")),
    _real("overhead_budget"),
    # RunProgress
    *(_integer(name) for name in ("steps", "sampled_steps", "skipped_samples", "unattributed")),
    *(_real(name) for name in ("wall_s", "probe_s")),
    Column("weights_changed", _Flag, nullable=False),
    *(_text(name) for name in ("status", "reason")),
    # The process that writes the run, and when it last did.
    *(_text(name) for name in ("last_write", "host", "process_start")),
    _integer("pid"),
)

products = Table(
    "products",
    metadata,
    _own_key(),
    _key_of("run", "runs.number"),
    *(_text(name) for name in ("site", "product", "op", "dtype", "parameter", "unmeasured")),
    Index("products_by_run", "run"),
)

recipes = Table("recipes", metadata, _own_key(), Column("name", Text, nullable=False, unique=True))

steps = Table(
    "steps",
    metadata,
    _own_key(),
    _key_of("run", "runs.number"),
    *(_integer(name) for name in ("step", "rank")),
    _real("loss"),
    _text("labels"),
    Index("steps_by_run", "run", "step"),
)

samples = Table(
    "samples",
    metadata,
    _key_of("step", "steps.number", primary=True),
    _place("position"),
    _key_of("product", "products.number"),
    *(_integer(name) for name in ("batch", "m", "n", "k", "calls")),
    _real("alignment"),
    sqlite_with_rowid=False,
)

operands = Table(
    "operands",
    metadata,
    *(_place(name) for name in ("step", "position", "slot")),
    _text("role"),
    *(_real(name) for name in ("amax", "rms", "zeros")),
    *(_integer(name) for name in ("nan", "inf", "elements")),
    ForeignKeyConstraint(["step", "position"], ["samples.step", "samples.position"]),
    sqlite_with_rowid=False,
)

operand_recipes = Table(
    "operand_recipes",
    metadata,
    *(_place(name) for name in ("step", "position", "slot")),
    _key_of("recipe", "recipes.number", primary=True),
    *(_real(name) for name in ("underflow", "saturation")),
    ForeignKeyConstraint(["step", "position", "slot"], ["operands.step", "operands.position", "operands.slot"]),
    sqlite_with_rowid=False,
)

# The float and the integer fields of ProductError.
METRICS: Final[tuple[str, ...]] = ("row_error", "row_error_p99", "relative_error", "sqnr_db", "mere", "bias")
COUNTS: Final[tuple[str, ...]] = ("rows", "zero_rows", "bad_rows")

errors = Table(
    "errors",
    metadata,
    *(_place(name) for name in ("step", "position")),
    _key_of("recipe", "recipes.number", primary=True),
    *(_real(name) for name in METRICS),
    *(_integer(name) for name in COUNTS),
    ForeignKeyConstraint(["step", "position"], ["samples.step", "samples.position"]),
    sqlite_with_rowid=False,
)

IMPACTS: Final[tuple[str, ...]] = ("kl", "first_order", "spread")

impacts = Table(
    "impacts",
    metadata,
    *(_place(name) for name in ("step", "position")),
    _key_of("recipe", "recipes.number", primary=True),
    *(_real(name) for name in IMPACTS),
    ForeignKeyConstraint(["step", "position"], ["samples.step", "samples.position"]),
    sqlite_with_rowid=False,
)

# The float fields of DynamicsRecord.
DYNAMICS: Final[tuple[str, ...]] = (
    *("norm", "amax", "cancellation", "crest", "stretched", "output_crest", "underflow", "hard_underflow"),
)

parts = Table(
    "parts",
    metadata,
    _own_key(),
    _key_of("run", "runs.number"),
    *(_text(name) for name in ("name", "kind", "module", "parameters", "feeds")),
    Index("parts_by_run", "run"),
)

dynamics = Table(
    "dynamics",
    metadata,
    _key_of("step", "steps.number", primary=True),
    _place("position"),
    _key_of("part", "parts.number"),
    *(_real(name) for name in DYNAMICS),
    sqlite_with_rowid=False,
)

distributions = Table(
    "distributions",
    metadata,
    _own_key(),
    _key_of("run", "runs.number"),
    *(_text(name) for name in ("site", "product", "kind")),
    *(_integer(name) for name in ("samples", "step")),
    Column("data", _Bytes, nullable=False),
    Index("distributions_by_run", "run", "site", "product", "kind", unique=True),
)

events = Table(
    "events",
    metadata,
    _own_key(),
    _key_of("run", "runs.number"),
    _integer("step"),
    *(_text(name) for name in ("kind", "message")),
    Index("events_by_run", "run"),
)

timings = Table(
    "timings",
    metadata,
    _own_key(),
    *(_text(name) for name in ("kernel", "product", "dtype", "device", "values", "created")),
    *(_integer(name) for name in ("batch", "m", "n", "k", "repetitions")),
    *(_real(name) for name in ("median_us", "spread_us")),
    Index("timings_by_device", "device"),
)
