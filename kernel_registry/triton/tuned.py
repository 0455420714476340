"""Measured launches of our GEMM, as data: which tiles were fastest, on which device, with which versions and sources.

A tuning file is JSON, of one device, written by `loka bench --tune`. It is used only where its provenance is the
present's: the same device, the same versions of torch and Triton, the same source of the kernels. Anything else, or a
file that is damaged, is set aside with one warning; the kernels then run on the launches that `gemm` has in its source.

A launch answers for one n and k, and for the values of m between half its own and its own: outside of what was
measured nothing is guessed.

`LOKA_TUNING` names the file, or is "off". Without it, it is `~/.cache/loka/tuning/<device>.json`.
"""

import functools
import hashlib
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Final

import torch

from loka import document
from loka.errors import PlanError
from loka.hardware import DeviceInfo, device_info

logger = logging.getLogger("loka.kernel_registry")

KIND: Final[str] = "loka-tuning"
SCHEMA: Final[int] = 1
VARIABLE: Final[str] = "LOKA_TUNING"
OFF: Final[str] = "off"
# The files whose text decides how fast a launch is.
_SOURCES: Final[tuple[str, ...]] = ("gemm.py", "interpreter.py")


Key = tuple[int, int, int, int]  # group_k, bucket of m, n, k


@dataclass(frozen=True, kw_only=True, slots=True)
class TunedLaunch:
    """The fastest launch of one product, with its time and that of the launch it was compared with, in microseconds."""

    group_k: int  # elements of k that share a scale: 0 (all), 128 or 32
    m: int  # serves m / 2 < rows <= m
    n: int
    k: int
    block_m: int
    block_n: int
    group_m: int
    num_warps: int
    num_stages: int
    splits: int
    median_us: float
    spread_us: float
    default_us: float

    def __post_init__(self) -> None:
        """Refuse what no kernel can be launched with."""
        for name, value in (("block_m", self.block_m), ("block_n", self.block_n), ("num_warps", self.num_warps)):
            if not 1 <= value <= 512 or value & (value - 1):
                raise PlanError(f"{name} is a power of two up to 512, not {value}")
        if self.group_k not in (0, 32, 128) or not 1 <= self.num_stages <= 16:
            raise PlanError(f"no launch has group_k = {self.group_k} and num_stages = {self.num_stages}")
        if not 1 <= self.group_m <= 64 or not 1 <= self.splits <= 64 or self.m != bucket(self.m):
            raise PlanError(f"no launch has group_m = {self.group_m}, splits = {self.splits} and m = {self.m}")

    @property
    def key(self) -> "Key":
        """What two launches share that serve the same products."""
        return self.group_k, self.m, self.n, self.k


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


def bucket(m: int) -> int:
    """Return the power of two that m rounds up to."""
    return 1 << max(int(m) - 1, 0).bit_length()


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
def launches_here(device: torch.device) -> Mapping[Key, TunedLaunch]:
    """Return the measured launches that the kernels use on a device: none without a file of this device and kernels.

    The file is read once per process; `launches_here.cache_clear()` forgets it.
    """
    path = tuning_path(device)
    tuning = None if path is None else read_tuning(path, Provenance.here(device))
    return {launch.key: launch for launch in tuning.launches} if tuning is not None else {}


def read_tuning(path: Path, present: Provenance) -> Tuning | None:
    """Read a tuning that holds at present; None, and a warning, where it is damaged or of something else."""
    if not path.is_file():
        return None
    try:
        tuning = Tuning.load(path)
    except PlanError as error:
        logger.warning("launches are not tuned: %s", error)
        return None
    foreign = tuning.provenance.differs(present)
    if foreign:
        logger.warning("launches are not tuned: %s is set aside, since %s", path, foreign)
        return None
    return tuning


def _versions() -> dict[str, str]:
    return {"torch": torch.__version__, "triton": metadata.version("triton")}


@functools.cache
def _source() -> str:
    digest = hashlib.sha256()
    for name in _SOURCES:
        digest.update(Path(__file__).with_name(name).read_bytes())
    return digest.hexdigest()
