"""The monitor: what a probe is before a plan is made, it is while the plan runs.

Evidence from a training that goes on holds for a stated number of steps, its horizon; from there on somebody has to
look. On one step in `every` the monitor measures, on the operands that the model has then, the error of every recipe in
use, and puts each product through a sequential test with a stated rate of false alarms. A product that has left its
limit goes to the next kernel that the plan found admissible, in the end to high precision; it comes back when it has
been clean for long enough, a few times at most. A kernel that stops working is taken out of use.

    with loka.monitor(model, plan, db="run.db"):
        for batch in loader:
            train_step(model, batch)

Everything that happens is an event: logged, kept in `events`, and added to the run that the plan was made from.
"""

import logging
import operator
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from os import PathLike
from typing import Any, ClassVar, Final, Self

import torch.distributed as dist
from torch import nn

from loka.calls import is_compiled
from loka.dispatch.deciding.job import all_or_none, check_plans
from loka.dispatch.deciding.plan import Plan
from loka.dispatch.monitoring.guard import Patience
from loka.dispatch.monitoring.held_steps import HeldSteps
from loka.dispatch.monitoring.plan_watch import PlanWatch
from loka.dispatch.monitoring.sequential import FALSE_ALARMS
from loka.dispatch.monitoring.team_watch import Team
from loka.dispatch.running.convert import check_fits, plan_of, planned_sites
from loka.errors import ArgumentError, LokaWarning
from loka.naming import unwrap
from loka.probes.records import Event, RunProgress, StepRecord
from loka.probes.sampling.session import Probe
from loka.probes.sampling.settings import Settings
from loka.probes.sampling.team import Writer
from loka.probes.storing.writer import RunWriter

log: Final = logging.getLogger("loka.monitor")

DEFAULT_OVERHEAD: Final[float] = 0.005
CLEAN_STEPS: Final[int] = 20
MAX_FLIPS: Final[int] = 2
# Events that a user is to see without having asked for anything.
_ALARMS: Final[frozenset[str]] = frozenset(
    {"demoted", "kernel_fault", "kernel_differs", "step_held", "nonfinite_gradients", "monitor_ended"}
)


class Monitor(Probe):
    """What `loka.monitor` returns: a context manager around the training loop.

    `events` is all that has happened, `changed` what runs on another kernel than planned.
    """

    who: ClassVar[str] = "monitor"

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        db: str | PathLike[str] | None,
        settings: Settings,
        patience: Patience,
        *,
        hold_steps: bool,
    ) -> None:
        self._holds_steps = hold_steps
        self.events: list[Event] = []
        self._plan = plan
        self._watch = PlanWatch(unwrap(model), plan, patience, Team(settings.process_group, model), self._tell_all)
        super().__init__(model, db if db is not None else "", replace(settings, watch=self._watch))
        self._held = HeldSteps(unwrap(model), self._watch, self._steps, self._tell_all)
        self._records = db is not None and self._watch.team.leads
        self._book: RunWriter | None = None
        self._book_failed = False

    @property
    def changed(self) -> Mapping[str, str]:
        """Products, as `site.pass`, that run on another kernel than the planned one, and which."""
        return self._watch.state()

    def __enter__(self) -> Self:
        """Attach, to the optimizers as well."""
        entered = super().__enter__()
        if self._holds_steps:
            self._held.attach()
        return entered

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        """Detach; the kernels stay as they are."""
        self._held.detach()
        if error is not None:
            self._watch.team.leave()
        super().__exit__(kind, error, traceback)

    def around_backward(self, roots: Sequence[Any], *, create_graph: bool) -> AbstractContextManager[None] | None:
        """Scope for one backward, as a probe has it."""
        scope = super().around_backward(roots, create_graph=create_graph)
        self._held.went_backward()
        return scope

    def _open_writer(self) -> Writer:
        def opened() -> RunWriter | None:
            joins = self._plan.environment.get("run", "")
            return RunWriter(self._db, self._run_info(), joins=joins) if self._records else None

        group = self._settings.process_group
        self._book = opened() if group is None else all_or_none(opened, group)
        return _Desk(self)

    def _tell_all(self, event: Event) -> None:
        """Tell of an event that the watch has found, listeners too."""
        self._tell_event(event)
        self._steps.audience.event(event)

    def _tell_event(self, event: Event) -> None:
        """Keep, log and record an event."""
        self.events.append(event)
        if self._watch.team.leads:
            level = logging.WARNING if event.kind in _ALARMS else logging.INFO
            log.log(level, "step %d, %s: %s", event.step, event.kind, event.message)
        if self._book is None:
            return
        self._book.event(event)
        if self._book.failure and not self._book_failed:
            self._book_failed = True
            log.warning("the monitor goes on without its database: %s", self._book.failure)

    def _finish(self, progress: RunProgress) -> None:
        """Tell how it went, and close the database."""
        if progress.status in ("failed", "detached"):
            self._tell_event(Event(step=progress.steps, kind="monitor_ended", message=progress.reason))
        self._tell_event(Event(step=progress.steps, kind="monitored", message=self._summary(progress)))
        if self._book is not None:
            self._book.finish(progress)
            if self._book.failure:
                warnings.warn(self._book.failure, LokaWarning, stacklevel=4)

    def _summary(self, progress: RunProgress) -> str:
        watch = self._watch
        told = [
            f"{progress.sampled_steps} of {progress.steps} steps monitored, {watch.products} readings of "
            f"{len(watch.guards)} products, {100 * progress.overhead_fraction:.3g} % of the time; at most "
            f"{FALSE_ALARMS * watch.products:.2g} false alarms are expected"
        ]
        if self._held.count:
            told.append(f"{self._held.count} step{'s' * (self._held.count > 1)} of the optimizer left out")
        changed = [f"{name} on {kernel}" for name, kernel in watch.state().items()]
        told.append(f"{len(changed)} not as planned: {', '.join(changed)}" if changed else "all run as planned")
        name, share = watch.worst()
        if name:
            told.append(f"closest to its limit at last: {name}, {100 * share:.3g} % of it")
        return "; ".join(told)

    def _tell(self, ended: str, *, displaced: bool) -> None:
        """Warn where the monitor did not see, or stopped seeing, what it was to guard."""
        if ended:
            warnings.warn(ended, LokaWarning, stacklevel=4)
        elif not self._steps.products_seen and self._watch.guards:
            warnings.warn(
                f"Nothing was monitored. {self._nothing_seen(displaced=displaced)}", LokaWarning, stacklevel=4
            )


class _Desk:
    """Where the samples of a monitor go in place of a database: nowhere, the watch has seen them. Events go on."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self.failure: str | None = None
        self.rank: int | None = None

    def write(self, step: StepRecord, progress: RunProgress) -> None:
        """Let go of a sample."""

    def event(self, event: Event) -> None:
        """Pass on what the capture has to tell."""
        if event.kind == "over_budget":
            text = (
                f"the monitored step due at step {event.step} was left out, and more may be: they would cost more than "
                f"{self._monitor.overhead:.3g} of the run's own time. A drift is then found later"
            )
            event = replace(event, message=text)
        self._monitor._tell_event(event)

    def learned(self, records: Any, *, final: bool) -> bool:
        """Let go of what would be learned: a monitor learns nothing."""
        return True

    def finish(self, progress: RunProgress) -> None:
        """Close."""
        self._monitor._finish(progress)


def monitor(  # noqa: PLR0913 - the public keyword API; checked and bundled at once
    model: nn.Module,
    plan: Plan | str | PathLike[str],
    db: str | PathLike[str] | None = None,
    *,
    every: int = 100,
    overhead: float = DEFAULT_OVERHEAD,
    clean_steps: int = CLEAN_STEPS,
    max_flips: int = MAX_FLIPS,
    hold_steps: bool = True,
    process_group: "dist.ProcessGroup | None" = None,
) -> Monitor:
    """Watch over a plan while a training runs on it: `with loka.monitor(model, plan, "run.db"): ...`.

    - `model`: the very object that the loop calls, converted, or compiled with `backend="loka"` and this plan.
    - `db`: the probe database that the plan was made from. Events are added to its run, or to a run of their own where
      it is not in there; without `db` they are logged and kept in `events`.
    - `every`: one step in so many is monitored, in high precision, each time at another place among them.
    - `overhead`: the share of the run's own time that this may add; over it, fewer products per step, then fewer steps.
    - `clean_steps`, `max_flips`: a product that left its limit comes back after so many clean monitored steps in a row,
      so many times at most.
    - `hold_steps`: leave out an optimizer step whose gradients are not finite, and monitor the next step at once; ranks
      that monitor together leave out until one is due. Where a kernel in use can fail, each optimizer step is then
      preceded by a look at its gradients, which comes on top of `overhead`; on a device it waits for the backward pass.
    - `process_group`: its ranks decide together and change kernels alike. Each has to monitor, and take the same steps.

    Raises ArgumentError, PlanError, DatabaseError.
    """
    plan = plan_of(plan)
    for name, value in (("clean_steps", clean_steps), ("max_flips", max_flips)):
        if isinstance(value, bool) or not isinstance(value, int) or value < (name == "clean_steps"):
            raise ArgumentError(f"monitor({name}={value!r}): a whole number, e.g. {name}=20. 0 flips: never back.")
    _check_model(model, plan)
    if process_group is not None:
        check_plans(plan, process_group)
    elif dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        log.warning("this rank monitors alone; with process_group= all ranks would change kernels together")
    watched = {decision.request.site for decision in plan.decisions if decision.recipe is not None}
    settings = Settings.checked(
        model,
        every=every,
        overhead=overhead,
        recipes=None,
        filter_fn=(lambda module, site: site in watched) if watched else None,
        loss=None,
    )
    patience = Patience(clean_steps=operator.index(clean_steps), max_flips=operator.index(max_flips))
    settings = replace(settings, process_group=process_group)
    return Monitor(model, plan, db, settings, patience, hold_steps=hold_steps)


def _check_model(model: nn.Module, plan: Plan) -> None:
    """Raise where the plan is not what the model runs."""
    check_fits(plan, model)
    name = type(unwrap(model)).__name__
    if not any(decision.recipe is not None for decision in plan.decisions):
        # On a device where nothing gains this is the honest plan, and the script that monitors it goes on.
        told = f"This plan leaves every product of {name} in high precision: there is nothing to monitor."
        warnings.warn(told, LokaWarning, stacklevel=3)
        return
    compiled = any(hasattr(module, "_orig_mod") or is_compiled(module) for module in model.modules())
    if not planned_sites(model) and not compiled:
        raise ArgumentError(
            f"{name} does not run this plan: it is neither converted nor compiled. Write loka.convert(model, plan), or "
            'torch.compile(model, backend="loka", options={"plan": plan}), and give loka.monitor what the loop calls.'
        )
