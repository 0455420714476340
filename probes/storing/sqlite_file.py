"""An SQLite file: told from somebody else's before SQLite may touch it, opened, and its failures put in words."""

import sqlite3
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Final

from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from loka.document import SQLITE_HEADER
from loka.errors import DatabaseError
from loka.probes.storing.schema import APPLICATION_ID

# How long SQLite itself waits for another process's transaction.
BUSY_S: Final[float] = 5.0
# Execution option of a transaction that will write.
WRITE: Final = "loka_write"
_APPLICATION_ID_AT: Final = 68

# What a failure means, by the start of SQLite's name for it.
_REASONS: Final[dict[str, str]] = {
    "SQLITE_FULL": "the disk is full; free some space",
    "SQLITE_BUSY": "another process keeps it locked; end that process or use another file",
    "SQLITE_LOCKED": "another connection keeps it locked; use another file",
    "SQLITE_READONLY": "the file or its folder is read-only; use a path that can be written",
    "SQLITE_IOERR": "the disk reported an I/O error; check it, or use another disk",
    "SQLITE_CORRUPT": "the file is damaged or cut short; restore a copy, or salvage it with `sqlite3 FILE .recover`",
    "SQLITE_NOTADB": "the file is damaged or no database; restore a copy, or use another path",
    "SQLITE_CANTOPEN": "the file cannot be opened; check that it exists and that its folder can be written",
    "SQLITE_PERM": "the system does not permit it; check the owner and the mode of the file",
}


def explain(error: BaseException) -> str:
    """Return in words why the database failed."""
    cause = getattr(error, "orig", None) or error
    name = getattr(cause, "sqlite_errorname", "")
    if isinstance(error, UnicodeDecodeError):  # what SQLite says quotes a name that is none
        return _REASONS["SQLITE_CORRUPT"]
    known = next((reason for prefix, reason in _REASONS.items() if name.startswith(prefix)), None)
    return known or " ".join(str(cause).split()).rstrip(".") or type(cause).__name__


def is_busy(error: SQLAlchemyError) -> bool:
    """Return whether trying again later can help."""
    return str(getattr(getattr(error, "orig", None), "sqlite_errorname", "")).startswith("SQLITE_BUSY")


# Open connections of this process, by file. Closing any descriptor of a file drops every lock that the process holds on
# it (POSIX), also those of a run being recorded: the header of a file is looked at only while no connection is open.
_open: Final[Counter[tuple[int, int]]] = Counter()
_opening: Final = threading.Lock()


class _Connection(sqlite3.Connection):
    """A connection that is counted until it is closed."""

    file: tuple[int, int] | None = None

    def close(self) -> None:
        super().close()
        with _opening:
            if self.file is not None:
                _open[self.file] -= 1
                self.file = None


def identity(path: Path) -> tuple[int, int]:
    """Return what tells a file from any other that has or had its name."""
    found = path.stat()
    return found.st_dev, found.st_ino


def is_ours(path: Path, *, empty_is: bool) -> bool:
    """Return whether the file's header is that of a probe database; `empty_is` answers for an empty file."""
    with _opening:
        if _open[identity(path)] > 0:
            return True
        try:
            with path.open("rb") as file:
                header = file.read(100)
        except OSError as error:
            raise DatabaseError(
                f"{path} cannot be read: {error.strerror}. Check its mode, or use another file."
            ) from error
    if not header:
        return empty_is
    mark = APPLICATION_ID.to_bytes(4, "big")
    return header.startswith(SQLITE_HEADER) and header[_APPLICATION_ID_AT : _APPLICATION_ID_AT + 4] == mark


def file_engine(path: Path, mode: str) -> Engine:
    """Return an engine on a file; every connection is opened when it is asked for and closed when it is given back."""
    address = f"{path.as_uri()}?{mode}"

    def connect() -> sqlite3.Connection:
        with _opening:
            connection = sqlite3.connect(
                address, uri=True, timeout=BUSY_S, isolation_level=None, check_same_thread=False, factory=_Connection
            )
            with suppress(FileNotFoundError):  # deleted a moment ago: the first query will say so
                connection.file = identity(path)
                _open[connection.file] += 1
        try:
            connection.executescript("PRAGMA foreign_keys = ON; PRAGMA synchronous = NORMAL")
        except (sqlite3.Error, UnicodeDecodeError):
            connection.close()
            raise
        return connection

    engine = create_engine(URL.create("sqlite", database=str(path)), creator=connect, poolclass=NullPool)

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # sqlite3 would begin by itself, late; a writer that starts as a reader can then be refused half-way.
        writes = connection.get_execution_options().get(WRITE)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine
