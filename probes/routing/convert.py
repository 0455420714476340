"""Token-level traces of other programs, as JSON, JSON Lines or CSV, turned into a routing trace.

A record, or row, is one token of one layer, with the keys (columns)

    request   text or integer: which request the token belongs to
    phase     prefill or decode (or 0, 1)
    layer     integer: the model's number of the layer
    expert    integer, or `experts`, several: [3, 7] in JSON, "3;7", "3 7" or "[3, 7]" in CSV
    domain    optional, text: what kind of request it is; once for a request is enough
    token     optional, integer: the token's position; the distinct ones of the decode are its steps

and others are ignored. JSON is a list of records, or an object with the list under "records". Requests keep the order
in which they first occur, layers are sorted. A file is read as hostile: line by line where its form allows that, sizes
checked before anything is allocated.
"""

import csv
import json
import os
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from loka.errors import ArgumentError
from loka.probes.routing.spill import is_partial, recover
from loka.probes.routing.trace import MAX_BYTES, PHASES, RoutingTrace

_MOST_JSON: Final[int] = 512 * 2**20  # of one JSON document, which has to be read whole
_MOST_LINE: Final[int] = 2**20
_MOST: Final[dict[str, int]] = {"layer": 2**15, "expert": 2**15, "token": 2**40}
_MOST_REQUESTS: Final[int] = 2**30
_UNKNOWN: Final[str] = "unknown"

Record = Mapping[str, Any]


def convert(path: str | os.PathLike[str], *, experts: int | None = None, max_bytes: int = MAX_BYTES) -> RoutingTrace:
    """Return the routing trace of a token-level trace, or of what a recording left that was cut off.

    experts: how many a layer has, where the last ones may never be used. The form is told by the name: .json, .jsonl
    (or .ndjson), .csv, or .partial. Raises ArgumentError, with the line, on anything that is not as described.
    """
    path = Path(path)
    if is_partial(path):
        return recover(path, max_bytes=max_bytes)
    read = _READERS.get(path.suffix.lower())
    if read is None:
        raise ArgumentError(
            f"{path} cannot be converted: its form is told by its name, which ends in {path.suffix or 'nothing'}. "
            f"Possible are {', '.join(_READERS)}, and the .partial file of a recording that was cut off."
        )
    if experts is not None and not 1 <= experts <= _MOST["expert"]:
        raise ArgumentError(f"A layer cannot have {experts} experts. Give a number from 1 to {_MOST['expert']:,}.")
    found = _Found()
    try:
        for where, record in read(path):
            try:
                found.add(record)
            except _RecordError as error:
                raise ArgumentError(f"{path}, {where}: {error}") from error
    except (UnicodeDecodeError, csv.Error, RecursionError, OSError) as error:
        raise ArgumentError(f"{path} cannot be read: {error}. It must be text in UTF-8.") from error
    try:
        return found.trace(experts, max_bytes)
    except ArgumentError as error:
        raise ArgumentError(f"{path} cannot be converted: {error}") from error


class _RecordError(Exception):
    """A record is not as described."""


@dataclass(slots=True)
class _Found:
    """What the records have told so far: one number for each choice, and the requests by name."""

    requests: dict[str, int] = field(default_factory=dict)
    domains: dict[int, str] = field(default_factory=dict)
    layers: dict[int, int] = field(default_factory=dict)
    experts: int = 0
    choices: "array[int]" = field(
        default_factory=lambda: array("q")
    )  # request, phase, layer, expert: 31, 1, 15, 15 bits
    steps: set[tuple[int, int]] = field(default_factory=set)
    without_token: bool = False

    def add(self, record: Record) -> None:
        """Take a record; raise _RecordError where it is not as described."""
        request = self._request(record)
        phase = _phase(record.get("phase"))
        layer = self.layers.setdefault(_whole("layer", record.get("layer")), len(self.layers))
        chosen = _experts(record)
        token = record.get("token")
        if token in (None, ""):
            self.without_token = self.without_token or phase == 1
        elif phase == 1:
            self.steps.add((request, _whole("token", token)))
        for expert in chosen:
            self.experts = max(self.experts, expert + 1)
            self.choices.append(((request << 1 | phase) << 15 | layer) << 15 | expert)

    def _request(self, record: Record) -> int:
        name = record.get("request")
        if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
            raise _RecordError(f"request is {_shown(name)}. It must be a text or an integer.")
        request = self.requests.setdefault(str(name), len(self.requests))
        if request >= _MOST_REQUESTS:
            raise _RecordError(f"there are more than {_MOST_REQUESTS:,} requests. Split the file.")
        domain = record.get("domain")
        if domain not in (None, ""):
            if not isinstance(domain, str):
                raise _RecordError(f"domain is {_shown(domain)}. It must be a text.")
            if self.domains.setdefault(request, domain) != domain:
                raise _RecordError(
                    f"request {_shown(name)} is of domain {_shown(domain)} here and {_shown(self.domains[request])} "
                    "before. A request has one domain."
                )
        return request

    def trace(self, experts: int | None, max_bytes: int) -> RoutingTrace:
        """Return the trace of all records."""
        if not self.choices:
            raise ArgumentError("there is no record in it. A trace has at least one.")
        if experts is not None and experts < self.experts:
            raise ArgumentError(f"expert {self.experts - 1} is used, so there are more than {experts} experts.")
        shape = (len(self.requests), len(PHASES), len(self.layers), experts or self.experts)
        size = int(np.prod([float(each) for each in shape])) * 4
        if size > max_bytes:
            raise ArgumentError(
                f"counts of {' x '.join(map(str, shape))} take {size:,} bytes, more than the {max_bytes:,} allowed. "
                "Split the file, or raise max_bytes."
            )
        code = np.frombuffer(self.choices, dtype=np.int64)
        order = sorted(self.layers)
        position = np.empty(len(order), dtype=np.int64)
        position[[self.layers[layer] for layer in order]] = np.arange(len(order))
        request, phase = code >> 31, code >> 30 & 1
        layer, expert = position[code >> 15 & 0x7FFF], code & 0x7FFF
        flat = ((request * shape[1] + phase) * shape[2] + layer) * shape[3] + expert
        cells, times = np.unique(flat, return_counts=True)
        counts = np.zeros(shape, dtype=np.uint32)
        counts.reshape(-1)[cells] = times
        return RoutingTrace(
            counts=counts,
            domain=tuple(self.domains.get(request, _UNKNOWN) for request in range(len(self.requests))),
            layers=tuple(order),
            decode_steps=self._steps(),
        )

    def _steps(self) -> np.ndarray | None:
        if self.without_token:
            return None
        steps = np.zeros(len(self.requests), dtype=np.int64)
        for request, _ in self.steps:
            steps[request] += 1
        return steps


def _phase(value: Any) -> int:
    name = value.strip().lower() if isinstance(value, str) else value
    found = _PHASE_NAMES.get(name) if isinstance(name, str | int) and not isinstance(name, bool) else None
    if found is None:
        raise _RecordError(f"phase is {_shown(value)}. It must be prefill or decode (or 0, 1).")
    return found


_PHASE_NAMES: Final[dict[str | int, int]] = {
    name: phase for phase, word in enumerate(PHASES) for name in (word, phase, str(phase))
}


def _whole(name: str, value: Any) -> int:
    if isinstance(value, str) and value.strip().isdecimal() and len(value) < 20:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < _MOST[name]:
        raise _RecordError(f"{name} is {_shown(value)}. It must be a whole number from 0 to {_MOST[name] - 1:,}.")
    return value


def _experts(record: Record) -> tuple[int, ...]:
    values = record.get("experts", record.get("expert"))
    if isinstance(values, str):
        values = values.strip().removeprefix("[").removesuffix("]").replace(";", " ").replace(",", " ").split()
    chosen = tuple(_whole("expert", value) for value in (values if isinstance(values, list) else [values]))
    if not chosen:
        raise _RecordError("experts is empty. Leave out a token that no expert gets.")
    if len(set(chosen)) < len(chosen):
        raise _RecordError(f"experts {_shown(values)} names one twice. A token goes to an expert once.")
    return chosen


def _shown(value: Any) -> str:
    return "missing" if value is None else repr(value)[:60]


# ---- forms: each yields (where, record)


def _json_lines(path: Path) -> Iterator[tuple[str, Record]]:
    with path.open(encoding="utf-8-sig") as file:
        number = 0
        while line := file.readline(_MOST_LINE + 1):
            number += 1
            if len(line) > _MOST_LINE:
                raise ArgumentError(
                    f"{path}, line {number} is longer than {_MOST_LINE:,} characters. A line is a record."
                )
            if line.strip():
                yield f"line {number}", _record(path, f"line {number}", _parsed(path, f", line {number}", line))


def _json(path: Path) -> Iterator[tuple[str, Record]]:
    size = path.stat().st_size
    if size > _MOST_JSON:
        raise ArgumentError(
            f"{path} has {size:,} bytes, more than the {_MOST_JSON:,} that are read whole. Write it as JSON Lines, a "
            "record a line, which has no such limit."
        )
    found = _parsed(path, "", path.read_text(encoding="utf-8-sig"))
    if isinstance(found, dict):
        found = found.get("records")
    if not isinstance(found, list):
        raise ArgumentError(f"{path} is not a list of records, nor an object with one under 'records'. Write it so.")
    for number, record in enumerate(found, start=1):
        yield f"record {number}", _record(path, f"record {number}", record)


def _parsed(path: Path, where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArgumentError(f"{path}{where} is not JSON: {error}. Correct it, or write it again.") from error


def _record(path: Path, where: str, record: Any) -> Record:
    if not isinstance(record, dict):
        raise ArgumentError(
            f"{path}, {where} is no object but {_shown(record)}. A record has keys: request, phase, ..."
        )
    return record


def _csv(path: Path) -> Iterator[tuple[str, Record]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        columns = [name.strip() for name in reader.fieldnames or ()]
        missing = [name for name in ("request", "phase", "layer") if name not in columns]
        if missing or not {"expert", "experts"} & set(columns):
            missing += [] if {"expert", "experts"} & set(columns) else ["expert"]
            raise ArgumentError(
                f"{path} has no column {', '.join(missing)}: its first line names {', '.join(columns)[:200] or 'none'}."
                " It must name request, phase, layer and expert (or experts)."
            )
        if len(set(columns)) < len(columns):
            raise ArgumentError(f"{path} names a column twice in its first line. Each has its own name.")
        reader.fieldnames = columns
        for row in reader:
            if None in row or None in row.values():
                raise ArgumentError(f"{path}, line {reader.line_num} does not have {len(columns)} fields. Correct it.")
            yield f"line {reader.line_num}", row


_READERS: Final[dict[str, Callable[[Path], Iterator[tuple[str, Record]]]]] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".csv": _csv,
}
