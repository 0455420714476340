"""The probe a user sees: a context manager around a training loop, with nothing to add inside the loop.

A step is one forward of the root module. On one step in each `every`, at changing places (`rhythm`), the forward and
its backward run under the capture mode; on the others the probe only takes the time. `with probe.step():` marks a step
by hand where that does not fit: a compiled train step, several forwards that are to count as one step, functional code.

    with loka.probe(model, "run.db"):
        for batch in loader:
            train_step(model, batch)
"""

import platform
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from os import PathLike
from types import TracebackType
from typing import Any, ClassVar, Final, Self

import torch
from torch import nn

from loka.errors import ArgumentError, EvidenceError, LokaWarning
from loka.hardware import device_info
from loka.naming import unwrap
from loka.probes.capturing import backward
from loka.probes.capturing.reach import reaches
from loka.probes.capturing.root import RootCall
from loka.probes.capturing.scope import capture_scope
from loka.probes.capturing.sites import FilterFn, fingerprint
from loka.probes.records import Environment, RunInfo, RunProgress, RunStatus
from loka.probes.sampling.audience import Listener
from loka.probes.sampling.sampler import Sampler
from loka.probes.sampling.settings import Settings
from loka.probes.sampling.steps import Steps
from loka.probes.sampling.team import Outbox, Writer, check_group, open_writer, size_of
from loka.version import VERSION

# The scope of a step that is not sampled.
_NOTHING: Final = nullcontext()
# Backwards without any forward of the model with gradient after which the user is told, and not only at the end.
_BACKWARDS_WITHOUT_FORWARD: Final[int] = 10
# What to do where the loop calls ...
_METHOD: Final[str] = (
    "a method of the model, or parts of it, such as model.training_step(batch), put that call inside `with "
    "{who}.forward():`"
)


class Probe:
    """What `loka.probe` returns, a context manager. `progress` tells at any time how far it has come."""

    who: ClassVar[str] = "probe"  # what a user has called, for messages

    def __init__(self, model: nn.Module, db: str | PathLike[str], settings: Settings) -> None:
        self.model = model
        self._db = db
        self._settings = settings
        self._steps = Steps(unwrap(model), settings)
        self._used = False
        self._root: RootCall | None = None
        self._writer: Writer | None = None
        self._thread = 0  # the one that has a capture scope open; 0: none has
        self._in_step = False  # inside `with probe.step()`
        self._by_hand = False  # steps are marked by `with probe.step()`
        self._in_forward = False  # inside `with probe.forward()`
        self._marked = False  # forwards are marked by `with probe.forward()`
        self._backward_inside = False  # inside the marked forward that is open
        self._pauses = 0  # `with probe.paused()` that are open
        self._info: RunInfo | None = None
        self._backwards_unseen = 0

    @property
    def overhead(self) -> float:
        """The share of the run's own time that may be added."""
        return self._settings.overhead

    @property
    def progress(self) -> RunProgress:
        """Steps, samples and overhead so far; `status` and `reason` as the run stands."""
        ended = self._steps.ended
        return self._steps.progress("detached" if ended else "running" if self._root else "complete", ended)

    def subscribe(self, listener: Listener) -> None:
        """Tell a listener of every sample when it is complete, before or inside the block; see `loka.integrations`.

        It is told on the training thread, within the overhead budget. One that raises is told nothing more.
        """
        self._steps.audience.add(listener)

    # --- entering and leaving the block ---

    def __enter__(self) -> Self:
        """Open the database, attach; raise DatabaseError before the first step if it cannot be written."""
        if self._used:
            raise ArgumentError("This probe has been used. One probe records one run: call loka.probe(...) again.")
        self._used = True
        self._writer = self._open_writer()
        if self._writer is None:
            return self
        try:
            self._steps.audience.begin(self._run_info())
        except BaseException as error:  # whatever a listener raises goes on to the user, and the run is closed
            self._writer.finish(self._steps.progress("failed", f"a listener raised {type(error).__name__}: {error}"))
            raise
        self._root = RootCall(self.model, self._around_forward)
        backward.listen(self)
        self._steps.start(self._writer)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Detach, write what is left, and say so if there was nothing to see."""
        if self._writer is None or self._root is None:
            return
        self._steps.stop()
        displaced = not self._root.is_in_place
        self._root.detach()
        self._root = None
        backward.stop_listening(self)
        ended = self._steps.ended
        status: RunStatus = "failed" if error is not None else "detached" if ended else "complete"
        reason = f"{type(error).__name__}: {error}" if error is not None else ended
        progress = self._steps.progress(status, reason)
        self._steps.dismiss(progress)
        self._writer.finish(progress)
        if error is not None:
            return
        self._steps.ended = ended or self._writer.failure or ""
        self._tell(self._steps.ended, displaced=displaced)

    def _open_writer(self) -> Writer | None:
        """Open what takes the records of the run."""
        return open_writer(self._db, self._run_info(), self._settings.process_group)

    def _tell(self, ended: str, *, displaced: bool) -> None:
        """Say how the run went where it did not go as it should: `ended` early, or nothing was seen."""
        if ended:
            warnings.warn(ended, LokaWarning, stacklevel=3)
        elif not self._steps.products_seen and not isinstance(self._writer, Outbox):
            raise EvidenceError(self._nothing_seen(displaced=displaced))

    def _run_info(self) -> RunInfo:
        self._info = self._info or self._describe()
        return self._info

    def _describe(self) -> RunInfo:
        return RunInfo(
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            environment=_environment(self.model),
            model=_root_name(self.model),
            fingerprint=fingerprint(unwrap(self.model)),
            every=self._settings.every,
            overhead_budget=self._settings.overhead,
            recipes=tuple(entry.name for entry in self._settings.recipes),
            world_size=max(size_of(self._settings.process_group), 1),
        )

    def _nothing_seen(self, *, displaced: bool = False) -> str:
        name, who = type(self.model).__name__, self.who
        steps, samples = self._steps.rhythm.steps, self._steps.budget.samples
        if not steps:
            if displaced:
                return (
                    f"The {who} lost sight of {name}: `module.compile()` inside the block took the place where its "
                    f"calls come by. Compile it before `with loka.{who}(...)`."
                )
            if type(self.model).__call__ is not nn.Module.__call__:
                return (
                    f"The {who} saw no forward of {name} inside its block: its class has a `__call__` of its own, and "
                    f"calls that pass nn.Module's by are not seen. Run each step, forward and backward, inside `with "
                    f"{who}.step():`."
                )
            return (
                f"The {who} saw no forward of {name} inside its block. Call the very object that was given to "
                f"loka.{who}, as model(...) and not model.forward(...); where the training loop calls a compiled or "
                f"wrapped one, give that to loka.{who}; and where a whole train step is compiled, run it inside "
                f"`with {who}.step():`. Where the loop calls {_METHOD.format(who=who)}."
            )
        hints = ""
        if self._settings.filter_fn is not None:
            hints += " The filter_fn may leave out every site that has one."
        if "fused" in self._steps.news.kinds:
            hints += " Fused operators, such as a recurrent layer's, hide theirs."
        if samples < steps:
            hints += (
                f" If it multiplies matrices only in some steps, sample more of them: every={self._settings.every} now."
            )
        return (
            f"The {who} watched {steps} steps of {name}, looked into {samples} of them, and saw no floating-point "
            f"matrix product.{hints} FP8 concerns matrix products only: check that this is the model that does the "
            "work."
        )

    # --- steps ---

    @contextmanager
    def step(self) -> Iterator[None]:
        """Mark one step by hand: everything inside, forward and backward, is one step.

        Needed where the root's forward does not delimit a step: a compiled train step, gradient accumulation that is to
        count as one step, functional code. What runs outside such steps is then not watched. A step inside a step is
        part of it. Raises ArgumentError before the probe's own block.
        """
        if not self._used:
            raise ArgumentError(
                "probe.step() marks a step of a run, and this probe has not begun one. Write `with loka.probe(model, "
                "db) as probe:` around the loop and `with probe.step():` inside it."
            )
        if self._root is None or self._in_step or self._in_forward or self._thread or self._root.running:
            yield
            return
        if self._pauses or self._steps.ended:
            yield
            return
        self._by_hand = self._in_step = True
        try:
            self._steps.begin(grad=True, by_hand=True)
            with self._steps.timed(), self._capturing(self._steps.sampler):
                yield
        finally:
            self._in_step = False

    @contextmanager
    def forward(self) -> Iterator[Callable[[Any], None]]:
        """Mark by hand what counts as one forward of the model; its backward is found as ever.

        Needed where the loop calls a method of the model, or parts of it, and not the model itself. From the first mark
        on, other calls of the model are no steps. What it yields may be shown an output for `probe(loss=...)`.
        """
        if self._root is None or self._in_step or self._in_forward or self._root.running:
            yield _pass_by
            return
        self._marked = self._in_forward = True
        self._backward_inside = False
        try:
            with self._around_forward(marked=True) as returned:
                yield returned
        finally:
            self._in_forward = False
            if self._backward_inside:
                self._steps.rhythm.backward()
                self._steps.rhythm.awaits_backward = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what runs inside, an evaluation in the midst of a training: no step of the run."""
        if self._in_step or self._in_forward:
            raise ArgumentError(
                "probe.paused() leaves out what lies between two steps, and a step is open. Write it outside "
                "`with probe.step():`."
            )
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1

    @contextmanager
    def _around_forward(self, *, marked: bool = False) -> Iterator[Callable[[Any], None]]:
        """Run one forward of the root, inside the capture scope where it belongs to a sample."""
        recompute = torch._C._current_autograd_node() is not None
        self._steps.rhythm.with_gradient |= recompute  # as of a cache of gradients, which runs it twice
        unwanted = self._by_hand or self._pauses > 0 or (self._marked and not marked)
        if unwanted or self._thread or self._steps.ended or recompute:
            ours = self._thread == threading.get_ident() and not recompute
            yield self._steps.returned if ours else _pass_by
            return
        grad = torch.is_grad_enabled()
        self._steps.begin(grad=grad, by_hand=False)
        belongs = self._steps.rhythm.captures(grad=grad)
        with self._steps.timed(), self._capturing(self._steps.sampler if belongs else None):
            yield self._steps.returned if belongs else _pass_by

    def around_backward(self, roots: Sequence[Any], *, create_graph: bool) -> AbstractContextManager[None] | None:
        """Scope for one backward: the capture scope if this step is sampled and none is open already."""
        sampler = self._steps.sampler
        self._backward_inside |= self._in_forward
        if self._thread:
            if sampler is None or self._thread != threading.get_ident():
                return None
            sampler.went_backward(roots, create_graph=create_graph)
            return sampler.capture.building_graph(create_graph)
        if self._in_step or self._in_forward or self._root is None or self._root.running:
            return None  # inside a step or forward that is not sampled
        if self._pauses or self._steps.ended:
            return None
        self._notice_unseen_forwards(roots)
        self._steps.rhythm.backward()
        if sampler is not None and not self._by_hand:
            sampler.went_backward(roots, create_graph=create_graph)
        return None if self._by_hand else self._around_backward(create_graph)

    @contextmanager
    def _around_backward(self, create_graph: bool) -> Iterator[None]:
        try:
            with self._steps.timed(), self._capturing(self._steps.sampler, create_graph=create_graph):
                yield
        finally:
            self._steps.rhythm.awaits_backward = False

    def _capturing(self, sampler: Sampler | None, *, create_graph: bool = False) -> AbstractContextManager[None]:
        """Open the capture scope of a sample; nothing where there is none."""
        return _NOTHING if sampler is None else self._captured(sampler, create_graph=create_graph)

    @contextmanager
    def _captured(self, sampler: Sampler, *, create_graph: bool) -> Iterator[None]:
        self._thread = threading.get_ident()
        started = time.perf_counter()
        try:
            with capture_scope(sampler.capture), sampler.capture.building_graph(create_graph):
                sampler.capture.probe_s += time.perf_counter() - started
                yield
        finally:
            self._thread = 0

    def _notice_unseen_forwards(self, roots: Sequence[Any]) -> None:
        """Tell the user early that the loop calls something else; not where another probe watches that."""
        if self._steps.rhythm.with_gradient or not backward.is_alone(self):
            return
        self._backwards_unseen += 1
        if self._backwards_unseen != _BACKWARDS_WITHOUT_FORWARD:
            return
        if not self._steps.rhythm.steps:
            warnings.warn(self._nothing_seen(), LokaWarning, stacklevel=6)
        elif reaches(roots, unwrap(self.model)):
            message = (
                f"the {self.who} saw forwards of {type(self.model).__name__} without gradient only, and backward "
                "passes reach its parameters: what was seen is not its training. Where the loop calls "
                f"{_METHOD.format(who=self.who)}"
            )
            self._steps.happened("unseen_forward", message)
            warnings.warn(f"{message[0].upper()}{message[1:]}.", LokaWarning, stacklevel=6)


def _pass_by(output: Any) -> None:
    """Show the output of a forward that belongs to no sample to nobody."""


def _root_name(model: nn.Module) -> str:
    return type(unwrap(model)).__name__


def _environment(model: nn.Module) -> Environment:
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return Environment(
        device=str(device_info(device)), torch=torch.__version__, python=platform.python_version(), loka=VERSION
    )


def probe(  # noqa: PLR0913 - the public keyword API; checked and bundled into Settings at once
    model: nn.Module,
    db: str | PathLike[str],
    *,
    every: int = 100,
    overhead: float = 0.01,
    recipes: Sequence[str] | None = None,
    filter_fn: FilterFn | None = None,
    loss: str | Callable[..., Any] | None = None,
    process_group: Any = None,
) -> Probe:
    """Measure what FP8 would do to every matrix product of a running loop: `with loka.probe(model, "run.db"): ...`.

    - `model`: the very object that the loop calls: the compiled or DDP-wrapped one, where there is one.
    - `db`: a SQLite path or a database URL. Runs are added to what is there.
    - `every`: one step in so many is sampled, the first and then each time at another place among them, so that a loop
      which takes turns is seen on all of them. A step is one forward of the model and what follows it.
    - `overhead`: the share of the run's own time that the probe may add; over budget it samples rarer, and says so.
    - `recipes`: names from `loka.formats.RECIPES`; by default tensorwise, rowwise, blockwise and mxfp8.
    - `filter_fn(module, fqn)`: which sites count.
    - `loss`: what the output of the model means, so that errors can be weighed by what the loss feels: "bce" for logits
      (or probabilities) of binary labels, "cross_entropy" for logits [..., classes], or a callable
      (output, generator) -> loss per item for labels that it draws from the model's own prediction. Every fourth
      sampled step then runs a second backward, which fires hooks on tensors. Without it the loop's own labels serve,
      which overstate outliers.
    - `process_group`: in a distributed job every rank of it (by default of the whole job) samples its own part, and its
      first rank writes; the others' `db` is not touched.

    Returns a context manager, with `step()` and `progress`. Raises ArgumentError, DatabaseError; EvidenceError on
    leaving if there was nothing to see.
    """
    check_group(process_group)
    settings = Settings.checked(model, every=every, overhead=overhead, recipes=recipes, filter_fn=filter_fn, loss=loss)
    return Probe(model, db, replace(settings, process_group=process_group))
