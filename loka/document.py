"""JSON that comes from elsewhere: read it as hostile, turn it into records, or say in a sentence what is wrong.

A record's own type hints are its schema: every key must be known, every value of the stated type, every number finite
and not negative (all numbers here are sizes, counts, times, errors or shares), every text printable. The field
`product` is written `pass`, the word that users know.
"""

import contextlib
import dataclasses
import functools
import json
import math
import operator
import os
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, Union, cast

from loka.errors import LokaError, PlanError

MAX_BYTES: Final[int] = 256 * 2**20  # a plan of 2,000 sites with 40 candidates each has a third of it
SQLITE_HEADER: Final = b"SQLite format 3\0"  # what every SQLite database begins with
_MAX_INTEGER: Final[int] = 2**53
_KEYS: Final[dict[str, str]] = {"product": "pass"}

T = TypeVar("T")
_Decoder = Callable[[Any], Any]


class _MismatchError(Exception):
    """A value is not what the schema says; `path` grows from the inside out."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.path: list[str] = []


def read(path: str | os.PathLike[str], *, kind: str, schema: int) -> dict[str, Any]:
    """Read a JSON object that declares itself as `kind` and `schema`, and return the rest of it; raise PlanError."""
    file = Path(path)
    try:
        with file.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise PlanError(f"{file} could not be read: {error.strerror or error}. Check the path.") from error
    return parse(raw, str(file), kind=kind, schema=schema)


def parse(raw: bytes, where: str, *, kind: str, schema: int) -> dict[str, Any]:
    """Do the same with the bytes of a document that came from `where`."""
    if len(raw) > MAX_BYTES:
        raise PlanError(
            f"{where} has more than {MAX_BYTES // 2**20} MiB, too much for a {kind}. Check what file it is."
        )
    try:
        document = json.loads(raw, parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise PlanError(f"{where} is not valid JSON: {reason}. Make the {kind} anew.") from error
    if not isinstance(document, dict) or document.get("kind") != kind:
        found = document.get("kind") if isinstance(document, dict) else type(document).__name__
        raise PlanError(f"{where} is not a {kind}: its kind is {_shown(found)}. Check what file it is.")
    if type(document.get("schema")) is not int or document["schema"] != schema:
        raise PlanError(
            f"{where} is a {kind} of schema {_shown(document.get('schema'))}; this version of LoKA reads schema "
            f"{schema}. Use the version that wrote it, or make it anew."
        )
    return {key: value for key, value in document.items() if key not in ("kind", "schema")}


def refuse_database(file: Path) -> None:
    """Raise PlanError where writing a text would put it in the place of a folder or of a SQLite database."""
    if file.is_dir():
        raise PlanError(f"{file} could not be written: it is a folder. Name a file in it.")
    if not file.is_file():  # nothing yet, or a pipe, which cannot be looked into
        return
    with contextlib.suppress(OSError), file.open("rb") as stream:
        if stream.read(len(SQLITE_HEADER)) == SQLITE_HEADER:
            raise PlanError(
                f"{file} was left as it is: it is a database, and its runs would be lost. Name another file."
            )


def write_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file so that a reader sees all of it or its predecessor; raise PlanError when that fails."""
    file = Path(path)
    refuse_database(file)
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise PlanError(f"{file} could not be written: {error.strerror or error}. Choose another place.") from error


def compact(value: object) -> str:
    """Return one line of JSON with sorted keys: the same bytes for the same value."""
    return json.dumps(value, sort_keys=True, allow_nan=False, separators=(",", ":"))


def encode(value: object) -> Any:
    """Turn records, mappings and tuples into what JSON knows; a field that is None by default is left out as such."""
    kind = type(value)
    if kind in _AS_IT_IS:
        return value
    if dataclasses.is_dataclass(kind):
        fields, values = _encoded(cast(Any, kind))
        return {
            key: item if type(item) in _AS_IT_IS else encode(item)
            for (key, is_optional), item in zip(fields, values(value), strict=True)
            if item is not None or not is_optional
        }
    if isinstance(value, str | int | float | None):
        return value
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [encode(item) for item in value]
    raise TypeError(f"{type(value).__name__} has no place in a document")


def decode(cls: type[T], data: object, where: str) -> T:
    """Turn decoded JSON into the record `cls`; raise PlanError naming the place, from `where` on, that is wrong."""
    try:
        return cast(T, _decoder(cast(Any, cls))(data))
    except _MismatchError as error:
        place = "".join(reversed(error.path))
        raise PlanError(f"{where}{place}: {error}. Make the file anew, or correct this entry.") from error
    except RecursionError as error:
        raise PlanError(f"{where} is nested too deeply. Make the file anew.") from error


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]  # add() returns None, which is why it goes on
        raise ValueError(f"the key {twice!r} appears twice in one object")
    return result


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


_AS_IT_IS: Final[frozenset[type]] = frozenset({str, int, float, bool, types.NoneType})


@functools.cache
def _encoded(cls: Any) -> tuple[tuple[tuple[str, bool], ...], Callable[[object], tuple[Any, ...]]]:
    """Return (key, whether None is its default) of every field of a record, and what reads their values."""
    fields = [field for field in dataclasses.fields(cls) if field.init]
    names = [field.name for field in fields]
    keys = tuple((_KEYS.get(field.name, field.name), field.default is None) for field in fields)
    if len(names) == 1:  # attrgetter then returns no tuple
        return keys, lambda value: (getattr(value, names[0]),)
    return keys, operator.attrgetter(*names)


@functools.cache
def _decoder(hint: Any) -> _Decoder:
    """Return the function that checks and converts one value of the type `hint`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in _SCALARS:
        return _SCALARS[hint]
    if dataclasses.is_dataclass(hint):
        return _record(cast(type, hint))
    if origin is Literal:
        return _literal(arguments)
    if origin in (Union, types.UnionType):
        return _optional(arguments)
    if origin in (tuple, Sequence):
        return _sequence(arguments, endless=origin is Sequence or arguments[-1] is Ellipsis)
    if origin is Mapping or (isinstance(origin, type) and issubclass(origin, Mapping)):
        return _mapping(arguments)
    raise TypeError(f"no decoder for {hint!r}")


def _text(value: Any) -> str:
    if type(value) is not str:
        raise _MismatchError(f"a text is needed, not {_shown(value)}")
    if not value.isprintable():
        raise _MismatchError(f"{_shown(value)} holds control characters")
    return value


def _integer(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= _MAX_INTEGER:
        raise _MismatchError(f"a whole number from 0 is needed, not {_shown(value)}")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise _MismatchError(f"a finite number from 0 is needed, not {_shown(value)}")
    try:
        return float(value)
    except OverflowError as error:
        raise _MismatchError(f"{_shown(value)} is too large") from error


_SCALARS: Final[dict[Any, _Decoder]] = {str: _text, int: _integer, float: _number}


def _literal(allowed: tuple[Any, ...]) -> _Decoder:
    def decode_literal(value: Any) -> Any:
        if type(value) is not str or value not in allowed:
            raise _MismatchError(f"one of {', '.join(allowed)} is needed, not {_shown(value)}")
        return value

    return decode_literal


def _optional(arguments: tuple[Any, ...]) -> _Decoder:
    (some,) = (argument for argument in arguments if argument is not types.NoneType)
    inner = _decoder(some)
    return lambda value: None if value is None else inner(value)


def _sequence(arguments: tuple[Any, ...], *, endless: bool) -> _Decoder:
    inner = _decoder(arguments[0])  # all entries of a fixed tuple have one type here

    def decode_sequence(value: Any) -> tuple[Any, ...]:
        if type(value) is not list or not (endless or len(value) == len(arguments)):
            count = "" if endless else f" of {len(arguments)}"
            raise _MismatchError(f"a list{count} is needed, not {_shown(value)}")
        items = []
        for index, item in enumerate(value):
            try:
                items.append(inner(item))
            except _MismatchError as error:
                error.path.append(f"[{index}]")
                raise
        return tuple(items)

    return decode_sequence


def _mapping(arguments: tuple[Any, ...]) -> _Decoder:
    inner = _decoder(arguments[1])

    def decode_mapping(value: Any) -> dict[str, Any]:
        if type(value) is not dict:
            raise _MismatchError(f"an object is needed, not {_shown(value)}")
        result = {}
        for key, item in value.items():
            try:
                result[_text(key)] = inner(item)
            except _MismatchError as error:
                error.path.append(f"[{_shown(key)}]")
                raise
        return result

    return decode_mapping


def _record(cls: type) -> _Decoder:
    fields = [field for field in dataclasses.fields(cls) if field.init]

    @functools.cache
    def decoders() -> dict[str, tuple[str, _Decoder]]:
        """Return what reads each key, made when it is first needed: a record may hold others of its own kind."""
        hints = typing.get_type_hints(cls)
        return {_KEYS.get(field.name, field.name): (field.name, _decoder(hints[field.name])) for field in fields}

    needed = [
        _KEYS.get(field.name, field.name)
        for field in fields
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]

    def decode_record(value: Any) -> Any:
        if type(value) is not dict:
            raise _MismatchError(f"an object is needed, not {_shown(value)}")
        plan = decoders()
        for key in needed:
            if key not in value:
                raise _MismatchError(f"the key {key!r} is missing")
        arguments = {}
        for key, item in value.items():
            if key not in plan:
                raise _MismatchError(f"the key {_shown(key)} is unknown; known: {', '.join(plan)}")
            name, inner = plan[key]
            try:
                arguments[name] = inner(item)
            except _MismatchError as error:
                error.path.append(f".{key}")
                raise
        try:
            return cls(**arguments)
        except LokaError as error:
            raise _MismatchError(str(error)) from error

    return decode_record
