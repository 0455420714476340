"""The one timing protocol: warm up by time, interleave, rotate inputs, report a median and its spread.

Candidates take turns, so that a busy neighbour or a throttling clock hits all of them alike; every call reads another
input, so that none of them finds its operands in the cache (`num_inputs` says how many that takes); the first in turn
changes with every round. A call is timed by CUDA events on a GPU, without a CUDA graph, and by the wall clock on a CPU.

A difference inside the combined spread is not a difference: `faster` says no, both ways.
"""

import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Generic, Protocol, TypeVar

import torch

from loka.errors import ArgumentError
from loka.hardware import cache_bytes

logger = logging.getLogger("loka.timing")

T = TypeVar("T")

# A candidate is called with the index of the input set to read, 0 <= index < num_inputs.
Candidate = Callable[[int], object]

# Inputs beyond this many bytes are not made: on machines whose cache is huge, cold stops being worth the memory.
_MAX_POOL_BYTES: Final[int] = 256 * 2**20
_MAX_INPUTS: Final[int] = 64
MIN_REPETITIONS: Final[int] = 7
# The median of this many has settled: its own standard error is a tenth of the spread.
MAX_REPETITIONS: Final[int] = 300
WARMUP_S: Final[float] = 0.01


# Called with things done, things in all, and the one that is next.
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Turn(Generic[T]):
    """One of several things to be measured within a budget, and the seconds that it may take."""

    item: T
    share_s: float  # its part of what is left, if those behind it get theirs
    left_s: float


def in_turns(
    items: Sequence[T],
    budget_s: float,
    left_out: str,
    words: Callable[[T], str],
    on_progress: Progress | None = None,
    weight: Callable[[T], float] = lambda _: 1.0,
) -> Iterator[Turn[T]]:
    """Yield things to be measured until `budget_s` seconds are spent, and tell of each, in `words`, before.

    Each gets its part of the time by its `weight`, which is positive. What there is no time left for is logged as
    `left_out` says, e.g. "shapes left untimed".
    """
    weights = [weight(item) for item in items]
    deadline = time.perf_counter() + budget_s
    for index, item in enumerate(items):
        if on_progress is not None:
            on_progress(index, len(items), words(item))
        left = deadline - time.perf_counter()
        if left <= 0:
            logger.warning("%d of %d %s: %g s spent", len(items) - index, len(items), left_out, budget_s)
            return
        yield Turn(item, left * weights[index] / math.fsum(weights[index:]), left)


class Timed(Protocol):
    """Anything with a median and a spread in microseconds."""

    @property
    def median_us(self) -> float:
        """Median over repetitions."""

    @property
    def spread_us(self) -> float:
        """Half the interquartile range."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """Time of one call: median over repetitions, half the interquartile range, and the fastest repetition."""

    median_us: float
    spread_us: float
    repetitions: int
    best_us: float = math.nan


@dataclass(frozen=True, kw_only=True, slots=True)
class Ratio:
    """Time of one thing over time of another: median of the pairwise ratios, with their quartiles."""

    median: float
    q25: float
    q75: float
    rounds: int

    def __str__(self) -> str:
        """Return e.g. `1.12 (1.10-1.15)`."""
        return f"{self.median:.3g} ({self.q25:.3g}-{self.q75:.3g})"


def faster(a: Timed, b: Timed) -> bool:
    """Whether `a` is faster than `b` by more than the spread of both together; False both ways is a tie."""
    return a.median_us + a.spread_us + b.spread_us < b.median_us


def num_inputs(bytes_per_input: int, device: torch.device | str) -> int:
    """Return how many input sets to rotate through so that a call finds its own evicted from the last cache."""
    wanted = min(2 * cache_bytes(device), _MAX_POOL_BYTES) // max(bytes_per_input, 1) + 1
    return max(1, min(wanted, _MAX_INPUTS))


def measure(
    candidates: Mapping[str, Candidate],
    *,
    device: torch.device | str,
    budget_s: float,
    inputs: int = 1,
    min_repetitions: int = MIN_REPETITIONS,
    warmup_s: float = WARMUP_S,
) -> dict[str, Measurement]:
    """Time all candidates against each other for about `budget_s` seconds.

    There are at least `min_repetitions` rounds and at most MAX_REPETITIONS. Each candidate is first called for
    `warmup_s` seconds, at least once. Raises ArgumentError for settings that cannot be measured with; whatever a
    candidate raises passes through.
    """
    if not candidates or inputs < 1 or min_repetitions < 1:
        raise ArgumentError(
            f"There is nothing to time: {len(candidates)} candidates, {inputs} inputs, {min_repetitions} repetitions. "
            "Give at least one of each."
        )
    device = torch.device(device)
    deadline = time.perf_counter() + budget_s
    turn = 0
    for call in candidates.values():
        turn = _warm_up(call, device, warmup_s, inputs, turn)
    names = list(candidates)
    run_round = _round_on_cuda if device.type == "cuda" else _round_on_cpu
    times: dict[str, list[float]] = {name: [] for name in names}
    rounds = 0
    while rounds < min_repetitions or (rounds < MAX_REPETITIONS and time.perf_counter() < deadline):
        first = rounds % len(names)
        order = names[first:] + names[:first]
        for name, elapsed_us in zip(order, run_round([candidates[name] for name in order], inputs, turn), strict=True):
            times[name].append(elapsed_us)
        turn += len(names)
        rounds += 1
    return {name: summarise(samples) for name, samples in times.items()}


def summarise(times_us: Sequence[float]) -> Measurement:
    """Return the median and half the interquartile range of some times, in microseconds."""
    q25, _, q75 = _quartiles(times_us)
    return Measurement(
        median_us=statistics.median(times_us),
        spread_us=(q75 - q25) / 2,
        repetitions=len(times_us),
        best_us=min(times_us),
    )


def interleaved_ratio(
    a: Callable[[], object],
    b: Callable[[], object],
    *,
    rounds: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Ratio:
    """Return the time of `a` over that of `b`, run in turns, each round in the other order.

    For two programs on a busy machine use one thread and `clock=time.process_time`. Both must have finished their work
    when they return: synchronise inside them on a GPU. Raises ArgumentError for fewer than one round.
    """
    if rounds < 1:
        raise ArgumentError(f"interleaved_ratio(rounds={rounds}): at least one round is needed, some 20 say something.")
    for _ in range(warmup):
        a()
        b()
    ratios = []
    for index in range(rounds):
        if index % 2:
            time_b = _elapsed(b, clock)
            time_a = _elapsed(a, clock)
        else:
            time_a = _elapsed(a, clock)
            time_b = _elapsed(b, clock)
        # A clock too coarse to see b at all must not end in a division by zero.
        ratios.append(time_a / max(time_b, 1e-9))
    q25, median, q75 = _quartiles(ratios)
    return Ratio(median=median, q25=q25, q75=q75, rounds=rounds)


def _elapsed(call: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    call()
    return clock() - start


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    q25, median, q75 = statistics.quantiles(values, n=4, method="inclusive")
    return q25, median, q75


def _warm_up(call: Candidate, device: torch.device, warmup_s: float, inputs: int, turn: int) -> int:
    """Call for at least `warmup_s` seconds, once at least; return the next input's turn."""
    until = time.perf_counter() + warmup_s
    while True:
        call(turn % inputs)
        _synchronise(device)
        turn += 1
        if time.perf_counter() >= until:
            return turn


def _round_on_cpu(calls: Sequence[Candidate], inputs: int, turn: int) -> list[float]:
    times = []
    for offset, call in enumerate(calls):
        index = (turn + offset) % inputs
        start = time.perf_counter()
        call(index)
        times.append((time.perf_counter() - start) * 1e6)
    return times


def _round_on_cuda(calls: Sequence[Candidate], inputs: int, turn: int) -> list[float]:
    events = [(_event(), _event()) for _ in calls]
    for offset, (call, (start, end)) in enumerate(zip(calls, events, strict=True)):
        start.record()
        call((turn + offset) % inputs)
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in events]


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch does not annotate it


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
