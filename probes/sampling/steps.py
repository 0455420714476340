"""The steps of a run: which of them are sampled, what that may cost, and what comes of each sample."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final

import torch
from torch import nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes

from loka.probes.capturing.sites import SiteMap, fingerprint
from loka.probes.records import Event, RunProgress, RunStatus, StepRecord
from loka.probes.sampling.audience import Audience
from loka.probes.sampling.budget import Budget
from loka.probes.sampling.learning import Learner, size_of
from loka.probes.sampling.news import News
from loka.probes.sampling.rhythm import Rhythm
from loka.probes.sampling.sampler import Memory, Sampler
from loka.probes.sampling.settings import Settings
from loka.probes.sampling.team import Outbox, Writer
from loka.probes.sampling.weights import WeightWatch

log: Final = logging.getLogger("loka.probe")


# One sampled step in so many takes the impact on the loss, and runs backward once more where there is a loss hook; the
# first one after the step that has shown how many items a batch holds.
_IMPACT_EVERY: Final[int] = 4
_FIRST_IMPACT: Final[int] = 2


# Of what a monitor may take, the share that its budget spends. Hooks in every step, and the caches that a sample leaves
# cold, are not on its clock: it saw half of what was measured, or more (benchmarks/monitor_overhead.py).
_ON_THE_CLOCK: Final[float] = 0.6


def _budget_of(settings: Settings) -> Budget:
    """Return the budget of a run; a monitor needs no evidence early, and never spends what it has not earned."""
    if settings.watch is None:
        return Budget(every=settings.every, overhead=settings.overhead)
    return Budget(every=settings.every, overhead=_ON_THE_CLOCK * settings.overhead, scheduled=1)


class Steps:
    """Counts steps, opens and closes samples, hands them to the writer; raises nothing into the training loop."""

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self.rhythm = Rhythm(every=settings.every)
        self.budget = _budget_of(settings)
        self.news = News()
        self.audience = Audience()
        self.sampler: Sampler | None = None  # of the step that is being sampled
        self.products_seen = 0
        self.ended = ""  # why nothing more is sampled, in words
        self._model = model
        self._settings = settings
        self._sites = SiteMap(model, settings.filter_fn)
        self._weights = WeightWatch(fingerprint(model))
        self._memory = Memory(learner=Learner.within(size_of(model.parameters())))
        self._loss = settings.loss
        self._watch = settings.watch
        self._who = "probe" if settings.watch is None else "monitor"
        self._leaving = ""  # why nothing more should be sampled, which a watch is to agree to
        self._writer: Writer | None = None
        self._lost = 0
        self._last_was_plain = False
        self._started_at = self._stopped_at = self._step_started_at = self._inside_s = 0.0

    def start(self, writer: Writer) -> None:
        """Begin the run."""
        self._writer = writer
        self._memory.learner.rank = writer.rank or 0
        self._memory.reads_biases = not isinstance(writer, Outbox)
        self._started_at = time.perf_counter()

    def stop(self) -> None:
        """End the run, and the sample that is open."""
        self._finish()
        self._write_learned(final=True)
        self._stopped_at = time.perf_counter()

    def progress(self, status: RunStatus, reason: str) -> RunProgress:
        """Return the totals so far."""
        until = self._stopped_at or time.perf_counter()
        return RunProgress(
            steps=self.rhythm.steps,
            sampled_steps=self.budget.samples,
            skipped_samples=self.budget.skipped,
            wall_s=until - self._started_at if self._started_at else 0.0,
            probe_s=self.budget.spent_s + self.budget.aside_s + self.audience.owed_s,
            unattributed=self._lost,
            weights_changed=self._weights.changed,
            status=status,
            reason=reason,
        )

    def happened(self, kind: str, message: str) -> None:
        """Take note of something that the reader of the run should be told."""
        self._tell(Event(step=self.rhythm.steps, kind=kind, message=message))

    def timed(self) -> "_Timed":
        """Add to the time that the running step has spent in forward and backward."""
        return _Timed(self)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Take note of the time that something takes between samples."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.budget.aside_s += time.perf_counter() - started

    def spent_inside(self, seconds: float) -> None:
        """Take note of time that went by in forward or backward."""
        self._inside_s += seconds

    def begin(self, *, grad: bool, by_hand: bool) -> None:
        """Close what the previous step left, count this one, and decide whether it is sampled."""
        if self.sampler is not None and self.rhythm.is_over():
            self._finish(time.perf_counter())
        elif self._last_was_plain:
            self.budget.plain_step(time.perf_counter() - self._step_started_at, self._inside_s)
        self._step_started_at = time.perf_counter()
        self._inside_s = 0.0
        if self._watch is not None and self._watch.asks():
            self.rhythm.ask()
        due = self.rhythm.forward(grad=grad, by_hand=by_hand)
        if due and self.sampler is None and self._healthy():
            self._open(self.rhythm.steps - 1)
        self._last_was_plain = self.sampler is None

    def returned(self, output: Any) -> None:
        """Look at what the root returned in a forward that belongs to a sample."""
        sampler = self.sampler
        if sampler is None or self._writer is None:
            return
        failure = sampler.returned(output, self._loss)
        if failure:
            self._loss = None
            for event in self.news.without_hook(sampler.step, failure):
                self._tell(event)

    def _open(self, step: int) -> None:
        """Begin a sample, if the budget allows one."""
        assert self._writer is not None
        with self.harmless(step):
            if not self._may_open():
                for event in self.news.skipped(step, self._settings.overhead) if not self.ended else ():
                    self._tell(event)
                return
            self.rhythm.begin()
            self._sites.refresh()
            self._weights.begin(self._model)
            sampler = Sampler(self._sites, self.budget, self._settings.recipes, step, self._memory, self._watch)
            sampler.takes_impact = self._watch is None and self.budget.samples % _IMPACT_EVERY == _FIRST_IMPACT
            sampler.capture.probe_s += time.perf_counter() - self._step_started_at
            self.sampler = sampler

    def _may_open(self) -> bool:
        """Ask the budget, and the watch where there is one: that also when this process wants to end."""
        wall_s, urgent = self._step_started_at - self._started_at, self._watch is not None and self._watch.urgent
        allowed = not self._leaving and self.budget.begin_sample(wall_s, urgent=urgent)
        if self._watch is None:
            return allowed
        goes, end = self._watch.agrees(allowed=allowed, leaving=self._leaving)
        if allowed and not goes:
            self.budget.withdraw()
        if end:
            self.ended = end
        return goes and not end

    def _finish(self, now: float = 0.0) -> None:
        """Hand over what the sample has shown; `now`: when the next step began, if one did."""
        sampler, self.sampler = self.sampler, None
        if sampler is None or self._writer is None:
            return
        started = time.perf_counter()
        record: StepRecord | None = None
        with self.harmless(sampler.step):
            record = sampler.finish()
        self._show(sampler, record)
        if record is not None:
            with self.harmless(sampler.step):
                self._keep(sampler, record, started, now)
        sampler.let_go()

    def _show(self, sampler: Sampler, record: StepRecord | None) -> None:
        """Show the watch, where there is one, what a sample has shown."""
        if self._watch is not None:
            with self.harmless(sampler.step), _disable_current_modes(), torch.no_grad():
                self._watch.sampled(None if sampler.failure else record)

    def _keep(self, sampler: Sampler, record: StepRecord, started: float, now: float) -> None:
        """Hand over a record; charge the sample, whose record was begun when `started`."""
        assert self._writer is not None
        self._sites.clear()
        self.products_seen += len(record.products)
        self._lost += sampler.lost_products
        self._weights.saw(record)
        hidden = {site or type(self._model).__name__: op for site, op in sampler.hidden_products.items()}
        for event in self.news.of(record, hidden):
            self._tell(event)
        self._write_learned()
        finishing_s = time.perf_counter() - started
        whole_s = now - self._step_started_at + finishing_s if now and self.rhythm.spans_one_step() else 0.0
        owed_s, self.audience.owed_s = self.audience.owed_s, 0.0
        probe_s = sampler.capture.probe_s + finishing_s + owed_s
        self.budget.end_sample(probe_s, whole_s, self._inside_s + finishing_s)
        if (watch := self._watch) is not None:
            names = self._memory.names
            self.budget.first(lambda key: watch.waits_for(names.get(key[0], ""), key[1]))
        self._writer.write(record, self.progress("running", ""))
        self._tell_sample(record)
        if sampler.failure:
            self._end(_gave_up(self._who, sampler.step, sampler.failure))

    def _write_learned(self, *, final: bool = False) -> None:
        """Write what was learned so far, at ever longer intervals: it is kept as a whole, and rewritten as a whole."""
        memory, writer = self._memory, self._writer
        if writer is None or not (final or memory.learner.is_due(self.budget.samples)):
            return
        with self.harmless(self.rhythm.steps), _disable_current_modes():
            keep_rows = final and writer.rank is not None
            writer.learned(memory.learner.records(memory.names, keep_rows=keep_rows), final=final)
            for event in self.news.forgotten(self.rhythm.steps, len(memory.learner.left_out)):
                self._tell(event)

    def _tell(self, event: Event) -> None:
        """Tell the database, and whoever listens, what happened."""
        if self._writer is not None:
            self._writer.event(event)
        self.audience.event(event)

    def _tell_sample(self, record: StepRecord) -> None:
        """Show the listeners a sample; what they take is charged to the next one."""
        started = time.perf_counter()
        rank = self._writer.rank if self._writer is not None else None
        self.audience.write(replace(record, rank=rank or 0), self.progress("running", ""))
        self._tell_left(record.step)
        self.audience.owed_s += time.perf_counter() - started

    def _tell_left(self, step: int) -> None:
        for message in self.audience.take_left():
            self._tell(Event(step=step, kind="listener_left", message=message))

    def dismiss(self, progress: RunProgress) -> None:
        """Tell the listeners that the run is over."""
        self.audience.finish(progress)
        self._tell_left(progress.steps)

    @contextmanager
    def harmless(self, step: int) -> Iterator[None]:
        """End the probe, and not the training, when something unforeseen fails inside."""
        try:
            with temporarily_clear_interpreter_stack():  # a step may begin inside a transform of torch.func
                yield
        except Exception as error:  # noqa: BLE001 - a probe must never stop the training it watches; it is told and ends
            self._end(_gave_up(self._who, step, f"{type(error).__name__}: {error}"))

    def _healthy(self) -> bool:
        if self._writer is not None and self._writer.failure:
            self._end(self._writer.failure)
        return not self.ended

    def _end(self, reason: str) -> None:
        if self.ended or self._leaving:
            return
        if self._watch is not None:
            self._leaving = reason  # at the next sample that is due the watch hears of it
            return
        self.ended = reason
        log.warning("probe detached at step %d: %s", self.rhythm.steps, reason)


class _Timed:
    """The scope of `Steps.timed`: no generator, every step has two."""

    __slots__ = ("_started", "_steps")

    def __init__(self, steps: Steps) -> None:
        self._steps = steps

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._steps.spent_inside(time.perf_counter() - self._started)


def _gave_up(who: str, step: int, failure: str) -> str:
    return (
        f"Looking into step {step} failed ({failure}). The {who} let go of the model; training went on and what was "
        "recorded is kept. Please report it with the code of the model."
    )
