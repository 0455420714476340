"""A listener that works on a thread of its own: what a training hands over is written while the training goes on.

Nothing waits for it. Where it cannot keep up, samples are left out and counted, events never are; where it fails, it
says so once and the training goes on.
"""

import logging
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import Final

from loka.errors import ArgumentError
from loka.probes.records import Event, RunInfo, RunProgress, StepRecord

log: Final = logging.getLogger("loka.integrations")

# Samples that may wait; one holds about a kilobyte per product and recipe.
CAPACITY: Final[int] = 16
# How long the end of a run waits for what is left.
PATIENCE_S: Final[float] = 30.0


class Courier(ABC):
    """A listener whose work is done elsewhere. Subclasses say how each kind of news is written; one run each."""

    def __init__(self) -> None:
        self.failure: str | None = None
        self.dropped = 0  # samples left out
        self._work: deque[Callable[[], None] | None] = deque()
        self._samples = 0  # of them that wait
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    # --- what a subclass says; all of it on the courier's thread, `opened` in the caller ---

    @abstractmethod
    def opened(self, info: RunInfo) -> None:
        """Open, at the beginning of a run; raise LokaError where that is impossible."""

    @abstractmethod
    def sampled(self, step: StepRecord, progress: RunProgress) -> None:
        """Write a sampled step."""

    @abstractmethod
    def happened(self, event: Event) -> None:
        """Write an event."""

    @abstractmethod
    def closed(self, progress: RunProgress) -> None:
        """Write the end of the run, and close."""

    # --- what a probe calls ---

    def begin(self, info: RunInfo) -> None:
        """Begin: open what is written to, and start the thread."""
        if self._thread is not None:
            raise ArgumentError(
                f"This {type(self).__name__} has been used. One sink takes one run: make another for the next probe."
            )
        self.opened(info)
        self._thread = threading.Thread(target=self._deliver, name="loka-courier", daemon=True)
        self._thread.start()

    def write(self, step: StepRecord, progress: RunProgress) -> None:
        """Hand over a sampled step."""
        with self._changed:
            if self._samples >= CAPACITY:
                self.dropped += 1
                return
            self._samples += 1
        self._put(lambda: self._sample(step, progress))

    def event(self, event: Event) -> None:
        """Hand over an event."""
        self._put(lambda: self.happened(event))

    def finish(self, progress: RunProgress) -> None:
        """Hand over the end, and wait for all of it to be written, PATIENCE_S at most."""
        if self._thread is None:
            return
        self._put(lambda: self.closed(progress))
        self._put(None)
        self._thread.join(PATIENCE_S)
        if self.dropped:
            log.warning("%s left out %d samples: it could not keep up", type(self).__name__, self.dropped)

    def _put(self, work: Callable[[], None] | None) -> None:
        with self._changed:
            self._work.append(work)
            self._changed.notify()

    def _sample(self, step: StepRecord, progress: RunProgress) -> None:
        with self._changed:
            self._samples -= 1
        self.sampled(step, progress)

    def _deliver(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._work)
                work = self._work.popleft()
            if work is None:
                return
            if self.failure is not None:
                continue
            try:
                work()
            except Exception as error:  # noqa: BLE001 - foreign code and disks fail; the training must not
                self.failure = f"{type(self).__name__} stopped: {type(error).__name__}: {error}. Training goes on."
                log.warning(self.failure)
