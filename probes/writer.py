"""Writing a run while it trains: a thread of its own holds the only connection, the training thread hands it records.

Training comes first. After construction nothing here raises and nothing waits for long: when the database cannot keep
up, steps are dropped and counted; when it fails (disk full, file deleted, locked for good), the reason is kept in
`failure` and further records are discarded. One transaction holds one sampled step with the running totals, so what was
committed is whole and stays readable, `kill -9` included.
"""

import dataclasses
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from operator import itemgetter
from os import PathLike
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection, CursorResult, Engine, Table, insert, select, update
from sqlalchemy.exc import IntegrityError, OperationalError, SQLAlchemyError

from loka.errors import DatabaseError
from loka.probes import rows, schema
from loka.probes.database import open_database, place, take_turns, transaction, writable
from loka.probes.process import this_process
from loka.probes.records import Event, LearnedRecord, RunInfo, RunProgress, StepRecord
from loka.probes.sqlite_file import explain, identity, is_busy

logger = logging.getLogger("loka.probes")

# Products that may wait in memory, about 4 KiB each with four recipes.
CAPACITY: Final[int] = 8192
_BYTES_PER_PRODUCT: Final[int] = 4096
# How long a full queue may hold up the training thread, once per stall.
_STALL_S: Final[float] = 0.5
# How long a locked database is tried again before the writer gives up.
PATIENCE_S: Final[float] = 60.0
_DELETED: Final = "the file was deleted or replaced during the run; leave it in place"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    """What goes into one transaction."""

    step: StepRecord | None = None
    progress: RunProgress | None = None
    event: Event | None = None
    learned: tuple[LearnedRecord, ...] = ()

    @property
    def weight(self) -> int:
        """Its share of CAPACITY."""
        learned = sum(len(one.data) for one in self.learned) // _BYTES_PER_PRODUCT
        return 1 + (len(self.step.products) if self.step else 0) + learned


class RunWriter:
    """Records one run. Opens or makes the database at once, so that a bad path raises DatabaseError in the caller.

    `capacity` bounds the products that wait to be written; `patience_s` is how long a locked database is tried again.
    `joins` is the id of a run of that database: where it is there, no run begins, events are added to that one, and its
    totals stay as they are.
    """

    def __init__(
        self,
        db: str | PathLike[str],
        info: RunInfo,
        *,
        capacity: int = CAPACITY,
        patience_s: float = PATIENCE_S,
        joins: str = "",
    ) -> None:
        self.rank: int | None = None  # alone
        self._engine = open_database(db, create=True)
        self._place = place(self._engine)
        joined = _run_of(self._engine, joins) if joins else None
        self._joins = joined is not None
        self._run = joined if joined is not None else _start_run(self._engine, info, self._place)
        self._file = _file_of(self._engine)
        self._patience_s = patience_s
        self._capacity = capacity
        self._entries: deque[_Entry] = deque()
        self._waiting = 0  # sum of the weights in _entries
        self._changed = threading.Condition()
        self._closing = False
        self._stalled = False
        self._dropped = 0
        self._written = 0
        self._failure: str | None = None
        self._products: dict[tuple[str, ...], int] = {}
        self._recipes: dict[str, int] = {}
        self._parts: dict[tuple[str, ...], int] = {}
        self._thread = threading.Thread(target=self._work, name="loka-probe-writer", daemon=True)
        self._thread.start()

    @property
    def failure(self) -> str | None:
        """Why nothing more is recorded, in one paragraph; None while all is well."""
        return self._failure

    @property
    def dropped(self) -> int:
        """Sampled steps left out because the database could not keep up."""
        return self._dropped

    def write(self, step: StepRecord, progress: RunProgress) -> None:
        """Hand over a sampled step and the running totals."""
        if not self._offer(_Entry(step=step, progress=progress)):
            self._dropped += 1

    def learned(self, records: Iterable[LearnedRecord], *, final: bool) -> bool:
        """Hand over what the run has learned; each replaces what was kept of it before. Says whether it was taken."""
        taken = [self._offer(_Entry(learned=(record,))) for record in records]
        return all(taken)

    def event(self, event: Event) -> None:
        """Hand over something that happened. Events are few and small, so they are never left out."""
        with self._changed:
            if not self._is_over():
                self._put(_Entry(event=event))

    def finish(self, progress: RunProgress, timeout: float = 30.0) -> None:
        """Write the final totals, wait at most `timeout` seconds for everything to be written, and close."""
        with self._changed:
            if self._closing:
                return
            if self._dropped:
                message = (
                    f"{self._dropped} sampled steps were not recorded: the database could not keep up. "
                    "Sample rarer, or use a faster disk."
                )
                self._put(_Entry(event=Event(step=progress.steps, kind="dropped", message=message)))
                progress = dataclasses.replace(progress, reason=" ".join(filter(None, (progress.reason, message))))
            self._put(_Entry(progress=None if self._joins else progress))
            self._closing = True
        self._thread.join(timeout)
        if self._thread.is_alive():
            self._fail(f"it did not take the last {len(self._entries) + 1} entries within {timeout:g} s")

    def _offer(self, entry: _Entry) -> bool:
        """Queue an entry; return whether it was accepted, or is not missed because nothing is recorded any more."""
        with self._changed:
            patience = 0.0 if self._stalled else _STALL_S
            fits = self._changed.wait_for(lambda: self._has_room(entry) or self._is_over(), patience)
            if self._is_over():
                return True
            self._stalled = not fits
            if fits:
                self._put(entry)
            return fits

    def _put(self, entry: _Entry) -> None:
        self._entries.append(entry)
        self._waiting += entry.weight
        self._changed.notify_all()

    def _has_room(self, entry: _Entry) -> bool:
        return not self._entries or self._waiting + entry.weight <= self._capacity

    def _is_over(self) -> bool:
        return self._closing or self._failure is not None

    def _fail(self, reason: str) -> None:
        with self._changed:
            if self._failure is None:
                self._failure = (
                    f"The probe stopped recording into {self._place}: {reason}. Training goes on. "
                    f"{self._written} sampled steps were written before. Put that right and probe again."
                )
                logger.info(self._failure)  # whoever owns the run warns the user
            self._entries.clear()
            self._changed.notify_all()

    def _work(self) -> None:
        """Write what is handed over until told to finish; the body of the thread."""
        complete = False
        try:
            with writable(self._engine).connect() as connection:
                while (entry := self._next()) is not None:
                    self._commit(connection, entry)
            complete = True
        except SQLAlchemyError as error:
            self._fail(explain(error) if _file_of(self._engine) == self._file else _DELETED)
        except DatabaseError as error:
            self._fail(str(error))
        finally:
            # Anything else is a defect: the thread's own report has the traceback, the run still learns of it.
            if not complete and self._failure is None:
                self._fail(f"the writer met an unforeseen {sys.exception()!r}; please report it")
            self._engine.dispose()

    def _next(self) -> _Entry | None:
        with self._changed:
            self._changed.wait_for(lambda: self._entries or self._closing or self._failure is not None)
            if self._failure is not None or not self._entries:
                return None
            entry = self._entries.popleft()
            self._waiting -= entry.weight
            self._changed.notify_all()
            return entry

    def _commit(self, connection: Connection, entry: _Entry) -> None:
        """Write one entry in one transaction, trying again while another process holds the lock."""
        give_up = time.monotonic() + self._patience_s
        while True:
            if _file_of(self._engine) != self._file:
                raise DatabaseError(_DELETED)
            try:
                with connection.begin():
                    self._insert(connection, entry)
                break
            except OperationalError as error:
                # Keys learned in a transaction that was rolled back are keys of nothing.
                self._products.clear()
                self._recipes.clear()
                self._parts.clear()
                if not is_busy(error) or time.monotonic() > give_up:
                    raise
        self._written += entry.step is not None

    def _insert(self, connection: Connection, entry: _Entry) -> None:
        if entry.step is not None:
            self._learn(connection, entry.step)
            step = {name: getattr(entry.step, name) for name in ("step", "rank", "loss", "labels")}
            new = connection.execute(insert(schema.steps).values(run=self._run, **step))
            key = _key_of(new)
            for table, found in rows.step_rows(key, entry.step, self._products, self._recipes):
                _insert_many(connection, table, found)
            if found := rows.dynamics_rows(key, entry.step, self._parts):
                _insert_many(connection, schema.dynamics, found)
        for record in entry.learned:
            self._replace(connection, record)
        if entry.event is not None:
            connection.execute(insert(schema.events), rows.event_row(self._run, entry.event))
        totals = rows.progress_row(entry.progress) if entry.progress else {}
        table = schema.runs
        connection.execute(update(table).where(table.c.number == self._run).values(last_write=_now(), **totals))

    def _replace(self, connection: Connection, record: LearnedRecord) -> None:
        table = schema.distributions.c
        which = {"run": self._run, "site": record.site, "product": record.product, "kind": record.kind}
        known = [table[name] == value for name, value in which.items()]
        new = {"samples": record.samples, "step": record.step, "data": record.data}
        if not connection.execute(update(schema.distributions).where(*known).values(**new)).rowcount:
            connection.execute(insert(schema.distributions).values(**which, **new))

    def _learn(self, connection: Connection, step: StepRecord) -> None:
        """Make sure that every name in the step has its key."""
        recipes = schema.recipes
        self._learn_keys(connection, schema.products, self._products, map(rows.static_key, step.products))
        self._learn_keys(connection, schema.parts, self._parts, map(rows.part_key, step.dynamics))
        names = rows.recipe_names(step)
        if not names <= self._recipes.keys():
            take_turns(connection)
            named = select(recipes.c.name, recipes.c.number)
            missing = sorted(names - {name for name, _ in connection.execute(named)})
            if missing:
                connection.execute(insert(recipes), [{"name": name} for name in missing])
            self._recipes.update((name, number) for name, number in connection.execute(named))

    def _learn_keys(
        self, connection: Connection, table: Table, known: dict[tuple[str, ...], int], wanted: Iterable[tuple[str, ...]]
    ) -> None:
        """Make sure that each of these has its row in a table of the run's names, and its key in `known`."""
        unknown = [key for key in dict.fromkeys(wanted) if key not in known]
        if unknown:
            fields = rows.KEY_FIELDS[table.name]
            connection.execute(
                insert(table), [{"run": self._run, **dict(zip(fields, key, strict=True))} for key in unknown]
            )
            columns = [table.c[name] for name in fields]
            found = connection.execute(select(table.c.number, *columns).where(table.c.run == self._run))
            known.update((tuple(row[1:]), row[0]) for row in found)


def _start_run(engine: Engine, info: RunInfo, where: str) -> int:
    """Write the row of a new run and return its key."""
    process = this_process()
    start = RunProgress(
        steps=0, sampled_steps=0, skipped_samples=0, wall_s=0.0, probe_s=0.0, unattributed=0, weights_changed=False
    )
    values = {
        **rows.run_row(info),
        **rows.progress_row(start),
        **{"last_write": _now(), "host": process.host, "pid": process.pid, "process_start": process.start},
    }
    with transaction(engine, write=True) as connection:
        try:
            return _key_of(connection.execute(insert(schema.runs).values(**values)))
        except IntegrityError as error:
            raise DatabaseError(
                f"{where} already holds a run {info.id}. Leave `id` out of RunInfo to get a new one."
            ) from error


def _run_of(engine: Engine, run: str) -> int | None:
    """Return the key of the run with this id; None where the database has none."""
    with transaction(engine) as connection:
        found = connection.execute(select(schema.runs.c.number).where(schema.runs.c.id == run)).scalar()
    return None if found is None else int(found)


def _insert_many(connection: Connection, table: Table, found: list[dict[str, Any]]) -> None:
    """Insert rows of equal columns: compiled once, handed to the driver as they are.

    `connection.execute` prepares every row by itself, which is two thirds of its time and holds up the training thread.
    """
    statement = insert(table).compile(dialect=connection.dialect, column_keys=list(found[0]))
    order = statement.positiontup
    connection.exec_driver_sql(str(statement), found if order is None else list(map(itemgetter(*order), found)))


def _key_of(inserted: CursorResult[Any]) -> int:
    key = inserted.inserted_primary_key
    assert key is not None, "every table counted by the database returns its key"
    return int(key[0])


def _file_of(engine: Engine) -> tuple[int, int] | None:
    """Return what identifies the file on its disk; None when it is gone, and always for a server."""
    if engine.url.get_backend_name() != "sqlite":
        return None
    try:
        return identity(Path(engine.url.database or ""))
    except OSError:
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
