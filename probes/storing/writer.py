"""Writing a run while it trains: a thread of its own holds the only connection, the training thread hands it records.

Training comes first. After construction nothing here raises and nothing waits for long: when the database cannot keep
up, steps are dropped and counted; when it fails (disk full, file deleted, locked for good), the reason is kept in
`failure` and further records are discarded. A server that goes away is no failure while the run goes on: what is handed
over waits in memory, up to CAPACITY, until the server is back, and only what exceeds that is dropped and counted. One
transaction holds one sampled step with the running totals, so what was committed is whole and stays readable, `kill -9`
of either side included.
"""

import contextlib
import dataclasses
import itertools
import logging
import random
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Final

from sqlalchemy import Connection, Engine, insert, select
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError

from loka.errors import DatabaseError
from loka.probes.records import Event, LearnedRecord, RunInfo, RunProgress, StepRecord
from loka.probes.storing import rows, schema
from loka.probes.storing.database import open_database, place, transaction, writable
from loka.probes.storing.entries import Entries, Entry, key_of, now
from loka.probes.storing.process import this_process
from loka.probes.storing.server import is_passing, prepare_writing
from loka.probes.storing.sqlite_file import explain, identity, is_busy

logger = logging.getLogger("loka.probes")

# Products that may wait in memory, about 4 KiB each with four recipes: 32 MiB.
CAPACITY: Final[int] = 8192
# How long a full queue may hold up the training thread, once per stall.
_STALL_S: Final[float] = 0.5
# How long a locked database is tried again before the writer gives up.
PATIENCE_S: Final[float] = 60.0
# A server that is away is asked again after the first pause, then ever more rarely; in the log after a while.
_FIRST_PAUSE_S: Final[float] = 0.1
_LONGEST_PAUSE_S: Final[float] = 5.0
_TELL_AFTER_S: Final[float] = 10.0
_DELETED: Final = "the file was deleted or replaced during the run; leave it in place"
# Not the shared generator: training draws from that.
_jitter: Final = random.Random()


class RunWriter:
    """Records one run. Opens or makes the database at once, so that a bad path raises DatabaseError in the caller.

    `capacity` bounds the products that wait to be written; `patience_s` is how long a locked file is tried again (a
    server is tried again for as long as the run goes on).
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
        self._book = Entries(joined if joined is not None else _start_run(self._engine, info, self._place))
        self._is_server = self._engine.url.get_backend_name() != "sqlite"
        self._file = _file_of(self._engine)
        self._connection: Connection | None = None
        self._away_since = self._away_s = 0.0  # since when the server is away; for how long it was, in all
        self._away = ""  # why it is
        self._told_away = False
        self._patience_s = patience_s
        self._capacity = capacity
        self._entries: OrderedDict[object, Entry] = OrderedDict()  # in the order in which they are written
        self._numbers = itertools.count()
        self._waiting = 0  # sum of the weights in _entries
        self._changed = threading.Condition()
        self._closing = False
        self._stalled = False
        self._dropped = 0
        self._written = 0
        self._failure: str | None = None
        self._held = threading.Event()  # the file is open, so that no other can be given its identity
        self._thread = threading.Thread(target=self._work, name="loka-probe-writer", daemon=True)
        self._thread.start()
        if not self._is_server:
            self._held.wait()

    @property
    def failure(self) -> str | None:
        """Why nothing more is recorded, in one paragraph; None while all is well."""
        return self._failure

    @property
    def dropped(self) -> int:
        """Sampled steps left out because the database could not keep up, or was away for too long."""
        return self._dropped

    def write(self, step: StepRecord, progress: RunProgress) -> None:
        """Hand over a sampled step and the running totals."""
        if not self._offer(Entry(step=step, progress=progress)):
            self._dropped += 1

    def learned(self, records: Iterable[LearnedRecord], *, final: bool) -> bool:
        """Hand over what the run has learned; each replaces what was kept of it before. Says whether it was taken.

        What is `final` is taken in any case: whoever learned it is about to let go of it.
        """
        taken = [self._offer(Entry(learned=record), always=final) for record in records]
        return all(taken)

    def event(self, event: Event) -> None:
        """Hand over something that happened. Events are few and small, so they are never left out."""
        with self._changed:
            if not self._is_over():
                self._put(Entry(event=event))

    def finish(self, progress: RunProgress, timeout: float = 30.0) -> None:
        """Write the final totals, wait at most `timeout` seconds for everything to be written, and close."""
        with self._changed:
            if self._closing:
                return
            if self._dropped:
                message = self._why_dropped()
                self._put(Entry(event=Event(step=progress.steps, kind="dropped", message=message)))
                progress = dataclasses.replace(progress, reason=" ".join(filter(None, (progress.reason, message))))
            self._put(Entry(progress=None if self._joins else progress))
            self._closing = True
        self._thread.join(timeout)
        if self._thread.is_alive():
            why = f" ({self._away})" if self._away else ""
            self._fail(f"it did not take the last {len(self._entries) + 1} entries within {timeout:g} s{why}")

    def _why_dropped(self) -> str:
        away_s = self._away_s + (time.monotonic() - self._away_since if self._away_since else 0.0)
        lost = f"{self._dropped} sampled steps were not recorded: the database "
        if away_s > _TELL_AFTER_S:
            return f"{lost}was away for {away_s:.0f} s, and memory holds {self._capacity} products for it at most."
        return f"{lost}could not keep up. Sample rarer, or use a faster disk."

    def _offer(self, entry: Entry, *, always: bool = False) -> bool:
        """Queue an entry; return whether it was accepted, or is not missed because nothing is recorded any more."""
        with self._changed:
            patience = 0.0 if self._stalled else _STALL_S
            fits = self._changed.wait_for(lambda: always or self._has_room(entry) or self._is_over(), patience)
            if self._is_over():
                return True
            self._stalled = not fits
            if fits:
                self._put(entry)
            return fits

    def _put(self, entry: Entry) -> None:
        one = entry.learned
        key = next(self._numbers) if one is None else (one.site, one.product, one.kind)
        stale = self._entries.pop(key, None)  # what waits of the same is out of date
        if stale is not None:
            self._waiting -= stale.weight
        self._entries[key] = entry
        self._waiting += entry.weight
        self._changed.notify_all()

    def _has_room(self, entry: Entry) -> bool:
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
            if not self._is_server:
                self._dial()
            self._held.set()
            while (entry := self._next()) is not None:
                self._commit(entry)
            complete = True
        except SQLAlchemyError as error:
            self._fail(explain(error) if _file_of(self._engine) == self._file else _DELETED)
        except DatabaseError as error:
            self._fail(str(error))
        finally:
            # Anything else is a defect: the thread's own report has the traceback, the run still learns of it.
            if not complete and self._failure is None:
                self._fail(f"the writer met an unforeseen {sys.exception()!r}; please report it")
            self._held.set()
            self._hang_up()
            self._engine.dispose()

    def _next(self) -> Entry | None:
        with self._changed:
            self._changed.wait_for(lambda: self._entries or self._closing or self._failure is not None)
            if self._failure is not None or not self._entries:
                return None
            _, entry = self._entries.popitem(last=False)
            self._waiting -= entry.weight
            self._changed.notify_all()
            return entry

    def _commit(self, entry: Entry) -> None:
        """Write one entry in one transaction, trying again while the file is locked or the server is away."""
        give_up = time.monotonic() + self._patience_s
        pause_s = _FIRST_PAUSE_S
        while self._failure is None:
            if _file_of(self._engine) != self._file:
                raise DatabaseError(_DELETED)
            try:
                self._try(entry)
                self._written += entry.step is not None
                return
            except DBAPIError as error:
                self._book.failed()
                if self._is_server and is_passing(error):
                    self._hang_up(broken=True)
                    self._stand_by(explain(error), pause_s)
                    pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                elif not is_busy(error) or time.monotonic() > give_up:
                    raise

    def _try(self, entry: Entry) -> None:
        connection = self._connection or self._dial()
        with connection.begin():
            if not self._book.has(connection, entry):
                self._book.insert(connection, entry)
        self._book.done()
        if self._away_since:
            away_s = time.monotonic() - self._away_since
            self._away_s += away_s
            self._away_since, self._away, self._told_away = 0.0, "", False
            logger.info("%s answers again after %.1f s; nothing that it had taken is lost", self._place, away_s)

    def _dial(self) -> Connection:
        connection = self._connection = writable(self._engine).connect()
        if self._is_server:
            prepare_writing(connection)
        return connection

    def _hang_up(self, *, broken: bool = False) -> None:
        """Close the connection, if there is one; a broken one is not given back to the pool."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(SQLAlchemyError):
                if broken:
                    connection.invalidate()
                connection.close()

    def _stand_by(self, reason: str, pause_s: float) -> None:
        """Wait before the server is asked again; say so in the log when it stays away."""
        now_s = time.monotonic()
        self._away_since = self._away_since or now_s
        away_s = now_s - self._away_since
        if away_s >= _TELL_AFTER_S and not self._told_away:
            logger.warning(
                "%s is away for %.0f s (%s). Training goes on; up to %d products wait in memory until it is back.",
                *(self._place, away_s, reason, self._capacity),
            )
            self._told_away = True
        self._away = reason
        with self._changed:
            if self._closing:  # the run is over, and waits for this
                pause_s = _FIRST_PAUSE_S
            closing = self._closing
            self._changed.wait_for(
                lambda: self._failure is not None or self._closing != closing, pause_s * (0.5 + _jitter.random())
            )


def _start_run(engine: Engine, info: RunInfo, where: str) -> int:
    """Write the row of a new run and return its key."""
    process = this_process()
    start = RunProgress(
        steps=0, sampled_steps=0, skipped_samples=0, wall_s=0.0, probe_s=0.0, unattributed=0, weights_changed=False
    )
    values = {
        **rows.run_row(info),
        **rows.progress_row(start),
        **{"last_write": now(), "host": process.host, "pid": process.pid, "process_start": process.start},
    }
    with transaction(engine, write=True) as connection:
        try:
            return key_of(connection.execute(insert(schema.runs).values(**values)))
        except IntegrityError as error:
            raise DatabaseError(
                f"{where} already holds a run {info.id}. Leave `id` out of RunInfo to get a new one."
            ) from error


def _run_of(engine: Engine, run: str) -> int | None:
    """Return the key of the run with this id; None where the database has none."""
    with transaction(engine) as connection:
        found = connection.execute(select(schema.runs.c.number).where(schema.runs.c.id == run)).scalar()
    return None if found is None else int(found)


def _file_of(engine: Engine) -> tuple[int, int] | None:
    """Return what identifies the file on its disk; None when it is gone, and always for a server."""
    if engine.url.get_backend_name() != "sqlite":
        return None
    try:
        return identity(Path(engine.url.database or ""))
    except OSError:
        return None
