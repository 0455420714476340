"""The probe as a callback of Lightning: `Trainer(callbacks=[ProbeCallback("run.db")])`, and nothing else to change.

A step is one `training_step` and its backward: with accumulated gradients each micro-batch is one, sanity checks and
validation are none. It is found by way of the strategy, because a LightningModule is not called as a module is; names
of sites are those of its submodules. Both packages that Lightning comes as are supported; where both are installed,
the one that was imported first counts.
"""

import functools
import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, Unpack

from torch import nn

from loka.errors import ArgumentError, nearest
from loka.integrations.held import Held, Loss, ProbeOptions, Readings
from loka.integrations.libraries import library
from loka.probes.sampling.audience import Listener
from loka.reports.metrics import Detail

_PACKAGES: Final[tuple[str, ...]] = ("lightning.pytorch", "pytorch_lightning")


def _package() -> str:
    """Return which of the two packages the training uses."""
    imported = [name for name in _PACKAGES if name in sys.modules]
    installed = [name for name in _PACKAGES if importlib.util.find_spec(name.partition(".")[0]) is not None]
    return next(iter([*imported, *installed, *_PACKAGES]))


if TYPE_CHECKING:
    _Callback = object
else:
    _Callback = library(_package(), "lightning", "loka.integrations.lightning").Callback


class ProbeCallback(_Callback):
    """Probes a training under a Lightning Trainer into `db`; the options are those of `loka.probe`.

    - `module`: name of the submodule to probe instead of the whole LightningModule. Needed with `loss`, unless
      `training_step` calls `self(...)`: the output of that call is what the loss is taken of.
    - `log_every`: one sampled step in so many goes to the Trainer's loggers, 0: none. `detail` says how much of it:
      "summary", the worst and the median error per pass and recipe, or "sites", every site's as well.
    - `listeners`: what else is told, such as `loka.integrations.jsonl.Sink`.

    Each fit is a run of its own in the database. Raises what `loka.probe` raises, when training starts.
    """

    def __init__(
        self,
        db: str | os.PathLike[str],
        *,
        module: str | None = None,
        loss: Loss = None,
        log_every: int = 1,
        detail: Detail = "summary",
        listeners: Sequence[Listener] = (),
        **options: Unpack[ProbeOptions],
    ) -> None:
        super().__init__()
        self._db = db
        self._module = module
        self._loss = loss
        self._readings = Readings(log_every, detail)
        self._listeners = (self._readings, *listeners)
        self._options = options
        self._held: Held | None = None
        self._strategy: Any = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach."""
        model = pl_module if self._module is None else _submodule(pl_module, self._module)
        self._held = Held(model, self._db, self._listeners, self._loss, **self._options)
        if self._module is None:
            self._mark(trainer.strategy)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Watch."""
        if self._held is not None:
            self._held.resume()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Look away, and log."""
        if self._held is not None:
            self._held.pause()
            self._log(trainer)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Look away; the batch before may have ended without a word."""
        if self._held is not None:
            self._held.pause()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Close the run."""
        self._stop(trainer, None)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Close the run as failed; Ctrl-C comes here too."""
        self._stop(trainer, exception)

    def _mark(self, strategy: Any) -> None:
        """Have every training step of the strategy count as one forward."""
        held, inner = self._held, strategy.training_step
        assert held is not None, "attached"

        @functools.wraps(inner)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            with held.probe.forward():
                return inner(*args, **kwargs)

        strategy.training_step = training_step  # of this instance: it is neither copied nor pickled
        self._strategy = strategy

    def _stop(self, trainer: Any, error: BaseException | None) -> None:
        held, self._held = self._held, None
        if held is None:
            return
        if self._strategy is not None:
            del self._strategy.training_step
            self._strategy = None
        held.stop(error)
        if error is None:
            self._log(trainer)

    def _log(self, trainer: Any) -> None:
        metrics = self._readings.take()
        for logger in trainer.loggers if metrics else ():
            logger.log_metrics(metrics, step=trainer.global_step)


def _submodule(root: nn.Module, name: str) -> nn.Module:
    try:
        return root.get_submodule(name)
    except AttributeError as error:
        known = [known for known, _ in root.named_modules() if known]
        raise ArgumentError(
            f"ProbeCallback(module={name!r}): {type(root).__name__} has no such submodule.{nearest(name, known)}"
        ) from error
