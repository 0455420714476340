"""How a plan gets its times, and which sites it may change."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

import torch

from loka.dispatch.profile import DeviceProfile
from loka.hardware import DeviceInfo, current_device, device_info
from loka.timing import Progress

DEFAULT_BUDGET_S: Final[float] = 30.0

# Which sites may leave high precision: patterns (names, globs, `re:`), or a function of the site's name.
Filter = str | Iterable[str] | Callable[[str], bool]


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanOptions:
    """How a plan gets its times, and which sites may change."""

    device: torch.device
    profile: DeviceProfile | None = None
    assume_speedup: float | None = None
    measure: bool = True
    budget_s: float = DEFAULT_BUDGET_S
    on_progress: Progress | None = None
    filter: Filter | None = None

    @property
    def info(self) -> DeviceInfo:
        """The device planned for."""
        return self.profile.device if self.profile is not None else device_info(self.device)

    @property
    def measures(self) -> bool:
        """Whether missing times are measured: not for another device, and not where speed is assumed anyway."""
        return self.measure and self.profile is None and self.assume_speedup is None


def device_of(device: torch.device | str | None) -> torch.device:
    """Return the device that is meant, by default CUDA if there is one."""
    return current_device() if device is None else torch.device(device)


def profile_at(profile: str | os.PathLike[str] | DeviceProfile | None) -> DeviceProfile | None:
    """Return a device profile, read from its path where it is one; raise PlanError for a file that is none."""
    return profile if profile is None or isinstance(profile, DeviceProfile) else DeviceProfile.load(profile)
