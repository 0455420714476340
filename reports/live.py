"""A run as it goes: cheap looks at the database of a training that somebody else writes, and what changed between two.

A look reads the totals and the events of the run, which takes milliseconds whatever the model. Verdicts are judged
again only where there are new samples, and so rarely that it takes at most one part in REST of the time: condensing
thousands of products takes seconds, and the machine has a training to run. Kernels and times are left out: they do not
change while a run is probed.
"""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sqlalchemy import Engine

from loka.bounds import Bound
from loka.errors import DatabaseError, EvidenceError
from loka.probes.judging.evidence import collect_evidence
from loka.probes.records import Event
from loka.probes.storing.database import StoredRun, list_runs, open_database, read_run, resolve_url
from loka.reports.record import build_report
from loka.reports.words import Report, Row, best_recipe, crossing, plain, product_name

# Judging takes at most one part in so many of the time.
REST: Final[int] = 30
# How often in a row a database that is there may fail to open: it may be in the making.
_PATIENCE: Final[int] = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """What a look has shown. `run` is None while there is none, and `waiting` says for what."""

    waiting: str = ""
    run: StoredRun | None = None
    report: Report | None = None  # as of the newest judging; None before the first
    changes: tuple[str, ...] = ()  # verdicts and drifts that changed since the look before, in words
    events: tuple[Event, ...] = ()  # since the look before

    @property
    def over(self) -> bool:
        """Whether the run has ended."""
        return self.run is not None and self.run.progress.status != "running"


class Follower:
    """Looks at one run again and again: the one named, else the newest at the first look that finds any."""

    def __init__(self, db: str | os.PathLike[str], bound: Bound, run: str | None = None) -> None:
        self._db = db
        self._bound = bound
        self._wanted = run
        self._engine: Engine | None = None
        self._failures = 0
        self._events = 0  # told so far
        self._report: Report | None = None
        self._judged_samples = -1
        self._judge_again = 0.0  # not before
        self._note = ""

    def look(self) -> Look:
        """Look once. Raises DatabaseError, EvidenceError where waiting is of no use."""
        engine = self._open()
        if engine is None:
            return Look(waiting=self._note)
        if self._wanted is None and not (runs := list_runs(engine)):
            return Look(waiting="the database holds no run yet")
        if self._wanted is None:
            self._wanted = runs[-1].info.id
        run = read_run(engine, self._wanted)
        self._wanted = run.info.id
        events = run.events[self._events :]
        self._events = len(run.events)
        over = run.progress.status != "running"
        changes = self._judge(engine, run, final=over)
        return Look(run=run, report=self._report, changes=changes, events=events, waiting=self._note)

    def close(self) -> None:
        """Let go of the database."""
        if self._engine is not None:
            self._engine.dispose()
            self._engine = None

    def _open(self) -> Engine | None:
        """Return the database; None while it is not there yet."""
        if self._engine is not None:
            return self._engine
        url = resolve_url(self._db)
        if url.get_backend_name() == "sqlite" and not Path(url.database or "").exists():
            self._note = f"{url.database} does not exist yet"
            return None
        try:
            self._engine = open_database(self._db, create=False)
        except DatabaseError:
            self._failures += 1
            if self._failures >= _PATIENCE:
                raise
            self._note = "the database cannot be read yet"
            return None
        self._note = ""
        return self._engine

    def _judge(self, engine: Engine, run: StoredRun, *, final: bool) -> tuple[str, ...]:
        """Judge the run again if that is due; return what changed, in words."""
        samples, now = run.progress.sampled_steps, time.monotonic()
        if samples == self._judged_samples and not final:
            return ()
        if now < self._judge_again and not final:
            return ()
        try:
            evidence = collect_evidence(engine, run.info.id, confidence=self._bound.confidence)
        except EvidenceError as error:
            self._note = "no sampled step is stored yet" if not final else str(error)
            return ()
        report = build_report(evidence, self._bound)
        self._note = ""
        self._judged_samples = samples
        ended = time.monotonic()
        self._judge_again = ended + REST * (ended - now)
        before, self._report = self._report, report
        return changes(before, report) if before is not None else ()


def changes(before: Report, after: Report) -> tuple[str, ...]:
    """Return in words which products changed their verdict, or began or ceased to drift towards the bound."""
    known: Mapping[tuple[str, str], Row] = {(row["site"], row["pass"]): row for row in before["sites"]}
    found: list[str] = []
    for row in after["sites"]:
        old = known.get((row["site"], row["pass"]))
        if old is None:
            found.append(f"{product_name(row)}: new, {row['verdict']}")
            continue
        if old["verdict"] != row["verdict"]:
            why = f" ({plain(row['reason'])})" if row["reason"] else ""
            found.append(f"{product_name(row)}: {old['verdict']} -> {row['verdict']}{why}")
        found += _drifts(old, row)
    return tuple(found)


def _drifts(old: Row, row: Row) -> Sequence[str]:
    was, step = crossing(best_recipe(old)), crossing(best_recipe(row))
    if was is None and step is not None:
        return [f"{product_name(row)}: drifts towards the bound, crosses it about step {step:,}"]
    if was is not None and step is None:
        return [f"{product_name(row)}: drifts towards the bound no longer"]
    return []
