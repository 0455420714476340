"""What one transaction writes: a sampled step, an event, what was learned of a product, the running totals.

A server that goes away while it commits leaves open whether it did. The rows of an entry are therefore known by the key
that the database gave them: an entry is looked for under it before it is written again, so that it is there once.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from operator import itemgetter
from typing import Any, Final

from sqlalchemy import Connection, CursorResult, Table, insert, select, update

from loka.probes.records import Event, LearnedRecord, RunProgress, StepRecord
from loka.probes.storing import rows, schema
from loka.probes.storing.database import take_turns

# What a product takes while it waits, with four recipes.
_BYTES_PER_PRODUCT: Final[int] = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """What goes into one transaction: at most one of a step and an event."""

    step: StepRecord | None = None
    progress: RunProgress | None = None
    event: Event | None = None
    learned: LearnedRecord | None = None

    @property
    def weight(self) -> int:
        """What it takes in memory, in products of a step."""
        learned = len(self.learned.data) // _BYTES_PER_PRODUCT if self.learned else 0
        return 1 + (len(self.step.products) if self.step else 0) + learned


class Entries:
    """Writes the entries of the run that has the key `run`; remembers the keys of the names that it has written."""

    def __init__(self, run: int) -> None:
        self._run = run
        self._products: dict[tuple[str, ...], int] = {}
        self._recipes: dict[str, int] = {}
        self._parts: dict[tuple[str, ...], int] = {}
        self._tried: tuple[Table, int] | None = None  # where the last entry was put, if it was committed

    def insert(self, connection: Connection, entry: Entry) -> None:
        """Write an entry in the transaction that is open."""
        if entry.step is not None:
            self._insert_step(connection, entry.step)
        if entry.learned is not None:
            self._replace(connection, entry.learned)
        if entry.event is not None:
            new = connection.execute(insert(schema.events).values(rows.event_row(self._run, entry.event)))
            self._tried = schema.events, key_of(new)
        totals = rows.progress_row(entry.progress) if entry.progress else {}
        table = schema.runs
        connection.execute(update(table).where(table.c.number == self._run).values(last_write=now(), **totals))

    def done(self) -> None:
        """Note that the last entry was committed."""
        self._tried = None

    def failed(self) -> None:
        """Note that the last entry may not have been: keys that its transaction learned may be keys of nothing."""
        self._products.clear()
        self._recipes.clear()
        self._parts.clear()

    def has(self, connection: Connection, entry: Entry) -> bool:
        """Return whether a try of this entry that failed was committed after all. What has no key is written again."""
        if self._tried is None:
            return False
        # Every entry changes this row, so this waits for a transaction that the server has not ended yet.
        run = schema.runs.c.number == self._run
        connection.execute(select(schema.runs.c.number).where(run).with_for_update())
        table, key = self._tried
        # After a crash the server may give the same key again, but of this run only this writer writes steps.
        record = entry.step or entry.event
        fields = ("step", "rank") if entry.step else ("step", "kind", "message")
        same = [table.c[name] == getattr(record, name) for name in fields]
        query = select(table.c.number).where(table.c.number == key, table.c.run == self._run, *same)
        found = connection.execute(query).first() is not None
        self._tried = None
        return found

    def _insert_step(self, connection: Connection, record: StepRecord) -> None:
        self._learn(connection, record)
        step = {name: getattr(record, name) for name in ("step", "rank", "loss", "labels")}
        key = key_of(connection.execute(insert(schema.steps).values(run=self._run, **step)))
        self._tried = schema.steps, key
        for table, found in rows.step_rows(key, record, self._products, self._recipes):
            _insert_many(connection, table, found)
        if found := rows.dynamics_rows(key, record, self._parts):
            _insert_many(connection, schema.dynamics, found)

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
        names = rows.recipes_of(step)
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
        needed = dict.fromkeys(wanted)
        if needed.keys() <= known.keys():
            return
        fields = rows.KEY_FIELDS[table.name]
        query = select(table.c.number, *(table.c[name] for name in fields)).where(table.c.run == self._run)
        known.update((tuple(row[1:]), row[0]) for row in connection.execute(query))
        if unknown := [key for key in needed if key not in known]:
            connection.execute(
                insert(table), [{"run": self._run, **dict(zip(fields, key, strict=True))} for key in unknown]
            )
            known.update((tuple(row[1:]), row[0]) for row in connection.execute(query))


def _insert_many(connection: Connection, table: Table, found: list[dict[str, Any]]) -> None:
    """Insert rows of equal columns: compiled once, handed to the driver as they are.

    `connection.execute` prepares every row by itself, which is two thirds of its time and holds up the training thread.
    """
    statement = insert(table).compile(dialect=connection.dialect, column_keys=list(found[0]))
    order = statement.positiontup
    connection.exec_driver_sql(str(statement), found if order is None else list(map(itemgetter(*order), found)))


def key_of(inserted: CursorResult[Any]) -> int:
    """Return the key that the database gave to a row."""
    key = inserted.inserted_primary_key
    assert key is not None, "every table counted by the database returns its key"
    return int(key[0])


def now() -> str:
    """Return the time as it is stored: ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
