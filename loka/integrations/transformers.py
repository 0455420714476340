"""The probe as a callback of Hugging Face's Trainer: `Trainer(..., callbacks=[ProbeCallback("run.db")])`.

A step is one forward of the model: with accumulated gradients each micro-batch is one; evaluations, predictions and
saving are none, since the probe is paused but for the time between `on_step_begin` and `on_step_end`.

A callback is told of the model and not of its Trainer, which alone knows the compiled or wrapped one that its loop
calls, can log, and is where an exception or Ctrl-C passes. So the Trainer is looked up among the callers of the hook.
"""

import functools
import inspect
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, Unpack
from weakref import WeakSet

from torch import nn

from loka.integrations.held import Held, Loss, ProbeOptions, Readings
from loka.integrations.libraries import library
from loka.naming import unwrap
from loka.probes.sampling.audience import Listener
from loka.reports.metrics import Detail

_transformers: Any = library("transformers", "transformers", "loka.integrations.transformers")

if TYPE_CHECKING:
    _TrainerCallback = object
else:
    _TrainerCallback = _transformers.TrainerCallback

# What the end of a model's class name says of its logits.
_CROSS_ENTROPY: Final[tuple[str, ...]] = (
    *("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForTokenClassification", "ForMultipleChoice"),
)
_BY_PROBLEM: Final[dict[str, str]] = {
    "single_label_classification": "cross_entropy",
    "multi_label_classification": "bce",
}


class ProbeCallback(_TrainerCallback):
    """Probes a training under a Trainer of transformers into `db`; the options are those of `loka.probe`.

    - `loss`: as in `loka.probe`, or "auto": cross-entropy for causal language models and token classifiers, what
      `config.problem_type` says for sequence classifiers, none for anything else.
    - `log_every`: one sampled step in so many goes to `Trainer.log`, 0: none. `detail` says how much of it: "summary",
      the worst and the median error per pass and recipe, or "sites", every site's as well.
    - `listeners`: what else is told, such as `loka.integrations.jsonl.Sink`.

    Each `train()` is a run of its own in the database. Raises what `loka.probe` raises, when training starts.
    """

    def __init__(
        self,
        db: str | os.PathLike[str],
        *,
        loss: Loss = "auto",
        log_every: int = 1,
        detail: Detail = "summary",
        listeners: Sequence[Listener] = (),
        **options: Unpack[ProbeOptions],
    ) -> None:
        super().__init__()
        self._db = db
        self._loss = loss
        self._readings = Readings(log_every, detail)
        self._listeners = (self._readings, *listeners)
        self._options = options
        self._held: Held | None = None
        self._trainer: Any = None  # whose training it is
        self._guarded: WeakSet[Any] = WeakSet()

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Learn of the Trainer while it is made."""
        self._guard(_caller(_transformers.Trainer))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach. A training that went away without a word, to begin again with smaller batches, is closed first."""
        self._stop(RuntimeError("the training began again before it had ended"))
        self._guard(_caller(_transformers.Trainer))
        model: nn.Module = kwargs["model"] if self._trainer is None else self._trainer.model_wrapped
        loss = loss_of(unwrap(model)) if self._loss == "auto" else self._loss
        self._held = Held(model, self._db, self._listeners, loss, **self._options)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Watch, all micro-batches of an optimizer step."""
        if self._held is not None:
            self._held.resume()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look away, and log."""
        if self._held is not None:
            self._held.pause()
            self._log()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the run."""
        self._stop(None)

    def _guard(self, trainer: Any) -> None:
        """Take note of a Trainer, and close the run where its `train` raises: no hook is called then."""
        self._trainer = trainer
        if trainer is None or trainer in self._guarded:
            return
        self._guarded.add(trainer)
        inner = trainer.train

        @functools.wraps(inner)
        def train(*args: Any, **kwargs: Any) -> Any:
            try:
                return inner(*args, **kwargs)
            except BaseException as error:  # Ctrl-C too, and it goes on as it came
                self._stop(error)
                raise

        trainer.train = train

    def _stop(self, error: BaseException | None) -> None:
        held, self._held = self._held, None
        if held is not None:
            held.stop(error)
            if error is None:
                self._log()

    def _log(self) -> None:
        metrics = self._readings.take()
        trainer = self._trainer
        if metrics and trainer is not None and trainer.is_world_process_zero():
            # `log` takes a log of the Trainer's own that is due for done; in a job the other ranks would wait for it.
            # And a trainer's own `log`, as TRL's, adds the means of what it gathered since the last, and begins anew.
            control, due = trainer.control, trainer.control.should_log
            _transformers.Trainer.log(trainer, metrics)
            control.should_log = trainer.control.should_log = due


def loss_of(model: nn.Module) -> str | None:
    """Return the loss hook that fits what a model of transformers returns; None where that is not known."""
    name, config = type(model).__name__, getattr(model, "config", None)
    if name.endswith(_CROSS_ENTROPY):
        return "cross_entropy"
    if name.endswith("ForSequenceClassification") and config is not None:
        return _BY_PROBLEM.get(getattr(config, "problem_type", None) or "")
    return None


def _caller(kind: type) -> Any:
    """Return the innermost `self` of this kind among the callers; None where there is none."""
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, kind):
            return owner
        frame = frame.f_back
    return None
