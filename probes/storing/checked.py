"""Values of a database, checked before they become part of a record: a file may come from anywhere.

A column of SQLite takes a value of any kind, whatever its type says, and rows may point at nothing. Such a file would
end in a traceback somewhere far from here, or in a number that looks right; it is refused instead, naming the place.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import chain
from typing import Any, Final, TypeVar, cast, get_args

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import BigInteger, Boolean, CursorResult, Double, LargeBinary, Result, Table, Text

from loka.formats import PASSES, ROLES
from loka.probes.records import DynamicsKind, RunStatus

K = TypeVar("K")
V = TypeVar("V")

# A row as it comes back, by column name.
Row = Mapping[Any, Any]

_LARGEST: Final[int] = 2**63 - 1
# Rows of a bulk read that are held as Python's numbers at a time.
_AT_ONCE: Final[int] = 2000
# Integers that a float64 holds exactly, as those of bulk reads do.
_LARGEST_EXACT: Final[float] = 2.0**53
# (what is stored there, whether a value is that) by the type of the column.
_KINDS: Final[Mapping[type, tuple[str, Callable[[Any], bool]]]] = {
    Text: ("a text", lambda value: type(value) is str),
    BigInteger: ("a whole number from 0", lambda value: type(value) is int and 0 <= value <= _LARGEST),
    Double: ("a number", lambda value: value is None or type(value) in (float, int)),
    LargeBinary: ("bytes", lambda value: type(value) is bytes),
    Boolean: ("true or false", lambda value: value in (0, 1) and not isinstance(value, float)),
}
# What a text says where not every text is possible.
_WORDS: Final[Mapping[tuple[str, str], tuple[str, ...]]] = {
    ("products", "product"): PASSES,
    ("distributions", "product"): PASSES,
    ("timings", "product"): PASSES,
    ("operands", "role"): ROLES,
    ("runs", "status"): get_args(RunStatus),
    ("parts", "kind"): get_args(DynamicsKind),
}


class DamagedError(ValueError):
    """A database holds what LoKA never writes. Whoever reads says of which database, as a DatabaseError."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what}; it is damaged, or was changed by something else. Restore a copy, or probe again into a new file"
        )


def checked(table: Table, row: Row) -> Row:
    """Return a row, or part of one, of a table; raise DamagedError where a value is not of its column's kind."""
    checks = _checks(table)
    for name, value in row.items():
        wanted, fits = checks[name]
        if not fits(value):
            raise DamagedError(f"`{name}` in its table `{table.name}` is {_shown(value)}, not {wanted}")
    return row


def checked_rows(table: Table, result: Result[Any]) -> list[dict[str, Any]]:
    """Return all rows of a query on a table in the same way."""
    names, rows = tuple(result.keys()), result.all()
    for name, column in zip(names, zip(*rows, strict=True), strict=False):
        wanted, fits = _checks(table)[name]
        if not all(map(fits, column)):
            found = next(value for value in column if not fits(value))
            raise DamagedError(f"`{name}` in its table `{table.name}` is {_shown(found)}, not {wanted}")
    return [dict(zip(names, row, strict=True)) for row in rows]


def looked_up(known: Mapping[K, V], key: K, what: str) -> V:
    """Return the row that another points at; raise DamagedError where there is none."""
    try:
        return known[key]
    except KeyError as error:
        raise DamagedError(f"a row points at number {key!r} of its table `{what}`, which is not there") from error


def names(table: Table, row: Row, column: str) -> tuple[str, ...]:
    """Return a list of texts that is stored as JSON."""
    found = _json(table, row, column)
    if type(found) is not list or not all(type(each) is str for each in found):
        raise _no_such(table, column, row, "a list of texts")
    return tuple(found)


def shapes(table: Table, row: Row, column: str) -> dict[str, tuple[int, ...]]:
    """Return shapes by name that are stored as JSON."""
    found = _json(table, row, column)
    lists = found.values() if type(found) is dict else (None,)
    if not all(type(each) is list and all(type(one) is int and one >= 0 for one in each) for each in lists):
        raise _no_such(table, column, row, "shapes by name")
    return {name: tuple(shape) for name, shape in found.items()}


def numbers(result: Result[Any]) -> NDArray[np.float64]:
    """Return all rows of a query of numbers as an array [rows, columns]; NULL is NaN."""
    columns = len(result.keys())
    try:
        parts = [np.fromiter(chain.from_iterable(part), np.float64, columns * len(part)) for part in _rows(result)]
    except (TypeError, ValueError, OverflowError) as error:
        raise DamagedError(f"it holds something else where it has numbers ({error})") from error
    return (np.concatenate(parts) if parts else np.empty(0)).reshape(-1, columns)


def _rows(result: Result[Any]) -> Iterator[Sequence[Sequence[Any]]]:
    """Yield the rows of a query as the driver has them: SQLAlchemy would make each into an object of its own."""
    cursor = cast(CursorResult[Any], result).cursor
    while part := cursor.fetchmany(_AT_ONCE):
        yield part
    result.close()


def whole(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return stored integers that were read in bulk; raise DamagedError where one is none, or below zero."""
    with np.errstate(invalid="ignore"):
        wrong = ~((values >= 0) & (values <= _LARGEST_EXACT) & (values == np.floor(values)))
    if wrong.any():
        raise DamagedError(f"it holds {float(values[wrong][0])!r} where it has whole numbers from 0")
    return values.astype(np.int64)


def _json(table: Table, row: Row, column: str) -> Any:
    try:
        return json.loads(row[column])
    except (ValueError, RecursionError) as error:
        raise _no_such(table, column, row, "JSON") from error


def _no_such(table: Table, column: str, row: Row, wanted: str) -> DamagedError:
    return DamagedError(f"`{column}` in its table `{table.name}` is {_shown(row[column])}, not {wanted}")


def _shown(value: object) -> str:
    text = repr(value[:60] if isinstance(value, str | bytes) else value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@cache
def _checks(table: Table) -> Mapping[str, tuple[str, Callable[[Any], bool]]]:
    found = {}
    for column in table.columns:
        words = _WORDS.get((table.name, column.name))
        if words is not None:
            found[column.name] = f"one of {', '.join(words)}", frozenset(words).__contains__
        else:
            found[column.name] = next(check for kind, check in _KINDS.items() if isinstance(column.type, kind))
    return found
