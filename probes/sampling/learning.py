"""What a run learns of its operands while it is sampled, within a limit of memory, to be kept in the database.

Of every product: energy histograms and alignment, from which the error of recipes that were not measured follows in
closed form; and of every input which rows, of every weight which columns stand out. Of every activation and gradient:
its distribution, from which operands of any number of rows are drawn for kernels that did not exist when it was probed.
Of products whose calls differ in rows within a step: how many calls had how many. Raw tensors are not kept.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol

from torch import Tensor

from loka.errors import ArgumentError
from loka.formats import PASS_OPERANDS, Pass
from loka.probes.capturing.epilogues import Epilogue
from loka.probes.capturing.layer_facts import LayerFacts
from loka.probes.capturing.row_counts import CallRows
from loka.probes.capturing.shared_inputs import SharedInput
from loka.probes.capturing.sources import Source
from loka.probes.distributions.closed_form import ProductStatistics
from loka.probes.distributions.extremes import Extremes
from loka.probes.distributions.gather import packed, unpacked
from loka.probes.distributions.learned import OperandDistribution
from loka.probes.experts.statistics import ExpertStatistics
from loka.probes.records import LearnedRecord
from loka.probes.sampling.measure import Sampled

# One in so many measurements of a product is learned from too: distributions move slower than they cost.
LEARN_EVERY: Final[int] = 4
# Memory for all that is learned: this, and a share of the parameters' own. With the deviations of one step (32 MiB)
# and what is held for a moment, the probe stays within 64 MB and 5 %.
_LIMIT_BYTES: Final[int] = 16 << 20
_LIMIT_SHARE: Final[float] = 0.04
# Of that, what one operand may take: merging and writing it take several times as much for a moment.
_LARGEST_SHARE: Final[float] = 0.25
# Columns of the low-rank correlation of an operand: a product has two such operands, and a model hundreds of products.
_RANK: Final[int] = 16
# Fewer where the operand is so wide that they are what takes the memory.
_WIDE: Final[int] = 1 << 14
_WIDE_RANK: Final[int] = 8
# Samples after which what was learned is written, and every doubling.
_FIRST_WRITTEN: Final[int] = 4

STATISTICS: Final[str] = "statistics"
EXTREMES: Final[str] = "extremes"
ROWS: Final[str] = "rows"
EXPERTS: Final[str] = "experts"
SHARED_INPUT: Final[str] = "shared_input"
EPILOGUE: Final[str] = "epilogue"
LAYER: Final[str] = "layer"
SOURCE: Final[str] = "source"
# Kinds whose quantiles can bring their rows along, for an exact merge of ranks.
_WITH_ROWS: Final[frozenset[str]] = frozenset({"input", "grad_output"})


class Learned(Protocol):
    """A part of what was learned; `merge` takes the same kind, `arrays` can be packed."""

    def arrays(self) -> Mapping[str, Any]:
        """Return the state as plain arrays."""

    def merge(self, other: Any, /) -> Any:
        """Return both parts together. Raises ArgumentError where they do not belong together."""


# Kinds of LearnedRecord -> how they are read back.
READERS: Final[dict[str, Callable[[Mapping[str, Any]], Learned]]] = {
    STATISTICS: ProductStatistics.from_arrays,
    EXTREMES: Extremes.from_arrays,
    ROWS: CallRows.from_arrays,
    "input": OperandDistribution.from_arrays,
    "grad_output": OperandDistribution.from_arrays,
    EXPERTS: ExpertStatistics.from_arrays,
    SHARED_INPUT: SharedInput.from_arrays,
    EPILOGUE: Epilogue.from_arrays,
    LAYER: LayerFacts.from_arrays,
    SOURCE: Source.from_arrays,
}


@dataclass(slots=True)
class _Entry:
    state: Any
    samples: int
    step: int


@dataclass(slots=True)
class _Calls:
    state: CallRows = field(default_factory=CallRows)
    samples: int = 0
    step: int = 0


@dataclass(slots=True)
class Learner:
    """Accumulates by (site, pass, kind). `left_out` counts the operands for which there was no memory."""

    limit_bytes: int
    rank: int = 0
    left_out: set[tuple[Any, str]] = field(default_factory=set)
    _entries: dict[tuple[Any, Pass, str], _Entry] = field(default_factory=dict)
    _bytes: dict[tuple[Any, Pass, str], int] = field(default_factory=dict)
    _calls: defaultdict[tuple[Any, Pass], _Calls] = field(default_factory=lambda: defaultdict(_Calls))
    _write_at: int = _FIRST_WRITTEN
    _parts: int = 0

    @classmethod
    def within(cls, parameter_bytes: int) -> "Learner":
        """Return a learner for a model with so many bytes of parameters."""
        return cls(limit_bytes=_LIMIT_BYTES + int(_LIMIT_SHARE * parameter_bytes))

    def learn(self, site: Any, product: Pass, sampled: Sampled, step: int) -> None:
        """Learn from what one product was measured on."""
        statistics = ProductStatistics.of(sampled.a, sampled.b, product, y=sampled.y, a_amax=sampled.a_amax)
        self._add(site, product, STATISTICS, statistics, step)
        role = PASS_OPERANDS[product][0]
        if product != "wgrad" and (site, role) not in self.left_out:
            # Rows of one operand come from a new step or rank each time: their priorities have to be others as well.
            self._parts += 1
            seed = (self.rank << 32) + self._parts
            rank = _WIDE_RANK if sampled.a.shape[1] > _WIDE else _RANK
            self._add(site, product, role, OperandDistribution.of(sampled.a, seed=seed, rank=rank), step)

    def learn_extremes(self, site: Any, x: Tensor, weight: Tensor, step: int) -> None:
        """Learn from all rows [M, K] of the input of a forward product, and its weight [N, K]."""
        self._add(site, "fprop", EXTREMES, Extremes.of(x, weight), step)

    def learn_experts(self, site: Any, product: Pass, experts: ExpertStatistics, step: int) -> None:
        """Learn what a step has shown of the experts of one product."""
        self._add(site, product, EXPERTS, experts, step)

    def learn_shared(self, site: Any, first: str, step: int) -> None:
        """Learn that a forward product has read what another site's read before it."""
        self._add(site, "fprop", SHARED_INPUT, SharedInput({first: 1}), step)

    def learn_epilogue(self, site: Any, step: int, reader: str = "") -> None:
        """Learn that a forward product is one module with the norm and the activation behind it, and who reads it."""
        self._add(site, "fprop", EPILOGUE, Epilogue(readers={reader: 1} if reader else {}), step)

    def learn_layer(self, site: Any, facts: LayerFacts, step: int) -> None:
        """Learn what kind of layer a forward product belongs to, where it is no linear layer like any other."""
        self._add(site, "fprop", LAYER, facts, step)

    def learn_source(self, site: Any, source: Source, step: int) -> None:
        """Learn what wrote the input of a linear layer, and who else reads it."""
        self._add(site, "fprop", SOURCE, source, step)

    def count(self, site: Any, product: Pass, calls: Mapping[int, int], step: int) -> None:
        """Count the calls of a product in one step, by their rows."""
        known = self._calls[site, product]
        known.state.saw(calls)
        known.samples += 1
        known.step = step

    def _add(self, site: Any, product: Pass, kind: str, state: Any, step: int) -> None:
        key = (site, product, kind)
        known = self._entries.get(key)
        samples = 1
        if known is not None:
            try:
                state, samples = known.state.merge(state), known.samples + 1
            except ArgumentError:  # the shape has changed: what was learned is of another product
                samples = 1
        size = state.nbytes
        others = sum(self._bytes.values()) - self._bytes.get(key, 0)
        if size > _LARGEST_SHARE * self.limit_bytes or others + size > self.limit_bytes:
            self._entries.pop(key, None)
            self._bytes.pop(key, None)
            self.left_out.add((site, kind))
            return
        self._entries[key] = _Entry(state, samples, step)
        self._bytes[key] = size

    def is_due(self, samples: int) -> bool:
        """Whether what was learned is to be written after so many sampled steps: at ever longer intervals."""
        due = samples >= self._write_at
        if due:
            self._write_at = 2 * samples
        return due

    def records(self, names: Mapping[Any, str], *, keep_rows: bool = False) -> Iterable[LearnedRecord]:
        """Yield everything, under the final names of the sites; with the rows of quantiles where ranks are to merge."""
        rows_too = {"keep_rows": True} if keep_rows else {}
        for (site, product, kind), entry in self._entries.items():
            yield LearnedRecord(
                site=names[site],
                product=product,
                kind=kind,
                samples=entry.samples,
                step=entry.step,
                data=packed(entry.state.arrays(**rows_too if kind in _WITH_ROWS else {})),
            )
        for (site, product), known in self._calls.items():
            if known.state.mixed:  # else the samples tell as much
                yield LearnedRecord(
                    site=names[site],
                    product=product,
                    kind=ROWS,
                    samples=known.samples,
                    step=known.step,
                    data=packed(known.state.arrays()),
                )


def restore(record: LearnedRecord) -> Any:
    """Return the state in a record. Raises ArgumentError for a kind or arrays that are not ours."""
    if record.kind not in READERS:
        raise ArgumentError(
            f"{record.site} {record.product} holds something of the kind {record.kind!r}, which this LoKA does not "
            f"know ({', '.join(READERS)}). Read the database with the LoKA that wrote it."
        )
    try:
        arrays = unpacked(record.data)
    except ArgumentError as error:
        raise _unreadable(record, error) from error
    try:
        return READERS[record.kind](arrays)
    except ArgumentError:
        raise
    except (ValueError, LookupError, TypeError, ArithmeticError) as error:
        raise _unreadable(record, error) from error


def _unreadable(record: LearnedRecord, error: Exception) -> ArgumentError:
    return ArgumentError(
        f"What was learned of {record.site} {record.product} ({record.kind}) is not readable ({error}): the database "
        "is damaged there. Probe again."
    )


def merged(records: Iterable[LearnedRecord]) -> list[LearnedRecord]:
    """Merge records of several ranks that are of the same site, pass and kind; the order of ranks does not matter.

    Rows that came with them are used and given up: what is returned holds none.
    """
    result: dict[tuple[str, Pass, str], tuple[LearnedRecord, Any]] = {}
    for record in records:
        key, state, whole = (record.site, record.product, record.kind), restore(record), record
        if key in result:
            before, known = result[key]
            try:
                state = known.merge(state)
            except ArgumentError:  # ranks hold different shards: the first rank's stands for all
                continue
            samples, step = before.samples + record.samples, max(before.step, record.step)
            whole = replace(record, samples=samples, step=step)
        result[key] = whole, state
    return [replace(record, data=packed(state.arrays())) for record, state in result.values()]


def size_of(parameters: Iterable[Any]) -> int:
    """Return the bytes of some parameters."""
    return sum(math.prod(parameter.shape) * parameter.dtype.itemsize for parameter in parameters)
