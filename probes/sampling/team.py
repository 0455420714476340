"""Several processes, one run: every rank samples its own steps, the first of the group writes them all.

Ranks hand their samples over through the job's own key-value store, which every process group has. That is no
collective: no rank waits for another, a rank that is slower, skips a sample or dies holds up nobody, and the run says
in the end whose part is missing. Messages are JSON and plain bytes; nothing that runs code is read back.
"""

import itertools
import json
import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from os import PathLike
from typing import Any, Final, Protocol

import torch
import torch.distributed as dist

from loka.errors import ArgumentError
from loka.numerics import ProductError
from loka.probes.records import (
    DynamicsRecord,
    Event,
    LearnedRecord,
    LossImpact,
    OperandRecord,
    ProductRecord,
    RunInfo,
    RunProgress,
    StepRecord,
)
from loka.probes.sampling.learning import merged
from loka.probes.storing.writer import RunWriter

log: Final = logging.getLogger("loka.probe")

# How long the first rank waits at the end of a run for the others to hand over their last samples; and after a failure.
_PATIENCE_S: Final[float] = 20.0
_PATIENCE_AFTER_FAILURE_S: Final[float] = 2.0
# Every process of a job makes its probes in the same order, so their number tells them apart.
_numbers: Final = itertools.count()


class Writer(Protocol):
    """What takes the records of a run: the database, or the way to the rank that has it."""

    @property
    def failure(self) -> str | None:
        """Why nothing more is recorded; None while all is well."""

    def write(self, step: StepRecord, progress: RunProgress) -> None:
        """Take a sampled step and the running totals."""

    def event(self, event: Event) -> None:
        """Take something that happened."""

    @property
    def rank(self) -> int | None:
        """The rank of this process in a job whose ranks make one run; None: it is alone."""

    def learned(self, records: Iterable[LearnedRecord], *, final: bool) -> bool:
        """Take what the run has learned so far, or in all."""

    def finish(self, progress: RunProgress) -> None:
        """Take the final totals, and close."""


def check_group(group: Any) -> None:
    """Raise ArgumentError for a process group in a process that belongs to none."""
    if group is not None and not _distributed():
        raise ArgumentError(
            "probe(process_group=...): torch.distributed is not initialised in this process. Call "
            "torch.distributed.init_process_group first, or leave process_group out."
        )


def size_of(group: Any) -> int:
    """Return how many processes make one run: the ranks of `group`, by default of the whole job."""
    return dist.get_world_size(group) if _distributed() else 1


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def open_writer(db: str | PathLike[str], info: RunInfo, group: Any) -> Writer | None:
    """Return what takes this process's records: None where it has no part in `group` (by default the whole job).

    Raises DatabaseError on the rank that writes.
    """
    if not _distributed():
        return RunWriter(db, info)
    ranks = dist.get_process_group_ranks(group if group is not None else dist.group.WORLD)
    if dist.get_rank() not in ranks:
        return None
    info = replace(info, world_size=len(ranks))
    if len(ranks) == 1:
        return RunWriter(db, info)
    # A connection of its own: a thread that posts must not hold up the job's.
    job: Any = dist.distributed_c10d._get_default_store()
    store = torch._C._distributed_c10d.PrefixStore(f"loka/probe/{next(_numbers)}", job.clone())
    first, *others = ranks
    if dist.get_rank() == first:
        return TeamWriter(RunWriter(db, info), store, first, others)
    return Outbox(store, dist.get_rank())


class Outbox:
    """The writer of every rank but the first: posts what it is given, in order, from a thread of its own."""

    def __init__(self, store: Any, rank: int) -> None:
        self._store = store
        self.rank: Final[int] = rank
        self._posted = 0
        self._failure: str | None = None
        self._messages: deque[bytes | None] = deque()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="loka-probe-outbox", daemon=True)
        self._thread.start()

    @property
    def failure(self) -> str | None:
        """Why nothing more is handed over; None while all is well."""
        return self._failure

    def write(self, step: StepRecord, progress: RunProgress) -> None:
        """Post a sampled step."""
        self._put(b"S" + json.dumps(asdict(replace(step, rank=self.rank))).encode())

    def event(self, event: Event) -> None:
        """Post something that happened on this rank."""
        self._put(b"E" + json.dumps(asdict(replace(event, message=f"rank {self.rank}: {event.message}"))).encode())

    def learned(self, records: Iterable[LearnedRecord], *, final: bool) -> bool:
        """Post what this rank has learned in all; what it had learned half-way would only be in the way."""
        for record in records if final else ():
            header = json.dumps({**asdict(record), "data": ""}).encode()
            self._put(b"L" + header + b"\n" + record.data)
        return True

    def finish(self, progress: RunProgress, timeout: float = _PATIENCE_S) -> None:
        """Post that this rank is done, and wait until everything is posted."""
        self._put(b"D" + json.dumps({"status": progress.status, "reason": progress.reason}).encode())
        self._put(None)
        self._thread.join(timeout)

    def _put(self, message: bytes | None) -> None:
        with self._changed:
            self._messages.append(message)
            self._changed.notify()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._messages)
                message = self._messages.popleft()
            if message is None:
                return
            try:
                self._store.set(f"{self.rank}/{self._posted}", message)
            except RuntimeError as error:  # the store went with the first rank
                reason = str(error).splitlines()[0]
                self._failure = (
                    f"The rank that writes the probe database cannot be reached ({reason}). Training goes on."
                )
                log.info(self._failure)
                return
            self._posted += 1


class TeamWriter:
    """The writer of the first rank: its own records go straight to the database, the others' as they arrive."""

    def __init__(self, writer: RunWriter, store: Any, rank: int, others: Iterable[int]) -> None:
        self._writer = writer
        self.rank: Final[int] = rank
        self._store = store
        self._taken = dict.fromkeys(others, 0)
        self._newest = dict.fromkeys(self._taken, -1)  # step
        self._open = set(self._taken)  # ranks that have not said that they are done
        self._learned: list[LearnedRecord] = []
        self._lost = ""

    @property
    def failure(self) -> str | None:
        """Why nothing more is recorded; None while all is well."""
        return self._writer.failure

    def write(self, step: StepRecord, progress: RunProgress) -> None:
        """Record a step of this rank, and what has arrived from the others."""
        self._writer.write(replace(step, rank=self.rank), progress)
        self._receive(progress)

    def event(self, event: Event) -> None:
        """Record something that happened on this rank."""
        self._writer.event(event)

    def learned(self, records: Iterable[LearnedRecord], *, final: bool) -> bool:
        """Record what this rank has learned; in the end what all ranks have."""
        if not final:
            return self._writer.learned(records, final=False)
        self._learned.extend(records)
        return True

    def finish(self, progress: RunProgress) -> None:
        """Wait a little for the others, say whose part is missing, and close."""
        give_up = time.monotonic() + (_PATIENCE_AFTER_FAILURE_S if progress.status == "failed" else _PATIENCE_S)
        self._receive(progress)
        while self._open and not self._lost and time.monotonic() < give_up:
            time.sleep(0.02)
            self._receive(progress)
        for rank in sorted(self._open):
            newest = self._newest[rank]
            seen = f"its last sample is that of step {newest}" if newest >= 0 else "it sent no sample"
            why = self._lost or "it did not close its part of the run"
            message = f"rank {rank}: {why}; {seen}, what it saw after that is missing"
            self._writer.event(Event(step=progress.steps, kind="rank_missing", message=message))
        if self._learned:
            self._writer.learned(merged(self._learned), final=True)
        self._writer.finish(progress)

    def _receive(self, progress: RunProgress) -> None:
        for rank in tuple(self._open):
            for message in self._messages(rank):
                self._take(rank, message, progress)

    def _messages(self, rank: int) -> Iterator[bytes]:
        """Yield what has arrived from a rank since the last look; never waits."""
        try:
            while rank in self._open and self._store.check([key := f"{rank}/{self._taken[rank]}"]):
                message = self._store.get(key)
                self._store.delete_key(key)
                self._taken[rank] += 1
                yield bytes(message)
        except RuntimeError as error:
            self._lost = f"the store of the job is gone ({str(error).splitlines()[0]})"

    def _take(self, rank: int, message: bytes, progress: RunProgress) -> None:
        kind, body = message[:1], message[1:]
        if kind == b"S":
            step = step_from(json.loads(body))
            self._newest[rank] = max(self._newest[rank], step.step)
            self._writer.write(step, progress)
        elif kind == b"E":
            self._writer.event(Event(**json.loads(body)))
        elif kind == b"L":
            header, data = body.split(b"\n", 1)
            self._learned.append(LearnedRecord(**{**json.loads(header), "data": data}))
        else:
            self._open.discard(rank)
            end = json.loads(body)
            if end["status"] in ("failed", "detached"):
                text = f"rank {rank}: {end['status']}: {end['reason']}"
                self._writer.event(Event(step=progress.steps, kind="rank_ended", message=text))


def step_from(values: Mapping[str, Any]) -> StepRecord:
    """Return the step that `dataclasses.asdict` and JSON have taken apart."""
    found = {"products": tuple(map(_product_from, values["products"]))}
    return StepRecord(**{**values, **found, "dynamics": tuple(map(_dynamics_from, values["dynamics"]))})


def _dynamics_from(values: Mapping[str, Any]) -> DynamicsRecord:
    return DynamicsRecord(**{**values, **{name: tuple(values[name]) for name in ("parameters", "feeds")}})


def _product_from(values: Mapping[str, Any]) -> ProductRecord:
    return ProductRecord(
        **{
            **values,
            "operands": tuple(OperandRecord(**operand) for operand in values["operands"]),
            "errors": {name: ProductError(**error) for name, error in values["errors"].items()},
            "impacts": {name: LossImpact(**impact) for name, impact in values["impacts"].items()},
        }
    )
