"""A run as flat dicts of numbers, for whatever takes such: Weights & Biases, MLflow, Comet, a function of your own.

    with loka.probe(model, "run.db") as probe:
        probe.subscribe(wandb.Sink(run.log))               # run = the library's own wandb.init(...)

Which keys there are is in `loka.reports.metrics`. The library itself is not imported: its function is called.
"""

from collections.abc import Callable
from typing import Any

from loka.errors import ArgumentError
from loka.probes.records import Event, RunInfo, RunProgress, StepRecord
from loka.reports.metrics import Detail, check_detail, step_metrics


class Sink:
    """Calls `log` with a flat dict after every sampled step, on the training thread, where such libraries want it.

    detail: "summary" for the worst and the median error per pass and recipe, "sites" for every site's as well.
    Raises ArgumentError.
    """

    def __init__(self, log: Callable[[dict[str, float]], Any], *, detail: Detail = "sites") -> None:
        if not callable(log):
            raise ArgumentError(
                f"wandb.Sink calls a function with a dict of numbers, such as run.log, not a {type(log).__name__}."
            )
        self._log = log
        self._detail = check_detail(detail)

    def begin(self, info: RunInfo) -> None:
        """Nothing is logged yet."""

    def write(self, step: StepRecord, progress: RunProgress) -> None:
        """Log a sampled step."""
        self._log(step_metrics(step, progress, detail=self._detail))

    def event(self, event: Event) -> None:
        """Events are no numbers: they are in the database."""

    def finish(self, progress: RunProgress) -> None:
        """The run of the library goes on; nothing is closed."""
