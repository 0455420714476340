"""The probe database: opening it without harming what is there, and reading back what was written.

SQLite by default (a path), PostgreSQL by URL; the same schema. A file is ours when its header says so, which is read
before SQLite may touch it: a text file or somebody else's database is refused byte for byte as it was. SQLite runs in
WAL mode, so reports read while a training run writes. One transaction holds one sampled step, so a killed run keeps
every step but the one in flight; its row still says "running", and is read back as "incomplete" once the process that
wrote it is gone.
"""

import dataclasses
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sqlalchemy import URL, Connection, Engine, Select, func, insert, inspect, make_url, select, text, update
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from loka.errors import DatabaseError, EvidenceError, nearest
from loka.formats import Pass
from loka.probes.records import Event, LearnedRecord, RunInfo, RunProgress, StepRecord, Timing
from loka.probes.storing import rows, schema
from loka.probes.storing.checked import DamagedError, Row, checked, checked_rows
from loka.probes.storing.process import Process, is_gone
from loka.probes.storing.server import server_engine, shown, shown_text
from loka.probes.storing.sqlite_file import WRITE, explain, file_engine, is_ours

# The columns of a LearnedRecord.
_LEARNED: Final[tuple[str, ...]] = ("site", "product", "kind", "samples", "step", "data")


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredRun:
    """One run as it stands in the database. A "running" run whose process is gone has the status "incomplete"."""

    info: RunInfo
    progress: RunProgress
    events: tuple[Event, ...]
    last_write: str  # ISO 8601, UTC
    process: Process
    number: int  # its key in the database


def resolve_url(db: str | os.PathLike[str]) -> URL:
    """Return the URL behind a path or a URL; raise DatabaseError for a kind of database that LoKA cannot use."""
    if not isinstance(db, (str, os.PathLike)):
        raise DatabaseError(f"db={db!r} is neither a path nor a database URL. Write e.g. db='run.db'.")
    spelled = os.fspath(db)
    if "://" not in spelled:
        if spelled in ("", ":memory:"):
            raise DatabaseError(f"db={spelled!r} names no file, and a probe database is one. Write e.g. db='run.db'.")
        return URL.create("sqlite", database=str(Path(spelled).expanduser().absolute()))
    try:
        url = make_url(spelled)
    except (ArgumentError, ValueError) as error:
        raise _no_url(spelled) from error
    if "@" in (url.database or "") and "@" in spelled.partition("://")[2].partition("@")[2]:
        raise _no_url(spelled)  # an @ or a / in a password: its end would be taken for a name, and shown
    kind = url.get_backend_name()
    if kind == "sqlite":
        if url.drivername not in ("sqlite", "sqlite+pysqlite") or url.query:
            raise DatabaseError(
                f"{shown_text(spelled)!r}: an SQLite database is given by its path alone. Write e.g. run.db."
            )
        return resolve_url(url.database or "")
    if kind != "postgresql":
        raise DatabaseError(
            f"A probe database cannot live in {kind!r}. It is an SQLite file, e.g. run.db, or a PostgreSQL database, "
            "e.g. postgresql+psycopg://host/name."
        )
    return url.set(drivername="postgresql+psycopg") if url.drivername == "postgresql" else url


def _no_url(spelled: str) -> DatabaseError:
    # Not with the reason, which can quote a part of the password.
    return DatabaseError(
        f"{shown_text(spelled)!r} is not a database URL. Write a path, e.g. run.db, or "
        "postgresql+psycopg://user:password@host/name, with %40 for an @ in the password, %2F for a / and so on."
    )


@contextmanager
def transaction(engine: Engine, *, write: bool = False) -> Iterator[Connection]:
    """Open one transaction: a consistent view, or one write. Raise DatabaseError, in words, when the database fails."""
    try:
        with writable(engine, write).begin() as connection:
            yield connection
    except (SQLAlchemyError, DamagedError, UnicodeDecodeError, engine.dialect.loaded_dbapi.Error) as error:
        verb = "written" if write else "read"
        raise DatabaseError(f"The probe database {place(engine)} cannot be {verb}: {explain(error)}.") from error


def writable(engine: Engine, write: bool = True) -> Engine:
    """Return the engine with transactions that take the write lock as they begin, so that none fails half-way."""
    return engine.execution_options(**{WRITE: write})


def take_turns(connection: Connection) -> None:
    """Wait until no other writer makes tables or shared names, until this transaction ends. SQLite has one writer."""
    if not _is_file(connection.engine.url):
        connection.execute(select(func.pg_advisory_xact_lock(schema.APPLICATION_ID)))


def place(engine: Engine) -> str:
    """Return the path or the URL without its password."""
    return engine.url.database or "" if _is_file(engine.url) else shown(engine.url)


def open_database(db: str | os.PathLike[str], *, create: bool) -> Engine:
    """Open a probe database; with `create`, for writing, and made if it does not exist.

    A file that cannot be written is still opened without `create`. Nothing that was there is changed; a database of
    an older schema gets the tables it lacks when it is opened for writing. Raises DatabaseError.
    """
    url = resolve_url(db)
    if _is_file(url):
        path = Path(url.database or "")
        _check_path(path, create)
        return _created_file(path) if create else _existing_file(path)
    engine = server_engine(url)
    with transaction(engine, write=create) as connection:
        if create:
            take_turns(connection)
        _check_schema(connection, create)
    return engine


def _is_file(url: URL) -> bool:
    return url.get_backend_name() == "sqlite"


def _check_path(path: Path, create: bool) -> None:
    """Refuse what is not ours before SQLite touches it."""
    if path.is_dir():
        raise DatabaseError(f"{path} is a folder. Name a file in it, e.g. {path / 'run.db'}.")
    if not path.parent.is_dir():
        raise DatabaseError(
            f"{path} cannot be opened: there is no folder {path.parent}. Make it with `mkdir -p {path.parent}`, or use "
            "a folder that exists."
        )
    if not path.exists():
        if create:
            return
        beside = [entry.name for entry in path.parent.iterdir() if entry.is_file()]
        raise DatabaseError(
            f"There is no probe database {path}.{nearest(path.name, beside)} Put `with loka.probe(model, db=...)` "
            "around a training loop to write one."
        )
    if not path.is_file():
        raise DatabaseError(f"{path} is neither a file nor a folder. Name a file, e.g. run.db.")
    if not is_ours(path, empty_is=create):
        size = path.stat().st_size
        what = "is not a LoKA probe database" if size else "is empty: it holds no run"
        wanted = "a probe database, or a file that does not exist" if create else "one that loka.probe has written"
        raise DatabaseError(f"{path} {what}, and was left as it was. Name {wanted}.")


def _created_file(path: Path) -> Engine:
    with transaction(file_engine(path, "mode=rwc"), write=True) as connection:
        _check_schema(connection, create=True)
    engine = file_engine(path, "mode=rw")  # a file deleted from here on must not come back empty
    try:
        for _ in range(50):  # somebody else may be looking at a file this new
            with closing(engine.raw_connection()) as raw:
                try:
                    raw.cursor().execute("PRAGMA journal_mode = WAL")
                    break
                except sqlite3.OperationalError as error:
                    if not error.sqlite_errorname.startswith("SQLITE_BUSY"):
                        raise
            time.sleep(0.02)
    except (SQLAlchemyError, sqlite3.Error) as error:
        raise DatabaseError(f"The probe database {path} cannot be written: {explain(error)}.") from error
    return engine


def _existing_file(path: Path) -> Engine:
    """Open for reading, and for writing where the system permits it."""
    try:
        return _checked(file_engine(path, "mode=rw"))
    except DatabaseError as error:
        reason = getattr(getattr(error.__cause__, "orig", None), "sqlite_errorname", "")
        # WAL needs to write beside the file even to read it, unless it is told that nobody writes.
        if not reason.startswith(("SQLITE_CANTOPEN", "SQLITE_READONLY")):
            raise
        log = path.with_name(path.name + "-wal")
        if log.exists() and log.stat().st_size:
            raise DatabaseError(
                f"{path} cannot be read where it is: {log.name} holds steps that are not in it yet, and the folder is "
                "read-only. Copy both files to a folder that can be written."
            ) from error
        return _checked(file_engine(path, "mode=ro&immutable=1"))


def _checked(engine: Engine) -> Engine:
    with transaction(engine) as connection:
        _check_schema(connection, create=False)
    return engine


def _check_schema(connection: Connection, create: bool) -> None:
    """Make the tables in an empty database, check them in any other."""
    engine = connection.engine
    tables = set(inspect(connection).get_table_names())
    if create and tables.isdisjoint(schema.metadata.tables) and not (tables and _is_file(engine.url)):
        schema.metadata.create_all(connection)
        identity = {"application": schema.APPLICATION, "schema": str(schema.SCHEMA_VERSION)}
        connection.execute(insert(schema.meta), [{"key": key, "value": value} for key, value in identity.items()])
        if _is_file(engine.url):
            connection.execute(text(f"PRAGMA application_id = {schema.APPLICATION_ID}"))
        return
    known = {}
    if "meta" in tables and {"key", "value"} <= {column["name"] for column in inspect(connection).get_columns("meta")}:
        known = {row.key: row.value for row in connection.execute(select(schema.meta))}
    if known.get("application") != schema.APPLICATION or not known.get("schema", "").isdigit():
        raise DatabaseError(
            f"{place(engine)} is not a LoKA probe database, and was left as it was. Name a probe database, or "
            "a place that is empty."
        )
    version = int(known["schema"])
    if not schema.OLDEST_VERSION <= version <= schema.SCHEMA_VERSION:
        raise DatabaseError(
            f"{place(engine)} has schema {version}, this LoKA reads schema {schema.OLDEST_VERSION} to "
            f"{schema.SCHEMA_VERSION}. Read it with the LoKA that wrote it, or probe again into a new file."
        )
    if create and version < schema.SCHEMA_VERSION:
        schema.metadata.create_all(connection)  # adds the tables that it lacks, and touches no other
        here = schema.meta.c.key == "schema"
        connection.execute(update(schema.meta).where(here).values(value=str(schema.SCHEMA_VERSION)))


def has_dynamics(connection: Connection) -> bool:
    """Whether the database has the tables of training dynamics: one of schema 2 that is only read has not."""
    return {schema.parts.name, schema.dynamics.name} <= set(inspect(connection).get_table_names())


def list_runs(engine: Engine) -> tuple[StoredRun, ...]:
    """Return every run, in the order in which they were started."""
    with transaction(engine) as connection:
        found = connection.execute(select(schema.runs).order_by(schema.runs.c.number)).mappings().all()
        return tuple(_stored_run(connection, row) for row in found)


def read_run(engine: Engine, run_id: str | None = None) -> StoredRun:
    """Return the run of this id, or of the only id that starts like it; by default the latest. Raises EvidenceError."""
    with transaction(engine) as connection:
        return find_run(connection, run_id)


def find_run(connection: Connection, run_id: str | None) -> StoredRun:
    """As `read_run`, inside a transaction that goes on."""
    wanted = _matching(connection, run_id)
    row = connection.execute(select(schema.runs).where(schema.runs.c.id == wanted)).mappings().one()
    return _stored_run(connection, row)


def _matching(connection: Connection, run_id: str | None) -> str:
    known = connection.execute(select(schema.runs.c.id).order_by(schema.runs.c.number)).scalars().all()
    return _match(known, run_id, place(connection.engine))


def _match(known: Sequence[str], run_id: str | None, where: str) -> str:
    if not known:
        raise EvidenceError(
            f"{where} holds no run. `with loka.probe(model, db=...)` around a training loop writes one."
        )
    if run_id is None:
        return known[-1]
    if run_id in known:
        return run_id
    matches = [name for name in known if name.startswith(run_id)]
    if len(matches) == 1:
        return matches[0]
    listed = ", ".join((matches or known)[-10:])
    problem = "is the beginning of more than one run" if matches else "is no run"
    raise EvidenceError(
        f"{run_id!r} {problem} in {where}. {len(matches or known)} to choose from, latest last: {listed}."
    )


def _stored_run(connection: Connection, row: Row) -> StoredRun:
    events = schema.events
    checked(schema.runs, row)
    found = connection.execute(select(events).where(events.c.run == row["number"]).order_by(events.c.number))
    process = Process(host=row["host"], pid=row["pid"], start=row["process_start"])
    progress = rows.run_progress(row)
    if progress.status == "running" and is_gone(process):
        kept = connection.scalar(
            select(func.count()).select_from(schema.steps).where(schema.steps.c.run == row["number"])
        )
        reason = f"the process ended without closing the run; {kept} of its sampled steps are here"
        progress = dataclasses.replace(progress, status="incomplete", reason=reason)
    return StoredRun(
        info=rows.run_info(row),
        progress=progress,
        events=tuple(_event(checked(events, one)) for one in found.mappings()),
        last_write=row["last_write"],
        process=process,
        number=row["number"],
    )


def _event(row: Row) -> Event:
    return Event(step=row["step"], kind=row["kind"], message=row["message"])


def read_steps(engine: Engine, run_id: str | None = None) -> Iterator[StepRecord]:
    """Yield every sampled step of a run, oldest first, one at a time. Raises EvidenceError at once."""
    run = read_run(engine, run_id)
    return _steps(engine, run.number)


def _steps(engine: Engine, run: int) -> Iterator[StepRecord]:
    steps, products = schema.steps, schema.products
    with transaction(engine) as connection:
        names = rows.recipe_names(connection)
        query = select(products).where(products.c.run == run)
        static = {row["number"]: checked(products, row) for row in connection.execute(query).mappings()}
        query = select(steps).where(steps.c.run == run).order_by(steps.c.step, steps.c.rank, steps.c.number)
        dynamic = has_dynamics(connection)
        for row in [checked(steps, row) for row in connection.execute(query).mappings()]:
            yield StepRecord(
                step=row["step"],
                rank=row["rank"],
                products=rows.step_products(connection, row["number"], static, names),
                loss=rows.number(row["loss"]),
                labels=row["labels"],
                dynamics=rows.step_dynamics(connection, row["number"]) if dynamic else (),
            )


def read_learned(
    engine: Engine, run_id: str | None = None, *, kind: str | None = None, site: str | None = None
) -> tuple[LearnedRecord, ...]:
    """Return what a run has learned, all or one kind or site, in the order in which it was first written."""
    table = schema.distributions
    with transaction(engine) as connection:
        query = _learned(connection, run_id, _LEARNED)
        for column, wanted in ((table.c.kind, kind), (table.c.site, site)):
            query = query if wanted is None else query.where(column == wanted)
        return tuple(LearnedRecord(**checked(table, row)) for row in connection.execute(query).mappings())


def learned_parts(
    engine: Engine, run_id: str | None, *, kind: str, products: Sequence[Pass], size: int
) -> Iterator[tuple[LearnedRecord, ...]]:
    """Yield what a run has learned of one kind about some passes, at most `size` records at a time: it may be much."""
    table = schema.distributions
    with transaction(engine) as connection:
        query = _learned(connection, run_id, ("number",))
        keys = connection.scalars(query.where(table.c.kind == kind, table.c.product.in_(products))).all()
        part = select(*(table.c[name] for name in _LEARNED)).order_by(table.c.number)
        for at in range(0, len(keys), size):  # by their keys: a query for all of them would have to sort the data too
            found = connection.execute(part.where(table.c.number.in_(keys[at : at + size])))
            yield tuple(LearnedRecord(**row) for row in checked_rows(table, found))


def learned_kinds(engine: Engine, run_id: str | None, product: Pass) -> frozenset[tuple[str, str]]:
    """Return the (site, kind) of everything that a run has learned of one pass, without reading it."""
    table = schema.distributions
    with transaction(engine) as connection:
        query = _learned(connection, run_id, ("site", "kind")).where(table.c.product == product)
        found = [checked(table, row) for row in connection.execute(query).mappings()]
    return frozenset((row["site"], row["kind"]) for row in found)


def _learned(connection: Connection, run_id: str | None, names: Sequence[str]) -> Select[Any]:
    """Return the query for some columns of what a run has learned, in the order in which it was first written."""
    table, runs = schema.distributions, schema.runs.c
    run = select(runs.number).where(runs.id == _matching(connection, run_id)).scalar_subquery()
    return select(*(table.c[name] for name in names)).where(table.c.run == run).order_by(table.c.number)


def write_timings(engine: Engine, timings: Iterable[Timing]) -> None:
    """Add measured times. Raises DatabaseError."""
    new = [rows.timing_row(timing) for timing in timings]
    if new:
        with transaction(engine, write=True) as connection:
            connection.execute(insert(schema.timings), new)


def read_timings(engine: Engine, device: str) -> tuple[Timing, ...]:
    """Return every time measured on a device, oldest first: a later one of the same kernel and shape supersedes."""
    timings = schema.timings
    with transaction(engine) as connection:
        found = connection.execute(select(timings).where(timings.c.device == device).order_by(timings.c.number))
        return tuple(rows.timing(row) for row in found.mappings())
