"""Spoil a file again and again and watch its reader: in a process of its own, with a limit on time and on memory.

A reader may refuse a file with a LokaError, or read it. Anything else is a failure, and is told with the number that
makes the same file again.
"""

import logging
import multiprocessing
import multiprocessing.connection
import resource
import signal
import time
import traceback
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from loka.errors import LokaError
from tests.fuzz.mutations import mutate, rewrite_in
from tests.fuzz.readers import Reader

# A file may take this much CPU time, and a reader may take this much memory beyond what the process had.
LIMIT_S = 5.0
LIMIT_MIB = 768
# The system's clock for one file, after which the process is ended from outside: code that no signal reaches.
_OUTSIDE_S = 300.0
_TOLD = 40


class TooLongError(Exception):
    """A reader took longer than LIMIT_S."""


@dataclass(kw_only=True)
class Outcome:
    """What became of the files of one reader."""

    counts: Counter[str] = field(default_factory=Counter)  # same, other, refused, failed
    failures: list[str] = field(default_factory=list)  # the first of each kind
    slowest_s: float = 0.0  # CPU time
    memory_mib: float = 0.0


def file_of(reader: Reader, originals: tuple[bytes, ...], number: int) -> bytes:
    """Return the spoiled file of this number."""
    return mutate(zlib.crc32(reader.name.encode()) << 32 | number, originals, reader.mutations)


def attempt(reader: Reader, data: bytes, path: Path, known: frozenset[str]) -> str:
    """Return what a reader makes of a file: `same` as an original, `other`, or `refused`. Raises what is a failure."""
    path.write_bytes(data)
    try:
        return "same" if reader.read(path) in known else "other"
    except LokaError as error:
        if not str(error).strip():
            raise AssertionError("an error without a word") from error
        return "refused"


def prepare(reader: Reader, folder: Path) -> tuple[tuple[bytes, ...], Path, frozenset[str]]:
    """Write the originals; return them, where spoiled ones go, and what the reader says of the originals."""
    originals = reader.originals(folder)
    work = folder / "work"
    work.mkdir(exist_ok=True)
    rewrite_in(folder)
    path = work / reader.file
    known = set()
    for data in originals:
        path.write_bytes(data)
        known.add(reader.read(path))
    return originals, path, frozenset(known)


def run(reader: Reader, folder: Path, numbers: range, processes: int = 1) -> Outcome:
    """Spoil, read and count in child processes, and in another one where one dies."""
    total = Outcome()
    share = -(-len(numbers) // processes)
    parts = [numbers[at : at + share] for at in range(0, len(numbers), share)]
    searches = [_Search(reader, folder / str(number), part, total) for number, part in enumerate(parts)]
    while searches:
        multiprocessing.connection.wait([each.receiving for each in searches], timeout=1.0)
        searches = [each for each in searches if each.goes_on()]
    return total


class _Search:
    """One range of numbers, searched by one child process after another."""

    def __init__(self, reader: Reader, folder: Path, numbers: range, total: Outcome) -> None:
        folder.mkdir()
        self._reader, self._numbers, self._total = reader, numbers, total
        self._prepared = prepare(reader, folder)
        self._folder = folder
        self._context: Any = multiprocessing.get_context("fork")
        self._at = self._context.Value("q", numbers.start - 1)
        self._start()

    def _start(self) -> None:
        self.receiving, sending = self._context.Pipe(duplex=False)
        rest = range(self._at.value + 1, self._numbers.stop)
        arguments = (self._reader, self._folder, self._prepared, rest, (self._at, sending))
        self._child = self._context.Process(target=_child, args=arguments, daemon=True)
        self._child.start()
        sending.close()
        self._heard = time.monotonic()

    def goes_on(self) -> bool:
        """Add what the child has found so far; return whether there is more to come."""
        while self.receiving.poll():
            self._heard = time.monotonic()
            try:
                part: Outcome | None = self.receiving.recv()
            except EOFError:
                self._child.join()
                return self._died(f"the process ended with {self._child.exitcode}")
            if part is None:
                self._child.join()
                return False
            self._add(part)
        if time.monotonic() - self._heard > _OUTSIDE_S:
            self._child.kill()
            self._child.join()
            return self._died(f"no end after {_OUTSIDE_S:.0f} s")
        return True

    def _add(self, part: Outcome) -> None:
        total = self._total
        total.counts += part.counts
        total.failures = (total.failures + part.failures)[:_TOLD]
        total.slowest_s = max(total.slowest_s, part.slowest_s)
        total.memory_mib = max(total.memory_mib, part.memory_mib)

    def _died(self, why: str) -> bool:
        number = self._at.value
        self._add(Outcome(counts=Counter(failed=1), failures=[f"{self._reader.name} {number}: {why}"]))
        if number + 1 >= self._numbers.stop:
            return False
        self._start()
        return True


def _child(reader: Reader, folder: Path, prepared: Any, numbers: range, back: tuple[Any, Any]) -> None:
    originals, path, known = prepared
    at, sending = back
    rewrite_in(folder)
    logging.disable(logging.CRITICAL)
    limit_memory()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kinds: set[str] = set()
    for number in numbers:
        at.value = number
        outcome = Outcome()
        data = file_of(reader, originals, number)
        began = time.process_time()
        try:
            with time_limit():
                outcome.counts[attempt(reader, data, path, known)] += 1
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what is looked for
            outcome.counts["failed"] += 1
            kind = _kind(error)
            if kind not in kinds and len(kinds) < _TOLD:
                kinds.add(kind)
                outcome.failures.append(f"{reader.name} {number}: {kind}: {str(error)[:200]}")
        outcome.slowest_s = time.process_time() - began
        outcome.memory_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        sending.send(outcome)  # one by one: a process that dies takes nothing with it
    sending.send(None)


def _kind(error: Exception) -> str:
    """Return an exception's type and the last places that it came through."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__} at " + " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames[:-6:-1])


def limit_memory() -> None:
    """Let this process take LIMIT_MIB more than it has."""
    has = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (has + LIMIT_MIB * 2**20, resource.RLIM_INFINITY))


class time_limit:
    """Raise TooLongError in this block when it has taken LIMIT_S of CPU time."""

    def __enter__(self) -> None:
        signal.signal(signal.SIGPROF, self._over)
        signal.setitimer(signal.ITIMER_PROF, LIMIT_S)

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)

    @staticmethod
    def _over(number: int, frame: FrameType | None) -> None:
        raise TooLongError(f"more than {LIMIT_S:g} s of CPU time")
