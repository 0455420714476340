"""Measured launches of our kernels, as data: which were fastest, on which device, with which versions and sources.

A tuning file is JSON, of one device, written by `loka bench --tune`. It is used only where its provenance is the
present's: the same device, the same versions of torch and Triton, the same source of the kernels. Anything else, or a
file that is damaged or names a launch that is not legal here, is set aside with one warning; the kernels then run on
the launches that `launches` has in its source.

A launch answers for one key (`launches.Key`): of the extents that are rounded, for the values between half its own and
its own; outside of what was measured nothing is guessed.

`LOKA_TUNING` names the file, or is "off". Without it, it is `~/.cache/loka/tuning/<device>.json`.
"""

import contextlib
import functools
import hashlib
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Final, NamedTuple

import torch

from loka import document
from loka.errors import PlanError
from loka.formats import Pass
from loka.hardware import DeviceInfo, device_info, shared_bytes
from loka.kernel_registry.triton.launch import Key, Launch
from loka.kernel_registry.triton.launches import TUNABLES, rounded

logger = logging.getLogger("loka.kernel_registry")

KIND: Final[str] = "loka-tuning"
SCHEMA: Final[int] = 2
VARIABLE: Final[str] = "LOKA_TUNING"
OFF: Final[str] = "off"
# The files whose text decides how fast a launch is.
_SOURCES: Final[tuple[str, ...]] = (
    "launch.py",
    "launches.py",
    "gemm.py",
    "grouped.py",
    "epilogue.py",
    "epilogue_kernels.py",
    "small.py",
    "small_kernels.py",
    "quantize.py",
    "quantize_kernels.py",
    "interpreter.py",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TunedLaunch:
    """The fastest launch for one key, with its time and that of the launch it was compared with, in microseconds."""

    kernel: str
    recipe: str
    product: Pass
    dtype: str
    m: int
    n: int
    k: int
    batch: int = 1
    variant: str = ""
    launch: Launch
    median_us: float
    spread_us: float
    default_us: float

    def __post_init__(self) -> None:
        """Refuse a kernel that is not there, and extents that no call is served under."""
        if self.kernel not in TUNABLES or not TUNABLES[self.kernel].serves(self.key):
            raise PlanError(f"no kernel is launched for {self.key}")
        if self.key != rounded(self.key):
            names = " and ".join(TUNABLES[self.kernel].rounded)
            raise PlanError(f"launches of {self.kernel} are kept for powers of two of {names}, not for {self.key}")

    @property
    def key(self) -> Key:
        """What two launches share that serve the same products."""
        return Key(
            *(self.kernel, self.recipe, self.product, self.dtype, self.m, self.n, self.k, self.batch, self.variant)
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """What a measured launch depends on."""

    device: DeviceInfo
    versions: Mapping[str, str] = field(default_factory=dict)
    source: str = ""  # SHA-256 over the kernels' source

    @classmethod
    def here(cls, device: torch.device | str) -> "Provenance":
        """Return that of the present."""
        return cls(device=device_info(device), versions=_versions(), source=_source())

    def differs(self, other: "Provenance") -> str:
        """Return in what two differ, e.g. `triton 3.4.0 instead of 3.6.0`; "" where they are the same."""
        if self.device != other.device:
            return f"it is of {self.device}, and this is {other.device}"
        for name in sorted({*self.versions, *other.versions}):
            theirs, ours = self.versions.get(name, "none"), other.versions.get(name, "none")
            if theirs != ours:
                return f"it was made with {name} {theirs}, and this is {ours}"
        return "the kernels have changed since it was made" if self.source != other.source else ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuning:
    """All measured launches of one device."""

    provenance: Provenance
    created: str
    launches: tuple[TunedLaunch, ...]

    def __post_init__(self) -> None:
        """Refuse two launches for one product."""
        keys = [launch.key for launch in self.launches]
        if len(set(keys)) < len(keys):
            raise PlanError("two launches serve the same products: keep one")

    def with_launch(self, launch: TunedLaunch) -> "Tuning":
        """Return a tuning that has this launch, too, in place of an older one for the same products."""
        others = (each for each in self.launches if each.key != launch.key)
        launches = tuple(sorted((*others, launch), key=lambda each: each.key))
        return Tuning(provenance=self.provenance, created=self.created, launches=launches)

    def text(self) -> str:
        """Return the tuning as JSON, one launch per line."""
        head = {
            "kind": KIND,
            "schema": SCHEMA,
            "created": self.created,
            "provenance": document.encode(self.provenance),
        }
        lines = [f'"{key}":{document.compact(value)},\n' for key, value in head.items()]
        rows = ",\n".join(document.compact(document.encode(launch)) for launch in self.launches)
        return "{" + "".join(lines) + '"launches":[\n' + rows + "\n]}\n"

    def save(self, path: Path) -> None:
        """Write it, making the folder; raise PlanError where that fails."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PlanError(f"{path.parent} could not be made: {error.strerror}. Choose another file.") from error
        document.write_atomically(path, self.text())

    @classmethod
    def load(cls, path: Path) -> "Tuning":
        """Read a tuning file; raise PlanError for anything that is not one."""
        return document.decode(cls, document.read(path, kind=KIND, schema=SCHEMA), str(path))


def tuning_path(device: torch.device | str) -> Path | None:
    """Return the tuning file of a device, whether it exists or not; None where tuning is off."""
    given = os.environ.get(VARIABLE, "")
    if given.lower() == OFF:
        return None
    if given:
        return Path(given)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = re.sub(r"[^a-z0-9]+", "-", str(device_info(device)).lower()).strip("-")
    return cache / "loka" / "tuning" / f"{name}.json"


@functools.cache
def launches_here(device: torch.device) -> Mapping[Key, Launch]:
    """Return the measured launches that the kernels use on a device: none without a file of this device and kernels.

    The file is read once per process; `launches_here.cache_clear()` forgets it.
    """
    path = tuning_path(device)
    tuning = None if path is None else read_tuning(path, Provenance.here(device))
    return {each.key: each.launch for each in tuning.launches} if tuning is not None else {}


class Forced(NamedTuple):
    """A launch that every call of one kernel takes, and the keys of the calls that took it."""

    kernel: str
    launch: Launch
    keys: set[Key]


_FORCED: Final[ContextVar[Forced | None]] = ContextVar("loka_forced_launch", default=None)


@contextlib.contextmanager
def forced(kernel: str, launch: Launch) -> Iterator[Forced]:
    """Have every call of a kernel take one launch in this block, legal or not: for tuning and tests."""
    state = Forced(kernel, launch, set())
    token = _FORCED.set(state)
    try:
        yield state
    finally:
        _FORCED.reset(token)


def measured(key: Key, device: torch.device) -> Launch | None:
    """Return the measured launch of a call with these extents, None where there is none.

    A dynamic extent has no measured launch: every bucket of a tuning would become a graph.
    """
    state = _FORCED.get()
    if state is not None and state.kernel == key.kernel:
        state.keys.add(rounded(key))
        return state.launch
    launches = launches_here(device)
    if not launches or any(isinstance(extent, torch.SymInt) for extent in (key.m, key.n, key.k, key.batch)):
        return None
    return launches.get(rounded(key))


def launch_for(key: Key, device: torch.device, programs: int = 1) -> Launch:
    """Return the measured launch of a call with these extents, else the untuned one."""
    return measured(key, device) or TUNABLES[key.kernel].untuned(key, programs)


def read_tuning(path: Path, present: Provenance) -> Tuning | None:
    """Read a tuning that holds at present; None, and a warning, where it is damaged or of something else."""
    if not path.is_file():
        return None
    try:
        tuning = Tuning.load(path)
    except PlanError as error:
        logger.warning("launches are not tuned: %s", error)
        return None
    foreign = why_not(tuning, present)
    if foreign:
        logger.warning("launches are not tuned: %s is set aside, since %s", path, foreign)
        return None
    return tuning


def why_not(tuning: Tuning, present: Provenance) -> str:
    """Return why a tuning does not hold at present, "" where it does."""
    foreign = tuning.provenance.differs(present)
    if foreign:
        return foreign
    shared = shared_bytes(present.device)
    for each in tuning.launches:
        illegal = TUNABLES[each.kernel].illegal(each.key, each.launch, shared)
        if illegal:
            return f"its launch of {each.kernel} for {each.m}x{each.k}x{each.n} is not legal here: {illegal}"
    return ""


def _versions() -> dict[str, str]:
    return {"torch": torch.__version__, "triton": metadata.version("triton")}


@functools.cache
def _source() -> str:
    digest = hashlib.sha256()
    for name in _SOURCES:
        digest.update(Path(__file__).with_name(name).read_bytes())
    return digest.hexdigest()
