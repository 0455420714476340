"""Who hears of a run while it goes on, beside the database: listeners, none of which can harm the training.

A listener is told on the training thread, when a sample is complete, and the time it takes is the probe's own: it comes
out of the overhead budget. What is slow (a file, a network) belongs on a thread of the listener's. One that raises is
told nothing more; the run goes on and says so.
"""

import logging
from collections.abc import Callable
from typing import Final, Protocol

from loka.errors import ArgumentError
from loka.probes.records import Event, RunInfo, RunProgress, StepRecord

log: Final = logging.getLogger("loka.probe")


class Listener(Protocol):
    """What `probe.subscribe` takes. In a job of several ranks, each hears what its own process sees."""

    def begin(self, info: RunInfo) -> None:
        """Hear that a run begins."""

    def write(self, step: StepRecord, progress: RunProgress) -> None:
        """Hear what a sampled step has shown, and how far the run is."""

    def event(self, event: Event) -> None:
        """Hear of something that happened."""

    def finish(self, progress: RunProgress) -> None:
        """Hear that the run is over; nothing comes after it."""


_HEARS: Final[tuple[str, ...]] = ("begin", "write", "event", "finish")


class Audience:
    """The listeners of one run."""

    def __init__(self) -> None:
        self.owed_s = 0.0  # spent on listeners since a sample was last charged for them
        self._listeners: list[Listener] = []
        self._info: RunInfo | None = None
        self._left: list[str] = []
        self._over = False

    def add(self, listener: Listener) -> None:
        """Take one more; it hears at once of a run that has begun. Raises what its `begin` raises."""
        if self._over:
            raise ArgumentError(
                "The run is over: a listener would hear nothing. Subscribe it inside the `with` block, or before."
            )
        missing = [name for name in _HEARS if not callable(getattr(listener, name, None))]
        if missing:
            raise ArgumentError(
                f"A {type(listener).__name__} is no listener: it has no {', '.join(missing)}. Of a function that takes "
                "a dict, make a loka.integrations.wandb.Sink(function)."
            )
        if self._info is not None:
            listener.begin(self._info)
        self._listeners.append(listener)

    def begin(self, info: RunInfo) -> None:
        """Tell all that the run begins. Raises what they raise: nothing has been probed yet."""
        self._info = info
        for listener in self._listeners:
            listener.begin(info)

    def write(self, step: StepRecord, progress: RunProgress) -> None:
        """Tell all what a sampled step has shown."""
        self._tell(lambda listener: listener.write(step, progress))

    def event(self, event: Event) -> None:
        """Tell all what happened."""
        self._tell(lambda listener: listener.event(event))

    def finish(self, progress: RunProgress) -> None:
        """Tell all that the run is over, and let them go."""
        self._tell(lambda listener: listener.finish(progress))
        self._listeners.clear()
        self._over = True

    def take_left(self) -> list[str]:
        """Return who has left since the last call, and why, in words."""
        left, self._left = self._left, []
        return left

    def _tell(self, news: Callable[[Listener], None]) -> None:
        for listener in tuple(self._listeners):
            try:
                news(listener)
            except Exception as error:  # noqa: BLE001 - foreign code must not stop the training that is probed
                self._listeners.remove(listener)
                message = (
                    f"a listener, {type(listener).__name__}, is told nothing more: it raised "
                    f"{type(error).__name__}: {error}. The database is complete without it"
                )
                self._left.append(message)
                log.warning(message)
