"""A probe held open over the hooks of a training framework, where no `with` block can stand around the loop.

It is paused except inside training batches, so that an evaluation in their midst is no step. What it logs waits in
`Readings` until the framework's own hook comes by. It ends with the training, whatever ended that.
"""

import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Final, TypedDict, Unpack

from torch import nn

from loka.errors import ArgumentError, EvidenceError, LokaWarning
from loka.probes.capturing.sites import FilterFn
from loka.probes.records import Event, RunInfo, RunProgress, StepRecord
from loka.probes.sampling.audience import Listener
from loka.probes.sampling.session import Probe, probe
from loka.reports.metrics import Detail, check_detail, step_metrics

Loss = str | Callable[..., Any] | None


class ProbeOptions(TypedDict, total=False):
    """What a callback hands on to `loka.probe`, beside the loss."""

    every: int
    overhead: float
    recipes: Sequence[str] | None
    filter_fn: FilterFn | None
    process_group: Any


class Readings:
    """A listener that keeps the numbers of every `log_every`th sample until they are taken; 0: of none."""

    def __init__(self, log_every: int, detail: Detail) -> None:
        if isinstance(log_every, bool) or not isinstance(log_every, int) or log_every < 0:
            raise ArgumentError(
                f"log_every={log_every!r}: one sampled step in how many is logged, from 1; 0 logs none. The database "
                "has all of them."
            )
        self._log_every = log_every
        self._detail = check_detail(detail)
        self._samples = 0
        self._waiting: dict[str, float] | None = None

    def begin(self, info: RunInfo) -> None:
        """Start counting anew."""
        self._samples, self._waiting = 0, None

    def write(self, step: StepRecord, progress: RunProgress) -> None:
        """Keep the numbers of a sample, if it is one to log."""
        if self._log_every and self._samples % self._log_every == 0:
            self._waiting = step_metrics(step, progress, detail=self._detail)
        self._samples += 1

    def event(self, event: Event) -> None:
        """Events are no numbers: they are in the database."""

    def finish(self, progress: RunProgress) -> None:
        """What waits stays to be taken."""

    def take(self) -> dict[str, float]:
        """Return what waits; empty where nothing does."""
        waiting, self._waiting = self._waiting, None
        return waiting or {}


class Held:
    """One probe from the beginning of a training to its end."""

    def __init__(
        self,
        model: nn.Module,
        db: str | os.PathLike[str],
        listeners: Sequence[Listener],
        loss: Loss,
        **options: Unpack[ProbeOptions],
    ) -> None:
        """Attach; raises what `loka.probe` raises."""
        self.probe: Final[Probe] = probe(model, db, loss=loss, **options)
        self._pause = ExitStack()
        for listener in listeners:
            self.probe.subscribe(listener)
        self.probe.__enter__()
        self.pause()

    def pause(self) -> None:
        """From here on, nothing is a step."""
        self._pause.close()
        self._pause.enter_context(self.probe.paused())

    def resume(self) -> None:
        """A training batch begins."""
        self._pause.close()

    def stop(self, error: BaseException | None = None) -> None:
        """Detach and close the run, as failed where an error ended the training; warn if there was nothing to see."""
        self._pause.close()
        try:
            self.probe.__exit__(type(error) if error else None, error, error.__traceback__ if error else None)
        except EvidenceError as nothing:
            warnings.warn(str(nothing), LokaWarning, stacklevel=3)  # the training is over, and well
