"""A run as scalars of TensorBoard, at the steps of the training; histograms of the errors over all sites.

    with loka.probe(model, "run.db") as probe:
        probe.subscribe(tensorboard.Sink("runs/probe"))    # a folder, or a SummaryWriter that there is already

Tags are the keys of `loka.reports.metrics`, and `loka/row_error/<pass>/<recipe>` for the histograms.
"""

import math
import os
from collections import defaultdict
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from loka.integrations.courier import Courier
from loka.integrations.libraries import library
from loka.probes.records import Event, RunInfo, RunProgress, StepRecord
from loka.reports.metrics import Detail, check_detail, step_metrics


class Writer(Protocol):
    """What a SummaryWriter of `torch.utils.tensorboard` or `tensorboardX` can do."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Take a number."""

    def add_histogram(self, tag: str, values: NDArray[np.float64], global_step: int) -> Any:
        """Take a distribution."""

    def add_text(self, tag: str, text_string: str, global_step: int) -> Any:
        """Take words."""

    def flush(self) -> Any:
        """Write what is held back."""


class Sink(Courier):
    """Writes a run to a folder of TensorBoard's, or through a writer that there is, which stays open.

    detail: "summary" for the worst and the median error per pass and recipe, "sites" for every site's as well.
    Raises ArgumentError; LokaError at the beginning of the run where TensorBoard is not installed.
    """

    def __init__(self, to: str | os.PathLike[str] | Writer, *, detail: Detail = "sites") -> None:
        super().__init__()
        self._to = to
        self._detail = check_detail(detail)
        self._writer: Any = None

    def opened(self, info: RunInfo) -> None:
        """Make the writer, where there is none."""
        if isinstance(self._to, str | os.PathLike):
            tensorboard = library("torch.utils.tensorboard", "tensorboard", "tensorboard.Sink")
            self._writer = tensorboard.SummaryWriter(os.fspath(self._to))
        else:
            self._writer = self._to

    def sampled(self, step: StepRecord, progress: RunProgress) -> None:
        """Write the scalars and histograms of a sampled step."""
        for key, value in step_metrics(step, progress, detail=self._detail).items():
            if key != "loka/step":
                self._writer.add_scalar(key, value, step.step)
        for tag, values in _errors(step).items():
            self._writer.add_histogram(tag, np.asarray(values), step.step)
        self._writer.flush()

    def happened(self, event: Event) -> None:
        """Write an event as text."""
        self._writer.add_text(f"loka/events/{event.kind}", _verbatim(event.message), event.step)

    def closed(self, progress: RunProgress) -> None:
        """Close the writer if it is ours."""
        if isinstance(self._to, str | os.PathLike):
            self._writer.close()
        else:
            self._writer.flush()


def _errors(step: StepRecord) -> dict[str, list[float]]:
    """Return the finite row errors over all sites, by tag."""
    found: dict[str, list[float]] = defaultdict(list)
    for product in step.products:
        for recipe, error in product.errors.items():
            if math.isfinite(error.row_error):
                found[f"loka/row_error/{product.product}/{recipe}"].append(error.row_error)
    return found


def _verbatim(words: str) -> str:
    """Return words so that Markdown, which TensorBoard makes of text, leaves them as they are."""
    return "".join(f"    {line}\n" for line in words.splitlines())
