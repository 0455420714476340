"""A run as JSON lines: one object per line, appended as it happens, for `jq`, pandas or a log collector.

    {"schema": 1, "kind": "run", "run": id, "created", "model", "device", "torch", "every", "recipes", "world_size"}
    {"schema": 1, "kind": "sample", "run": id, "step", "rank", "loss", "steps", "sampled_steps", "overhead",
     "products": [{"site", "pass", "op", "batch", "m", "n", "k", "calls", "dtype",
                   "errors": {recipe: {"row_error", "sqnr_db", "relative_error", "mere", "bias", "infinite": [...]}},
                   "operands": {role: {"amax", "rms", "zeros", "nan", "inf"}}}]}
    {"schema": 1, "kind": "event", "run": id, "step", "event", "message"}
    {"schema": 1, "kind": "end", "run": id, "status", "reason", "steps", "sampled_steps", "skipped_samples", "overhead"}

Every line is valid JSON: what is not a finite number is null, and `infinite` names the errors that were infinite rather
than missing. A line is written at once and whole. A process that is killed leaves whole lines, and at most one that is
cut off at the end, which the next run closes with a newline. Several runs may follow one another in a file.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Final

from loka.errors import ArgumentError
from loka.integrations.courier import Courier
from loka.probes.records import Event, OperandRecord, ProductRecord, RunInfo, RunProgress, StepRecord

SCHEMA: Final[int] = 1

_ERRORS: Final[tuple[str, ...]] = ("row_error", "sqnr_db", "relative_error", "mere", "bias")
_SHAPE: Final[tuple[str, ...]] = ("op", "batch", "m", "n", "k", "calls", "dtype")


class Sink(Courier):
    """Appends a run to a file: `probe.subscribe(jsonl.Sink("steps.jsonl"))`. Raises ArgumentError if it cannot."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        self.path: Final[Path] = Path(path)
        self._file: IO[bytes] | None = None
        self._run_id = ""

    def opened(self, info: RunInfo) -> None:
        """Open the file and write the line of the run."""
        try:
            self._file = self.path.open("ab", buffering=0)
            ended = _ends_a_line(self.path)
        except OSError as error:
            raise ArgumentError(
                f"Cannot write {self.path}: {error.strerror}. Give jsonl.Sink a file in a folder that can be written."
            ) from error
        self._run_id = info.id
        if not ended:
            self._file.write(b"\n")
        environment = info.environment
        self._line(
            "run",
            created=info.created,
            model=info.model,
            device=environment.device,
            torch=environment.torch,
            every=info.every,
            recipes=list(info.recipes),
            world_size=info.world_size,
        )

    def sampled(self, step: StepRecord, progress: RunProgress) -> None:
        """Append a sampled step."""
        self._line(
            "sample",
            step=step.step,
            rank=step.rank,
            loss=_finite(step.loss),
            **_totals(progress),
            products=[_product(product) for product in step.products],
        )

    def happened(self, event: Event) -> None:
        """Append an event."""
        self._line("event", step=event.step, event=event.kind, message=event.message)

    def closed(self, progress: RunProgress) -> None:
        """Append the line of the end, and close the file."""
        self._line(
            "end",
            status=progress.status,
            reason=progress.reason,
            **_totals(progress),
            skipped_samples=progress.skipped_samples,
        )
        if self._file is not None:
            self._file.close()

    def _line(self, kind: str, **fields: Any) -> None:
        assert self._file is not None, "opened by begin()"
        line = json.dumps({"schema": SCHEMA, "kind": kind, "run": self._run_id, **fields}, allow_nan=False)
        data = memoryview(line.encode() + b"\n")
        while data:  # unbuffered: one call writes all of it, unless the disk is full or a signal comes between
            data = data[self._file.write(data) :]


def _ends_a_line(path: Path) -> bool:
    """Return whether what is appended begins a line of its own."""
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _totals(progress: RunProgress) -> dict[str, Any]:
    return {
        "steps": progress.steps,
        "sampled_steps": progress.sampled_steps,
        "overhead": _finite(progress.overhead_fraction),
    }


def _product(product: ProductRecord) -> dict[str, Any]:
    return {
        "site": product.site,
        "pass": product.product,
        **{name: getattr(product, name) for name in _SHAPE},
        "errors": {recipe: _errors(error) for recipe, error in product.errors.items()},
        "operands": {operand.role: _operand(operand) for operand in product.operands},
    }


def _errors(error: Any) -> Mapping[str, Any]:
    values = {name: float(getattr(error, name)) for name in _ERRORS}
    infinite = [name for name, value in values.items() if math.isinf(value)]
    return {**{name: _finite(value) for name, value in values.items()}, "infinite": infinite}


def _operand(operand: OperandRecord) -> Mapping[str, Any]:
    values = {name: _finite(getattr(operand, name)) for name in ("amax", "rms", "zeros")}
    return {**values, "nan": operand.nan, "inf": operand.inf}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
