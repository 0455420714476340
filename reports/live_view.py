"""How a run that goes on is shown: a screenful for a terminal, a line per change for a file or a pipe."""

from collections import deque
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Final

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from loka.probes.records import MONITOR_EVENTS, Event, RunProgress
from loka.reports.live import Look
from loka.reports.table import table_of
from loka.reports.words import Report, percent, plain, plural

# News that stay on the screen.
_KEPT: Final[int] = 8
_FEWEST_ROWS: Final[int] = 3
# What a change says that is worse than before.
_ALARMING: Final[tuple[str, ...]] = ("-> unsafe", "crosses it about")
_ENDED: Final[dict[str, str]] = {
    "complete": "The run is complete.",
    "failed": "The training failed",
    "detached": "The probe was detached before the training ended",
    "incomplete": "The training ended without closing its run",
}


def totals_line(progress: RunProgress) -> str:
    """Return how far a run is."""
    line = (
        f"step {progress.steps:,}, {progress.sampled_steps:,} sampled, overhead {percent(progress.overhead_fraction)}"
    )
    return line + (f", {progress.skipped_samples:,} left out for the budget" if progress.skipped_samples else "")


def verdict_line(report: Report) -> str:
    """Return how the products of a report are judged, in one line."""
    counts = report["summary"]["verdicts"]
    line = ", ".join(f"{counts[verdict]:,} {verdict}" for verdict in ("safe", "unsafe", "undecided"))
    drifting = len(report["summary"]["drifting"])
    return f"{line}; within {report['bound']['text']}" + (f"; {drifting:,} drifting towards it" if drifting else "")


def event_line(event: Event) -> str:
    """Return an event in one line."""
    whose = " of a monitored training" if event.kind in MONITOR_EVENTS else ""
    return f"step {event.step:,}{whose}, {plain(event.kind)}: {plain(event.message)}"


def end_line(look: Look) -> str:
    """Return how the run ended; empty while it goes on."""
    if look.run is None or not look.over:
        return ""
    progress = look.run.progress
    reason = f": {plain(progress.reason)}" if progress.reason else ""
    return f"{_ENDED.get(progress.status, progress.status)}{reason}"


def _waiting(look: Look) -> str:
    """Return what is waited for; of a run that is over, why there is nothing to show."""
    return plain(look.waiting) if look.over else f"waiting: {plain(look.waiting)}"


class Screen:
    """The newest look as something Rich can draw: totals, verdicts, news, and as many rows as there is room for."""

    def __init__(self, db: str) -> None:
        self._db = plain(db)
        self._look = Look(waiting="looking")
        self._news: deque[str] = deque(maxlen=_KEPT)

    def show(self, look: Look) -> None:
        """Take a look; its news stay for a while."""
        self._look = look
        self._news.extend(_news(look))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        head = [Text(line, style=style, overflow="fold") for line, style in self._head()]
        yield from head
        report, width = self._look.report, options.max_width
        taken = sum(len(text.wrap(console, width, overflow="fold")) for text in head)
        if report is None or not report["sites"]:
            return
        room = max(console.height - taken - 4, _FEWEST_ROWS)
        table = table_of(report, width, ascii_only=options.ascii_only, most=room)
        yield Text("")
        yield table.lines
        left = len(report["sites"]) - room
        if left > 0:
            yield Text(f"and {plural(left, 'row')} more: loka report {self._db}", style="dim", overflow="ellipsis")

    def _head(self) -> Iterator[tuple[str, str]]:
        look = self._look
        if look.run is None:
            yield _waiting(look), "yellow"
            return
        info = look.run.info
        yield f"{plain(info.model)} on {plain(info.environment.device)}, run {plain(info.id[:8])}", "bold"
        yield totals_line(look.run.progress), ""
        if look.report is not None:
            yield verdict_line(look.report), ""
        if look.waiting:
            yield _waiting(look), "yellow"
        yield from ((f"- {line}", "dim") for line in self._news)
        if look.over:
            yield end_line(look), "bold"


class Lines:
    """The same for a file or a pipe: a line when something has changed, none when nothing has."""

    def __init__(self) -> None:
        self._totals = self._verdicts = self._waiting = ""

    def of(self, look: Look) -> Iterator[str]:
        """Yield what a look has brought, each line with the time of day, UTC."""
        now = datetime.now(UTC).strftime("%H:%M:%S")
        yield from (f"{now} {line}" for line in self._changed(look))

    def _changed(self, look: Look) -> Iterator[str]:
        if look.waiting and look.waiting != self._waiting:
            yield _waiting(look)
        self._waiting = look.waiting
        if look.run is None:
            return
        verdicts = verdict_line(look.report) if look.report is not None else ""
        totals = f"{look.run.progress.sampled_steps}"
        if totals != self._totals or verdicts != self._verdicts or look.over:
            line = totals_line(look.run.progress)
            yield f"{line}; {verdicts}" if verdicts else line
        self._totals, self._verdicts = totals, verdicts
        yield from _news(look)
        if look.over:
            yield end_line(look)


def _news(look: Look) -> Iterator[str]:
    """Yield what is new, a few lines of it: what became unsafe, or drifts, first; then the newest events."""
    changes = sorted(look.changes, key=lambda line: not any(sign in line for sign in _ALARMING))
    yield from changes[:_KEPT]
    if len(changes) > _KEPT:
        yield f"and {plural(len(changes) - _KEPT, 'more change')}"
    if len(look.events) > _KEPT:
        yield f"{plural(len(look.events) - _KEPT, 'older event')}: in the report"
    yield from map(event_line, look.events[-_KEPT:])
