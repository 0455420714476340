"""How long a kernel takes on a device: from measurements, from a profile made elsewhere, or by assumption.

A device profile is the measured times of one device as JSON, so that a plan for one machine can be made on another. A
time answers for exactly one shape: nothing is interpolated, and a shape that was never timed is "untimed".

Where the rows of a product vary, its time is the mean over the row counts that stand for its calls, each weighted with
its share of them. Row counts that were never timed are left out where the others carry nearly all the calls and rows.
"""

import functools
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from loka import document
from loka.errors import ArgumentError, PlanError
from loka.hardware import DeviceInfo
from loka.kernel_registry.spec import GemmRequest
from loka.probes.capturing.row_counts import RowCounts
from loka.probes.records import Timing
from loka.roofline import Ceilings

KIND: Final[str] = "loka-device-profile"
SCHEMA: Final[int] = 1

Source = Literal["measured", "example"]

# What the timed row counts of a product have to carry at least, of its calls and of its rows, to stand for all of them.
LEAST_COVERED: Final[float] = 0.8
# Of a product that has one shape.
NO_ROWS: Final[RowCounts] = RowCounts()


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelTime:
    """One kernel's time for one product. `assumed`: it was never measured and may only be read as a ratio."""

    median_us: float  # over several row counts the mean of their medians, by weight
    spread_us: float  # the mean of their spreads: points timed on one machine drift together, so nothing averages out
    source: str
    assumed: bool = False
    at: tuple["TimeAt", ...] = ()  # where it is over row counts: what it is made of
    over: RowCounts = field(default_factory=RowCounts)

    @property
    def words(self) -> str:
        """Say which row counts it is over, as ` over 3 row counts, 8 to 2048`; nothing where it is of one shape."""
        return f" over {self.over.words}" if self.at else ""


@dataclass(frozen=True, kw_only=True, slots=True)
class TimeAt:
    """One kernel's time at one of the row counts that stand for a product's calls; `weight` is its share of them."""

    rows: int
    weight: float
    time_us: float
    spread_us: float


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceProfile:
    """The times of one device. `source` is "example" where they were made up to show something."""

    label: str
    source: Source
    device: DeviceInfo
    environment: Mapping[str, str]
    times: tuple[Timing, ...]
    ceilings: Ceilings | None = None  # what the device reaches at most, as the times were measured

    def __post_init__(self) -> None:
        """Refuse what cannot be looked up: no label, no times, a time twice, a time of another device."""
        if not self.label or not self.times:
            missing = "label" if not self.label else "times"
            raise PlanError(f"A device profile without {missing} says nothing. Export it anew: loka bench --export.")
        seen: set[tuple[object, ...]] = set()
        for timing in self.times:
            shape = f"{timing.kernel} {timing.product} {timing.m}x{timing.k}x{timing.n} {timing.dtype}"
            key = (*_key(timing), timing.values)
            if key in seen:
                raise PlanError(f"Profile {self.label!r} times {shape} on {timing.values!r} values twice. Keep one.")
            if timing.device != str(self.device):
                raise PlanError(
                    f"Profile {self.label!r} is of {self.device} but holds a time of {timing.device}: {shape}. "
                    "Write one profile per device."
                )
            if timing.median_us <= 0:
                raise PlanError(
                    f"Profile {self.label!r} says {shape} takes no time. Export it anew: loka bench --export."
                )
            seen.add(key)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the profile as JSON, one time per line."""
        times = sorted(document.compact(document.encode(timing)) for timing in self.times)
        head = {
            "kind": KIND,
            "schema": SCHEMA,
            "label": self.label,
            "source": self.source,
            "device": document.encode(self.device),
            "environment": dict(self.environment),
            "ceilings": document.encode(self.ceilings),
        }
        lines = [f'"{key}":{document.compact(value)},\n' for key, value in head.items()]
        document.write_atomically(path, "{" + "".join(lines) + '"times":[\n' + ",\n".join(times) + "\n]}\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "DeviceProfile":
        """Read a profile; raise PlanError for anything that is not one."""
        return document.decode(cls, document.read(path, kind=KIND, schema=SCHEMA), str(path))


_Key = tuple[str, str, int, int, int, int, str]


def _key(timing: Timing) -> _Key:
    return (timing.kernel, timing.product, timing.batch, timing.m, timing.n, timing.k, timing.dtype)


def time_key(kernel: str, request: GemmRequest) -> _Key:
    """Return what two times must share to be times of the same thing."""
    return (kernel, request.product, request.batch, request.m, request.n, request.k, request.dtype)


@functools.lru_cache(maxsize=4096)  # asked for every candidate of a product, each time at the same rows
def at_rows(request: GemmRequest, rows: int) -> GemmRequest:
    """Return the same product with other rows: m, of wgrad k."""
    return replace(request, k=rows) if request.product == "wgrad" else replace(request, m=rows)


def varies(request: GemmRequest, rows: RowCounts) -> bool:
    """Whether row counts say more of a product than its own shape does."""
    if not rows.points:
        return False
    own = request.k if request.product == "wgrad" else request.m
    return (rows.points[0].rows, len(rows.points) + rows.left_out) != (own, 1)


def newest(timings: Iterable[Timing]) -> tuple[Timing, ...]:
    """Return one time per kernel and shape, the newest, in an order that does not depend on theirs."""
    found: dict[_Key, Timing] = {}
    for timing in timings:
        key = _key(timing)
        if key not in found or _age(found[key]) < _age(timing):
            found[key] = timing
    return tuple(found[key] for key in sorted(found))


class TimeTable:
    """Times by kernel and shape, with an optional assumption about the emulated kernels."""

    def __init__(
        self, timings: Iterable[Timing] = (), *, source: str = "measured", assume_speedup: float | None = None
    ) -> None:
        """Index some timings; of several for one shape the newest counts. Raises ArgumentError for a bad assumption."""
        if assume_speedup is not None and not (math.isfinite(assume_speedup) and assume_speedup > 0):
            raise ArgumentError(f"assume_speedup={assume_speedup!r}: a speed-up is a positive number, e.g. 1.3.")
        self.assume_speedup = assume_speedup
        self.source = source
        self._times = {
            _key(timing): KernelTime(median_us=timing.median_us, spread_us=timing.spread_us, source=source)
            for timing in newest(timings)
            if timing.median_us > 0
        }

    def __len__(self) -> int:
        return len(self._times)

    @property
    def assumption(self) -> str:
        """The assumption in words, e.g. `assumed 1.3x`; empty where there is none."""
        return f"assumed {self.assume_speedup:g}x" if self.assume_speedup is not None else ""

    def lookup(self, kernel: str, request: GemmRequest) -> KernelTime | None:
        """Return the time of a kernel on exactly this shape, None where it was never timed."""
        return self._times.get(time_key(kernel, request))

    def timed(self, kernel: str, request: GemmRequest, rows: RowCounts) -> RowCounts | None:
        """Return those of a product's row counts at which a kernel was timed; None where they stand for too few."""
        if not varies(request, rows):
            return rows
        missing = self.missing(kernel, request, rows)
        known = rows.only({each.rows for each in rows.points} - {*missing})
        return known if known.covers(rows, LEAST_COVERED) else None

    def missing(self, kernel: str, request: GemmRequest, rows: RowCounts) -> tuple[int, ...]:
        """Return the row counts of a product at which a kernel was never timed; none where its rows do not vary."""
        if not varies(request, rows):
            return ()
        return tuple(each.rows for each in rows.points if self.lookup(kernel, at_rows(request, each.rows)) is None)

    def expected(self, kernel: str, request: GemmRequest, rows: RowCounts | None) -> KernelTime | None:
        """Return the mean time of a kernel over the row counts of a product, None where it lacks the time of one.

        Of a product whose rows do not vary: its time on exactly this shape.
        """
        if rows is None:
            return None
        if not varies(request, rows):
            return self.lookup(kernel, request)
        found = [(each, self.lookup(kernel, at_rows(request, each.rows))) for each in rows.points]
        known = [(point, time) for point, time in found if time is not None]
        if len(known) < len(found):
            return None
        total = math.fsum(point.weight for point, _ in known)
        return KernelTime(
            median_us=math.fsum(point.weight * time.median_us for point, time in known) / total,
            spread_us=math.fsum(point.weight * time.spread_us for point, time in known) / total,
            source=self.source,
            at=tuple(
                TimeAt(rows=point.rows, weight=point.weight, time_us=time.median_us, spread_us=time.spread_us)
                for point, time in known
            ),
            over=rows,
        )

    def of_baseline(self, kernel: str, request: GemmRequest, rows: RowCounts | None = NO_ROWS) -> KernelTime | None:
        """Return a baseline's time; under an assumption, where it was never timed, one unit."""
        time = self.expected(kernel, request, rows)
        if time is None and self.assume_speedup is not None:
            return KernelTime(median_us=1.0, spread_us=0.0, source=self.assumption, assumed=True)
        return time

    def of_candidate(
        self, kernel: str, request: GemmRequest, baseline: KernelTime | None, rows: RowCounts | None = NO_ROWS
    ) -> KernelTime | None:
        """Return a candidate's time; that of an emulated kernel is the assumption where there is one."""
        if self.assume_speedup is not None and baseline is not None and kernel.startswith("emulated."):
            return KernelTime(
                median_us=baseline.median_us / self.assume_speedup,
                spread_us=0.0,
                source=self.assumption,
                assumed=True,
            )
        return self.expected(kernel, request, rows)


def _age(timing: Timing) -> tuple[str, str, float, float]:
    return (timing.created, timing.values, timing.median_us, timing.spread_us)
