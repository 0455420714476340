"""How long a kernel takes on a device: from measurements, from a profile made elsewhere, or by assumption.

A device profile is the measured times of one device as JSON, so that a plan for one machine can be made on another. A
time answers for exactly one shape: nothing is interpolated, and a shape that was never timed is "untimed".
"""

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from loka import document
from loka.errors import ArgumentError, PlanError
from loka.hardware import DeviceInfo
from loka.kernel_registry.spec import GemmRequest
from loka.probes.records import Timing
from loka.roofline import Ceilings

KIND: Final[str] = "loka-device-profile"
SCHEMA: Final[int] = 1

Source = Literal["measured", "example"]


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelTime:
    """One kernel's time for one product. `assumed`: it was never measured and may only be read as a ratio."""

    median_us: float
    spread_us: float
    source: str
    assumed: bool = False


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

    def of_baseline(self, kernel: str, request: GemmRequest) -> KernelTime | None:
        """Return a baseline's time; under an assumption, where it was never timed, one unit."""
        time = self.lookup(kernel, request)
        if time is None and self.assume_speedup is not None:
            return KernelTime(median_us=1.0, spread_us=0.0, source=self.assumption, assumed=True)
        return time

    def of_candidate(self, kernel: str, request: GemmRequest, baseline: KernelTime | None) -> KernelTime | None:
        """Return a candidate's time; that of an emulated kernel is the assumption where there is one."""
        if self.assume_speedup is not None and baseline is not None and kernel.startswith("emulated."):
            return KernelTime(
                median_us=baseline.median_us / self.assume_speedup,
                spread_us=0.0,
                source=self.assumption,
                assumed=True,
            )
        return self.lookup(kernel, request)


def _age(timing: Timing) -> tuple[str, str, float, float]:
    return (timing.created, timing.values, timing.median_us, timing.spread_us)
